"""Samples of torch's own op database (OpInfo) through a compiler and beside eager.

All samples of an op go into one compiled function, so that an op costs one compile; when that fails, each sample is
tried alone and the failing ones are told apart. What counts as right:

- integers, truth values, shapes and dtypes: equal;
- not-a-number and infinities: where eager has them;
- float64: max|a-b| <= 1e-10 * max|b|, where max|b| is at least 1e-4 of the largest among the sample's results (some
  gradients are zero in exact arithmetic);
- float32: no further from eager's float64 result than 8 ulp of that magnitude, or twice eager's own distance;
- else, no further than twice Inductor's distance, if that is under 1e-7 (float64) or 1e-3 (float32) of the magnitude:
  such samples are ill-conditioned, and what is left is the order of additions.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import effcc
import torch
import torch._dynamo
import torch.utils._pytree as pytree
from torch.testing._internal import common_methods_invocations as invocations

#: Results of these are not determined (memory that nobody has written), or drawn otherwise by torch's decomposition
#: than by eager's kernel (bernoulli): shapes and dtypes are compared.
UNDEFINED = """
empty empty_like empty_strided empty_permuted new_empty new_empty_strided resize_ resize_as_ bernoulli
""".split()
SEED = 7
#: Random ops of the database seed the generator in each call, which Dynamo does not trace; here the caller seeds.
invocations.wrapper_set_seed = lambda function, *args, **kwargs: function(*args, **kwargs)


@dataclass(frozen=True)
class Case:
    """One call: ``function(*args, **kwargs)``; OpInfo's ``process`` makes outputs differentiable without ambiguity."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    process: Callable[[Any], Any]
    name: str

    def twin(self, dtype: torch.dtype | None = None) -> Case:
        """The same call on copies of its tensors (same layout); floating-point ones in ``dtype``, if given."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: copy_tensor(x, dtype), (self.args, self.kwargs))
        return dataclasses.replace(self, args=args, kwargs=kwargs)

    def leaves(self) -> list[torch.Tensor]:
        found = pytree.tree_leaves((self.args, self.kwargs))
        return [x for x in found if isinstance(x, torch.Tensor) and x.requires_grad]


@dataclass
class Verdict:
    """What became of the cases of one op: ``compiled`` of them went through the backend in a whole graph, ``broken``
    with graph breaks, ``untouched`` have no graph at all (Dynamo leaves them to eager); ``wrong`` and ``failed`` are
    the compiler's faults, ``refused`` torch's own (aot_eager raises as well); ``near``: see above, the last line of
    what is right. ``fallbacks`` are the reasons of the reports."""

    compiled: int = 0
    broken: int = 0
    untouched: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    near: list[str] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)

    def bad(self) -> list[str]:
        return self.wrong + self.failed


def copy_tensor(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A leaf with the values, layout and ``requires_grad`` of ``x``."""
    if x.layout != torch.strided:
        made = x.detach().clone()
    else:
        made = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage().clone(), x.storage_offset(), x.size(), x.stride())
    if dtype is not None and made.is_floating_point():
        made = made.to(dtype)
    return made.requires_grad_(x.requires_grad)


def cases_of(op: Any, dtype: torch.dtype, limit: int, gradient: bool) -> list[Case]:
    """The first ``limit`` samples of an OpInfo that eager accepts. ``gradient``: inputs ask for one."""
    gradient = gradient and op.supports_autograd and dtype in op.supported_backward_dtypes("cpu")
    cases = []
    for number, sample in enumerate(op.sample_inputs("cpu", dtype, requires_grad=gradient)):
        if number == limit:
            break
        cases.append(
            Case(
                op.op,
                (sample.input, *sample.args),
                dict(sample.kwargs),
                sample.output_process_fn_grad,
                f"{op.formatted_name}[{dtype}, sample {number}]",
            )
        )
    return cases


def outputs_of(cases: Sequence[Case], run: Callable[[list[Any]], list[Any]]) -> list[list[Any]]:
    """Per case: its outputs, and after them the gradients of its inputs for fixed random cotangents. One backward for
    all: compiled together, the cases are one node of autograd."""
    torch.manual_seed(SEED)
    results = run([(case.args, case.kwargs) for case in cases])
    found, ends, leaves = [], [], []
    for case, result in zip(cases, results, strict=True):
        found.append([x.detach() if isinstance(x, torch.Tensor) else x for x in pytree.tree_leaves(result)])
        mine = [x for x in pytree.tree_leaves(case.process(result)) if isinstance(x, torch.Tensor) and x.requires_grad]
        ends += mine
        leaves += [(leaf, found[-1]) for leaf in case.leaves() if mine]
    if ends:
        generator = torch.Generator().manual_seed(SEED)
        slopes = [torch.rand(end.shape, generator=generator, dtype=torch.float64).to(end.dtype) + 0.5 for end in ends]
        gradients = torch.autograd.grad(ends, [leaf for leaf, _ in leaves], slopes, allow_unused=True)
        for gradient, (_, values) in zip(gradients, leaves, strict=True):
            values.append(gradient)
    return found


def eager(cases: Sequence[Case]) -> list[list[Any]]:
    return outputs_of(
        cases, lambda inputs: [case.function(*a, **k) for case, (a, k) in zip(cases, inputs, strict=True)]
    )


def compiled(cases: Sequence[Case], backend: str, fullgraph: bool) -> list[list[Any]]:
    """All cases in one function. Random ops draw from torch's generator, in eager's order."""
    functions = [case.function for case in cases]

    def run(inputs: list[Any]) -> list[Any]:
        return [function(*args, **kwargs) for function, (args, kwargs) in zip(functions, inputs, strict=True)]

    torch._dynamo.reset()
    with torch._inductor.config.patch(fallback_random=True):
        return outputs_of(cases, torch.compile(run, backend=backend, fullgraph=fullgraph, dynamic=False))


def dense(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    x = x.detach()
    return x.to_dense() if x.layout != torch.strided else x.resolve_conj().resolve_neg()


def wide(x: torch.Tensor) -> torch.dtype:
    return torch.complex128 if x.is_complex() else torch.float64


def distance(left: torch.Tensor, right: torch.Tensor, like: torch.Tensor) -> float:
    """max|left-right| where ``like`` is finite."""
    finite = torch.isfinite(like)
    apart = (left.to(wide(left)) - right.to(wide(left))).abs()[finite]
    return apart.max().item() if apart.numel() else 0.0


def compare(found: Any, wanted: Any, exact: Any, other: Callable[[], Any], floor: float = 0.0) -> tuple[str, str]:
    """(why ``found`` is wrong or ``""``, remark if it is only as near as Inductor). ``wanted``: eager's value;
    ``exact``: eager's in float64 (or ``wanted``); ``other``: gives Inductor's; ``floor``: least magnitude to compare
    with."""
    found, wanted, exact = dense(found), dense(wanted), dense(exact)
    if why := compare_form(found, wanted):
        return why, ""
    if not isinstance(wanted, torch.Tensor):
        return ("" if found == wanted else f"{found!r} in place of {wanted!r}"), ""
    if not (wanted.is_floating_point() or wanted.is_complex()):
        same = torch.equal(found, wanted)
        return ("" if same else f"{int((found != wanted).sum())} of {wanted.numel()} integers differ"), ""
    finite = torch.isfinite(wanted)
    if not torch.equal(torch.isfinite(found), finite) or not torch.equal(
        found[~finite].to(wide(found)).nan_to_num(0.5), wanted[~finite].to(wide(wanted)).nan_to_num(0.5)
    ):
        return "infinities or not-a-numbers elsewhere than eager's", ""
    if not isinstance(exact, torch.Tensor) or exact.shape != wanted.shape:
        exact = wanted
    largest = max(floor, magnitude(wanted))
    mine = distance(found, exact, wanted)
    double = wanted.dtype in (torch.float64, torch.complex128)
    if double:
        allowed = 1e-10 * largest
    else:
        real = torch.finfo(wanted.dtype)
        ulp = real.eps * 2.0 ** math.floor(math.log2(largest)) if largest else real.tiny
        allowed = max(8 * ulp, 2 * distance(wanted, exact, wanted))
    if mine <= allowed:
        return "", ""
    text = f"{mine:.2e} off, largest {largest:.2e}"
    theirs = dense(other())
    if isinstance(theirs, torch.Tensor) and theirs.shape == wanted.shape:
        gap = distance(theirs, exact, wanted)
        text += f", Inductor {gap:.2e} off"
        if mine <= 2 * gap and gap <= (1e-7 if double else 1e-3) * largest:
            return "", text
    return text, ""


def magnitude(value: Any) -> float:
    """The largest finite magnitude in a tensor of floating-point or complex numbers, else 0."""
    value = dense(value)
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
        return 0.0
    finite = value.abs()[torch.isfinite(value)]
    return finite.max().item() if finite.numel() else 0.0


def judge(cases: Sequence[Case], found: Sequence[list[Any]], verdict: Verdict) -> None:
    """Compare the results of ``cases`` with eager's, and enter what differs. Eager runs them in a row as well: random
    ops draw from one generator."""
    everything = eager([case.twin() for case in cases])
    for number, (case, values, wanted) in enumerate(zip(cases, found, everything, strict=True)):
        if len(values) != len(wanted):
            verdict.wrong.append(f"{case.name}: {len(values)} results in place of {len(wanted)}")
            continue
        exact = exact_of(case, wanted)
        # Inputs count as well: a result that is zero in exact arithmetic is what is left of numbers of their size.
        floor = 1e-4 * max(map(magnitude, [*wanted, *pytree.tree_leaves((case.args, case.kwargs))]), default=0.0)

        def other(position: int, number: int = number) -> Any:
            try:
                return compiled([case.twin() for case in cases], "inductor", False)[number][position]
            except Exception:
                return None

        for position, value in enumerate(values):
            if case.name.split("[")[0] in UNDEFINED:
                why, near = compare_form(value, wanted[position]), ""
            else:
                why, near = compare(value, wanted[position], exact[position], lambda at=position: other(at), floor)
            if why:
                verdict.wrong.append(f"{case.name}, result {position}: {why}")
            if near:
                verdict.near.append(f"{case.name}, result {position}: {near}")


def compare_form(found: Any, wanted: Any) -> str:
    """Why ``found`` has another shape or dtype than ``wanted``, ``""`` if it has not."""
    if not isinstance(wanted, torch.Tensor):
        return "" if type(found) is type(wanted) else f"{type(found).__name__} in place of {type(wanted).__name__}"
    if not isinstance(found, torch.Tensor):
        return f"{type(found).__name__} in place of a tensor"
    if found.shape == wanted.shape and found.dtype == wanted.dtype:
        return ""
    return f"{found.dtype}{list(found.shape)} in place of {wanted.dtype}{list(wanted.shape)}"


def exact_of(case: Case, wanted: list[Any]) -> list[Any]:
    """Eager's results in float64, or ``wanted`` for what has none: ops without a float64 form, and random ones, which
    draw other numbers there."""
    tensors = [x for x in pytree.tree_leaves((case.args, case.kwargs)) if isinstance(x, torch.Tensor)]
    if not any(x.dtype == torch.float32 for x in tensors):
        return wanted
    try:
        exact = eager([case.twin(torch.float64)])[0]
        again = eager([case.twin()])[0]
    except (RuntimeError, TypeError, ValueError):
        return wanted
    steady = all(compare(*pair, pair[1], lambda: None) == ("", "") for pair in zip(again, wanted, strict=True))
    return exact if steady and len(exact) == len(wanted) else wanted


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "raised:" not in line]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def attempt(cases: Sequence[Case], verdict: Verdict) -> BaseException | None:
    """Compile and run ``cases`` together; the error, if it fails. Whole graph first, then with graph breaks."""
    effcc.reset_reports()
    error: BaseException | None = None
    for fullgraph in (True, False):
        try:
            found = compiled([case.twin() for case in cases], "effcc", fullgraph)
        except Exception as raised:
            error = raised
            continue
        judge(cases, found, verdict)
        reports = effcc.reports()
        verdict.fallbacks += [f"{item.op}: {item.reason}" for report in reports for item in report.fallbacks]
        if fullgraph:
            verdict.compiled += len(cases)
        elif reports:
            verdict.broken += len(cases)
        else:
            verdict.untouched += len(cases)
        return None
    return error


def usable(cases: Sequence[Case]) -> Iterator[Case]:
    """The cases that eager computes."""
    for case in cases:
        try:
            eager([case.twin()])
        except Exception:
            continue
        yield case


def check(cases: Sequence[Case]) -> Verdict:
    """Run cases through effcc, together if possible."""
    verdict = Verdict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = list(usable(cases))
        if not cases or attempt(cases, verdict) is None:
            return verdict
        for case in cases:
            error = attempt([case], verdict)
            if error is None:
                continue
            try:
                compiled([case.twin()], "aot_eager", False)
            except Exception as also:
                verdict.refused.append(f"{case.name}: {first_line(also)}")
            else:
                verdict.failed.append(f"{case.name}: {first_line(error)}")
    return verdict
