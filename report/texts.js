// IR and generated code: split into lines and coloured when they are first looked at, so that the page opens fast.
const KINDS =
  /(?<place>\bloc\([^"]*(?:"(?:[^"\\]|\\.)*"[^)]*)?\))|(?<string>"(?:[^"\\]|\\.)*")|(?<value>[%@][\w.]+)|(?<op>(?<= = )[A-Za-z_][\w.]*(?=\())|(?<type>\b[a-z]{1,4}\d\w*\[[^\]]*\])|(?<word>^\s*(?:graph|return|alias|repeat|cascade)\b)/g;
const colour = (line) => {
  const made = document.createDocumentFragment();
  let end = 0;
  for (const found of line.matchAll(KINDS)) {
    const kind = Object.keys(found.groups).find((name) => found.groups[name] !== undefined);
    made.append(line.slice(end, found.index), element("span", found[0], { class: `k-${kind}` }));
    end = found.index + found[0].length;
  }
  made.append(line.slice(end));
  return made;
};
const prepare = (pre) => {
  if (pre.dataset.ready) return;
  pre.dataset.ready = "yes";
  const made = document.createDocumentFragment();
  for (const line of pre.textContent.split("\n")) {
    const row = element("div");
    row.className = "row";
    row.append(line.length < 4000 ? colour(line) : line, "\n");
    made.append(row);
  }
  pre.replaceChildren(made);
};
for (const folded of document.querySelectorAll("details.listing")) {
  folded.addEventListener("toggle", () => folded.open && prepare(folded.querySelector("pre")));
}
const listing = (graph) => [...document.querySelectorAll("details.listing")].find((each) => each.dataset.graph === graph);
const irLink = (graph, names) => {
  const folded = listing(graph);
  const name = names.find((each) => each && folded?.textContent.includes(`%${each}`));
  return name ? link(`%${name} in @${graph}`, { ir: graph, name }) : "";
};
const showIr = (graph, name) => {
  const folded = listing(graph);
  if (!folded) return;
  folded.open = true;
  prepare(folded.querySelector("pre"));
  const starts = new RegExp(`^\\s*%${name.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}(?::| =)`);
  const row = [...folded.querySelectorAll(".row")].find((each) => starts.test(each.textContent));
  if (!row) return;
  for (const marked of document.querySelectorAll(".marked")) marked.classList.remove("marked");
  row.classList.add("marked");
  row.scrollIntoView({ block: "center" });
};
