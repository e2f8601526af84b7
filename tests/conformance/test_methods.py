# SPDX-License-Identifier: Apache-2.0
"""What every registered method must keep to, whoever wrote it: a new one is picked up by its registration."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import vtprune
from vtprune.budget import Budget
from vtprune.errors import ConfigError, UnsupportedModelError
from vtprune.models import FAMILIES, find_family, served
from vtprune.tokens import CLS_LOGITS, CLS_ROW, LAST_CLS_LOGITS, PRE_PROJECTOR

from .helpers import TEST_PRUNERS, hooks, spy

BUILT_IN = sorted(name for name in vtprune.methods() if not name.startswith("test-"))
PROJECTOR = [n for n in BUILT_IN if all(s.layer is None for s in vtprune.methods()[n]().stages())]


@pytest.fixture(scope="module", params=["llava_next", "qwen2_5_vl"])
def encoded(request: pytest.FixtureRequest) -> dict[str, Any]:
    model = tiny.build(request.param)
    samples = [tiny.prompt(model, n, seed=n) for n in (1, 3)]
    batch = tiny.collate(samples)
    return {"batch": vtprune.encode(model, batch), "alone": [vtprune.encode(model, s) for s in samples]}


@pytest.mark.parametrize("method", BUILT_IN)
def test_it_says_what_it_is(method: str) -> None:
    cls = vtprune.methods()[method]
    assert cls.name == method and cls.paper and cls.__doc__
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


@pytest.mark.parametrize("how", ["zero", "constant", "copies", "broken", "half"])
@pytest.mark.parametrize("method", PROJECTOR)
def test_odd_features_change_no_count(encoded: dict[str, Any], method: str, how: str) -> None:
    tokens = encoded["batch"]
    rows = tokens.features.detach().clone()
    if how == "zero":
        rows.zero_()
    elif how == "constant":
        rows[:] = rows[0]
    elif how == "copies":
        rows[1::2] = rows[: len(rows) // 2 * 2 : 2]
    elif how == "broken":
        rows[::3] = torch.nan
    else:
        rows = rows.bfloat16()
    tokens = replace(tokens, features=rows)
    selection = vtprune.select(tokens, method, keep=0.3, allocation="equal")
    assert len(selection.index) == sum(Budget(0.3).pools(tokens).counts)
    assert bool((selection.index.diff() > 0).all())
    if selection.features is not None:
        assert selection.features.dtype == rows.dtype and selection.features.shape == rows[selection.index].shape
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


@functools.cache
def shared(family: str) -> nn.Module:
    """Deep enough that layers named by methods lie as in a usual checkpoint with regard to DeepStack."""
    return tiny.build(family, layers=12 if family == "qwen3_vl" else tiny.LAYERS)


def probes_of(family: str) -> set[str]:
    """What a tiny model of the family offers, asked of the model itself."""
    bound = find_family(shared(family))
    return {probe.name for probe in (CLS_ROW, CLS_LOGITS, LAST_CLS_LOGITS, PRE_PROJECTOR) if bound.has_probe(probe)}


def outcome(family: str, method: str) -> str:
    """What really happens to this method on this family, in the words of `vtprune.models.served`."""
    model = shared(family)
    clean = hooks(model)
    try:
        handle = vtprune.apply(model, method, keep=0.5)
    except (UnsupportedModelError, ConfigError) as error:
        assert isinstance(error, UnsupportedModelError) or "(DeepStack); choose a layer" in str(error)
        assert "\n" not in str(error) and hooks(model) == clean
        return "no"
    wants = {probe.name for probe in vtprune.methods()[method]().wants}
    samples = [tiny.prompt(model, 2)]
    if family in (*tiny.QWEN, "llava_onevision") and "video" in vtprune.methods()[method].modality:
        samples.append(tiny.sample(model, [3, tiny.Video(2, 4, 8), 6]))
    with handle, torch.no_grad():
        for sample in samples:
            with spy(method) as records:
                logits = model(**sample).logits
            report = handle.report()
            assert bool(logits.isfinite().all()) and report.tokens_out < report.tokens_in
            assert report.tokens_out > 0 or method == "visual-exit"
            had = {probe.name for probe in records[0].tokens.probes}
            full = wants <= had
            # Something took the place of what was wanted, and the report names it where the method has a choice.
            assert full or report.info, "a stand-in that the report does not name"
    return "yes" if full else "stand-in"


@pytest.mark.parametrize("method", BUILT_IN)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_matrix_that_is_printed_is_what_happens(family: str, method: str) -> None:
    assert served(vtprune.methods()[method])[family] == outcome(family, method)


@pytest.mark.parametrize("family", tiny.MORE)
def test_the_matrix_of_the_newer_families_is_what_happens(family: str) -> None:
    for method in BUILT_IN:
        assert served(vtprune.methods()[method])[family] == outcome(family, method), method


def test_the_matrix_has_every_family_and_these_offer_what_they_say() -> None:
    kinds = [kind for family in FAMILIES for kind in family.model_types]
    assert sorted(kinds) == sorted((*tiny.FAMILIES, *tiny.MORE)) and list(served(vtprune.methods()["norm"])) == kinds
    for family in FAMILIES:
        for kind in family.model_types:
            assert probes_of(kind) == family.probes


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_method_that_cannot_do_without_a_probe_is_a_no_and_refused(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No built-in method is refused with its default options, so one is made that is."""
    cls = vtprune.methods()["norm"]
    monkeypatch.setattr(cls, "needs", property(lambda _: frozenset({CLS_ROW})))
    assert served(cls)[family] == outcome(family, "norm") == ("no" if family in tiny.QWEN else "yes")


def test_methods_of_others_are_untested() -> None:
    assert set(served(TEST_PRUNERS["test-layers"]).values()) == {"untested"}
