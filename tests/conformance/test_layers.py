# SPDX-License-Identifier: Apache-2.0
"""Pruning inside the language model: after one layer, after two, and behind a projector stage."""

from __future__ import annotations

import pytest
import tiny
import torch

import vtprune
from vtprune import engine
from vtprune.errors import ConfigError, InputError

from .helpers import (
    ATTENTIONS,
    COUNTS_THE_CACHE,
    FLASH,
    FP32,
    FP64,
    KEEP,
    LOOSE,
    NEVER,
    assert_close,
    cache_lengths,
    first_call,
    forward_error,
    generate,
    generation_error,
    hooks,
    kept_of,
    manual_decode,
    most_images_for_beams,
    reference,
    same,
    spy,
    twin,
)

METHOD = "test-layers"
STAGES: dict[str, dict[int | None, float]] = {
    "after 1": {1: 0.5},
    "after 1 and 3": {1: 0.6, 3: 0.3},
    "projector and after 2": {None: 0.6, 2: 0.2},
    "after 0": {0: 0.4},
}
SOME = ["after 1 and 3", "projector and after 2"]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_forward_equals_reference(family: str, stages: str, attention: str) -> None:
    model, ref = tiny.build(family, attention), reference(family)
    sample = tiny.prompt(model, 2, seed=2)
    with vtprune.apply(model, METHOD, keeps=STAGES[stages]):
        assert forward_error(model, ref, [sample], sample, METHOD) <= FP32
        assert forward_error(model, ref, [sample], sample, METHOD, use_cache=False) <= FP32
        bare = {k: v for k, v in sample.items() if k != "attention_mask"}
        with spy(METHOD) as records, torch.no_grad():
            logits = model(**bare).logits
        run = ref.run(ref.prompt(sample), kept_of(model, sample, records)[0])
        assert_close(logits[0][run.slots], run.logits, FP32, "without a mask")


@pytest.mark.parametrize("stages", SOME)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_forward_equals_reference_in_double_precision(family: str, stages: str) -> None:
    model, ref = tiny.build(family, dtype=torch.float64), reference(family, torch.float64)
    sample = tiny.prompt(model, 2, seed=2)
    with vtprune.apply(model, METHOD, keeps=STAGES[stages]):
        assert forward_error(model, ref, [sample], sample, METHOD) <= FP64


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padded_batch_equals_each_alone(family: str, side: str, attention: str) -> None:
    model, ref = tiny.build(family, attention), reference(family)
    samples = tiny.mixed(model)
    batch = tiny.collate(samples, side)
    for stages in SOME:
        with vtprune.apply(model, METHOD, keeps=STAGES[stages]):
            assert forward_error(model, ref, samples, batch, METHOD) <= LOOSE, stages


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("stages", SOME)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generation_equals_recomputation(family: str, stages: str, attention: str) -> None:
    model, ref = tiny.build(family, attention), reference(family)
    samples = tiny.mixed(model)
    with vtprune.apply(model, METHOD, keeps=STAGES[stages]):
        assert generation_error(model, ref, samples[:1], samples[0], METHOD) <= LOOSE
        assert generation_error(model, ref, samples, tiny.collate(samples), METHOD, steps=4) <= LOOSE
        assert generation_error(model, ref, samples[:1], samples[0], METHOD, steps=2, use_cache=False) <= LOOSE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_manual_decoding(family: str, side: str) -> None:
    model, ref = tiny.build(family), reference(family)
    samples = tiny.mixed(model)
    batch = tiny.collate(samples, side)
    with vtprune.apply(model, METHOD, keeps=STAGES["after 1 and 3"]), spy(METHOD) as records:
        tokens, logits = manual_decode(model, batch, 4)
    for b, kept in enumerate(kept_of(model, batch, records)):
        expected, expected_logits = ref.greedy(ref.prompt(samples[b]), kept, 4)
        assert_close(logits[b], expected_logits, LOOSE, f"sample {b}")
        assert tokens[b].tolist() == expected


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_beam_search(family: str) -> None:
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, most_images_for_beams(family), 3)
    with vtprune.apply(model, METHOD, keeps=STAGES["after 1 and 3"]), spy(METHOD) as records:
        out = model.generate(**sample, max_new_tokens=4, num_beams=3, do_sample=False)
    expanded = {k: sample[k].repeat_interleave(3, 0) for k in ("input_ids", "attention_mask")}
    kept = kept_of(model, expanded, records)[0]
    assert out[0, -4:].tolist() == ref.beam(ref.prompt(sample), kept, 4, 3)[0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_prompt_lookup_decoding_equals_greedy(family: str) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 1, seed=2)
    with vtprune.apply(model, METHOD, keeps=STAGES["after 1 and 3"]):
        greedy, logits = generate(model, sample, 14)
        options = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "eos_token_id": NEVER}
        try:
            looked_up, lookup_logits = generate(model, sample, 14, **options)
        except InputError:
            assert COUNTS_THE_CACHE
            return
    assert same(greedy, looked_up)
    assert_close(lookup_logits, logits, LOOSE)


@pytest.mark.parametrize("attention", ["sdpa", FLASH])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_every_layer_caches_what_it_saw_and_no_more(family: str, attention: str) -> None:
    model = tiny.build(family, attention)
    batch = tiny.collate(tiny.mixed(model))
    with vtprune.apply(model, METHOD, keeps=STAGES["after 1 and 3"]), spy(METHOD) as records:
        cache = model(**batch, use_cache=True).past_key_values
        kept = kept_of(model, batch, records)
        full = batch["input_ids"].shape[1]
        after_1 = max(int(k[1].sum()) for k in kept)
        after_3 = max(int((k[1] & k[3]).sum()) for k in kept)
        assert full > after_1 > after_3
        assert cache_lengths(cache) == [full, full, after_1, after_1, after_3]
        model(input_ids=torch.full((len(kept), 1), 9), past_key_values=cache)
        assert cache_lengths(cache) == [full + 1, full + 1, after_1 + 1, after_1 + 1, after_3 + 1]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_a_stage_sees_the_hidden_states_of_the_tokens_that_are_left(family: str) -> None:
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, 2, seed=4)
    with vtprune.apply(model, METHOD, keeps={None: 0.8, 1: 0.5, 3: 0.3}), spy(METHOD) as records:
        model(**sample)
    prompt, stages = ref.prompt(sample), first_call(records)
    assert list(stages) == [None, 1, 3]
    run = ref.run(prompt, kept_of(model, sample, records)[0])
    slot_of_placeholder = prompt.placeholder.nonzero().flatten()
    for before, after in ((None, 1), (1, 3)):
        assert same(stages[after].tokens.source, stages[before].kept_source), "tokens reappeared or went missing"
        slots, hidden = run.states[after]
        rows = torch.searchsorted(slots, slot_of_placeholder[stages[after].tokens.source])
        assert_close(stages[after].tokens.features, hidden[rows], FP32, f"after {after}")
        assert same(stages[after].tokens.coords, stages[before].tokens.coords[stages[before].selection.index])
        assert stages[after].tokens.ctx is stages[None].tokens.ctx, "one call, one ctx"


@torch.no_grad()
def test_report_names_the_stages_and_counts_the_last() -> None:
    model = tiny.build("llava")
    with vtprune.apply(model, METHOD, keeps={None: 0.75, 2: 0.25}) as handle:
        model(**tiny.prompt(model, 2))
        report = handle.report()
    assert report.stages == ("projector", "layer 2")
    assert [(i.tokens_in, i.tokens_out) for i in report.images] == [(16, 4), (16, 4)]
    assert report.flops_after < report.flops_before


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_forced_packing_of_all_rows_agrees(family: str, attention: str) -> None:
    model, plain = tiny.build(family, attention), twin(family, attention=attention)
    samples = tiny.mixed(model)
    with vtprune.apply(model, METHOD, keeps={1: 1.0, 3: 1.0}):
        for batch in (samples[0], tiny.collate(samples, "left"), tiny.collate(samples, "right")):
            valid = batch["attention_mask"].bool()
            dense = plain(**batch).logits
            assert same(model(**batch).logits, dense), "keep=1.0 at every stage must be a bypass"
            with engine.force_pack(), spy(METHOD) as records:
                logits = model(**batch).logits
            assert {r.layer for r in records} == {1, 3}, "forced packing bypassed the stages"
            assert_close(logits[valid], dense[valid], LOOSE)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_without_restore_logits_have_the_length_of_the_last_stage(family: str) -> None:
    model, ref = tiny.build(family), reference(family)
    samples = tiny.mixed(model)
    batch = tiny.collate(samples)
    with vtprune.apply(model, METHOD, keeps=STAGES["projector and after 2"], restore=False), spy(METHOD) as records:
        logits = model(**batch).logits
    runs = [ref.run(ref.prompt(s), k) for s, k in zip(samples, kept_of(model, batch, records), strict=True)]
    assert logits.shape[1] == max(len(run.slots) for run in runs)
    for b, run in enumerate(runs):
        assert_close(logits[b, -len(run.slots) :], run.logits, LOOSE)


@pytest.mark.parametrize("layer", [tiny.LAYERS - 1, tiny.LAYERS, -1, 99])
def test_a_layer_that_does_not_exist_is_refused(layer: int) -> None:
    """After the last layer there is nothing left to save."""
    model = tiny.build("llava")
    clean = hooks(model)
    with pytest.raises(ConfigError, match="layer"):
        vtprune.apply(model, METHOD, keeps={layer: 0.5})
    assert hooks(model) == clean


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_layers_below_the_first_stage_are_bit_identical_to_the_dense_model(family: str) -> None:
    """No layer runs twice and nothing is touched before the stage."""
    model, plain = tiny.build(family), twin(family)
    sample = tiny.prompt(model, 2)
    runs: list[int] = []
    handles = [
        layer.register_forward_hook(lambda _m, _a, _o, i=i: runs.append(i))
        for i, layer in enumerate(model.model.language_model.layers)
    ]
    with vtprune.apply(model, METHOD, keep=KEEP, keeps={2: 0.3}):
        cache = model(**sample, use_cache=True).past_key_values
    for handle in handles:
        handle.remove()
    assert runs == list(range(tiny.LAYERS))
    dense = plain(**sample, use_cache=True).past_key_values
    for i in range(3):
        assert_close(cache.layers[i].keys, dense.layers[i].keys, FP32)
    assert cache.layers[3].keys.shape[-2] < dense.layers[3].keys.shape[-2]
