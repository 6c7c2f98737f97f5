// The box that tries a prompt, with streaming.

import { ask, events } from "./stream.js";
import { byId, many, say, seconds } from "./words.js";

/** locked(message): called when a key is needed. */
export function tryBox(locked) {
  const form = byId("try-form");
  const answer = byId("answer");
  const status = byId("answer-status");
  let running = null;

  const stop = () => running?.abort();

  async function send() {
    if (running) return;
    if (!form.reportValidity()) return;
    running = new AbortController();
    busy(true);
    say(answer, "");
    say(byId("answer-error"), "");
    say(status, "waiting for the first token");
    const run = { started: performance.now(), first: 0, tokens: 0, reason: "" };
    try {
      await stream(run, running.signal);
      say(status, ended(run));
    } catch (error) {
      if (error.name === "AbortError") {
        say(status, `stopped after ${many(run.tokens, "token")}`);
      } else {
        say(status, "");
        say(byId("answer-error"), told(error));
        if (error.status === 401) locked(error.message);
      }
    } finally {
      running = null;
      busy(false);
    }
  }

  async function stream(run, signal) {
    const chat = form.elements.mode.value === "chat";
    const text = byId("prompt").value;
    const body = {
      max_tokens: Number(byId("max-tokens").value),
      temperature: Number(byId("temperature").value),
      stream: true,
      stream_options: { include_usage: true },
      ...(chat ? { messages: [{ role: "user", content: text }] } : { prompt: text }),
    };
    const response = await ask(chat ? "/v1/chat/completions" : "/v1/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ model: form.dataset.model || undefined, ...body }),
      signal,
    });
    for await (const { data } of events(response)) {
      if (data === "[DONE]") return;
      if (data) take(JSON.parse(data), run);
    }
    throw new Error("the connection ended before the answer did");
  }

  function take(chunk, run) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.usage) Object.assign(run, { tokens: chunk.usage.completion_tokens });
    const cached = chunk.usage?.prompt_tokens_details?.cached_tokens;
    if (cached) run.cached = cached;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const text = choice.text ?? choice.delta?.content ?? "";
    if (text) {
      if (!run.first) {
        run.first = performance.now();
        say(status, "the answer is coming");
      }
      if (!chunk.usage) run.tokens += 1;
      append(text);
    }
    run.reason = choice.finish_reason ?? run.reason;
  }

  function append(text) {
    const follows = answer.scrollTop + answer.clientHeight >= answer.scrollHeight - 8;
    answer.append(text);
    if (follows) answer.scrollTop = answer.scrollHeight;
  }

  function busy(is) {
    answer.setAttribute("aria-busy", String(is));
    byId("send").disabled = is;
    // A disabled button loses the focus: it goes to where one goes on.
    if (!is && document.activeElement === byId("stop")) byId("prompt").focus();
    byId("stop").disabled = !is;
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("stop").addEventListener("click", stop);
  byId("try").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      send();
    } else if (event.key === "Escape") {
      stop();
    }
  });
}

function told(error) {
  return error.retryAfter ? `${error.message} (try again in ${error.retryAfter} s)` : error.message;
}

function ended({ started, first, tokens, reason, cached }) {
  const now = performance.now();
  const parts = [`${many(tokens, "token")} in ${seconds((now - started) / 1000)}`];
  if (first) parts.push(`the first after ${seconds((first - started) / 1000)}`);
  if (first && tokens > 1) parts.push(`${(((tokens - 1) * 1000) / (now - first)).toFixed(0)} tokens/s`);
  if (cached) parts.push(`${many(cached, "prompt token")} from the cache`);
  return `finished${reason ? ` (${reason})` : ""}: ${parts.join(", ")}`;
}
