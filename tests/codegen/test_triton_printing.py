"""What Triton kernels look like: where masks, scales, transposes and conversions end up. Nothing is run."""

from __future__ import annotations

import re

import pytest
from attention_cascades import BACKWARD, FORWARD
from effcc.codegen.tiles.errors import NotLowerable
from effcc.codegen.triton_tiles.kernel import TritonKernel, prepare_triton
from effcc.codegen.triton_tiles.schedule import Launch
from effcc.codegen.triton_tiles.target import Target
from effcc.ir.cascade_parser import parse_cascade
from effcc.ir.tile import Cases, Skip, walk

HOPPER = Target.of_capability(90)
_SIZES = {"b": 4, "h": 16, "m": 2048, "n": 2048, "d": 64, "f": 64, "W": 256}


def kernel(text: str, dtype: str = "bf16", launches: Launch | None = None, **sizes: int) -> TritonKernel:
    dtypes = {**dict.fromkeys(("Q", "K", "V", "O", "DO", "DQ", "DK", "DV"), dtype), "START": "i64"}
    return prepare_triton(parse_cascade(text), {**_SIZES, **sizes}, dtypes, target=HOPPER, launches=launches)


def loops(text: str) -> list[str]:
    """The bodies of the loops, in order."""
    found: list[list[str]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("    for "):
            found.append([])
            inside = True
        elif inside and line.startswith("        "):
            found[-1].append(line)
        else:
            inside = False
    return ["\n".join(lines) for lines in found]


def test_one_loop_where_nothing_is_masked() -> None:
    (body,) = loops(kernel(FORWARD["vanilla"]).steps[0].function.text)
    assert "tl.where" not in body.replace("tl.where((v_GM", "")  # but for rows that have seen nothing
    assert "mask=" not in body


def test_tiles_below_the_diagonal_have_no_mask() -> None:
    whole, diagonal = loops(kernel(FORWARD["causal"]).steps[0].function.text)
    assert "i_n" not in whole
    assert "(i_n[None, :] <= i_m[:, None])" in diagonal


def test_a_window_has_a_loop_on_either_side() -> None:
    before, whole, behind = loops(kernel(FORWARD["window"]).steps[0].function.text)
    assert "z_W" in before and "z_W" in behind
    assert "z_W" not in whole


def test_the_last_tile_of_an_uneven_length_is_masked_by_itself() -> None:
    whole, last = loops(kernel(FORWARD["vanilla"], n=2000).steps[0].function.text)
    assert "mask=" not in whole
    assert "mask=" in last


def test_a_mask_of_a_mask_is_decided_with_it() -> None:
    """``where(where(n <= m, 1, 0) == 0, -inf, S)``: skipped above the diagonal, and plain below it."""
    made = kernel(FORWARD["causal, mask of a mask"])
    statements = list(walk(made.programs[0].body))
    assert any(isinstance(item, Skip) for item in statements)
    assert any(isinstance(item, Cases) for item in statements)
    whole, _ = loops(made.steps[0].function.text)
    assert "i_n" not in whole


def test_scale_and_base_of_the_exponential_are_one_factor() -> None:
    source = kernel(FORWARD["vanilla"]).steps[0].function.text
    assert "0.18033688" in source  # log2(e) / 8
    assert "tl.exp(" not in source


def test_finite_masks_are_not_scaled_by_it() -> None:
    """The least finite number times log2(e) is an infinity, and the difference of two such is no number."""
    least = FORWARD["causal, finite mask"].replace("-1e9", "-3.4028234663852886e38")
    source = kernel(least).steps[0].function.text
    assert re.search(r"tl\.exp2\(.* \* 1\.442695", source)
    assert "-4.9" not in source  # the least number times log2(e)


def test_keys_are_read_once_however_they_are_used() -> None:
    for step in kernel(BACKWARD["vanilla"]).steps:
        (body,) = loops(step.function.text)
        assert body.count("tl.load") == 4 if "t_DK" in step.function.text else 2
        assert "tl.trans" in body


def test_weights_take_the_type_of_values() -> None:
    assert "tl.cast(v_Shared, tl.bfloat16)" in kernel(FORWARD["vanilla"]).steps[0].function.text
    plain = kernel(FORWARD["vanilla"], "f32").steps[0].function.text
    assert "bfloat16" not in plain
    assert 'input_precision="tf32x3"' in plain


def test_descriptors_stand_for_pointers() -> None:
    described = kernel(FORWARD["causal"], launches=Launch(8, 3, descriptors=True)).steps[0]
    assert {name for name, _ in described.function.descriptors} == {"Q", "K", "V"}
    assert "tl.load" not in described.function.text
    assert described.plain is not None and "tl.load" in described.plain.text


def test_equal_texts_for_other_lengths() -> None:
    """Lengths and strides are arguments: what changes the text is whether tiles fit."""
    names = {kernel(FORWARD["causal"], m=n, n=n).steps[0].function.name for n in (2048, 4096, 8192)}
    assert len(names) == 1
    assert kernel(FORWARD["causal"], m=2049, n=2049).steps[0].function.name not in names


def test_one_row_is_cut_into_parts() -> None:
    made = kernel(FORWARD["vanilla"], b=1, h=8, m=1, n=65536)
    assert len(made.programs) == 2
    assert made.steps[0].blocks >= 3 * HOPPER.units


def test_tiles_too_large_for_registers_are_refused() -> None:
    text = "QK[m,n] = sum[d] Q[m,d] * K[n,d]\nO[m,f,g] = sum[n] exp(QK[m,n]) * V[n,f,g]\n"
    with pytest.raises(NotLowerable, match="elements"):
        prepare_triton(parse_cascade(text), {"m": 999, "n": 999, "d": 64, "f": 512, "g": 512}, "f32", target=HOPPER)
