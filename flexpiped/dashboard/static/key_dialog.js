// The API key, where the daemon asks for one: kept in this tab, sent with each request, never in an address.

import { byId, say } from "./dom.js";

const NAME = "flexpiped-key";
let current = stored();

export function key() {
  return current;
}

/** Ask for a key; resolve when another one is to be tried. */
export function askForKey(reason) {
  const dialog = byId("key-dialog");
  say(byId("key-said"), `${reason}. One with scope read shows the dashboard, one with scope admin may change the layout.`);
  byId("key").hidden = false; // for whoever closes the dialog
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => byId("key-form").addEventListener("submit", resolve, { once: true }));
}

/** Wire the dialog; `onChange` is called after another key has been given. */
export function prepareKeys(onChange) {
  byId("key").addEventListener("click", () => byId("key-dialog").showModal());
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    keep(byId("key-input").value.trim());
    byId("key-dialog").close();
    onChange();
  });
  byId("key-forget").addEventListener("click", () => { keep(""); byId("key-dialog").close(); onChange(); });
}

function keep(value) {
  current = value;
  byId("key-input").value = "";
  try {
    if (value) sessionStorage.setItem(NAME, value);
    else sessionStorage.removeItem(NAME);
  } catch {
    // storage is off: it lasts until the page is loaded again
  }
}

function stored() {
  try {
    return sessionStorage.getItem(NAME) ?? "";
  } catch {
    return "";
  }
}
