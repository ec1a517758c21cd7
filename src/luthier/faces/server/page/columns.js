// The columns: each a model's choice and its turns; on narrow screens one of them, under tabs.
import { answerElement } from "./answers.js";
import { MOST_COLUMNS } from "./conversation.js";
import { action, at, copy, keepingFocus, make, toast } from "./dom.js";
import { canChat, labelOf, stateWord } from "./models.js";
import { number, say } from "./words.js";

const live = new WeakMap();
const waiting = new Set();

// Draw everything that `app` holds.
export function drawColumns(app) {
  keepingFocus(() => {
    const { state } = app;
    state.chosen = Math.min(state.chosen, state.columns.length - 1);
    const tops = [...document.querySelectorAll(".log")].map((log) => [log.dataset.column, log.scrollTop, isAtEnd(log)]);
    at("tabs").hidden = state.columns.length < 2;
    at("tabs").replaceChildren(...state.columns.map((column, place) => tab(app, column, place)));
    at("columns").style.setProperty("--columns", state.columns.length);
    at("columns").replaceChildren(...state.columns.map((column, place) => columnElement(app, column, place)));
    for (const log of document.querySelectorAll(".log")) {
      const before = tops.find(([id]) => id === log.dataset.column);
      log.scrollTop = !before || before[2] ? log.scrollHeight : before[1];
    }
    drawTargets(state);
    at("add-column").disabled = state.columns.length >= MOST_COLUMNS;
  });
}

// There is more of an answer: shown at the next frame, however many pieces came before it.
export function showMore(answer) {
  if (!waiting.size) requestAnimationFrame(flush);
  waiting.add(answer);
}

function flush() {
  for (const answer of waiting) {
    const element = live.get(answer), log = element?.closest(".log");
    if (!log) continue;
    const end = isAtEnd(log);
    element.update();
    if (end) log.scrollTop = log.scrollHeight;
  }
  waiting.clear();
}

const isAtEnd = (log) => log.scrollHeight - log.scrollTop - log.clientHeight < 60;

function tab(app, column, place) {
  const chosen = place === app.state.chosen;
  return make("button", {
    type: "button", role: "tab", class: "tab", id: `tab-${column.id}`, "aria-controls": `column-${column.id}`, "aria-selected": String(chosen),
    tabindex: chosen ? "0" : "-1", "data-key": `tab ${place}`, text: column.model || say("column", { n: place + 1 }),
    onclick: () => app.choose(place),
    onkeydown: (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const count = app.state.columns.length;
      app.choose((place + step + count) % count);
      at("tabs").children[app.state.chosen].focus();
    },
  });
}

function columnElement(app, column, place) {
  const log = make("div", { class: "log", "data-column": column.id, tabindex: "0", role: "log", "aria-live": "off", "aria-label": say("column", { n: place + 1 }) });
  if (column.turns.length) log.append(...column.turns.map((turn, at) => turnElement(app, column, turn, at === column.turns.length - 1)));
  else log.append(emptyElement(app, column));
  return make(
    "section", { class: "column", id: `column-${column.id}`, "data-chosen": String(place === app.state.chosen), "aria-label": say("column", { n: place + 1 }) },
    headElement(app, column, place), stateElement(app, column), log,
  );
}

function headElement(app, column, place) {
  const select = make("select", {
    class: "model", "aria-label": say("model", { n: place + 1 }), "data-key": `model ${column.id}`,
    onchange: () => app.setModel(column, select.value), onfocus: () => { app.state.chosen = place; },
  });
  select.append(...app.models.map((one) => make("option", { value: one.id, text: labelOf(one), disabled: !canChat(one) })));
  if (!app.models.length) select.append(make("option", { value: column.model, text: column.model || (app.known ? say("no_models") : "…") }));
  else if (!app.models.some((one) => one.id === column.model)) {
    select.append(make("option", { value: column.model, text: say("model_state", { name: column.model, state: say("state_gone") }) }));
  }
  select.value = column.model;
  const more = app.state.columns.length > 1;
  const close = make("button", {
    type: "button", class: "square quiet", text: "×", "aria-label": say("remove_column", { n: place + 1 }), "data-key": `close ${column.id}`,
    onclick: () => app.removeColumn(column),
  });
  return make("div", { class: "column-head" }, select, menu(app, column, place), more ? close : null);
}

function menu(app, column, place) {
  const entry = (word, act) => action(say(word), `${word} ${column.id}`, async () => { await act(); root.open = false; });
  const copied = (text) => async () => toast(say((await copy(text())) ? "copied" : "copy_failed"));
  const root = make(
    "details", { class: "menu" },
    make("summary", { text: say("more"), "aria-label": say("more_label", { n: place + 1 }), "data-key": `more ${column.id}` }),
    make(
      "div", { class: "menu-list" }, entry("save_jsonl", () => app.save(column)),
      entry("copy_curl", copied(() => app.curl(column))), entry("copy_python", copied(() => app.python(column))),
    ),
  );
  root.hidden = !column.turns.length;
  return root;
}

// What keeps a model from answering.
function stateElement(app, column) {
  const model = app.models.find((one) => one.id === column.model);
  if (!model || model.state === "ready") return null;
  const text = model.state === "loading" ? say("model_waits") : say("model_down", { state: stateWord(model.state) });
  return make("p", { class: "column-state", role: "status", text });
}

// What the model is, until there is something that it said.
function emptyElement(app, column) {
  if (app.known && !app.models.length) {
    return make("div", { class: "empty" }, make("h2", { text: say("no_models") }), make("p", { text: say("no_models_help") }));
  }
  if (app.state.columns.length === 1) {
    return make("div", { class: "empty" }, make("h2", { text: say("empty_title") }), make("p", { text: say("empty_one") }));
  }
  const model = app.models.find((one) => one.id === column.model), facts = [];
  if (model && model.root !== model.id) facts.push(say("from", { source: model.root }));
  if (model?.max_model_len) facts.push(say("context", { n: number(model.max_model_len) }));
  return make("div", { class: "empty" }, make("h2", { text: column.model }), make("p", { text: facts.join(" · ") }));
}

function turnElement(app, column, turn, last) {
  const key = `${column.id} ${turn.id}`;
  const answer = answerElement(turn.answer, app.state.view, key, column.model, {
    stop: () => app.stop(turn.answer),
    regenerate: last && (() => app.regenerate(column, turn)),
    remove: last && (() => app.removeTurn(turn)),
  });
  live.set(turn.answer, answer);
  const user = make("div", { class: "user" });
  const show = () => {
    user.classList.remove("editing");
    user.replaceChildren(
      make("p", { class: "user-text", text: turn.user }),
      make("div", { class: "acts" }, action(say("edit"), `${key} edit`, () => editElement(app, user, turn, show))),
    );
  };
  show();
  return make("article", { class: "turn" }, make("h3", { class: "unseen", text: say("you") }), user, make("h3", { class: "unseen", text: turn.answer.model }), answer);
}

function editElement(app, user, turn, show) {
  const field = make("textarea", { rows: "3", "aria-label": say("edit_label") });
  field.value = turn.user;
  const send = () => { if (field.value.trim()) app.resend(turn, field.value); };
  const leave = () => { show(); user.querySelector("button").focus(); };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
      event.preventDefault();
      send();
    } else if (event.key === "Escape") {
      event.stopPropagation();
      leave();
    }
  });
  const buttons = make("div", { class: "acts open" }, make("button", { type: "button", class: "primary small", text: say("resend"), onclick: send }), action(say("cancel"), "cancel", leave));
  user.classList.add("editing");
  user.replaceChildren(field, buttons);
  field.focus();
}

function drawTargets(state) {
  const select = at("target");
  const options = [make("option", { value: "all", text: say("target_all") })];
  state.columns.forEach((column, place) => options.push(make("option", { value: column.id, text: say("target_one", { n: place + 1 }) })));
  select.replaceChildren(...options);
  if (!state.columns.some((column) => column.id === state.target)) state.target = "all";
  select.value = state.target;
  select.hidden = state.columns.length < 2;
  at("message").placeholder = say(state.columns.length > 1 && state.target === "all" ? "message_placeholder_all" : "message_placeholder");
}

