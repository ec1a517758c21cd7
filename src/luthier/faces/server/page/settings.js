// How the next token is chosen, and what an answer looks like: the fields, their defaults, and what they ask the server for.
import { say } from "./words.js";
import { at } from "./dom.js";

export const DEFAULTS = {
  system: "", temperature: 1, top_p: 1, max_tokens: "", seed: "", stop_texts: "", schema: "", tools: "",
};
const RANGES = ["temperature", "top_p"];
const LARGEST_SEED = 2 ** 53;

// The fields of a request. `wrong` holds a sentence for each field that cannot be sent.
export function readSettings(settings) {
  const body = {}, wrong = {};
  body.temperature = settings.temperature;
  if (settings.top_p < 1) body.top_p = settings.top_p;
  if (settings.max_tokens.trim()) {
    if (/^\d{1,9}$/.test(settings.max_tokens.trim()) && Number(settings.max_tokens) > 0) body.max_completion_tokens = Number(settings.max_tokens);
    else wrong.max_tokens = say("wrong_whole");
  }
  if (settings.seed.trim()) {
    const seed = Number(settings.seed);
    if (/^-?\d+$/.test(settings.seed.trim()) && Math.abs(seed) < LARGEST_SEED) body.seed = seed;
    else wrong.seed = say("wrong_seed");
  }
  const stops = settings.stop_texts.split("\n").filter(Boolean);
  if (stops.length > 16) wrong.stop_texts = say("wrong_stops");
  else if (stops.length) body.stop = stops;
  const schema = readJson(settings.schema, "schema", wrong, isObject);
  if (schema) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  const tools = readJson(settings.tools, "tools", wrong, areTools);
  if (tools?.length) body.tools = tools;
  return { body, wrong };
}

function readJson(text, name, wrong, fits) {
  if (!text.trim()) return null;
  try {
    const found = JSON.parse(text);
    if (fits(found)) return found;
    wrong[name] = say(`wrong_${name}`);
  } catch (error) {
    wrong[name] = say("wrong_json", { why: error.message });
  }
  return null;
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const areTools = (value) => Array.isArray(value) && value.every((one) => one?.type === "function" && typeof one.function?.name === "string");

// Show the settings in their fields, and take from them what is written there.
export function wireSettings(state, changed) {
  const fields = [...document.querySelectorAll("[data-setting]")];
  const show = () => {
    for (const field of fields) {
      field.value = state.settings[field.dataset.setting];
      showRange(field);
    }
    showWrong(state);
  };
  for (const field of fields) {
    field.addEventListener("input", () => {
      state.settings[field.dataset.setting] = field.type === "range" ? Number(field.value) : field.value;
      showRange(field);
      changed();
    });
    field.addEventListener("change", () => showWrong(state));
  }
  at("reset-settings").addEventListener("click", () => {
    Object.assign(state.settings, DEFAULTS);
    show();
    changed();
  });
  show();
  return show;
}

function showRange(field) {
  if (RANGES.includes(field.id)) at(`${field.id}-shown`).textContent = Number(field.value).toFixed(2);
}

// Whether all of it can be sent; where not, each field says why.
export function showWrong(state) {
  const { wrong } = readSettings(state.settings);
  for (const place of document.querySelectorAll("[data-wrong]")) {
    const name = place.dataset.wrong;
    place.textContent = wrong[name] || "";
    at(name).setAttribute("aria-invalid", name in wrong);
  }
  return Object.keys(wrong)[0] || null;
}

// Lead to the field that cannot be sent.
export function focusSetting(name) {
  const details = at(name).closest("details");
  if (details) details.open = true;
  at(name).focus();
}
