// The page: its state, and what people do with it.
import { isAnyGoing, requestOf, stop, stopAll, write } from "./asking.js";
import { drawColumns, showMore } from "./columns.js";
import { asLine, blank, keep, load, MOST_COLUMNS, newAnswer, newColumn, newId } from "./conversation.js";
import { announce, at, make, toast } from "./dom.js";
import { askForKey, canChat, watchModels } from "./models.js";
import { focusSetting, showWrong, wireSettings } from "./settings.js";
import { asCurl, asPython } from "./snippets.js";
import { hideTip, wireTokens } from "./tokens.js";
import { putWords, say, switchLanguage } from "./words.js";

const kept = load();
const state = kept ?? blank();
const narrow = matchMedia("(max-width: 760px)");
const app = {
  state, models: [], known: false,
  choose(place) { state.chosen = place; draw(); },
  setModel(column, name) { column.model = name; changed(); draw(); },
  removeColumn(column) {
    column.turns.forEach((turn) => stop(turn.answer));
    state.columns.splice(state.columns.indexOf(column), 1);
    changed();
    draw();
  },
  stop,
  // What failed is asked again as it was; what was answered, with another seed.
  regenerate(column, turn) { start(column, turn, turn.answer.error ? turn.answer.seed : Math.floor(Math.random() * 2 ** 31)); },
  removeTurn,
  resend,
  save,
  curl: (column) => asCurl(requestOf(column, state.settings, column.turns.at(-1))),
  python: (column) => asPython(requestOf(column, state.settings, column.turns.at(-1))),
};
const readAgain = watchModels(takeModels);
const showSettings = wireSettings(state, changed);

function draw() {
  hideTip();
  drawColumns(app);
  at("legend").hidden = state.view !== "tokens";
  drawSending();
}

function drawSending() {
  at("stop").hidden = !isAnyGoing();
  at("send").hidden = isAnyGoing();
}

let told = false, saving;
function changed() {
  clearTimeout(saving);
  saving = setTimeout(keepNow, 300);
}

function keepNow() {
  clearTimeout(saving);
  const done = keep(state);
  if (!done && !told) toast(say("too_large"));
  told = !done;
}

// The first columns have the first models; a second one stands beside it where there is one, and room.
function takeModels(models) {
  // Nothing is drawn anew for nothing: somebody may be changing a message.
  if (app.known && JSON.stringify(models) === JSON.stringify(app.models)) return;
  const chat = models.filter(canChat);
  app.models = models;
  if (!kept && !app.known && chat.length > 1 && !narrow.matches && state.columns.length === 1) state.columns.push(newColumn(""));
  app.known = true;
  state.columns.forEach((column, place) => { column.model ||= chat.length ? chat[place % chat.length].id : ""; });
  draw();
}

function send(text) {
  const wrong = showWrong(state);
  if (wrong) {
    openSettings(true);
    focusSetting(wrong);
    return false;
  }
  if (!text.trim() || isAnyGoing() || !app.models.length) return false;
  const id = newId();
  for (const column of state.columns) {
    if (state.target !== "all" && state.target !== column.id) continue;
    const turn = { id, user: text, answer: null };
    column.turns.push(turn);
    start(column, turn, null);
  }
  for (const log of document.querySelectorAll(".log")) log.scrollTop = log.scrollHeight;
  return true;
}

// Let a turn be answered, in place of the answer that it has.
async function start(column, turn, seed) {
  if (turn.answer) stop(turn.answer);
  const answer = (turn.answer = newAnswer(column.model, seed));
  const writing = write(column, state.settings, turn, () => showMore(answer));
  draw();
  await writing;
  changed();
  drawSending();
  announce(answer.error ? say("failed", { name: answer.model, why: answer.error }) : `${say("answered", { name: answer.model })} ${answer.text}`);
  if (answer.status === 401) askForKey(answer.error);
  if (answer.status === 503 || answer.status === 404) readAgain();
}

// The columns that have the turn get the new message in its place, and lose what came after.
function resend(turn, text) {
  if (showWrong(state)) return send(text);
  const id = newId();
  for (const column of state.columns) {
    const place = column.turns.findIndex((one) => one.id === turn.id);
    if (place < 0) continue;
    column.turns.splice(place).forEach((one) => stop(one.answer));
    const again = { id, user: text, answer: null };
    column.turns.push(again);
    start(column, again, null);
  }
  at("message").focus();
}

function removeTurn(turn) {
  withUndo("deleted", () => {
    for (const column of state.columns) {
      column.turns = column.turns.filter((one) => one.id !== turn.id || (stop(one.answer), false));
    }
  });
}

function withUndo(word, act) {
  const before = state.columns.map((column) => ({ ...column, turns: [...column.turns] }));
  act();
  changed();
  draw();
  at("message").focus();
  toast(say(word), () => { state.columns = before; changed(); draw(); });
}

function save(column) {
  const blob = new Blob([asLine(column, state.settings)], { type: "application/jsonl" });
  const link = make("a", { href: URL.createObjectURL(blob), download: "conversation.jsonl" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function openSettings(open) {
  at("settings").hidden = !open;
  at("open-settings").setAttribute("aria-expanded", String(open));
  if (open && narrow.matches) at("close-settings").focus();
}

function fitMessage() {
  const field = at("message");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, innerHeight * 0.35)}px`;
}

function wire() {
  const field = at("message");
  at("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (send(field.value)) field.value = "";
    fitMessage();
  });
  field.addEventListener("input", fitMessage);
  field.addEventListener("keydown", (event) => {
    // Enter that ends a word in an input method does not send.
    if (event.isComposing || event.keyCode === 229) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      at("composer").requestSubmit();
    } else if (event.key === "ArrowUp" && !field.value) {
      const last = state.columns.flatMap((column) => column.turns.slice(-1)).at(-1);
      if (!last) return;
      event.preventDefault();
      field.value = last.user;
      fitMessage();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Escape") escape();
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
      event.preventDefault();
      focusModel();
    }
  });
  document.addEventListener("click", (event) => {
    for (const menu of document.querySelectorAll("details.menu[open]")) if (!menu.contains(event.target)) menu.open = false;
  });
  at("stop").addEventListener("click", stopAll);
  at("target").addEventListener("change", () => { state.target = at("target").value; changed(); draw(); });
  at("views").addEventListener("change", (event) => { state.view = event.target.value; changed(); draw(); });
  at("add-column").addEventListener("click", addColumn);
  at("new-conversation").addEventListener("click", () => {
    stopAll();
    withUndo("cleared", () => { for (const column of state.columns) column.turns = []; });
  });
  at("open-settings").addEventListener("click", () => openSettings(at("settings").hidden));
  at("close-settings").addEventListener("click", () => { openSettings(false); at("open-settings").focus(); });
  at("language").addEventListener("click", () => { switchLanguage(); showSettings(); draw(); });
  addEventListener("pagehide", keepNow);
  wireTokens(at("columns"));
}

// A new column goes on from where the first one is.
function addColumn() {
  if (state.columns.length >= MOST_COLUMNS) return;
  const used = state.columns.map((column) => column.model), chat = app.models.filter(canChat);
  const next = chat.find((one) => !used.includes(one.id)) ?? chat[0];
  const turns = state.columns[0].turns.filter((turn) => turn.answer.state !== "writing");
  state.columns.push(newColumn(next?.id ?? "", turns));
  state.chosen = state.columns.length - 1;
  changed();
  draw();
}

function escape() {
  hideTip();
  const menu = document.querySelector("details.menu[open]");
  if (menu) {
    menu.open = false;
    menu.querySelector("summary").focus();
  } else if (isAnyGoing()) stopAll();
  else if (narrow.matches && !at("settings").hidden) at("close-settings").click();
}

// Of the chosen column, and from there of the next.
function focusModel() {
  const all = [...document.querySelectorAll("select.model")], here = all.indexOf(document.activeElement);
  const place = here < 0 ? state.chosen : (here + 1) % all.length;
  if (narrow.matches && place !== state.chosen) app.choose(place);
  document.querySelectorAll("select.model")[place]?.focus();
}

putWords();
document.querySelector(`#views input[value="${state.view}"]`).checked = true;
wire();
draw();
at("message").focus();
