// The memory charts: what lies under a point of the stack, and a cursor that keys move.
const { frame } = plan;
const plotWidth = frame.width - frame.left - frame.right;
const xOf = (position) => frame.left + (plotWidth * Math.min(plan.begins[position] ?? plan.length, plan.length)) / (plan.length || 1);
const positionAt = (x) => {
  const time = ((x - frame.left) / plotWidth) * plan.length;
  let low = 0;
  let high = Math.max(steps.name.length - 1, 0);
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (plan.begins[middle] <= time) low = middle;
    else high = middle - 1;
  }
  return low;
};
// Live buffers from the bottom of a chart's stack to its top.
const stackAt = (position, key, names) => {
  const rank = new Map(names.map((name, index) => [name, index]));
  const group = (b) => rank.get(text(buffers.by[key][b])) ?? names.length;
  const live = range(buffers.name.length).filter(
    (b) => buffers.lower[b] <= position && position < buffers.upper[b] && text(buffers.tier[b]) === "device",
  );
  return live.sort((a, b) => group(a) - group(b) || buffers.bytes[b] - buffers.bytes[a] || a - b);
};

for (const chart of document.querySelectorAll("svg[data-memory]")) {
  const key = chart.dataset.memory;
  const names = JSON.parse(chart.dataset.names);
  const top = Number(chart.dataset.top);
  const height = frame.height - frame.top - frame.bottom;
  const drawn = (name) => document.createElementNS(chart.namespaceURI, name);
  const cursor = drawn("g");
  cursor.setAttribute("class", "cursor");
  const line = drawn("line");
  const box = drawn("rect");
  const life = drawn("rect");
  life.setAttribute("class", "life");
  cursor.append(line, box, life);
  chart.append(cursor);
  let position = plan.peak;
  let stack = [];
  let chosen = 0;
  const hint = chart.closest("figure").querySelector(".reading");

  const draw = () => {
    const buffer = stack[chosen];
    const x = xOf(position);
    const next = Math.max(xOf(position + 1), x + 1);
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
    line.setAttribute("y1", frame.top);
    line.setAttribute("y2", frame.height - frame.bottom);
    let below = 0;
    for (const each of stack.slice(0, chosen)) below += buffers.bytes[each];
    if (buffer === undefined) return;
    const y = (bytes) => frame.top + height * (1 - bytes / top);
    box.setAttribute("x", x - 3);
    box.setAttribute("width", next - x + 6);
    box.setAttribute("y", y(below + buffers.bytes[buffer]));
    box.setAttribute("height", Math.max(y(below) - y(below + buffers.bytes[buffer]), 1));
    life.setAttribute("x", xOf(buffers.lower[buffer]));
    life.setAttribute("width", Math.max(xOf(buffers.upper[buffer]) - xOf(buffers.lower[buffer]), 2));
    life.setAttribute("y", frame.height - frame.bottom + 1);
    life.setAttribute("height", 4);
    const whole = stack.reduce((sum, each) => sum + buffers.bytes[each], 0);
    hint.textContent =
      `step ${steps.id[position] ?? "-"} of ${steps.id.length}: ${size(whole)} live in ${stack.length} tensors; ` +
      `%${text(buffers.name[buffer])}, ${size(buffers.bytes[buffer])} ${text(buffers.role[buffer])}`;
  };
  const moveTo = (where) => {
    position = Math.min(Math.max(where, 0), Math.max(steps.name.length - 1, 0));
    const held = stack[chosen];
    stack = stackAt(position, key, names);
    chosen = Math.max(stack.indexOf(held), 0);
    draw();
  };
  const choose = (index) => {
    chosen = Math.min(Math.max(index, 0), Math.max(stack.length - 1, 0));
    draw();
  };
  const under = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
    if (at.x < frame.left || at.x > frame.width - frame.right) return false;
    moveTo(positionAt(at.x));
    const bytes = top * (1 - (at.y - frame.top) / height);
    let below = 0;
    const index = stack.findIndex((each) => (below += buffers.bytes[each]) > bytes);
    choose(index < 0 ? stack.length - 1 : index);
    return stack.length > 0;
  };
  chart.addEventListener("mousemove", under);
  chart.addEventListener("click", (event) => under(event) && showBuffer(stack[chosen]));
  chart.addEventListener("focus", () => moveTo(position));
  chart.addEventListener("keydown", (event) => {
    const far = event.shiftKey ? 20 : 1;
    const moves = {
      ArrowRight: () => moveTo(position + far),
      ArrowLeft: () => moveTo(position - far),
      ArrowUp: () => choose(chosen + far),
      ArrowDown: () => choose(chosen - far),
      Home: () => moveTo(0),
      End: () => moveTo(steps.name.length - 1),
      p: () => moveTo(plan.peak),
      Enter: () => stack.length && showBuffer(stack[chosen]),
    };
    if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    moves[event.key]();
  });
}
