// The stages in numbers: what `flexctl status` prints, with what joins each stage to the next.

import { bytes, layersText, number, percent, rate, shortDevice } from "./format.js";
import { el, fill } from "./dom.js";
import { replicasOf } from "./layers.js";

export function drawStages(frame, status, topology) {
  const replicas = replicasOf(status);
  if (replicas.length === 0) return void fill(frame);
  const several = replicas.length > 1;
  const heads = [several ? "replica" : null, "stage", "device", "layers", "weights", "KV mapped", "PSS", "busy", "to the next stage"];
  const isNumber = (name) => ["weights", "KV mapped", "PSS", "busy"].includes(name);
  const head = heads.filter(Boolean).map((name) => el("th", { scope: "col", class: isNumber(name) ? "number" : null }, name));
  const rows = replicas.flatMap((replica) => replica.stages.map((stage, index) => row(replica, stage, index, topology, several)));
  const left = frame.scrollLeft;
  fill(frame, el("table", {}, el("caption", { class: "hidden" }, "Stages in numbers"), el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows)));
  frame.scrollLeft = left;
}

/** KV blocks are global over the stages of a replica. */
export function kvText(counters) {
  return `${number(counters.kv_blocks_used)} / ${number(counters.kv_blocks_capacity)}`;
}

function row(replica, stage, index, topology, several) {
  const last = replica.stages.length - 1;
  const busy = stage.busy === null ? "-" : percent(stage.busy);
  return el("tr", {},
    several ? el("td", {}, String(replica.number)) : null,
    el("th", { scope: "row" }, el("span", { class: `swatch on-${index % 8}` }), String(stage.index)),
    el("td", {}, stage.device_ids.map((id) => shortDevice(id, topology?.labels)).join(" + ")),
    el("td", {}, layersText(stage, index === 0, index === last) + (stage.runs ? ` (${stage.runs})` : "")),
    el("td", { class: "number" }, bytes(stage.weights_bytes)),
    el("td", { class: "number" }, bytes(stage.kv_mapped_bytes)),
    el("td", { class: "number" }, memoryOf(stage.workers)),
    el("td", { class: "number" }, busy),
    el("td", {}, index === last ? "" : linkText(stage, replica.stages[index + 1], topology)),
  );
}

function memoryOf(workers) {
  const known = workers.map((worker) => worker.pss_bytes).filter((size) => size !== null);
  return known.length > 0 ? bytes(known.reduce((sum, size) => sum + size, 0)) : "-";
}

function linkText(stage, next, topology) {
  const a = stage.device_ids.at(-1), b = next.device_ids[0];
  if (a === b) return "same device";
  const pair = topology?.pairs.find((each) => (each.a === a && each.b === b) || (each.a === b && each.b === a));
  if (pair === undefined) return "-";
  return `${pair.name} ${rate(pair.bandwidth_bytes_per_s)}${pair.is_measured ? "" : " (not measured)"}`;
}
