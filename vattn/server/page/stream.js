// Server-sent events by fetch, which can send a key where EventSource cannot.

const KEY = "vattn-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** An answer that is not 2xx, with the message of its body. */
export class HttpError extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** The network failed, or the server does not listen. */
export class Unreachable extends Error {
  constructor() {
    super("the server cannot be reached");
  }
}

/** What fetch and its streams throw, told apart from mistakes of this page: all are TypeErrors. */
const unreachable = (error) => {
  throw error instanceof TypeError ? new Unreachable() : error;
};

/** fetch with the key; throws HttpError, Unreachable, or what is wrong with the key. */
export async function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  if (key.get()) headers.set("Authorization", `Bearer ${key.get()}`);
  const response = await fetch(path, { ...options, headers, cache: "no-store" }).catch(unreachable);
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`.trim();
  try {
    message = (await response.json()).error.message ?? message;
  } catch {
    // not one of the server's own bodies
  }
  throw new HttpError(response.status, message, response.headers.get("Retry-After"));
}

/** The events of a response: {event, data}. Comments are passed as event "". */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(unreachable);
      if (done) return;
      const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) yield parse(block);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parse(block) {
  let event = "message";
  const data = [];
  for (const line of block.split("\n")) {
    const at = line.indexOf(":");
    const name = at < 0 ? line : line.slice(0, at);
    const value = at < 0 ? "" : line.slice(at + 1).replace(/^ /, "");
    if (name === "event") event = value;
    if (name === "data") data.push(value);
  }
  return data.length ? { event, data: data.join("\n") } : { event: "", data: "" };
}

const SHORTEST_MS = 250;
const LONGEST_MS = 8000;
const SILENCE_MS = 15000;

/**
 * Follows an event stream for good, with back-off between tries.
 *
 * on.event(event, data): data is parsed JSON. on.state(name, words): "reconnecting" (words say why,
 * where it is not the network), "locked" (a key is needed: it waits for retry()) or "down" (for
 * good).
 */
export function follow(path, on) {
  let wait = SHORTEST_MS;
  let wake = () => {};

  const pause = (ms) =>
    new Promise((resolve) => {
      const timer = ms === Infinity ? 0 : setTimeout(resolve, ms);
      wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });

  async function once() {
    const current = new AbortController();
    let timer = 0;
    const alive = () => {
      clearTimeout(timer);
      timer = setTimeout(() => current.abort(), SILENCE_MS);
    };
    try {
      alive();
      const response = await ask(path, { signal: current.signal });
      for await (const { event, data } of events(response)) {
        alive();
        wait = SHORTEST_MS;
        if (event) on.event(event, JSON.parse(data));
      }
    } finally {
      clearTimeout(timer);
      current.abort();
    }
  }

  async function loop() {
    for (;;) {
      let why = "";
      let later = 0;
      try {
        await once();
      } catch (error) {
        if (error.status === 401 || error.status === 403) {
          on.state("locked", error.message);
          await pause(Infinity);
          continue;
        }
        if (error.status === 404) {
          on.state("down", error.message);
          return;
        }
        const silent = error instanceof Unreachable || error.name === "AbortError";
        why = silent ? "" : error.message;
        later = 1000 * Number(error.retryAfter ?? 0) || 0;
      }
      on.state("reconnecting", why);
      await pause(Math.max(later, wait * (0.75 + Math.random() / 2)));
      wait = Math.min(2 * wait, LONGEST_MS);
    }
  }

  loop();
  return {
    retry: () => {
      wait = SHORTEST_MS;
      wake();
    },
  };
}
