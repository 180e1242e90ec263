// Draws the layout: a row for each device, a column for each layer, so that a pipeline is a flight of stairs.
// A layer that moves is drawn where it is, and as an outline where it goes; then it slides there.

import { bytes, percent } from "./format.js";
import { el, fill, say, set, svg } from "./dom.js";
import { layerName } from "./layers.js";

const ROW = 34, CELL = 24, HEAD = 22, GAP = 2;

export class LayoutView {
  #frame;
  #root = svg("svg", { role: "img" });
  #lanes = svg("g");
  #flows = svg("g");
  #paths = svg("g");
  #ghosts = svg("g");
  #cells = svg("g");
  #known = new Map();
  #drawing = null;
  #empty = el("p", { class: "empty" });

  constructor(frame) {
    this.#frame = frame;
    this.#root.append(this.#lanes, this.#flows, this.#paths, this.#ghosts, this.#cells);
    new ResizeObserver(() => this.#drawing && this.draw(this.#drawing, true)).observe(frame);
  }

  /** `isStill`: nothing slides, since it is only the window that is another one. */
  draw(drawing, isStill = false) {
    this.#drawing = drawing;
    set(this.#root, { class: isStill ? "still" : null });
    if (drawing.rows.length === 0) {
      this.#known.clear();
      fill(this.#cells);
      fill(this.#frame, say(this.#empty, drawing.words));
      return;
    }
    if (this.#root.parentNode !== this.#frame) fill(this.#frame, this.#root);
    const place = placeOf(this.#frame.clientWidth, drawing);
    const height = HEAD + drawing.rows.length * ROW + (drawing.hidden ? 22 : 0);
    set(this.#root, { viewBox: `0 0 ${place.width} ${height}`, height, "aria-label": drawing.words });
    fill(this.#lanes, heads(drawing, place), drawing.rows.map((row, index) => lane(row, index, place)), more(drawing, height));
    fill(this.#flows, drawing.flows.map((flow) => flowPath(flow, place)));
    fill(this.#paths, drawing.ghosts.filter((ghost) => ghost.from !== undefined).map((ghost) => movePath(ghost, place)));
    fill(this.#ghosts, drawing.ghosts.map((ghost) => outline(ghost, drawing, place)));
    this.#drawCells(drawing, place);
  }

  /** Cells stay the same elements, so that one whose row is another one slides there. */
  #drawCells(drawing, place) {
    const left = new Set(this.#known.keys());
    for (const cell of drawing.cells) {
      left.delete(cell.key);
      const shape = this.#known.get(cell.key) ?? this.#make(cell.key);
      set(shape.group, { class: cell.isLeaving ? "layer leaving" : "layer" });
      shape.group.style.transform = `translate(${place.x(cell.layer)}px, ${place.y(cell.row)}px)`;
      set(shape.rect, { class: `of-${cell.colour}`, width: place.cell, height: CELL, rx: Math.min(4, place.cell / 3) });
      set(shape.text, { x: place.cell / 2, y: CELL / 2 + 4 });
      say(shape.text, place.cell >= 15 ? shortName(cell.layer, drawing, place) : "");
      say(shape.title, `${layerName(cell.layer, drawing.decoders)} on ${drawing.rows[cell.row].label}`);
    }
    for (const key of left) {
      this.#known.get(key).group.remove();
      this.#known.delete(key);
    }
  }

  #make(key) {
    const shape = { rect: svg("rect"), text: svg("text"), title: svg("title") };
    shape.group = svg("g", {}, shape.title, shape.rect, shape.text);
    this.#cells.append(shape.group);
    this.#known.set(key, shape);
    return shape;
  }
}

function placeOf(width, drawing) {
  const longest = Math.max(...drawing.rows.map((row) => Math.max(row.label.length, row.note.length)));
  const left = Math.min(Math.max(longest * 7.2 + 12, 44), width * 0.3);
  const right = width >= 620 ? 192 : 0;
  const step = Math.max(2, (width - left - right) / Math.max(1, drawing.columns));
  return {
    width, left, right, step,
    end: left + step * drawing.columns,
    cell: Math.max(1, step - (step > 8 ? GAP : 0.5)),
    x: (layer) => left + layer * step,
    y: (row) => HEAD + row * ROW + (ROW - CELL) / 2,
    middle: (row) => HEAD + row * ROW + ROW / 2,
  };
}

function heads(drawing, place) {
  if (drawing.columns === 0) return [];
  const every = Math.max(1, Math.ceil(22 / place.step));
  const decoders = Array.from({ length: drawing.decoders }, (_, index) => index).filter((index) => index % every === 0);
  const numbers = decoders.map((index) => svg("text", { x: place.x(index + 1) + place.cell / 2, y: 13, "text-anchor": "middle" }, String(index)));
  const right = place.right ? [svg("text", { x: place.end + 14, y: 13 }, "memory"), svg("text", { x: place.end + 152, y: 13 }, "busy")] : [];
  return [...numbers, ...right];
}

function lane(row, index, place) {
  const middle = place.middle(index);
  const width = Math.max(0, place.end - place.left - GAP);
  return svg("g", {},
    svg("title", {}, row.title),
    svg("text", { x: 0, y: row.note ? middle - 2 : middle + 4, class: row.isUsed ? "strong" : "" }, row.label),
    row.note ? svg("text", { x: 0, y: middle + 12 }, row.note) : null,
    svg("rect", { class: row.isUsed ? "lane" : "lane none", x: place.left, y: place.y(index), width, height: CELL, rx: 4 }),
    place.right ? memory(row, middle, place) : null,
  );
}

function memory(row, middle, place) {
  const x = place.end + 14, width = 104;
  if (!row.total) return svg("text", { x, y: middle + 4 }, "memory not known");
  const held = row.weights + row.kv + row.others;
  const parts = [["bar-others", row.others], ["bar-weights", row.weights], ["bar-kv", row.kv]];
  let from = x;
  const bars = parts.filter(([, size]) => size > 0).map(([name, size]) => {
    const wide = Math.min(Math.max(1.5, (size / row.total) * width), x + width - from);
    const bar = svg("rect", { class: name, x: from, y: middle + 5, width: Math.max(0, wide), height: 5 });
    from += wide;
    return bar;
  });
  const said = `${bytes(row.weights)} weights, ${bytes(row.kv)} KV${row.others ? `, ${bytes(row.others)} of others` : ""}, of ${bytes(row.total)}`;
  return svg("g", {},
    svg("title", {}, said),
    svg("text", { x, y: middle }, `${held > 0 ? `${bytes(held)} of ` : ""}${bytes(row.total)}`),
    svg("rect", { class: "bar", x, y: middle + 5, width, height: 5, rx: 2.5 }),
    bars,
    svg("text", { x: x + 138, y: middle + 4 }, row.busy === null ? "" : percent(row.busy)),
  );
}

function more(drawing, height) {
  if (!drawing.hidden) return null;
  return svg("text", { x: 0, y: height - 6 }, `and ${drawing.hidden} devices without a stage`);
}

/** From the end of one stage down or up to the beginning of the next. */
function flowPath(flow, place) {
  const x = place.x(flow.layer) - GAP / 2;
  const down = flow.to > flow.from;
  const from = place.y(flow.from) + (down ? CELL : 0), to = place.y(flow.to) + (down ? 0 : CELL);
  const tip = down ? to - 1 : to + 1, base = down ? tip - 5 : tip + 5;
  return svg("g", {},
    svg("path", { class: "flow", d: `M${x} ${from} V${base}` }),
    svg("path", { class: "flow-head", d: `M${x - 3.5} ${base} H${x + 3.5} L${x} ${tip} Z` }),
  );
}

function movePath(ghost, place) {
  const x = place.x(ghost.layer) + place.cell / 2;
  const down = ghost.row > ghost.from;
  const from = place.y(ghost.from) + (down ? CELL : 0), to = place.y(ghost.row) + (down ? 0 : CELL);
  return svg("path", { class: ghost.isPreview ? "path" : "path moving", d: `M${x} ${from} V${to}` });
}

function outline(ghost, drawing, place) {
  const at = { x: place.x(ghost.layer), y: place.y(ghost.row), height: CELL, rx: Math.min(4, place.cell / 3) };
  const text = svg("text", { x: at.x + place.cell / 2, y: at.y + CELL / 2 + 4 }, place.cell >= 15 ? shortName(ghost.layer, drawing, place) : "");
  return svg("g", { class: "ghost" },
    svg("rect", { class: `filled of-${ghost.colour}`, ...at, width: Math.max(0, place.cell * ghost.share) }),
    svg("rect", { class: `outline ring-${ghost.colour}`, ...at, width: place.cell }),
    text,
  );
}

function shortName(layer, drawing, place) {
  return layerName(layer, drawing.decoders, place.cell < 74);
}
