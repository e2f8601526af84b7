# SPDX-License-Identifier: Apache-2.0
"""The methods inside the language model on tokens made by hand, with vectors that were worked out by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import NoHostSync, make_tokens
from torch import Tensor

import vtprune
from vtprune.budget import Budget, SteppedBudget
from vtprune.errors import ConfigError
from vtprune.kernels.facility import facility
from vtprune.pruners.catp import CATPPruner, Contextual, Halfway
from vtprune.pruners.corematching import CoreMatchingPruner, elbow
from vtprune.pruners.pyramiddrop import PyramidDropPruner
from vtprune.pruners.sparsevlm import SparseVLMPruner, density_peaks, raters
from vtprune.pruners.visual_exit import VisualExitPruner
from vtprune.registry import build
from vtprune.tokens import PROJECTOR, Probe, Stage, VisualTokens

#: Five pictures of 576 tokens, as CATP's paper has them: four demonstrations and the query.
FIVE = [[[(24, 24)]] * 5]


def probed(tokens: VisualTokens, **values: Tensor) -> VisualTokens:
    """``name_layer=value`` becomes a probe."""
    made = {}
    for key, value in values.items():
        name, layer = key.rsplit("_", 1)
        made[Probe(name, int(layer))] = value
    return replace(tokens, probes=made)


# -- FastV, PyramidDrop, visual exit ----------------------------------------------------------------------------------


def test_fastv_keeps_what_the_last_row_attends_to() -> None:
    tokens = probed(make_tokens([[[(1, 4)], [(1, 4)]]]), last_query_row_1=torch.tensor([4.0, 1, 3, 2, 0, 5, 5, 1]))
    assert build("fastv", {}).select(tokens, Budget(2), Stage(1)).index.tolist() == [0, 2, 5, 6]
    joint = build("fastv", {}).select(tokens, Budget(2, "joint"), Stage(1))
    assert joint.index.tolist() == [0, 2, 5, 6] and joint.order.tolist() == [5, 6, 0, 2]


@pytest.mark.parametrize(
    "depth,layers", [(32, (7, 15, 23)), (28, (6, 13, 20)), (6, (0, 2, 3)), (5, (0, 1, 2)), (3, (0, 1))]
)
def test_pyramiddrop_drops_at_the_end_of_each_quarter(depth: int, layers: tuple[int, ...]) -> None:
    assert PyramidDropPruner().fit(depth).stages() == tuple(map(Stage, layers))
    assert PyramidDropPruner(layers=(1, 2)).fit(depth).at == (1, 2)


def test_pyramiddrop_halves_three_times_down_to_an_eighth() -> None:
    tokens, pruner = make_tokens(FIVE), PyramidDropPruner()
    counts = [pruner.stage_budget(Budget(0.125), stage).pools(tokens).counts[0] for stage in pruner.stages()]
    assert counts == [288, 144, 72]
    counts = [pruner.stage_budget(Budget(72), stage).pools(tokens).counts[0] for stage in pruner.stages()]
    assert counts == [288, 144, 72]
    assert SteppedBudget.towards(Budget(1.0), 0.5).image_count(7) == 7
    assert SteppedBudget.towards(Budget(0.01), 0.5).image_count(3) == 1


def test_visual_exit_leaves_nothing_or_all() -> None:
    tokens, pruner = make_tokens([[[(2, 3)], [(1, 2)]]]), VisualExitPruner()
    budget = pruner.stage_budget(Budget(0.5), Stage(3))
    assert budget.pools(tokens).counts == (0, 0) and len(pruner.select(tokens, budget, Stage(3))) == 0
    budget = pruner.stage_budget(Budget(1.0), Stage(3))
    assert pruner.select(tokens, budget, Stage(3)).index.tolist() == list(range(8))
    assert [VisualExitPruner().fit(depth).layer for depth in (32, 5, 2)] == [15, 1, 0]


# -- SparseVLM --------------------------------------------------------------------------------------------------------


def test_words_that_match_the_picture_rate_it() -> None:
    # Softmax over words of products (2, 0, 0) and (2, 0, 0): the first has 0.787, the mean is 1 / 3.
    tokens = make_tokens([[[(1, 2)]], [[(1, 1)]]], features=torch.tensor([[2.0, 0], [2, 0], [0, 1]]))
    words = torch.tensor([[1.0, 0], [0, 1], [0, 0], [5, 0], [0, 5]])
    tokens = replace(tokens, text=words, text_lens=(3, 2))
    assert raters(tokens).tolist() == [[True, False, False], [False, True, False]]
    uniform = replace(tokens, text=torch.zeros(5, 2))
    assert raters(uniform).tolist() == [[True, True, True], [True, True, False]], "a tie rates"


def test_raters_are_averaged_and_the_last_token_stands_in_for_a_question_without_words() -> None:
    tokens = make_tokens([[[(1, 3)]], [[(1, 3)]]])
    rows = torch.tensor([[0.1, 0.9, 0], [0.2, 0.1, 0], [0.6, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    last = torch.tensor([0.0, 0, 0, 0.1, 0.3, 0.2])
    pruner = SparseVLMPruner(layers=(1,), recycle=0.0)
    tokens = probed(tokens, text_rows_1=rows, last_query_row_1=last)
    tokens.ctx["raters"] = torch.tensor([[True, False, False], [False, False, False]])
    assert pruner.select(tokens, Budget(1), Stage(1)).index.tolist() == [2, 4]
    tokens.ctx["raters"][0, 1] = True
    assert pruner.select(tokens, Budget(1), Stage(1)).index.tolist() == [0, 4]


def test_density_peaks_by_hand() -> None:
    """Two heaps on a line: their middles are the centres, and everyone joins the nearer one."""
    rows = torch.tensor([0.0, 1, 1.1, 2, 20, 21, 21.1, 22, 20.9, 1.05])[:, None]
    centres, cluster = density_peaks(rows, 2)
    assert (cluster == cluster[0]).tolist() == [True] * 4 + [False] * 5 + [True]
    assert {1, 2, 9} & set(centres.tolist()) and {5, 6, 8} & set(centres.tolist())
    centres, cluster = density_peaks(torch.ones(4, 3), 4)
    assert centres.tolist() == [0, 1, 2, 3] == cluster.tolist()


def test_dropped_tokens_are_recycled_within_the_budget() -> None:
    torch.manual_seed(0)
    tokens = make_tokens([[[(5, 8)], [(2, 2)]]], dim=4)
    score = torch.arange(44.0, 0, -1)
    tokens = probed(tokens, text_rows_1=score[:, None], last_query_row_1=score)
    tokens.ctx["raters"] = torch.ones(1, 1, dtype=torch.bool)
    selection = SparseVLMPruner(layers=(1,), recycle=0.5, merge=0.2).select(tokens, Budget(0.5), Stage(1))
    # 20 of 40 go: ceil(.5 * .2 * 20) = 2 clusters of the 11 best of rows 18 to 39, so 18 to 28.
    assert selection.cu_seqlens.tolist() == [0, 20, 22] and selection.index[:18].tolist() == list(range(18))
    centres = selection.index[18:20].tolist()
    assert all(18 <= c <= 28 for c in centres) and selection.features is not None
    assert torch.equal(selection.features[:18], tokens.features[:18])
    members = torch.arange(18, 29)
    gap = torch.cdist(tokens.features[members], tokens.features[centres]).argmin(1)
    for i in range(2):
        mine = tokens.features[members[(gap == i) | (members == centres[i])]]
        assert torch.allclose(selection.features[18 + i], mine.mean(0), atol=1e-6)


# -- CATP -------------------------------------------------------------------------------------------------------------

X = torch.tensor([[1.0, 0], [1, 0], [0, 1], [-1, 0]])
ALIGNED = (1 + torch.tensor([1.0, 1, 0, -1])) / 2  # to the text (1, 0)


@pytest.mark.parametrize(
    "weight,order,gains",
    [(0.0, [0, 2, 3, 1], [2.5, 1.0, 0.5, 0.0]), (0.7, [0, 2, 1, 3], [3.2, 1.35, 0.7, 0.5]), (5.0, [0, 1], None)],
)
def test_facility_picks_and_gains(weight: float, order: list[int], gains: list[float] | None) -> None:
    found, worth = facility(X, weight * ALIGNED, [4], [len(order)], gains=True)
    assert found.tolist() == order
    if gains is not None:
        assert torch.allclose(worth, torch.tensor(gains), atol=1e-6)


def test_facility_reaches_its_bound_and_never_gains_more() -> None:
    torch.manual_seed(1)
    for k in (2, 3):
        rows, bonus = torch.randn(9, 4), torch.rand(9)
        order, worth = facility(rows, bonus, [9], [k], gains=True)
        unit = torch.nn.functional.normalize(rows, dim=1)
        like = (1 + unit @ unit.T) / 2

        def value(chosen: Any, like: Tensor = like, bonus: Tensor = bonus) -> float:
            chosen = list(chosen)
            return float(like[:, chosen].amax(1).sum() + bonus[chosen].sum())

        best = max(value(c) for c in itertools.combinations(range(9), k))
        assert best * (1 - 1 / math.e) <= value(order.tolist()) <= best + 1e-5
        assert math.isclose(float(worth.sum()), value(order.tolist()), rel_tol=1e-5)
        assert bool((worth.diff() <= 1e-4).all())


def test_facility_takes_the_first_of_two_that_gain_the_same() -> None:
    """Two rows left that cover each other: (1 - c_a) + (s - c_b) and (1 - c_b) + (s - c_a) are one number."""
    torch.manual_seed(3)
    base, twins = torch.randn(5, 6), torch.randn(1, 6)
    rows = torch.cat([base, twins, twins + 0.05 * torch.randn(1, 6)])
    for scale in (1.0, 1.0000001, 3.0, 0.7):
        order = facility(rows * scale, torch.tensor([1.0] * 5 + [0.0] * 2), [7], [7]).tolist()
        assert order.index(5) < order.index(6)


def test_facility_leaves_broken_rows_to_the_end_and_waits_for_nothing() -> None:
    rows = torch.tensor([[torch.nan, 1], [1, 0], [0, 1], [1, 0], [torch.inf, 0]])
    with NoHostSync():
        order = facility(rows, torch.zeros(5), [2, 3], [2, 3])
    assert order.tolist() == [1, 0, 2, 3, 4]


@pytest.mark.parametrize("removed,first", [(0.778, 351), (0.667, 383), (0.899, 317)])
def test_catp_budgets(removed: float, first: int) -> None:
    tokens, pruner = make_tokens(FIVE), CATPPruner()
    budget = Budget(1 - removed)
    assert pruner.stages() == (PROJECTOR, Stage(6), Stage(7))
    assert pruner.stage_budget(budget, PROJECTOR).pools(tokens).counts == (first,) * 5
    if removed == 0.778:
        left = replace(make_tokens([[[(1, 351)]] * 5]), ctx={"image_lens": (576,) * 5})
        assert pruner.stage_budget(budget, Stage(6)).pools(left) == ((4 * 351, 351), (511, 351))
        assert pruner.stage_budget(budget, Stage(7)).pools(left) == ((4 * 351, 351), (4 * 351, 127))


def test_catp_budgets_of_counts_and_of_samples_without_demonstrations() -> None:
    tokens = replace(make_tokens([[[(2, 5)], [(2, 5)]], [], [[(2, 5)]]]), ctx={"image_lens": (10, 10, 10)})
    assert Halfway(4).pools(tokens).counts == (7, 7, 4) and Halfway(30).pools(tokens).counts == (10, 10, 10)
    assert Halfway(4, query_images=2).pools(tokens).counts == (4, 4, 4)  # nobody has a demonstration
    assert Halfway(4, "joint").pools(tokens).counts == (14, 0, 4)
    assert Halfway(0.5, allocation="equal").pools(
        make_tokens([[[(2, 5), (1, 4)], [(2, 5)]], [[(2, 3), (1, 2)]]])
    ).counts == (7, 3, 7, 3, 1)
    assert Contextual(4).pools(tokens) == ((10, 10, 10), (4, 10, 10))
    assert Contextual(4, query=True).pools(tokens) == ((10, 10, 10), (10, 4, 4))
    assert Contextual(4, query_images=2, query=True).pools(tokens) == ((10, 10, 10), (4, 4, 4))
    assert Contextual(1.0).pools(tokens) == ((10, 10, 10), (10, 10, 10))


def test_catp_covers_and_fits_the_paired_text() -> None:
    tokens = make_tokens([[[(1, 4)], [(1, 4)]]], features=torch.cat([X, X]))
    tokens = replace(tokens, pair_text=torch.tensor([[1.0, 0], [0, 0]]))
    pruner = CATPPruner(text_weight=5.0)
    # The first picture takes the duplicates that fit its text; the second has no text and is covered.
    assert pruner.select(tokens, Budget(2), PROJECTOR).index.tolist() == [0, 1, 4, 6]
    assert CATPPruner(text_weight=0.0).select(tokens, Budget(2), PROJECTOR).index.tolist() == [0, 2, 4, 6]


def test_catp_demonstrations_lose_theirs_together() -> None:
    """Query and question are (1, 0): a demonstration like them keeps more than one that is orthogonal to them."""
    features = torch.tensor([[0.0, 1]] * 4 + [[1.0, 0]] * 4 + [[1.0, 0]] * 2)
    tokens = make_tokens([[[(1, 4)], [(1, 4)], [(1, 2)]]], features=features)
    tokens = replace(tokens, text=torch.tensor([[2.0, 0]]), text_lens=(1,))
    rows = torch.zeros(10)
    pruner, stage = CATPPruner(layer=3), Stage(3)
    tokens = probed(tokens, last_query_row_3=rows, last_query_row_2=rows)
    budget = pruner.stage_budget(Budget(0.5), stage)
    assert pruner.select(tokens, budget, stage).index.tolist() == [4, 5, 6, 7, 8, 9]
    # A rise in attention of more than context_weight wins; a fall counts as nothing.
    now = torch.tensor([0.7, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    tokens = probed(tokens, last_query_row_3=now, last_query_row_2=torch.tensor([0.0] * 4 + [0.9] * 4 + [0.0] * 2))
    assert pruner.select(tokens, budget, stage).index.tolist() == [0, 4, 5, 6, 8, 9]


def test_catp_query_keeps_what_is_like_the_context() -> None:
    features = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0.1], [0.3, 1], [1, 0.2]])
    tokens = make_tokens([[[(1, 2)], [(2, 2)]]], features=features)
    tokens = replace(tokens, text=torch.tensor([[0.0, 1]]), text_lens=(1,))
    pruner, stage = CATPPruner(layer=3), Stage(4)
    budget = pruner.stage_budget(Budget(2), stage)
    assert pruner.select(tokens, budget, stage).index.tolist() == [0, 1, 3, 5]


def test_catp_without_demonstrations_is_done_before_the_language_model() -> None:
    """The spec's vectors: coverage picks 0, 2, 3, 1, and with a weight of 0.7 on the fit to the text 0, 2, 1, 3."""
    alone = replace(make_tokens([[[(1, 4)]]], features=X), pair_text=torch.tensor([[1.0, 0]]))
    pruner = CATPPruner(layer=3)
    first = pruner.select(alone, pruner.stage_budget(Budget(3), PROJECTOR), PROJECTOR)
    assert first.index.tolist() == [0, 1, 2]
    left = replace(make_tokens([[[(1, 3)]]], features=X[:3]), ctx={"image_lens": (4,)})
    left = replace(left, text=torch.tensor([[0.0, 1]]), text_lens=(1,))
    rows = torch.zeros(3)
    left = probed(left, last_query_row_3=rows, last_query_row_2=rows)
    for stage in (Stage(3), Stage(4)):
        assert pruner.select(left, pruner.stage_budget(Budget(3), stage), stage).index.tolist() == [0, 1, 2]


@pytest.mark.parametrize("depth,layer", [(32, 6), (28, 6), (40, 10), (16, 3), (6, 1), (5, 1)])
def test_catp_knows_how_deep_the_model_is(depth: int, layer: int) -> None:
    assert CATPPruner().fit(depth).layer == layer and CATPPruner(layer=9).fit(depth).layer == 9


# -- CoreMatching -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores,strict,kept",
    [
        ([10, 9, 8, 1, 1, 1, 1, 0], True, [0, 1, 2]),
        ([10, 9, 8, 1, 1, 1, 1, 0], False, [0, 1, 2, 3, 4, 5, 6]),
        ([5, 5, 5, 5], True, [0, 1, 2, 3]),
        ([5, 5, 5, 5], False, [0, 1, 2, 3]),
        ([4, 3, 2, 1], False, [0, 1, 2, 3]),  # on a line: no elbow
        ([7, 2], True, [0, 1]),
        ([7], True, [0]),
        ([0, 9, 0, 9, 9], True, [0, 1, 2, 3, 4]),  # the elbow is at the top: nothing lies above it
        ([0, 9, 0, 9, 9], False, [1, 3, 4]),
        ([], False, []),
    ],
)
def test_the_elbow(scores: list[int], strict: bool, kept: list[int]) -> None:
    mask = elbow(torch.tensor(scores, dtype=torch.int32), (len(scores),), strict)
    assert mask.nonzero().flatten().tolist() == kept
    # Beside another pool of another length it is the same.
    both = elbow(torch.tensor([*scores, 9, 3, 2, 2, 1], dtype=torch.int32), (len(scores), 5), strict)
    assert both[: len(scores)].tolist() == mask.tolist()


def test_the_elbow_is_that_of_the_distance_in_the_plane() -> None:
    rng = torch.Generator().manual_seed(0)
    for _ in range(50):
        scores = torch.randint(0, 5000, (40,), generator=rng)
        d = scores.sort(descending=True).values.tolist()
        n = len(d)
        length = math.hypot(n - 1, d[-1] - d[0])
        distance = [abs((n - 1) * (d[0] - d[i]) - i * (d[0] - d[-1])) / length for i in range(n)]
        threshold = d[max(range(n), key=lambda i: (distance[i], -i))]
        assert elbow(scores, (n,)).tolist() == (scores >= threshold).tolist()


def cored(lens: tuple[int, ...], rows: list[int], width: int = 40) -> VisualTokens:
    """Prompts of so many tokens, in which `rows` (of all prompts, in order) are pictures of 6 tokens, one a prompt."""
    act = torch.randn(sum(lens), width, generator=torch.Generator().manual_seed(2))
    tokens = make_tokens([[[(2, 3)]] for _ in lens])
    return replace(tokens, probes={Probe("ffn_act", 1): act}, prompt_rows=torch.tensor(rows), prompt_lens=lens)


def test_scores_are_sizes_of_intersections() -> None:
    lens, rows = (9, 11), [*range(2, 8), *range(12, 18)]
    tokens = cored(lens, rows)
    act, scores, start = tokens.probes[Probe("ffn_act", 1)], [], 0
    for b, n in enumerate(lens):
        votes: dict[int, int] = {}
        for row in act[start : start + n].tolist():
            positive = sorted((i for i, x in enumerate(row) if x > 0), key=lambda i: (-row[i], i))
            for i in positive[: int(0.3 * len(positive) + 1e-6)]:
                votes[i] = votes.get(i, 0) + 1
        core = set(sorted(votes, key=lambda i: (-votes[i], i))[: int(0.4 * 40 + 1e-6)])
        scores += [len({i for i, x in enumerate(act[r].tolist()) if x > 0} & core) for r in rows[6 * b : 6 * b + 6]]
        start += n
    pruner = CoreMatchingPruner(rho=0.3)
    assert pruner.score(tokens).tolist() == scores
    scaled = replace(tokens, probes={Probe("ffn_act", 1): act * torch.rand(20, 1).add(0.5)})
    assert pruner.score(scaled).tolist() == scores, "a positive factor of a token changes nothing"
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    turned = replace(tokens, prompt_rows=torch.tensor(rows)[torch.cat([order, order + 6])])
    assert pruner.score(turned).tolist() == [scores[i] for i in (*order.tolist(), *(order + 6).tolist())]


def test_core_tokens_by_elbow_or_by_budget() -> None:
    tokens = cored((9, 11), [*range(2, 8), *range(12, 18)])
    scores = CoreMatchingPruner().score(tokens)
    found = CoreMatchingPruner().select(tokens, Budget(0.5), Stage(1))
    assert found.index.tolist() == elbow(scores, (6, 6)).nonzero().flatten().tolist()
    top = CoreMatchingPruner(mode="top_k").select(tokens, Budget(0.5), Stage(1))
    assert top.cu_seqlens.tolist() == [0, 3, 6]
    assert top.order[:3].tolist() == sorted(range(6), key=lambda i: (-int(scores[i]), i))[:3]
    assert CoreMatchingPruner().adaptive and not CoreMatchingPruner(mode="top_k").adaptive


@pytest.mark.parametrize(
    "method,options,message",
    [
        ("fastv", {"layer": -1}, "layer=-1"),
        ("fastv", {"layer": True}, "layer=True"),
        ("random", {"layer": -2}, "layer=-2"),
        ("visual-exit", {"layer": 1.5}, "layer=1.5"),
        ("pyramiddrop", {"layers": [3, 3]}, "ascending"),
        ("pyramiddrop", {"layers": []}, "layers="),
        ("sparsevlm", {"layers": "early"}, "layers='early'"),
        ("sparsevlm", {"recycle": 1.5}, "recycle=1.5"),
        ("catp", {"layer": 0}, "layer=0"),
        ("catp", {"context_weight": -1}, "context_weight=-1"),
        ("catp", {"query_images": 0}, "query_images=0"),
        ("corematching", {"rho": 0}, "rho=0"),
        ("corematching", {"mode": "best"}, "mode='best'"),
        ("corematching", {"strict": 1}, "strict=1"),
    ],
)
def test_options_are_checked_at_the_door(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(method, options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_configs_of_these_methods_go_to_json_and_back() -> None:
    config = vtprune.PruneConfig("pyramiddrop", options={"layers": [1, 3]})
    assert vtprune.PruneConfig.from_json(config.to_json()).pruner() == config.pruner() == PyramidDropPruner((1, 3))
