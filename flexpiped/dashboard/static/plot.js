// One plot over time. Hovering, or the arrow keys when it has the focus, reads it at a time before now.

import { age, clock } from "./format.js";
import { el, fill, set, svg } from "./dom.js";
import { linear, nearest, runsOf, ticksTo } from "./scale.js";

const HEIGHT = 150, TOP = 8, BOTTOM = 20, LEFT = 52, RIGHT = 6;

/** `spec`: `{title, write, tick, curves: [{name, of}], least}`; `write`, and `tick` on the axis, turn a value into text. */
export class Plot {
  #spec;
  #now = el("p", { class: "said-now" });
  #root = svg("svg", { role: "img", tabindex: "0", height: HEIGHT });
  #scene = null;
  #cursor = null; // unix seconds of what is read; null: now
  element;

  constructor(spec) {
    this.#spec = spec;
    this.element = el("figure", { class: "plot" }, el("figcaption", {}, el("h3", {}, spec.title), this.#now), this.#root);
    this.#root.addEventListener("pointermove", (event) => this.#readAt(this.#timeAt(event)));
    this.#root.addEventListener("pointerleave", () => this.#readAt(null));
    this.#root.addEventListener("blur", () => this.#readAt(null));
    this.#root.addEventListener("keydown", (event) => this.#onKey(event));
    new ResizeObserver(() => this.#draw()).observe(this.#root);
  }

  /** Show `{points, from, to, parts, marks}`: times in unix seconds, the axis in `parts`, `marks` of handovers. */
  show(scene) {
    this.#scene = scene;
    this.#draw();
  }

  #draw() {
    const scene = this.#scene, width = this.#root.clientWidth;
    if (scene === null || width === 0) return;
    const shown = scene.points.filter((point) => point.time_unix_s >= scene.from);
    const values = shown.flatMap((point) => this.#spec.curves.map((curve) => curve.of(point))).filter((value) => typeof value === "number");
    const ticks = ticksTo(Math.max(this.#spec.least, ...values), 3);
    const x = linear(scene.from, scene.to, LEFT, width - RIGHT), y = linear(0, ticks.at(-1), HEIGHT - BOTTOM, TOP);
    set(this.#root, { viewBox: `0 0 ${width} ${HEIGHT}`, "aria-label": `${this.#spec.title}: ${this.#words(shown.at(-1))}` });
    fill(this.#root,
      ticks.map((tick) => this.#tick(tick, y(tick), width)),
      this.#timeTicks(scene, x, width),
      scene.marks.filter((time) => time >= scene.from).map((time) => mark(x(time))),
      values.length === 0 ? svg("text", { x: (LEFT + width) / 2, y: HEIGHT / 2, "text-anchor": "middle" }, this.#absence(shown)) : null,
      this.#spec.curves.flatMap((curve, index) => curveParts(shown, curve.of, index, x, y)),
      this.#cursorLine(shown, x),
    );
    this.#saySide(shown);
  }

  #tick(tick, y, width) {
    return svg("g", {},
      svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y, y2: y }),
      svg("text", { x: LEFT - 8, y: y + 4, "text-anchor": "end" }, tick === 0 ? "0" : (this.#spec.tick ?? this.#spec.write)(tick)),
    );
  }

  #timeTicks(scene, x, width) {
    const span = scene.to - scene.from;
    const parts = width > 300 ? scene.parts : 1;
    const places = Array.from({ length: parts + 1 }, (_, index) => 1 - index / parts);
    return places.map((each) => Math.max(0, each)).map((share) => svg("text", {
      x: x(scene.to - span * share), y: HEIGHT - 4, "text-anchor": share === 1 ? "start" : share === 0 ? "end" : "middle",
    }, share === 0 ? "now" : share === 1 ? `${age(span)} ago` : age(span * share)));
  }

  #cursorLine(shown, x) {
    const point = this.#cursor === null ? undefined : nearest(shown, this.#cursor);
    if (point === undefined) return null;
    const at = x(point.time_unix_s);
    return svg("line", { class: "cursor", x1: at, x2: at, y1: TOP, y2: HEIGHT - BOTTOM });
  }

  #saySide(shown) {
    const point = this.#cursor === null ? shown.at(-1) : nearest(shown, this.#cursor);
    const when = this.#cursor === null || point === undefined ? [] : [el("span", {}, clock(point.time_unix_s))];
    const parts = this.#spec.curves.map((curve, index) => {
      const value = point === undefined ? null : curve.of(point);
      const text = typeof value === "number" ? this.#spec.write(value) : "-";
      return el("span", { title: typeof value === "string" ? value : null },
        el("span", { class: `stroke-key key-${index}`, "aria-hidden": "true" }), `${curve.name} `, el("b", {}, text));
    });
    fill(this.#now, when, parts);
  }

  #words(point) {
    if (point === undefined) return "nothing yet";
    return this.#spec.curves.map((curve) => {
      const value = curve.of(point);
      return `${curve.name} ${typeof value === "number" ? this.#spec.write(value) : (value ?? "not known")}`;
    }).join(", ");
  }

  #absence(shown) {
    const value = shown.length === 0 ? null : this.#spec.curves[0].of(shown.at(-1));
    return typeof value === "string" ? value : "not measured yet";
  }

  #timeAt(event) {
    const box = this.#root.getBoundingClientRect(), scene = this.#scene;
    if (scene === null) return null;
    return linear(LEFT, box.width - RIGHT, scene.from, scene.to)(event.clientX - box.left);
  }

  #onKey(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined || this.#scene === null) return;
    event.preventDefault();
    const { points, from, to } = this.#scene;
    const shown = points.filter((point) => point.time_unix_s >= from);
    const at = shown.indexOf(nearest(shown, this.#cursor ?? to));
    const next = shown[Math.min(Math.max(at + step, 0), shown.length - 1)];
    this.#readAt(next?.time_unix_s ?? null);
  }

  #readAt(time) {
    this.#cursor = time;
    this.#draw();
  }
}

function curveParts(points, of, index, x, y) {
  return runsOf(points, of).map((run) => {
    if (run.length === 1) return svg("circle", { class: `lone-${index}`, cx: x(run[0].time_unix_s), cy: y(of(run[0])), r: 2 });
    const path = run.map((point, place) => `${place === 0 ? "M" : "L"}${x(point.time_unix_s).toFixed(1)} ${y(of(point)).toFixed(1)}`);
    return svg("path", { class: `curve curve-${index}`, d: path.join("") });
  });
}

function mark(x) {
  return svg("g", {},
    svg("title", {}, "a handover ended"),
    svg("line", { class: "mark", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }),
    svg("path", { class: "mark-head", d: `M${x - 4} ${TOP - 6} H${x + 4} L${x} ${TOP} Z` }),
  );
}
