"""Real models through the backend: outputs, loss, every gradient and every buffer against eager.

Float64, where the model stays in float64: max|a-b| <= 1e-10 * max(max|b|, 1e-4 * the largest gradient magnitude in the
model); some gradients, such as a key bias in attention, are zero in exact arithmetic. Elsewhere (float32, bfloat16,
models that cast inside): no further from the float64 reference than twice Inductor's distance or 8 ulp of the tensor's
largest magnitude.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import effcc
import pytest
import torch
from models import ZOO, Sample, build, loss_of, main_output

FAST_FLOAT64 = ("gpt2",)
FAST_FLOAT32: tuple[str, ...] = ()

pytestmark = pytest.mark.usefixtures("clean_compiler")


def sweep(names: list[str], fast: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


@pytest.fixture
def mark_layers(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Marks the repeated layer of a model of the zoo by hand, so that its graph has several segments."""

    def mark(name: str) -> None:
        find = ZOO[name].layer
        assert find is not None
        layer = find()
        monkeypatch.setattr(layer, "forward", torch.compiler.nested_compile_region(layer.forward))

    return mark


def cast(sample: Sample, dtype: torch.dtype) -> Sample:
    """A copy of ``sample`` with floating-point parameters, buffers and inputs in ``dtype``."""
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in sample.inputs.items()}
    return Sample(copy.deepcopy(sample.model).to(dtype), inputs, sample.target)


def train_step(sample: Sample, compiler: Callable[[Any], Any]) -> dict[str, torch.Tensor]:
    """Output, loss, gradients and buffers of one training step, by name."""
    sample.model.train()
    outputs = compiler(sample.model)(**sample.inputs)
    loss = loss_of(outputs, sample.target)
    loss.backward()
    found = {"output": main_output(outputs).detach(), "loss": loss.detach()}
    for name, parameter in sample.model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad
    return found | {f"buffer {name}": buffer for name, buffer in sample.model.named_buffers()}


def evaluate(sample: Sample, compiler: Callable[[Any], Any]) -> dict[str, torch.Tensor]:
    sample.model.eval()
    with torch.no_grad():
        return {"output": main_output(compiler(sample.model)(**sample.inputs))}


def eager(model: Any) -> Any:
    return model


def effcc_backend(**options: Any) -> Callable[[Any], Any]:
    return lambda model: torch.compile(model, backend="effcc", options=options)


def inductor(model: Any) -> Any:
    return torch.compile(model, backend="inductor")


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left.double() - right.double()).abs().max().item() if left.numel() else 0.0


def magnitude(value: torch.Tensor) -> float:
    return value.double().abs().max().item() if value.numel() else 0.0


def assert_float64_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    floor = 1e-4 * max((magnitude(value) for name, value in wanted.items() if name.startswith("gradient")), default=0.0)
    wrong = [
        f"{name}: {distance(found[name], value):.3e} apart, magnitude {magnitude(value):.3e}"
        for name, value in wanted.items()
        if not distance(found[name], value) <= 1e-10 * max(magnitude(value), floor)
    ]
    assert not wrong, "\n".join(wrong)


def assert_as_near_as_inductor(
    found: dict[str, torch.Tensor],
    other: dict[str, torch.Tensor],
    reference: dict[str, torch.Tensor],
    precision: torch.dtype,
) -> None:
    assert found.keys() == other.keys() == reference.keys()
    wrong = []
    for name, exact in reference.items():
        largest = magnitude(exact)
        ulp = torch.finfo(precision).eps * 2.0 ** math.floor(math.log2(largest)) if largest else 0.0
        mine, theirs = distance(found[name], exact), distance(other[name], exact)
        if not mine <= max(2 * theirs, 8 * ulp):
            wrong.append(f"{name}: {mine:.3e} from the reference, Inductor {theirs:.3e}, ulp {ulp:.3e}")
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def no_fallbacks() -> Iterator[None]:
    """The models of the zoo go through the compiler whole: at least one region each, and no eager op."""
    yield
    reports = effcc.reports()
    assert reports and all(report.regions for report in reports)
    assert [item for report in reports for item in report.fallbacks] == []


FLOAT64 = [name for name, entry in ZOO.items() if not entry.casts]
WITH_LAYERS = [name for name in ZOO if ZOO[name].layer is not None]


@pytest.mark.parametrize("name", sweep(FLOAT64, FAST_FLOAT64))
def test_training_step_in_float64(name: str, no_fallbacks: None) -> None:
    sample = cast(build(name), torch.float64)
    wanted = train_step(cast(sample, torch.float64), eager)
    assert_float64_equal(train_step(sample, effcc_backend()), wanted)


@pytest.mark.parametrize("name", sweep(FLOAT64, ("resnet",)))
def test_forward_in_float64(name: str, no_fallbacks: None) -> None:
    sample = cast(build(name), torch.float64)
    wanted = evaluate(cast(sample, torch.float64), eager)
    assert_float64_equal(evaluate(sample, effcc_backend()), wanted)


def reference_of(sample: Sample) -> Sample:
    """``sample`` in float64; grouped_mm, which has no float64 kernel, is replaced by batched products."""
    made = cast(sample, torch.float64)
    if hasattr(made.model, "set_experts_implementation"):
        made.model.set_experts_implementation("batched_mm")
    return made


@pytest.mark.parametrize("name", sweep(list(ZOO), FAST_FLOAT32))
def test_training_step_in_float32(name: str, no_fallbacks: None) -> None:
    sample = build(name)
    reference = train_step(reference_of(sample), eager)
    other = train_step(cast(sample, torch.float32), inductor)
    torch._dynamo.reset()
    found = train_step(sample, effcc_backend())
    assert_as_near_as_inductor(found, other, reference, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ZOO))
def test_forward_in_float32(name: str, no_fallbacks: None) -> None:
    sample = build(name)
    reference = evaluate(reference_of(sample), eager)
    other = evaluate(cast(sample, torch.float32), inductor)
    torch._dynamo.reset()
    assert_as_near_as_inductor(evaluate(sample, effcc_backend()), other, reference, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ZOO))
def test_training_step_in_bfloat16(name: str, no_fallbacks: None) -> None:
    sample = cast(build(name), torch.bfloat16)
    reference = train_step(reference_of(sample), eager)
    other = train_step(cast(sample, torch.bfloat16), inductor)
    torch._dynamo.reset()
    found = train_step(sample, effcc_backend())
    assert_as_near_as_inductor(found, other, reference, torch.bfloat16)


@pytest.mark.parametrize("name", sweep([name for name in WITH_LAYERS if name != "t5"], FAST_FLOAT32))
def test_marked_layers_are_compiled_once(name: str, mark_layers: Callable[[str], None], no_fallbacks: None) -> None:
    """Layers marked with ``nested_compile_region``: regions called more than once, same results. (T5's layer returns
    one of its inputs, and Dynamo refuses that for a marked region, whatever the backend.)"""
    sample = build(name)
    reference = train_step(reference_of(sample), eager)
    other = train_step(cast(sample, torch.float32), inductor)
    torch._dynamo.reset()
    mark_layers(name)
    found = train_step(sample, effcc_backend())
    assert_as_near_as_inductor(found, other, reference, torch.float32)
    for phase in ("forward", "backward"):
        calls = [region.calls for report in effcc.reports() if report.phase == phase for region in report.regions]
        assert max(calls) >= 2, f"no region of the {phase} is called twice: {calls}"


@pytest.mark.parametrize("name", sweep(["gpt2", "llama", "bert", "vit"], ()))
def test_layers_found_or_not_give_equal_results(name: str, no_fallbacks: None) -> None:
    """``repeated_modules`` on and off: both float64 eager's results, up to what the model casts inside."""
    results = []
    for repeated in (False, True):
        torch._dynamo.reset()
        sample = cast(build(name), torch.float64)
        results.append(train_step(sample, effcc_backend(repeated_modules=repeated)))
    if ZOO[name].casts:
        assert_as_near_as_inductor(results[1], results[0], results[0], torch.float32)
    else:
        assert_float64_equal(results[1], results[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOAT64)
def test_several_steps_of_an_optimizer_in_float64(name: str) -> None:
    """Five steps of AdamW: the parameters stay together, so no state of an earlier step leaks into a later one."""
    results = []
    for compiler in (eager, effcc_backend()):
        sample = cast(build(name), torch.float64)
        sample.model.train()
        run = compiler(sample.model)
        optimizer = torch.optim.AdamW(sample.model.parameters(), lr=1e-3, eps=1e-4)
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(run(**sample.inputs), sample.target).backward()
            optimizer.step()
        results.append({name: value.detach() for name, value in sample.model.named_parameters()})
    for name_, value in results[0].items():
        assert distance(results[1][name_], value) <= 1e-9 * max(1.0, magnitude(value)), name_
