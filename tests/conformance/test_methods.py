# SPDX-License-Identifier: Apache-2.0
"""What every registered method must keep to, whoever wrote it: a new one is picked up by its registration."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import vtprune
from vtprune.budget import Budget

BUILT_IN = sorted(name for name in vtprune.methods() if not name.startswith("test-"))
PROJECTOR = [n for n in BUILT_IN if all(s.layer is None for s in vtprune.methods()[n]().stages())]


@pytest.fixture(scope="module", params=["llava_next", "qwen2_5_vl"])
def encoded(request: pytest.FixtureRequest) -> dict[str, Any]:
    model = tiny.build(request.param)
    samples = [tiny.prompt(model, n, seed=n) for n in (1, 3)]
    batch = tiny.collate(samples)
    return {"batch": vtprune.encode(model, batch), "alone": [vtprune.encode(model, s) for s in samples]}


def named(cls: type[vtprune.Pruner]) -> tuple[Any, ...]:
    return cls.name, cls.paper, cls.mechanism


@pytest.mark.parametrize("method", BUILT_IN)
def test_it_says_what_it_is(method: str) -> None:
    cls = vtprune.methods()[method]
    assert all(named(cls)) and cls.__doc__ and cls.modality <= {"image", "video"}
    assert vtprune.PruneConfig.from_json(vtprune.PruneConfig(method).to_json()) == vtprune.PruneConfig(method)


@pytest.mark.parametrize("allocation", ["equal", "pooled"])
@pytest.mark.parametrize("keep", [0.3, 5, 1])
@pytest.mark.parametrize("method", PROJECTOR)
def test_counts_are_exact_and_rows_ascend(
    encoded: dict[str, Any], method: str, keep: float | int, allocation: str
) -> None:
    tokens = encoded["batch"]
    selection = vtprune.select(tokens, method, keep=keep, allocation=allocation)
    pools = Budget(keep, allocation=allocation).pools(tokens)
    assert bool((selection.index.diff() > 0).all())
    ends = torch.tensor(pools.lens).cumsum(0)
    found = torch.bincount(torch.bucketize(selection.index, ends, right=True), minlength=len(pools.lens))
    assert tuple(found.tolist()) == pools.counts
    assert torch.equal(selection.cu_seqlens, torch.searchsorted(selection.index, tokens.cu_seqlens))
    if selection.order is not None:
        assert torch.equal(selection.order.sort().values, selection.index)


@pytest.mark.parametrize("scope", ["per_image", "joint"])
@pytest.mark.parametrize("method", PROJECTOR)
def test_the_same_alone_in_a_batch_and_again(encoded: dict[str, Any], method: str, scope: str) -> None:
    picked = vtprune.select(encoded["batch"], method, keep=0.3, scope=scope).index
    assert torch.equal(picked, vtprune.select(encoded["batch"], method, keep=0.3, scope=scope).index)
    start, apart = 0, []
    for tokens in encoded["alone"]:
        apart.append(vtprune.select(tokens, method, keep=0.3, scope=scope).index + start)
        start += len(tokens.source)
    assert torch.equal(picked, torch.cat(apart))


@pytest.mark.parametrize("method", PROJECTOR)
def test_a_smaller_budget_keeps_the_first_of_a_larger_one(encoded: dict[str, Any], method: str) -> None:
    tokens = encoded["batch"]
    small, large = (vtprune.select(tokens, method, keep=k, allocation="pooled") for k in (3, 4))
    if small.order is not None and large.order is not None:
        assert torch.equal(large.order.view(-1, 4)[:, :3].flatten(), small.order)


@pytest.mark.parametrize("method", BUILT_IN)
@torch.no_grad()
def test_keeping_everything_changes_no_bit(method: str) -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 2)
    dense = model(**sample).logits
    with vtprune.apply(model, method, keep=1.0):
        assert torch.equal(model(**sample).logits, dense)
