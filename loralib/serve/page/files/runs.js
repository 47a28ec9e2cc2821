// Runs: all jobs, their curves over one another, their settings side by side.
import { get } from "./api.js";
import { lineChart } from "./charts.js";
import { h, showError } from "./dom.js";
import { number, translate, when } from "./words.js";

export class RunsView {
  constructor(context) {
    Object.assign(this, context, { jobs: [], curves: new Map(), chosen: null });
    this.problem = h("div");
    this.place = h("div");
    this.element = h("section", { "aria-labelledby": "runs-title" }, h("h1", { id: "runs-title", t: "runs_title" }), h("p", { class: "intro", t: "runs_intro" }), this.problem, this.place);
  }

  async show() {
    try {
      const [jobs, files] = await Promise.all([get("/v1/fine_tuning/jobs?limit=1000"), get("/v1/files")]);
      this.jobs = jobs.data;
      this.files = new Map(files.data.map((file) => [file.id, file.filename]));
      this.chosen ??= new Set(this.jobs.filter((job) => job.loralib.step).slice(0, 4).map((job) => job.id));
      showError(this.problem, null);
      this.draw();
      await this.fetchCurves();
    } catch (error) {
      showError(this.problem, error);
    }
  }

  retranslate() { this.draw(); }

  async fetchCurves() {
    const wanted = this.jobs.filter((job) => this.chosen.has(job.id) && this.curves.get(job.id)?.step !== job.loralib.step);
    await Promise.all(wanted.map(async (job) => {
      const list = await get(`/v1/fine_tuning/jobs/${job.id}/events?limit=10000`);
      const data = list.data.map((event) => event.data).filter((each) => each.step !== undefined).reverse();
      const points = (kind) => data.filter((each) => kind in each).map((each) => [each.step, each[kind]]);
      this.curves.set(job.id, { step: job.loralib.step, train: points("train_loss"), valid: points("valid_loss") });
    }));
    this.draw();
  }

  name(job) { return this.names.get(job.id); }

  draw() {
    if (!this.jobs.length) {
      this.place.replaceChildren(h("div", { class: "card empty" }, h("p", { t: "runs_empty" }), h("a", { class: "button primary", href: "#train", t: "go_train" })));
      return;
    }
    const suffix = (job) => job.fine_tuned_model?.split(":").at(-2) || this.files.get(job.training_file)?.replace(/\.[^.]*$/, "") || "run";
    this.names = new Map(this.jobs.map((job) => [job.id, `${suffix(job)} · ${job.id.split("-")[1].slice(0, 4)}`]));
    const focused = document.activeElement?.dataset?.job;
    const shown = this.jobs.filter((job) => this.chosen.has(job.id));
    const lines = shown.flatMap((job, colour) => {
      const curves = this.curves.get(job.id) ?? { train: [], valid: [] };
      const name = this.name(job);
      const train = { name: () => `${name}, ${translate("training_loss")}`, points: curves.train, colour, faint: true };
      return curves.valid.length ? [train, { name: () => `${name}, ${translate("validation_loss")}`, points: curves.valid, colour, marked: true }] : [train];
    });
    this.place.replaceChildren(this.table(shown),
      shown.length ? h("section", { class: "card" }, h("h2", { t: "curves" }), lineChart(lines)) : "",
      shown.length ? h("section", { class: "card" }, h("h2", { t: "settings_compared" }), this.compared(shown)) : "");
    if (focused) this.place.querySelector(`[data-job="${focused}"]`)?.focus();
  }

  table(shown) {
    const row = (job) => {
      const name = this.name(job);
      const box = h("input", { type: "checkbox", "data-job": job.id, checked: this.chosen.has(job.id), tLabel: ["show_run", { name }], onchange: () => {
        if (box.checked) this.chosen.add(job.id); else this.chosen.delete(job.id);
        this.draw();
        this.fetchCurves().catch((error) => showError(this.problem, error));
      } });
      const at = shown.indexOf(job);
      const valid = this.curves.get(job.id)?.valid.at(-1)?.[1];
      return h("tr", {}, h("td", {}, box), h("th", { scope: "row" }, at >= 0 ? h("span", { class: `swatch line-${at % 8}` }) : null, name),
        h("td", {}, h("span", { class: `badge ${job.status}`, t: `status_${job.status}` })), h("td", { class: "number" }, job.loralib.steps ? `${number(job.loralib.step)} / ${number(job.loralib.steps)}` : number(job.loralib.step ?? 0)),
        h("td", { class: "number" }, valid === undefined ? "" : number(valid, 4)), h("td", {}, when(job.created_at)), h("td", {}, h("a", { href: `#train/${job.id}`, t: "open_run", tLabel: ["open_named", { name }] })));
    };
    const columns = ["shown", "run", "status", "steps", "last_loss", "started", "open_run"];
    return h("div", { class: "card scroll", tabindex: 0, role: "region", tLabel: "runs_title" }, h("table", {}, h("thead", {}, h("tr", {}, columns.map((key) => h("th", { scope: "col", t: key })))), h("tbody", {}, this.jobs.map(row))));
  }

  compared(shown) {
    const settings = shown.map((job) => ({ data: this.files.get(job.training_file) ?? "?", ...job.loralib.settings }));
    const names = [...new Set(settings.flatMap(Object.keys))];
    const say = (value) => value === undefined ? translate("by_default") : typeof value === "object" ? JSON.stringify(value) : String(value);
    const rows = names.map((name) => {
      const values = settings.map((each) => say(each[name]));
      const differs = new Set(values).size > 1;
      return h("tr", { class: differs ? "differs" : null }, h("th", { scope: "row" }, name === "data" ? translate("data") : h("code", {}, name), differs ? h("span", { class: "mark" }, " ≠", h("span", { class: "hidden", t: "differs" })) : null), values.map((value) => h("td", {}, value)));
    });
    return h("div", { class: "scroll", tabindex: 0, role: "region", tLabel: "settings_compared" }, h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col", t: "setting" }), shown.map((job, at) => h("th", { scope: "col" }, h("span", { class: `swatch line-${at % 8}` }), this.name(job))))), h("tbody", {}, rows)));
  }
}
