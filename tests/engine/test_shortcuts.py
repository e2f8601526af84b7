# SPDX-License-Identifier: Apache-2.0
"""Between the vision tower and the language model nobody waits, and nothing is different by a bit."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import vtprune
from vtprune.engine.attach import engine_of
from vtprune.models import find_family

FAMILIES = ("llava", "llava_next")
STEPS = ("get_placeholder_mask", "pack_image_features")


def counted(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the model's own steps run, from now on."""
    ran: list[str] = []
    for name in STEPS:
        cls = type(find_family(model).inner)
        if original := getattr(cls, name, None):

            @functools.wraps(original)  # it counts as transformers' own
            def step(self: Any, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
                ran.append(_name)
                return _original(self, *args, **kwargs)

            monkeypatch.setattr(cls, name, step)
    return ran


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_pruned_prefill_runs_none_of_them(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build(family)
    batch = tiny.collate(tiny.mixed(model))
    with vtprune.apply(model, "norm", keep=0.4):
        model(**batch)  # how pictures of these sizes are packed is asked of the model once
        ran = counted(model, monkeypatch)
    with vtprune.apply(model, "norm", keep=0.4):
        model(**batch)
        ran.clear()
        found = [model(**batch).logits, model.generate(**batch, max_new_tokens=3, do_sample=False)]
        assert ran == []
        engine_of(find_family(model)).shortcuts.detach()
        expected = [model(**batch).logits, model.generate(**batch, max_new_tokens=3, do_sample=False)]
        assert ran
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_take_the_models_own_way(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newline may be all that is trained: it has its gradient from the model's own packing."""
    model = tiny.build(family)
    newline = getattr(find_family(model).inner, "image_newline", None)
    model.requires_grad_(False)
    if newline is not None:
        newline.requires_grad_(True)
    ran = counted(model, monkeypatch)
    with vtprune.apply(model, "norm", keep=0.4):
        inputs = tiny.prompt(model, 1)
        out = model(**inputs, labels=inputs["input_ids"])
        ran.clear()
        out = model(**inputs, labels=inputs["input_ids"])
    assert ("pack_image_features" in ran) == (newline is not None)
    if newline is not None:
        out.loss.backward()
        assert newline.grad is not None and newline.grad.abs().sum() > 0


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_wrong_is_the_models_own_error(family: str) -> None:
    model = tiny.build(family)
    inputs = tiny.prompt(model, 2)
    inputs["input_ids"][0, inputs["input_ids"][0].tolist().index(tiny.IMAGE)] = tiny.FIRST_WORD
    said = []
    for applied in (False, True):
        with pytest.raises(ValueError, match="do not match") as caught:
            if applied:
                with vtprune.apply(model, "norm", keep=0.4):
                    model(**inputs)
            else:
                model(**inputs)
        said.append(str(caught.value))
    assert said[0] == said[1]


@torch.no_grad()
def test_however_packing_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llava_next")
    inner, inputs = find_family(model).inner, tiny.prompt(model, 2)
    sizes, newline = inputs["image_sizes"], inner.image_newline
    layouts = find_family(model).layouts("image", {"image_sizes": sizes})
    features = [torch.rand(layout.raw_length // 16, 16, len(newline)) for layout in layouts]
    names = ("image_features", "image_sizes", "vision_feature_select_strategy", "image_newline")
    whole = dict(zip(names, (features, sizes, "default", newline), strict=True))
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (inner, (), whole),
        (inner, tuple(whole.values()), {}),
        (inner, (features, sizes), {k: whole[k] for k in names[2:]}),
        (inner, (features, sizes, "default"), {}),
        (inner, (features, list(sizes), "default", newline), {}),
        (inner, (features, sizes), {}),
        (model, (), whole),
    ]

    def said(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return target.pack_image_features(*args, **kwargs)
        except TypeError as error:
            return str(error)

    stock = [said(*call) for call in calls if hasattr(call[0], "pack_image_features")]
    with vtprune.apply(model, "norm", keep=0.4):
        model(**inputs)
        ours = [said(*call) for call in calls if hasattr(call[0], "pack_image_features")]
    for a, b in zip(stock, ours, strict=True):
        if isinstance(a, str):
            assert a == b
        else:
            assert all(map(torch.equal, a[0], b[0])) and torch.equal(a[1], b[1])


@torch.no_grad()
def test_an_own_version_of_a_step_runs() -> None:
    model = tiny.build("llava")
    inner, ran = find_family(model).inner, []

    class Own(type(inner)):  # type: ignore[misc]
        def get_placeholder_mask(self, input_ids: Any, inputs_embeds: Any, image_features: Any) -> Any:
            ran.append(True)
            return super().get_placeholder_mask(input_ids, inputs_embeds=inputs_embeds, image_features=image_features)

    inner.__class__ = Own
    with vtprune.apply(model, "norm", keep=0.4):
        model(**tiny.prompt(model, 1))
    assert ran


@torch.no_grad()
def test_qwen_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("qwen2_5_vl")
    with vtprune.apply(model, "norm", keep=0.4):
        assert not engine_of(find_family(model)).shortcuts.wrapped
        model(**tiny.prompt(model, 1))


@torch.no_grad()
def test_somebody_elses_wrapper_stays() -> None:
    model = tiny.build("llava_next")
    inner = find_family(model).inner
    own = inner.pack_image_features
    inner.pack_image_features = own
    with vtprune.apply(model, "norm", keep=0.4):
        model(**tiny.prompt(model, 1))
        assert inner.__dict__["pack_image_features"] is own
    assert inner.__dict__["pack_image_features"] is own and "get_placeholder_mask" not in inner.__dict__


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_nothing_waits_between_the_tower_and_the_language_model(family: str) -> None:
    model = tiny.build(family)
    inputs = {k: v.cuda() for k, v in tiny.collate(tiny.mixed(model)).items()}  # made with the model, on the CPU
    bound = find_family(model.cuda())
    waits: list[str] = []

    def loud(*_: Any) -> None:
        torch.cuda.set_sync_debug_mode("warn")

    def quiet(*_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    handles = [bound.inner.vision_tower.register_forward_hook(loud), bound.lm.register_forward_pre_hook(quiet)]
    try:
        with vtprune.apply(model, "norm", keep=0.4):
            model(**inputs)
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                model(**inputs)
            waits += [f"{w.filename}:{w.lineno}" for w in seen if "called a synchronizing" in str(w.message)]
    finally:
        quiet()
        for handle in handles:
            handle.remove()
    assert waits == []
