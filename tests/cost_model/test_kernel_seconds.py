"""The learned kernel times within the roofline: where they apply, that they are the kernel model's, and their band."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from effcc.cost_model.devices import Figure, load_device
from effcc.cost_model.error_band import band_and_flop
from effcc.cost_model.kernel_time import gpus, model_file, rows
from effcc.cost_model.kernel_time.model import predict
from effcc.cost_model.roofline import gemm_seconds, op_cost
from effcc.ir.graph import Graph
from effcc.ir.parser import parse_graph

H100 = load_device("h100")


def product(dtype: str = "f32") -> Graph:
    return parse_graph(
        f"""graph @g phase=inference {{
  %x: {dtype}[4096,2048] = input()  role(input)
  %w: {dtype}[2048,8192] = input()  role(parameter)
  %y: {dtype}[4096,8192] = aten.mm.default(%x, %w)
  return (%y)
}}
"""
    )


def seconds(graph: Graph, device: object = H100) -> float:
    return op_cost(graph.by_name()["y"], graph, device).seconds  # type: ignore[arg-type]


def test_a_large_f32_product_takes_what_the_kernel_model_says() -> None:
    sizes = {name: np.array([float(size)]) for name, size in zip("BMNK", (1, 4096, 2048, 8192), strict=True)}
    asked = rows.Rows("linear", "h100", np.array([2.0]), sizes)
    said = predict(asked, gpus.find("h100"), model_file.load())
    # of milliseconds, the host's call and the launch are little
    assert seconds(product()) == pytest.approx(float(said.seconds[0]), rel=0.03)
    assert seconds(product()) == seconds(product())


def test_elsewhere_it_is_the_roofline() -> None:
    other = msgspec.structs.replace(H100, name="another")
    slower = msgspec.structs.replace(H100, vector=H100.vector | {"f32": Figure(value=3e13, source="test")})
    for device, dtype in ((other, "f32"), (slower, "f32"), (H100, "bf16"), (load_device("mi300x"), "f32")):
        wanted = gemm_seconds(1, 4096, 2048, 8192, dtype, device) + device.launch.value
        assert seconds(product(dtype), device) == pytest.approx(wanted)


def test_the_band_weighs_kernels_by_their_time() -> None:
    band, flop = band_and_flop([product()], H100, {}, (0.1, 9.0))
    assert flop == 2 * 4096 * 2048 * 8192
    assert 0.99 < band.learned < 1 and 0.1 < band.low < 1 < band.high < 9
    plain, _ = band_and_flop([product("bf16")], H100, {}, (0.5, 2.0))
    assert (plain.low, plain.high, plain.learned) == pytest.approx((0.5, 2.0, 0.0))
