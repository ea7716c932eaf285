"""Boosted regression trees as plain numbers: read from JSON and evaluated with numpy; nothing is executed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import KernelDataError

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Trees:
    """A sum of binary trees, flat: node ``i`` sends rows with ``x[feature[i]] <= threshold[i]`` to ``left[i]``, others
    to ``right[i]``; a leaf has feature -1 and its value in ``threshold``. ``roots`` are the trees' first nodes."""

    roots: Integers
    feature: Integers
    threshold: Array
    left: Integers
    right: Integers
    depth: int

    def predict(self, rows: Array) -> Array:
        """The sum over all trees, for each row of features."""
        total = np.zeros(len(rows))
        for begin in range(0, len(rows), 2048):
            total[begin : begin + 2048] = self._sum(rows[begin : begin + 2048])
        return total

    def _sum(self, rows: Array) -> Array:
        node = np.broadcast_to(self.roots, (len(rows), len(self.roots))).copy()
        number = np.arange(len(rows))[:, None]
        for _ in range(self.depth):
            feature = self.feature[node]
            inner = feature >= 0
            if not inner.any():
                break
            low = rows[number, np.maximum(feature, 0)] <= self.threshold[node]
            node = np.where(inner, np.where(low, self.left[node], self.right[node]), node)
        return np.asarray(self.threshold[node].sum(axis=1))


def to_json(trees: Trees) -> dict[str, Any]:
    return {
        "roots": trees.roots.tolist(),
        "feature": trees.feature.tolist(),
        "threshold": [float(f"{value:.5g}") for value in trees.threshold.tolist()],
        "left": trees.left.tolist(),
        "right": trees.right.tolist(),
    }


def from_json(value: Mapping[str, Any], features: int, where: str) -> Trees:
    """Checked trees; raises KernelDataError where they are not trees over that many features."""
    try:
        roots, feature, left, right = (np.array(value[k], np.int32) for k in ("roots", "feature", "left", "right"))
        threshold = np.array(value["threshold"], np.float64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise KernelDataError(f"not trees: {error!r}", where=where, remedy="make the model again") from error
    count = len(feature)
    inner = feature >= 0
    numbers = np.arange(count)
    sound = (
        feature.shape == left.shape == right.shape == threshold.shape
        and roots.ndim == feature.ndim == 1
        and bool(np.isfinite(threshold).all())
        and bool(((roots >= 0) & (roots < count)).all())
        and bool((feature[inner] < features).all())
        # children come after their parent, so that a walk ends
        and all(bool(((side[inner] > numbers[inner]) & (side[inner] < count)).all()) for side in (left, right))
    )
    if not sound:
        raise KernelDataError("not trees: nodes point astray", where=where, remedy="make the model again")
    return Trees(roots, feature, threshold, left, right, _depth(feature, left, right))


def _depth(feature: Integers, left: Integers, right: Integers) -> int:
    level = np.zeros(len(feature), np.int32)
    for node in range(len(feature)):
        if feature[node] >= 0:
            for child in (left[node], right[node]):
                level[child] = max(level[child], level[node] + 1)
    return int(level.max(initial=0)) + 1


def from_lightgbm(dump: Mapping[str, Any]) -> Trees:
    """Trees of ``Booster.dump_model()``: numerical splits ``<=``, no missing values."""
    roots: list[int] = []
    feature: list[int] = []
    threshold: list[float] = []
    left: list[int] = []
    right: list[int] = []

    def add(node: Mapping[str, Any]) -> int:
        place = len(feature)
        leaf = "split_feature" not in node
        feature.append(-1 if leaf else int(node["split_feature"]))
        threshold.append(float(node["leaf_value"] if leaf else node["threshold"]))
        left.append(0)
        right.append(0)
        if not leaf:
            left[place] = add(node["left_child"])
            right[place] = add(node["right_child"])
        return place

    for tree in dump["tree_info"]:
        roots.append(add(tree["tree_structure"]))
    arrays = [np.array(values, np.int32) for values in (roots, feature, left, right)]
    numbers = np.array([float(f"{value:.5g}") for value in threshold], np.float64)
    return Trees(arrays[0], arrays[1], numbers, arrays[2], arrays[3], _depth(arrays[1], arrays[2], arrays[3]))
