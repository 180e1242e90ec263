// Light, dark, or as the system has it.

import { byId, say } from "./dom.js";

const NAME = "flexpiped-theme";
const ORDER = ["system", "light", "dark"];

export function prepareTheme() {
  const button = byId("theme");
  let chosen = document.documentElement.dataset.theme ?? "system";
  const show = () => {
    say(button, `Theme: ${chosen}`);
    if (chosen === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = chosen;
  };
  button.addEventListener("click", () => {
    chosen = ORDER[(ORDER.indexOf(chosen) + 1) % ORDER.length];
    try {
      localStorage.setItem(NAME, chosen);
    } catch {
      // storage is off: it lasts until the page is loaded again
    }
    show();
  });
  show();
}
