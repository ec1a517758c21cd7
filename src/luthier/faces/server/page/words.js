// The language of the page: the browser's, or the one that was chosen.
import en from "./words_en.js";
import zh from "./words_zh.js";

const TABLES = { en, zh };
const STORED = "luthier.language";
let language = kept() || (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");

function kept() {
  const found = localStorage.getItem(STORED);
  return found in TABLES ? found : null;
}

// The sentence of a key, with what stands in braces filled in.
export function say(key, filled = {}) {
  return TABLES[language][key].replace(/\{(\w+)\}/g, (whole, name) => (name in filled ? String(filled[name]) : whole));
}

export function switchLanguage() {
  language = language === "en" ? "zh" : "en";
  localStorage.setItem(STORED, language);
  putWords();
}

// A number as the language writes it.
export function number(value, digits = 0) {
  return value.toLocaleString(language, { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

export function seconds(milliseconds) {
  return milliseconds < 1000 ? `${number(milliseconds)} ms` : `${number(milliseconds / 1000, 1)} s`;
}

export function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  if (value < 0.1) return "<0.1%";
  return `${number(value, value < 99.95 ? 1 : 0)}%`;
}

// Fill in what stands in index.html.
export function putWords() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const one of document.querySelectorAll("[data-word]")) one.textContent = say(one.dataset.word);
  for (const one of document.querySelectorAll("[data-word-label]")) one.setAttribute("aria-label", say(one.dataset.wordLabel));
  for (const one of document.querySelectorAll("[data-word-placeholder]")) one.placeholder = say(one.dataset.wordPlaceholder);
  const button = document.getElementById("language");
  button.textContent = say("language_switch");
  button.lang = language === "zh" ? "en" : "zh-CN";
  button.setAttribute("aria-label", say("language_label"));
}
