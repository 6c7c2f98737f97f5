// Figures, physical memory and requests, from snapshots of the feed.

import { Chart } from "./charts.js";
import { byId, bytes, count, keyed, make, many, rate, say, seconds } from "./words.js";

const percent = (part, whole) => `${whole ? ((100 * part) / whole).toFixed(1) : "0.0"}%`;
const share = (part, whole) => (part && part < 0.0005 * whole ? "<0.1%" : percent(part, whole));

export class Figures {
  constructor() {
    const parent = byId("figures");
    const perSecond = (n) => `${rate(n)} /s`;
    this.tokens = new Chart(parent, "Tokens made", perSecond, "prompt");
    this.first = new Chart(parent, "Time to first token, median", seconds, "p99");
    this.between = new Chart(parent, "Between tokens, median", seconds, "p99");
    this.queue = new Chart(parent, "Running", count, "waiting");
    this.driver = new Chart(parent, "Driver calls", perSecond);
    this.charts = [this.tokens, this.first, this.between, this.queue, this.driver];
  }

  gap() {
    for (const chart of this.charts) chart.gap();
  }

  show(now) {
    const { throughput, latency, queue, driver, time } = now;
    this.tokens.add(time, throughput.generation_tokens_per_s, throughput.prompt_tokens_per_s);
    this.first.add(time, latency.time_to_first_token.p50, latency.time_to_first_token.p99);
    this.between.add(time, latency.inter_token.p50, latency.inter_token.p99);
    this.queue.add(time, queue.running, queue.waiting);
    this.driver.add(time, driver?.per_s ?? null);
    if (driver) say(this.driver.also, `${many(driver.remaps_avoided, "remap")} avoided`);
  }
}

// Physical memory --------------------------------------------------------------------------------

const STATES = ["live", "shared", "cover", "kept", "stale", "scratch", "pooled"];
const LETTERS = { live: "L", shared: "S", cover: "C", kept: "K", stale: "X", scratch: "W", pooled: "P" };
const MEANINGS = {
  live: "tokens of an open sequence",
  shared: "tokens of two or more open sequences",
  cover: "mapped beyond the last token",
  kept: "in a free slot that remembers its content",
  stale: "still mapped in a slot that does not use it",
  scratch: "working space",
  pooled: "free in the pool",
};

export function showMemory({ memory, driver }) {
  if (!memory) {
    say(byId("pool-summary"), "no figures yet");
    return;
  }
  const { states, created_bytes: created, budget_bytes: budget } = memory;
  say(byId("pool-summary"), `${bytes(created)} exist, ${share(created, budget)} of a budget of ` +
    `${bytes(budget)}; at most ${bytes(memory.peak_created_bytes)} so far; pages of ${bytes(memory.page_bytes)}`);
  bar(byId("budget-bar"), states, Math.max(budget, created));
  bar(byId("pool-bar"), states, created);
  keyed(byId("pool-legend"), STATES, (name) => name, (name) =>
    make("li", { title: MEANINGS[name] }, make("i", { class: name, "aria-hidden": "true" }),
      `${LETTERS[name]} ${name} `, make("b"), make("span", { class: "hidden" }, `: ${MEANINGS[name]}`)),
  (item, name) => say(item.querySelector("b"), bytes(states[name] ?? 0)));
  if (driver) {
    const calls = Object.entries(driver.calls).filter(([, call]) => call.count);
    const kinds = calls.map(([kind, call]) => `${kind} ${count(call.count)}`).join(", ");
    say(byId("driver-line"), `${many(driver.count, "driver call")} in ${seconds(driver.seconds)}` +
      `${kinds && ` (${kinds})`}; ${many(driver.remaps_avoided, "remap")} avoided; ` +
      `${bytes(driver.bytes_returned)} returned to the device`);
  }
}

function bar(element, states, whole) {
  keyed(element, STATES, (name) => name, (name) => make("i", { class: name }), (part, name) => {
    part.style.width = `${whole ? (100 * (states[name] ?? 0)) / whole : 0}%`;
  });
}

// Requests -----------------------------------------------------------------------------------------

export function showRequests({ requests, requests_left_out: leftOut, queue }) {
  const more = leftOut ? `, ${count(leftOut)} more not listed` : "";
  say(byId("requests-summary"), requests.length
    ? `${count(queue.running)} running, ${count(queue.waiting)} waiting${more}`
    : "none now");
  keyed(byId("requests-body"), requests, (request) => request.id, line, update);
}

function line(request) {
  const bar = make("div", { role: "progressbar", "aria-label": `Progress of ${request.id}`, "aria-valuemin": "0" }, make("i"));
  const numbers = Array.from({ length: 5 }, () => make("td", { class: "num" }));
  return make("tr", {}, make("th", { scope: "row", title: request.id }, request.id), make("td"),
    make("td", {}, bar), ...numbers);
}

function update(row, request) {
  const made = request.output_tokens.reduce((sum, n) => sum + n, 0);
  const most = request.max_tokens * request.samples;
  const first = request.time_to_first_token_s;
  const samples = request.samples > 1 ? ` × ${request.samples}` : "";
  say(row.cells[1], request.state + samples);
  const bar = row.cells[2].firstChild;
  bar.setAttribute("aria-valuemax", String(most));
  bar.setAttribute("aria-valuenow", String(made));
  bar.setAttribute("aria-valuetext", `${made} of ${many(most, "token")}`);
  bar.firstChild.style.width = percent(made, most);
  const texts = [
    count(request.prompt_tokens), count(request.cached_tokens), `${count(made)} / ${count(most)}`,
    first === null ? "–" : seconds(first), seconds(request.age_s),
  ];
  texts.forEach((text, i) => say(row.cells[3 + i], text));
}
