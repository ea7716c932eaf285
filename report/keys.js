// Search, and what keys do anywhere on the page.
const query = document.getElementById("query");
const results = document.getElementById("results");
const limit = /^([<>]=?|=)?\s*([\d.]+)\s*([KMGT]?)(i?)B$/i;
const search = (wanted) => {
  const match = limit.exec(wanted.trim());
  const all = range(buffers.name.length);
  let found = [];
  if (match) {
    const power = "KMGT".indexOf(match[3].toUpperCase()) + 1;
    const bytes = Number(match[2]) * (match[4] ? 1024 : 1000) ** (match[3] ? power : 0);
    const fits = { "<": (b) => b < bytes, "<=": (b) => b <= bytes, ">": (b) => b > bytes, "=": (b) => b === bytes };
    found = all.filter((b) => (fits[match[1]] ?? ((given) => given >= bytes))(buffers.bytes[b]));
  } else if (wanted.trim()) {
    const low = wanted.trim().replace(/^%/, "").toLowerCase();
    const has = (number) => text(number).toLowerCase().includes(low);
    found = all.filter((b) => has(buffers.name[b]) || has(buffers.source[b]) || has(buffers.module[b]) || has(buffers.type[b]));
  }
  found.sort((a, b) => buffers.bytes[b] - buffers.bytes[a]);
  const items = found.slice(0, 40).map((b) => {
    const item = element("li", bufferLink(b));
    item.append(` ${size(buffers.bytes[b])} ${text(buffers.role[b])} ${text(buffers.module[b])} ${lineOf(text(buffers.source[b]))}`);
    return item;
  });
  results.replaceChildren(...items);
  results.hidden = !wanted.trim();
  document.getElementById("found").textContent = wanted.trim() ? `${found.length} tensors` : "";
};
query.addEventListener("input", () => search(query.value));

const help = document.getElementById("help");
const sections = [...document.querySelectorAll("main > section")];
const move = (by) => {
  const here = sections.findLastIndex((section) => section.getBoundingClientRect().top < 40);
  const target = sections[Math.min(Math.max(here + by, 0), sections.length - 1)];
  target.scrollIntoView();
  target.focus({ preventScroll: true });
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    if (help.open) help.close();
    else if (document.activeElement === query) (query.blur(), (results.hidden = true));
    else closeDetail();
    return;
  }
  if (event.target.matches("input,textarea")) return;
  const actions = {
    j: () => move(1),
    k: () => move(-1),
    "/": () => query.focus(),
    m: () => document.querySelector("figure:not([hidden]) svg[data-memory]")?.focus(),
    "?": () => (help.open ? help.close() : help.showModal()),
  };
  if (!actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
});
document.getElementById("show-help").addEventListener("click", () => help.showModal());
