# SPDX-License-Identifier: Apache-2.0
"""Tests of the tests: known bugs are put in from the outside, and each must make a comparison fail.

The bugs are those that were met while the mechanism was found. Each is a hook that runs after the engine's own, so that
the controls know nothing of how the engine is built. Every control first shows that the comparison holds without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import vtprune

from .helpers import (
    ATTENTIONS,
    FP32,
    KEEP,
    LOOSE,
    assert_close,
    forward_error,
    generate,
    generation_error,
    kept_of,
    later_hook,
    manual_decode,
    reference,
    rope_bug,
    spy,
    twin,
)

SLACK = 20  # a control must miss the tolerance by far, not by a hair


def fails(comparison: Callable[[], float], tolerance: float) -> bool:
    """Whether a comparison notices: a difference well above the tolerance, NaN, or an error from mismatched shapes."""
    try:
        return not comparison() <= SLACK * tolerance
    except (RuntimeError, ValueError, IndexError):
        return True


@contextmanager
def growing_mask(model: nn.Module, inputs: tiny.Inputs) -> Iterator[None]:
    """Decode steps get the mask of the *unpruned* prompt, one column longer every step, as generate() hands it on."""
    steps = [0]

    def change(kwargs: dict[str, Any]) -> None:
        if kwargs["inputs_embeds"].shape[1] == 1:
            steps[0] += 1
            mask = inputs["attention_mask"]
            kwargs["attention_mask"] = torch.cat([mask, mask.new_ones(mask.shape[0], steps[0])], 1)

    with later_hook(model.model.language_model, change):
        yield


@contextmanager
def no_mask(model: nn.Module) -> Iterator[None]:
    def change(kwargs: dict[str, Any]) -> None:
        kwargs["attention_mask"] = None

    with later_hook(model.model.language_model, change):
        yield


@contextmanager
def gaps_shown(model: nn.Module, gaps: Tensor) -> Iterator[None]:
    """Everything, not only the rotary embedding, sees the gapped positions; and there is no mask."""

    def change(kwargs: dict[str, Any]) -> None:
        kwargs["attention_mask"] = None
        shown = kwargs["position_ids"]
        kwargs["position_ids"] = torch.cat([gaps[None], shown[1:]]) if shown.ndim == 3 else gaps

    with later_hook(model.model.language_model, change):
        yield


def renumbered(positions: Tensor) -> Tensor:
    return torch.arange(positions.shape[-1]).expand_as(positions)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_mask_left_growing_at_full_length_is_noticed(family: str, attention: str) -> None:
    model, ref = tiny.build(family, attention), reference(family)
    samples = tiny.mixed(model)
    batch = tiny.collate(samples)

    def comparison() -> float:
        return generation_error(model, ref, samples, batch, "norm", steps=3)

    with vtprune.apply(model, "norm", keep=KEEP):
        assert comparison() <= LOOSE
        with growing_mask(model, batch):
            assert fails(comparison, LOOSE)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_renumbered_positions_are_noticed(family: str) -> None:
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, 2)

    def forward() -> float:
        return forward_error(model, ref, [sample], sample, "norm")

    def decoding() -> float:
        return generation_error(model, ref, [sample], sample, "norm", steps=3)

    with vtprune.apply(model, "norm", keep=KEEP):
        assert forward() <= FP32 and decoding() <= LOOSE
        with rope_bug(model, renumbered):
            assert fails(forward, FP32) and fails(decoding, LOOSE)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_positions_off_by_one_are_noticed(family: str) -> None:
    """Of decode steps only: the mildest slip there is."""
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, 2)

    def comparison() -> float:
        return generation_error(model, ref, [sample], sample, "norm", steps=3)

    with vtprune.apply(model, "norm", keep=KEEP):
        assert comparison() <= LOOSE
        with rope_bug(model, lambda p: p - 1 if p.shape[-1] == 1 else p):
            assert fails(comparison, LOOSE)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_decode_positions_counted_from_the_pruned_cache_are_noticed(family: str) -> None:
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, 2)
    length = [0]

    def pruned_count(positions: Tensor) -> Tensor:
        if positions.shape[-1] > 1:
            length[0] = positions.shape[-1]
            return positions
        length[0] += 1
        return torch.full_like(positions, length[0] - 1)

    def comparison() -> float:
        with spy("norm") as records:
            _, logits = manual_decode(model, sample, 3)
        kept = kept_of(model, sample, records)[0]
        return float((logits[0] - ref.greedy(ref.prompt(sample), kept, 3)[1]).abs().max())

    with vtprune.apply(model, "norm", keep=KEEP):
        assert comparison() <= LOOSE
        with rope_bug(model, pruned_count):
            assert fails(comparison, LOOSE)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_missing_mask_is_noticed(family: str, attention: str) -> None:
    model, ref = tiny.build(family, attention), reference(family)
    samples = tiny.mixed(model)
    batch = tiny.collate(samples)

    def comparison() -> float:
        return forward_error(model, ref, samples, batch, "norm", use_cache=False)

    with vtprune.apply(model, "norm", keep=KEEP):
        assert comparison() <= LOOSE
        with no_mask(model):
            assert fails(comparison, LOOSE)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gaps_shown_to_the_mask_are_noticed(family: str) -> None:
    """The packed-sequence trap itself."""
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, 2)
    with vtprune.apply(model, "norm", keep=KEEP):
        with spy("norm") as records, torch.no_grad():
            model(**sample)
        kept = kept_of(model, sample, records)[0][None]
        gaps = torch.arange(len(kept))[kept][None]

        def comparison() -> float:
            return forward_error(model, ref, [sample], sample, "norm", use_cache=False)

        assert comparison() <= FP32
        with gaps_shown(model, gaps):
            assert fails(comparison, FP32)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_decode_masks_of_the_layers_left_untouched_are_noticed(family: str, attention: str) -> None:
    """Above a stage the cache is shorter than the mask that the text model made for its first layer."""
    model, ref = tiny.build(family, attention), reference(family)
    samples = tiny.mixed(model)
    batch = tiny.collate(samples)
    layers = model.model.language_model.layers

    def comparison() -> float:
        return generation_error(model, ref, samples, batch, "test-layers", steps=3)

    with vtprune.apply(model, "test-layers", keeps={1: 0.4}), ExitStack() as stack:
        assert comparison() <= LOOSE
        first: dict[str, Any] = {}

        def keep_mask(kwargs: dict[str, Any]) -> None:
            first["mask"] = kwargs["attention_mask"]

        def put_mask(kwargs: dict[str, Any]) -> None:
            hidden = kwargs["position_embeddings"][0]
            if hidden.shape[-2] == 1:
                kwargs["attention_mask"] = first["mask"]

        stack.enter_context(later_hook(layers[0], keep_mask))
        for layer in layers[2:]:
            stack.enter_context(later_hook(layer, put_mask))
        assert fails(comparison, LOOSE)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_rows_in_the_wrong_order_are_noticed(family: str) -> None:
    """Two kept rows change places."""
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, 2)

    def swap(kwargs: dict[str, Any]) -> None:
        embeds = kwargs["inputs_embeds"].clone()
        embeds[:, [4, 5]] = embeds[:, [5, 4]]
        kwargs["inputs_embeds"] = embeds

    def comparison() -> float:
        return forward_error(model, ref, [sample], sample, "norm")

    with vtprune.apply(model, "norm", keep=KEEP):
        assert comparison() <= FP32
        with later_hook(model.model.language_model, swap):
            assert fails(comparison, FP32)


@torch.no_grad()
def test_window_order_left_in_is_noticed() -> None:
    """Qwen2.5-VL computes in window order; these sizes make it differ from raster order in every picture."""
    model, ref = tiny.build("qwen2_5_vl"), reference("qwen2_5_vl")
    sample = tiny.prompt(model, 2)
    order = window_order(twin("qwen2_5_vl"), sample)
    assert not torch.equal(order, torch.arange(len(order)))

    def comparison() -> float:
        return forward_error(model, ref, [sample], sample, "norm")

    original = model.model.get_image_features

    @functools.wraps(original)
    def windowed(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        features = getattr(out, "pooler_output", out)
        rows = torch.cat(list(features))[order].split([len(f) for f in features])
        if hasattr(out, "pooler_output"):
            out.pooler_output = type(features)(rows) if isinstance(features, list) else rows
            return out
        return rows

    with vtprune.apply(model, "norm", keep=KEEP):
        assert comparison() <= FP32
    model.model.get_image_features = windowed
    with vtprune.apply(model, "norm", keep=KEEP):
        assert fails(comparison, FP32)


def window_order(plain: nn.Module, sample: tiny.Inputs) -> Tensor:
    """Raster row of each merged row as the merger puts it out, found by comparing values."""
    merged: list[Tensor] = []
    handle = plain.model.visual.merger.register_forward_hook(lambda _m, _a, out: merged.append(out))
    features = torch.cat(tiny.pooled(plain.model.get_image_features(sample["pixel_values"], sample["image_grid_thw"])))
    handle.remove()
    return (merged[0][:, None] == features[None]).all(-1).float().argmax(1)


@torch.no_grad()
def test_a_cache_shared_by_two_conversations_is_noticed() -> None:
    """State that hung on the model instead of the cache would behave like this: positions of the other prompt."""
    model, ref = tiny.build("llava"), reference("llava")
    one, other = tiny.prompt(model, 2, 1), tiny.prompt(model, 1, 2)
    with vtprune.apply(model, "norm", keep=KEEP):
        with spy("norm") as records:
            cache = model(**one, use_cache=True).past_key_values
        kept = kept_of(model, one, records)[0]
        wrong = other["input_ids"].shape[1]
        want = ref.run(ref.prompt(one), kept, [9]).logits[-1]
        model(**other, use_cache=True)
        with rope_bug(model, lambda p: torch.full_like(p, wrong)):
            got = model(input_ids=torch.tensor([[9]]), past_key_values=cache).logits[0, -1]
    assert fails(lambda: float((got - want).abs().max()), LOOSE)


@torch.no_grad()
def test_the_reference_itself_depends_on_what_is_kept() -> None:
    """Every visual token matters to the last logits by more than any tolerance used here."""
    for family in tiny.FAMILIES:
        ref = reference(family)
        prompt = ref.prompt(tiny.prompt(ref.twin, 1))
        dense = ref.run(prompt, {}).logits[-1]
        for slot in prompt.visual.nonzero().flatten().tolist():
            kept = torch.ones_like(prompt.visual)
            kept[slot] = False
            got = ref.run(prompt, {None: kept}).logits[-1]
            assert float((got - dense).abs().max()) > SLACK * LOOSE, f"{family}: slot {slot} hardly matters"


@torch.no_grad()
def test_the_untouched_twin_passes_the_comparison_that_pruning_fails() -> None:
    """`generate` without pruning equals the reference that keeps everything: the oracle is not biased to the engine."""
    for family in tiny.FAMILIES:
        ref = reference(family)
        sample = tiny.prompt(ref.twin, 2)
        tokens, logits = generate(ref.twin, sample, 4)
        expected, expected_logits = ref.greedy(ref.prompt(sample), {}, 4)
        assert tokens[0].tolist() == expected
        assert_close(logits[0], expected_logits, LOOSE)
