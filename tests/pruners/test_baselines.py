# SPDX-License-Identifier: Apache-2.0
"""`random`, `norm` and `divprune`, and what every built-in method must hold."""

from __future__ import annotations

import random as stdlib_random
from typing import Any

import numpy as np
import pytest
import torch
from helpers import NoHostSync, alone, make_tokens

from vtprune.budget import Budget
from vtprune.errors import ConfigError
from vtprune.kernels import reference
from vtprune.pruners.random import RandomPruner
from vtprune.registry import Pruner, build
from vtprune.tokens import Selection

BUILT_IN = ("random", "grid", "norm", "divprune", "idpruner")
# Two samples with two images and one, views of several shapes, a sample without a picture between them.
SAMPLES = [[[(6, 6)], [(4, 5), (3, 7)]], [], [[(6, 6), (2, 2), (5, 3)]]]
BUDGETS = [
    Budget(0.25),
    Budget(1 / 9),
    Budget(7),
    Budget(0.5, allocation="pooled"),
    Budget(0.3, scope="joint"),
    Budget(1.0),
    Budget(999),
]

each_method = pytest.mark.parametrize("method", BUILT_IN)
each_budget = pytest.mark.parametrize("budget", BUDGETS, ids=str)


def kept(selection: Selection) -> list[int]:
    return selection.index.tolist()


@each_method
@each_budget
def test_a_selection_is_valid(method: str, budget: Budget) -> None:
    tokens = make_tokens(SAMPLES, cls_row=True)
    pools = budget.pools(tokens)
    selection = build(method, {}).select(tokens, budget)
    index = selection.index
    assert index.dtype == torch.int64 and bool((index.diff() > 0).all()) and len(selection) == sum(pools.counts)

    pool = np.repeat(np.arange(len(pools.lens)), pools.lens)
    assert np.bincount(pool[index], minlength=len(pools.lens)).tolist() == list(pools.counts)
    segment = np.repeat(np.arange(len(tokens.seqlens)), tokens.seqlens)
    per_segment = np.bincount(segment[index], minlength=len(tokens.seqlens))
    assert selection.cu_seqlens.tolist() == [0, *per_segment.cumsum()]
    if selection.order is not None:
        assert sorted(selection.order.tolist()) == kept(selection)
        assert bool((torch.from_numpy(pool)[selection.order].diff() >= 0).all()), "the order goes pool after pool"


@each_method
@each_budget
def test_a_sample_keeps_the_same_alone_as_in_a_batch(method: str, budget: Budget) -> None:
    tokens = make_tokens(SAMPLES, dim=7, cls_row=True)
    pruner = build(method, {})
    together = kept(pruner.select(tokens, budget))
    one_by_one: list[int] = []
    for sample in range(len(SAMPLES)):
        single, start = alone(tokens, SAMPLES, sample)
        one_by_one += [start + i for i in kept(pruner.select(single, budget))]
    assert together == one_by_one


@each_method
def test_two_calls_agree_and_no_global_generator_moves(method: str) -> None:
    tokens = make_tokens(SAMPLES)
    pruner = build(method, {})
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), stdlib_random.getstate()
    first = kept(pruner.select(tokens, Budget(0.3)))
    torch.manual_seed(1)
    torch.set_rng_state(states[0])
    assert kept(pruner.select(tokens, Budget(0.3))) == first
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and stdlib_random.getstate() == states[2]


@each_method
def test_no_method_waits_for_the_device(method: str) -> None:
    tokens = make_tokens(SAMPLES, cls_row=True)
    pruner = build(method, {})
    with NoHostSync():
        pruner.select(tokens, Budget(0.3))
        pruner.select(tokens, Budget(0.3, scope="joint"))


@each_method
@pytest.mark.parametrize("samples", [[], [[], []], [[[(0, 0)]]], [[[(3, 3), (0, 4), (2, 2)]]]], ids=str)
def test_empty_samples_and_segments(method: str, samples: Any) -> None:
    tokens = make_tokens(samples)
    for budget in BUDGETS:
        assert len(build(method, {}).select(tokens, budget)) == sum(budget.pools(tokens).counts)


@each_method
def test_bf16_features_that_require_grad(method: str) -> None:
    tokens = make_tokens(SAMPLES, features=torch.randn(132, 8).bfloat16().requires_grad_())
    selection = build(method, {}).select(tokens, Budget(0.3))
    assert len(selection) == sum(Budget(0.3).pools(tokens).counts)


@each_method
def test_broken_tokens_go_first_out(method: str) -> None:
    tokens = make_tokens([[[(4, 4)]]], cls_row=True)
    tokens.features[5] = torch.nan
    selection = build(method, {}).select(tokens, Budget(15))
    if method in ("norm", "divprune", "idpruner"):
        assert 5 not in kept(selection)
    assert len(selection) == 15


@each_method
def test_what_a_method_says_about_itself(method: str) -> None:
    pruner: Pruner = build(method, {})
    assert pruner.name == method and pruner.paper
    assert pruner.training_free and not pruner.query_aware and not pruner.adaptive
    assert pruner.modality == ("image", "video") and [s.name for s in pruner.stages()] == ["projector"]
    assert not pruner.needs


# -- random -----------------------------------------------------------------------------------------------------------


def test_random_depends_on_the_seed() -> None:
    tokens = make_tokens([[[(10, 10)]]])
    picks = {tuple(kept(build("random", {"seed": seed}).select(tokens, Budget(0.2)))) for seed in range(5)}
    assert len(picks) == 5


def test_random_draws_anew_for_each_image_of_a_sample_but_not_of_the_batch() -> None:
    tokens = make_tokens([[[(10, 10)], [(10, 10)]], [[(10, 10)]]])
    picks = np.asarray(kept(build("random", {}).select(tokens, Budget(20)))).reshape(3, 20) - [[0], [100], [200]]
    assert picks[0].tolist() == picks[2].tolist() != picks[1].tolist()


def test_random_is_uniform() -> None:
    tokens = make_tokens([[[(5, 8)]]])
    hits = np.zeros(40)
    for seed in range(500):
        hits[kept(RandomPruner(seed).select(tokens, Budget(0.25)))] += 1
    # 125 expected, standard deviation 9.7: five of them either way.
    assert hits.min() > 76 and hits.max() < 174


@pytest.mark.parametrize("seed", [-1, 1.0, True, None, "0", float("nan")], ids=repr)
def test_random_refuses_a_bad_seed(seed: Any) -> None:
    with pytest.raises(ConfigError, match=r"seed=.*give a whole number"):
        build("random", {"seed": seed})


# -- norm and divprune ------------------------------------------------------------------------------------------------


def test_norm_keeps_the_longest() -> None:
    features = torch.tensor([[3.0, 4], [0, 6], [-7, 0], [1, 1], [4, 3], [0, 0]])
    tokens = make_tokens([[[(2, 3)]]], features=features)
    selection = build("norm", {}).select(tokens, Budget(3))
    assert selection.order is not None and selection.order.tolist() == [2, 1, 0]
    assert kept(selection) == [0, 1, 2]


def test_divprune_is_max_min_in_each_pool() -> None:
    tokens = make_tokens(SAMPLES)
    selection = build("divprune", {}).select(tokens, Budget(0.4))
    pools = Budget(0.4).pools(tokens)
    assert selection.order is not None
    assert selection.order.tolist() == reference.max_min(tokens.features, pools.lens, pools.counts).tolist()
    assert selection.info == {}


@pytest.mark.parametrize("method", ["norm", "divprune", "grid"])
def test_methods_without_options_refuse_any(method: str) -> None:
    with pytest.raises(ConfigError, match="no options"):
        build(method, {"seed": 1})
