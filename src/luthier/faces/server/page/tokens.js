// Tokens of an answer: lining them up with its text, showing how likely each was, and what else was.
import { at, make } from "./dom.js";
import { percent, say } from "./words.js";

// The log-probability (of 0.1 %) from which on tokens have the full tint.
const FAINTEST = 6.9;

// Lines up log-probabilities with the text as it comes. A token is [text, logprob, [[text, logprob], ...], parts]; `parts` counts
// tokens that are a text only together: one character may be several tokens, each of which is shown as \ufffd.
export function lineUp(tokens) {
  let text = "", logs = [];
  const push = (length, count) => {
    const taken = logs.splice(0, count), sum = taken.reduce((all, one) => all + one.logprob, 0);
    tokens.push([text.slice(0, length), count ? round(sum) : null, count ? topOf(taken[0]) : [], count]);
    text = text.slice(length);
  };
  return {
    add(content, more) {
      text += content;
      logs.push(...more);
      while (text && logs.length) {
        const token = logs[0].token;
        if (token && text.startsWith(token)) {
          push(token.length, 1);
        } else if (token && token.startsWith(text)) {
          return;
        } else {
          // As far as where the next whole token is found again.
          const count = Math.max(1, logs.findIndex((one) => one.token && !one.token.includes("\ufffd")));
          const place = logs.length > count ? text.indexOf(logs[count].token, 1) : -1;
          if (place > 0) push(place, count);
          else push(text.length, logs.length);
        }
      }
    },
    // What was not lined up until the end of the answer.
    end() {
      if (text) push(text.length, logs.length);
    },
  };
}

const round = (value) => Math.round(value * 1e4) / 1e4;
const topOf = (one) => one.top_logprobs.map((top) => [top.token, round(top.logprob)]);

// A span for a token, tinted the more the less likely it was.
export function tokenSpan(token, first) {
  const [text, logprob] = token;
  const span = make("span", { class: "token", text, tabindex: first ? "0" : "-1" });
  span.style.setProperty("--doubt", logprob === null ? 0 : Math.min(1, -logprob / FAINTEST).toFixed(3));
  span.token = token;
  return span;
}

// Whitespace that can be seen.
const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");

function fillTip([text, logprob, top, parts]) {
  const rows = top.slice(0, 5).map(([other, value]) => [other, value, parts <= 1 && other === text]);
  if (logprob !== null && !rows.some((row) => row[2])) {
    if (parts <= 1) rows.push([text, logprob, true]);
  }
  const head = logprob === null ? visible(text) : say("probability", { token: visible(text), percent: percent(logprob) });
  const note = parts > 1 ? make("p", { class: "tip-note", text: say("merged", { n: parts }) }) : null;
  at("tip").replaceChildren(make("p", { class: "tip-head", text: head }), ...(note ? [note] : []), ...rows.map(tipRow));
}

function tipRow([text, logprob, chosen]) {
  const bar = make("span", { class: "tip-fill" });
  bar.style.width = `${100 * Math.exp(logprob)}%`;
  return make(
    "div", { class: chosen ? "tip-row chosen" : "tip-row" },
    make("span", { class: "tip-token", text: visible(text) }),
    make("span", { class: "tip-bar" }, bar),
    make("span", { class: "tip-percent", text: percent(logprob) }),
    chosen ? make("span", { class: "unseen", text: say("chosen") }) : null,
  );
}

let shown = null;

function showTip(span) {
  hideTip();
  const tip = at("tip");
  fillTip(span.token);
  tip.hidden = false;
  shown = span;
  span.setAttribute("aria-describedby", "tip");
  placeTip(span);
}

function placeTip(span) {
  const tip = at("tip");
  // Below the token, or above where there is no room.
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect(), { width, height } = tip.getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left, innerWidth - width - 8));
  const top = box.bottom + height + 12 < innerHeight ? box.bottom + 6 : Math.max(8, box.top - height - 6);
  tip.style.left = `${left}px`;
  tip.style.top = `${top}px`;
}

export function hideTip() {
  at("tip").hidden = true;
  shown?.removeAttribute("aria-describedby");
  shown = null;
}

// Hover, focus and touch show the tip of a token; arrows go from one token to the next.
export function wireTokens(root) {
  const tokenOf = (event) => (event.target instanceof Element ? event.target.closest(".token") : null);
  root.addEventListener("mouseover", (event) => { const span = tokenOf(event); if (span) showTip(span); });
  root.addEventListener("mouseout", (event) => { if (tokenOf(event)) hideTip(); });
  root.addEventListener("focusin", (event) => { const span = tokenOf(event); if (span) showTip(span); });
  root.addEventListener("focusout", (event) => { if (tokenOf(event)) hideTip(); });
  // A token that is gone to by key may scroll into sight: the tip stays with it.
  root.addEventListener("scroll", () => {
    if (shown && shown === document.activeElement) placeTip(shown);
    else hideTip();
  }, true);
  root.addEventListener("keydown", (event) => {
    const span = tokenOf(event);
    if (!span) return;
    const all = [...span.parentElement.querySelectorAll(".token")], place = all.indexOf(span);
    const next = { ArrowRight: place + 1, ArrowDown: place + 1, ArrowLeft: place - 1, ArrowUp: place - 1, Home: 0, End: all.length - 1 }[event.key];
    if (next === undefined || !all[next]) return;
    event.preventDefault();
    span.tabIndex = -1;
    all[next].tabIndex = 0;
    all[next].focus();
  });
}
