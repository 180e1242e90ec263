// Which layer lies on which device, and which ones move: from the daemon's words to what is drawn. Pure.
// Layers are numbered from 0: the embedding, the decoders, and last the head.

const MOST_EMPTY_ROWS = 12;
const COLOURS = 8;

/** Return the replicas that there are: `{number, stages, state}`; of one engine only, it is the main one. */
export function replicasOf(status) {
  const several = (status.replicas ?? []).filter((replica) => replica.stages.length > 0);
  if (several.length > 0) return several;
  return status.stages.length > 0 ? [{ number: 1, stages: status.stages, state: status.state, epoch: status.epoch }] : [];
}

/** Return how many decoders a list of stages has. */
export function decodersOf(stages) {
  return Math.max(0, ...stages.map((stage) => stage.end_decoder));
}

/** Return each layer's stage: an array of indices into `stages`, the embedding first and the head last. */
export function stageOfLayers(stages) {
  const found = [0];
  stages.forEach((stage, index) => {
    for (let decoder = stage.first_decoder; decoder < stage.end_decoder; decoder += 1) found.push(index);
  });
  return [...found, stages.length - 1];
}

/** Return what moves between two lists of stages: `{layer, from, to, stage}`, devices by their ids. */
export function movesBetween(before, after) {
  const from = stageOfLayers(before), to = stageOfLayers(after);
  return to.flatMap((stage, layer) => {
    const old = before[from[layer]]?.device_ids ?? [], next = after[stage].device_ids;
    return old.join() === next.join() ? [] : [{ layer, from: old, to: next, stage }];
  });
}

/** Return the name of a layer, long or short. */
export function layerName(layer, decoders, isShort = false) {
  if (layer === 0) return isShort ? "E" : "embedding";
  if (layer === decoders + 1) return isShort ? "H" : "head";
  return String(layer - 1);
}

/**
 * Return what to draw: `{columns, decoders, rows, cells, ghosts, flows, hidden, words}`.
 * `change` is `{stages, on, share, isPreview}`: where layers of one replica go, or null.
 */
export function drawingOf(status, topology, change) {
  const replicas = replicasOf(status);
  const decoders = Math.max(0, ...replicas.map((replica) => decodersOf(replica.stages)));
  const moves = movesOf(replicas, change);
  const { rows, hidden } = rowsOf(replicas, topology, moves);
  const at = new Map(rows.map((row, index) => [row.id, index]));
  const leaving = new Set(moves.map((move) => `${move.replica}:${move.layer}`));
  const cells = replicas.flatMap((replica) => cellsOf(replica, at, leaving));
  const ghosts = moves.flatMap((move) => ghostsOf(move, at, change));
  return { columns: replicas.length > 0 ? decoders + 2 : 0, decoders, rows, cells, ghosts, hidden, flows: flowsOf(replicas, at), words: wordsOf(replicas, moves, change) };
}

function movesOf(replicas, change) {
  if (change === null) return [];
  const replica = replicas.find((each) => each.number === change.on) ?? replicas[0];
  if (replica === undefined || decodersOf(replica.stages) !== decodersOf(change.stages)) return [];
  return movesBetween(replica.stages, change.stages).map((move) => ({ ...move, replica: replica.number }));
}

function rowsOf(replicas, topology, moves) {
  const used = new Set([...replicas.flatMap((replica) => replica.stages.flatMap((stage) => stage.device_ids)), ...moves.flatMap((move) => move.to)]);
  const known = topology?.devices ?? [];
  const strangers = [...used].filter((id) => !known.some((device) => device.id === id)).map((id) => ({ id }));
  const all = [...known, ...strangers];
  const empty = all.filter((device) => !used.has(device.id));
  const left = new Set((empty.length > MOST_EMPTY_ROWS ? empty : []).map((device) => device.id));
  const held = heldBytes(replicas);
  const rows = all.filter((device) => !left.has(device.id)).map((device) => rowOf(device, topology, held, replicas, used));
  return { rows, hidden: left.size };
}

function rowOf(device, topology, held, replicas, used) {
  const replica = replicas.find((each) => each.stages.some((stage) => stage.device_ids.includes(device.id)));
  return {
    id: device.id,
    label: topology?.labels?.[device.id] ?? device.id,
    title: [device.id, device.name, device.pci_bus_id].filter(Boolean).join("  "),
    note: noteOf(device.id, replica, replicas.length > 1),
    total: device.memory_total_bytes ?? null,
    others: device.memory_others_bytes ?? 0,
    weights: held.get(device.id)?.weights ?? 0,
    kv: held.get(device.id)?.kv ?? 0,
    busy: held.get(device.id)?.busy ?? null,
    isUsed: used.has(device.id),
  };
}

/** Which stage, and of several replicas whose: the colour alone does not say it. */
function noteOf(id, replica, areSeveral) {
  if (replica === undefined) return "";
  const stages = replica.stages.flatMap((stage, index) => (stage.device_ids.includes(id) ? [index] : []));
  return `${areSeveral ? `#${replica.number} ` : ""}stage ${stages.join(", ")}`;
}

/** A stage's bytes are of its whole group; each device of it holds its part. */
function heldBytes(replicas) {
  const held = new Map();
  for (const stage of replicas.flatMap((replica) => replica.stages)) {
    for (const id of stage.device_ids) {
      const parts = stage.device_ids.length, before = held.get(id) ?? { weights: 0, kv: 0, busy: null };
      held.set(id, { weights: before.weights + stage.weights_bytes / parts, kv: before.kv + stage.kv_mapped_bytes / parts, busy: stage.busy });
    }
  }
  return held;
}

function cellsOf(replica, at, leaving) {
  return stageOfLayers(replica.stages).flatMap((stage, layer) =>
    replica.stages[stage].device_ids.map((id, part) => ({
      key: `${replica.number}:${layer}:${part}`,
      layer,
      row: at.get(id),
      colour: stage % COLOURS,
      isLeaving: leaving.has(`${replica.number}:${layer}`),
    })).filter((cell) => cell.row !== undefined),
  );
}

function ghostsOf(move, at, change) {
  return move.to.filter((id) => at.has(id)).map((id) => ({
    key: `${move.replica}:${move.layer}:${id}`,
    layer: move.layer,
    row: at.get(id),
    from: at.get(move.from[0]),
    colour: move.stage % COLOURS,
    share: change.share,
    isPreview: change.isPreview,
  }));
}

function flowsOf(replicas, at) {
  return replicas.flatMap((replica) => {
    const stages = replica.stages.filter((stage) => stage.end_decoder > stage.first_decoder || replica.stages.length === 1);
    return stages.slice(1).map((stage, index) => ({
      layer: stage.first_decoder + 1,
      from: at.get(stages[index].device_ids[0]),
      to: at.get(stage.device_ids[0]),
    })).filter((flow) => flow.from !== undefined && flow.to !== undefined && flow.from !== flow.to);
  });
}

/** The drawing in one sentence, for those who do not see it; the table below has the rest. */
function wordsOf(replicas, moves, change) {
  if (replicas.length === 0) return "no stage: there is no engine";
  const stages = replicas.map((replica) => replica.stages.map((stage, index) => {
    const last = stage.end_decoder - 1;
    const layers = stage.end_decoder > stage.first_decoder ? `decoders ${stage.first_decoder} to ${last}` : "no decoder";
    return `stage ${index} with ${layers} on ${stage.device_ids.join(" and ")}`;
  }).join("; ")).join("; and ");
  if (moves.length === 0) return stages;
  return `${stages}. ${moves.length} layers ${change.isPreview ? "would move" : "are moving"}`;
}
