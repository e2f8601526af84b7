# SPDX-License-Identifier: Apache-2.0
"""Patch compression: what is drawn stays inside one patch, and is what the answer says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vtprune.errors import InputError
from vtprune.lens import patches
from vtprune.lens.compression import BACKGROUNDS, COLORS, KINDS, MARGIN


@pytest.mark.parametrize("size", [14, 28])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_leaves_its_patch(kind: str, size: int) -> None:
    found = list(patches(kind, 40, 6, 8, size, seed=1))
    assert len({(p.answer, p.color, p.background) for p in found}) > 5
    for item in found:
        pixels = np.asarray(item.picture)
        assert pixels.shape == (6 * size, 8 * size, 3)
        drawn = (pixels != BACKGROUNDS[item.background]).any(2)
        rows, columns = np.nonzero(drawn)
        assert len(rows) >= 4
        assert item.row * size + MARGIN <= rows.min() and rows.max() < (item.row + 1) * size - MARGIN
        assert item.column * size + MARGIN <= columns.min() and columns.max() < (item.column + 1) * size - MARGIN
        assert {tuple(p) for p in pixels[drawn]} == {COLORS[item.color]}  # no antialiasing
        if kind == "count":
            cell = drawn[item.row * size :, item.column * size :][:size, :size]
            half = size // 2
            quarters = [cell[y : y + half, x : x + half].any() for y in (0, half) for x in (0, half)]
            assert sum(quarters) == int(item.answer)
        assert item.answer == item.color or kind != "color"


def test_the_same_again_and_first_of_more() -> None:
    a, b = list(patches("color", 5)), list(itertools.islice(patches("color", 50), 5))
    assert [(x.answer, x.row, x.column) for x in a] == [(x.answer, x.row, x.column) for x in b]
    assert [x.row for x in patches("color", 5, seed=1)] != [x.row for x in a]
    for bad in ({"kind": "smell"}, {"kind": "color", "patch": 4}, {"kind": "color", "rows": 0}):
        with pytest.raises(InputError):
            next(patches(count=1, **bad))  # type: ignore[arg-type]
