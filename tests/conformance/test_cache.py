# SPDX-License-Identifier: Apache-2.0
"""What a pruned cache carries: several conversations at once, copies, second turns, and the calls it must refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch

import vtprune
from vtprune.errors import InputError

from .helpers import (
    COUNTS_THE_CACHE,
    FLASH,
    KEEP,
    LOOSE,
    assert_close,
    cache_lengths,
    error,
    generate,
    kept_of,
    reference,
    same,
    spy,
    twin,
)

LAYERS = {"keeps": {None: 0.6, 1: 0.3}}


def first_turn(model: torch.nn.Module, inputs: tiny.Inputs, steps: int = 4, **options: Any) -> Any:
    return model.generate(**inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, **options)


def grown_mask(inputs: tiny.Inputs, count: int) -> torch.Tensor:
    mask = inputs["attention_mask"]
    return torch.cat([mask, mask.new_ones(mask.shape[0], count)], 1)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_the_cache_holds_the_kept_rows_and_nothing_else(family: str) -> None:
    model = tiny.build(family)
    batch = tiny.collate(tiny.mixed(model))
    with vtprune.apply(model, "norm", keep=KEEP), spy("norm") as records:
        cache = model(**batch, use_cache=True).past_key_values
        longest = max(int(k[None].sum()) for k in kept_of(model, batch, records))
    assert cache_lengths(cache) == [longest] * tiny.LAYERS


@pytest.mark.parametrize("options", [{}, LAYERS], ids=["projector", "layers"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_several_conversations_on_one_model_do_not_mix(family: str, options: dict) -> None:
    """Decoding steps of four prompts take turns; another prompt is run in between."""
    model, ref = tiny.build(family), reference(family)
    method = "test-layers" if options else "norm"
    samples = [s for s in tiny.mixed(model, 5) if "pixel_values" in s]
    caches, logits, kept = [], [[] for _ in samples], []
    with vtprune.apply(model, method, keep=KEEP, **options):
        for i, sample in enumerate(samples):
            with spy(method) as records:
                out = model(**sample, use_cache=True)
            kept.append(kept_of(model, sample, records)[0])
            caches.append(out.past_key_values)
            logits[i].append(out.logits[0, -1])
        for _ in range(3):
            for i, cache in enumerate(caches):
                token = logits[i][-1].argmax()[None, None]
                out = model(input_ids=token, past_key_values=cache, use_cache=True)
                caches[i] = out.past_key_values
                logits[i].append(out.logits[0, -1])
                model(**samples[(i + 1) % len(samples)])
    for i, sample in enumerate(samples):
        _, expected = ref.greedy(ref.prompt(sample), kept[i], 4)
        assert_close(torch.stack(logits[i]), expected, LOOSE, f"conversation {i}")


@pytest.mark.parametrize("options", [{}, LAYERS], ids=["projector", "layers"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_a_deep_copy_of_the_cache_goes_on_by_itself(family: str, options: dict) -> None:
    model, ref = tiny.build(family), reference(family)
    method = "test-layers" if options else "norm"
    sample = tiny.prompt(model, 2)
    with vtprune.apply(model, method, keep=KEEP, **options), spy(method) as records:
        cache = model(**sample, use_cache=True).past_key_values
        branches = {0: cache, 1: copy.deepcopy(cache), 2: copy.deepcopy(cache)}
        tails = {0: [7, 8, 9], 1: [20, 21, 22], 2: [30, 7, 31]}
        last = {}
        for step in range(3):
            for i, branch in branches.items():
                token = torch.tensor([[tails[i][step]]])
                last[i] = model(input_ids=token, past_key_values=branch, use_cache=True).logits[0, -1]
    kept = kept_of(model, sample, records)[0]
    for i, tail in tails.items():
        assert_close(last[i], ref.run(ref.prompt(sample), kept, tail).logits[-1], LOOSE, f"branch {i}")


@pytest.mark.parametrize("attention", ["sdpa", "eager", FLASH])
@pytest.mark.parametrize("options", [{}, LAYERS], ids=["projector", "layers"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_a_second_turn_of_several_tokens_equals_running_the_whole_conversation(
    family: str, options: dict, attention: str
) -> None:
    """Several tokens on a filled cache, with and without a mask: FlashAttention's packed-sequence trap lies here."""
    model, ref = tiny.build(family, attention), reference(family)
    method = "test-layers" if options else "norm"
    sample = tiny.prompt(model, 2)
    prompt = ref.prompt(sample)
    question = [40, 41, 42, 43]
    with vtprune.apply(model, method, keep=KEEP, **options):
        with spy(method) as records:
            out = first_turn(model, sample)
        kept = kept_of(model, sample, records)[0]
        answer = out.sequences[0, -4:].tolist()
        new = torch.tensor([[answer[-1], *question]])  # the last generated token is not in the cache yet
        expected, expected_logits = ref.greedy(prompt, kept, 4, tail=[*answer, *question])

        for mask in (None, grown_mask(sample, 3 + new.shape[1])):
            cache = copy.deepcopy(out.past_key_values)
            extra = {} if mask is None else {"attention_mask": mask}
            logits = model(input_ids=new, past_key_values=cache, use_cache=True, **extra).logits[0]
            want = ref.run(prompt, kept, [*answer, *question]).logits[-new.shape[1] :]
            assert_close(logits, want, LOOSE, f"forward, mask {mask is not None}")

        if COUNTS_THE_CACHE:
            return
        tokens, logits = generate(
            model,
            {"input_ids": new, "attention_mask": grown_mask(sample, 3 + new.shape[1])},
            4,
            past_key_values=copy.deepcopy(out.past_key_values),
        )
        assert tokens[0].tolist() == expected
        assert_close(logits[0], expected_logits, LOOSE, "generate")


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_a_second_turn_with_compact_positions(family: str) -> None:
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, 2)
    with vtprune.apply(model, "norm", keep=KEEP, positions="compact"), spy("norm") as records:
        cache = model(**sample, use_cache=True).past_key_values
        for tokens in ([7], [8, 9, 10], [11]):
            logits = model(input_ids=torch.tensor([tokens]), past_key_values=cache).logits[0]
    kept = kept_of(model, sample, records)[0]
    want = ref.run(ref.prompt(sample), kept, [7, 8, 9, 10, 11], positions="compact")
    assert_close(logits[-1], want.logits[-1], LOOSE)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_a_second_turn_in_a_batch(family: str) -> None:
    model, ref = tiny.build(family), reference(family)
    samples = tiny.mixed(model)
    batch = tiny.collate(samples)
    new = torch.tensor([[50 + b, 60 + b, 70 + b] for b in range(len(samples))])
    with vtprune.apply(model, "norm", keep=KEEP), spy("norm") as records:
        cache = model(**batch, use_cache=True).past_key_values
        logits = model(input_ids=new, past_key_values=cache, attention_mask=grown_mask(batch, 3)).logits
    for b, kept in enumerate(kept_of(model, batch, records)):
        want = ref.run(ref.prompt(samples[b]), kept, new[b].tolist()).logits[-3:]
        assert_close(logits[b], want, LOOSE, f"sample {b}")


def equal_or_refused(call: Callable[[], torch.Tensor], expected: torch.Tensor) -> str:
    """The only two acceptable ends of a call that is easy to get wrong."""
    try:
        got = call()
    except (InputError, IndexError):  # IndexError: the positions of Qwen in transformers before 5
        return "refused"
    assert got.shape == expected.shape and error(got, expected) <= LOOSE, "silently wrong"
    return "equal"


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_the_full_history_on_a_pruned_cache_is_refused(family: str, positions: str) -> None:
    """generate() cuts the history by the length of the cache, which is too short now: tokens would be read twice."""
    model = tiny.build(family)
    sample = tiny.prompt(model, 2)
    with vtprune.apply(model, "norm", keep=KEEP, positions=positions):
        out = first_turn(model, sample)
        history = torch.cat([out.sequences, torch.tensor([[40, 41]])], 1)
        mask = torch.ones_like(history)
        inputs: tiny.Inputs = {"input_ids": history, "attention_mask": mask}
        if "mm_token_type_ids" in sample:
            inputs["mm_token_type_ids"] = tiny.token_types(history)
        pixels = {k: v for k, v in sample.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
        for call in ({}, pixels):
            for some in (inputs, {k: v for k, v in inputs.items() if k != "attention_mask"}):
                # With pixels the model itself notices first that most of their placeholders are gone.
                with pytest.raises(ValueError if call else InputError):
                    first_turn(model, {**some, **call}, past_key_values=copy.deepcopy(out.past_key_values))
        with pytest.raises(InputError):
            model(**inputs, past_key_values=copy.deepcopy(out.past_key_values))
        for columns in (1, 3, cache_lengths(out.past_key_values)[0] + 2):  # masks of the wrong length
            with pytest.raises(InputError):
                model(
                    input_ids=history[:, -2:],
                    attention_mask=mask[:, :columns],
                    past_key_values=copy.deepcopy(out.past_key_values),
                )


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_a_refused_call_leaves_model_and_cache_usable(family: str) -> None:
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, 2)
    with vtprune.apply(model, "norm", keep=KEEP), spy("norm") as records:
        out = model(**sample, use_cache=True)
        with pytest.raises(InputError):
            model(
                input_ids=sample["input_ids"],
                attention_mask=sample["attention_mask"],
                past_key_values=out.past_key_values,
            )
        logits = model(input_ids=torch.tensor([[9]]), past_key_values=out.past_key_values).logits[0, -1]
    kept = kept_of(model, sample, records)[0]
    assert_close(logits, ref.run(ref.prompt(sample), kept, [9]).logits[-1], LOOSE)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_a_new_picture_in_the_second_turn_is_right(family: str) -> None:
    model, ref = tiny.build(family), reference(family)
    one, two = tiny.pictures(model, 2)
    both = tiny.sample(model, [3, one, 4, two, 5], seed=3)
    ids = both["input_ids"][0]
    placeholder = ref.prompt(both).placeholder
    second = int((placeholder & (torch.arange(len(ids)) > int((~placeholder[3:]).nonzero()[2]) + 3)).nonzero()[0])
    second -= 1 + (family in tiny.QWEN)  # the picture comes with a word, and with vision_start for Qwen
    while placeholder[second - 1]:
        second += 1

    def cut(rows: slice, picture: int) -> tiny.Inputs:
        part = {k: both[k][:, rows] for k in ("input_ids", "mm_token_type_ids") if k in both}
        if family in tiny.QWEN:
            sizes = both["image_grid_thw"].prod(1).tolist()
            part["pixel_values"] = both["pixel_values"].split(sizes)[picture]
            part["image_grid_thw"] = both["image_grid_thw"][picture][None]
        else:
            part["pixel_values"] = both["pixel_values"][picture][None]
            if "image_sizes" in both:
                part["image_sizes"] = both["image_sizes"][picture][None]
        return part

    method = "norm"
    with vtprune.apply(model, method, keep=KEEP):
        with spy(method) as records:
            model(**both)
        kept = kept_of(model, both, records)[0]
        want = ref.run(ref.prompt(both), kept).logits[-1]
        cache = model(**cut(slice(0, second), 0), attention_mask=both["attention_mask"][:, :second]).past_key_values

        def call() -> torch.Tensor:
            part = cut(slice(second, None), 1)
            return model(**part, attention_mask=both["attention_mask"], past_key_values=cache).logits[0, -1]

        assert equal_or_refused(call, want) == "equal" or COUNTS_THE_CACHE


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_a_picture_after_a_text_only_turn_is_right(family: str) -> None:
    """The cache is filled but was never pruned; then a picture comes."""
    model, ref = tiny.build(family), reference(family)
    whole = tiny.sample(model, [6, tiny.pictures(model, 1)[0], 5], seed=9)
    prompt = ref.prompt(whole)
    with vtprune.apply(model, "norm", keep=KEEP):
        with spy("norm") as records:
            model(**whole)
        want = ref.run(prompt, kept_of(model, whole, records)[0]).logits[-1]
        start = {"input_ids": whole["input_ids"][:, :6], "attention_mask": whole["attention_mask"][:, :6]}
        if "mm_token_type_ids" in whole:
            start["mm_token_type_ids"] = whole["mm_token_type_ids"][:, :6]
        cache = model(**start, use_cache=True).past_key_values
        rest = {k: v[:, 6:] if k in ("input_ids", "mm_token_type_ids") else v for k, v in whole.items()}
        extra = {"position_ids": prompt.positions[:, None, 6:]} if family in tiny.QWEN else {}
        outcome = equal_or_refused(lambda: model(**rest, **extra, past_key_values=cache).logits[0, -1], want)
    assert outcome == "equal" or COUNTS_THE_CACHE


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_a_cache_outlives_the_pruner_that_made_it(family: str) -> None:
    """Replaced while decoding, it goes on as it began. Removed, it is refused: unhooked, positions would be wrong."""
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, 2)
    with vtprune.apply(model, "norm", keep=KEEP), spy("norm") as records:
        cache = model(**sample, use_cache=True).past_key_values
        vtprune.apply(model, "random", keep=0.9)
        logits = model(input_ids=torch.tensor([[9]]), past_key_values=cache).logits[0, -1]
        vtprune.apply(model, "norm", keep=1.0)
        more = model(input_ids=torch.tensor([[11]]), past_key_values=cache).logits[0, -1]
    vtprune.remove(model)
    for call in ({}, {"attention_mask": grown_mask(sample, 3)}):
        with pytest.raises(InputError):
            model(input_ids=torch.tensor([[13]]), past_key_values=cache, **call)
    vtprune.apply(model, "random", keep=0.5)
    last = model(input_ids=torch.tensor([[13]]), past_key_values=cache).logits[0, -1]
    kept = kept_of(model, sample, records)[0]
    assert_close(last, ref.run(ref.prompt(sample), kept, [9, 11, 13]).logits[-1], LOOSE)
    run = ref.run(ref.prompt(sample), kept_of(model, sample, records)[0], [9, 11])
    assert_close(logits, run.logits[-2], LOOSE)
    assert_close(more, run.logits[-1], LOOSE)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_prefill_in_chunks_is_right_or_refused(family: str) -> None:
    """Where the stock model can do it with pictures at all; some versions of transformers raise or go wrong."""
    stock, model = twin(family), tiny.build(family)
    sample = tiny.prompt(model, 2)
    try:
        chunked = generate(stock, sample, 3, prefill_chunk_size=8)
    except (ValueError, IndexError, RuntimeError):
        return
    if not same(chunked[0], generate(stock, sample, 3)[0]):
        return
    with vtprune.apply(model, "norm", keep=KEEP):
        expected = generate(model, sample, 3)
        try:
            got = generate(model, sample, 3, prefill_chunk_size=8)
        except InputError:
            return
    assert same(got[0], expected[0])


@pytest.mark.parametrize("options", [{}, LAYERS], ids=["projector", "layers"])
@torch.no_grad()
def test_a_static_cache_is_right_or_refused(options: dict) -> None:
    model = tiny.build("llava")
    method = "test-layers" if options else "norm"
    sample = tiny.prompt(model, 2)
    with vtprune.apply(model, method, keep=KEEP, **options):
        expected, _ = generate(model, sample, 4)
        try:
            got, _ = generate(model, sample, 4, cache_implementation="static", disable_compile=True)
        except InputError:
            return
    assert same(got, expected)


@torch.no_grad()
def test_an_unpruned_cache_is_left_alone() -> None:
    """Text first, pruner applied later: the cache has no state, and the stock path must stay bit-identical."""
    for family in tiny.FAMILIES:
        model = tiny.build(family)
        sample = tiny.prompt(model, 1)
        cache = model(**sample, use_cache=True).past_key_values
        plain = copy.deepcopy(cache)
        expected = model(input_ids=torch.tensor([[9]]), past_key_values=plain).logits
        vtprune.apply(model, "norm", keep=KEEP)
        assert same(model(input_ids=torch.tensor([[9]]), past_key_values=cache).logits, expected)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("options", [dict(method="norm"), dict(method="dart", layer=1)], ids=["projector", "layer"])
def test_one_pruned_prompt_can_go_on_in_many_ways(family: str, options: dict) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 2)
    tails = torch.tensor([[11, 12, 13], [21, 22, 23], [31, 32, 33]])
    with vtprune.apply(model, keep=0.5, **options), torch.no_grad():
        alone = []
        for tail in tails:
            cache = model(**sample).past_key_values
            cache = model(input_ids=tail[None, :2], past_key_values=cache).past_key_values
            alone.append(model(input_ids=tail[None, 2:], past_key_values=cache).logits)
        cache = model(**sample).past_key_values
        cache.batch_repeat_interleave(3)
        cache = model(input_ids=tails[:, :2], past_key_values=cache).past_key_values
        together = model(input_ids=tails[:, 2:], past_key_values=cache).logits
    assert_close(together, torch.cat(alone), LOOSE)
