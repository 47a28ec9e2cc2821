// Adapters: what each is, what it has learned, and its exports.
import { blob, get, hasKey, post, remove } from "./api.js";
import { heatMap } from "./charts.js";
import { announce, h, setWords, showError } from "./dom.js";
import { bytes, called, number, significant, translate } from "./words.js";

export class AdaptersView {
  constructor(context) {
    Object.assign(this, context, { cards: new Map() });
    this.problem = h("div");
    this.list = h("div", { class: "stack" });
    this.element = h("section", { "aria-labelledby": "adapters-title" }, h("h1", { id: "adapters-title", t: "adapters_title" }), h("p", { class: "intro", t: "adapters_intro" }), this.problem, this.list);
  }

  async show() {
    try {
      const { data } = await get("/page-api/adapters");
      showError(this.problem, null);
      if (!data.length) {
        this.list.replaceChildren(h("div", { class: "card empty" }, h("p", { t: "empty_adapters" }), h("a", { class: "button primary", href: "#train", t: "go_train" })));
        return;
      }
      const cards = data.map((facts) => {
        const card = this.cards.get(facts.name) ?? new AdapterCard(this.about);
        this.cards.set(facts.name, card);
        card.fill(facts);
        return card.element;
      });
      this.list.replaceChildren(...cards);
      if (data.length === 1) cards[0].querySelector("details").open = true;
    } catch (error) {
      showError(this.problem, error);
    }
  }

  retranslate() { for (const card of this.cards.values()) card.fill(card.facts); }
}

class AdapterCard {
  constructor(about) {
    this.about = about;
    this.name = h("h2");
    this.badge = h("span", { class: "badge" });
    this.sub = h("p", { class: "faint" });
    this.problem = h("div");
    this.loadButton = h("button", { type: "button", onclick: () => this.toggle() });
    this.compare = h("a", { class: "button primary", t: "use_it" });
    this.facts_ = h("div");
    this.map = h("div");
    this.exports = h("div");
    this.details = h("details", { ontoggle: () => this.details.open && this.open() }, h("summary", { t: "adapter_facts" }), this.facts_, this.map, this.exports);
    this.element = h("article", { class: "card adapter" }, h("div", { class: "row spread" }, h("div", {}, h("div", { class: "row" }, this.name, this.badge), this.sub), h("div", { class: "row" }, this.compare, this.loadButton)), this.problem, this.details);
  }

  fill(facts) {
    this.facts = facts;
    this.name.textContent = called(facts.name);
    this.name.title = facts.name;
    this.badge.className = `badge ${facts.loaded ? "succeeded" : ""}`;
    setWords(this.badge, "t", facts.loaded ? "loaded" : "not_loaded");
    setWords(this.loadButton, "t", facts.loaded ? "unload" : "load");
    this.loadButton.setAttribute("aria-label", `${translate(facts.loaded ? "unload" : "load")}: ${facts.name}`);
    this.compare.hidden = !facts.loaded;
    this.compare.href = `#compare/${encodeURIComponent(facts.name)}`;
    showError(this.problem, facts.error ? new Error(facts.error) : null);
    this.details.hidden = !facts.r;
    if (!facts.r) { this.sub.textContent = ""; return; }
    this.sub.textContent = [...(called(facts.name) === facts.name ? [] : [facts.name]), `r = ${facts.r}`, translate("fact_parameters", { n: number(facts.parameters) }), bytes(facts.bytes)].join(" · ");
    const { trained } = facts;
    const data = [trained?.data ?? []].flat().join(", ");
    const settings = Object.entries(trained?.settings ?? {}).map(([name, value]) => `${name} ${value}`).join(", ");
    const targets = [facts.target_modules].flat().join(", ");
    const fact = (key, value) => value ? h("div", { class: "fact" }, h("dt", { t: key }), h("dd", {}, value)) : null;
    this.facts_.replaceChildren(h("dl", { class: "facts" }, h("div", { class: "fact" }, h("dt", {}, "r, alpha"), h("dd", {}, `${facts.r}, ${significant(facts.lora_alpha)}`)), fact("fact_targets", `${targets} (${translate("fact_modules", { n: number(facts.modules) })})`), fact("fact_base", facts.base && called(facts.base)), fact("fact_size", bytes(facts.bytes)), fact("fact_trained", data), fact("fact_settings", settings)),
      ...facts.checks.filter((check) => check.level !== "ok").map((check) => h("p", { class: "warning" }, `${check.text} ${check.fix}`)));
    if (this.learned) this.drawMap();
    if (!this.exports.childNodes.length) this.drawExports();
  }

  async open() {
    if (this.learned) return;
    this.map.replaceChildren(h("p", { class: "faint", t: "loading" }));
    try {
      this.learned = await get(`/page-api/adapters/learned?name=${encodeURIComponent(this.facts.name)}`);
      this.drawMap();
    } catch (error) {
      this.map.replaceChildren();
      showError(this.problem, error);
    }
  }

  drawMap() {
    const { layers, kinds, norms } = this.learned;
    this.map.replaceChildren(h("h3", { t: "learned" }), heatMap({
      rows: layers.map((layer) => layer === null ? translate("outside_layers") : String(layer)),
      columns: kinds, values: norms, corner: "layer", label: "learned_hint",
    }));
  }

  drawExports() {
    const place = h("div", { class: "stack" });
    const buttons = this.about.exports.map((target) => h("button", { type: "button", t: `export_${target}`, onclick: () => this.export(target, place) }));
    this.exports.append(h("h3", { t: "export" }), h("p", { class: "faint", t: "export_hint" }), h("div", { class: "row wrap" }, buttons), place);
  }

  async export(target, place) {
    const line = h("p", { class: "status", role: "status", t: ["exporting", () => ({ what: translate(`export_${target}`) })] });
    const said = h("pre", { tabindex: 0 });
    const row = h("div", { class: "export" }, line, h("details", {}, h("summary", { t: "log" }), said));
    place.prepend(row);
    try {
      let made = await post("/page-api/exports", { name: this.facts.name, target });
      while (["waiting", "running"].includes(made.status)) {
        await new Promise((resolve) => setTimeout(resolve, 500));
        made = await get(`/page-api/exports/${made.id}`);
        said.textContent = made.lines.join("\n");
      }
      if (made.status === "failed") throw new Error(`${translate("export_failed")}: ${made.lines.join("\n")}`);
      setWords(line, "t", ["exported", () => ({ file: made.file, size: bytes(made.bytes) })]);
      const path = `/page-api/exports/${made.id}/content`;
      const link = h("a", { class: "button primary", href: path, download: made.file, t: "download", onclick: (event) => {
        if (!hasKey()) return; // the browser's own download takes any size; with a key, it has to come through the page
        event.preventDefault();
        blob(path).then((content) => {
          const url = URL.createObjectURL(content);
          h("a", { href: url, download: made.file }).click();
          setTimeout(() => URL.revokeObjectURL(url), 60000);
        }, (error) => showError(this.problem, error));
      } });
      row.insertBefore(link, row.lastChild);
    } catch (error) {
      row.replaceChildren();
      showError(row, error);
    }
  }

  async toggle() {
    const loaded = this.facts.loaded;
    this.loadButton.disabled = true;
    showError(this.problem, null);
    try {
      if (loaded) await remove(`/v1/adapters/${encodeURIComponent(this.facts.name)}`);
      else await post("/page-api/adapters/load", { name: this.facts.name });
      this.fill({ ...this.facts, loaded: !loaded });
      announce(loaded ? "not_loaded" : "loaded");
    } catch (error) {
      showError(this.problem, error);
    } finally {
      this.loadButton.disabled = false;
    }
  }
}
