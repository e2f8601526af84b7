# SPDX-License-Identifier: Apache-2.0
"""Generating with the pruned cache equals recomputing everything at every step without one."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import LogitsProcessor

import vtprune
from vtprune.errors import InputError

from .helpers import (
    ATTENTIONS,
    COUNTS_THE_CACHE,
    FLASH,
    KEEP,
    LOOSE,
    NEVER,
    assert_close,
    generate,
    generation_error,
    kept_of,
    manual_decode,
    most_images_for_beams,
    reference,
    same,
    spy,
)

STEPS = 5


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_alone(family: str, attention: str) -> None:
    model, ref = tiny.build(family, attention), reference(family)
    sample = tiny.prompt(model, 2, seed=1)
    with vtprune.apply(model, "divprune", keep=KEEP):
        assert generation_error(model, ref, [sample], sample, "divprune", steps=8) <= LOOSE


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_in_a_left_padded_batch_of_mixed_image_counts(family: str, attention: str) -> None:
    model, ref = tiny.build(family, attention), reference(family)
    samples = tiny.mixed(model)
    with vtprune.apply(model, "norm", keep=KEEP):
        assert generation_error(model, ref, samples, tiny.collate(samples), "norm") <= LOOSE


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_in_a_right_padded_batch(family: str) -> None:
    """Stock generate() warns of right padding and goes wrong; under pruning rows are packed, so it must go right."""
    model, ref = tiny.build(family), reference(family)
    samples = tiny.mixed(model)
    with vtprune.apply(model, "norm", keep=KEEP):
        assert generation_error(model, ref, samples, tiny.collate(samples, "right"), "norm") <= LOOSE


@pytest.mark.parametrize("attention", ["sdpa", FLASH])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_without_a_cache(family: str, attention: str) -> None:
    model, ref = tiny.build(family, attention), reference(family)
    samples = tiny.mixed(model)
    with vtprune.apply(model, "norm", keep=KEEP):
        for some in (samples[:1], samples):
            batch = tiny.collate(some)
            assert generation_error(model, ref, some, batch, "norm", steps=3, use_cache=False) <= LOOSE


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_without_an_attention_mask(family: str) -> None:
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, 2)
    inputs = {k: v for k, v in sample.items() if k != "attention_mask"}
    with vtprune.apply(model, "norm", keep=KEEP), spy("norm") as records:
        tokens, logits = generate(model, inputs, STEPS)
    expected, expected_logits = ref.greedy(ref.prompt(sample), kept_of(model, sample, records)[0], STEPS)
    assert tokens[0].tolist() == expected
    assert_close(logits[0], expected_logits, LOOSE)


@pytest.mark.parametrize("attention", ["sdpa", FLASH])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_beam_search(family: str, attention: str) -> None:
    model, ref = tiny.build(family, attention), reference(family)
    samples = [tiny.prompt(model, most_images_for_beams(family), 3), tiny.prompt(model, 1, 4)]
    batch = tiny.collate(samples)
    steps, beams = 4, 3
    with vtprune.apply(model, "random", keep=KEEP), spy("random") as records:
        out = model.generate(
            **batch,
            max_new_tokens=steps,
            num_beams=beams,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    # transformers may encode once and repeat, or repeat pixels: the prompt is expanded before the prefill either way.
    expanded = {k: batch[k].repeat_interleave(beams, 0) for k in ("input_ids", "attention_mask")}
    kept = kept_of(model, expanded, records)
    for b, sample in enumerate(samples):
        for beam in range(1, beams):
            assert same(kept[b * beams][None], kept[b * beams + beam][None]), (
                "beams of one prompt keep different tokens"
            )
        tokens, score = ref.beam(ref.prompt(sample), kept[b * beams], steps, beams)
        assert out.sequences[b, -steps:].tolist() == tokens
        assert abs(float(out.sequences_scores[b]) - score) <= LOOSE


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sampling_with_several_sequences_per_prompt(family: str) -> None:
    model, ref = tiny.build(family), reference(family)
    samples = [tiny.prompt(model, 1, 5), tiny.prompt(model, most_images_for_beams(family), 6)]
    batch = tiny.collate(samples)
    options = {"do_sample": True, "num_return_sequences": 3, "temperature": 1.5, "top_k": 0}
    with vtprune.apply(model, "norm", keep=KEEP), spy("norm") as records:
        torch.manual_seed(11)
        tokens, logits = generate(model, batch, STEPS, **options)
        torch.manual_seed(11)
        again, _ = generate(model, batch, STEPS, **options)
        torch.manual_seed(11)
        uncached, _ = generate(model, batch, STEPS, use_cache=False, **options)
    assert same(tokens, again) and same(tokens, uncached)
    assert len({tuple(row) for row in tokens[:3].tolist()}) > 1, "sampling sampled nothing"
    expanded = {k: batch[k].repeat_interleave(3, 0) for k in ("input_ids", "attention_mask")}
    kept = kept_of(model, expanded, records)
    for row in range(6):
        prompt = ref.prompt(samples[row // 3])
        assert_close(logits[row], ref.follow(prompt, kept[row], tokens[row].tolist()), LOOSE, f"row {row}")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_prompt_lookup_decoding_equals_greedy(family: str) -> None:
    """Candidates are checked several at a time and the cache is cropped when they are wrong."""
    model = tiny.build(family)
    cropped = []
    for seed in (2, 3, 4):
        sample = tiny.prompt(model, 2, seed=seed)
        # Prompts that repeat themselves, so that there is something to look up.
        again = torch.tensor([[7, 8, 9, 7, 8, 9, 7, 8]])
        sample["input_ids"] = torch.cat([sample["input_ids"], again], 1)
        sample["attention_mask"] = torch.ones_like(sample["input_ids"])
        if "mm_token_type_ids" in sample:
            sample["mm_token_type_ids"] = tiny.token_types(sample["input_ids"])
        with vtprune.apply(model, "norm", keep=KEEP):
            greedy, logits = generate(model, sample, 16)
            rows: list[int] = []
            handle = model.model.language_model.register_forward_pre_hook(
                lambda _m, _a, kw, rows=rows: rows.append(kw["inputs_embeds"].shape[1]), with_kwargs=True
            )
            options = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "eos_token_id": NEVER}
            try:
                assisted, assisted_logits = generate(model, sample, 16, **options)
            except InputError:
                assert COUNTS_THE_CACHE
                return
            finally:
                handle.remove()
        assert same(assisted, greedy)
        assert_close(assisted_logits, logits, LOOSE)
        cropped += [n for n in rows[1:] if n > 1]
    assert cropped, "no candidate was ever tried, so this proves nothing"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_assisted_decoding_with_a_second_model_equals_greedy(family: str) -> None:
    model, draft = tiny.build(family), tiny.build(family, seed=0)
    with torch.no_grad():  # nearly the same model: most candidates pass, some do not
        for p in draft.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    sample = tiny.prompt(model, 1, seed=8)
    with vtprune.apply(model, "norm", keep=KEEP):
        greedy, logits = generate(model, sample, 10)
        for pruned_draft in (False, True):
            if pruned_draft:
                vtprune.apply(draft, "norm", keep=KEEP)
            try:
                assisted, assisted_logits = generate(model, sample, 10, assistant_model=draft, eos_token_id=NEVER)
            except InputError:
                assert COUNTS_THE_CACHE
                continue
            assert same(assisted, greedy)
            assert_close(assisted_logits, logits, LOOSE)


@pytest.mark.parametrize("attention", ["sdpa", FLASH])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_manual_decoding_of_a_batch(family: str, side: str, attention: str) -> None:
    model, ref = tiny.build(family, attention), reference(family)
    samples = tiny.mixed(model)
    batch = tiny.collate(samples, side)
    for mask in (False, True):
        with vtprune.apply(model, "norm", keep=KEEP), spy("norm") as records:
            tokens, logits = manual_decode(model, batch, 4, mask=mask)
        for b, (sample, kept) in enumerate(zip(samples, kept_of(model, batch, records), strict=True)):
            expected, expected_logits = ref.greedy(ref.prompt(sample), kept, 4)
            assert_close(logits[b], expected_logits, LOOSE, f"sample {b}, mask {mask}")
            assert tokens[b].tolist() == expected


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_manual_decoding_with_positions_of_the_unpruned_prompt(family: str) -> None:
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, 2)
    prompt = ref.prompt(sample)
    follow = int(prompt.positions[:, -1].max()) + 1

    def positions(step: int) -> torch.Tensor:
        one = torch.tensor([[follow + step]])
        return one.expand(3, 1, 1) if family in tiny.QWEN else one

    with vtprune.apply(model, "norm", keep=KEEP), spy("norm") as records:
        tokens, logits = manual_decode(model, sample, 4, mask=True, positions=positions)
    expected, expected_logits = ref.greedy(prompt, kept_of(model, sample, records)[0], 4)
    assert tokens[0].tolist() == expected
    assert_close(logits[0], expected_logits, LOOSE)


class _Force(LogitsProcessor):
    """Makes generate() write given tokens."""

    def __init__(self, start: int, tokens: list[int]):
        self.start, self.tokens = start, tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[input_ids.shape[1] - self.start]] = 0
        return forced  # type: ignore[return-value]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_generated_placeholder_is_an_ordinary_token(family: str) -> None:
    """Nothing stops a language model from writing the placeholder's id; there is no picture behind it."""
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, 1)
    tokens = [7, tiny.IMAGE, 9, 11]
    with vtprune.apply(model, "norm", keep=KEEP), spy("norm") as records:
        got, logits = generate(model, sample, 4, logits_processor=[_Force(sample["input_ids"].shape[1], tokens)])
    assert got[0].tolist() == tokens
    expected = ref.follow(ref.prompt(sample), kept_of(model, sample, records)[0], tokens)
    assert_close(logits[0], expected, LOOSE)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_prompt_that_ends_with_its_picture(family: str) -> None:
    """What follows is drawn from the last kept row, whether or not the very last slot was dropped."""
    model, ref = tiny.build(family), reference(family)
    dropped = False
    for seed in range(4):
        sample = tiny.sample(model, [4, tiny.pictures(model, 1)[0]], seed)
        with vtprune.apply(model, "random", keep=0.3, seed=seed), spy("random") as records:
            tokens, logits = generate(model, sample, 3)
        kept = kept_of(model, sample, records)[0]
        dropped |= not bool(kept[None][-1])
        expected, expected_logits = ref.greedy(ref.prompt(sample), kept, 3)
        assert tokens[0].tolist() == expected
        assert_close(logits[0], expected_logits, LOOSE)
    assert dropped or family == "llava_next"  # AnyRes pictures end with a newline, which stays


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generation_without_restore(family: str, side: str) -> None:
    """The last row is the same whether hidden states come back at full or at pruned length."""
    model, ref = tiny.build(family), reference(family)
    samples = tiny.mixed(model)
    with vtprune.apply(model, "norm", keep=KEEP, restore=False):
        assert generation_error(model, ref, samples, tiny.collate(samples, side), "norm", steps=3) <= LOOSE


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_stopping_at_different_lengths_in_a_batch(family: str) -> None:
    """Rows that have ended are fed padding; the others must not notice."""
    model, ref = tiny.build(family), reference(family)
    samples = tiny.mixed(model)
    with vtprune.apply(model, "norm", keep=KEEP):
        free, _ = generate(model, tiny.collate(samples), 6)
        stop = int(free[0, 1])
        with spy("norm") as records:
            tokens, _ = generate(model, tiny.collate(samples), 6, eos_token_id=stop)
    for b, kept in enumerate(kept_of(model, tiny.collate(samples), records)):
        expected, _ = ref.greedy(ref.prompt(samples[b]), kept, tokens.shape[1])
        end = expected.index(stop) + 1 if stop in expected else len(expected)
        assert tokens[b, :end].tolist() == expected[:end]
        assert bool((tokens[b, end:] == tiny.PAD).all())
