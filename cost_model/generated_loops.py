"""What a generated C++ kernel really does: its loop nests, with the bytes and the statements of each.

One kernel of Inductor's is often many nests one after another, which hand values on through memory; rows that are
shorter than a vector leave lanes empty, and what it cannot vectorize walks element by element. Read from the code's
text: ``for`` headers say how often a block runs, ``tmp`` assignments and stores are its statements.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import msgspec

from .devices import Figure
from .random_draws import draw_seconds

_CODE = re.compile(r"^(\w+) = async_compile\.cpp\w*\(.*?r?'''\n(.*?)'''", re.MULTILINE | re.DOTALL)
_CAST = re.compile(r"static_cast<int64_t>\((-?\d+)L?\)")
_FOR = re.compile(r"for\s*\(int64_t (\w+)\s*=\s*(-?\d+);\s*\1\s*<\s*(-?\d+);\s*\1(?:\+=(\d+)|\+\+)\)")
_BRANCH = re.compile(r"if\(C10_(?:UN)?LIKELY\((\w+) >= (-?\d+) && \1 < (-?\d+)\)\)")
_POINTER = re.compile(r"\b((?:in_out|in|out)_ptr\d+)\b")
_DECLARED = re.compile(r"(\w[\w:]*)\s*\*\s*((?:in_out|in|out)_ptr\d+)")
_TEMPORARY = re.compile(r"\btmp\d+(?:_\w+)?\b")
_ASSIGNED = re.compile(r"auto (tmp\d+\w*) = (.*)")
_CONSTANT = re.compile(
    r"(?:static_cast<[\w: ]+>\()?-?[\d.eEx+]+[fL]?\)?;$|\[&\]"
    r"|at::vec::Vectorized<\w+>\((?:tmp\d+|static_cast<\w+>\([^)]*\))\);$"
)
_CALLED = re.compile(r"(?:std::|\.)(exp|exp2|expm1|log|log2|log1p|tanh|erf|rsqrt|sqrt|pow|sin|cos|sigmoid)\b")
#: A vector's lanes from booleans in memory, and to them.
_MASK_READ = re.compile(r"VecMask<[^>]*>::from\(\w*ptr")
_ATOMIC = re.compile(r"\batomic_add(_vec<\w+, \d+, \d+>)?\(")
#: A random number: in a block of vectors that many, one after the other.
_DRAWN = re.compile(r"\b(normalized_rand|randn|randint64)_cpu\(")
_DRAWN_TOGETHER = re.compile(r"for\s*\(\s*\w+ offset_idx = 0; offset_idx < (\d+);")
_FIGURES = {"normalized_rand": "rand", "randn": "randn", "randint64": "randint"}
_WELFORD = re.compile(r"= welford_combine\(\w+, tmp\d+")
#: Function -> the measured one that it is priced as.
MEASURED = {
    "exp2": "exp", "expm1": "exp", "log2": "log", "log1p": "log", "sqrt": "rsqrt", "cos": "sin", "welford": "var_mean",
}  # fmt: skip
#: Bytes of a cache line: accesses that lie one apart are fetched ahead.
LINE = 64
#: Bytes of an element of a pointer's type, where it is not four.
_BYTES = {"double": 8, "int64_t": 8, "bfloat16": 2, "half": 2, "int16_t": 2, "bool": 1, "int8_t": 1, "uint8_t": 1}


class Nest(msgspec.Struct, frozen=True):
    """One loop nest. ``bytes``: what it reads and writes, each place once. ``vectors``, ``scalars``: statements that it
    executes, on vectors and on single elements; ``calls``: elements for which functions are called as well, by name: a
    call for a single element takes as long as one for all lanes of a vector; ``draws``: random numbers, by kind;
    ``strides``: accesses that each touch another cache line than the one before."""

    bytes: int
    vectors: int
    scalars: int
    calls: dict[str, int] = {}
    draws: dict[str, int] = {}
    strides: int = 0


def issued_seconds(nest: Nest, added: Mapping[str, Figure]) -> float:
    """Seconds that a nest's statements and calls take beside its bytes; ``added`` are a calibrated device's figures."""
    calls = ((MEASURED.get(name, name), elements) for name, elements in nest.calls.items())
    called = sum(elements * added[name].value for name, elements in calls if name in added)
    called += sum(draw_seconds(name, count, added) for name, count in nest.draws.items())
    called += nest.strides * added["stride"].value if "stride" in added else 0.0
    return (nest.vectors + nest.scalars) * added["statement"].value + called


@dataclass
class _Block:
    """``times``: how often it runs in all. ``trips``: steps of each loop around it, of ``steps``; ``extents``: values
    that its variable walks over."""

    times: float
    trips: dict[str, float]
    steps: dict[str, int]
    extents: dict[str, int]
    vectors: set[str] = field(default_factory=set)


def loops_of(source: str) -> dict[str, tuple[Nest, ...]]:
    """The nests of each C++ kernel of a generated wrapper, by the kernel's name."""
    return {match[1]: nests(match[2]) for match in _CODE.finditer(source)}


def nests(code: str) -> tuple[Nest, ...]:
    """The loop nests of a kernel, in order. Loops whose bounds are not numbers count as if they ran once."""
    plain = _CAST.sub(r"\1", code)
    sizes = {name: _BYTES.get(kind.rpartition("::")[2], 4) for kind, name in _DECLARED.findall(code)}
    booleans = {name for kind, name in _DECLARED.findall(code) if kind == "bool"}
    lanes = max((int(header[4] or 1) for header in map(_FOR.search, plain.splitlines()) if header), default=1)
    return tuple(_Reader(sizes, booleans, lanes).read(text) for text in _top_level(plain))


def _top_level(code: str) -> Iterator[list[str]]:
    """Lines of each outermost loop of the kernel's body."""
    lines: list[str] = []
    depth = 0
    for line in code.splitlines():
        if not lines and not _FOR.search(line):
            continue
        lines.append(line)
        depth += line.count("{") - line.count("}")
        if depth == 0 and "}" in line:
            yield lines
            lines = []


class _Reader:
    def __init__(self, sizes: dict[str, int], booleans: set[str], lanes: int) -> None:
        self.sizes, self.booleans, self.lanes = sizes, booleans, lanes
        self.moved: dict[tuple[str, bool], float] = {}
        self.vectors = self.scalars = self.strides = 0.0
        self.calls: dict[str, float] = {}
        self.draws: dict[str, float] = {}
        self.together = 1

    def read(self, lines: list[str]) -> Nest:
        stack = [_Block(1.0, {}, {}, {})]
        pending: _Block | None = None
        for line in lines:
            top = pending or stack[-1]
            if header := _FOR.search(line):
                begin, end, step = int(header[2]), int(header[3]), int(header[4] or 1)
                # Single elements of what would be a vector: the C++ compiler makes vectors of them.
                wide = self.lanes if header[1].endswith(("_tail", "_inner")) else 1
                trips = max(0.0, -(-(end - begin) // (step * wide)))
                pending = replace(
                    top,
                    times=top.times * trips,
                    trips={**top.trips, header[1]: trips},
                    steps={**top.steps, header[1]: step},
                    extents={**top.extents, header[1]: max(0, end - begin)},
                    vectors=set(top.vectors),
                )
            elif branch := _BRANCH.search(line):
                pending = _part(top, branch[1], int(branch[2]), int(branch[3]))
            elif together := _DRAWN_TOGETHER.search(line):
                self.together = int(together[1])
            elif "tmp" in line or "_ptr" in line:
                self.statement(line, stack[-1])
            for character in line:
                if character == "{":
                    stack.append(pending or stack[-1])
                    pending = None
                elif character == "}" and len(stack) > 1:
                    stack.pop()
        counts = {name: round(count) for name, count in self.calls.items()}
        draws = {name: round(count) for name, count in self.draws.items()}
        moved = round(sum(self.moved.values()))
        return Nest(moved, round(self.vectors), round(self.scalars), counts, draws, round(self.strides))

    def statement(self, line: str, block: _Block) -> None:
        text = line.strip()
        assigned = _ASSIGNED.match(text)
        value = assigned[2] if assigned else text
        if drawn := _DRAWN.search(value):
            self.draw(_FIGURES[drawn[1]], block, vector=assigned is None)
        known = any(name in block.vectors for name in _TEMPORARY.findall(value))
        vector = "at::vec" in value or known
        if assigned and vector:
            block.vectors.add(assigned[1])
        if value.startswith("[&]") or text.startswith("return") or _CONSTANT.match(value):
            return
        for pointer in _POINTER.findall(value):
            self.touch(pointer, value, block, written=assigned is None)
        if not assigned and "_ptr" not in text and "acc" not in text:
            return
        if atomic := _ATOMIC.search(text):  # each element of a vector by itself
            elements = block.times * (self.lanes if atomic[1] else 1)
            self.calls["atomic_add"] = self.calls.get("atomic_add", 0.0) + elements
        if vector:
            self.vectors += block.times
        else:
            self.scalars += block.times
        called = _CALLED.findall(value) + ["welford"] * bool(_WELFORD.search(text))
        called += ["mask_read"] * bool(_MASK_READ.search(value))
        called += ["mask_write"] * (vector and ".store(" in text and bool(self.booleans & set(_POINTER.findall(text))))
        for function in called:
            self.calls[function] = self.calls.get(function, 0.0) + block.times * self.lanes

    def draw(self, figure: str, block: _Block, vector: bool) -> None:
        """Numbers are drawn one by one, in a vector's block and in what is left over, of which no vector is made."""
        count = block.times * self.together if vector else block.times
        for name, trips in block.trips.items():
            if trips and name.endswith(("_tail", "_inner")):
                count *= block.extents[name] / trips
        self.draws[figure] = self.draws.get(figure, 0.0) + count

    def touch(self, pointer: str, value: str, block: _Block, written: bool) -> None:
        """Places are told apart by the loops whose variable the index names."""
        self.strides += self.jumps(pointer, value, block)
        places = 1.0
        picked = bool(_TEMPORARY.search(value[value.index(pointer) :].partition(")")[0]))  # an index read from memory
        for name, trips in block.trips.items():
            if not picked and not re.search(rf"\b{name}\b", value):
                continue
            inside = any(f"{name}_{part}" in value for part in ("inner", "tail"))
            divided = re.search(rf"div_floor_integer\(static_cast<int64_t>\([^,]*\b{name}\b[^,]*\), (\d+)\)", value)
            places *= max(1.0, (trips if inside else block.extents[name]) / (int(divided[1]) if divided else 1))
        key = (pointer, written)
        self.moved[key] = max(self.moved.get(key, 0.0), places * self.sizes.get(pointer, 4))

    def jumps(self, pointer: str, value: str, block: _Block) -> float:
        """How often the access is to another cache line than the one before and than the one after that: where each
        step of the innermost loop that the index changes with is longer than a line."""
        index, within = value[value.index(pointer) :], 1.0
        for name in reversed(block.trips):
            trips = block.trips[name]
            if trips > 1 and (factor := re.search(rf"(?:(\d+)L?\*)?\b{name}\b", index)):
                step = int(factor[1] or 1) * block.steps[name] * self.sizes.get(pointer, 4)
                return block.times / within if step > LINE else 0.0
            within *= max(1.0, trips)
        return 0.0


def _part(block: _Block, name: str, low: int, high: int) -> _Block:
    """The block of a branch that is taken for ``low <= name < high`` only."""
    trips = block.trips.get(name)
    if not trips:
        return replace(block, vectors=set(block.vectors))
    taken = min(trips, max(1.0, -(-(high - low) // block.steps[name])))
    return replace(block, times=block.times * taken / trips, vectors=set(block.vectors))
