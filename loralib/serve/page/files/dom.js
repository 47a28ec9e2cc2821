// Elements whose words follow the language: h("button", { t: "start", onclick }), or with values { t: ["n_of_m", { n, m }] }.
import { translate } from "./words.js";

const WORDS = { t: "textContent", tLabel: "aria-label", tPlaceholder: "placeholder", tTitle: "title" };

export function h(tag, props = {}, ...children) {
  const element = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name in WORDS) setWords(element, name, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in { value: 1, checked: 1, disabled: 1, hidden: 1, open: 1, indeterminate: 1 }) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function setWords(element, name, value) {
  (element.words ??= {})[name] = value;
  element.dataset.words = "";
  say(element, name);
}

function say(element, name) {
  const value = element.words[name];
  const [key, values] = Array.isArray(value) ? value : [value, {}];
  const words = translate(key, typeof values === "function" ? values() : values);
  if (name === "t") element.textContent = words;
  else element.setAttribute(WORDS[name], words);
}

export function retranslate(root = document) {
  for (const element of root.querySelectorAll("[data-words]")) {
    for (const name of Object.keys(element.words ?? {})) say(element, name);
  }
}

let count = 0;
export const newId = (kind) => `${kind}-${++count}`;

// A control with its label, and optionally a hint below it.
export function field(label, control, hint) {
  control.id ||= newId("field");
  const parts = [h("label", { for: control.id, t: label }), control];
  if (hint) {
    const id = newId("hint");
    control.setAttribute("aria-describedby", id);
    parts.push(h("small", { id, t: hint }));
  }
  return h("div", { class: "field" }, parts);
}

export function announce(key, values) {
  document.getElementById("status").textContent = translate(key, values);
}

// An error in full, where it arose; `null` takes it away.
export function showError(place, error) {
  place.replaceChildren();
  if (error) place.append(h("div", { class: "error", role: "alert" }, h("strong", { t: "error" }), h("p", {}, error.message ?? String(error))));
}
