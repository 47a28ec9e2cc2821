// Train: a file, settings, what will happen, and the run itself.
import { events, get, post, upload } from "./api.js";
import { lineChart } from "./charts.js";
import { announce, field, h, newId, setWords, showError } from "./dom.js";
import { bytes, duration, number, significant, translate } from "./words.js";

const OVER = ["succeeded", "failed", "cancelled"];

export class TrainView {
  constructor(context) {
    Object.assign(this, context, { file: null, job: null });
    this.form = new JobForm(context, (job) => context.go("train", job.id));
    this.place = h("div");
    this.element = h("section", { "aria-labelledby": "train-title" }, h("h1", { id: "train-title", t: "train_title" }), h("p", { class: "intro", t: "train_intro" }), this.form.element, this.place);
  }

  async show(jobId) {
    this.run?.close();
    this.run = null;
    this.place.replaceChildren();
    this.form.element.hidden = Boolean(jobId);
    if (!jobId) return this.form.show();
    this.run = new RunCard(this.about, jobId, this.go);
    this.place.append(this.run.element);
    await this.run.follow();
  }

  retranslate() { this.form.draw(); this.run?.draw(); }
}

class JobForm {
  constructor({ about }, onStarted) {
    Object.assign(this, { about, onStarted, preview: null });
    const { defaults } = about;
    this.input = h("input", { type: "file", id: newId("file"), class: "hidden", accept: ".jsonl,.ndjson,.json,.csv,.tsv,.txt,.md,.parquet,.arrow,.xml", onchange: () => this.input.files[0] && this.take(this.input.files[0]) });
    this.drop = h("div", { class: "drop" }, this.input, h("label", { for: this.input.id }, h("strong", { t: "drop" }), h("small", { t: "drop_hint" })));
    // A file that misses the box lands in it all the same: else the browser would leave the page and show the file.
    for (const kind of ["dragover", "dragleave", "drop"]) document.addEventListener(kind, (event) => this.dragged(event));
    this.earlier = h("select", { onchange: () => this.earlier.value && this.choose(this.files.find((file) => file.id === this.earlier.value)) });
    this.earlierField = field("earlier_file", this.earlier);
    this.fileFacts = h("p", { class: "status", role: "status" });
    this.fileProblem = h("div");

    const changed = () => this.plan();
    const given = (props) => h("input", { onchange: changed, ...props });
    this.controls = {
      num_epochs: given({ type: "number", min: 1, value: defaults.num_epochs }),
      rank: given({ type: "number", min: 1, value: defaults.rank }),
      batch_size: given({ type: "number", min: 1, value: defaults.batch_size }),
      lr: given({ type: "text", inputmode: "decimal", value: "auto", size: 8 }),
      max_steps: given({ type: "number", min: 0, value: 0 }),
      valid_fraction: given({ type: "text", inputmode: "decimal", value: "auto" }),
      lora_dropout: given({ type: "number", min: 0, max: 0.99, step: 0.05, value: defaults.lora_dropout }),
      seed: given({ type: "number", min: 0, value: defaults.seed }),
      objective: h("select", { onchange: changed }, h("option", { value: "clm", t: "objective_clm" }), h("option", { value: "jlm", t: "objective_jlm" }), h("option", { value: "dpo", t: "objective_dpo" }), h("option", { value: "orpo", t: "objective_orpo" })),
      as_chat: given({ type: "checkbox" }),
    };
    this.name = h("input", { type: "text", maxlength: 40, pattern: "[A-Za-z0-9][A-Za-z0-9._\\-]*", autocomplete: "off", spellcheck: "false" });
    const { controls } = this;
    const asChat = h("div", { class: "field check" }, (controls.as_chat.id = newId("field"), controls.as_chat), h("label", { for: controls.as_chat.id, t: "as_chat" }));
    this.startButton = h("button", { class: "primary", type: "submit", t: "start", disabled: true });
    this.previewPlace = h("div", { "aria-live": "polite" });
    this.problem = h("div");
    this.rest = h("div", { hidden: true },
      h("section", { class: "card" }, h("h2", { t: "step_settings" }),
        h("div", { class: "fields" }, field("name", this.name, "name_hint"), field("epochs", controls.num_epochs, "epochs_hint"), field("rank", controls.rank, "rank_hint"), field("lr", controls.lr, "lr_hint")),
        h("details", {}, h("summary", { t: "more_settings" }), h("div", { class: "fields" }, field("batch_size", controls.batch_size), field("max_steps", controls.max_steps, "max_steps_hint"), field("valid_fraction", controls.valid_fraction, "valid_hint"), field("dropout", controls.lora_dropout), field("seed", controls.seed), field("objective", controls.objective)), about.chat ? asChat : null)),
      h("section", { class: "card" }, h("h2", { t: "step_preview" }), this.previewPlace, this.problem, h("div", { class: "row actions" }, this.startButton)));
    this.element = h("form", { novalidate: false, onsubmit: (event) => { event.preventDefault(); this.begin(); } },
      h("section", { class: "card" }, h("h2", { t: "step_file" }), about.max_jobs ? null : h("p", { class: "warning", t: "jobs_off" }), this.drop, this.earlierField, this.fileFacts, this.fileProblem), this.rest);
  }

  async show() {
    try {
      this.files = (await get("/v1/files?limit=100")).data;
    } catch (error) {
      showError(this.fileProblem, error);
      this.files = [];
    }
    this.earlierField.hidden = !this.files.length;
    this.earlier.replaceChildren(h("option", { value: "", t: "choose_file" }), ...this.files.map((file) => h("option", { value: file.id }, file.filename)));
    this.earlier.value = this.file?.id ?? "";
  }

  dragged(event) {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    const here = this.element.checkVisibility();
    this.drop.classList.toggle("over", here && event.type === "dragover");
    if (here && event.type === "drop" && event.dataTransfer.files[0]) this.take(event.dataTransfer.files[0]);
  }

  async take(file) {
    showError(this.fileProblem, null);
    setWords(this.fileFacts, "t", ["uploading", { name: file.name }]);
    try {
      const taken = await upload(file);
      this.files = [taken, ...(this.files ?? [])];
      await this.choose(taken);
    } catch (error) {
      delete this.fileFacts.words;
      this.fileFacts.textContent = "";
      showError(this.fileProblem, error);
    }
    this.input.value = "";
  }

  async choose(file) {
    this.file = file;
    const facts = file.loralib ?? {};
    showError(this.fileProblem, facts.error ? new Error(facts.error) : null);
    this.rest.hidden = Boolean(facts.error);
    const counted = facts.examples !== null && facts.examples !== undefined;
    setWords(this.fileFacts, "t", [facts.error || !counted ? "file_unread" : "file_read", () => ({ name: file.filename, n: counted ? number(facts.examples) : "", format: facts.format ?? "?" })]);
    if (facts.error) { delete this.fileFacts.words; this.fileFacts.textContent = file.filename; }
    if (!this.name.value) this.name.value = file.filename.replace(/\.[^.]*$/, "").replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "").slice(0, 40);
    await this.show();
    // A file of chosen and rejected answers is for objectives that learn from them, and for no others.
    const { objective } = this.controls;
    if (Boolean(facts.preferences) !== ["dpo", "orpo"].includes(objective.value)) objective.value = facts.preferences ? "dpo" : "clm";
    if (!facts.error) await this.plan();
  }

  settings() {
    const result = {};
    for (const [name, control] of Object.entries(this.controls)) {
      if (control.type === "checkbox") { if (control.checked) result[name] = true; continue; }
      const value = control.value.trim();
      if (value === "" || value === "auto") continue;
      result[name] = name === "objective" ? value : Number.isNaN(Number(value.replace(",", "."))) ? value : Number(value.replace(",", "."));
    }
    return result;
  }

  async plan() {
    if (!this.file) return;
    const mine = this.planning = {};
    this.startButton.disabled = true;
    showError(this.problem, null);
    this.previewPlace.replaceChildren(h("p", { class: "faint", t: "reading" }));
    try {
      const preview = await post("/page-api/preview", { training_file: this.file.id, loralib: this.settings() });
      if (mine !== this.planning) return;
      this.preview = preview;
      this.draw();
      this.startButton.disabled = !this.about.max_jobs;
    } catch (error) {
      if (mine !== this.planning) return;
      this.preview = null;
      this.previewPlace.replaceChildren();
      showError(this.problem, error);
    }
  }

  draw() {
    if (this.preview) this.previewPlace.replaceChildren(...previewParts(this.preview));
  }

  async begin() {
    this.startButton.disabled = true;
    showError(this.problem, null);
    try {
      this.onStarted(await post("/v1/fine_tuning/jobs", { model: this.about.base, training_file: this.file.id, suffix: this.name.value.trim() || null, loralib: this.settings() }));
    } catch (error) {
      showError(this.problem, error);
    } finally {
      this.startButton.disabled = false;
    }
  }
}

function previewParts(preview) {
  const fact = (key, value, extra) => h("div", { class: "fact" }, h("dt", { t: key }), h("dd", {}, value, extra ? h("small", extra) : null));
  const tight = preview.free !== null && preview.memory > preview.free;
  const memory = preview.free === null ? bytes(preview.memory) : translate("memory_of", { need: bytes(preview.memory), free: bytes(preview.free) });
  const parts = [
    h("p", { class: "lead", t: ["used", { n: number(preview.used), m: number(preview.given) }] }),
    preview.valid ? h("p", { t: ["held_out", { n: number(preview.valid) }] }) : null,
    h("ul", { class: "plain" }, Object.entries(preview.dropped).map(([why, n]) => h("li", { class: "warning", t: ["dropped", { n: number(n), why }] }))),
    h("dl", { class: "facts" },
      fact("facts_time", translate("about_time", { time: duration(preview.seconds) }), { t: preview.measured ? "measured" : "estimated" }),
      fact("facts_memory", memory, tight ? { t: "memory_tight", class: "warning" } : null),
      fact("facts_steps", number(preview.steps)),
      fact("facts_parameters", number(preview.trained_parameters)),
      preview.settings.lr ? fact("facts_lr", significant(preview.settings.lr)) : null),
    preview.left_out.length ? h("details", {}, h("summary", { t: "left_out_list" }), h("ul", {}, preview.left_out.map(([source, why]) => h("li", {}, `${source}: ${why}`)))) : null,
    h("h3", { t: "some_examples" }),
    h("p", { class: "token-legend" }, h("span", { class: "token trained", t: "legend_trained" }), " ", h("span", { class: "token", t: "legend_read" })),
    preview.examples.map((example) => h("figure", { class: "example" },
      h("div", { class: "tokens" }, example.pieces.map(([text, trained]) => h("span", { class: `token${trained ? " trained" : ""}` }, text.replace(/\n/g, "⏎\n")))),
      h("figcaption", { class: "faint", t: ["example_facts", { source: example.source, n: number(example.tokens), m: number(example.trained) }] }))),
    preview.notes.length ? h("details", {}, h("summary", { t: "notes" }), h("ul", {}, preview.notes.map((note) => h("li", {}, note)))) : null,
  ];
  return parts.flat().filter(Boolean);
}

class RunCard {
  constructor(about, jobId, go) {
    Object.assign(this, { about, jobId, go, job: null, train: [], valid: [], steps: null, lines: [], abort: new AbortController() });
    this.title = h("h2", { t: "step_run" });
    this.state = h("p", { class: "status" }, h("span", { class: "badge" }), " ", h("span"));
    this.bar = h("progress", { max: 1, value: 0, tLabel: "progress" });
    this.chart = h("div", { class: "chart-place" });
    this.problem = h("div");
    this.pauseButton = h("button", { type: "button", t: "pause", onclick: () => this.act("pause") });
    this.resumeButton = h("button", { type: "button", class: "primary", t: "resume", onclick: () => this.act("resume") });
    this.cancelButton = h("button", { type: "button", class: "danger", t: "cancel", onclick: () => confirm(translate("cancel_sure")) && this.act("cancel") });
    this.tryButton = h("a", { class: "button primary", t: "try_it", href: "#compare" });
    this.log = h("pre", { tabindex: 0 });
    this.element = h("section", { class: "card run" }, this.title, this.state, this.bar, this.problem, this.chart,
      h("div", { class: "row actions" }, this.tryButton, this.resumeButton, this.pauseButton, this.cancelButton, h("a", { class: "button", href: "#train", t: "another" })),
      h("details", {}, h("summary", { t: "log" }), this.log));
    this.buttons();
  }

  close() { this.abort.abort(); }

  async refresh() {
    this.job = await get(`/v1/fine_tuning/jobs/${this.jobId}`);
    if (this.job.loralib.steps) this.steps = this.job.loralib.steps;
  }

  // All events from the first on, then each as it comes, until the job is over or stopped.
  async follow() {
    this.abort.abort();
    const { signal } = this.abort = new AbortController();
    Object.assign(this, { train: [], valid: [], lines: [] });
    try {
      await this.refresh();
      this.draw();
      const before = this.job.status;
      let last = 0;
      for await (const event of events(`/v1/fine_tuning/jobs/${this.jobId}/events?stream=true`, null, signal)) {
        const { data } = event;
        if (event.type === "metrics") {
          this.steps = data.total_steps ?? this.steps;
          if ("train_loss" in data) this.train.push([data.step, data.train_loss]);
          if ("valid_loss" in data) this.valid.push([data.step, data.valid_loss]);
        } else {
          this.lines.push(event.message);
        }
        if (performance.now() - last > 400 || event.type !== "metrics") {
          last = performance.now();
          if (event.type !== "metrics" || !this.timer) this.later();
        }
      }
      await this.refresh();
      this.draw();
      if (!OVER.includes(before) && this.job.status === "succeeded") { announce("job_done"); this.tryButton.focus(); }
    } catch (error) {
      if (error.name !== "AbortError") showError(this.problem, error);
    }
  }

  // Draws soon, once for all that came meanwhile.
  later() {
    this.timer ??= setTimeout(async () => {
      this.timer = null;
      if (this.abort.signal.aborted) return;
      try { await this.refresh(); } catch { /* the stream tells what is wrong */ }
      this.draw();
    }, 250);
  }

  async act(what) {
    showError(this.problem, null);
    this.pauseButton.disabled = this.resumeButton.disabled = this.cancelButton.disabled = true;
    try {
      this.job = await post(`/v1/fine_tuning/jobs/${this.jobId}/${what}`);
      if (what === "resume") this.follow();
      else if (this.job.status === "running") setWords(this.state.lastChild, "t", "status_stopping");
      else { await this.refresh(); this.draw(); }
    } catch (error) {
      showError(this.problem, error);
      this.buttons();
    }
  }

  buttons() {
    const status = this.job?.status;
    this.pauseButton.hidden = !["validating_files", "queued", "running"].includes(status);
    this.cancelButton.hidden = !["validating_files", "queued", "running", "paused"].includes(status);
    this.resumeButton.hidden = !["paused", "failed"].includes(status);
    this.tryButton.hidden = status !== "succeeded";
    this.pauseButton.disabled = this.resumeButton.disabled = this.cancelButton.disabled = false;
    if (this.job?.fine_tuned_model) this.tryButton.href = `#compare/${encodeURIComponent(this.job.fine_tuned_model)}`;
  }

  draw() {
    const { job } = this;
    if (!job) return;
    const step = Math.max(job.loralib.step ?? 0, this.train.at(-1)?.[0] ?? 0);
    const [badge, , words] = this.state.childNodes;
    badge.className = `badge ${job.status}`;
    setWords(badge, "t", `status_${job.status}`);
    delete words.words;
    const told = this.steps ? [translate("step_of", { n: number(step), m: number(this.steps) })] : [];
    const left = job.estimated_finish && job.status === "running" ? job.estimated_finish - Date.now() / 1000 : null;
    if (left !== null && left > 0) told.push(translate("time_left", { time: duration(left) }));
    const [valid, train] = [this.valid.at(-1), this.train.at(-1)];
    if (train) told.push(`${translate("training_loss")} ${number(train[1], 3)}`);
    if (valid) told.push(`${translate("validation_loss")} ${number(valid[1], 3)}`);
    words.textContent = told.join(" · ");
    this.bar.value = this.steps ? step / this.steps : job.status === "succeeded" ? 1 : 0;
    const open = this.chart.querySelector("details")?.open;
    this.chart.replaceChildren(lineChart([
      { name: () => translate("training_loss"), points: this.train, colour: 0, faint: true },
      { name: () => translate("validation_loss"), points: this.valid, colour: 1, marked: true },
    ], { steps: this.steps }));
    if (open) this.chart.querySelector("details").open = true;
    showError(this.problem, job.error?.message ? job.error : null);
    this.log.textContent = this.lines.join("\n");
    this.buttons();
  }
}
