// What is talked about: columns, each a model and its turns; and how it is kept, asked and exported.
import { DEFAULTS } from "./settings.js";

export const MOST_COLUMNS = 4;
const STORED = "luthier.conversation";

// {columns: [{id, model, turns: [{id, user, answer}]}], settings, view, chosen, target}: one turn in several columns has one id.
export function blank() {
  return { columns: [newColumn("")], settings: { ...DEFAULTS }, view: "rendered", chosen: 0, target: "all" };
}

export function newColumn(model, turns = []) {
  return { id: newId(), model, turns: structuredClone(turns) };
}

export function newAnswer(model, seed = null) {
  return { state: "writing", model, seed, text: "", tokens: [], calls: [], finish: null, error: "", first: 0, took: 0, count: 0 };
}

export function newId() {
  return Math.random().toString(36).slice(2, 10);
}

export function load() {
  try {
    const found = JSON.parse(localStorage.getItem(STORED));
    if (!found?.columns?.length) return null;
    // What was being written when the page was left is written no more.
    for (const { answer } of found.columns.flatMap((column) => column.turns)) if (answer.state === "writing") answer.state = "stopped";
    return { ...blank(), ...found, settings: { ...DEFAULTS, ...found.settings } };
  } catch {
    return null;
  }
}

// Whether it could be kept. Probabilities are left out where they make it too large.
export function keep(state) {
  for (const replace of [undefined, (name, value) => (name === "tokens" ? [] : value)]) {
    try {
      localStorage.setItem(STORED, JSON.stringify(state, replace));
      return true;
    } catch {
      continue;
    }
  }
  return false;
}

// The turns before `turn` and its question, as OpenAI's API takes them. An answer that failed was not said. What is written after
// calls of tools is what these gave.
export function messagesOf(column, settings, turn) {
  const messages = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  let calls = [];
  for (const one of column.turns) {
    const asked = calls.map(({ id }) => ({ role: "tool", tool_call_id: id, content: one.user }));
    if (!asked.length) asked.push({ role: "user", content: one.user });
    if (one === turn) return [...messages, ...asked];
    const said = answerMessage(one.answer);
    if (!said) continue;
    messages.push(...asked, said);
    calls = said.tool_calls ?? [];
  }
  return messages;
}

function answerMessage(answer) {
  if (answer.calls.length) {
    const calls = answer.calls.map(({ id, name, arguments: given }) => ({ id, type: "function", function: { name, arguments: given } }));
    return { role: "assistant", content: answer.text, tool_calls: calls };
  }
  return answer.text ? { role: "assistant", content: answer.text } : null;
}

// One line for `luthier tune`.
export function asLine(column, settings) {
  return JSON.stringify({ messages: messagesOf(column, settings) }) + "\n";
}
