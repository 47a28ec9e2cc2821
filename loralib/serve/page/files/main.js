// The frame: views, language, theme, key.
import { get, onKeyNeeded } from "./api.js";
import { field, h, newId, retranslate, showError } from "./dom.js";
import { getLanguage, LANGUAGES, NAMES, setLanguage, translate } from "./words.js";
import { AdaptersView } from "./adapters.js";
import { CompareView } from "./compare.js";
import { RunsView } from "./runs.js";
import { TrainView } from "./train.js";

const VIEWS = { compare: CompareView, train: TrainView, runs: RunsView, adapters: AdaptersView };
const views = {};
const main = document.getElementById("main");
let about;

// Other views are reached by address, so that back and forward work: #compare, #train/JOB.
export function go(name, ...rest) {
  location.hash = [name, ...rest.map(encodeURIComponent)].join("/");
}

async function show(moveFocus) {
  const [name, ...rest] = location.hash.slice(1).split("/").map(decodeURIComponent);
  const chosen = name in VIEWS ? name : "compare";
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === chosen) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  for (const [other, view] of Object.entries(views)) view.element.hidden = other !== chosen;
  if (!views[chosen]) {
    views[chosen] = new VIEWS[chosen]({ about, go });
    main.append(views[chosen].element);
  }
  document.title = `${translate(chosen)} · loralib`;
  if (moveFocus) main.focus(); // first: a run is shown until it ends, and then moves the focus itself
  await views[chosen].show(...rest);
}

function select(label, options, value, onchange) {
  const control = h("select", { tLabel: label, onchange: () => onchange(control.value) },
    options.map(([key, words]) => h("option", words.startsWith("=") ? { value: key, lang: key } : { value: key, t: words }, words.startsWith("=") ? words.slice(1) : "")));
  control.value = value;
  return control;
}

function header() {
  const theme = select("theme", [["auto", "theme_auto"], ["light", "theme_light"], ["dark", "theme_dark"]],
    document.documentElement.dataset.theme ?? "auto", (chosen) => {
      if (chosen === "auto") delete document.documentElement.dataset.theme;
      else document.documentElement.dataset.theme = chosen;
      try { localStorage.setItem("loralib.theme", chosen); } catch { /* for this visit */ }
    });
  theme.id = "theme";
  const language = select("language", LANGUAGES.map((each) => [each, `=${NAMES[each]}`]), getLanguage(), (chosen) => {
    setLanguage(chosen);
    speak();
    for (const view of Object.values(views)) view.retranslate?.();
  });
  language.id = "language";
  const links = Object.keys(VIEWS).map((name) => h("a", { href: `#${name}`, "data-view": name, t: name }));
  document.getElementById("header").append(
    h("a", { class: "brand", href: "#compare" }, h("img", { src: "/page/icon.svg", alt: "", width: 26, height: 26 }), "loralib"),
    h("nav", { tLabel: "views" }, links),
    h("div", { class: "switches" }, language, theme));
}

function speak() {
  document.documentElement.lang = getLanguage();
  document.getElementById("skip").textContent = translate("skip");
  const shown = document.querySelector("nav a[aria-current]")?.dataset.view;
  if (shown) document.title = `${translate(shown)} · loralib`;
  retranslate();
}

let asking = null;
function askForKey(wasWrong) {
  asking ??= new Promise((resolve) => {
    const input = h("input", { type: "password", autocomplete: "off", required: true });
    const title = newId("title");
    const form = h("form", { method: "dialog" }, h("h2", { id: title, t: "key_title" }), wasWrong ? h("p", { class: "warning", t: "key_wrong" }) : null,
      field("key_label", input, "key_hint"), h("button", { class: "primary", t: "key_use" }));
    const dialog = h("dialog", { "aria-labelledby": title, onclose: () => { dialog.remove(); asking = null; resolve(input.value.trim() || null); } }, form);
    document.body.append(dialog);
    dialog.showModal();
  });
  return asking;
}

async function begin() {
  header();
  speak();
  onKeyNeeded(askForKey);
  document.getElementById("skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
  try {
    about = await get("/page-api/about");
  } catch (error) {
    showError(main, error);
    main.append(h("button", { t: "try_again", onclick: () => location.reload() }));
    return;
  }
  addEventListener("hashchange", () => show(true));
  await show(false);
}

begin();
