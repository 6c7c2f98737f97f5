// Small moving charts of the last two minutes: an SVG line, the figure of now as text.

import { make, say } from "./words.js";

const SPAN_S = 120;
const WIDTH = 240;
const HEIGHT = 40;
const SVG = "http://www.w3.org/2000/svg";

export class Chart {
  /** title: of the figure; format: a value in words; second: the name of a dashed line, if any. */
  constructor(parent, title, format, second = "") {
    this.title = title;
    this.format = format;
    this.second = second;
    this.points = []; // [seconds, first, second]
    this.now = make("p", { class: "now" });
    this.also = make("p", { class: "also" });
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("role", "img");
    this.lines = (second ? ["second", "first"] : ["first"]).map((name) => {
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", name);
      this.svg.append(path);
      return path;
    });
    parent.append(
      make("figure", {}, make("figcaption", {}, title), this.now, this.also, this.svg),
    );
  }

  /** A break in time: figures before it and after it are not joined. */
  gap() {
    if (this.points.length && this.points.at(-1)[1] !== null) {
      this.points.push([this.points.at(-1)[0], null, null]);
    }
  }

  /** Values of a moment; null for none. */
  add(at, first, second = null) {
    this.points.push([at, first, second]);
    while (this.points[0][0] < at - SPAN_S) this.points.shift();
    this.draw(at);
  }

  draw(at) {
    let top = 0;
    for (const [, first, second] of this.points) top = Math.max(top, first ?? 0, second ?? 0);
    const [, first, second] = this.points.at(-1);
    say(this.now, first === null ? "–" : this.format(first));
    const peak = `peak ${this.format(top)}`;
    const beside = this.second ? `┄ ${this.second} ${second === null ? "–" : this.format(second)}` : "";
    say(this.also, beside || peak);
    this.svg.setAttribute(
      "aria-label",
      `${this.title}: now ${this.now.textContent}, ${peak} in the last two minutes`,
    );
    const columns = this.second ? [2, 1] : [1];
    columns.forEach((column, i) => this.lines[i].setAttribute("d", this.path(column, at, top || 1)));
  }

  path(column, at, top) {
    let pen = "M";
    let text = "";
    for (const point of this.points) {
      if (point[column] === null) {
        pen = "M";
        continue;
      }
      const x = WIDTH * (1 - (at - point[0]) / SPAN_S);
      const y = HEIGHT - 1 - (HEIGHT - 3) * (point[column] / top);
      text += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
      pen = "L";
    }
    return text;
  }
}
