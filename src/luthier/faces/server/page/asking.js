// Asking the server for answers, several at once, and stopping them.
import { messagesOf } from "./conversation.js";
import { readSettings } from "./settings.js";
import { streamAnswer } from "./stream.js";
import { lineUp } from "./tokens.js";

const LIKELIEST = 5;
const going = new Map();

export const isAnyGoing = () => going.size > 0;

export function stop(answer) {
  going.get(answer)?.abort();
}

export function stopAll() {
  for (const one of going.values()) one.abort();
}

// What is sent for a turn of a column.
export function requestOf(column, settings, turn, seed = null) {
  const body = { model: column.model, messages: messagesOf(column, settings, turn), ...readSettings(settings).body };
  return seed === null ? body : { ...body, seed };
}

// Let the answer of a turn be written into it; `more` is called when there is more of it, also at its end.
export async function write(column, settings, turn, more) {
  const answer = turn.answer, controller = new AbortController(), begun = performance.now();
  const since = () => Math.round(performance.now() - begun);
  const body = {
    ...requestOf(column, settings, turn, answer.seed),
    stream: true, stream_options: { include_usage: true }, logprobs: true, top_logprobs: LIKELIEST,
  };
  const lines = lineUp(answer.tokens);
  let used = null;
  going.set(answer, controller);
  try {
    for await (const chunk of streamAnswer(body, controller.signal)) {
      used = chunk.usage ?? used;
      for (const { delta, logprobs, finish_reason: finish } of chunk.choices) {
        const logs = logprobs?.content ?? [];
        if (delta.content || delta.tool_calls) {
          answer.first ||= since();
          answer.took = since();
        }
        answer.count += logs.length;
        if (delta.content) {
          answer.text += delta.content;
          lines.add(delta.content, logs);
        }
        for (const call of delta.tool_calls ?? []) addCall(answer.calls, call);
        answer.finish = finish ?? answer.finish;
      }
      more();
    }
    answer.state = "done";
  } catch (error) {
    answer.state = error.name === "AbortError" ? "stopped" : "failed";
    if (answer.state === "failed") answer.error = error.message;
    answer.status = error.status;
  }
  lines.end();
  answer.count = used?.completion_tokens ?? answer.count;
  going.delete(answer);
  more();
}

function addCall(calls, { index, id, function: part }) {
  calls[index] ??= { id, name: "", arguments: "" };
  calls[index].name += part.name ?? "";
  calls[index].arguments += part.arguments ?? "";
}
