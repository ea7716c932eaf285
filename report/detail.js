// The panel that says what was clicked: a tensor, a step, or a source line.
const detail = document.getElementById("detail");
const body = detail.querySelector(".body");
const element = (tag, content = "", attributes = {}) => {
  const made = document.createElement(tag);
  made.append(content);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
};
const stepName = (step) => `${text(steps.kind[step])} ${text(steps.name[step])}`;
const link = (label, data) => {
  const made = element("a", label, { href: "#detail" });
  Object.assign(made.dataset, data);
  return made;
};
const stepLink = (step) => link(`step ${steps.id[step]} (${text(steps.phase[step])} ${stepName(step)})`, { s: step });
const bufferLink = (buffer) => link(`%${text(buffers.name[buffer])}`, { b: buffer });
const lineLink = (source) => {
  const key = lineOf(source);
  const row = document.querySelector(`[data-line="${CSS.escape(key)}"]`);
  return row ? link(source, { goto: key }) : document.createTextNode(source);
};

// Why a buffer is held as long as it is.
const whyKept = (buffer) => {
  const role = text(buffers.role[buffer]);
  const made = element("span");
  const last = readers[buffer].at(-1);
  const until = () => (last === undefined ? made.append("nobody reads it") : made.append("until ", stepLink(last), " reads it"));
  if (role === "parameter") made.append(`a weight: held all along, read by ${readers[buffer].length} steps`);
  else if (role === "optimizer") made.append("state of the optimizer: held all along");
  else if (role === "buffer") made.append("a buffer of the model: held all along");
  else if (role === "input") made.append(`what the model is called with, read by ${readers[buffer].length} steps`);
  else if (role === "output") made.append("returned to the caller");
  else if (role === "gradient") (made.append("a gradient, held "), until());
  else if (role === "saved") (made.append("saved by the forward for the backward, held "), until());
  else if (role === "workspace") made.append("memory that a step needs inside, gone when it ends");
  else (made.append("an intermediate result, held "), until());
  const decision = text(buffers.decision[buffer]);
  if (decision === "recompute") made.append("; freed in between, and computed again");
  if (decision === "swap") made.append("; swapped out in between, and brought back");
  return made;
};

const rows = (title, pairs) => {
  const table = element("dl");
  for (const [name, value] of pairs) {
    if (value === "" || value === undefined) continue;
    const cell = element("dd");
    cell.append(...(Array.isArray(value) ? value : [value]));
    table.append(element("dt", name), cell);
  }
  body.replaceChildren(element("h3", title), table);
  detail.hidden = false;
  document.body.classList.add("with-detail");
};
const listed = (items, make, most = 8) => {
  const parts = items.slice(0, most).flatMap((item, index) => (index ? [", ", make(item)] : [make(item)]));
  if (items.length > most) parts.push(` and ${items.length - most} more`);
  return parts;
};

// Its line; of a weight, which no line makes, the first that reads it.
const lineOfBuffer = (buffer) => {
  const own = text(buffers.source[buffer]);
  if (own) return lineLink(own);
  const reader = readers[buffer].find((step) => text(steps.source[step]));
  if (reader === undefined) return "not known";
  const made = element("span", "read by ");
  made.append(lineLink(text(steps.source[reader])));
  return made;
};

const showBuffer = (buffer) => {
  const offset = buffers.offset[buffer];
  const lower = buffers.lower[buffer];
  const maker = writers[buffer].find((step) => step <= lower);
  rows(`%${text(buffers.name[buffer])}`, [
    ["bytes", `${size(buffers.bytes[buffer])} ${text(buffers.type[buffer])}`],
    ["role", text(buffers.role[buffer])],
    ["why kept", whyKept(buffer)],
    ["line", lineOfBuffer(buffer)],
    ["module", text(buffers.module[buffer])],
    ["address", offset < 0 ? `${text(buffers.tier[buffer])}, allocated by itself` : `${text(buffers.arena[buffer])} + ${offset}`],
    ["live", `positions ${lower} to ${buffers.upper[buffer]}`],
    ["made by", maker === undefined ? "there before the first step that reads it" : stepLink(maker)],
    ["read by", listed(readers[buffer], stepLink, 4)],
    ["ir", irLink(graphAt(lower), [text(buffers.name[buffer]).split(".")[0]])],
  ]);
  window.dispatchEvent(new CustomEvent("chosen", { detail: { buffer } }));
};
const showStep = (step) => {
  const source = text(steps.source[step]);
  rows(stepName(step), [
    ["step", `${steps.id[step]}, ${text(steps.phase[step])}, on ${text(steps.stream[step])}`],
    ["time", `${duration(steps.seconds[step])} from ${duration(steps.start[step])}`],
    ["work", `${steps.flop[step].toLocaleString("en")} FLOP, ${size(steps.moved[step])} moved`],
    ["line", source ? lineLink(source) : "not known"],
    ["module", text(steps.module[step])],
    ["computes", text(steps.ops[step]).replace(/(^| )(?=\S)/g, "$1%")],
    ["reads", listed(steps.reads[step], bufferLink)],
    ["writes", listed(steps.writes[step], bufferLink)],
    ["ir", irLink(graphAt(step), text(steps.ops[step]).split(" "))],
  ]);
};
const showLine = (key) => {
  const own = (column) => (_, index) => lineOf(text(column[index])) === key;
  const tensors = range(buffers.name.length).filter((b) => own(buffers.source)(b, b));
  const work = range(steps.name.length).filter((s) => own(steps.source)(s, s));
  const held = tensors.filter((b) => buffers.lower[b] <= plan.peak && plan.peak < buffers.upper[b]);
  tensors.sort((a, b) => buffers.bytes[b] - buffers.bytes[a]);
  work.sort((a, b) => steps.seconds[b] - steps.seconds[a]);
  rows(key, [
    ["time", `${duration(work.reduce((sum, s) => sum + steps.seconds[s], 0))} in ${work.length} steps`],
    ["at the peak", `${size(held.reduce((sum, b) => sum + buffers.bytes[b], 0))} in ${held.length} tensors`],
    ["longest steps", listed(work, stepLink, 4)],
    ["largest tensors", listed(tensors, bufferLink)],
  ]);
};
const goTo = (key) => {
  const row = document.querySelector(`[data-line="${CSS.escape(key)}"]`);
  if (!row) return;
  for (const marked of document.querySelectorAll(".marked")) marked.classList.remove("marked");
  const folded = row.closest("details");
  if (folded) folded.open = true;
  row.classList.add("marked");
  row.scrollIntoView({ block: "center" });
};
const closeDetail = () => {
  detail.hidden = true;
  document.body.classList.remove("with-detail");
};
detail.querySelector("button").addEventListener("click", closeDetail);

// Everything that leads somewhere says so in its data: b (buffer), s (step), goto or line (source), ir.
document.addEventListener("click", (event) => {
  const target = event.target.closest("[data-b],[data-s],[data-goto],[data-line],[data-ir]");
  if (!target) return;
  const { b, s, goto, line, ir } = target.dataset;
  if (target.tagName === "A") event.preventDefault();
  if (b !== undefined) showBuffer(Number(b));
  else if (s !== undefined) showStep(Number(s));
  else if (goto !== undefined) goTo(goto);
  else if (ir !== undefined) showIr(ir, target.dataset.name);
  else if (line !== undefined) showLine(line);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.matches("tr[tabindex],rect[tabindex]")) event.target.dispatchEvent(new MouseEvent("click", { bubbles: true }));
});
