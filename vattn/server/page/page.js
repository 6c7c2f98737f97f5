// The live page: follows /live and hands each snapshot to the panels.

import { AddressSpace } from "./map.js";
import { Figures, showMemory, showRequests } from "./panels.js";
import { follow, key } from "./stream.js";
import { tryBox } from "./try.js";
import { byId, count, say } from "./words.js";

const THEME = "vattn-theme";
const NEWS_MS = 20000;

const space = new AddressSpace();
const figures = new Figures();
let toldAt = -Infinity;

/** Says a state where it changes; the region is announced politely. */
function connection(state, words) {
  const element = byId("connection");
  element.dataset.state = state;
  say(element, words);
}

function engine({ state, error }) {
  const why = error ? `: ${error}` : "";
  if (state === "up") connection("live", "live");
  else if (state === "draining") connection("waiting", "shutting down, no new requests");
  else if (state === "restarting") connection("waiting", `engine restarting${why}`);
  else connection("down", `engine down${why}`);
}

/** A summary for those who do not see the figures, now and then. */
function news({ queue, throughput }) {
  const now = performance.now();
  if (now - toldAt < NEWS_MS) return;
  toldAt = now;
  const busy = queue.running + queue.waiting;
  say(byId("news"), busy
    ? `${count(queue.running)} running, ${count(queue.waiting)} waiting, ` +
      `${count(throughput.generation_tokens_per_s)} tokens per second`
    : "idle");
}

function show(now) {
  engine(now.engine);
  const { dtype, device, max_model_len: most } = now.engine;
  const about = dtype ? [dtype, device, `at most ${count(most)} tokens`] : [];
  say(byId("model"), [now.model, ...about].join(" · "));
  byId("try-form").dataset.model = now.model;
  figures.show(now);
  showMemory(now);
  space.show(now.map);
  showRequests(now);
  news(now);
}

// The key ------------------------------------------------------------------------------------------

function locked(message) {
  const tried = key.get() !== "";
  key.forget();
  byId("forget-key").hidden = true;
  const first = byId("key").hidden;
  byId("key").hidden = false;
  say(byId("key-error"), tried ? message : "");
  connection("waiting", "a key is needed");
  if (first || tried) byId("key-input").focus();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = byId("key-input").value.trim();
  // No other one can be sent, nor does a server have one.
  if (!/^[!-~]+$/.test(given)) {
    say(byId("key-error"), "a key is made of ASCII letters, digits and signs, without spaces");
    return;
  }
  key.set(given);
  byId("key-input").value = "";
  feed.retry();
});
byId("forget-key").addEventListener("click", () => {
  key.forget();
  location.reload(); // with all that the key has let on the screen
});

function unlocked() {
  const had = byId("key").contains(document.activeElement);
  byId("key").hidden = true;
  byId("forget-key").hidden = key.get() === "";
  // Hidden elements lose the focus: it goes on behind the form, not back to the top.
  if (had) byId("main").focus();
}

// The theme ----------------------------------------------------------------------------------------

function theme(name) {
  document.documentElement.dataset.theme = name;
  space.later();
}
const picked = byId("theme");
picked.value = ["light", "dark"].includes(localStorage.getItem(THEME)) ? localStorage.getItem(THEME) : "auto";
theme(picked.value);
picked.addEventListener("change", () => {
  localStorage.setItem(THEME, picked.value);
  theme(picked.value);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => space.later());

// --------------------------------------------------------------------------------------------------

tryBox(locked);
const feed = follow("/live?interval=0.5", {
  event(_, now) {
    unlocked();
    show(now);
  },
  state(name, words) {
    if (name === "locked") {
      locked(words);
      return;
    }
    figures.gap();
    if (name === "down") connection("down", words);
    else connection("waiting", words ? `reconnecting: ${words}` : "reconnecting");
  },
});
