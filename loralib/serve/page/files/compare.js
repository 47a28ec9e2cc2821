// Compare: one prompt, several panels, each with a model and a scale of its own.
import { events, get } from "./api.js";
import { announce, field, h, newId, setWords, showError } from "./dom.js";
import { called, number, translate } from "./words.js";

const MOST = 4;

class Panel {
  constructor(view, chosen) {
    this.view = view;
    this.turns = []; // of a chat: what it was asked and what it answered
    this.model = h("select", { tLabel: "model", onchange: () => this.changed() });
    this.scale = h("input", { type: "range", min: 0, max: 2, step: 0.05, value: 1, oninput: () => this.showScale(), onchange: () => view.again(this) });
    this.shown = h("output", {}, "1");
    this.scaleField = field("scale", this.scale, "scale_hint");
    this.scaleField.classList.add("scale");
    this.scaleField.insertBefore(this.shown, this.scale);
    this.output = h("div", { class: "output", role: "region", "aria-live": "polite", "aria-busy": "false", tabindex: 0 });
    this.status = h("p", { class: "status" });
    this.problem = h("div");
    this.remove = h("button", { class: "quiet icon", type: "button", onclick: () => view.removePanel(this) }, "×");
    this.element = h("section", { class: "card panel" }, h("div", { class: "row" }, this.model, this.remove), this.scaleField, this.output, this.problem, this.status);
    this.fill(chosen);
    this.empty();
  }

  number(n) {
    setWords(this.element, "tLabel", ["panel", { n }]);
    setWords(this.output, "tLabel", ["answer", { n }]);
    setWords(this.remove, "tLabel", ["remove_panel", { n }]);
  }

  get adapter() { return this.model.value || null; }

  fill(chosen = this.model.value) {
    const { about, adapters } = this.view;
    this.model.replaceChildren(h("option", { value: "" }, `${called(about.base)} (${translate("base")})`), ...adapters.map((name) => h("option", { value: name, title: name }, called(name))));
    this.model.value = adapters.includes(chosen) ? chosen : "";
    this.showScale();
  }

  showScale() {
    this.scaleField.classList.toggle("off", !this.adapter);
    this.scale.disabled = !this.adapter;
    this.shown.textContent = number(Number(this.scale.value), 2);
  }

  changed() {
    this.showScale();
    this.turns = [];
    if (this.adapter) this.view.findSamples(this.adapter);
    this.view.again(this);
  }

  empty() {
    this.turns = [];
    this.output.replaceChildren(h("p", { class: "faint", t: "empty_answer" }));
    this.status.replaceChildren();
    showError(this.problem, null);
  }

  stop() { this.abort?.abort(); }

  async ask(request, isChat) {
    this.stop();
    const abort = new AbortController();
    this.abort = abort;
    showError(this.problem, null);
    const answer = h("span", {});
    this.output.setAttribute("aria-busy", "true");
    const { prompt, ...settings } = request;
    const { about } = this.view, scale = Number(this.scale.value);
    Object.assign(settings, { model: this.adapter ? this.adapter + (scale === 1 ? "" : `@${scale}`) : about.base, stream: true, stream_options: { include_usage: true } });
    const path = isChat ? "/v1/chat/completions" : "/v1/completions";
    if (isChat) {
      if (!this.turns.length) this.output.replaceChildren();
      this.turns.push({ role: "user", content: prompt });
      this.output.append(h("p", { class: "turn user" }, h("span", { class: "hidden", t: "you" }), prompt), h("p", { class: "turn" }, answer));
      const system = this.view.system.value.trim();
      settings.messages = system ? [{ role: "system", content: system }, ...this.turns] : this.turns;
    } else {
      settings.prompt = prompt;
      this.output.replaceChildren(h("span", { class: "faint" }, prompt), answer);
    }
    setWords(this.status, "t", "waiting");
    const began = performance.now();
    let first = null, tokens = 0, why = "why_stopped";
    try {
      for await (const event of events(path, settings, abort.signal)) {
        tokens = event.usage?.completion_tokens ?? tokens;
        const [choice] = event.choices;
        if (!choice) continue;
        const text = choice.text ?? choice.delta.content ?? "";
        if (text) { first ??= performance.now(); tokens++; }
        const atEnd = this.output.scrollHeight - this.output.scrollTop - this.output.clientHeight < 40;
        answer.textContent += text;
        if (atEnd) this.output.scrollTop = this.output.scrollHeight;
        const seconds = (performance.now() - began) / 1000;
        setWords(this.status, "t", ["writing", { n: number(tokens), s: number(seconds, 1) }]);
        if (choice.finish_reason) why = choice.finish_reason === "length" ? "why_length" : "why_stop";
      }
    } catch (error) {
      if (error.name !== "AbortError") {
        showError(this.problem, error);
        this.status.replaceChildren();
        if (isChat && !answer.textContent) this.turns.pop();
        return;
      }
    } finally {
      if (this.abort === abort) {
        this.abort = null;
        this.output.setAttribute("aria-busy", "false");
      }
    }
    if (isChat) this.turns.push({ role: "assistant", content: answer.textContent });
    if (this.abort) return; // asked again meanwhile
    const seconds = (performance.now() - began) / 1000;
    const rate = tokens > 1 ? (tokens - 1) / ((performance.now() - first) / 1000) : tokens / seconds;
    delete this.status.words?.t;
    this.status.replaceChildren(h("span", { t: ["written", () => ({ n: number(tokens), s: number(seconds, 1), rate: number(rate, 1) })] }), " · ", h("span", { t: why }));
  }
}

export class CompareView {
  constructor({ about, go }) {
    Object.assign(this, { about, go, adapters: [], panels: [], asked: null });
    const radio = newId("kind");
    this.kinds = ["plain_text", "chat"].map((kind) => h("input", { type: "radio", name: radio, value: kind, id: newId("kind"), onchange: () => this.setKind(kind) }));
    this.kinds[0].checked = true;
    this.kinds[1].disabled = !about.chat;
    const kindLabels = this.kinds.map((input) => [input, h("label", { for: input.id, t: input.value })]);
    this.system = h("textarea", { rows: 2 });
    this.systemField = field("system", this.system);
    this.systemField.hidden = true;
    this.prompt = h("textarea", { rows: 4, tPlaceholder: "prompt_placeholder", id: "prompt", onkeydown: (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); this.generate(); }
    } });
    this.promptField = field("prompt", this.prompt);
    this.sample = h("select", { onchange: () => { if (this.sample.value) this.take(this.samples[Number(this.sample.value)]); } });
    this.sampleField = field("samples", this.sample);
    this.sampleField.hidden = true;
    this.tokens = h("input", { type: "number", min: 1, max: about.max_tokens, value: Math.min(80, about.max_tokens) });
    this.temperature = h("input", { type: "number", min: 0, max: 5, step: 0.1, value: 0 });
    this.topP = h("input", { type: "number", min: 0.01, max: 1, step: 0.01, value: 1 });
    this.seed = h("input", { type: "number", min: 0, step: 1, value: 0 });
    this.start = h("button", { class: "primary", type: "submit", t: "generate" });
    this.stopButton = h("button", { type: "button", t: "stop", disabled: true, onclick: () => this.panels.forEach((panel) => panel.stop()) });
    this.fresh = h("button", { type: "button", t: "new_chat", hidden: true, onclick: () => { this.asked = null; this.panels.forEach((panel) => { panel.stop(); panel.empty(); }); this.prompt.focus(); } });
    this.problem = h("div");
    const form = h("form", { class: "card ask", onsubmit: (event) => { event.preventDefault(); this.generate(); } },
      h("fieldset", { class: "segments" }, h("legend", { class: "hidden", t: "kind" }), kindLabels, about.chat ? null : h("small", { t: "no_chat" })),
      this.systemField, this.promptField, this.sampleField,
      h("div", { class: "row actions" }, this.start, this.stopButton, this.fresh, h("kbd", { class: "faint", t: "shortcut" })),
      h("details", {}, h("summary", { t: "settings" }), h("div", { class: "fields" }, field("tokens", this.tokens), field("temperature", this.temperature, "temperature_hint"), field("top_p", this.topP), field("seed", this.seed, "seed_hint"))));
    this.grid = h("div", { class: "panels" });
    this.add = h("button", { type: "button", class: "quiet", t: "add_panel", onclick: () => this.addPanel(this.unused()).model.focus() });
    this.hint = h("div", { class: "card empty", hidden: true }, h("p", { t: "empty_adapters" }), h("a", { class: "button primary", href: "#train", t: "go_train" }));
    this.element = h("section", { "aria-labelledby": "compare-title" }, h("h1", { id: "compare-title", t: "compare_title" }), h("p", { class: "intro", t: "compare_intro" }), form, this.problem, this.hint, this.grid, this.add);
  }

  get isChat() { return this.kinds[1].checked; }

  async show(...chosen) {
    try {
      const list = await get("/v1/models");
      this.adapters = list.data.map((each) => each.id).filter((name) => name !== this.about.base);
      showError(this.problem, null);
    } catch (error) {
      showError(this.problem, error);
    }
    this.hint.hidden = this.adapters.length > 0;
    this.panels.forEach((panel) => panel.fill());
    if (!this.panels.length) {
      this.addPanel(null);
      if (this.adapters.length) this.addPanel(this.adapters.at(-1));
    }
    for (const name of chosen.filter((each) => this.adapters.includes(each) && !this.panels.some((panel) => panel.adapter === each))) {
      const free = this.panels.find((panel, index) => index > 0 && panel.adapter) ?? null;
      if (free && this.panels.length >= 2) { free.fill(name); free.empty(); } else this.addPanel(name);
    }
    await this.findSamples(chosen.find((each) => this.adapters.includes(each)) ?? this.panels.map((panel) => panel.adapter).find(Boolean));
    // Not into a box that somebody writes in by now.
    const free = !this.prompt.value && document.activeElement !== this.prompt;
    if (chosen.length && free && this.samples.length) { this.sample.value = 0; this.take(this.samples[0]); }
  }

  // What the adapters were asked in training: an adapter knows the form that its prompts had, to the last line break.
  async findSamples(name) {
    this.samples = [];
    try {
      this.samples = name ? (await get(`/page-api/adapters/prompts?name=${encodeURIComponent(name)}`)).data : [];
    } catch { /* it was given to the server: its data are not known */ }
    this.sampleField.hidden = !this.samples.length;
    this.sample.replaceChildren(h("option", { value: "", t: "samples_choose" }), ...this.samples.map((each, index) => h("option", { value: index }, (each.prompt ?? each.message).trim().slice(0, 120))));
  }

  take({ prompt, message }) {
    if (message !== undefined && !this.isChat && this.about.chat) { this.kinds[1].checked = true; this.setKind(); }
    if (prompt !== undefined && this.isChat) { this.kinds[0].checked = true; this.setKind(); }
    this.prompt.value = prompt ?? message;
    this.prompt.focus();
  }

  retranslate() { this.panels.forEach((panel) => panel.fill()); }

  setKind() {
    setWords(this.promptField.querySelector("label"), "t", this.isChat ? "message" : "prompt");
    setWords(this.prompt, "tPlaceholder", this.isChat ? "message_placeholder" : "prompt_placeholder");
    this.systemField.hidden = this.fresh.hidden = !this.isChat;
    this.asked = null;
    this.panels.forEach((panel) => { panel.stop(); panel.empty(); });
  }

  unused() {
    const used = new Set(this.panels.map((panel) => panel.adapter));
    return this.adapters.find((name) => !used.has(name)) ?? this.adapters[0] ?? null;
  }

  addPanel(chosen) {
    const panel = new Panel(this, chosen);
    this.panels.push(panel);
    this.grid.append(panel.element);
    this.renumber();
    return panel;
  }

  removePanel(panel) {
    panel.stop();
    panel.element.remove();
    this.panels = this.panels.filter((each) => each !== panel);
    this.renumber();
    this.add.focus();
  }

  renumber() {
    this.panels.forEach((panel, index) => panel.number(index + 1));
    this.panels.forEach((panel) => { panel.remove.hidden = this.panels.length < 2; });
    this.add.hidden = this.panels.length >= MOST;
  }

  request() {
    return { prompt: this.prompt.value, max_tokens: Number(this.tokens.value), temperature: Number(this.temperature.value), top_p: Number(this.topP.value), seed: Number(this.seed.value) };
  }

  async generate() {
    if (!this.prompt.value) { this.prompt.focus(); return; }
    this.asked = this.request();
    if (this.isChat) this.prompt.value = "";
    await this.run(this.panels, this.asked);
  }

  // A panel whose model or scale has changed answers the last prompt anew.
  async again(panel) {
    if (!this.asked) return;
    if (this.isChat) panel.empty();
    await this.run([panel], this.asked);
  }

  async run(panels, request) {
    this.stopButton.disabled = false;
    await Promise.all(panels.map((panel) => panel.ask(request, this.isChat)));
    if (this.panels.every((panel) => !panel.abort)) {
      this.stopButton.disabled = true;
      announce("all_done");
    }
  }
}
