// The server's interface: models, streamed answers, errors. The API key is in this module and in sessionStorage only.

import { storage } from "./dom.js";

const KEY = "smolseek.key";
const session = storage("sessionStorage");
let key = session.getItem(KEY) ?? "";

export const hasKey = () => Boolean(key);

export function setKey(value) {
  key = value.trim();
  if (key) session.setItem(KEY, key);
  else session.removeItem(KEY);
}

/** An answer with a status other than 2xx; `message` is the server's. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  if (response.ok) return response;
  let message = `the server answered with status ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // The body is not the server's JSON: the status has to do.
  }
  const seconds = response.headers.get("Retry-After");
  if (response.status === 429 && seconds) message += ` (try again in ${seconds} s)`;
  throw new ServerError(response.status, message);
}

/** Return the entry of the first model. */
export async function firstModel() {
  return (await (await request("v1/models")).json()).data[0];
}

/**
 * Send a request and yield its parts as they arrive, as objects `{text, tokens, prompt, finish, usage}`.
 *
 * Entries of `tokens` and `prompt` are `{text, id, logprob, top, experts}`; what the server does not report is null.
 */
export async function* stream(path, body, signal) {
  const response = await request(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.code ?? 500, chunk.error.message);
    yield part(chunk);
  }
  throw new ServerError(0, "the connection ended before the answer was complete");
}

/** Yield the data of the server-sent events of a body. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const complete = (rest + value).split(/\r?\n\r?\n/);
      rest = complete.pop();
      for (const event of complete) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function part(chunk) {
  const choice = chunk.choices?.[0];
  const routing = choice?.smolseek ?? chunk.smolseek;
  const scores = choice?.logprobs?.content ?? completionScores(choice?.logprobs);
  const experts = routing?.tokens ?? [];
  const tokens = Array.from({ length: Math.max(scores.length, experts.length) }, (_, i) => ({
    text: scores[i]?.token ?? experts[i].text,
    bytes: scores[i]?.bytes ?? null,
    id: experts[i]?.id ?? null,
    logprob: scores[i]?.logprob ?? null,
    top: (scores[i]?.top_logprobs ?? []).map(({ token, logprob }) => ({ text: token, logprob })),
    experts: experts[i]?.experts ?? null,
  }));
  return {
    text: choice?.delta?.content ?? choice?.text ?? "",
    tokens,
    prompt: (routing?.prompt ?? []).map((token) => ({ ...token, bytes: escapedBytes(token.text), logprob: null, top: [] })),
    finish: choice?.finish_reason ?? null,
    usage: chunk.usage ?? null,
  };
}

/** Return the bytes of a token that is a part of a character, which the server escapes; null for other tokens. */
function escapedBytes(text) {
  if (!/\\x[89a-f][0-9a-f]/.test(text)) return null;
  const parts = text.split(/\\x([89a-f][0-9a-f])/);
  return parts.flatMap((part, i) => (i % 2 ? parseInt(part, 16) : [...new TextEncoder().encode(part)]));
}

/** Return the log-probabilities of /v1/completions in the form of /v1/chat/completions. */
function completionScores(logprobs) {
  return (logprobs?.tokens ?? []).map((token, i) => ({
    token,
    bytes: escapedBytes(token),
    logprob: logprobs.token_logprobs[i],
    top_logprobs: Object.entries(logprobs.top_logprobs?.[i] ?? {})
      .map(([text, logprob]) => ({ token: text, logprob }))
      .sort((a, b) => b.logprob - a.logprob),
  }));
}
