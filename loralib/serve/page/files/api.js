// All that the page does, it does over HTTP, as any other client could.
import { translate } from "./words.js";

let key = null;
try { key = sessionStorage.getItem("loralib.key"); } catch { /* asked for again after a reload */ }
let askForKey = async () => null;

export const hasKey = () => key !== null;
export const onKeyNeeded = (ask) => { askForKey = ask; };

export class ApiError extends Error {
  constructor(message, status, code) {
    super(message);
    Object.assign(this, { status, code });
  }
}

async function send(path, options = {}, again = true) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(translate("unreachable", { why: error.message }), 0, "unreachable");
  }
  if (response.status === 401 && again) {
    const given = await askForKey(key !== null);
    if (given) {
      key = given;
      try { sessionStorage.setItem("loralib.key", key); } catch { /* this page keeps it */ }
      return send(path, options, again);
    }
  }
  if (!response.ok) {
    let body = null;
    try { body = await response.json(); } catch { /* no JSON: the status has to do */ }
    const detail = typeof body?.detail === "string" ? body.detail : null;
    throw new ApiError(body?.error?.message ?? detail ?? `${response.status} ${response.statusText}`, response.status, body?.error?.code);
  }
  return response;
}

export const get = async (path) => (await send(path)).json();
export const post = async (path, body = {}, signal) => (await send(path, {
  method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
})).json();
export const remove = async (path) => (await send(path, { method: "DELETE" })).json();
export const blob = async (path) => (await send(path)).blob();

export async function upload(file) {
  const form = new FormData();
  form.append("purpose", "fine-tune");
  form.append("file", file, file.name);
  return (await send("/v1/files", { method: "POST", body: form })).json();
}

// Yields the data of server-sent events, as objects.
export async function* events(path, body, signal) {
  const options = body
    ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal }
    : { signal };
  const reader = (await send(path, options)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      const parts = rest.split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.message, 200, event.error.code);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
