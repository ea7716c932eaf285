"""Parallel training steps: counts against published ones, invariants, and the simulator of pipelines as a witness."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from effcc.cost_model.devices import Device, Figure, load_device
from effcc.cost_model.parallel_training import constants, fitting, rows
from effcc.cost_model.parallel_training.memory import rank_parameters, saved_by_layer, step_memory
from effcc.cost_model.parallel_training.mesh import Mesh, group_cost, parse_mesh
from effcc.cost_model.parallel_training.seconds import latency_ratio, work_time
from effcc.cost_model.parallel_training.setup import Training
from effcc.cost_model.parallel_training.shape import TransformerShape, shape_from_config
from effcc.cost_model.parallel_training.step import predict_step
from effcc.cost_model.parallel_training.work import Work
from effcc.errors import DeviceError, KernelDataError, OptionError
from fresh_seed import fresh_random

A100 = load_device("a100-80g")
GPT3 = TransformerShape(96, 12288, 96, 4 * 12288, 51200, 2048, positions=2048, tied=True, dropout=True)
LLAMA_405B = {
    "num_hidden_layers": 126, "hidden_size": 16384, "num_attention_heads": 128, "num_key_value_heads": 8,
    "intermediate_size": 53248, "vocab_size": 128256, "max_position_embeddings": 8192, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 5e5,
}  # fmt: skip
MIXTRAL = {
    "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 32000, "max_position_embeddings": 4096, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
GPT2 = {
    "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024, "n_inner": None,
    "activation_function": "gelu_new", "tie_word_embeddings": True, "attn_pdrop": 0.1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "published"),
    [(LLAMA_405B, 405_853_388_800), (MIXTRAL, 46_702_792_704), (GPT2, 124_439_808)],
    ids=["llama-3.1-405b", "mixtral-8x7b", "gpt2"],
)
def test_parameters_are_the_published_ones(config: dict[str, object], published: int) -> None:
    assert shape_from_config(config).parameters == published


def test_a_configuration_that_lacks_a_size_is_refused() -> None:
    with pytest.raises(OptionError, match="heads"):
        shape_from_config({"num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 10, "n_positions": 4})


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_saved_activations_are_those_of_the_published_formula(shards: int) -> None:
    """Korthikanti et al., equations 1, 4 and 6: s·b·h·(34 + 5·a·s/h) / t, 34·s·b·h / t, 2·s·b·h / t."""
    tokens, scores = 3 * GPT3.sequence * GPT3.hidden, 3 * GPT3.heads * GPT3.sequence**2
    for recompute, bytes_ in (("none", 34 * tokens + 5 * scores), ("selective", 34 * tokens), ("full", 2 * tokens)):
        training = Training(GPT3, Mesh(tp=shards), samples=3, recompute=recompute, dtype="f16", fused_attention=False)
        assert saved_by_layer(training) == pytest.approx(bytes_ / shards)


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=8), Mesh(pp=5), Mesh(tp=4, pp=3)])
def test_ranks_hold_each_parameter_once(mesh: Mesh) -> None:
    """Ties are broken across a pipeline: the last stage has a copy of the table."""
    training = Training(GPT3, mesh, microbatches=8)
    held = sum(rank_parameters(training, stage) for stage in range(mesh.pp)) * mesh.tp
    copies = GPT3.vocabulary * GPT3.hidden if mesh.pp > 1 else 0
    assert held == pytest.approx(GPT3.parameters + copies - GPT3.norm_parameters)


def _random_training(generator: random.Random) -> Training:
    heads = generator.choice([8, 16])
    shape = TransformerShape(
        layers=generator.choice([8, 16]), hidden=heads * 64, heads=heads, kv_heads=generator.choice([heads, 8]),
        feed_forward=generator.choice([2, 4]) * heads * 64, vocabulary=32000, sequence=generator.choice([512, 2048]),
        gated=generator.random() < 0.5, tied=generator.random() < 0.5, dropout=generator.random() < 0.5,
    )  # fmt: skip
    mesh = Mesh(
        dp=generator.choice([1, 2, 8]), tp=generator.choice([1, 2, 4]), pp=generator.choice([1, 2, 4]),
        cp=generator.choice([1, 2]), fsdp=generator.choice([1, 4]),
    )  # fmt: skip
    return Training(
        shape, mesh, samples=generator.choice([1, 4]), microbatches=generator.choice([1, 4, 16]),
        recompute=generator.choice(["none", "selective", "full"]), sequence_parallel=generator.random() < 0.5,
        zero=generator.choice([0, 1, 2]), fused_attention=generator.random() < 0.5,
        dtype=generator.choice(["bf16", "f32"]),
    )  # fmt: skip


def _links(device: Device, factor: float, scope: str) -> Device:
    links = tuple(
        msgspec.structs.replace(link, bandwidth=Figure(value=link.bandwidth.value * factor, source="test"))
        if link.scope == scope else link
        for link in device.links
    )  # fmt: skip
    return msgspec.structs.replace(device, links=links)


def test_invariants_of_random_steps() -> None:
    generator = fresh_random()
    for _ in range(60):
        training = _random_training(generator)
        made = predict_step(training, A100)
        where = str(training)
        assert made.seconds == pytest.approx(sum(made.parts.values())), where
        assert sum(made.shares.values()) == pytest.approx(1.0), where
        assert 0 < made.mfu < 1 and made.low < made.seconds < made.high, where
        for scope in ("node", "cluster"):
            assert predict_step(training, _links(A100, 2.0, scope)).seconds <= made.seconds * (1 + 1e-9), where
        faster = msgspec.structs.replace(
            A100, matrix={k: Figure(value=2 * f.value, source="test") for k, f in A100.matrix.items()}
        )
        assert predict_step(training, faster).seconds <= made.seconds * (1 + 1e-9), where
        more = replace(training, microbatches=2 * training.microbatches)
        assert predict_step(more, A100).seconds > made.seconds, where
        if training.mesh.tp < 4:
            wider = replace(training, mesh=replace(training.mesh, tp=2 * training.mesh.tp))
            assert step_memory(wider).total < made.memory.total, where
        repeated = [step_memory(replace(training, recompute=each)).activations for each in ("none", "selective")]
        assert repeated[1] <= repeated[0], where
        sharded = [step_memory(replace(training, zero=each)).total for each in (0, 1, 2)]
        assert sharded == sorted(sharded, reverse=True), where


@pytest.mark.parametrize(("ranks", "count", "chunks"), [(2, 4, 1), (4, 8, 1), (8, 32, 1), (4, 8, 2), (4, 16, 3)])
def test_the_bubble_is_the_pipeline_simulators(ranks: int, count: int, chunks: int) -> None:
    """The closed form against the orders of 1F1B and interleaved 1F1B, run pass by pass."""
    from effcc.passes.pipeline_parallel.classic import interleaved, one_forward_one_backward
    from effcc.passes.pipeline_parallel.costs import PipelineCosts
    from effcc.passes.pipeline_parallel.simulate import simulate

    shape = replace(GPT3, layers=ranks * chunks * 2, vocabulary=8, tied=False, positions=0)
    training = Training(shape, Mesh(pp=ranks), microbatches=count, interleave=chunks)
    made = predict_step(training, A100)
    busy = sum(made.parts[name] for name in ("forward", "backward", "recompute", "tensor", "host")) / count
    stages = ranks * chunks
    costs = PipelineCosts(forward=(busy / 3 / chunks,) * stages, backward=(2 * busy / 3 / chunks,) * stages)
    schedule = interleaved(ranks, count, chunks) if chunks > 1 else one_forward_one_backward(ranks, count)
    run = simulate(schedule, costs)
    assert made.parts["bubble"] == pytest.approx(run.seconds - count * busy, rel=0.02)


def test_a_group_leaves_its_node_where_counting_says_so() -> None:
    """Every group of every axis of random meshes, member by member."""
    generator = fresh_random()
    slow = _links(A100, 1e-3, "cluster")
    for _ in range(40):
        mesh = Mesh(*(generator.choice([1, 2, 4, 8]) for _ in range(4)))
        for axis in ("dp", "tp", "pp", "cp"):
            size, stride = getattr(mesh, axis), mesh.stride(axis)
            groups = {tuple(start + step * stride for step in range(size)) for start in range(stride)}
            leaves = any(len({rank // 8 for rank in group}) > 1 for group in groups)
            cost = [group_cost("all_reduce", 1e8, size, stride, device).seconds for device in (A100, slow)]
            assert (cost[1] > cost[0]) == leaves, (mesh, axis)


def test_a_mesh_that_needs_a_missing_link_is_refused() -> None:
    training = Training(GPT3, Mesh(tp=2))
    with pytest.raises(DeviceError, match="link"):
        predict_step(training, msgspec.structs.replace(A100, links=()))


@pytest.mark.parametrize("text", ["tp", "tp=0", "tp=2,tp=2", "xp=2", "tp=two", ""])
def test_meshes_that_are_not_understood(text: str) -> None:
    with pytest.raises(OptionError, match="mesh"):
        parse_mesh(text)


@pytest.mark.parametrize(
    "wrong",
    [{"mesh": Mesh(tp=5)}, {"mesh": Mesh(pp=97)}, {"recompute": "some"}, {"dtype": "i8"}, {"interleave": 2},
     {"mesh": Mesh(dp=2, ep=2)}, {"mesh": Mesh(cp=3)}, {"zero": 3}, {"microbatches": 0}],
)  # fmt: skip
def test_steps_that_cannot_be_run_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        Training(**({"shape": GPT3, "mesh": Mesh()} | wrong))


def test_experts_are_spread_and_their_tokens_sent() -> None:
    shape = shape_from_config(MIXTRAL)
    alone, spread = (predict_step(Training(shape, Mesh(dp=8, ep=each)), A100) for each in (1, 8))
    assert alone.parts["expert"] == 0 < spread.parts["expert"]
    assert spread.memory.parameters < alone.memory.parameters / 4


def test_the_packaged_constants_say_where_they_come_from(tmp_path: Path) -> None:
    made = constants.packaged()
    assert set(made.provenance["files"]) == {cluster.file for cluster in fitting.CLUSTERS}
    for name, (low, high) in constants.BOUNDS.items():
        assert low <= getattr(made.constants, name) <= high
    again = constants.decode(constants.encode(made), "here")
    assert constants.encode(again) == constants.encode(made)
    assert constants.encode(made) == constants.PACKAGED.read_bytes()


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b'{"format": 2}', b'{"format": 1, "band": {"seen": 1}, "constants": {"x": 1}}']
)
def test_a_damaged_calibration_is_refused(damage: bytes) -> None:
    with pytest.raises(KernelDataError):
        constants.decode(damage, "file.json")


HEADER = (
    "# GPUs,global batch,micro batch,hidden size,attention heads,# layers,sequence length,tensor parallelism,"
    "data parallelism,pipeline parallelism,iteration time (ms)\n"
)


def test_rows_are_read_and_wrong_ones_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(HEADER + "8,8,2,2048,16,24,1024,4,1,2,188.6\n")
    (row,) = rows.read(path, "none")
    assert (row.seconds, row.training.microbatches, row.training.mesh) == (0.1886, 4, Mesh(tp=4, pp=2))
    path.write_text(HEADER + "8,8,2,2048,16,24,1024,4,1,2,fast\n")
    with pytest.raises(KernelDataError, match="number"):
        rows.read(path, "none")
    path.write_text("a,b\n1,2\n")
    with pytest.raises(KernelDataError, match="global batch"):
        rows.read(path, "none")


@pytest.mark.slow
def test_the_fit_finds_constants_that_made_the_rows() -> None:
    generator = fresh_random()
    truth = constants.Constants(product=0.9, memory=0.7, host_launch=5e-5, node_link=0.6, exponent=4.0)
    samples = []
    for line in range(48):
        training = replace(_random_training(generator), fused_attention=False, recompute="none")
        seconds = predict_step(training, A100, constants.Calibration(truth)).seconds
        samples.append(fitting.Sample(rows.MeasuredStep(training, seconds, "made", line), A100, 1.0, "made"))
    found = fitting.fit(samples)
    assert fitting.errors(samples, found)["made"]["error_percent"] < 1.0


@pytest.mark.parametrize(("size", "measured"), [(4096, 716e12), (6144, 741.1e12), (8192, 797.8e12)])
def test_products_on_h100_keep_the_share_that_they_have_on_a100(size: int, measured: float) -> None:
    """By the published rates of products alone, and the share of them that a step reaches on A100: 267.9
    TFLOP/s are published for 6912 x 16384 x 2048."""
    shares = constants.packaged().constants
    a100, h100 = load_device("a100-80g"), load_device("h100")

    def rate(rows: int, depth: int, columns: int, device: Device) -> float:
        work = Work("product", rows, depth, columns)
        return 2.0 * rows * depth * columns / work_time([work], "bf16", device, shares).compute

    share = rate(6912, 2048, 16384, a100) / 267.9e12
    assert rate(size, size, size, h100) / measured == pytest.approx(share, rel=0.04)
    assert latency_ratio("bf16", a100) == pytest.approx(1.0)
    assert latency_ratio("f32", h100) == latency_ratio("bf16", load_device("tpu-v4i-like")) == 1.0
