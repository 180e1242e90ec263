// What the page knows, from the daemon's messages. Pure but for the listeners: one fold, and everybody is told.

import { afterEvent, ofRecord } from "./handover.js";

const POINTS_KEPT = 900;
const EVENTS_KEPT = 200;
// A handover may be over in 50 ms: its layers are shown as moving for so long at least, or nobody would see which.
const SHOWN_MS = 1100;

export class Store {
  status = null;
  topology = null;
  rights = { may_preview: false, why_no_change: "", asks_for_keys: false };
  points = [];
  cvWindows = [];
  events = [];
  decisions = [];
  handover = null;
  statusMs = 0; // when the last status came
  skew = 0; // of the daemon's clock against this one, in seconds
  #listeners = [];
  #clock;
  #later;

  constructor({ clock = () => Date.now(), later = (run, ms) => setTimeout(run, ms) } = {}) {
    this.#clock = clock;
    this.#later = later;
  }

  /** Call `listener(topic)` after each message. */
  listen(listener) {
    this.#listeners.push(listener);
  }

  take(topic, data) {
    const handle = this.#handlers[topic];
    if (handle === undefined) return; // a newer daemon may say more
    handle(data);
    this.#tell(topic);
  }

  /** The daemon's time now, in unix seconds. */
  now() {
    return this.#clock() / 1000 + this.skew;
  }

  /** Why what is shown is not of now; empty: it is. */
  get staleness() {
    if (this.status === null) return "";
    const seconds = (this.#clock() - this.statusMs) / 1000;
    return seconds < 4 ? "" : `the engine has not answered for ${seconds.toFixed(0)} s: what is shown is of before`;
  }

  /** Whether layers are drawn as on their way. */
  get isMoving() {
    const handover = this.handover;
    if (handover === null || handover.plan === null || handover.plan.way === "scale") return false;
    return !handover.isOver || this.#clock() < handover.beganMs + SHOWN_MS;
  }

  #handlers = {
    rights: (data) => { this.rights = data; },
    hello: (data) => {
      this.skew = data.now_unix_s - this.#clock() / 1000;
      this.cvWindows = data.cv_windows_s;
      this.points = data.points;
      this.topology = data.topology;
      this.status = data.status;
      this.statusMs = this.#clock();
      this.decisions = data.decisions;
      this.events = data.events.filter(isTold);
      this.handover = data.events.filter((event) => this.#isOurs(event)).reduce((known, event) => afterEvent(known, event, 0), null);
      this.#ofRecord();
    },
    status: (data) => {
      this.status = data;
      this.statusMs = this.#clock();
      this.#ofRecord();
    },
    topology: (data) => { this.topology = data; },
    point: (data) => { this.points = [...this.points, data].slice(-POINTS_KEPT); },
    decision: (data) => { this.decisions = [...this.decisions, data].slice(-EVENTS_KEPT); },
    event: (data) => {
      const before = this.handover;
      if (this.#isOurs(data)) this.handover = afterEvent(before, data, this.#clock());
      if (this.handover !== before && this.handover.isOver) this.#later(() => this.#tell("status"), SHOWN_MS);
      if (isTold(data)) this.events = [...this.events, data].slice(-EVENTS_KEPT);
    },
  };

  /** Whether an event is of the model that is shown, where the daemon serves several. */
  #isOurs(event) {
    const model = event.fields.model;
    return model === undefined || this.status === null || model === this.status.model?.name;
  }

  #ofRecord() {
    const record = this.status.last_handover;
    if (this.handover === null && record) this.handover = ofRecord(record);
  }

  #tell(topic) {
    for (const listener of this.#listeners) listener(topic);
  }
}

function isTold(event) {
  return event.fields.state !== "progress";
}
