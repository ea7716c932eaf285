"""Text form of a fused cascade inside a graph. The Einsums are cascade text, one a quoted line.

::

    cascade @attention (f32[2,12,32], f32[2,12,32]) -> (f32[2,12,32],) {
      size b = 2
      size m = 12
      input 0 [2, 12, 4, 8] "In[b,m,h,d] = X[b,m,8*h + d]"
      output 0 [2, 12, 4, 8] "O[b,m,h,f] = X[b,m,8*h + f]"
      type O f32
      wide S
      workspace 69632 0
      "S[b,h,m,n] = sum[d] In[b,m,h,d]*In2[b,n,h,d]"
    }

``input 0`` says which element of operand 0 (written ``X``) a tensor's element is, after the sizes of its ranks.
``workspace`` has the bytes that the kernel holds for each thread, and once. ``chunk m 4`` says that a library computes
the cascade as written, 4 coordinates of m at a time. ``schedule rows 64`` is a figure that was chosen for the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from .cascade import Cascade, Einsum, access, accesses
from .cascade_parser import parse_cascade
from .cascade_printer import print_einsum
from .expressions import print_expression
from .fused_cascade import FusedCascade, TensorView
from .text import quote
from .type_text import print_type
from .types import Size, TensorType, Type

if TYPE_CHECKING:
    from .scanner import Scanner

_SOURCE = "X"


def fused_cascade_lines(name: str, fused: FusedCascade) -> Iterator[str]:
    """The lines of one fused cascade, ``name`` with its ``@``."""
    yield f"cascade {name} ({_types(fused.operands)}) -> ({_types(fused.results)}) {{"
    for rank, size in fused.sizes.items():
        yield f"  size {rank} = {print_expression(size)}"
    for word, views in (("input", fused.inputs), ("output", fused.outputs)):
        for view in views:
            line = print_einsum(Einsum(view.tensor, view.ranks, access(_SOURCE, view.index)))
            sizes = ", ".join(map(print_expression, view.sizes))
            yield f"  {word} {view.position} [{sizes}] {quote(line)}"
    for tensor, dtype in fused.dtypes.items():
        yield f"  type {tensor} {dtype}"
    for tensor in fused.wide:
        yield f"  wide {tensor}"
    if fused.thread_bytes or fused.shared_bytes:
        yield f"  workspace {fused.thread_bytes} {fused.shared_bytes}"
    for rank, size in fused.chunks.items():
        yield f"  chunk {rank} {size}"
    for name, number in fused.schedule.items():
        yield f"  schedule {name} {number}"
    for einsum in fused.cascade.einsums:
        yield f"  {quote(print_einsum(einsum))}"
    yield "}"


def _types(types: tuple[TensorType, ...]) -> str:
    text = ", ".join(map(print_type, types))
    return f"{text}," if len(types) == 1 else text


def read_fused_cascade(
    scanner: Scanner,
    tuple_type: Callable[[], tuple[Type, ...]],
    size: Callable[[], Size],
    word: Callable[[], str],
    count: Callable[[], int],
) -> FusedCascade:
    """Read what follows ``cascade @name``. The callables read parts of the graph's language."""
    operands = _tensors(scanner, tuple_type())
    scanner.expect("->", "between the operands' and the results' types")
    results = _tensors(scanner, tuple_type())
    scanner.expect("{", "to open the cascade")
    sizes: dict[str, Size] = {}
    inputs: list[TensorView] = []
    outputs: list[TensorView] = []
    dtypes: dict[str, str] = {}
    wide: list[str] = []
    workspace = (0, 0)
    chunks: dict[str, int] = {}
    schedule: dict[str, int] = {}
    lines: list[str] = []
    while not scanner.take("}"):
        start = scanner.skip()
        if scanner.word("size"):
            rank = word()
            scanner.expect("=")
            sizes[rank] = size()
        elif scanner.word("input"):
            inputs.append(_view(scanner, size, count, operands))
        elif scanner.word("output"):
            outputs.append(_view(scanner, size, count, results))
        elif scanner.word("type"):
            tensor = word()
            dtypes[tensor] = word()
        elif scanner.word("wide"):
            wide.append(word())
        elif scanner.word("workspace"):
            workspace = (count(), count())
        elif scanner.word("chunk"):
            rank = word()
            chunks[rank] = count()
        elif scanner.word("schedule"):
            figure = word()
            schedule[figure] = count()
        elif (line := scanner.string()) is not None:
            lines.append(line)
        else:
            words = "'size', 'input', 'output', 'type', 'wide', 'workspace', 'chunk', 'schedule'"
            expected = f"{words}, an Einsum in quotes or '}}'"
            scanner.fail(f"expected {expected}", start)
    cascade = _parsed(scanner, "\n".join(lines))
    return FusedCascade(
        cascade,
        sizes,
        operands,
        results,
        tuple(inputs),
        tuple(outputs),
        dtypes,
        tuple(wide),
        *workspace,
        chunks,
        schedule,
    )


def _tensors(scanner: Scanner, types: tuple[Type, ...]) -> tuple[TensorType, ...]:
    found = tuple(item for item in types if isinstance(item, TensorType))
    if len(found) != len(types):
        scanner.fail("a cascade's operands and results are tensors")
    return found


def _view(
    scanner: Scanner, size: Callable[[], Size], count: Callable[[], int], types: tuple[TensorType, ...]
) -> TensorView:
    start = scanner.skip()
    position = count()
    if position >= len(types):
        scanner.fail(f"there are only {len(types)} of these", start)
    scanner.expect("[", "before the sizes")
    sizes: list[Size] = []
    while not scanner.take("]"):
        sizes.append(size())
        if not scanner.peek("]"):
            scanner.expect(",", "or ']' after a size")
    line = scanner.string()
    if line is None:
        scanner.fail('expected a view in quotes, such as "In[b,m,d] = X[b,m,64*h + d]"')
    cascade = _parsed(scanner, line)
    einsum = cascade.einsums[0] if len(cascade.einsums) == 1 else None
    found = accesses(einsum.body) if einsum is not None else []
    if einsum is None or einsum.reduction or len(found) != 1 or einsum.body != found[0] or einsum.iterative:
        scanner.fail("a view is one tensor as another's elements", start)
    if len(einsum.kept) != len(sizes):
        scanner.fail("a view has one size for each of its ranks", start)
    if len(found[0].args) != len(types[position].shape):
        scanner.fail(f"the tensor has {len(types[position].shape)} dimensions", start)
    return TensorView(einsum.output, position, einsum.kept, tuple(found[0].args), tuple(sizes))


def _parsed(scanner: Scanner, text: str) -> Cascade:
    from ..errors import CascadeError

    try:
        return parse_cascade(text)
    except CascadeError as error:
        scanner.fail(f"not a cascade: {error.message}")
