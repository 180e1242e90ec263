// Talking to the daemon: its stream, read for ever, and the few things that can be asked of it.

import { EventReader } from "./sse.js";

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 5000;
const SILENCE_MS = 15000; // the daemon says something every second

/** What the daemon answered instead of doing it. `status` is HTTP's. */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/**
 * Read the stream until `signal` is aborted, again whenever it ends. A key is waited for where one is asked for.
 * Of several models it is of `model`. `on.message(topic, data)`, `on.lost(reason)`; `on.keyWanted(reason)` resolves when another key may be tried.
 */
export async function follow(key, on, signal, model = "") {
  let pause = FIRST_PAUSE_MS;
  while (!signal.aborted) {
    let reason = "the daemon ended the stream";
    try {
      reason = await readOnce(key, on, signal, model, () => { pause = FIRST_PAUSE_MS; });
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refused && (error.status === 401 || error.status === 403)) {
        const wanted = key() ? error.message : "This daemon asks for an API key";
        on.lost(wanted);
        await on.keyWanted(wanted);
        continue;
      }
      reason = error instanceof Refused ? error.message : "the daemon does not answer";
    }
    on.lost(`${reason}; trying again`);
    await new Promise((resolve) => setTimeout(resolve, pause));
    pause = Math.min(pause * 2, LONGEST_PAUSE_MS);
  }
}

/** Ask for something in JSON, of that model; return the answer. Throws `Refused`. */
export async function ask(path, body, key, model = "") {
  const headers = { "Content-Type": "application/json", ...authorization(key) };
  let answer;
  try {
    answer = await fetch(`dashboard/${path}${ofModel(model)}`, { method: "POST", headers, body: JSON.stringify(body), cache: "no-store" });
  } catch {
    throw new Refused("the daemon does not answer", 0);
  }
  if (!answer.ok) throw await refusal(answer);
  return answer.json();
}

async function readOnce(key, on, signal, model, alive) {
  const silence = new AbortController();
  const either = AbortSignal.any([signal, silence.signal]);
  let timer = setTimeout(() => silence.abort(), SILENCE_MS);
  try {
    const answer = await fetch(`dashboard/stream${ofModel(model)}`, { headers: authorization(key), cache: "no-store", signal: either });
    if (!answer.ok) throw await refusal(answer);
    const events = new EventReader();
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return "the daemon ended the stream";
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(), SILENCE_MS);
      for (const { topic, data } of events.take(value)) {
        if (topic === "bye") return data.reason;
        alive();
        on.message(topic, data);
      }
    }
  } finally {
    clearTimeout(timer);
  }
}

async function refusal(answer) {
  let message = `the daemon answered ${answer.status}`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    // something between here and the daemon answered in its own words
  }
  return new Refused(message, answer.status);
}

/** The only model of a daemon needs no name. */
function ofModel(model) {
  return model === "" ? "" : `?model=${encodeURIComponent(model)}`;
}

function authorization(key) {
  const value = key();
  return value ? { Authorization: `Bearer ${value}` } : {};
}
