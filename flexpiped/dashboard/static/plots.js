// Which plots there are, and over which time.

import { age, latency, number } from "./format.js";
import { el } from "./dom.js";
import { Plot } from "./plot.js";

const SPANS = new Map([[120, 2], [300, 5], [900, 3]]); // seconds, and parts of the axis

export class Plots {
  #frame;
  #plots = [];
  #inputs = new Map();
  #spanS = null; // chosen by what there is, until somebody chooses
  #redraw = () => {};

  constructor(frame, choice) {
    this.#frame = frame;
    for (const span of SPANS.keys()) {
      const input = el("input", { type: "radio", name: "span", value: span });
      input.addEventListener("change", () => { this.#spanS = span; this.#redraw(); });
      choice.append(el("label", {}, input, age(span)));
      this.#inputs.set(span, input);
    }
  }

  draw(store) {
    if (this.#plots.length === 0) this.#make(store.cvWindows);
    this.#redraw = () => this.draw(store);
    this.#spanS ??= this.#fitting(store.points);
    const to = store.points.at(-1)?.time_unix_s ?? store.now();
    const marks = store.events.filter((event) => event.fields.state === "ended").map((event) => event.time_unix_s);
    for (const plot of this.#plots) plot.show({ points: store.points, from: to - this.#spanS, to, parts: SPANS.get(this.#spanS), marks });
  }

  /** Another daemon may watch the arrivals over other windows. */
  forget() {
    this.#plots = [];
    this.#frame.replaceChildren();
  }

  #fitting(points) {
    const span = points.length > 200 ? 300 : 120;
    this.#inputs.get(span).checked = true;
    return span;
  }

  #make(cvWindows) {
    this.#plots = specs(cvWindows).map((spec) => new Plot(spec));
    this.#frame.append(...this.#plots.map((plot) => plot.element));
  }
}

function specs(cvWindows) {
  return [
    {
      title: "Time to first token", write: latency, least: 0.01,
      curves: [{ name: "mean", of: (point) => point.ttft_s }, { name: "p99", of: (point) => point.ttft_p99_s }],
    },
    { title: "Time per output token", write: latency, least: 0.002, curves: [{ name: "mean", of: (point) => point.tpot_s }] },
    { title: "Tokens per second", write: number, least: 10, curves: [{ name: "generated", of: (point) => point.tokens_per_s }] },
    {
      title: "CV of the arrivals", write: (value) => value.toFixed(2), tick: number, least: 1,
      curves: cvWindows.slice(0, 3).map((window, index) => ({ name: age(window), of: (point) => point.cvs[index] ?? null })),
    },
  ];
}
