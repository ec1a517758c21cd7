// One answer: its text in the chosen view, what it took, what went wrong, and what can be done with it.
import { action, copy, make, toast } from "./dom.js";
import { render } from "./markdown.js";
import { tokenSpan } from "./tokens.js";
import { number, say, seconds } from "./words.js";

// An element for an answer; its `update` is called when there is more of it.
export function answerElement(answer, view, key, model, acts) {
  const text = make("div", { class: `text ${view}` });
  const calls = make("div", { class: "calls" }), facts = make("p", { class: "facts" }), tools = make("div", { class: "acts" });
  const root = make("div", { class: "answer", "aria-busy": "true" }, text, calls, facts, tools);
  const put = { rendered: putRendered, plain: putPlain, tokens: putTokens }[view];
  root.update = () => {
    const writing = answer.state === "writing";
    root.setAttribute("aria-busy", writing);
    root.classList.toggle("writing", writing);
    put(text, answer);
    calls.replaceChildren(...answer.calls.map(callElement));
    if (!writing && answer.calls.length) calls.append(make("p", { class: "aside", text: say("calls_next") }));
    if (!writing) putEnd(root, answer, text);
    facts.replaceChildren(...factsOf(answer, model).map((one) => make("span", { text: one })));
    if (tools.dataset.state !== answer.state) tools.replaceChildren(...actsOf(answer, key, acts));
    tools.dataset.state = answer.state;
  };
  root.update();
  return root;
}

function putRendered(text, answer) {
  text.replaceChildren(render(answer.text));
}

function putPlain(text, answer) {
  text.textContent = answer.text;
}

// Tokens that are there stay as they are: one of them may be looked at.
function putTokens(text, answer) {
  if (!answer.tokens.length) {
    text.textContent = answer.text;
    if (answer.text && answer.state !== "writing") text.append(make("p", { class: "aside", text: say("no_probabilities") }));
    return;
  }
  if (!text.querySelector(".token")) {
    text.replaceChildren();
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", say("tokens_label"));
  }
  for (let at = text.children.length; at < answer.tokens.length; at++) text.append(tokenSpan(answer.tokens[at], at === 0));
}

function callElement(call) {
  let given = call.arguments;
  try {
    given = JSON.stringify(JSON.parse(given), null, 2);
  } catch {
    // It is not whole yet, or was cut.
  }
  return make("div", { class: "call" }, make("p", { text: say("calls", { name: call.name }) }), make("pre", { tabindex: "0", text: given }));
}

function putEnd(root, answer, text) {
  root.querySelector(".failure")?.remove();
  if (answer.error) text.after(make("p", { class: "failure", role: "alert", text: answer.error }));
  else if (!answer.text && !answer.calls.length && answer.state === "done") text.replaceChildren(make("p", { class: "aside", text: say("empty_answer") }));
}

function factsOf(answer, model) {
  const facts = [];
  if (answer.model && answer.model !== model) facts.push(say("by_model", { name: answer.model }));
  if (answer.first) facts.push(say("first_after", { seconds: seconds(answer.first) }));
  if (answer.count > 1 && answer.took > answer.first) {
    const speed = (1000 * (answer.count - 1)) / (answer.took - answer.first);
    facts.push(say("speed", { n: number(speed, speed < 10 ? 1 : 0) }));
  }
  if (answer.count) facts.push(answer.count === 1 ? say("token_one") : say("tokens", { n: number(answer.count) }));
  if (answer.state === "stopped") facts.push(say("stopped"));
  if (answer.finish === "length") facts.push(say("cut"));
  return facts;
}

function actsOf(answer, key, acts) {
  if (answer.state === "writing") return [action(say("stop"), `${key} stop`, acts.stop)];
  const again = acts.regenerate && action(say(answer.error ? "retry" : "regenerate"), `${key} again`, acts.regenerate);
  const copied = answer.text && action(say("copy"), `${key} copy`, async () => toast(say((await copy(answer.text)) ? "copied" : "copy_failed")));
  const gone = acts.remove && action(say("delete"), `${key} delete`, acts.remove);
  return [again, copied, gone].filter(Boolean);
}
