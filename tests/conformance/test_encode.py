# SPDX-License-Identifier: Apache-2.0
"""`encode` and `select` give what `apply` keeps, without running the language model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import vtprune
from vtprune.errors import ConfigError, InputError

from .helpers import METHODS, first_call, hooks, same, spy, twin


def counted(model: nn.Module) -> tuple[list[str], list[Any]]:
    runs: list[str] = []
    parts = {
        "model": model,
        "inner": model.model,
        "language model": model.model.language_model,
        "layer": model.model.language_model.layers[0],
        "vision": getattr(model.model, "visual", None) or model.model.vision_tower,
    }
    return runs, [m.register_forward_pre_hook(lambda _m, _a, n=name: runs.append(n)) for name, m in parts.items()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_encode_and_select_equal_apply(family: str, method: str) -> None:
    model = tiny.build(family)
    batch = tiny.collate(tiny.mixed(model))
    tokens = vtprune.encode(model, batch)
    for keep in (1, 5, 0.4, 1.0):
        selection = vtprune.select(tokens, method, keep=keep)
        if isinstance(keep, float) and keep == 1.0:
            assert torch.equal(selection.index, torch.arange(len(tokens.source)))
            continue
        with vtprune.apply(model, method, keep=keep), spy(method) as records:
            model(**batch)
        record = first_call(records)[None]
        assert torch.equal(record.selection.index, selection.index)
        assert torch.equal(record.tokens.features, tokens.features)
        assert torch.equal(record.tokens.source, tokens.source)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_encode_never_enters_a_decoder_layer_and_select_runs_nothing(family: str) -> None:
    model = tiny.build(family)
    batch = tiny.collate(tiny.mixed(model))
    model(**batch)
    runs, handles = counted(model)
    clean = hooks(model)
    tokens = vtprune.encode(model, batch)
    assert runs.count("vision") == 1 and "layer" not in runs
    runs.clear()
    for method in METHODS:
        vtprune.select(tokens, method, keep=0.25)
    assert runs == []
    assert hooks(model) == clean, "encode left something on a model that had nothing applied"
    for handle in handles:
        handle.remove()
    assert same(model(**batch).logits, twin(family)(**batch).logits)


@torch.no_grad()
def test_encode_sees_the_full_picture_while_pruning_is_applied() -> None:
    model = tiny.build("llava_next")
    batch = tiny.collate(tiny.mixed(model))
    free = vtprune.encode(model, batch)
    with vtprune.apply(model, "norm", keep=3):
        pruned = model(**batch).logits
        bound = vtprune.encode(model, batch)
        assert same(model(**batch).logits, pruned), "encode disturbed what was applied"
        assert vtprune.report(model).method == "norm"
    assert same(free.features, bound.features) and free.seqlens == bound.seqlens
    assert free.probes.keys() == bound.probes.keys()


@torch.no_grad()
def test_a_sweep_from_one_encode_has_the_prefix_property() -> None:
    model = tiny.build("llava")
    tokens = vtprune.encode(model, tiny.prompt(model, 1))
    for method in ("random", "norm", "divprune", "idpruner"):
        orders = [vtprune.select(tokens, method, keep=k).order for k in (2, 5, 9, 16)]
        for shorter, longer in itertools.pairwise(orders):
            assert shorter is not None and longer is not None
            assert torch.equal(shorter, longer[: len(shorter)]), method


def test_encode_without_a_picture_is_an_error() -> None:
    model = tiny.build("llava")
    clean = hooks(model)
    with pytest.raises(InputError, match="picture"):
        vtprune.encode(model, tiny.prompt(model, 0))
    assert hooks(model) == clean


def test_select_refuses_methods_that_act_inside_the_language_model() -> None:
    model = tiny.build("llava")
    tokens = vtprune.encode(model, tiny.prompt(model, 1))
    with pytest.raises(ConfigError, match="test-layers"):
        vtprune.select(tokens, "test-layers")
    with pytest.raises(ConfigError):
        vtprune.select(tokens, "norm", keep=0)


@torch.no_grad()
def test_a_config_says_everything_and_goes_through_json() -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 2)
    config = vtprune.PruneConfig("random", keep=5, scope="joint", positions="compact", options={"seed": 4})
    with vtprune.apply(model, "random", keep=5, scope="joint", positions="compact", seed=4):
        expected = model(**sample).logits
    for given in (config, vtprune.PruneConfig.from_json(config.to_json())):
        with vtprune.apply(model, given):
            assert same(model(**sample).logits, expected)
    with pytest.raises(ConfigError, match="keep"):
        vtprune.apply(model, config, keep=3)
