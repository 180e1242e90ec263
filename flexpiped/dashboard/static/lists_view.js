// What was decided, with the reasons, and what happened: newest first.

import { age, arrows, clock, number } from "./format.js";
import { el, fill } from "./dom.js";

const SHOWN = 80;
const VERB_TAGS = { change: "tag warn", undo: "tag warn", add: "tag good", remove: "tag warn" };

export function drawDecisions(list, store) {
  const mode = store.status?.auto?.mode ?? "off";
  if (store.decisions.length === 0) {
    const text = mode === "off" ? "Automatic control is off, so nothing is decided. flexctl auto on begins." : "No decision yet.";
    return void fill(list, el("li", { class: "empty" }, text));
  }
  const open = openOnes(list);
  fill(list, alike(store.decisions).reverse().slice(0, SHOWN).map((group) => decision(group, store.now(), open)));
}

export function drawEvents(list, store) {
  if (store.events.length === 0) return void fill(list, el("li", { class: "empty" }, "Nothing yet."));
  fill(list, store.events.toReversed().slice(0, SHOWN).map(happened));
}

/** Decisions one after the other for the same reason, but for its numbers, are one line: there is one every few seconds. */
export function alike(decisions) {
  const groups = [];
  for (const each of decisions) {
    const last = groups.at(-1);
    if (last !== undefined && reasonOf(last.newest) === reasonOf(each)) groups[groups.length - 1] = { ...last, newest: each, count: last.count + 1 };
    else groups.push({ newest: each, first: each.sequence, count: 1 });
  }
  return groups;
}

function reasonOf(each) {
  return each.message.replace(/\d+(\.\d+)?/g, "#");
}

function decision({ newest, first, count }, now, open) {
  const { verb, mode, numbers } = newest.fields;
  const times = count > 1 ? `${count} times, last ${age(now - newest.time_unix_s)} ago` : clock(newest.time_unix_s);
  const names = Object.entries(numbers ?? {});
  return el("li", {},
    el("p", { class: "meta" }, el("span", { class: VERB_TAGS[verb] ?? "tag" }, verb), el("span", {}, times), mode === "dry-run" ? el("span", {}, "dry run") : null),
    el("p", {}, arrows(newest.message.replace(`${verb}: `, ""))),
    names.length > 0 ? el("details", { "data-number": first, open: open.has(String(first)) }, el("summary", {}, "numbers"),
      el("dl", { class: "numbers" }, names.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, typeof value === "number" ? number(value) : String(value))]))) : null,
  );
}

function happened(event) {
  const result = event.fields.record?.result;
  const tag = result === "done" ? "tag good" : result ? "tag bad" : "tag";
  const subject = event.fields.handover === undefined ? event.kind : `handover #${event.fields.handover}`;
  return el("li", {},
    el("p", { class: "meta" }, el("span", { class: tag }, subject), event.fields.model ? el("span", {}, event.fields.model) : null, el("time", {}, clock(event.time_unix_s))),
    el("p", {}, arrows(event.message)),
  );
}

function openOnes(list) {
  return new Set([...list.querySelectorAll("details[open]")].map((each) => each.dataset.number));
}
