"use strict";
for (const tab of document.querySelectorAll("[data-tab]")) {
  tab.addEventListener("click", () => {
    for (const other of tab.parentElement.querySelectorAll("[data-tab]")) {
      const chosen = other === tab;
      other.setAttribute("aria-selected", String(chosen));
      document.getElementById(other.dataset.tab).hidden = !chosen;
    }
  });
}
// Click on a column's head sorts by it. Cells are compared by their number with its unit, else as text.
const scale = { B: 1, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, TiB: 2 ** 40, "µs": 1e-6, ms: 1e-3, s: 1,
  k: 1e3, M: 1e6, G: 1e9, T: 1e12, P: 1e15, E: 1e18 };
const worth = (text) => {
  const parts = /^(-?[\d,.]+(?:e[+-]?\d+)?)\s*(\S*)/.exec(text.trim());
  return parts ? parseFloat(parts[1].replaceAll(",", "")) * (scale[parts[2]] ?? 1) : NaN;
};
for (const head of document.querySelectorAll("table:not(.source) th")) {
  head.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0];
    const column = head.cellIndex;
    const down = head.dataset.sorted !== "down";
    const numeric = head.classList.contains("n");
    const rows = [...body.rows].filter((row) => row.cells.length > column);
    rows.sort((a, b) => {
      const left = a.cells[column].textContent;
      const right = b.cells[column].textContent;
      return numeric ? worth(right) - worth(left) : left.localeCompare(right);
    });
    if (!down) rows.reverse();
    head.dataset.sorted = down ? "down" : "up";
    body.append(...rows);
  });
}
