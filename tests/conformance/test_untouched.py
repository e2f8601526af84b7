# SPDX-License-Identifier: Apache-2.0
"""Keeping everything changes nothing; removing leaves nothing behind."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import vtprune
from vtprune import engine
from vtprune.errors import VTPruneError, VTPruneWarning

from .helpers import ATTENTIONS, KEEP, LOOSE, assert_close, error, generate, hooks, later_hook, same, twin


def batches(model: torch.nn.Module) -> dict[str, tiny.Inputs]:
    samples = tiny.mixed(model)
    return {
        "alone": samples[0],
        "left": tiny.collate(samples, "left"),
        "right": tiny.collate(samples, "right"),
    }


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_keep_all_gives_bit_identical_logits(family: str, attention: str) -> None:
    model, plain = tiny.build(family, attention), twin(family, attention=attention)
    with vtprune.apply(model, "norm", keep=1.0):
        for shape, batch in batches(model).items():
            assert same(model(**batch).logits, plain(**batch).logits), shape
            no_mask = {k: v for k, v in batch.items() if k != "attention_mask"}
            assert same(model(**no_mask).logits, plain(**no_mask).logits), f"{shape} without a mask"


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_keep_all_generates_bit_identically(family: str, attention: str) -> None:
    model, plain = tiny.build(family, attention), twin(family, attention=attention)
    with vtprune.apply(model, "random", keep=1.0):
        for shape in ("alone", "left"):
            batch = batches(model)[shape]
            tokens, logits = generate(model, batch)
            expected, expected_logits = generate(plain, batch)
            assert same(tokens, expected), shape
            assert same(logits, expected_logits), shape


@pytest.mark.parametrize("count", [1000, 10**9])
def test_keeping_more_than_exist_is_bit_identical_too(count: int) -> None:
    model, plain = tiny.build("llava"), twin("llava")
    batch = tiny.collate(tiny.mixed(model))
    with vtprune.apply(model, "divprune", keep=count), torch.no_grad():
        assert same(model(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_forced_packing_of_all_rows_agrees(family: str, attention: str) -> None:
    """The whole machinery at work on every row; that it is at work is seen in what reaches the language model."""
    model, plain = tiny.build(family, attention), twin(family, attention=attention)
    seen: list[dict] = []
    with vtprune.apply(model, "norm", keep=1.0), later_hook(model.model.language_model, seen.append):
        for shape, batch in batches(model).items():
            with engine.force_pack():
                logits = model(**batch).logits
            valid = batch["attention_mask"].bool()
            assert_close(logits[valid], plain(**batch).logits[valid], LOOSE, shape)
        for shape in ("alone", "left"):
            batch = batches(model)[shape]
            with engine.force_pack():
                tokens, logits = generate(model, batch)
            expected, expected_logits = generate(plain, batch)
            assert same(tokens, expected), shape
            assert_close(logits, expected_logits, LOOSE, shape)

        no_mask = {k: v for k, v in batches(model)["alone"].items() if k != "attention_mask"}
        seen.clear()
        with engine.force_pack():
            model(**no_mask)
        assert seen[0]["attention_mask"] is not None, "forced packing did not pack: there is no explicit mask"
        seen.clear()
        right = batches(model)["right"]
        with engine.force_pack():
            model(**right)
        mask = seen[0]["attention_mask"].bool()
        assert mask.ndim == 2 and bool(mask[:, -1].all()), "forced packing did not pack: rows are not left-padded"
        assert not same(seen[0]["inputs_embeds"][1], model.model.get_input_embeddings()(right["input_ids"])[1])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_remove_restores_every_bit_and_leaves_no_hook(family: str) -> None:
    model, plain = tiny.build(family), twin(family)
    batch = tiny.collate(tiny.mixed(model))
    generate(model, batch)  # transformers itself installs some hooks at the first call
    before, weights = hooks(model), {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}

    for method, options in (("norm", {}), ("test-layers", {"keeps": {None: 0.5, 1: 0.4}})):
        vtprune.apply(model, method, keep=KEEP, **options)
        tokens, logits = generate(model, batch)
        assert error(logits, generate(plain, batch)[1]) > 1e-3, "pruning changed nothing, so removing proves nothing"
        vtprune.remove(model)
        assert hooks(model) == before
        assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
        after = model.state_dict()
        assert list(after) == list(weights) and all(same(after[k], weights[k]) for k in weights)
        with torch.no_grad():
            assert same(model(**batch).logits, plain(**batch).logits)
        tokens, logits = generate(model, batch)
        expected, expected_logits = generate(plain, batch)
        assert same(tokens, expected) and same(logits, expected_logits)


def test_remove_without_apply_does_nothing() -> None:
    model = tiny.build("llava")
    before = hooks(model)
    vtprune.remove(model)
    vtprune.remove(model)
    assert hooks(model) == before


@torch.no_grad()
def test_a_second_apply_replaces_the_first() -> None:
    model, once = tiny.build("llava"), tiny.build("llava")
    inputs = tiny.prompt(model, 2)
    model(**inputs)  # transformers itself installs some hooks at the first call
    clean = hooks(model)
    vtprune.apply(model, "test-layers", keep=0.9, keeps={1: 0.5, 3: 0.25})
    vtprune.apply(model, "norm", keep=KEEP)
    vtprune.apply(once, "norm", keep=KEEP)
    assert same(model(**inputs).logits, once(**inputs).logits)
    assert vtprune.report(model).method == "norm"
    vtprune.remove(model)
    assert hooks(model) == clean
    assert same(model(**inputs).logits, twin("llava")(**inputs).logits)


@torch.no_grad()
def test_an_old_handle_does_not_remove_its_successor() -> None:
    model = tiny.build("llava")
    inputs = tiny.prompt(model, 2)
    old = vtprune.apply(model, "random", keep=0.9)
    vtprune.apply(model, "norm", keep=KEEP)
    pruned = model(**inputs).logits
    old.remove()
    assert same(model(**inputs).logits, pruned)


@torch.no_grad()
def test_context_manager_and_handle_restore() -> None:
    model, plain = tiny.build("llava_next"), twin("llava_next")
    inputs = tiny.prompt(model, 2)
    dense = plain(**inputs).logits
    model(**inputs)
    clean = hooks(model)
    with vtprune.apply(model, "norm", keep=KEEP) as handle:
        assert not same(model(**inputs).logits, dense)
        assert handle.report().tokens_out < handle.report().tokens_in
    assert hooks(model) == clean and same(model(**inputs).logits, dense)

    with pytest.raises(KeyError, match="on purpose"), vtprune.apply(model, "norm", keep=KEEP):
        model(**inputs)
        raise KeyError("on purpose")
    assert hooks(model) == clean and same(model(**inputs).logits, dense)

    handle = vtprune.apply(model, "norm", keep=KEEP)
    model(**inputs)
    handle.remove()
    handle.remove()
    assert hooks(model) == clean and same(model(**inputs).logits, dense)


@torch.no_grad()
def test_remove_leaves_the_hooks_and_patches_of_others() -> None:
    """Other tools hook and patch instances too; what was there before `apply` is there after `remove`."""
    model = tiny.build("llava")
    sample = tiny.prompt(model, 1)
    original, asked = model.model.get_image_features, []

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        asked.append("patch")
        return original(*args, **kwargs)

    model.model.get_image_features = patched
    handle = model.model.language_model.register_forward_hook(lambda *_: asked.append("hook"))
    with vtprune.apply(model, "norm", keep=KEEP):
        model(**sample)
        assert asked == ["patch", "hook"]
    model(**sample)
    assert asked == ["patch", "hook", "patch", "hook"]
    handle.remove()


@torch.no_grad()
def test_text_only_prompts_pass_bit_identically() -> None:
    for family in tiny.FAMILIES:
        model, plain = tiny.build(family), twin(family)
        inputs = tiny.collate([tiny.prompt(model, 0, 1), tiny.prompt(model, 0, 2, end=9)])
        with pytest.warns(VTPruneWarning), vtprune.apply(model, "norm", keep=KEEP):
            assert same(model(**inputs).logits, plain(**inputs).logits)
            assert same(generate(model, inputs)[1], generate(plain, inputs)[1])


def test_a_pruned_model_is_saved_as_if_it_were_not_and_refuses_to_be_copied(tmp_path: Path) -> None:
    """A copy would share hooks and state with the original."""
    model = tiny.build("llava")
    inputs = tiny.prompt(model, 2)
    with vtprune.apply(model, "norm", keep=KEEP):
        generate(model, inputs, 2)
        model.save_pretrained(tmp_path)
        with pytest.raises(VTPruneError, match="remove"):
            copy.deepcopy(model)
        with pytest.raises(VTPruneError, match="remove"):
            torch.save(model, tmp_path / "model.pt")
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert same(loaded(**inputs).logits, twin("llava")(**inputs).logits)
        assert same(copy.deepcopy(model)(**inputs).logits, twin("llava")(**inputs).logits)
