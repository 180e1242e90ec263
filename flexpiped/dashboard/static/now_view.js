// The head of the page and the tiles: the answer first, as the first lines of `flexctl status`.

import { age, latency, number, percent, plural } from "./format.js";
import { byId, el, fill, say, set } from "./dom.js";
import { kvText } from "./stage_table.js";
import { replicasOf } from "./layers.js";

export function drawHead(status) {
  say(byId("model"), status.model.name);
  const replicas = replicasOf(status);
  const layout = replicas.length > 1 ? plural(replicas.length, "replica") : status.stages.length > 0 ? plural(status.stages.length, "stage") : null;
  const facts = [
    status.engine,
    layout,
    status.epoch === null ? null : `epoch ${status.epoch}`,
    status.auto ? `auto ${status.auto.mode}` : null,
    `up ${age(status.uptime_s)}`,
  ].filter(Boolean);
  fill(byId("facts"), facts.map((fact) => el("span", {}, fact)));
  say(set(byId("state"), { "data-state": status.state }), status.state);
  const foot = [`flexpiped ${status.version}`, `model ${status.model.path}`, `API ${status.api_url}`];
  fill(byId("foot"), foot.map((fact) => el("span", {}, fact)));
  document.title = `${status.model.name}: ${status.state} - flexpiped`;
}

export function drawTiles(status, point) {
  const counters = status.engine_counters;
  const tiles = [
    tile("Tokens per second", status.tokens_per_s === null ? null : number(status.tokens_per_s), "", "not measured yet"),
    tile("Running", counters && number(counters.running), counters && `${number(counters.waiting)} waiting`, "no engine"),
    tile("Arrivals", rateText(point), "requests/s", reason(point?.requests_per_s)),
    percentiles("TTFT", status.ttft),
    percentiles("TPOT", status.tpot),
    tile("KV blocks", counters && percent(counters.kv_blocks_used / Math.max(1, counters.kv_blocks_capacity)), counters && kvText(counters), "no engine"),
    counters?.prefix_queried_tokens_total ? prefixes(counters) : null,
  ];
  fill(byId("tiles"), tiles);
}

/** How much of the prompts was in the KV cache, where an engine tells it. */
function prefixes(counters) {
  const [hit, queried] = [counters.prefix_hit_tokens_total, counters.prefix_queried_tokens_total];
  return tile("Prefix cache hits", percent(hit / queried), `${number(hit)} of ${number(queried)} tokens`);
}

function percentiles(name, values) {
  return tile(`${name} p50`, values && latency(values.p50_s), values && `p99 ${latency(values.p99_s)}`, "no request yet");
}

function rateText(point) {
  return typeof point?.requests_per_s === "number" ? number(point.requests_per_s) : null;
}

function reason(value) {
  return typeof value === "string" ? value : "not measured yet";
}

/** A value that is missing says why. */
function tile(name, value, more, absence) {
  if (value === null || value === undefined) return el("div", {}, el("dt", {}, name), el("dd", { class: "missing" }, absence));
  return el("div", {}, el("dt", {}, name), el("dd", {}, value), more ? el("dd", { class: "more" }, more) : null);
}
