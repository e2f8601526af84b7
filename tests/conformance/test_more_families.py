# SPDX-License-Identifier: Apache-2.0
"""What every family must keep to, for those that do not run through the whole suite: one file, seconds per family.

A pruned forward equals the language model called by hand on the kept rows; so does what is generated, alone, in padded
batches, with beams, after layers; keeping everything and removing change no bit.
"""

from __future__ import annotations

from functools import cache

import pytest
import tiny
import torch
from torch import nn

import vtprune
from vtprune import engine

from .helpers import (
    ATTENTIONS,
    FLASH,
    FP32,
    FP64,
    KEEP,
    LOOSE,
    assert_close,
    cache_lengths,
    error,
    forward_error,
    generate,
    generation_error,
    hooks,
    kept_of,
    most_images_for_beams,
    reference,
    same,
    spy,
    twin,
)

VIDEO = ("llava_onevision", "qwen3_vl")
#: After these layers rows go; Qwen3-VL adds features of its encoder up to layer 2.
STAGES = {None: 0.6, 2: 0.3, 3: 0.2}


@cache
def built(family: str, attention: str = "sdpa") -> nn.Module:
    """For tests that leave the model as it was."""
    return tiny.build(family, attention)


def clips(model: nn.Module, seed: int = 0) -> list[tiny.Inputs]:
    """A clip alone, and one between two pictures beside a prompt without any."""
    picture = tiny.pictures(model, 1)[0]
    return [
        tiny.sample(model, [3, tiny.Video(3, 4, 8), 6], seed),
        tiny.sample(model, [2, picture, 2, tiny.Video(3, 4, 6), 1, picture, 5], seed + 1),
        tiny.prompt(model, 1, seed + 2),
    ]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", tiny.MORE)
@torch.no_grad()
def test_keeping_everything_changes_no_bit_and_forced_packing_agrees(family: str, attention: str) -> None:
    model, plain = built(family, attention), twin(family, attention=attention)
    with vtprune.apply(model, "norm", keep=1.0):
        for side in ("left", "right"):
            batch = tiny.collate(tiny.mixed(model), side)
            expected = plain(**batch).logits
            assert same(model(**batch).logits, expected)
            with engine.force_pack():
                logits = model(**batch).logits
            valid = batch["attention_mask"].bool()
            assert_close(logits[valid], expected[valid], LOOSE)
        batch = tiny.collate(tiny.mixed(model))
        assert all(same(a, b) for a, b in zip(generate(model, batch), generate(plain, batch), strict=True))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", tiny.MORE)
def test_a_padded_batch_equals_the_language_model_called_by_hand(family: str, attention: str) -> None:
    model, ref = built(family, attention), reference(family)
    samples = tiny.mixed(model)
    with vtprune.apply(model, "norm", keep=KEEP):
        assert forward_error(model, ref, samples[:1], samples[0], "norm") <= FP32
        for side in ("left", "right"):
            assert forward_error(model, ref, samples, tiny.collate(samples, side), "norm") <= LOOSE


@pytest.mark.parametrize("family", tiny.MORE)
def test_no_padding_leaks_in_double_precision(family: str) -> None:
    model, ref = tiny.build(family, dtype=torch.float64), reference(family, torch.float64)
    samples = tiny.mixed(model)
    with vtprune.apply(model, "divprune", keep=KEEP):
        assert forward_error(model, ref, samples[:1], samples[0], "divprune") <= FP64
        assert forward_error(model, ref, samples, tiny.collate(samples), "divprune") <= 1e-5


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", tiny.MORE)
def test_generation_equals_recomputation(family: str, attention: str) -> None:
    model, ref = built(family, attention), reference(family)
    samples = tiny.mixed(model)
    with vtprune.apply(model, "norm", keep=KEEP):
        assert generation_error(model, ref, samples, tiny.collate(samples), "norm", steps=3) <= LOOSE
        bare = {k: v for k, v in samples[0].items() if k != "attention_mask"}
        tokens, logits = generate(model, samples[0], 3)
        assert all(same(a, b) for a, b in zip(generate(model, bare, 3), (tokens, logits), strict=True))
    with vtprune.apply(model, "norm", keep=KEEP, positions="compact"):
        assert generation_error(model, ref, samples[:1], samples[0], "norm", 3, "compact") <= LOOSE


@pytest.mark.parametrize("family", tiny.MORE)
def test_beams_of_prompts_with_several_pictures(family: str) -> None:
    """generate() repeats what was encoded, each family its own way: the probes must follow their pictures."""
    model, ref = built(family), reference(family)
    most = most_images_for_beams(family)
    samples = [tiny.prompt(model, most, 3), tiny.prompt(model, 1, 4)]
    if family == "internvl" and most == 1:  # older transformers repeat tiles one by one, too
        samples = [tiny.sample(model, [3, tiny.Image(1, 1), 6], seed) for seed in (3, 4)]
    batch = tiny.collate(samples)
    with vtprune.apply(model, "test-probe", keep=KEEP), spy("test-probe") as records:
        out = model.generate(
            **batch, max_new_tokens=3, num_beams=2, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
    kept = kept_of(model, {k: batch[k].repeat_interleave(2, 0) for k in ("input_ids", "attention_mask")}, records)
    for b, sample in enumerate(samples):
        with vtprune.apply(model, "test-probe", keep=KEEP), spy("test-probe") as alone, torch.no_grad():
            model(**sample)
        assert all(same(kept[row][None], kept_of(model, sample, alone)[0][None]) for row in (2 * b, 2 * b + 1))
        tokens, score = ref.beam(ref.prompt(sample), kept[2 * b], 3, 2)
        assert out.sequences[b, -3:].tolist() == tokens
        assert abs(float(out.sequences_scores[b]) - score) <= LOOSE


@pytest.mark.parametrize("attention", ["eager", FLASH])
@pytest.mark.parametrize("family", tiny.MORE)
def test_dropping_after_layers(family: str, attention: str) -> None:
    model, ref = built(family, attention), reference(family)
    samples = tiny.mixed(model)
    with vtprune.apply(model, "test-layers", keeps=STAGES):
        for side in ("left", "right"):
            assert forward_error(model, ref, samples, tiny.collate(samples, side), "test-layers") <= LOOSE
        assert generation_error(model, ref, samples, tiny.collate(samples), "test-layers", steps=3) <= LOOSE
        with torch.no_grad():
            lengths = cache_lengths(model(**samples[0], use_cache=True).past_key_values)
        assert lengths[0] == lengths[2] > lengths[3] > lengths[4]


@pytest.mark.parametrize("family", tiny.MORE)
def test_removing_restores_every_bit_and_leaves_no_hook(family: str) -> None:
    model, plain = tiny.build(family), twin(family)
    batch = tiny.collate(tiny.mixed(model))
    generate(model, batch, 2)  # transformers itself installs some hooks at the first call
    before = hooks(model)
    for method, options in (("norm", {}), ("test-layers", {"keeps": STAGES})):
        vtprune.apply(model, method, keep=KEEP, **options)
        assert error(generate(model, batch, 2)[1], generate(plain, batch, 2)[1]) > 1e-3, "pruning changed nothing"
        vtprune.remove(model)
        assert hooks(model) == before
        with torch.no_grad():
            assert same(model(**batch).logits, plain(**batch).logits)
        assert all(same(a, b) for a, b in zip(generate(model, batch, 2), generate(plain, batch, 2), strict=True))


@pytest.mark.parametrize("family", tiny.MORE)
@torch.no_grad()
def test_embeddings_given_by_the_caller_equal_ids(family: str) -> None:
    model, ref = built(family), reference(family)
    sample = tiny.prompt(model, 2)
    prompt = ref.prompt(sample)
    call = {k: v for k, v in sample.items() if k not in ("input_ids", "mm_token_type_ids")}
    call["inputs_embeds"] = model.get_input_embeddings()(sample["input_ids"])
    if family in tiny.QWEN:
        call["position_ids"] = prompt.positions[:, None]  # without ids the model itself cannot know them
    with vtprune.apply(model, "divprune", keep=KEEP), spy("divprune") as records:
        logits = model(**call).logits
        model(**sample)
    first, second = (kept_of(model, sample, [record])[0] for record in records)
    assert same(first[None], second[None]) and not bool(first[None].all())
    run = ref.run(prompt, first)
    assert_close(logits[0][run.slots], run.logits, FP32)


@pytest.mark.parametrize("family", tiny.MORE)
def test_two_turns_with_a_picture_each(family: str) -> None:
    """A second picture comes on a pruned cache: its positions go on from the first prompt, dropped tokens counted."""
    model, ref = built(family), reference(family)
    picture = tiny.pictures(model, 1)[0]
    first, second = (tiny.sample(model, [2, picture, 4], seed) for seed in (1, 2))
    whole = tiny.collate([first])
    whole["input_ids"] = torch.cat([first["input_ids"], second["input_ids"]], 1)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with vtprune.apply(model, "norm", keep=KEEP, restore=False), spy("norm") as records, torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        later = {**second, "attention_mask": whole["attention_mask"]}
        logits = model(**later, past_key_values=cache, use_cache=True).logits
    kept = [kept_of(model, sample, [record])[0][None] for sample, record in zip((first, second), records, strict=True)]
    prompts = [ref.prompt(sample) for sample in (first, second)]
    shift = int(prompts[0].positions[:, -1].max()) + 1
    joint = type(prompts[0])(
        torch.cat([p.ids for p in prompts]),
        torch.cat([p.embeds for p in prompts]),
        torch.cat([prompts[0].positions, prompts[1].positions + shift], 1),
        torch.cat([p.placeholder for p in prompts]),
        torch.cat([p.newline for p in prompts]),
        [torch.cat(features) for features in zip(*(p.deepstack for p in prompts), strict=True)],
    )
    run = ref.run(joint, {None: torch.cat(kept)})
    assert_close(logits[0], run.logits[-logits.shape[1] :], LOOSE)


@pytest.mark.parametrize("family", VIDEO)
def test_clips_beside_pictures(family: str) -> None:
    model, ref = built(family), reference(family)
    samples = clips(model)
    for method, options in (("norm", {}), ("test-layers", {"keeps": STAGES})):
        with vtprune.apply(model, method, keep=KEEP, **options):
            for sample in samples:
                assert forward_error(model, ref, [sample], sample, method) <= FP32
            batch = tiny.collate(samples)
            assert forward_error(model, ref, samples, batch, method) <= LOOSE
            assert generation_error(model, ref, samples, batch, method, steps=3) <= LOOSE


@pytest.mark.parametrize("family", VIDEO)
@torch.no_grad()
def test_keeping_everything_of_clips_changes_no_bit(family: str) -> None:
    model, plain = built(family), twin(family)
    batch = tiny.collate(clips(model))
    with vtprune.apply(model, "norm", keep=1.0):
        assert same(model(**batch).logits, plain(**batch).logits)
        assert all(same(a, b) for a, b in zip(generate(model, batch, 3), generate(plain, batch, 3), strict=True))


@torch.no_grad()
def test_the_features_that_deepstack_adds_are_those_of_the_kept_rows() -> None:
    """Rows of another token, or rows that are not added at all, would be seen: the check of this file can fail."""
    model, ref = built("qwen3_vl"), reference("qwen3_vl")
    sample = tiny.prompt(model, 2)
    seen: list[dict] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs), with_kwargs=True
    )
    with vtprune.apply(model, "norm", keep=KEEP), spy("norm") as records:
        handle.remove()
        after = model.model.language_model.register_forward_pre_hook(
            lambda _m, _a, kwargs: seen.append(kwargs), with_kwargs=True
        )
        model(**sample)
        after.remove()
    kept = kept_of(model, sample, records)[0][None]
    prompt = ref.prompt(sample)
    got = seen[-1]
    assert same(got["visual_pos_masks"][0], prompt.placeholder[kept])
    for features, whole in zip(got["deepstack_visual_embeds"], prompt.deepstack, strict=True):
        assert same(features, whole[kept[prompt.placeholder]]) and len(features) < len(whole)


@torch.no_grad()
def test_frames_keep_their_places_and_times_are_never_dropped() -> None:
    """Qwen3-VL: text between frames stays, and each kept patch stands where it stood in its own frame."""
    model, ref = built("qwen3_vl"), reference("qwen3_vl")
    sample = tiny.sample(model, [3, tiny.Video(4, 4, 8), 6], 5)
    prompt = ref.prompt(sample)
    with vtprune.apply(model, "random", keep=0.25) as handle, spy("random") as records:
        model(**sample)
        report = handle.report()
    kept = kept_of(model, sample, records)[0][None]
    assert bool(kept[~prompt.placeholder].all())
    (image,) = report.images
    assert [s.kind for s in image.segments] == ["frame"] * 4
    assert [s.kept.sum() for s in image.segments] == [2] * 4  # an eighth of 8 patches, in each frame its share
    tokens = records[0].tokens
    slots = prompt.placeholder.nonzero().flatten()[tokens.source]
    starts = torch.stack([prompt.positions[:, slots[tokens.coords[:, 0] == t]].amin(1) for t in range(4)])
    assert bool((starts.diff(dim=0) > 0).all()), "frames follow each other, with their times in words between"
    for t in range(4):
        own = tokens.coords[:, 0] == t
        place = prompt.positions[1:, slots[own]].T - starts[t, 1:]
        assert torch.equal(place.float(), tokens.coords[own][:, 1:])
