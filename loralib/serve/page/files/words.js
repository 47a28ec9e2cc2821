// Every word of the page, in every language that it speaks: English, tiếng Việt.  A test compares the keys.

export const WORDS = {
  skip: ["Skip to content", "Tới nội dung chính"],
  compare: ["Compare", "So sánh"],
  train: ["Train", "Huấn luyện"],
  runs: ["Runs", "Lần chạy"],
  adapters: ["Adapters", "Adapter"],
  views: ["Views", "Các trang"],
  language: ["Language", "Ngôn ngữ"],
  theme: ["Theme", "Giao diện"],
  theme_auto: ["System", "Hệ thống"],
  theme_light: ["Light", "Sáng"],
  theme_dark: ["Dark", "Tối"],
  error: ["This did not work", "Không thực hiện được"],
  base: ["base", "mô hình gốc"],
  adapter: ["adapter", "adapter"],
  loading: ["Loading …", "Đang tải …"],
  none: ["none", "không có"],
  auto: ["auto", "tự động"],
  unreachable: ["The server cannot be reached ({why}). Is it still running?", "Không kết nối được với máy chủ ({why}). Máy chủ còn chạy không?"],
  try_again: ["Try again", "Thử lại"],

  key_title: ["This server asks for a key", "Máy chủ này cần khóa"],
  key_wrong: ["The server did not accept that key.", "Máy chủ không chấp nhận khóa đó."],
  key_hint: ["Kept until this tab is closed, and sent to this server alone.", "Chỉ giữ đến khi đóng thẻ này và chỉ gửi tới máy chủ này."],
  key_label: ["API key", "Khóa API"],
  key_use: ["Use this key", "Dùng khóa này"],

  compare_title: ["Compare answers", "So sánh câu trả lời"],
  compare_intro: ["One prompt, with the base and its adapters side by side, all computed in the same batch.",
    "Một câu nhắc, mô hình gốc và các adapter cạnh nhau. Tất cả được tính trong cùng một lô."],
  kind: ["Kind of prompt", "Loại câu nhắc"],
  plain_text: ["Plain text", "Văn bản"],
  chat: ["Chat", "Trò chuyện"],
  no_chat: ["This base has no chat template, so it only accepts plain text.", "Mô hình gốc này không có mẫu trò chuyện, nên chỉ nhận văn bản."],
  prompt: ["Prompt", "Câu nhắc"],
  message: ["Message", "Tin nhắn"],
  system: ["Instructions for all turns (optional)", "Chỉ dẫn cho mọi lượt (không bắt buộc)"],
  prompt_placeholder: ["Write the text for the models to continue, as in the training data", "Viết phần đầu để các mô hình viết tiếp, giống như trong dữ liệu huấn luyện"],
  message_placeholder: ["Write a message for the models to answer", "Viết điều bạn muốn các mô hình trả lời"],
  samples: ["Prompts from its training data", "Câu nhắc từ dữ liệu của nó"],
  samples_choose: ["choose one", "chọn một câu"],
  generate: ["Generate", "Sinh văn bản"],
  stop: ["Stop", "Dừng"],
  shortcut: ["Ctrl + Enter", "Ctrl + Enter"],
  new_chat: ["New conversation", "Cuộc trò chuyện mới"],
  settings: ["Settings", "Thiết lập"],
  tokens: ["Maximum tokens", "Số token tối đa"],
  temperature: ["Temperature", "Nhiệt độ"],
  temperature_hint: ["0: always the most likely token", "0: luôn chọn khả năng cao nhất"],
  top_p: ["Top p", "Top p"],
  seed: ["Seed", "Hạt giống"],
  seed_hint: ["the same seed, the same text", "cùng hạt giống, cùng văn bản"],
  model: ["Model", "Mô hình"],
  scale: ["Scale", "Cường độ"],
  scale_hint: ["0: as the base, 1: as trained", "0: như mô hình gốc, 1: như khi huấn luyện"],
  add_panel: ["Add a panel", "Thêm một khung"],
  remove_panel: ["Remove panel {n}", "Bỏ khung {n}"],
  panel: ["Panel {n}", "Khung {n}"],
  answer: ["Answer of panel {n}", "Câu trả lời của khung {n}"],
  waiting: ["Waiting …", "Đang chờ …"],
  writing: ["{n} {n|token|tokens} · {s} s", "{n} token · {s} giây"],
  written: ["{n} {n|token|tokens} · {s} s · {rate} per second", "{n} token · {s} giây · {rate} mỗi giây"],
  why_stop: ["ended on its own", "tự kết thúc"],
  why_length: ["stopped at the limit", "dừng ở giới hạn"],
  why_stopped: ["stopped", "đã dừng"],
  all_done: ["All panels have finished", "Tất cả các khung đã xong"],
  empty_answer: ["The answer will appear here.", "Câu trả lời sẽ hiện ở đây."],
  empty_adapters: ["There are no adapters yet. Train one from a file of examples, then compare it with its base here.",
    "Chưa có adapter nào. Hãy huấn luyện một adapter từ tệp ví dụ, rồi so sánh nó với mô hình gốc ở đây."],
  go_train: ["Train an adapter", "Huấn luyện adapter"],
  you: ["You", "Bạn"],

  train_title: ["Train an adapter", "Huấn luyện adapter"],
  train_intro: ["From a file of examples to an adapter, on this machine.", "Từ một tệp ví dụ đến một adapter, ngay trên máy này."],
  step_file: ["1 · Examples", "1 · Ví dụ"],
  step_settings: ["2 · Settings", "2 · Thiết lập"],
  step_preview: ["3 · What will happen", "3 · Điều sẽ diễn ra"],
  step_run: ["Training", "Huấn luyện"],
  drop: ["Drop a file here, or choose one", "Thả tệp vào đây, hoặc chọn tệp"],
  drop_hint: ["JSONL, CSV, JSON, Parquet, text: prompts with completions, chats, or texts",
    "JSONL, CSV, JSON, Parquet, văn bản: câu nhắc kèm câu trả lời, hội thoại, hoặc văn bản"],
  earlier_file: ["Or a file uploaded earlier", "Hoặc một tệp đã có"],
  choose_file: ["choose", "chọn"],
  uploading: ["Uploading {name} …", "Đang tải lên {name} …"],
  file_read: ["{name}: {n} {n|example|examples}, read as {format}", "{name}: {n} ví dụ, đọc theo dạng {format}"],
  file_unread: ["{name}: {format}, to be read when the run starts", "{name}: {format}, sẽ được đọc khi chạy"],
  name: ["Name", "Tên"],
  name_hint: ["becomes part of the adapter's name", "một phần trong tên của adapter"],
  epochs: ["Epochs", "Số vòng (epoch)"],
  epochs_hint: ["passes over the examples", "số lần đi qua toàn bộ ví dụ"],
  rank: ["Rank", "Hạng (rank)"],
  rank_hint: ["size of the adapter", "kích thước của adapter"],
  batch_size: ["Examples per step", "Số ví dụ mỗi bước"],
  lr: ["Learning rate", "Tốc độ học"],
  lr_hint: ["auto: chosen for the model, data and rank", "auto: chọn theo mô hình, dữ liệu và hạng"],
  max_steps: ["Maximum steps", "Số bước tối đa"],
  max_steps_hint: ["0: all epochs", "0: đủ các epoch"],
  valid_fraction: ["Fraction for validation", "Phần để kiểm định"],
  valid_hint: ["auto: some examples are set aside if there are enough", "auto: để riêng một phần nếu có đủ ví dụ"],
  dropout: ["Dropout", "Dropout"],
  objective: ["What to train", "Phần được huấn luyện"],
  objective_clm: ["the completions", "câu trả lời"],
  objective_jlm: ["all tokens", "mọi token"],
  objective_dpo: ["to prefer chosen over rejected answers (DPO)", "ưu tiên câu trả lời được chọn hơn câu bị loại (DPO)"],
  objective_orpo: ["the same, without a reference (ORPO)", "như trên, không cần mô hình tham chiếu (ORPO)"],
  as_chat: ["Format prompts and completions with the chat template", "Đưa câu nhắc và câu trả lời qua mẫu trò chuyện"],
  more_settings: ["More settings", "Thiết lập khác"],
  reading: ["Reading the examples …", "Đang đọc các ví dụ …"],
  used: ["{n} of {m} examples are used for training", "{n} trong {m} ví dụ được dùng để huấn luyện"],
  held_out: ["{n} are set aside for validation", "{n} ví dụ để riêng cho kiểm định"],
  dropped: ["{n} left out: {why}", "{n} bị bỏ: {why}"],
  left_out_list: ["Examples that are left out", "Các ví dụ bị bỏ"],
  facts_steps: ["Steps", "Số bước"],
  facts_time: ["Time", "Thời gian"],
  facts_memory: ["Memory", "Bộ nhớ"],
  facts_parameters: ["Trained parameters", "Tham số được huấn luyện"],
  facts_lr: ["Learning rate", "Tốc độ học"],
  about_time: ["about {time}", "khoảng {time}"],
  measured: ["from earlier runs here", "theo các lần chạy trước ở đây"],
  estimated: ["from this machine's speed", "theo tốc độ của máy này"],
  memory_of: ["{need}, {free} free", "{need}, còn trống {free}"],
  memory_tight: ["more than is free: lower the batch size", "nhiều hơn phần còn trống: hãy giảm số ví dụ mỗi bước"],
  notes: ["How the file is read", "Cách đọc tệp"],
  some_examples: ["The first examples, as the model sees them", "Những ví dụ đầu, như mô hình nhìn thấy"],
  legend_trained: ["trained", "được huấn luyện"],
  legend_read: ["read only", "chỉ đọc"],
  example_facts: ["{source} · {n} {n|token|tokens}, {m} trained", "{source} · {n} token, {m} được huấn luyện"],
  start: ["Start training", "Bắt đầu huấn luyện"],
  pause: ["Pause, to resume later", "Dừng, chạy tiếp sau"],
  resume: ["Resume", "Chạy tiếp"],
  cancel: ["Cancel for good", "Hủy hẳn"],
  cancel_sure: ["Cancel this job for good? It cannot be resumed afterwards.", "Hủy hẳn công việc này? Sau đó không thể chạy tiếp."],
  try_it: ["Compare it with its base", "So sánh với mô hình gốc"],
  another: ["Train another", "Huấn luyện adapter khác"],
  jobs_off: ["This server does not run training jobs (--max_jobs 0).", "Máy chủ này không chạy huấn luyện (--max_jobs 0)."],
  status_validating_files: ["checking the data", "đang kiểm tra dữ liệu"],
  status_queued: ["waiting for its turn", "đang chờ đến lượt"],
  status_running: ["running", "đang chạy"],
  status_paused: ["stopped", "đã dừng"],
  status_succeeded: ["done", "xong"],
  status_failed: ["failed", "thất bại"],
  status_cancelled: ["cancelled", "đã hủy"],
  status_stopping: ["saving …", "đang tự lưu …"],
  step_of: ["step {n} of {m}", "bước {n} trong {m}"],
  time_left: ["about {time} left", "còn khoảng {time}"],
  progress: ["Progress", "Tiến độ"],
  log: ["Log", "Nhật ký của lần chạy"],
  job_done: ["Training has finished", "Huấn luyện đã xong"],
  before_first_step: ["The first losses appear after the first step.", "Loss đầu tiên hiện sau bước đầu tiên."],

  training_loss: ["training", "huấn luyện"],
  validation_loss: ["validation", "kiểm định"],
  step: ["step", "bước"],
  curve_label: ["Loss by step. {summary}", "Loss theo bước. {summary}"],
  curve_summary: ["{name}: from {first} at step {a} to {last} at step {b}.", "{name}: từ {first} ở bước {a} đến {last} ở bước {b}."],
  as_table: ["The curve as a table", "Đường cong dưới dạng bảng"],

  runs_title: ["Runs", "Các lần chạy"],
  runs_intro: ["All training jobs on this server. Select some to overlay their curves.",
    "Mọi lần huấn luyện của máy chủ này. Chọn vài lần để xem các đường cong chồng lên nhau."],
  runs_empty: ["Nothing has been trained here yet.", "Chưa có lần huấn luyện nào ở đây."],
  run: ["Run", "Lần chạy"],
  status: ["Status", "Trạng thái"],
  started: ["Created", "Tạo lúc"],
  steps: ["Steps", "Số bước"],
  last_loss: ["Validation loss", "Loss kiểm định"],
  shown: ["Shown", "Hiện"],
  show_run: ["Show {name}", "Hiện {name}"],
  open_run: ["Open", "Mở"],
  open_named: ["Open {name}", "Mở {name}"],
  curves: ["Curves", "Đường cong"],
  settings_compared: ["Settings compared", "So sánh thiết lập"],
  setting: ["Setting", "Thiết lập"],
  differs: ["differs", "khác nhau"],
  by_default: ["default", "mặc định"],
  data: ["Data", "Dữ liệu"],

  adapters_title: ["Adapters", "Adapter"],
  adapters_intro: ["What each one is, what it has learned, and where it can be used.",
    "Mỗi adapter là gì, đã học được gì, và có thể dùng ở đâu."],
  loaded: ["loaded", "đã nạp"],
  not_loaded: ["not loaded", "chưa nạp"],
  load: ["Load", "Nạp"],
  unload: ["Unload", "Gỡ"],
  adapter_facts: ["What it is", "Thông tin"],
  fact_targets: ["Adapts", "Điều chỉnh"],
  fact_modules: ["{n} {n|module|modules}", "{n} mô-đun"],
  fact_base: ["Base", "Mô hình gốc"],
  fact_size: ["Size", "Kích thước"],
  fact_parameters: ["{n} parameters", "{n} tham số"],
  fact_trained: ["Trained on", "Huấn luyện trên"],
  fact_settings: ["With", "Thiết lập"],
  learned: ["What it learned", "Nó đã học được gì"],
  learned_hint: ["Size of the update (Frobenius norm) by layer and kind of module; the stronger the colour, the larger the update.",
    "Độ lớn của phần cập nhật (chuẩn Frobenius) theo lớp và loại mô-đun; màu càng rõ thì càng lớn."],
  layer: ["Layer", "Lớp"],
  outside_layers: ["other", "khác"],
  export: ["Export", "Xuất"],
  export_hint: ["Written and checked on the server, which keeps the last few for download until it stops.", "Ghi và kiểm tra trên máy chủ; máy chủ giữ vài bản gần nhất để tải về cho đến khi tắt."],
  export_peft: ["PEFT", "PEFT"],
  export_gguf: ["GGUF (llama.cpp)", "GGUF (llama.cpp)"],
  export_mlx: ["MLX", "MLX"],
  export_merged: ["Merged model", "Mô hình đã gộp"],
  exporting: ["Writing {what} …", "Đang ghi {what} …"],
  exported: ["{file} is ready ({size})", "{file} đã sẵn sàng ({size})"],
  download: ["Download", "Tải về"],
  export_failed: ["The export failed", "Xuất không thành công"],
  use_it: ["Compare", "So sánh"],
  seconds: ["{n} s", "{n} giây"],
  minutes: ["{n} min", "{n} phút"],
  hours: ["{n} h", "{n} giờ"],
};

export const LANGUAGES = ["en", "vi"];
export const NAMES = { en: "English", vi: "Tiếng Việt" };

let language = LANGUAGES.includes(stored()) ? stored() : preferred();

function stored() {
  try { return localStorage.getItem("loralib.language"); } catch { return null; }
}

function preferred() {
  for (const word of navigator.languages ?? []) {
    const short = word.slice(0, 2).toLowerCase();
    if (LANGUAGES.includes(short)) return short;
  }
  return "en";
}

export const getLanguage = () => language;

export function setLanguage(chosen) {
  language = chosen;
  try { localStorage.setItem("loralib.language", chosen); } catch { /* for this visit */ }
}

export function translate(key, values = {}) {
  const words = WORDS[key]?.[LANGUAGES.indexOf(language)];
  if (words === undefined) throw new Error(`no words for ${key}`);
  return words.replace(/\{(\w+)\|(.*?)\|(.*?)\}/g, (_, name, one, many) => String(values[name]) === "1" ? one : many).replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

// How people call an adapter: of one that was trained here, its own part of the name.
export function called(name) {
  const [, suffix, id] = name.match(/^ft:.*:([^:]*):([^:]*)$/) ?? [];
  return id === undefined ? name.split("/").at(-1) : `${suffix || translate("adapter")} · ${id.slice(0, 4)}`;
}

export const number = (value, digits = 0) =>
  new Intl.NumberFormat(language, { maximumFractionDigits: digits, minimumFractionDigits: digits }).format(value);

export const significant = (value, digits = 3) =>
  new Intl.NumberFormat(language, { maximumSignificantDigits: digits, notation: value && Math.abs(value) < 1e-3 ? "scientific" : "standard" }).format(value);

export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; value >= 1000 && unit < units.length - 1; unit++) value /= 1000;
  return `${significant(value)} ${units[unit]}`;
}

export function duration(seconds) {
  if (seconds < 90) return translate("seconds", { n: number(Math.max(1, Math.round(seconds))) });
  if (seconds < 5400) return translate("minutes", { n: number(Math.round(seconds / 60)) });
  return translate("hours", { n: number(seconds / 3600, 1) });
}

export const when = (stamp) =>
  new Intl.DateTimeFormat(language, { dateStyle: "short", timeStyle: "short" }).format(new Date(stamp * 1000));
