// The handover under way, or the last one: its phases with what each moved and took, as `flexctl rebalance --wait` tells.

import { age, arrows, bytes, duration, plural } from "./format.js";
import { el, fill } from "./dom.js";
import { phasesOf } from "./handover.js";

/** `onCancel` is called when it should be rolled back; null: this reader may not. */
export function drawHandover(frame, handover, { nowUnix, onCancel }) {
  if (handover === null) return void fill(frame, el("p", { class: "empty" }, "No layout has changed since the daemon started."));
  const byPhase = handover.plan?.way !== "scale" && handover.record?.way !== "scale";
  fill(frame,
    el("p", {}, el("strong", {}, headline(handover)), " ", stateTag(handover)),
    el("p", { class: "note" }, ending(handover, nowUnix)),
    byPhase ? el("ol", { class: "phases" }, phasesOf(handover, writer(handover)).map(phaseRow)) : null,
    handover.plan?.moves.length ? moves(handover.plan.moves, frame.querySelector("details")?.open) : null,
    !handover.isOver && onCancel !== null ? cancelButton(onCancel, frame) : null,
  );
}

function headline(handover) {
  return arrows(`#${handover.number}  ${handover.plan?.what ?? handover.record?.what ?? ""}`);
}

function stateTag(handover) {
  if (!handover.isOver) return el("span", { class: "tag warn" }, "under way");
  const result = handover.record.result;
  return el("span", { class: result === "done" ? "tag good" : "tag bad" }, result);
}

function ending(handover, nowUnix) {
  const record = handover.record;
  if (record === null) return handover.last?.message ?? "starting";
  const when = `${age(nowUnix - record.finished_unix_s)} ago`;
  if (record.result !== "done") return `${record.message}; ${when}`;
  const took = `${plural(record.layers_moved, "layer")} in ${duration(record.duration_s)}`;
  const live = record.progress === null ? [] : [`${plural(record.progress.requests_live, "request")} went on`];
  return [record.way === "scale" ? record.message : took, ...live, when].join(", ");
}

function writer(handover) {
  const byReplica = (handover.plan?.way ?? handover.record?.way) === "replica";
  return (name, last, is) => (byReplica ? (is === "now" ? last.message : "") : inPlace(name, last, is));
}

function inPlace(name, last, is) {
  switch (name) {
    case "prepare":
      if (!last.weights_total_bytes && !last.weights_bytes) return "no weights to load";
      return is === "now" ? `${bytes(last.weights_bytes)} of ${bytes(last.weights_total_bytes)}` : bytes(last.weights_bytes);
    case "sync":
      return last.kv_round_bytes.length > 0
        ? last.kv_round_bytes.map((size, index) => `round ${index + 1}: ${bytes(size)}`).join(", ")
        : is === "now" ? "" : "nothing to copy";
    case "commit":
      if (last.commit_pause_s === null) return is === "now" ? "under way" : "pause not reported";
      return `pause ${duration(last.commit_pause_s)}${last.drain_s === null ? "" : ` (drain ${duration(last.drain_s)})`}`;
    case "retire":
      return `${bytes(last.returned_bytes)} returned`;
    default:
      return "";
  }
}

function phaseRow(phase) {
  const filled = el("span");
  filled.style.width = `${Math.round(phase.share * 100)}%`;
  return el("li", { "data-is": phase.is, "aria-current": phase.is === "now" ? "step" : null },
    el("span", { class: "name" }, phase.name),
    el("span", {}, phase.text),
    el("span", { class: "took" }, phase.took === null ? "" : duration(phase.took)),
    el("span", { class: "track", "aria-hidden": "true" }, filled),
  );
}

function moves(sentences, isOpen) {
  return el("details", { open: isOpen === true }, el("summary", {}, plural(sentences.length, "move")),
    el("ul", { class: "facts-list" }, sentences.map((move) => el("li", {}, arrows(move)))));
}

function cancelButton(onCancel, frame) {
  const old = frame.querySelector("#roll-back");
  const button = old ?? el("button", { type: "button", id: "roll-back" }, "Roll back");
  if (old === null) button.addEventListener("click", onCancel);
  return el("div", { class: "buttons" }, button);
}
