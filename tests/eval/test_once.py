# SPDX-License-Identifier: Apache-2.0
"""Encoding once and pruning many times gives, bit for bit, what encoding each time gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from conformance.helpers import LayerPruner
from torch import nn

import vtprune
from vtprune import registry
from vtprune.eval.runner import encode_once
from vtprune.models import find_family
from vtprune.tokens import VisualTokens

PLANS: list[tuple[str | None, dict[str, Any]]] = [
    ("idpruner", {"keep": 0.4}),  # with importance="auto", which takes CLS logits only if it asked for them
    (None, {}),
    ("norm", {"keep": 0.5}),
    ("random", {"keep": 3}),
    ("divprune", {"keep": 0.3, "scope": "joint"}),
    ("test-inside", {"keep": 0.5}),
]


@dataclass
class Inside(LayerPruner):
    """Prunes inside the language model; a class of its own, because registering names it."""


@pytest.fixture(params=tiny.FAMILIES, scope="module")
def model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny.build(request.param)


@pytest.fixture(autouse=True)
def inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", registry.methods())
    registry.register("test-inside")(Inside)


def calls(model: nn.Module) -> list[int]:
    """How often the vision tower ran."""
    tower = model.model.visual if tiny.family_of(model) in tiny.QWEN else model.model.vision_tower
    seen: list[int] = []
    tower.register_forward_hook(lambda *_: seen.append(1))
    return seen


def answer(model: nn.Module, inputs: tiny.Inputs, method: str | None, settings: dict[str, Any]) -> tuple[Any, Any]:
    with vtprune.using(model, method, **settings):
        out = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        return out.sequences, torch.stack(out.logits)


def same(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def batches(model: nn.Module) -> list[tiny.Inputs]:
    found = [tiny.collate(tiny.mixed(model)), tiny.prompt(model, 2, seed=7)]
    if tiny.family_of(model) in tiny.QWEN:
        found.append(tiny.sample(model, [3, tiny.Image(4, 6), 2, tiny.Video(3, 4, 4), 5], seed=9))
    return found


def test_bit_equal_and_one_run_of_the_tower(model: nn.Module) -> None:
    seen = calls(model)
    for inputs in batches(model):
        plain = [answer(model, inputs, *plan) for plan in PLANS]
        assert len({logits.sum().item() for _, logits in plain}) == len(PLANS), (
            "the plans must differ, or nothing is told"
        )
        towers = 2 if "pixel_values_videos" in inputs else 1
        seen.clear()
        with encode_once(model):
            vtprune.encode(model, inputs)
            once = [answer(model, inputs, *plan) for plan in PLANS]
        assert len(seen) == towers
        assert all(map(same, plain, once))


def test_other_pixels_and_missing_probes_encode_again(model: nn.Module) -> None:
    first, second = tiny.prompt(model, 1, seed=1), tiny.prompt(model, 1, seed=2)
    plain = [answer(model, x, "idpruner", {"keep": 0.4}) for x in (first, second)]
    seen = calls(model)
    has_cls = tiny.family_of(model).startswith("llava")
    with vtprune.using(model, None):  # vtprune stays on the model, so the memory must end by itself
        with encode_once(model):
            answer(model, first, None, {})  # captures no probe
            assert same(answer(model, first, "idpruner", {"keep": 0.4}), plain[0])
            assert same(answer(model, second, "idpruner", {"keep": 0.4}), plain[1])
        assert len(seen) == (3 if has_cls else 2)
        answer(model, first, "norm", {"keep": 0.5})
        assert len(seen) == (4 if has_cls else 3)


def test_a_pruner_sees_only_the_probes_that_it_asked_for(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tiny.prompt(model, 1)
    found: list[set[Any]] = []
    original = vtprune.methods()["norm"].score

    def score(self: Any, tokens: VisualTokens) -> torch.Tensor:
        found.append(set(tokens.probes))
        return original(self, tokens)

    monkeypatch.setattr(vtprune.methods()["norm"], "score", score)
    with encode_once(model):
        assert vtprune.encode(model, inputs).probes
        answer(model, inputs, "norm", {"keep": 0.5})
    assert found == [set()]


def test_the_model_is_left_as_it_was(model: nn.Module) -> None:
    before = dict(model.model.__dict__)
    with encode_once(model):
        vtprune.encode(model, tiny.prompt(model, 1))
    assert model.model.__dict__.keys() == before.keys()
    assert find_family(model) is not None
