// The plan, as report/data.py wrote it: columns, and texts by number.
const plan = JSON.parse(document.getElementById("plan").textContent);
const { steps, buffers } = plan;
const text = (number) => plan.texts[number] ?? "";
const size = (bytes) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let value = bytes;
  let unit = 0;
  while (Math.abs(value) >= 1024 && unit < 4) {
    value /= 1024;
    unit += 1;
  }
  return unit === 0 ? `${value} B` : `${value.toFixed(Math.abs(value) < 100 ? 2 : 0)} ${units[unit]}`;
};
const duration = (seconds) => {
  for (const [factor, unit] of [[1, "s"], [1e3, "ms"], [1e6, "µs"]]) {
    const value = seconds * factor;
    if (value >= 1 || unit === "µs") return `${value >= 1000 ? value.toFixed(0) : Number(value.toPrecision(3))} ${unit}`;
  }
  return "";
};
const range = (count) => Array.from({ length: count }, (_, index) => index);
// The line that a step or a buffer comes from: `model.py:88` of `model.py:88 "h = self.up(x)"`.
const lineOf = (source) => source.split(' "')[0];
const graphAt = (position) => {
  const around = plan.graphs.filter(([, first, last]) => first <= position && position <= last);
  around.sort((a, b) => a[2] - a[1] - (b[2] - b[1]));
  return around.length ? text(around[0][0]) : "";
};
// Buffers that are read or written by a step, the other way round.
const readers = buffers.name.map(() => []);
const writers = buffers.name.map(() => []);
steps.reads.forEach((list, step) => list.forEach((buffer) => readers[buffer].push(step)));
steps.writes.forEach((list, step) => list.forEach((buffer) => writers[buffer].push(step)));
