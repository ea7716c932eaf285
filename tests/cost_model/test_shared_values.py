"""What is worth storing for those who read it: the prices on made up values and devices."""

from __future__ import annotations

from effcc.cost_model.devices import Figure, load_device
from effcc.cost_model.shared_values import SharedValue, better_stored
from msgspec.structs import replace

CPU = load_device("cpu")


def mask(**changes: object) -> SharedValue:
    """A mask of floats for all layers and heads of a transformer."""
    of = SharedValue(
        512 * 512, 4 * 512 * 512, False, 12, frozenset({"where", "le", "load"}), (8 * 512 * 512,) * 12, 8 << 20
    )
    return of._replace(**changes)


def test_a_mask_for_many_heads_is_stored() -> None:
    assert better_stored(mask(), CPU)


def test_what_is_nearly_nothing_to_compute_is_not_stored() -> None:
    assert not better_stored(mask(ops=1, functions=frozenset({"load"})), CPU)


def test_a_function_makes_it_worth_storing() -> None:
    added = {"sin": Figure(value=2e-9, source="a test"), "statement": Figure(value=1e-12, source="a test")}
    slow = replace(CPU, added=added)
    assert better_stored(mask(ops=3, functions=frozenset({"cos"})), slow)
    assert not better_stored(mask(ops=3, functions=frozenset({"neg"})), slow)


def test_what_is_read_as_often_as_it_is_made_is_not_stored() -> None:
    assert not better_stored(mask(reads=(512 * 512,)), CPU)


def test_what_is_not_small_beside_its_readers_is_not_stored() -> None:
    assert not better_stored(mask(read_bytes=4 * 512 * 512), CPU)


def test_booleans_that_are_read_lane_by_lane_are_not_stored() -> None:
    slow = replace(
        CPU, added={"mask_read": Figure(value=1e-8, source="a test"), "mask_write": Figure(value=1e-8, source="a test")}
    )
    assert better_stored(mask(boolean=True, bytes=512 * 512), CPU)
    assert not better_stored(mask(boolean=True, bytes=512 * 512), slow)


def test_a_gpu_computes_it_again() -> None:
    assert not better_stored(mask(), load_device("h100"))
