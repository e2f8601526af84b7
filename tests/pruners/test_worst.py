# SPDX-License-Identifier: Apache-2.0
"""The bottom-k control keeps the other end of what a method would keep."""

from __future__ import annotations

import pytest
import torch
from helpers import make_tokens

import vtprune
from vtprune.budget import Budget
from vtprune.errors import ConfigError
from vtprune.registry import build


def test_of_a_score_the_lowest_stay_and_broken_rows_are_the_lowest() -> None:
    features = torch.tensor([[3.0], [1.0], [2.0], [1.0], [torch.nan], [5.0]])
    tokens = make_tokens([[[(1, 4)], [(1, 2)]]], features=features)
    selection = build("worst", {"of": "norm"}).select(tokens, Budget(0.5))
    assert selection.order.tolist() == [1, 3, 4] and selection.info == {"of": "norm"}


@pytest.mark.parametrize("of", ["divprune", "idpruner", "cdpruner", "scope"])
def test_of_a_greedy_method_the_last_picks_stay(of: str) -> None:
    tokens = make_tokens([[[(5, 5)], [(3, 4)]], [[(2, 3)]]], cls_row=True)
    every = build(of, {}).select(tokens, Budget(1.0)).order.tolist()
    worst = build("worst", {"of": of}).select(tokens, Budget(3)).order.tolist()
    assert worst == [*every[24:21:-1], *every[36:33:-1], *every[42:39:-1]]


def test_it_is_what_the_other_method_is() -> None:
    control = build("worst", {"of": "cdpruner"})
    assert control.query_aware and control.mechanism == ("similarity", "query") and not build("worst", {}).query_aware
    assert build("worst", {"of": "zoo"}).needs == build("zoo", {}).needs


@pytest.mark.parametrize("of", ["dart", "hiprune", "prumerge+", "tome", "vispruner", "visionzip"])
def test_without_an_order_what_is_dropped_first_stays(of: str) -> None:
    tokens = make_tokens([[[(5, 5)], [(3, 4)]], [[(2, 3)]], [[(1, 1)]]], cls_row=True)
    found = build("worst", {"of": of}).select(tokens, Budget(3))
    dropped: list[int] = []
    for image, (start, n) in enumerate([(0, 25), (25, 12), (37, 6)]):  # the last one has one token, which has to stay
        lens = [0, 0, 0, 0]
        lens[image] = n
        alone = tokens.subset(torch.arange(start, start + n), None, tuple(lens))
        best = build(of, {}).select(alone, Budget(n - 3)).index.tolist()
        dropped += [start + row for row in range(n) if row not in best]
    assert found.index.tolist() == [*dropped, 43] and found.order is None and found.features is None
    assert found.info == {"of": of} and found.cu_seqlens.tolist() == [0, 3, 6, 9, 10]


@pytest.mark.parametrize("of", ["tome", "visionzip", "prumerge+"])
def test_alone_as_in_a_batch_where_all_stays(of: str) -> None:
    """A sample that keeps all was given back as the other method would have it, merged rows and all."""
    both = build("worst", {"of": of}).select(make_tokens([[[(5, 5)]], [[(1, 2)]]], cls_row=True), Budget(3))
    alone = build("worst", {"of": of}).select(make_tokens([[[(1, 2)]]], cls_row=True), Budget(3))
    assert alone.index.tolist() == [0, 1] and both.index.tolist()[3:] == [25, 26]
    assert alone.features is None is both.features and alone.info == both.info == {"of": of}


def test_what_a_method_says_of_its_caches_holds_for_its_worst_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vtprune.methods()["fastv"], "prune_early_kv", True)
    assert build("worst", {"of": "fastv"}).fit(8).prune_early_kv and not build("worst", {}).prune_early_kv


def test_what_has_no_worst_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown method 'nrom'"):
        build("worst", {"of": "nrom"})
    with pytest.raises(ConfigError, match="the control itself"):
        build("worst", {"of": "worst"})
    with pytest.raises(ConfigError, match="of='corematching' finds its own count"):
        build("worst", {"of": "corematching"})
    for of in ("grid", "pool", "frames", "visual-exit"):
        with pytest.raises(ConfigError, match=f"of='{of}' names no mechanism"):
            vtprune.select(make_tokens([[[(5, 5)]]]), "worst", of=of, keep=3)
