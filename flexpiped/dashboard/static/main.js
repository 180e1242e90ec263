// Puts the page together: messages in, drawings out. Drawn at most once a frame, whatever comes.

import { ChangeView } from "./change_view.js";
import { ask, follow } from "./daemon.js";
import { byId, say, set } from "./dom.js";
import { arrows } from "./format.js";
import { drawHandover } from "./handover_view.js";
import { askForKey, key, prepareKeys } from "./key_dialog.js";
import { drawingOf } from "./layers.js";
import { LayoutView } from "./layout_view.js";
import { drawLinks } from "./links_view.js";
import { drawDecisions, drawEvents } from "./lists_view.js";
import { ModelChoice } from "./model_choice.js";
import { drawHead, drawTiles } from "./now_view.js";
import { Plots } from "./plots.js";
import { shownLayout } from "./shown_layout.js";
import { drawStages } from "./stage_table.js";
import { Store } from "./store.js";
import { prepareTheme } from "./theme.js";

const store = new Store();
const layout = new LayoutView(byId("layout-drawing"));
const plots = new Plots(byId("plots"), byId("span"));
let preview = null;
const choice = new ModelChoice(byId("models"), start);
const change = new ChangeView(byId("change"), byId("preview"), (path, body) => ask(path, body, key, choice.of(store.status)), (proposal) => {
  preview = proposal;
  schedule("status");
});

const dirty = new Set();
let stream = new AbortController();
let lost = ""; // why nothing comes; empty while it does
let said = ""; // what the daemon answered last to something asked for

function schedule(topic) {
  if (dirty.size === 0) requestAnimationFrame(draw);
  dirty.add(topic);
}

function draw() {
  const topics = new Set(dirty);
  dirty.clear();
  const any = (...names) => topics.has("hello") || names.some((name) => topics.has(name));
  if (store.status === null) return;
  if (topics.has("hello")) plots.forget();
  if (any("status")) {
    drawHead(store.status);
    choice.draw(store.status);
    drawStages(byId("stages"), store.status, store.topology);
    say(byId("auto-mode"), store.status.auto ? `auto ${store.status.auto.mode}` : "");
  }
  notice();
  if (any("status", "rights")) change.update(store.status, store.rights);
  if (any("status", "point")) drawTiles(store.status, store.points.at(-1));
  if (any("status", "event", "topology")) drawLayout();
  if (any("topology")) drawLinks(document.querySelector("#links .scroll"), store.topology);
  if (any("status", "event", "rights")) drawHandover(byId("handover"), store.handover, { nowUnix: store.now(), onCancel: mayChange() ? rollBack : null });
  if (any("point")) plots.draw(store);
  if (any("decision", "status")) drawDecisions(byId("decisions"), store);
  if (any("event")) drawEvents(byId("events"), store);
  if (any("rights")) byId("key").hidden = !store.rights.asks_for_keys;
}

function drawLayout() {
  const shown = shownLayout(store, preview);
  layout.draw(drawingOf(shown.status, store.topology, shown.change));
  const isPreview = shown.change?.isPreview === true;
  const host = store.topology?.host_id ? `on ${store.topology.host_id}` : "";
  say(byId("layout-note"), isPreview ? `preview: ${arrows(preview.what)}` : store.isMoving ? `handover #${store.handover.number}: layers are moving` : host);
}

function mayChange() {
  return store.rights.may_preview && store.rights.why_no_change === "";
}

async function rollBack() {
  try {
    said = (await ask("rebalance/cancel", {}, key, choice.of(store.status))).message;
  } catch (error) {
    said = error.message;
  }
  notice();
  setTimeout(() => { said = ""; notice(); }, 6000);
}

/** One line for what matters most: nothing comes, what comes is old, an answer, or why the service is as it is. */
function notice() {
  const text = lost || said || store.staleness || store.status?.reason || "";
  const place = byId("notice");
  say(place, text);
  place.hidden = text === "";
}

function connected(isLive, reason = "") {
  say(set(byId("live"), { "data-live": isLive ? "yes" : "no" }), isLive ? "live" : "not connected");
  lost = isLive ? "" : reason;
  notice();
}

function start() {
  stream.abort();
  stream = new AbortController();
  const on = {
    message: (topic, data) => {
      if (topic === "hello") connected(true);
      store.take(topic, data);
    },
    lost: (reason) => connected(false, reason),
    keyWanted: (reason) => askForKey(reason),
  };
  follow(key, on, stream.signal, choice.wanted);
}

store.listen((topic) => {
  // A plan for a layout that is not in force any more would be another one.
  if (topic === "event" && preview !== null && store.events.at(-1)?.fields.state === "ended") change.discard();
  schedule(topic);
});
prepareTheme();
prepareKeys(start);
start();
