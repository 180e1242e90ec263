// Changing the layout: what is wanted, a preview of what that would do, and only then the change itself.
// What is carried out is the layout that was previewed, whatever the planner would say a moment later.

import { arrows, bytes, latency, number, plural } from "./format.js";
import { Refused } from "./daemon.js";
import { el, fill, say } from "./dom.js";
import { decodersOf, replicasOf } from "./layers.js";

export class ChangeView {
  #form;
  #frame;
  #ask;
  #onPreview;
  #best = el("input", { type: "radio", name: "wanted", value: "auto", id: "wanted-auto", checked: true });
  #many = el("input", { type: "radio", name: "wanted", value: "stages", id: "wanted-stages" });
  #stages = el("input", { type: "number", min: 1, value: 1, id: "stages-number", "aria-label": "number of stages" });
  #on = el("select", { id: "replica" });
  #onRow = el("div", { class: "row", hidden: true });
  #button = el("button", { type: "submit", disabled: true }, "Preview");
  #why = el("p", { class: "note said" });
  #rights = { may_preview: false, why_no_change: "" };
  #isTouched = false;
  #model = ""; // the name of the one that is shown, where there are several

  /** `ask(path, body)` asks the daemon; `onPreview(proposal)` draws one, or none. */
  constructor(form, frame, ask, onPreview) {
    this.#form = form;
    this.#frame = frame;
    this.#ask = ask;
    this.#onPreview = onPreview;
    this.#onRow.append(el("label", {}, "replica", this.#on));
    form.append(
      el("div", { class: "row" }, el("label", {}, this.#best, "what the planner finds best")),
      el("div", { class: "row" }, el("label", {}, this.#many, "stages:"), this.#stages),
      this.#onRow,
      el("div", { class: "buttons" }, this.#button),
      this.#why,
    );
    this.#stages.addEventListener("input", () => { this.#many.checked = true; this.#isTouched = true; });
    form.addEventListener("submit", (event) => { event.preventDefault(); this.#preview(); });
  }

  update(status, rights) {
    this.#rights = rights;
    const model = status.models ? status.model.name : "";
    if (model !== this.#model) {
      this.#model = model;
      this.#isTouched = false;
      this.discard(); // it was of another model
    }
    const replicas = replicasOf(status);
    this.#button.disabled = !rights.may_preview || replicas.length === 0;
    this.#stages.max = Math.max(1, ...replicas.map((replica) => decodersOf(replica.stages)));
    if (!this.#isTouched && replicas.length > 0) this.#stages.value = replicas[0].stages.length;
    this.#onRow.hidden = replicas.length < 2;
    const numbers = replicas.map((replica) => String(replica.number));
    if (numbers.join() !== [...this.#on.options].map((option) => option.value).join()) {
      fill(this.#on, numbers.map((each) => el("option", { value: each }, each)));
    }
    say(this.#why, rights.may_preview ? "" : "A preview needs an API key with scope admin.");
  }

  /** Put the preview away. */
  discard() {
    fill(this.#frame);
    this.#onPreview(null);
  }

  async #preview() {
    const stages = this.#many.checked ? Number(this.#stages.value) : "auto";
    const on = this.#onRow.hidden ? {} : { on: Number(this.#on.value) };
    this.#button.disabled = true;
    fill(this.#frame, el("p", { class: "said" }, "planning ..."));
    try {
      const { proposal } = await this.#ask("preview", { stages, ...on });
      this.#show(proposal, stages);
      await this.#showCandidates(stages);
    } catch (error) {
      this.#failed(error);
    } finally {
      this.#button.disabled = false;
    }
  }

  #show(proposal, stages) {
    this.#onPreview(proposal.feasible && proposal.changes_something ? proposal : null);
    const head = !proposal.feasible ? "It does not fit" : proposal.changes_something ? arrows(proposal.what) : "Nothing to do";
    fill(this.#frame,
      el("h3", {}, head),
      el("p", { class: proposal.feasible ? "note" : "said bad" }, proposal.sentences.join("; ")),
      proposal.moves.length > 0 ? el("ul", { class: "facts-list" }, proposal.moves.map((move) => el("li", {}, arrows(move)))) : null,
      proposal.feasible && proposal.changes_something ? this.#choices(proposal, stages) : el("div", { class: "buttons" }, this.#dismiss()),
    );
  }

  #choices(proposal, stages) {
    if (this.#rights.why_no_change) {
      const command = `flexctl rebalance${this.#model === "" ? "" : ` --model ${this.#model}`}${stages === "auto" ? "" : ` --stages ${stages}`}${proposal.on === null ? "" : ` --on ${proposal.on}`}`;
      return el("div", {},
        el("p", { class: "said" }, `From here ${this.#rights.why_no_change}. On the host:`),
        el("code", { class: "command" }, command),
        el("div", { class: "buttons" }, this.#dismiss()),
      );
    }
    const go = el("button", { type: "button", class: "primary", id: "carry-out" }, "Carry it out");
    go.addEventListener("click", () => this.#carryOut(proposal, go));
    return el("div", { class: "buttons" }, go, this.#dismiss());
  }

  #dismiss() {
    const button = el("button", { type: "button", id: "discard" }, "Discard");
    button.addEventListener("click", () => { this.discard(); this.#button.focus(); });
    return button;
  }

  async #carryOut(proposal, go) {
    go.disabled = true;
    const on = proposal.on === null ? {} : { on: proposal.on };
    try {
      const answer = await this.#ask("rebalance", { layout: layoutText(proposal.target), ...on });
      this.discard();
      const text = answer.state === "started" ? `Handover #${answer.handover} has begun.` : answer.proposal.sentences.join("; ");
      fill(this.#frame, el("p", { class: "said good" }, text));
      this.#isTouched = false;
      this.#button.focus();
    } catch (error) {
      this.#failed(error);
    }
  }

  #failed(error) {
    if (!(error instanceof Refused)) throw error;
    this.#onPreview(null);
    fill(this.#frame, el("p", { class: "said bad" }, `Refused: ${error.message}`), el("div", { class: "buttons" }, this.#dismiss()));
  }

  async #showCandidates(stages) {
    const answer = await this.#ask("plan", { stages });
    const rows = answer.candidates.flatMap(candidate);
    const heads = ["stages", "TTFT", "TPOT", "tok/s at most", "moves"];
    this.#frame.append(
      el("h3", {}, "What is predicted"),
      el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Candidates" },
        el("table", {}, el("thead", {}, el("tr", {}, heads.map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, rows))),
      el("p", { class: "note" }, answer.times_from),
    );
  }
}

/** A layout as `flexctl rebalance --layout FILE` reads it. */
export function layoutText(stages) {
  return JSON.stringify({
    stages: stages.map((stage) => ({ devices: stage.device_ids, decoders: [stage.first_decoder, stage.end_decoder] })),
  });
}

function candidate(each) {
  const found = each.found;
  const name = plural(each.num_stages, "stage") + (each.degree > 1 ? `, TP ${each.degree}` : "");
  const predicted = found === null ? ["-", "-", "-", "-"] : [
    seconds(found.prediction.ttft_s), seconds(found.prediction.tpot_s), number(found.prediction.capacity_tokens_per_s), bytes(found.moved_bytes),
  ];
  const isChosen = each.verdict === "chosen";
  const tag = isChosen ? el("span", { class: "tag good" }, "chosen") : null;
  const why = isChosen ? "" : each.verdict === "lost" ? each.reason : `${each.verdict}: ${each.reason}`;
  const row = el("tr", { class: why ? "with-reason" : null }, el("th", { scope: "row" }, `${name} `, tag), predicted.map((text) => el("td", {}, text)));
  return why ? [row, el("tr", {}, el("td", { class: "words", colspan: 5 }, arrows(why)))] : [row];
}

function seconds(value) {
  return value === null ? "never" : latency(value);
}
