// What joins the devices, as the matrix of `flexctl topology`.

import { rate } from "./format.js";
import { el, fill } from "./dom.js";

export function drawLinks(frame, topology) {
  const { devices, pairs, labels } = topology;
  if (devices.length < 2) return void fill(frame, el("p", { class: "note" }, "There is one device."));
  if (pairs.length === 0) return void fill(frame, el("p", { class: "note" }, "Too many devices for a table: flexctl topology has them."));
  const found = new Map(pairs.flatMap((pair) => [[`${pair.a} ${pair.b}`, pair], [`${pair.b} ${pair.a}`, pair]]));
  const name = (device) => labels[device.id] ?? device.id;
  const head = el("tr", {}, el("td"), devices.map((device) => el("th", { scope: "col" }, name(device))));
  const rows = devices.map((row) => el("tr", {},
    el("th", { scope: "row" }, name(row)),
    devices.map((column) => el("td", {}, cell(found.get(`${row.id} ${column.id}`)))),
  ));
  const measured = pairs.some((pair) => pair.is_measured);
  const note = measured ? "Measured where it has a star." : "Not measured on this host: flexctl topology --measure does.";
  fill(frame, el("table", {}, el("caption", { class: "hidden" }, "Links between devices"), el("thead", {}, head), el("tbody", {}, rows)),
    el("p", { class: "note" }, [note, topology.problem, topology.driver].filter(Boolean).join(" ")));
}

function cell(pair) {
  return pair === undefined ? "-" : `${pair.name} ${rate(pair.bandwidth_bytes_per_s)}${pair.is_measured ? "*" : ""}`;
}
