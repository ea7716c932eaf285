"""Tile programs to C++: one function a program, OpenMP over the grid.

The function is ``extern "C" void NAME(void** tensors, const int64_t* numbers, char* scratch, int64_t
scratch_bytes)``. ``numbers`` are the sizes
(``Kernel.sizes``), then each tensor's strides in elements; ``scratch`` has ``Kernel.scratch`` bytes for each thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
from sympy.core.function import AppliedUndef

from ...ir.cascade import ranks_of, tensor_name
from ...ir.tile import (
    MAKERS,
    Cases,
    Dot,
    Load,
    Loop,
    Map,
    Program,
    Reduce,
    Skip,
    State,
    Statement,
    walk,
)
from ..tiles.facts import around_the_grid, changed_by, comparison_text, sizes_of
from .bounds import Ends, base, bound, loop_ends
from .frame import Frame, reused
from .lookups import without_search
from .names import CPP_TYPES, count, indented, inside, origin, pointer, size_name, stride, tensor
from .nest import Elementwise, NestWriter, groups
from .order import products_first
from .prelude import INCLUDES, PRELUDE
from .table_prelude import TABLES

#: Stands for the function's name, which its text decides.
_NAME = "KERNEL_NAME"


@dataclass(frozen=True)
class Function:
    """One program's C++. ``sizes``: ranks and constants whose values are passed, in order. ``scratch``: bytes a thread
    needs. Equal texts have equal names."""

    program: Program
    name: str
    text: str
    sizes: tuple[str, ...]
    scratch: int


def print_function(
    program: Program, sizes: Mapping[str, int], shapes: Mapping[str, Sequence[int]], comment: str = ""
) -> Function:
    """The C++ of one program. ``shapes`` gives each tensor's shape; ``comment`` stands on top."""
    writer = _ProgramWriter(program, sizes, shapes)
    lines = [f"// {line}".rstrip() for line in comment.splitlines()] + writer.lines()
    text = "\n".join(lines)
    name = f"{program.name}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return Function(program, name, text.replace(_NAME, name), writer.sizes, writer.scratch)


def print_source(functions: Iterable[Function], brgemm: bool = True) -> str:
    """One C++ source with all functions. ``brgemm``: single-precision products by oneDNN's micro-kernels."""
    by_type: dict[str, dict[str, Function]] = {}
    for function in functions:
        by_type.setdefault(function.program.compute, {})[function.name] = function
    lines = [INCLUDES, f"#define USE_BRGEMM {int(brgemm)}"]
    for compute, members in sorted(by_type.items()):
        lines += [
            "#undef COMPUTES_F32",
            f"#define COMPUTES_F32 {int(compute == 'f32')}",
            f"namespace effcc_{compute} {{",
            f"namespace {{\nusing scalar_t = {CPP_TYPES[compute]};",
            PRELUDE,
            TABLES,
            "}  // namespace",
            *(function.text for function in members.values()),
            f"}}  // namespace effcc_{compute}",
        ]
    return "\n".join(lines) + "\n"


class _ProgramWriter:
    def __init__(self, program: Program, sizes: Mapping[str, int], shapes: Mapping[str, Sequence[int]]) -> None:
        self.frame = Frame(program, sizes, shapes)
        self.program = self.frame.program = replace(program, body=products_first(program.body, self._is_turned))
        self.item_bytes = 8 if program.compute == "f64" else 4
        self.scratch = 0
        self.sizes = sizes_of(program)

    def lines(self) -> list[str]:
        before, grid, body, after = around_the_grid(self.program.body)
        head = "void** tensors, const int64_t* numbers, char* scratch, int64_t scratch_bytes"
        lines = [f'extern "C" void {_NAME}({head}) {{']
        setup = self._arguments()
        first = self._body(before)
        self.frame.walked = {g.rank for g in grid}
        inner = self._body(body)
        self.frame.walked = set()
        allocations, self.scratch = self._allocate([*before, *body])
        setup += [
            f"const int64_t blocks_{g.rank.name} = ({size_name(g.rank.name)} + {g.step - 1}) / {g.step};" for g in grid
        ]
        total = " * ".join(f"blocks_{g.rank.name}" for g in grid) or "1"
        # Sums of several workers: the same blocks for the same worker each time, so that results repeat exactly.
        schedule = "static" if after else "dynamic, 1"
        region = [
            "char* at = scratch + static_cast<int64_t>(omp_get_thread_num()) * scratch_bytes;",
            "(void)at;",
            "const WithoutSubnormals normal_only;",
            "(void)normal_only;",
            *allocations,
            *first,
            f"#pragma omp for schedule({schedule})",
            "for (int64_t block = 0; block < blocks; ++block) {",
            *indented([*_decoded(grid), *inner]),
            "}",
            *(self._merged(before, after) if after else []),
        ]
        parallel = ["#pragma omp parallel if (blocks > 1)", "{", *indented(region), "}"]
        return [*lines, *indented([*setup, f"const int64_t blocks = {total};", *parallel]), "}", ""]

    def _merged(self, before: Sequence[Statement], after: Sequence[Statement]) -> list[str]:
        """The workers' states summed into the first one's, and what is done with them."""
        lines = ["const int64_t apart = scratch_bytes / static_cast<int64_t>(sizeof(scalar_t));"]
        names = [tensor_name(item.target) for item in before if isinstance(item, State)]
        for name in names:
            mine = f"{pointer(name)} - omp_get_thread_num() * apart"
            lines += [
                "#pragma omp for schedule(static)",
                f"for (int64_t i = 0; i < {self.frame.elements(name)}; ++i)",
                f"  for (int64_t t = 1; t < omp_get_num_threads(); ++t) ({mine})[i] += ({mine})[t * apart + i];",
            ]
        rebased = [f"{pointer(name)} -= omp_get_thread_num() * apart;" for name in names]
        return [*lines, "#pragma omp single", "{", *indented([*rebased, *self._body(after)]), "}"]

    def _arguments(self) -> list[str]:
        lines = []
        number = 0
        for name in self.sizes:
            lines.append(f"const int64_t {size_name(name)} = numbers[{number}];")
            number += 1
        for rank, other in self.program.alias:
            lines.append(f"const int64_t {size_name(rank.name)} = {size_name(other.name)};")
        for position, item in enumerate(self.program.tensors):
            constant = "const " if item.role == "input" else ""
            kind = f"{constant}{CPP_TYPES[item.dtype]}*"
            lines.append(f"{kind} {tensor(item.name)} = static_cast<{kind}>(tensors[{position}]);")
            for dimension in range(len(item.ranks)):
                if dimension != item.unit:
                    lines.append(f"const int64_t {stride(item.name, dimension)} = numbers[{number}];")
                number += 1
        lines += [f"(void){size_name(name)};" for name in self.sizes]
        return lines

    # Scratch ----------------------------------------------------------------------------------------------------------

    def _allocate(self, body: Sequence[Statement]) -> tuple[list[str], int]:
        """Pointers to every value, and the bytes they take; the two branches of a case share theirs."""
        lines: list[str] = []
        placed: set[str] = set()
        total = self._place(body, placed, lines, frozenset())
        return lines, -(-total // 4096) * 4096 if total else 64

    def _place(self, body: Sequence[Statement], placed: set[str], lines: list[str], outer: frozenset[str]) -> int:
        total = 0
        over = reused(body, self.frame, outer)
        for item in body:
            if isinstance(item, Loop):
                total += self._place(item.body, placed, lines, outer | frozenset(placed))
            elif isinstance(item, Cases):
                # Values that both branches make lie outside of what the branches share.
                for name in sorted(changed_by(item.full) & changed_by(item.partial) - placed):
                    lines.append(f"scalar_t* {pointer(name)} = take(at, {self.frame.elements(name)});")
                    total += self.frame.bytes(name, self.item_bytes)
                    placed.add(name)
                mark = f"mark_{len(lines)}"
                lines.append(f"char* {mark} = at; char* {mark}_end = at;")
                most = 0
                for branch in (item.full, item.partial):
                    lines.append(f"at = {mark};")
                    most = max(most, self._place(branch, set(placed), lines, outer | frozenset(placed)))
                    lines.append(f"{mark}_end = std::max({mark}_end, at);")
                lines.append(f"at = {mark}_end;")
                total += most
            elif isinstance(item, MAKERS):
                name = tensor_name(item.target)
                if name in placed:
                    continue
                if name in over:
                    lines.append(f"scalar_t* {pointer(name)} = {pointer(over[name])};")
                else:
                    lines.append(f"scalar_t* {pointer(name)} = take(at, {self.frame.elements(name)});")
                    total += self.frame.bytes(name, self.item_bytes)
                placed.add(name)
        return total

    # Statements -------------------------------------------------------------------------------------------------------

    def _body(self, body: Sequence[Statement]) -> list[str]:
        lines: list[str] = []
        waiting: list[Elementwise] = []

        def flush() -> None:
            for shape, items in groups(waiting, self.frame):
                lines.extend(["{", *indented(NestWriter(self.frame, shape, items).lines()), "}"])
            waiting.clear()

        for item in body:
            if isinstance(item, Load) and self._is_transposition(item):
                flush()
                lines.append(self._transpose(item))
            elif isinstance(item, Map) and self._is_turned(item):
                flush()
                lines.append(self._turn(item))
            elif isinstance(item, Loop | Cases | Skip | Dot):
                flush()
                lines += self._compound(item)
            elif isinstance(item, Reduce):
                waiting += without_search(item, self.frame)
            else:
                waiting.append(item)
        flush()
        return lines

    def _compound(self, item: Loop | Cases | Skip | Dot) -> list[str]:
        if isinstance(item, Dot):
            return [self._dot(item)]
        if isinstance(item, Skip):
            condition = bound(self.frame, item.condition, certain=False)
            return [f"if (!({condition})) continue;"] if item.holds is None else []
        if isinstance(item, Cases):
            head = f"if ({bound(self.frame, item.condition, certain=True)}) {{"
            full, partial = self._body(item.full), self._body(item.partial)
            return [head, *indented(full), "} else {", *indented(partial), "}"]
        rank = item.rank
        self.frame.walked.add(rank)
        ends = loop_ends(self.frame, item)
        inner = self._body(item.body)
        late = [each for each in item.body if isinstance(each, Skip) and each.holds is not None]
        possible = [f"({bound(self.frame, each.condition, certain=False)})" for each in late]
        self.frame.walked.discard(rank)
        if late:
            return ["{", *indented([*ends.lines, *self._twice(item, late, possible, ends, inner)]), "}"]
        return ["{", *indented([*ends.lines, *self._walk(item, ends.first, ends.last, inner)]), "}"]

    def _twice(self, item: Loop, late: list[Skip], possible: list[str], ends: Ends, inner: list[str]) -> list[str]:
        """A loop that walks what the skips leave out after all else, and only if the states ask for it."""
        walk, ranges = f"walk_{item.rank.name}", f"stretches_{item.rank.name}"
        stretches = [(ends.first, ends.last)] * 2 + list(ends.left_out)
        table = ", ".join(f"{{{first}, {last}}}" for first, last in stretches)
        conditions = [part for each in late for part in sympy.Mul.make_args(each.holds)]
        holds = " && ".join(self._everywhere(part) for part in conditions)
        choice = f"if ({walk} < 2 && ({' && '.join(possible)}) == ({walk} == 1)) continue;"
        return [
            f"const int64_t {ranges}[{len(stretches)}][2] = {{{table}}};",
            f"for (int {walk} = 0; {walk} < {len(stretches)}; ++{walk}) {{",
            f"  if ({walk} == 1 && {holds}) break;",
            *indented(self._walk(item, f"{ranges}[{walk}][0]", f"{ranges}[{walk}][1]", [choice, *inner])),
            "}",
        ]

    def _walk(self, item: Loop, first: str, last: str, inner: list[str]) -> list[str]:
        o = origin(item.rank)
        lines = [f"for (int64_t {o} = {first}; {o} < {last}; {o} += {item.step}) {{"]
        if item.step > 1:
            lines.append(f"  const int64_t {count(item.rank)} = std::min<int64_t>({item.step}, {last} - {o});")
        return [*lines, *indented(inner), "}"]

    def _everywhere(self, condition: sympy.Expr) -> str:
        """Whether a comparison of a value with a number holds for all of its elements."""
        item, least = condition.args
        name = tensor_name(item)
        at = " + ".join(f"{inside(s)} * ({step})" for s, step in zip(item.args, self.frame.strides(name), strict=True))
        loops = "".join(
            f"for (int64_t {inside(s)} = 0; {inside(s)} < {self.frame.length(s)}; ++{inside(s)}) " for s in item.args
        )
        test = f"({self.frame.start(name)})[{at or '0'}] {comparison_text(condition)} {float(least)!r}"
        return f"[&] {{ {loops}if (!({test})) return false; return true; }}()"

    def _is_transposition(self, item: Load) -> bool:
        """A whole tile of two dimensions, from memory where the first dimension's elements are neighbours."""
        source = item.source
        target = item.target.args
        unit = self.frame.tensors[tensor_name(source)].unit
        return (
            len(target) == 2
            and unit is not None
            and source.args[unit] == target[0]
            and sum(target[1] in ranks_of(index) for index in source.args) == 1
            and target[1] in source.args
            and sum(target[0] in ranks_of(index) for index in source.args) == 1
            and not self.frame.can_leave(source)
        )

    def _is_turned(self, item: Map) -> bool:
        """A value of two dimensions, the other way round."""
        body = item.body
        if not isinstance(body, AppliedUndef) or tensor_name(body) not in self.frame.values or len(body.args) != 2:
            return False
        return tuple(body.args) == self.frame.values[tensor_name(body)] == tuple(reversed(item.target.args))

    def _turn(self, item: Map) -> str:
        source, target = tensor_name(item.body), tensor_name(item.target)
        rows, columns = (self.frame.length(s) for s in item.body.args)
        return (
            f"transposed({rows}, {columns}, static_cast<const scalar_t*>({self.frame.start(source)}), "
            f"{self.frame.strides(source)[0]}, {self.frame.start(target)}, {self.frame.strides(target)[0]});"
        )

    def _transpose(self, item: Load) -> str:
        name = tensor_name(item.target)
        first, second = item.target.args
        at = base(self.frame, item.source)
        row = next(position for position, index in enumerate(item.source.args) if index == second)
        length = self.frame.length
        return (
            f"transposed({length(second)}, {length(first)}, {at}, {stride(tensor_name(item.source), row)}, "
            f"{pointer(name)}, {self.frame.strides(name)[0]});"
        )

    def _dot(self, item: Dot) -> str:
        rows = [s for s in item.target.args if s in ranks_of(item.left)]
        columns = [s for s in item.target.args if s not in rows]
        lengths = [self._flat(ranks) for ranks in (tuple(rows), tuple(columns), item.reduced)]
        left, lda = self._operand(item.left, rows[0])
        right, ldb = self._operand(item.right, item.reduced[0])
        target = tensor_name(item.target)
        ldc = self._leading(target, len(rows))
        return (
            f"product({', '.join(lengths)}, {lda}, {ldb}, {ldc}, {str(item.accumulate).lower()}, "
            f"{left}, {right}, {self.frame.start(target)});"
        )

    def _flat(self, ranks: tuple[sympy.Symbol, ...]) -> str:
        return " * ".join(self.frame.length(s) for s in ranks)

    def _leading(self, name: str, rows: int) -> str:
        """Elements between rows of a value whose first ``rows`` dimensions are its rows."""
        return f"({self.frame.strides(name)[rows - 1]})"

    def _operand(self, item: AppliedUndef, row: sympy.Symbol) -> tuple[str, str]:
        """(pointer, elements between rows)."""
        name = tensor_name(item)
        if name in self.frame.values and tuple(item.args) == self.frame.values[name]:
            ranks = self.frame.values[name]
            split = len(ranks) - 1
            for position in range(len(ranks)):
                if ranks[position] == row:
                    split = position
            last_row = split
            while last_row + 1 < len(ranks) and self._same_side(ranks[last_row + 1], row, item):
                last_row += 1
            return self.frame.start(name), f"({self.frame.strides(name)[last_row]})"
        position = next(p for p, index in enumerate(item.args) if index == row)
        return base(self.frame, item), stride(name, position)

    def _same_side(self, s: sympy.Symbol, row: sympy.Symbol, item: AppliedUndef) -> bool:
        return self._sides.get((tensor_name(item), s), False)

    @property
    def _sides(self) -> dict[tuple[str, sympy.Symbol], bool]:
        """(operand, rank) -> whether it is one of the operand's row ranks."""
        found: dict[tuple[str, sympy.Symbol], bool] = {}
        for item in walk(self.program.body):
            if isinstance(item, Dot):
                for s in item.left.args:
                    found[tensor_name(item.left), s] = s not in item.reduced
                for s in item.right.args:
                    found[tensor_name(item.right), s] = s in item.reduced
        return found


def _decoded(grid: Sequence[Loop]) -> list[str]:
    """The coordinates that a block number stands for."""
    lines = ["int64_t rest = block;"]
    for g in reversed(grid):
        name, o = g.rank.name, origin(g.rank)
        lines.append(f"const int64_t {o} = (rest % blocks_{name}) * {g.step}; rest /= blocks_{name};")
        if g.step > 1:
            lines.append(f"const int64_t {count(g.rank)} = std::min<int64_t>({g.step}, {size_name(name)} - {o});")
    return [*lines, "(void)rest;"]


__all__ = ["Function", "inside", "print_function", "print_source"]
