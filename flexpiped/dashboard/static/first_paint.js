// Runs before the page is drawn, so that a theme that was chosen does not flash up in the other one.
try {
  const chosen = localStorage.getItem("flexpiped-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // storage is off: the system's theme it is
}
