// One refactoring, from the daemon's events about it. Pure: a fold over events, newest last.

const PHASES = ["prepare", "sync", "commit", "retire"];

/** Return the handover after an event: `{number, plan, isOver, record, last, phases, beganMs}`, or the same as before. */
export function afterEvent(handover, event, nowMs) {
  const fields = event.fields;
  if (event.kind !== "refactoring" || fields.handover === undefined) return handover;
  if (fields.state === "plan") {
    return { number: fields.handover, plan: fields, isOver: false, record: null, last: null, phases: [], beganMs: nowMs };
  }
  const known = handover?.number === fields.handover ? handover : unplanned(fields.handover, nowMs);
  if (fields.state === "ended") {
    return { ...known, isOver: true, record: fields.record, last: fields.record.progress ?? known.last };
  }
  return { ...known, last: fields.progress, phases: withReport(known.phases, fields.progress) };
}

/** Return the handover that a record of the status tells of, where no event is left of it. */
export function ofRecord(record) {
  return { ...unplanned(record.number, 0), isOver: true, record, last: record.progress };
}

/** Return the phases in order: `{name, is, took, share, text}`; `is` is waiting, now, done or bad. */
export function phasesOf(handover, write) {
  const last = handover.last;
  const failed = handover.record !== null && handover.record.result !== "done";
  const isDone = handover.record?.result === "done" || last?.phase === "done";
  const reached = isDone ? PHASES.length : PHASES.indexOf(last?.phase ?? "prepare");
  const rows = PHASES.map((name, index) => {
    const isReached = reached === -1 ? handover.phases.some((phase) => phase.name === name) : index <= reached;
    const is = failed && index >= Math.max(reached, 0) ? "waiting" : index < reached ? "done" : index === reached ? "now" : "waiting";
    return {
      name,
      is,
      took: is === "done" ? tookOf(handover, name) : null,
      share: shareOf(name, is, last),
      text: isReached && last !== null ? write(name, last, is) : "",
    };
  });
  if (last?.phase === "roll back" || failed) {
    rows.push({ name: "roll back", is: "bad", took: null, share: 1, text: handover.record?.message ?? last.message });
  }
  return rows;
}

/** How far the layers that move are, from 0 to 1: most of it is weights and KV cache on their way. */
export function shareMoved(handover) {
  const last = handover.last;
  if (handover.isOver) return 1;
  if (last === null) return 0;
  if (last.phase === "prepare") return 0.7 * (last.weights_total_bytes ? last.weights_bytes / last.weights_total_bytes : 0);
  return { sync: 0.85, commit: 1, retire: 1, done: 1 }[last.phase] ?? 0;
}

function unplanned(number, nowMs) {
  return { number, plan: null, isOver: false, record: null, last: null, phases: [], beganMs: nowMs };
}

function withReport(phases, progress) {
  const newest = phases.at(-1);
  if (newest?.name === progress.phase) return phases;
  const before = newest === undefined ? [] : [...phases.slice(0, -1), { ...newest, ended: progress.elapsed_s }];
  return [...before, { name: progress.phase, began: progress.elapsed_s, ended: null }];
}

function tookOf(handover, name) {
  const index = handover.phases.findIndex((phase) => phase.name === name);
  const phase = handover.phases[index];
  if (phase === undefined || phase.ended === null) return null;
  return phase.ended - (index === 0 ? 0 : phase.began);
}

function shareOf(name, is, last) {
  if (is === "done") return 1;
  if (is !== "now" || last === null) return 0;
  if (name === "prepare" && last.weights_total_bytes) return last.weights_bytes / last.weights_total_bytes;
  return 0.5;
}
