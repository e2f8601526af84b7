# SPDX-License-Identifier: Apache-2.0
"""Methods of other papers that act before the language model, and the two that only merge: `visionzip`, `dart`,
`cdpruner`, `vispruner`, `prumerge+`, `hiprune`, `scope`, `pool`, `tome`."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from helpers import NoHostSync, alone, make_tokens
from torch import Tensor

import vtprune
from vtprune.budget import Budget
from vtprune.errors import ConfigError
from vtprune.kernels import reference
from vtprune.kernels.coverage import coverage
from vtprune.kernels.dpp import dpp
from vtprune.pruners import common, pool, prumerge
from vtprune.registry import build
from vtprune.tokens import CLS_ROW, Probe, Selection, VisualTokens

MERGING = ("visionzip", "prumerge+", "pool", "tome")
PLAIN = ("dart", "cdpruner", "vispruner", "hiprune", "scope")
ALL = MERGING + PLAIN
# Two samples with two images and one, views of several shapes, a sample without a picture between them.
SAMPLES = [[[(6, 6)], [(4, 5), (3, 7)]], [], [[(6, 6), (2, 2), (5, 3)]]]
BUDGETS = [
    Budget(0.25),
    Budget(1 / 9),
    Budget(1),
    Budget(7),
    Budget(0.5, allocation="pooled"),
    Budget(0.3, scope="joint"),
    Budget(1.0),
]

each = pytest.mark.parametrize("method", ALL)
each_budget = pytest.mark.parametrize("budget", BUDGETS, ids=str)


def asked(tokens: VisualTokens, dim: int = 8) -> VisualTokens:
    """With a question of 3, 2 and 4 words."""
    generator = torch.Generator().manual_seed(7)
    return replace(tokens, text=torch.randn(9, dim, generator=generator), text_lens=(3, 2, 4))


def kept(selection: Selection) -> list[int]:
    return selection.index.tolist()


def one(features: Tensor, grid: tuple[int, int], cls: Tensor | None = None) -> VisualTokens:
    return make_tokens([[[grid]]], features=features, cls_row=False if cls is None else cls)


def check(tokens: VisualTokens, selection: Selection, budget: Budget) -> None:
    pools = budget.pools(tokens)
    index = selection.index
    assert index.dtype == torch.int64 and bool((index.diff() > 0).all()) and len(selection) == sum(pools.counts)
    member = np.repeat(np.arange(len(pools.lens)), pools.lens)
    assert np.bincount(member[index.numpy()], minlength=len(pools.lens)).tolist() == list(pools.counts)
    assert torch.equal(selection.cu_seqlens, torch.searchsorted(index, tokens.cu_seqlens))
    if selection.order is not None:
        assert sorted(selection.order.tolist()) == kept(selection)
    if selection.features is not None:
        assert selection.features.shape == (len(selection), tokens.features.shape[1])
        assert selection.features.dtype == tokens.features.dtype and not selection.features.requires_grad


# -- what all must hold -----------------------------------------------------------------------------------------------


@each
@each_budget
@pytest.mark.parametrize("cls", [True, False], ids=["cls", "no cls"])
def test_a_selection_is_valid(method: str, budget: Budget, cls: bool) -> None:
    tokens = asked(make_tokens(SAMPLES, cls_row=cls))
    selection = build(method, {}).select(tokens, budget)
    check(tokens, selection, budget)
    assert (selection.features is not None) == (method in MERGING)


@each
@each_budget
def test_a_sample_keeps_the_same_alone_as_in_a_batch(method: str, budget: Budget) -> None:
    tokens = asked(make_tokens(SAMPLES, dim=7, cls_row=True), 7)
    pruner = build(method, {})
    together = pruner.select(tokens, budget)
    index, features, words = [], [], (slice(0, 3), slice(3, 5), slice(5, 9))
    for sample in range(len(SAMPLES)):
        single, start = alone(tokens, SAMPLES, sample)
        single = replace(single, text=tokens.text[words[sample]].clone(), text_lens=(tokens.text_lens[sample],))
        selection = pruner.select(single, budget)
        index += [start + i for i in kept(selection)]
        features += [] if selection.features is None else [selection.features]
    assert kept(together) == index
    if together.features is not None:
        assert torch.equal(together.features, torch.cat(features)), "bit for bit"


@each
def test_two_calls_agree_and_nothing_waits_for_the_device(method: str) -> None:
    tokens = asked(make_tokens(SAMPLES, cls_row=True))
    pruner = build(method, {})
    with NoHostSync():
        first = pruner.select(tokens, Budget(0.3))
        pruner.select(tokens, Budget(0.3, scope="joint"))
    second = pruner.select(tokens, Budget(0.3))
    assert kept(first) == kept(second)
    assert first.features is None or torch.equal(first.features, second.features)


@pytest.mark.parametrize("method", ["scope", "vispruner", "prumerge+", "tome"])
def test_how_many_pools_step_together_changes_no_bit(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = make_tokens([[[(5, 5), (4, 6), (5, 5)]], [[(5, 5)], [(4, 6), (1, 2)]]], cls_row=True)
    rows = tokens.features.clone()
    rows[3:9], rows[30:34] = rows[50], torch.nan
    tokens = replace(tokens, features=rows)
    for budget in (Budget(0.5), Budget(6)):
        found = []
        for most in (1, 1300, 1 << 20):  # one by one, two, all
            monkeypatch.setitem(reference.TOGETHER, "cpu", most)
            found.append(build(method, {}).select(tokens, budget))
        for other in found[1:]:
            assert kept(found[0]) == kept(other)
            if found[0].features is not None and other.features is not None:
                assert torch.equal(found[0].features.nan_to_num(7.0), other.features.nan_to_num(7.0))


def test_pools_step_together_with_those_of_their_size() -> None:
    pools = reference.pools_of(torch.zeros(33, 1), (4, 9, 4, 0, 9, 4, 3), (1, 2, 3, 0, 2, 1, 1))
    assert list(reference.alike(pools)) == [[0, 2, 4], [1, 3], [5]]
    assert list(reference.alike(pools, same_count=True)) == [[0, 4], [1, 3], [2], [5]]


@each
@pytest.mark.parametrize("samples", [[], [[], []], [[[(0, 0)]]], [[[(3, 3), (0, 4), (2, 2), (1, 1)]]]], ids=str)
def test_empty_samples_and_segments_and_single_tokens(method: str, samples: Any) -> None:
    tokens = make_tokens(samples)
    for budget in BUDGETS:
        check(tokens, build(method, {}).select(tokens, budget), budget)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_features_that_require_grad_in_any_precision_and_under_autocast(method: str, dtype: torch.dtype) -> None:
    features = torch.randn(132, 8, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    tokens = asked(make_tokens(SAMPLES, features=features, cls_row=True))
    plain = build(method, {}).select(tokens, Budget(0.3))
    check(tokens, plain, Budget(0.3))
    with torch.autocast("cpu", torch.bfloat16):
        inside = build(method, {}).select(tokens, Budget(0.3))
    assert kept(plain) == kept(inside)


@each
@pytest.mark.parametrize("value", [0.0, 1.5], ids=["zero", "constant"])
@pytest.mark.parametrize("cls", [True, False], ids=["cls", "no cls"])
def test_constant_features(method: str, value: float, cls: bool) -> None:
    row = torch.full((132,), 0.1) if cls else False
    tokens = asked(make_tokens(SAMPLES, features=torch.full((132, 8), value), cls_row=row))
    for budget in BUDGETS:
        selection = build(method, {}).select(tokens, budget)
        check(tokens, selection, budget)
        if selection.features is not None:
            assert torch.allclose(selection.features, torch.tensor(value))


@each
def test_duplicated_rows(method: str) -> None:
    distinct = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
    tokens = asked(make_tokens([[[(4, 4)]], [], []], features=distinct.repeat(2, 1), cls_row=torch.full((16,), 0.1)))
    for k in (4, 8, 12):
        check(tokens, build(method, {}).select(tokens, Budget(k)), Budget(k))
    if method in ("cdpruner", "scope"):  # what is spanned or covered comes last, and the first of equals wins
        options = {"relevance": "none"} if method == "cdpruner" else {}
        assert kept(build(method, options).select(tokens, Budget(8))) == list(range(8))


@each
def test_broken_rows_are_dropped_and_spoil_nothing(method: str) -> None:
    for bad in (torch.nan, torch.inf):
        tokens = asked(make_tokens([[[(4, 4)]], [], []], cls_row=True))
        tokens.features[5] = bad
        tokens.features[10, 3] = bad
        tokens.probes[CLS_ROW][5] = 9.0
        selection = build(method, {}).select(tokens, Budget(4))
        check(tokens, selection, Budget(4))
        if selection.features is not None:
            assert bool(selection.features.isfinite().all())
        if method not in ("pool", "tome"):
            assert not {5, 10} & set(kept(selection))
        tokens.features[:] = bad
        check(tokens, build(method, {}).select(tokens, Budget(4)), Budget(4))


@each
def test_keeping_all_changes_no_bit(method: str) -> None:
    tokens = asked(make_tokens(SAMPLES, features=torch.randn(132, 8).bfloat16(), cls_row=True))
    selection = build(method, {}).select(tokens, Budget(1.0))
    assert kept(selection) == list(range(132))
    assert selection.features is None or torch.equal(selection.features, tokens.features)


@each
def test_what_a_method_says_about_itself(method: str) -> None:
    pruner = build(method, {})
    assert pruner.name == method and pruner.paper and pruner.mechanism and not pruner.needs
    assert pruner.training_free and not pruner.adaptive and pruner.query_aware == (method == "cdpruner")
    assert [s.name for s in pruner.stages()] == ["projector"]


@pytest.mark.parametrize("method", ["cdpruner", "scope"])
def test_greedy_methods_keep_the_first_of_a_larger_budget(method: str) -> None:
    tokens = asked(make_tokens([[[(6, 6)]], [], []], cls_row=True))
    orders = [build(method, {}).select(tokens, Budget(k)).order for k in (1, 5, 9, 30)]
    for shorter, longer in pairwise(orders):
        assert shorter.tolist() == longer.tolist()[: len(shorter)]


@pytest.mark.parametrize(
    "method,options",
    [
        ("visionzip", {"dominant": 1.5}),
        ("visionzip", {"dominant": "x"}),
        ("visionzip", {"dominant": float("nan")}),
        ("dart", {"pivots": 0}),
        ("dart", {"layer": -1}),
        ("cdpruner", {"relevance": "clip"}),
        ("cdpruner", {"relevance": 1}),
        ("vispruner", {"important": True}),
        ("vispruner", {"per_round": 0}),
        ("prumerge+", {"neighbours": -1}),
        ("hiprune", {"alpha": 2}),
        ("hiprune", {"object_layer": 1.0}),
        ("scope", {"alpha": -1}),
        ("tome", {"rounds": 0}),
    ],
)
def test_bad_options_are_refused(method: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(options))}=.*(give a|choose one)"):
        build(method, options)


# -- in a model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
@each
@torch.no_grad()
def test_the_model_reads_the_merged_rows(family: str, method: str) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 1, seed=3)
    tokens = vtprune.encode(model, sample)
    selection = vtprune.select(tokens, method, keep=0.3)
    seen: list[Tensor] = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _m, args, kw: seen.append(args[0] if args else kw["hidden_states"]), with_kwargs=True
    )
    with vtprune.apply(model, method, keep=0.3):
        model(**sample)
    hook.remove()
    rows = selection.features if selection.features is not None else tokens.features[selection.index]
    assert bool((rows[:, None] == seen[0][0]).all(2).any(1).all())


def test_gradients_reach_the_kept_rows_of_a_plain_method_and_the_text_around_merged_ones() -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 1, seed=3)
    projector = model.model.multi_modal_projector.linear_2.weight
    for method, expected in (("dart", True), ("pool", False)):
        model.zero_grad()
        with vtprune.apply(model, method, keep=0.3):
            model(**sample, labels=sample["input_ids"]).loss.backward()
        assert (projector.grad is not None and bool((projector.grad != 0).any())) == expected, method
        assert bool((model.get_input_embeddings().weight.grad != 0).any())


def test_dart_inside_the_language_model() -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 1, seed=3)
    with torch.no_grad(), vtprune.apply(model, "dart", keep=0.25, layer=1):
        model(**sample)
        kept_by_layer = vtprune.report(model)
    assert "layer 1" in str(kept_by_layer)


# -- merging ----------------------------------------------------------------------------------------------------------


def test_merged_rows_are_weighted_means_in_the_order_of_the_index() -> None:
    features = torch.tensor([[1.0], [2], [4], [8], [torch.nan], [16]])
    tokens = one(features, (2, 3))
    index, into = torch.tensor([1, 3, 5]), torch.tensor([1, 1, 3, 3, 3, 5])
    assert common.merged(tokens, index, into).flatten().tolist() == [1.5, 6.0, 16.0]
    weight = torch.tensor([3.0, 1, 0, 1, 1, 0])
    assert common.merged(tokens, index, into, weight).flatten().tolist() == [1.25, 8.0, 16.0]
    into[0] = 0  # is not kept: lost
    assert common.merged(tokens, index, into).flatten().tolist() == [2.0, 6.0, 16.0]


def test_a_broken_anchor_becomes_the_mean_of_the_others_or_stays() -> None:
    tokens = one(torch.tensor([[torch.nan], [2.0], [torch.nan]]), (1, 3))
    out = common.merged(tokens, torch.tensor([0, 2]), torch.tensor([0, 0, 2])).flatten()
    assert out[0] == 2 and out[1].isnan()


def flat_areas(dim: int = 64) -> Tensor:
    """24 x 24 rows as of a picture with plain areas: six values, most of their rows copies, the others nearly so."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, dim, generator=generator)
    block = torch.arange(24) // 4
    rows = values[((block[:, None] + block) % 6).flatten()]
    noise = 1e-3 * torch.randn(576, dim, generator=generator)
    return rows + noise * (torch.rand(576, 1, generator=generator) < 0.3)


@pytest.mark.parametrize("keep", [0.5, 1 / 9])
@each
def test_how_sums_round_decides_nothing(method: str, keep: float) -> None:
    """Another order of the columns changes no cosine, but the last bits of sums, as another device does."""
    features = flat_areas()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    text = torch.randn(9, 64, generator=torch.Generator().manual_seed(2))
    cls = torch.rand(576, generator=torch.Generator().manual_seed(3))
    found = [
        kept(build(method, {}).select(replace(one(x, (24, 24), cls), text=t, text_lens=(9,)), Budget(keep)))
        for x, t in ((features, text), (features[:, order].contiguous(), text[:, order].contiguous()))
    ]
    assert found[0] == found[1]


# -- hand-worked selections -------------------------------------------------------------------------------------------


def test_visionzip_by_hand() -> None:
    #                   dominant: 2 and 5            others, in order: 0 1 3 4 6 7
    cls = torch.tensor([0.1, 0.2, 0.9, 0.1, 0.1, 0.8, 0.1, 0.1])
    features = torch.tensor([[1.0, 0], [2, 0], [5, 5], [3, 0], [0, 1], [7, 7], [0, 2], [6, 1]])
    selection = build("visionzip", {"dominant": 0.5}).select(one(features, (2, 4), cls), Budget(4))
    # Two contextual tokens, at 0/2 and 1/2 of the six others: 0 and 4. 1, 3 and 7 go to 0, 6 goes to 4.
    assert kept(selection) == [0, 2, 4, 5] and selection.info == {"importance": "cls"}
    assert selection.features.tolist() == [[3.0, 0.25], [5, 5], [0, 1.5], [7, 7]]


def test_visionzip_keeps_54_dominant_tokens_of_64() -> None:
    tokens = make_tokens([[[(24, 24)]]], cls_row=True)
    selection = build("visionzip", {}).select(tokens, Budget(64))
    untouched = (selection.features == tokens.features[selection.index]).all(1)
    assert int(untouched.sum()) == 54
    top = tokens.probes[CLS_ROW].topk(54).indices
    assert set(top.tolist()) == set(selection.index[untouched].tolist())
    three = build("visionzip", {}).select(tokens, Budget(3))  # 2.53 dominant ones are 3
    assert torch.equal(three.features, tokens.features[three.index])


def test_nothing_goes_to_a_broken_anchor() -> None:
    features = torch.tensor([[torch.nan, 0], [1, 0], [-1, 0.1], [-1, 0.2]])
    into = common.nearest(features, [4], torch.tensor([0, 1]), [2], torch.tensor([False, False, True, True]))
    assert into.tolist() == [0, 1, 1, 1]


def test_dart_by_hand() -> None:
    # Pivots are 0 (length 9) and 3 (length 8); one more for each.
    features = torch.tensor([[9.0, 0], [1, 0.1], [0.5, -1], [0, 8], [-1, 1], [-1, -2]])
    selection = build("dart", {"pivots": 2}).select(one(features, (2, 3)), Budget(4))
    # Least like (1, 0): 4 at -0.71 (5 has -0.45). Least like (0, 1) of the others: 5 at -0.89 (2 has -0.89449...).
    cos = torch.nn.functional.normalize(features, dim=1) @ torch.tensor([0.0, 1])
    second = min((1, 2, 5), key=lambda i: float(cos[i]))
    assert kept(selection) == sorted([0, 3, 4, second]) and selection.order is None


def test_dart_gives_left_overs_to_the_first_pivots_and_never_takes_twice() -> None:
    tokens = make_tokens([[[(9, 9)]]], dim=2)  # flat enough for pivots to want the same tokens
    unit = torch.nn.functional.normalize(tokens.features, dim=1)
    pivots = tokens.features.norm(dim=1).topk(3).indices.tolist()
    chosen = list(pivots)
    for pivot, quota in zip(pivots, (20, 19, 19), strict=True):
        order = (unit @ unit[pivot]).argsort().tolist()
        chosen += [i for i in order if i not in chosen][:quota]
    assert kept(build("dart", {"pivots": 3}).select(tokens, Budget(61))) == sorted(chosen)


def test_dpp_maximises_the_determinant_greedily() -> None:
    generator = torch.Generator().manual_seed(0)
    x, q = torch.randn(9, 6, generator=generator), torch.rand(9, generator=generator) + 0.1
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    kernel = q.double()[:, None] * (unit @ unit.T) * q.double()
    picks: list[int] = []
    for _ in range(6):
        rest = [i for i in range(9) if i not in picks]
        picks.append(max(rest, key=lambda i: float(torch.linalg.det(kernel[[*picks, i]][:, [*picks, i]]))))
    assert dpp(x, q, [9], [6]).tolist() == picks


def test_dpp_goes_on_by_quality_where_the_span_is_full() -> None:
    x = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 0], [0, 0]])
    q = torch.tensor([1.0, 0.9, 0.2, 0.5, 0.7])
    assert dpp(x, q, [5], [4]).tolist()[:2] == [0, 1]
    assert dpp(x[:4], q[:4], [4], [4]).tolist() == [0, 1, 3, 2]
    q[0] = torch.nan
    assert dpp(x[:4], q[:4], [4], [4]).tolist()[-1] == 0


def test_cdpruner_by_hand() -> None:
    # Orthogonal tokens: the order is that of the relevance.
    tokens = replace(one(torch.eye(4), (2, 2)), text=torch.tensor([[1.0, 3, 0, 2]]), text_lens=(1,))
    selection = build("cdpruner", {}).select(tokens, Budget(3))
    assert selection.order.tolist() == [1, 3, 0] and selection.info == {"relevance": "question embeddings"}
    negative = build("cdpruner", {"relevance": "negative"}).select(tokens, Budget(3))
    assert negative.order.tolist() == [2, 0, 3]


def test_cdpruner_follows_the_question_of_its_own_sample() -> None:
    tokens = make_tokens(
        [[[(2, 2)]], [[(2, 2)]], [[(2, 2)]]], features=torch.eye(4)[[0, 1, 2, 3, 0, 0, 1, 2, 0, 1, 2, 3]]
    )
    tokens = replace(tokens, text=torch.eye(4)[[2, 3]], text_lens=(1, 0, 1))
    order = build("cdpruner", {}).select(tokens, Budget(2)).order
    assert order.tolist() == [2, 0, 4, 6, 11, 8]  # no question in the middle: diversity alone


@pytest.mark.parametrize("options,source", [({}, "none (no question)"), ({"relevance": "none"}, "none")])
def test_cdpruner_without_a_question_is_for_diversity_alone(options: dict[str, str], source: str) -> None:
    tokens = make_tokens([[[(4, 4)]]])
    selection = build("cdpruner", options).select(tokens, Budget(5))
    assert selection.info == {"relevance": source}
    assert selection.order.tolist() == dpp(tokens.features, torch.ones(16), [16], [5]).tolist()


@torch.no_grad()
def test_cdpruner_gets_the_question_from_the_engine() -> None:
    model = tiny.build("qwen2_5_vl")
    sample = tiny.prompt(model, 1, seed=1)
    with vtprune.apply(model, "cdpruner", keep=0.3):
        model(**sample)
        assert vtprune.report(model).info["relevance"] == "question embeddings"


def test_vispruner_by_hand() -> None:
    # Half of 4 by attention: 0 and 1. The others by attention: 2 3 4 5 6 7; halves 2 4 6 and 3 5 7.
    cls = torch.tensor([0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    angle = torch.tensor([0.0, 0.1, 1.0, 1.1, 2.0, 3.0, 4.0, 4.05])
    features = torch.stack([angle.cos(), angle.sin()], 1)
    selection = build("vispruner", {"per_round": 2}).select(one(features, (2, 4), cls), Budget(4))
    # Round 1 removes 6 (0.05 from 7) and 2 (0.1 from 3), leaving 3 4 5 7. Round 2: halves 3 5 and 4 7; 3 is 0.9 from
    # 4, 5 is 1.0 from 4: 3 goes first. Two removals are due, and both of the half go.
    assert kept(selection) == [0, 1, 4, 7]
    one_by_one = build("vispruner", {"per_round": 1}).select(one(features, (2, 4), cls), Budget(5))
    # K = 5: two important ones, three diverse: 6 and 2 go, then 3 of the halves 3 5 and 4 7.
    assert kept(one_by_one) == [0, 1, 4, 5, 7]


def test_prumerge_by_hand() -> None:
    cls = torch.tensor([0.1, 0.1, 0.1, 5.0, 0.1, 0.1, 0.1, 0.1, 0.1])
    features = torch.tensor([[1.0, 0], [2, 0], [0, 3], [0, 1], [0, 2], [4, 0], [1, 1], [1, 2], [5, 1]])
    selection = build("prumerge+", {"neighbours": 1}).select(one(features, (3, 3), cls), Budget(3))
    # One outlier, 3; two of the eight others, at 0/2 and 1/2: 0 and 5.
    assert kept(selection) == [0, 3, 5]
    # Nearest dropped token: 1 for 0, 2 for 3 (as near as 4, but first), 1 for 5.
    expected = torch.tensor([[1.5, 0], [0, (5 * 1 + 0.1 * 3) / 5.1], [3, 0]])
    assert torch.allclose(selection.features, expected)
    assert build("prumerge+", {"neighbours": 0}).select(one(features, (3, 3), cls), Budget(3)).features is None


@pytest.mark.parametrize("last,outliers", [(20.0, 1), (13.1, 1), (12.9, 0), (torch.nan, 0)])
def test_an_outlier_lies_one_and_a_half_quartile_ranges_above_the_third(last: float, outliers: int) -> None:
    scores = torch.tensor([8.0, 1, 7, 2, 6, 3, 5, 4, last])  # quartiles 3 and 7
    pools = reference.pools_of(scores, [9], [1])
    assert prumerge._outliers(scores, scores.isfinite(), pools).tolist() == [outliers]


def test_prumerge_takes_the_strongest_outliers_where_there_are_too_many() -> None:
    cls = torch.full((36,), 0.1)
    cls[[4, 9, 20]] = torch.tensor([5.0, 7.0, 6.0])
    assert kept(build("prumerge+", {}).select(one(torch.randn(36, 4), (6, 6), cls), Budget(2))) == [9, 20]


def test_hiprune_by_hand() -> None:
    middle, deep = torch.zeros(25), torch.arange(25).float()
    middle[7], middle[10] = 3.0, 2.0
    tokens = one(torch.randn(25, 4), (5, 5), deep)
    tokens.probes[Probe("cls_row", 8)] = middle
    # K alpha / 5 = 2 anchors: 7 with 2 12 6 8, and 10 (first column) with 5 15 11. One register: 24.
    selection = build("hiprune", {"alpha": 1.0}).select(tokens, Budget(10))
    assert kept(selection) == [2, 5, 6, 7, 8, 10, 11, 12, 15, 24]
    assert selection.info == {"importance": "cls", "anchors": "cls, layer 8"}
    # alpha = 0.1: one anchor, its buffers, and registers.
    assert kept(build("hiprune", {}).select(tokens, Budget(7))) == [2, 6, 7, 8, 12, 23, 24]
    assert kept(build("hiprune", {"alpha": 0}).select(tokens, Budget(3))) == [22, 23, 24]


def test_hiprune_buffers_stay_in_their_segment() -> None:
    cls = torch.zeros(18)
    cls[8], cls[[9, 10, 12, 13]] = 9.0, 1.0
    tokens = make_tokens([[[(3, 3), (3, 3)]]], cls_row=cls)
    assert kept(build("hiprune", {}).select(tokens, Budget(7, allocation="pooled"))) == [5, 7, 8, 9, 10, 12, 13]


@torch.no_grad()
def test_hiprune_reads_the_middle_layer_of_a_model() -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 1, seed=1)
    with vtprune.apply(model, "hiprune", keep=0.5, object_layer=0):
        model(**sample)
        assert vtprune.report(model).info["anchors"] == "cls, layer 0"
    with vtprune.apply(model, "hiprune", keep=0.5):  # has no layer 8
        model(**sample)
        assert vtprune.report(model).info["anchors"] == "cls"


def test_coverage_is_greedy_by_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(12, 4, generator=generator), torch.rand(12, generator=generator)
    unit = torch.nn.functional.normalize(x, dim=1)
    cos, picks, covered = unit @ unit.T, [], torch.zeros(12)
    for _ in range(6):
        gain = torch.tensor([float((cos[u] - covered).clamp(min=0).sum() * w[u]) for u in range(12)])
        gain[picks] = -1
        picks.append(int(gain.argmax()))
        covered = torch.maximum(covered, cos[picks[-1]])
    assert coverage(x, w, [12], [6]).tolist() == picks


def test_scope_by_hand() -> None:
    # Three tokens of one direction, one of another: the most salient of the crowd, the loner, then by weight.
    features = torch.tensor([[1.0, 0], [2, 0], [0, 1], [3, 0]])
    tokens = one(features, (2, 2), torch.tensor([0.2, 0.3, 0.2, 0.1]))
    assert build("scope", {}).select(tokens, Budget(4)).order.tolist() == [1, 2, 0, 3]
    assert build("scope", {"alpha": 0.0}).select(tokens, Budget(2)).order.tolist() == [0, 2]


def test_pool_is_two_by_two_pooling_at_a_quarter() -> None:
    features = torch.randn(24 * 24, 3)
    selection = build("pool", {}).select(one(features, (24, 24)), Budget(0.25))
    plain = torch.nn.functional.avg_pool2d(features.T.view(1, 3, 24, 24), 2).flatten(2)[0].T
    assert torch.allclose(selection.features, plain, atol=1e-6)
    assert kept(selection) == kept(build("grid", {}).select(one(features, (24, 24)), Budget(0.25)))


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (5, 4), (7, 6), (3, 11), (13, 13)], ids=str)
def test_cells_are_a_partition_into_connected_boxes_around_the_lattice(grid: tuple[int, int]) -> None:
    total = grid[0] * grid[1]
    tokens = one(torch.randn(total, 2), grid)
    for k in range(1, total + 1):
        index, into = pool.cells(tokens, (k,))
        assert kept(build("grid", {}).select(tokens, Budget(k))) == index.tolist()
        assert torch.equal(into[index], index), "each middle lies in its own cell"
        assert set(into.tolist()) == set(index.tolist())
        at = tokens.coords[:, 1:].long()
        for middle in index.tolist():
            mine = at[into == middle]
            box = (mine.amax(0) - mine.amin(0) + 1).prod()
            assert int(box) == len(mine)


def test_tome_by_hand() -> None:
    # Halves 0 2 4 and 1 3 5. Closest pair: 2 with 3; then, in the second round, of 0 1 3 4 5: halves 0 3 5 and 1 4.
    angle = torch.tensor([0.0, 0.3, 1.0, 1.05, 2.0, 2.2])
    features = torch.stack([angle.cos(), angle.sin()], 1)
    once = build("tome", {"rounds": 1}).select(one(features, (2, 3)), Budget(5))
    assert kept(once) == [0, 1, 3, 4, 5]
    assert torch.allclose(once.features[2], features[2:4].mean(0))
    twice = build("tome", {"rounds": 2}).select(one(features, (2, 3)), Budget(4))
    assert kept(twice) == [0, 1, 3, 4] and torch.allclose(twice.features[3], features[4:].mean(0))


def test_tome_weighs_by_how_many_tokens_each_stands_for() -> None:
    tokens = make_tokens([[[(6, 7)]]])
    selection = build("tome", {}).select(tokens, Budget(1))
    assert torch.allclose(selection.features[0], tokens.features.mean(0), atol=1e-6)
