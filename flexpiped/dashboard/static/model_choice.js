// Which of several models is shown. The address remembers it, so that a page that is loaded again shows the same.

import { el, fill } from "./dom.js";

export class ModelChoice {
  #frame;
  #select;

  /** `frame` holds the choice with its label; `onChoice()` is called when another one is to be shown. */
  constructor(frame, onChoice) {
    this.#frame = frame;
    this.#select = frame.querySelector("select");
    this.#select.addEventListener("change", () => {
      const address = new URL(location.href);
      address.searchParams.set("model", this.#select.value);
      history.replaceState(null, "", address);
      onChoice();
    });
  }

  /** The name that was chosen; empty: none was. */
  get wanted() {
    return new URL(location.href).searchParams.get("model") ?? "";
  }

  /** The name by which the model that is shown is asked for; empty where there is only one. */
  of(status) {
    return status?.models ? status.model.name : "";
  }

  draw(status) {
    const models = status.models ?? [];
    this.#frame.hidden = models.length < 2;
    const texts = models.map((each) => [each.model.name, `${each.model.name} (${each.state})`]);
    const shown = [...this.#select.options].map((option) => [option.value, option.textContent]);
    if (JSON.stringify(texts) !== JSON.stringify(shown)) {
      fill(this.#select, texts.map(([name, text]) => el("option", { value: name }, text)));
    }
    if (document.activeElement !== this.#select || this.#select.value === "") this.#select.value = status.model.name;
  }
}
