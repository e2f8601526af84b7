# SPDX-License-Identifier: Apache-2.0
"""Methods and budgets for clips, worked out by hand: `evs`, `vidcom2`, `frames`, and what each frame keeps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import NoHostSync, PeakBytes, make_tokens
from torch import Tensor

import vtprune
from vtprune.budget import Budget
from vtprune.pruners.frames import spread
from vtprune.pruners.vidcom2 import ALPHAS
from vtprune.tokens import VisualTokens


def clip(frames: list[Tensor]) -> VisualTokens:
    """One clip of frames of one row each."""
    grid = [(1, len(frames[0]))] * len(frames)
    return make_tokens([[grid]], features=torch.cat(frames), kind="frame")


def kept(tokens: VisualTokens, method: str, **settings: object) -> list[int]:
    return vtprune.select(tokens, method, **settings).index.tolist()


def east(*turns: float) -> Tensor:
    """Rows in the plane, turned by so many degrees."""
    return torch.stack([torch.tensor([math.cos(math.radians(t)), math.sin(math.radians(t))]) for t in turns])


def test_evs_keeps_the_first_frame_and_then_what_changed_most() -> None:
    tokens = clip([east(0, 0, 0), east(0, 60, 10), east(90, 61, 10)])
    # Changes: frame 1: 0, 60, 10 degrees; frame 2: 90, 1, 0. The first frame comes before all.
    assert kept(tokens, "evs", keep=4) == [0, 1, 2, 6]
    assert kept(tokens, "evs", keep=5) == [0, 1, 2, 4, 6]
    assert kept(tokens, "evs", keep=6) == [0, 1, 2, 4, 5, 6]
    assert kept(tokens, "evs", keep=7) == [0, 1, 2, 4, 5, 6, 7]
    scaled = replace(tokens, features=tokens.features * torch.arange(1, 10)[:, None])
    assert kept(scaled, "evs", keep=6) == kept(tokens, "evs", keep=6), "length is no change"


def test_evs_within_each_frame() -> None:
    tokens = clip([east(0, 0, 0), east(0, 60, 10), east(90, 61, 10)])
    picked = kept(tokens, "evs", keep=3, allocation="equal")
    assert picked[1:] == [4, 6] and picked[0] in (0, 1, 2)


def test_evs_of_a_picture_is_an_even_spread_and_clips_do_not_look_at_each_other() -> None:
    picture = make_tokens([[[(12, 12)]]], features=torch.ones(144, 4))
    for share in (0.5, 0.25, 1 / 9):
        rows = torch.tensor(kept(picture, "evs", keep=share))
        quarters = torch.stack([(rows // 12) // 6, (rows % 12) // 6], 1) @ torch.tensor([2, 1])
        counts = torch.bincount(quarters, minlength=4)
        assert int(counts.max() - counts.min()) <= 3, "an even spread leaves no quarter empty"
    two = make_tokens([[[(1, 2)] * 2, [(1, 2)] * 2]], features=east(0, 0, 0, 90, 0, 90, 0, 91), kind="frame")
    assert kept(two, "evs", keep=3) == [0, 1, 3, 4, 5, 7]


def test_evs_after_another_method_takes_what_lost_its_predecessor_for_new() -> None:
    tokens = clip([east(0, 0, 0), east(0, 0, 0)])
    index = torch.tensor([0, 2, 3, 4, 5])  # the middle of the first frame is gone
    left = tokens.subset(index, torch.tensor([0, 2, 5]))
    assert kept(left, "evs", keep=3) == [0, 1, 3]


def test_evs_never_prefers_what_is_broken() -> None:
    features = torch.cat([east(0, 0, 0), east(0, 90, 0)])
    features[0] = torch.nan
    tokens = clip([features[:3], features[3:]])
    assert 0 not in kept(tokens, "evs", keep=5)
    assert 3 in kept(tokens, "evs", keep=3), "what comes after a broken row counts as new"


def test_change_gives_frames_what_they_bring() -> None:
    tokens = clip([east(0, 0, 0, 0), east(0, 0, 0, 0), east(90, 90, 0, 0), east(90, 90, 60, 60)])
    # Mean changes 1 (the first counts as all new), 0, 1/2, 1/4.
    assert Budget(7, allocation="change").pools(tokens).counts == (4, 0, 2, 1)
    assert Budget(12, allocation="change").pools(tokens).counts == (4, 0, 4, 4)  # caps, then what is free of them
    still = clip([east(0, 0)] * 3)
    assert Budget(4, allocation="change").pools(still).counts == (2, 1, 1)


def test_change_reads_the_device_once_per_batch_of_tokens() -> None:
    tokens = clip([east(0, 10), east(20, 30)])
    budget = Budget(2, allocation="change")
    budget.pools(tokens)
    with NoHostSync():
        assert sum(budget.pools(tokens).counts) == 2


def likeness(row: Tensor, centre: Tensor) -> float:
    return sum(math.exp(-float((row - centre).square().sum()) / (2 * a)) for a in ALPHAS)


def test_vidcom2_by_hand() -> None:
    frames = [east(0, 5, 0, 2), east(0, 4, 1, 0), east(80, 0, 70, 90)]
    tokens = clip([2 * frames[0], frames[1], 3 * frames[2]])
    rows = torch.cat(frames)
    g = rows.mean(0)
    u = torch.tensor([-sum(likeness(x, g) for x in frame) / 4 for frame in frames], dtype=torch.float64)
    share = (1 + torch.softmax(u / 0.01, 0) - 1 / 3).tolist()
    assert share[2] > 1.6 > 0.7 > share[0]
    pools = Budget(6, allocation="vidcom2").pools(tokens)
    assert pools.counts == (2, 1, 3)  # 4 / 3, 4 / 3 and 10 / 3: what rounding leaves goes to the first
    scores = [-likeness(x, g) - likeness(x, frame.mean(0)) for frame in frames for x in frame]
    ranked = [sorted(range(f, f + 4), key=lambda row: (-round(scores[row], 9), row)) for f in (0, 4, 8)]
    best = [frame[:n] for frame, n in zip(ranked, pools.counts, strict=True)]
    assert kept(tokens, "vidcom2", keep=6) == sorted(row for frame in best for row in frame)
    found = vtprune.methods()["vidcom2"]().score(tokens)
    assert torch.allclose(found, torch.tensor(scores), atol=1e-5)


def test_vidcom2_is_the_same_alone_and_in_a_batch() -> None:
    samples = [[[(3, 4)] * 4], [], [[(2, 2)] * 3, [(4, 4)]]]
    batch = make_tokens(samples, kind="frame")
    whole = kept(batch, "vidcom2", keep=0.3)
    alone = make_tokens([samples[2]], features=batch.features[48:], kind="frame")
    assert [i for i in whole if i >= 48] == [i + 48 for i in kept(alone, "vidcom2", keep=0.3)]


@pytest.mark.parametrize(
    ("count", "lens", "expected"),
    [
        (8, (4, 4, 4, 4), (0, 4, 0, 4)),
        (4, (4, 4, 4), (0, 4, 0)),
        (6, (4, 4, 4), (2, 4, 0)),
        (3, (4, 4, 4), (0, 3, 0)),
        (12, (4, 4, 4), (4, 4, 4)),
        (11, (4, 4, 4), (4, 3, 4)),
        (0, (4, 4), (0, 0)),
        (5, (2, 0, 2, 2), (2, 0, 1, 2)),
    ],
)
def test_frames_are_kept_whole_and_spread_evenly(count: int, lens: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert sum(expected) == count
    assert spread(count, lens) == expected


def test_frames_keeps_all_of_a_frame_and_a_lattice_of_one_more() -> None:
    tokens = make_tokens([[[(4, 4)] * 4]], kind="frame")
    rows = kept(tokens, "frames", keep=20)
    frames = [[r - 16 * f for r in rows if r // 16 == f] for f in range(4)]
    assert sorted(map(len, frames)) == [0, 0, 4, 16]
    partial = next(frame for frame in frames if len(frame) == 4)
    assert partial == kept(make_tokens([[[(4, 4)]]]), "grid", keep=4)
    assert kept(tokens, "frames", keep=0.5, allocation="equal") == kept(tokens, "grid", keep=0.5, allocation="equal")


@pytest.mark.parametrize("method", ["evs", "vidcom2", "frames"])
@pytest.mark.parametrize("scope", ["per_image", "joint"])
def test_long_clips_in_bounded_memory(method: str, scope: str) -> None:
    """16,384 tokens: nothing of the size of all pairs is made."""
    tokens = make_tokens([[[(16, 16)] * 64]], dim=16, kind="frame")
    with PeakBytes() as peak:
        picked = kept(tokens, method, keep=0.1, scope=scope)
    assert len(picked) == 1638
    assert peak.bytes < 20 * tokens.features.nbytes < 16384**2
