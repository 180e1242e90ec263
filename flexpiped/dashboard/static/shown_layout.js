// Which layout is drawn: that of now; during a handover the one before it, with what is on its way; or a preview. Pure.

import { shareMoved } from "./handover.js";
import { replicasOf } from "./layers.js";

/** Return the status whose stages are drawn, and the change drawn over it (or null), for `drawingOf`. */
export function shownLayout(store, preview) {
  const { status, handover } = store;
  if (store.isMoving) {
    const on = replicaOf(status, handover.plan.on);
    const change = { stages: handover.plan.target, on, share: shareMoved(handover), isPreview: false };
    return { status: withStages(status, on, handover.plan.current), change };
  }
  if (preview !== null) {
    return { status, change: { stages: preview.target, on: replicaOf(status, preview.on), share: 0, isPreview: true } };
  }
  return { status, change: null };
}

/** The replica that is meant: by its number, else the main one, whose stages the status has by themselves. */
function replicaOf(status, on) {
  if (on !== null && on !== undefined) return on;
  const main = replicasOf(status).find((replica) => sameCut(replica.stages, status.stages));
  return main?.number ?? 1;
}

/** The status with other stages for a replica; what is known of a device's memory stays with the device. */
function withStages(status, on, stages) {
  const held = new Map();
  const replicas = replicasOf(status);
  for (const stage of replicas.flatMap((replica) => replica.stages)) held.set(stage.device_ids.join(), stage);
  const shown = stages.map((stage, index) => ({
    weights_bytes: 0, kv_mapped_bytes: 0, busy: null, workers: [], runs: "",
    ...held.get(stage.device_ids.join()), ...stage, index,
  }));
  if (replicas.length === 0) return { ...status, stages: shown, replicas: [] };
  return { ...status, replicas: replicas.map((replica) => (replica.number === on ? { ...replica, stages: shown } : replica)) };
}

function sameCut(some, others) {
  const cut = (stages) => stages.map((stage) => `${stage.device_ids.join()}:${stage.end_decoder}`).join(" ");
  return cut(some) === cut(others);
}
