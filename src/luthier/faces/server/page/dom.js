// Elements in one expression. Text always goes in as text: nothing here, or elsewhere in the page, reads HTML.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const at = (id) => document.getElementById(id);

// A small button of words; `key` finds it again after its surroundings were drawn anew.
export function action(text, key, onclick, more = {}) {
  return make("button", { type: "button", class: "quiet", text, "data-key": key, onclick, ...more });
}

// Draw anew, and leave the focus on what has the same key as before.
export function keepingFocus(draw) {
  const key = document.activeElement?.dataset?.key;
  draw();
  if (key) document.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
}

// Tell who does not see the page: each text once, and several that come close to each other.
export function announce(text) {
  const said = at("said");
  while (said.children.length > 3) said.firstChild.remove();
  said.append(make("p", { text }));
}

let hiding;
export function toast(text, undo) {
  const box = at("toast"), button = box.querySelector("button");
  box.querySelector("span").textContent = text;
  button.hidden = !undo;
  button.onclick = () => { box.hidden = true; undo(); };
  box.hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(() => { box.hidden = true; }, undo ? 8000 : 2500);
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without TLS browsers have no clipboard for other machines' pages; the old way may still work.
    const field = make("textarea", { class: "unseen" });
    field.value = text;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}
