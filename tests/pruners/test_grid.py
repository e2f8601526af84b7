# SPDX-License-Identifier: Apache-2.0
"""`grid`: the lattice is exact in number, even, centred, and the plain one where there is a plain one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import make_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.budget import Budget
from vtprune.pruners import grid
from vtprune.registry import build
from vtprune.tokens import VisualTokens


def lattice(h: int, w: int, keep: float | int) -> list[tuple[int, int]]:
    tokens = make_tokens([[[(h, w)]]])
    index = build("grid", {}).select(tokens, Budget(keep)).index.tolist()
    return [divmod(i, w) for i in index]


def product(rows: range, cols: range) -> list[tuple[int, int]]:
    return [(row, col) for row in rows for col in cols]


@pytest.mark.parametrize(
    "h,w,keep,expected",
    [
        (24, 24, 1 / 4, product(range(1, 24, 2), range(1, 24, 2))),
        (24, 24, 1 / 9, product(range(1, 24, 3), range(1, 24, 3))),
        (24, 24, 1 / 16, product(range(2, 24, 4), range(2, 24, 4))),
        (12, 24, 1 / 4, product(range(1, 12, 2), range(1, 24, 2))),
        (30, 10, 1 / 25, product(range(2, 30, 5), range(2, 10, 5))),
        (24, 24, 1.0, product(range(24), range(24))),
        (5, 7, 1, [(2, 3)]),
        (1, 9, 3, [(0, 1), (0, 4), (0, 7)]),
        (9, 1, 3, [(1, 0), (4, 0), (7, 0)]),
        # No plain lattice: two rows of which the lower has one token more.
        (9, 9, 3, [(2, 4), (6, 2), (6, 6)]),
        (9, 9, 5, [(2, 2), (2, 6), (6, 1), (6, 4), (6, 7)]),
    ],
    ids=str,
)
def test_lattices_by_hand(h: int, w: int, keep: float, expected: list[tuple[int, int]]) -> None:
    assert lattice(h, w, keep) == expected


@settings(max_examples=150)
@given(st.data(), st.integers(1, 30), st.integers(1, 30))
def test_any_count_of_any_shape_is_spread_evenly(data: st.DataObject, h: int, w: int) -> None:
    k = data.draw(st.integers(1, h * w))
    points = lattice(h, w, k)
    assert len(set(points)) == k

    rows, in_row = np.unique([row for row, _ in points], return_counts=True)
    assert in_row.max() - in_row.min() <= 1
    r = len(rows)
    # Rows, and tokens in each row, are the middles of equal parts.
    assert rows.tolist() == [int((i + 0.5) * h / r + 1e-9) for i in range(r)]
    for row, n in zip(rows, in_row, strict=True):
        assert [col for at, col in points if at == row] == [int((j + 0.5) * w / n + 1e-9) for j in range(n)]

    # No other number of rows would make the steps down and across more alike.
    def skew(r: int) -> float:
        return abs(np.log((h / r) / (w * r / k)))

    possible = [r for r in range(1, min(h, k) + 1) if -(-k // r) <= w]
    assert skew(r) <= min(map(skew, possible)) + 1e-9


def test_every_segment_has_its_lattice() -> None:
    tokens = make_tokens([[[(4, 4), (8, 8)]], [[(4, 4)]]])
    selection = build("grid", {}).select(tokens, Budget(0.25))
    small, large = (
        [r * 4 + c for r in (1, 3) for c in (1, 3)],
        [r * 8 + c for r in range(1, 8, 2) for c in range(1, 8, 2)],
    )
    assert selection.index.tolist() == [*small, *(16 + i for i in large), *(80 + i for i in small)]
    assert selection.cu_seqlens.tolist() == [0, 4, 20, 24]
    # A lattice needs no competition between segments: sharing the budget changes nothing where shares are whole.
    for shared in (Budget(0.25, allocation="pooled"), Budget(0.25, scope="joint")):
        assert torch.equal(build("grid", {}).select(tokens, shared).index, selection.index)


def cut(tokens: VisualTokens, keep: torch.Tensor) -> VisualTokens:
    """Only these rows of a picture, as an unpadded view or an earlier stage would leave them."""
    return replace(
        tokens,
        features=tokens.features[keep],
        coords=tokens.coords[keep],
        source=tokens.source[keep],
        seqlens=(int(keep.sum()),),
    )


def test_an_unpadded_view_is_a_rectangle_of_its_own() -> None:
    tokens = make_tokens([[[(24, 24)]]])
    columns = tokens.coords[:, 2]
    narrow = cut(tokens, (columns >= 6) & (columns < 18))  # 24 x 12, although its grid is 24 x 24
    index = build("grid", {}).select(narrow, Budget(0.25)).index
    expected = product(range(1, 24, 2), range(7, 18, 2))
    assert [(int(r), int(c)) for _, r, c in narrow.coords[index].tolist()] == expected


def test_interpolated_coordinates() -> None:
    tokens = make_tokens([[[(12, 8)]]])
    stretched = replace(tokens, coords=tokens.coords * 1.37 + 0.185)
    pick = build("grid", {}).select
    assert torch.equal(pick(stretched, Budget(0.3)).index, pick(tokens, Budget(0.3)).index)


@pytest.mark.parametrize("keep", [1, 7, 50, 100])
def test_what_an_earlier_stage_left_over_is_thinned_out_in_order(keep: int) -> None:
    tokens = make_tokens([[[(20, 20)]]])
    rest = cut(tokens, torch.rand(400) < 0.4)
    n = rest.seqlens[0]
    index = build("grid", {}).select(rest, Budget(keep)).index
    assert len(set(index.tolist())) == min(keep, n)
    gaps = index.diff(prepend=torch.tensor([-1]), append=torch.tensor([n]))
    assert int(gaps.max()) <= -(-n // keep) + 1


def test_the_default_device_does_not_matter() -> None:
    with torch.device("meta"):
        index = grid._known((35,), (7,), (1,), torch.device("cpu"))
    assert index.tolist() == [17]
