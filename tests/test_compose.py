# SPDX-License-Identifier: Apache-2.0
"""Several methods, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import tiny
import torch
from helpers import Declared, make_tokens

import vtprune
from vtprune import registry
from vtprune.budget import Budget
from vtprune.compose import Composed, compose, parse_keeps, parse_names
from vtprune.config import PruneConfig
from vtprune.errors import ConfigError
from vtprune.registry import Pruner, build, register
from vtprune.tokens import CLS_LOGITS, CLS_ROW, PROJECTOR, Selection, Stage, VisualTokens

SAMPLES = [[[(6, 6)], [(4, 5), (3, 7)]], [], [[(6, 6), (2, 2), (3, 5)]]]


def kept(names: list[str], tokens: VisualTokens, budget: Budget, keeps: Any = (), **options: Any) -> list[int]:
    return compose(names, tuple(keeps), options).select(tokens, budget).index.tolist()


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @register("test-merging")
    @dataclass
    class Merging(Declared):
        """Keeps the first rows, each doubled."""

        paper = "test"

        def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
            pools = budget.pools(tokens)
            starts = torch.tensor([0, *pools.lens[:-1]]).cumsum(0).tolist()
            rows = torch.tensor([a + i for a, k in zip(starts, pools.counts, strict=True) for i in range(k)])
            chosen = Selection.from_order(rows, tokens, how="doubled")
            return Selection(chosen.index, chosen.cu_seqlens, None, 2 * tokens.features[chosen.index], chosen.info)

    @register("test-adaptive")
    @dataclass
    class Adaptive(Declared):
        """Keeps what is positive."""

        paper = "test"
        adaptive = True

        def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
            return Selection.from_mask(tokens.features[:, 0] > 0, tokens)

    @register("test-deep")
    @dataclass
    class Deep(Declared):
        paper = "test"

        def stages(self) -> tuple[Stage, ...]:
            return (Stage(layer=1),)

    yield


def test_by_hand() -> None:
    """Norms 1 to 8; the four longest are left to divprune, among which two are alike."""
    directions = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1], [1, 0], [1, 0], [-1, 0], [0, 1]])
    tokens = make_tokens([[[(2, 4)]]], features=directions * torch.arange(1.0, 9.0)[:, None])
    # Rows 4 to 7 are left: (1, 0), (1, 0), (-1, 0), (0, 1). No two of (1,0), (-1,0), (0,1) are alike.
    assert kept(["norm", "divprune"], tokens, Budget(2)) == [4, 6]
    assert kept(["norm", "divprune"], tokens, Budget(3), [0.5, 3]) == [4, 6, 7]
    assert kept(["norm", "norm"], tokens, Budget(2)) == [6, 7]


@pytest.mark.parametrize(
    "budget",
    [
        Budget(0.25),
        Budget(7),
        Budget(0.3, allocation="pooled"),
        Budget(0.3, scope="joint"),
        Budget(40, allocation="proportional"),
        Budget(0.5, allocation="globalcom2"),
        Budget(1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "names", [["norm", "idpruner"], ["random", "grid", "divprune"], ["norm", "globalcom2"]], ids=str
)
def test_every_pool_keeps_its_budget(names: list[str], budget: Budget) -> None:
    tokens = make_tokens(SAMPLES, cls_row=True)
    pools = budget.pools(tokens)
    for keeps in ((), [0.9] * (len(names) - 1) + [budget.keep], [0.01] * (len(names) - 1) + [budget.keep]):
        index = torch.tensor(kept(names, tokens, budget, keeps))
        ends = torch.tensor(pools.lens).cumsum(0)
        found = torch.bincount(torch.bucketize(index, ends, right=True), minlength=len(pools.lens))
        assert tuple(found.tolist()) == pools.counts and bool((index.diff() > 0).all())


def test_each_sees_what_the_one_before_left() -> None:
    tokens = make_tokens([[[(8, 8)]]], cls_row=True)
    first = build("norm", {}).select(tokens, Budget(32)).index
    left = tokens.subset(first, torch.tensor([0, 32]))
    second = build("idpruner", {"mmr_lambda": 0.3}).select(left, Budget(16))
    both = compose(["norm", "idpruner"], (0.5, 0.5), {"mmr_lambda": 0.3}).select(tokens, Budget(0.25))
    assert torch.equal(both.index, first[second.index])
    assert both.order is not None and torch.equal(both.order, first[second.order])
    assert both.info == {"idpruner.importance": "cls_logits"}
    # One number: equal steps, here a half and a half.
    assert kept(["norm", "idpruner"], tokens, Budget(0.25), mmr_lambda=0.3) == both.index.tolist()
    assert kept(["norm", "idpruner"], tokens, Budget(16), mmr_lambda=0.3) == both.index.tolist()


def test_fractions_multiply() -> None:
    tokens = make_tokens([[[(8, 8)]]])
    index, left = torch.arange(64), tokens
    for name, count in (("norm", 32), ("random", 24), ("divprune", 12)):
        chosen = build(name, {}).select(left, Budget(count))
        index, left = index[chosen.index], left.subset(chosen.index, chosen.cu_seqlens)
    assert kept(["norm", "random", "divprune"], tokens, Budget(0.1875), [0.5, 0.75, 0.5]) == index.tolist()


def test_an_option_goes_to_each_that_has_it() -> None:
    pair = compose(["random", "zoo"], (), {"seed": 5, "m": 8})
    assert (pair.members[0].seed, pair.members[1].seed, pair.members[1].m) == (5, 5, 8)  # type: ignore[attr-defined]
    with pytest.raises(
        ConfigError, match=r"none of the methods norm, random has an option 'sed' \(did you mean 'seed'"
    ):
        compose(["norm", "random"], (), {"sed": 5})


def test_what_it_says_about_itself() -> None:
    pair = compose(["norm", "idpruner"], (), {"importance": "cls"})
    assert pair.name == "norm+idpruner" and pair.paper == "baseline, arXiv:2602.13315"
    assert pair.needs == {CLS_ROW} and not pair.wants
    assert compose(["norm", "idpruner"], (), {}).wants == {CLS_LOGITS}
    assert pair.stages() == (PROJECTOR,) and not pair.adaptive and not pair.query_aware and pair.training_free
    assert pair.modality == ("image", "video") and pair.mechanism == ("attention", "similarity")
    assert Pruner.name == "" and Composed.name == ""


@pytest.mark.usefixtures("methods")
def test_merged_rows_are_what_the_next_one_sees() -> None:
    tokens = make_tokens([[[(3, 4)], [(2, 4)]]])
    selection = compose(["test-merging", "norm"], (0.5, 0.5), {}).select(tokens, Budget(0.25))
    assert selection.features is not None
    assert torch.equal(selection.features, 2 * tokens.features[selection.index])
    assert selection.index.max() < 16 and (selection.index < 6).sum() == 3 and len(selection) == 5
    assert selection.info == {"test-merging.how": "doubled"}
    last = compose(["norm", "test-merging"], (), {}).select(tokens, Budget(0.25))
    assert torch.equal(last.features, 2 * tokens.features[last.index]) and last.order is None


@pytest.mark.usefixtures("methods")
def test_a_method_that_finds_its_own_count_may_leave_less_than_the_budget() -> None:
    tokens = make_tokens([[[(3, 4)], [(2, 4)]]])
    positive = (tokens.features[:, 0] > 0).nonzero().flatten()
    pair = compose(["test-adaptive", "norm"], (), {})
    assert pair.adaptive and pair.select(tokens, Budget(1.0)).index.tolist() == positive.tolist()
    small = pair.select(tokens, Budget(2))
    assert small.cu_seqlens.tolist() == [0, 2, 4] and set(small.index.tolist()) <= set(positive.tolist())
    assert compose(["norm", "test-adaptive"], (), {}).select(tokens, Budget(1.0)).index.tolist() == positive.tolist()


def test_each_keeps_its_own_share_before_a_method_that_counts_in_another_way() -> None:
    """Of 100 tokens a picture divprune leaves 80, and catp, down to 40 in the end, 70 of those at the projector."""
    tokens = make_tokens([[[(10, 10)], [(10, 10)]]])
    pair = compose(["divprune", "catp"], (0.8, 0.5), {})
    seen: list[int] = []
    original = type(pair.members[1]).select

    def select(self: Pruner, left: VisualTokens, *rest: Any) -> Selection:
        seen.append(len(left.source))
        return original(self, left, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pair.members[1]), "select", select)
        chosen = pair.select(tokens, pair.stage_budget(Budget(0.4), PROJECTOR))
    assert seen == [160] and len(chosen) == 140


def test_a_method_that_only_looks_does_not_stop_the_one_before_it() -> None:
    """SparseVLM drops nothing at the projector, where it tells which words rate."""
    tokens = make_tokens([[[(10, 10)]]])
    tokens = replace(tokens, text=torch.randn(3, 8), text_lens=(3,), ctx={"image_lens": (100,)})
    first = {(): 50, (0.4, 0.5): 40}  # equal steps to 25: a half, and a half of that
    for keeps, left in first.items():
        pair = compose(["divprune", "sparsevlm"], keeps, {})
        budget = pair.stage_budget(Budget(0.25 if not keeps else 0.2), PROJECTOR)
        assert budget.pools(tokens).counts == (left,) == (len(pair.select(tokens, budget)),)
        assert tokens.ctx["raters"].shape == (1, 3)
    last = Stage(14)
    assert compose(["divprune", "sparsevlm"], (), {}).stage_budget(Budget(0.25), last).pools(tokens).counts == (25,)
    everything = compose(["divprune", "sparsevlm"], (), {})
    assert len(everything.select(tokens, everything.stage_budget(Budget(1.0), PROJECTOR))) == 100


@pytest.mark.parametrize(
    "names,left",
    [
        (["pyramiddrop", "visual-exit"], {7: 79, 15: 62, 23: 50}),  # 100 * .5 ** (1/3), and so on
        (["sparsevlm", "visual-exit"], {1: 79, 5: 62, 14: 50}),
        (["catp", "visual-exit"], {None: 50, 7: 50}),  # no demonstrations: the first step takes all
    ],
)
def test_steps_of_a_method_lead_to_its_own_share(names: list[str], left: dict[int | None, int]) -> None:
    """Of two methods with one number, the first goes half of the way: 50 of 100 tokens where 25 are left."""
    pair = compose(names, (), {"layer": 30} if names[0] != "catp" else {})
    for layer, count in left.items():
        tokens = replace(make_tokens([[[(10, 10)]]]), ctx={"image_lens": (100,)})
        assert pair.stage_budget(Budget(0.25), Stage(layer)).pools(tokens).counts == (count,)
        assert pair.stage_budget(Budget(25), Stage(layer)).pools(tokens).counts == (count,)


def test_half_of_a_step_of_catp_is_taken_where_there_are_demonstrations() -> None:
    tokens = replace(make_tokens([[[(10, 10)], [(10, 10)]]]), ctx={"image_lens": (100, 100)})
    pair = compose(["catp", "visual-exit"], (), {})
    assert pair.stage_budget(Budget(0.25), PROJECTOR).pools(tokens).counts == (75, 75)


def test_demonstrations_share_what_a_step_leaves() -> None:
    tokens = replace(make_tokens([[[(10, 10)]] * 3]), ctx={"image_lens": (100,) * 3})
    pair = compose(["catp", "visual-exit"], (), {})
    assert pair.stage_budget(Budget(0.25), Stage(6)).pools(tokens) == ((200, 100), (100, 100))


@pytest.mark.usefixtures("methods")
def test_places_follow_one_another() -> None:
    assert PruneConfig(["test-deep", "test-deep"]).pruner().stages() == (Stage(layer=1),)
    assert PruneConfig(["norm", "test-deep"]).pruner().stages() == (PROJECTOR, Stage(layer=1))
    assert PruneConfig(["norm", "sparsevlm"]).pruner().stages() == (PROJECTOR, Stage(1), Stage(5), Stage(14))
    with pytest.raises(ConfigError, match="'test-deep' at layer 1; 'norm' at projector"):
        PruneConfig(["test-deep", "norm"])
    with pytest.raises(ConfigError, match="cannot begin before the one before it is done"):
        PruneConfig(["pyramiddrop", "fastv"])


@pytest.mark.parametrize(
    "method,keep,message",
    [
        (["norm", "grid"], [0.5], "1 numbers for 2 methods"),
        (["norm", "grid"], [64, 0.5], "a count belongs to the last method"),
        (["norm", "grid"], [0.5, 0], "keep=0"),
        (["norm", "gird"], 0.5, "did you mean 'grid'"),
        ([], 0.5, "give a method's name, or several"),
        ("norm", [0.5, 0.5], "keep="),
    ],
)
def test_what_cannot_be_composed(method: Any, keep: Any, message: str) -> None:
    model = tiny.build("llava")
    with pytest.raises(ConfigError) as caught:
        vtprune.apply(model, method, keep=keep)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_names_and_budgets_as_on_the_command_line() -> None:
    assert parse_names("norm") == "norm" and parse_names("prumerge+") == "prumerge+"
    assert parse_names("norm+idpruner") == ("norm", "idpruner")
    assert parse_names("prumerge++norm+prumerge+") == ("prumerge+", "norm", "prumerge+")
    assert parse_keeps("1/4") == 0.25 and parse_keeps("64t") == 64
    assert parse_keeps("1/2+50%+64t") == (0.5, 0.5, 64)
    with pytest.raises(ConfigError, match="half"):
        parse_keeps("1/2+half")


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_in_a_model(family: str) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 2)
    tokens = vtprune.encode(model, sample)
    for keep in (0.25, 5, [0.5, 0.5], [0.5, 5]):
        with vtprune.apply(model, ["norm", "idpruner"], keep=keep) as handle:
            model(**sample)
            report = handle.report()
        last = 0.25 if keep == [0.5, 0.5] else 5 if keep == [0.5, 5] else keep
        assert [i.tokens_out for i in report.images] == [Budget(last).image_count(i.tokens_in) for i in report.images]
        chosen = vtprune.select(tokens, ["norm", "idpruner"], keep=keep)
        flags = torch.cat([torch.from_numpy(s.kept) for i in report.images for s in i.segments])
        assert torch.equal(flags.nonzero().flatten(), chosen.index)
        assert report.method == "norm + idpruner" and str(report).startswith("norm + idpruner keep=")
        assert repr(handle).startswith("<vtprune norm + idpruner")


@torch.no_grad()
def test_alone_as_in_a_batch_and_all_of_it() -> None:
    model = tiny.build("llava_next")
    samples = [tiny.prompt(model, n, seed=n) for n in (1, 3)]
    picked = vtprune.select(vtprune.encode(model, tiny.collate(samples)), ["norm", "globalcom2"], keep=0.3).index
    start, apart = 0, []
    for sample in samples:
        tokens = vtprune.encode(model, sample)
        apart.append(vtprune.select(tokens, ["norm", "globalcom2"], keep=0.3).index + start)
        start += len(tokens.source)
    assert torch.equal(picked, torch.cat(apart))
    dense = model(**samples[0]).logits
    for keep in (1.0, [1.0, 1.0]):
        with vtprune.apply(model, ["norm", "idpruner"], keep=keep):
            assert torch.equal(model(**samples[0]).logits, dense)
