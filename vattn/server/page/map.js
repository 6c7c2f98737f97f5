// The virtual address space: slots as rows, pages as cells. Rows are a listbox of text, so they can
// be pointed at, moved through and read out; the canvas beneath them draws what they tell.

import { byId, count, keyed, make, many, say } from "./words.js";

// Letters as in the feed, in the order of legends. A capital one is recycled.
const STATES = [
  ["l", "live", "tokens of an open sequence"],
  ["s", "shared", "tokens of two or more"],
  ["c", "cover", "mapped beyond the last token"],
  ["k", "kept", "free, content remembered"],
  ["x", "stale", "free, still mapped"],
];
const NAMES = new Map(STATES.map(([letter, name]) => [letter, name]));
const UNDERLINED = "recycled";

/** "2l1C29." as runs of cells: {length, letter, recycled}. */
function runs(cells) {
  return [...cells.matchAll(/(\d+)([a-zA-Z.])/g)].map(([, length, letter]) => ({
    length: Number(length),
    letter: letter.toLowerCase(),
    recycled: letter !== letter.toLowerCase(),
  }));
}

function counted(row) {
  const found = { l: 0, s: 0, c: 0, k: 0, x: 0, recycled: 0 };
  for (const { length, letter, recycled } of row.runs) {
    if (letter in found) found[letter] += length;
    if (recycled) found.recycled += length;
  }
  return found;
}

function owner(row) {
  if (row.request === null) return row.kept ? "free, remembers a prefix" : "free";
  return row.sample ? `${row.request}, sample ${row.sample + 1}` : row.request;
}

const isOpen = (row) => row.request !== null || row.tokens > 0;

/** The name of a row beside the drawing, where there is little room. */
function short(row) {
  if (row.request === null) return row.kept ? "kept" : isOpen(row) ? "ending" : "free";
  const name = row.request.replace(/^(chat)?cmpl-(?=.)/, "");
  const brief = name.length > 10 ? `${name.slice(0, 9)}…` : name;
  return row.sample ? `${brief} #${row.sample + 1}` : brief;
}

function described(row, map) {
  const parts = STATES.filter(([letter]) => row.counts[letter]).map(
    ([letter, name]) => `${row.counts[letter]} ${name}`,
  );
  if (row.counts.recycled) parts.push(`${row.counts.recycled} of them recycled`);
  const who = row.request === null ? owner(row) : `request ${owner(row)}`;
  const kept = row.kept ? `, ${many(row.kept, "token")} remembered` : "";
  return (
    `Slot ${row.slot}: ${who}; ${count(row.tokens)} of ${many(map.slot_tokens, "token")}${kept}; ` +
    `cells: ${parts.join(", ")}`
  );
}

export class AddressSpace {
  constructor() {
    this.rows = []; // those in use first, each kind by number
    this.open = 0;
    this.map = null;
    this.active = null; // slot moved to by keyboard or click
    this.pointed = null; // slot under the pointer
    this.canvas = byId("map-canvas");
    this.list = byId("map-rows");
    this.scroll = byId("map-scroll");
    this.legend();
    this.list.addEventListener("keydown", (event) => this.key(event));
    this.list.addEventListener("focus", () => this.select(this.active ?? this.rows[0]?.slot));
    this.list.addEventListener("pointerover", (event) => this.point(event.target.closest("li")));
    this.list.addEventListener("pointerleave", () => this.point(null));
    this.list.addEventListener("click", (event) => {
      const item = event.target.closest("li");
      if (item) this.select(Number(item.dataset.key));
    });
    this.scroll.addEventListener("scroll", () => this.later());
    new ResizeObserver(() => this.later()).observe(this.scroll);
    byId("map-as-table").addEventListener("click", () => this.toggle());
  }

  legend() {
    const entries = [...STATES, ["", UNDERLINED, "adopted in place, underlined"]];
    for (const [letter, name, meaning] of entries) {
      byId("map-legend").append(
        make("li", { title: meaning, "data-state": name },
          make("i", { class: name, "aria-hidden": "true" }),
          `${letter.toUpperCase()} ${name} `.trimStart(), make("b", {}, "0"),
          make("span", { class: "hidden" }, `: ${meaning}`)),
      );
    }
    const heads = ["Slot", "Request", "Tokens", "Remembered", ...NAMES.values(), UNDERLINED];
    byId("map-head").append(
      ...heads.map((text, i) => make("th", { scope: "col", ...(i > 1 && { class: "num" }) }, text)),
    );
  }

  /** map: of the feed, or null while it is not known. */
  show(map) {
    this.map = map;
    const rows = (map?.rows ?? []).map((row) => ({ ...row, runs: runs(row.cells) }));
    for (const row of rows) row.counts = counted(row);
    // Free slots are many on a server that has run for long, and would hide those at work.
    const open = rows.filter(isOpen);
    this.rows = [...open, ...rows.filter((row) => !isOpen(row))];
    this.open = open.length;
    this.summary();
    keyed(this.list, this.rows, (row) => row.slot, (row) => this.item(row), (item, row) => {
      item.setAttribute("aria-label", described(row, map));
      say(item.firstChild, `${row.slot} · ${short(row)}`);
      item.classList.toggle("first-free", open.length > 0 && row === this.rows[open.length]);
    });
    if (this.active !== null && !this.rows.some((row) => row.slot === this.active)) this.select(null);
    this.table();
    this.detail();
    this.later();
  }

  item(row) {
    return make("li", { role: "option", id: `slot-${row.slot}`, "aria-selected": "false" },
      make("span", { "aria-hidden": "true" }));
  }

  summary() {
    if (!this.map) {
      say(byId("map-summary"), "not known while the engine does not answer");
      return;
    }
    const { slots, slot_tokens: tokens, cells } = this.map;
    say(byId("map-summary"),
      `${count(this.rows.length)} of ${many(slots, "slot")} mapped, ${count(this.open)} of them ` +
      `in use; a slot has room for ` +
      `${many(tokens, "token")}, a cell is ${many(tokens / cells, "token")}`);
    for (const item of byId("map-legend").children) {
      const letter = STATES.find(([, name]) => name === item.dataset.state)?.[0] ?? UNDERLINED;
      let sum = 0;
      for (const row of this.rows) sum += row.counts[letter];
      say(item.querySelector("b"), count(sum));
    }
    const marks = [0, 0.25, 0.5, 0.75, 1].map((part) => count(part * tokens));
    keyed(byId("axis"), marks.map((text, i) => ({ text, i })), ({ i }) => i,
      () => make("span"), (span, { text }) => say(span, text));
  }

  table() {
    if (byId("map-table").hidden) return;
    keyed(byId("map-body"), this.rows, (row) => row.slot, (row) => {
      const line = make("tr", {}, make("th", { scope: "row" }, String(row.slot)), make("td"));
      for (let i = 0; i < 3 + STATES.length; i++) line.append(make("td", { class: "num" }));
      return line;
    }, (line, row) => {
      const numbers = [row.tokens, row.kept, ...Object.values(row.counts)];
      [owner(row), ...numbers.map(count)].forEach((text, i) => say(line.cells[i + 1], text));
    });
  }

  toggle() {
    const button = byId("map-as-table");
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(on));
    byId("map-table").hidden = !on;
    byId("map-drawn").hidden = on;
    this.table();
    this.later();
  }

  // Moving through rows ----------------------------------------------------------------------------

  key(event) {
    const at = this.rows.findIndex((row) => row.slot === this.active);
    const last = this.rows.length - 1;
    const to = {
      ArrowDown: at + 1, ArrowUp: at < 0 ? last : at - 1, Home: 0, End: last,
      PageDown: at + 10, PageUp: at - 10,
    }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.select(this.rows[Math.min(Math.max(to, 0), last)].slot);
  }

  select(slot) {
    this.active = slot ?? null;
    this.pointed = null;
    for (const item of this.list.children) {
      item.setAttribute("aria-selected", String(Number(item.dataset.key) === this.active));
    }
    const item = this.active === null ? null : byId(`slot-${this.active}`);
    if (item) {
      this.list.setAttribute("aria-activedescendant", item.id);
      item.scrollIntoView({ block: "nearest" });
    } else {
      this.list.removeAttribute("aria-activedescendant");
    }
    this.detail();
  }

  point(item) {
    this.pointed = item ? Number(item.dataset.key) : null;
    this.detail();
  }

  detail() {
    const row = this.rows.find((each) => each.slot === (this.pointed ?? this.active));
    const hint = this.rows.length
      ? "Point at a row, or move to it with the arrow keys."
      : "Nothing is mapped: no request has come yet.";
    say(byId("map-detail"), row ? described(row, this.map) : hint);
  }

  // Drawing ----------------------------------------------------------------------------------------

  later() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.draw();
    });
  }

  draw() {
    const width = this.canvas.clientWidth;
    const high = this.list.firstElementChild?.getBoundingClientRect().height ?? 0;
    byId("map-sheet").style.height = `${high * this.rows.length}px`;
    const height = Math.min(this.scroll.clientHeight, high * this.rows.length);
    const ratio = devicePixelRatio;
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    if (!height || !width || !this.map) return;
    const pen = this.canvas.getContext("2d");
    const ink = palette(pen, ratio);
    pen.scale(ratio, ratio);
    pen.font = "600 10px system-ui, sans-serif";
    pen.textBaseline = "middle";
    pen.textAlign = "center";
    const cell = width / this.map.cells;
    const first = Math.floor(this.scroll.scrollTop / high);
    const end = Math.min(this.rows.length, Math.ceil((this.scroll.scrollTop + height) / high));
    for (let i = first; i < end; i++) {
      paint(pen, ink, this.rows[i], i * high - this.scroll.scrollTop, high - 2, cell);
    }
  }
}

function paint(pen, ink, row, top, high, cell) {
  let at = 0;
  for (const { length, letter, recycled } of row.runs) {
    const left = at * cell;
    const wide = length * cell - (cell > 4 ? 1 : 0);
    at += length;
    const name = NAMES.get(letter) ?? "unmapped";
    pen.fillStyle = name === "unmapped" ? ink.track : name === "cover" ? ink.ground : ink[name];
    pen.fillRect(left, top + 1, wide, high);
    if (name === "unmapped") continue;
    if (ink.patterns[name]) {
      pen.fillStyle = ink.patterns[name];
      pen.fillRect(left, top + 1, wide, high);
    }
    if (cell > 4) {
      pen.fillStyle = ink.ground;
      for (let i = 1; i < length; i++) pen.fillRect(left + i * cell - 1, top + 1, 1, high);
    }
    if (recycled) {
      pen.fillStyle = ink.ink;
      pen.fillRect(left, top + high - 2, wide, 3);
    }
    if (length * cell >= 14) {
      // One letter for each run, on a plain ground.
      const middle = left + Math.min(Math.max(cell, 12), length * cell) / 2;
      pen.fillStyle = name === "cover" ? ink.ground : ink[name];
      pen.fillRect(middle - 5, top + 3, 10, high - 6);
      pen.fillStyle = name === "cover" ? ink.ink : ink.mark;
      pen.fillText(letter.toUpperCase(), middle, top + 1 + high / 2);
    }
  }
}

/** Colours of the style sheet as they are now, and patterns of states. */
function palette(pen, ratio) {
  const probe = byId("colours");
  const read = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const ink = { patterns: {} };
  for (const name of [...NAMES.values(), "track", "ink", "mark"]) ink[name] = read(name);
  ink.ground = read("panel");
  const hatch = read("hatch");
  const tile = (name, colour, draw) => {
    const size = Math.round(6 * ratio);
    const sheet = new OffscreenCanvas(size, size);
    const brush = sheet.getContext("2d");
    brush.scale(size / 6, size / 6);
    brush.fillStyle = brush.strokeStyle = colour;
    draw(brush);
    ink.patterns[name] = pen.createPattern(sheet, "repeat");
    ink.patterns[name].setTransform(new DOMMatrix().scale(1 / ratio));
  };
  tile("shared", hatch, (brush) => {
    brush.beginPath();
    for (const x of [-6, 0, 6]) {
      brush.moveTo(x, 6);
      brush.lineTo(x + 6, 0);
    }
    brush.stroke();
  });
  tile("cover", ink.cover, (brush) => [0, 3].forEach((x) => brush.fillRect(x, 0, 1, 6)));
  tile("kept", hatch, (brush) => [1, 4].forEach((y) => brush.fillRect(0, y, 6, 1)));
  tile("stale", hatch, (brush) => [[1, 1], [4, 4]].forEach(([x, y]) => brush.fillRect(x, y, 1.5, 1.5)));
  return ink;
}
