# SPDX-License-Identifier: Apache-2.0
"""Position ids: kept tokens keep theirs, gaps are no borders, and `compact` renumbers."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import Image, Video

import vtprune
from vtprune.errors import VTPruneWarning

from .flash_contract import calls
from .helpers import (
    ATTENTIONS,
    FLASH,
    FP32,
    FP64,
    KEEP,
    LOOSE,
    assert_close,
    error,
    forward_error,
    generate,
    generation_error,
    kept_of,
    reference,
    rope_inputs,
    same,
    spy,
    twin,
)
from .reference import grids_in_order, mrope

MIXTURES = {
    "video, image": [3, Video(2, 4, 8), 2, Image(8, 4), 6],
    "image, video": [3, Image(8, 4), 2, Video(3, 4, 4), 6],
    "image, video, image, video": [2, Image(4, 4), 1, Video(2, 4, 4), 1, Image(4, 8), 1, Video(2, 8, 4), 4],
    "a clip longer than its text": [3, Video(6, 4, 4), 5],
    "side by side": [1, Video(2, 4, 4), Image(4, 4), Image(4, 8), Video(2, 4, 4), 2],
}


@pytest.mark.parametrize("family", tiny.QWEN)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_mrope_by_hand_equals_the_model_s_own(family: str, mixture: str) -> None:
    """The tests below take positions from the unpruned model's get_rope_index: here it is checked by hand."""
    ref = reference(family)
    sample = tiny.sample(ref.twin, MIXTURES[mixture], seed=2)
    tick = getattr(ref.twin.config.vision_config, "tokens_per_second", 1)
    rules = mrope(sample["input_ids"][0], grids_in_order(sample), tick)
    assert any(torch.equal(ref.prompt(sample).positions, rule) for rule in rules)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("family", tiny.QWEN)
def test_video_and_image_in_one_prompt(family: str, mixture: str, attention: str) -> None:
    model, ref = tiny.build(family, attention), reference(family)
    sample = tiny.sample(model, MIXTURES[mixture], seed=2)
    with vtprune.apply(model, "norm", keep=KEEP):
        assert forward_error(model, ref, [sample], sample, "norm") <= FP32
        assert generation_error(model, ref, [sample], sample, "norm", steps=4) <= LOOSE


@pytest.mark.parametrize("family", tiny.QWEN)
def test_video_and_image_in_double_precision(family: str) -> None:
    model, ref = tiny.build(family, dtype=torch.float64), reference(family, torch.float64)
    sample = tiny.sample(model, MIXTURES["video, image"], seed=2)
    with vtprune.apply(model, "norm", keep=KEEP):
        assert forward_error(model, ref, [sample], sample, "norm") <= FP64


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", tiny.QWEN)
def test_video_and_image_in_a_padded_batch(family: str, side: str) -> None:
    model, ref = tiny.build(family), reference(family)
    samples = [
        tiny.sample(model, parts, seed=i) for i, parts in enumerate([*MIXTURES.values(), [5], [3, Image(4, 4), 2]])
    ]
    batch = tiny.collate(samples, side)
    with vtprune.apply(model, "norm", keep=KEEP):
        assert forward_error(model, ref, samples, batch, "norm") <= LOOSE
        if side == "left":
            assert generation_error(model, ref, samples, batch, "norm", steps=3) <= LOOSE


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_rotary_positions_of_kept_rows_are_those_of_the_unpruned_prompt(family: str) -> None:
    """What the rotary embedding is given, row by row."""
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, 2)
    prompt = ref.prompt(sample)
    with vtprune.apply(model, "norm", keep=KEEP), spy("norm") as records, rope_inputs(model) as seen:
        cache = model(**sample, use_cache=True).past_key_values
        model(input_ids=torch.tensor([[9]]), past_key_values=cache)
    kept = kept_of(model, sample, records)[0][None]
    prefill, decode = (p[-3:] if p.ndim == 3 else p[None] for p in seen)
    assert torch.equal(prefill[:, 0].expand(prompt.positions.shape[0], -1), prompt.positions[:, kept])
    assert set(decode.flatten().tolist()) == {int(prompt.positions[:, -1].max()) + 1}


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gapped_positions_without_a_mask_are_not_taken_for_packed_sequences(family: str, attention: str) -> None:
    """transformers takes a jump in position ids for the border between two packed sequences if there is no mask."""
    model, ref = tiny.build(family, attention), reference(family)
    sample = tiny.prompt(model, 2)
    bare = {k: v for k, v in sample.items() if k != "attention_mask"}
    prompt = ref.prompt(sample)
    for call in ({}, {"use_cache": False}, {"use_cache": True}):
        calls.clear()
        with vtprune.apply(model, "norm", keep=KEEP), spy("norm") as records, torch.no_grad():
            logits = model(**bare, **call).logits
        run = ref.run(prompt, kept_of(model, sample, records)[0])
        assert_close(logits[0][run.slots], run.logits, FP32, str(call))
        assert "packed" not in calls, "right by luck: the flash path took the row for packed sequences"


@torch.no_grad()
def test_the_flash_stand_in_has_the_trap() -> None:
    """Gaps and no mask make the stand-in wrong by itself, or the test above would prove nothing."""
    model, plain = tiny.build("llava", FLASH), twin("llava")
    embeds = model.get_input_embeddings()(torch.arange(10, 22)[None])
    gapped = torch.cat([torch.arange(0, 6), torch.arange(50, 56)])[None]
    mask = torch.ones(1, 12)
    lm, twin_lm = model.model.language_model, plain.model.language_model
    right = twin_lm(inputs_embeds=embeds, position_ids=gapped, attention_mask=mask, use_cache=False).last_hidden_state
    calls.clear()
    same_way = lm(inputs_embeds=embeds, position_ids=gapped, attention_mask=mask, use_cache=False).last_hidden_state
    assert error(same_way, right) <= FP32 and set(calls) == {"packed"}  # one sequence: harmless at prefill

    calls.clear()
    cache = lm(inputs_embeds=embeds, use_cache=True).past_key_values
    late = torch.tensor([[12, 60, 61]])
    try:
        got = lm(inputs_embeds=embeds[:, :3], position_ids=late, past_key_values=cache).last_hidden_state
    except RuntimeError:  # in older transformers (5.0, 4.57) packed sequences must start at position 0
        got = torch.full_like(embeds[:, :3], torch.nan)
    cache = twin_lm(inputs_embeds=embeds, use_cache=True).past_key_values
    want = twin_lm(
        inputs_embeds=embeds[:, :3], position_ids=late, past_key_values=cache, attention_mask=torch.ones(1, 15)
    )
    assert not error(got, want.last_hidden_state) <= 1e-2, "several queries on a filled cache should have gone wrong"
    with pytest.raises(ValueError, match="2-D"):
        lm(inputs_embeds=embeds, attention_mask=torch.zeros(1, 1, 12, 12))


@torch.no_grad()
def test_stock_sdpa_has_the_trap() -> None:
    """The same for sdpa without a cache."""
    lm = twin("llava").model.language_model
    embeds = lm.get_input_embeddings()(torch.arange(10, 22)[None])
    gapped = torch.cat([torch.arange(0, 6), torch.arange(50, 56)])[None]
    masked = lm(inputs_embeds=embeds, position_ids=gapped, attention_mask=torch.ones(1, 12), use_cache=False)
    bare = lm(inputs_embeds=embeds, position_ids=gapped, use_cache=False)
    assert error(masked.last_hidden_state, bare.last_hidden_state) > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", FLASH])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_compact_positions(family: str, attention: str) -> None:
    model, ref = tiny.build(family, attention), reference(family)
    samples = tiny.mixed(model)
    batch = tiny.collate(samples)
    with vtprune.apply(model, "norm", keep=KEEP, positions="compact"):
        for sample in samples:
            if "pixel_values" in sample:
                assert forward_error(model, ref, [sample], sample, "norm", positions="compact") <= FP32
        assert generation_error(model, ref, samples[:1], samples[0], "norm", positions="compact") <= LOOSE
        if family not in tiny.QWEN:  # a text-only row of an M-RoPE batch keeps its own rule, see below
            assert forward_error(model, ref, samples, batch, "norm", positions="compact") <= LOOSE
            assert generation_error(model, ref, samples, batch, "norm", positions="compact", steps=3) <= LOOSE
        with_pictures = [s for s in samples if "pixel_values" in s]
        batch = tiny.collate(with_pictures, "right")
        assert forward_error(model, ref, with_pictures, batch, "norm", positions="compact") <= LOOSE


@torch.no_grad()
def test_compact_differs_from_original() -> None:
    for family in tiny.FAMILIES:
        model = tiny.build(family)
        sample = tiny.prompt(model, 1)
        vtprune.apply(model, "norm", keep=KEEP, positions="compact")
        compact = model(**sample).logits[0, -1]
        vtprune.apply(model, "norm", keep=KEEP)
        assert error(model(**sample).logits[0, -1], compact) > 1e-3


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@torch.no_grad()
def test_positions_given_by_the_caller_are_gathered(family: str) -> None:
    """Here with an offset and a stride, as for an interpolated context."""
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, 2)
    given = torch.arange(sample["input_ids"].shape[1])[None] * 2 + 5
    prompt = ref.prompt(sample)
    prompt.positions = given
    with vtprune.apply(model, "norm", keep=KEEP), spy("norm") as records:
        logits = model(**sample, position_ids=given).logits
    run = ref.run(prompt, kept_of(model, sample, records)[0])
    assert_close(logits[0][run.slots], run.logits, FP32)


@pytest.mark.parametrize("family", tiny.QWEN)
@torch.no_grad()
def test_missing_token_types_never_cost_the_picture_its_positions(family: str) -> None:
    """transformers since 5.17 refuses or silently falls back to 1-D positions without mm_token_type_ids."""
    model, ref = tiny.build(family), reference(family)
    sample = tiny.sample(model, MIXTURES["video, image"], seed=4)
    bare = {k: v for k, v in sample.items() if k != "mm_token_type_ids"}
    try:
        twin(family)(**bare)
    except ValueError as refusal:
        assert "mm_token_type_ids" in str(refusal)
        return
    with vtprune.apply(model, "norm", keep=KEEP), spy("norm") as records:
        if "mm_token_type_ids" in sample:
            with pytest.warns(VTPruneWarning, match="mm_token_type_ids"):
                logits = model(**bare).logits
        else:
            logits = model(**bare).logits
    run = ref.run(ref.prompt(sample), kept_of(model, sample, records)[0])
    assert_close(logits[0][run.slots], run.logits, FP32)


@pytest.mark.parametrize("family", tiny.QWEN)
def test_generation_without_token_types(family: str) -> None:
    model, ref = tiny.build(family), reference(family)
    sample = tiny.sample(model, MIXTURES["image, video"], seed=4)
    bare = {k: v for k, v in sample.items() if k != "mm_token_type_ids"}
    with vtprune.apply(model, "norm", keep=KEEP), spy("norm") as records:
        tokens, logits = generate(model, bare, 4)
    expected, expected_logits = ref.greedy(ref.prompt(sample), kept_of(model, sample, records)[0], 4)
    assert tokens[0].tolist() == expected
    assert_close(logits[0], expected_logits, LOOSE)


@torch.no_grad()
def test_seconds_per_grid_reach_the_positions_of_a_video() -> None:
    model, ref = tiny.build("qwen2_5_vl"), reference("qwen2_5_vl")
    sample = tiny.sample(model, [3, Video(3, 4, 4), 6], seed=4)
    prompt = ref.prompt(sample)
    call = {**sample, "second_per_grid_ts": torch.tensor([2.0])}
    positions = ref.rope_index(call)
    assert not same(positions, prompt.positions)
    prompt.positions = positions
    with vtprune.apply(model, "norm", keep=KEEP), spy("norm") as records:
        logits = model(**call).logits
    run = ref.run(prompt, kept_of(model, sample, records)[0])
    assert_close(logits[0][run.slots], run.logits, FP32)
