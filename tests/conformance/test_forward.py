# SPDX-License-Identifier: Apache-2.0
"""A pruned forward equals the language model called by hand on the kept rows, at every kept slot."""

from __future__ import annotations

import pytest
import tiny
import torch

import vtprune

from .helpers import (
    ATTENTIONS,
    FP32,
    FP64,
    KEEP,
    LOOSE,
    METHODS,
    assert_close,
    error,
    forward_error,
    kept_of,
    later_hook,
    placeholder_mask,
    reference,
    slot_masks,
    spy,
    twin,
)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_alone_equals_reference(family: str, attention: str) -> None:
    model, ref = tiny.build(family, attention), reference(family)
    with vtprune.apply(model, "divprune", keep=KEEP):
        for sample in tiny.mixed(model):
            if (placeholder_mask(model, sample["input_ids"])).any():
                assert forward_error(model, ref, [sample], sample, "divprune") <= FP32


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_alone_equals_reference_in_double_precision(family: str) -> None:
    model, ref = tiny.build(family, dtype=torch.float64), reference(family, torch.float64)
    with vtprune.apply(model, "idpruner", keep=KEEP):
        for images in (1, 2):
            sample = tiny.prompt(model, images, seed=images)
            assert forward_error(model, ref, [sample], sample, "idpruner") <= FP64


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_of_mixed_image_counts_equals_each_alone(family: str, attention: str, side: str) -> None:
    model, ref = tiny.build(family, attention), reference(family)
    samples = tiny.mixed(model)
    with vtprune.apply(model, "norm", keep=KEEP):
        batch = tiny.collate(samples, side)
        assert forward_error(model, ref, samples, batch, "norm") <= LOOSE
        assert forward_error(model, ref, samples, batch, "norm", use_cache=False) <= LOOSE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_batch_equals_reference_in_double_precision(family: str, side: str) -> None:
    """Padding must not leak at all; fp32 noise could hide a small leak."""
    model, ref = tiny.build(family, dtype=torch.float64), reference(family, torch.float64)
    samples = tiny.mixed(model)
    with vtprune.apply(model, "norm", keep=KEEP):
        assert forward_error(model, ref, samples, tiny.collate(samples, side), "norm") <= 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_every_method_equals_reference(family: str, method: str) -> None:
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, 2, seed=7)
    for keep in (1, 7, 0.25):
        with vtprune.apply(model, method, keep=keep):
            assert forward_error(model, ref, [sample], sample, method) <= FP32


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_the_choice_is_the_same_alone_and_in_any_batch(family: str, method: str) -> None:
    model = tiny.build(family)
    samples = tiny.mixed(model, seed=11)
    alone = []
    with vtprune.apply(model, method, keep=KEEP):
        for sample in samples:
            if placeholder_mask(model, sample["input_ids"]).any():
                with spy(method) as records:
                    model(**sample)
                alone.append(kept_of(model, sample, records)[0][None])
            else:
                alone.append(torch.ones_like(sample["input_ids"][0], dtype=torch.bool))
        for side in ("left", "right"):
            batch = tiny.collate(samples, side)
            with spy(method) as records:
                model(**batch)
            together = [k[None] for k in kept_of(model, batch, records)]
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)), side


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_the_norm_method_keeps_the_rows_with_the_largest_norm(family: str) -> None:
    """The rows that the pruner names are the rows that it saw: checked against embeddings made without vtprune."""
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, 1, seed=3)
    prompt = ref.prompt(sample)
    visual = prompt.visual.nonzero().flatten()
    with vtprune.apply(model, "norm", keep=5, allocation="pooled"), spy("norm") as records:
        model(**sample)
    kept = kept_of(model, sample, records)[0][None]
    best = visual[prompt.embeds[visual].norm(dim=-1).topk(5).indices].sort().values
    assert torch.equal((kept & prompt.visual).nonzero().flatten(), best)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_kept_rows_reach_the_language_model_unchanged_and_in_order(family: str) -> None:
    model, ref = tiny.build(family), reference(family)
    samples = tiny.mixed(model)
    batch = tiny.collate(samples, "right")
    seen: list[dict] = []
    lm = model.model.language_model
    with vtprune.apply(model, "random", keep=KEEP), spy("random") as records, later_hook(lm, seen.append):
        model(**batch)
    embeds, masks = ref.embeddings(batch), slot_masks(model, batch, records)[None]
    valid = batch["attention_mask"].bool()
    packed, mask = seen[0]["inputs_embeds"], seen[0]["attention_mask"].bool()
    assert packed.shape[1] == int((masks & valid).sum(1).max()), "the packed batch is longer than its longest row"
    for b in range(len(samples)):
        assert torch.equal(packed[b][mask[b]], embeds[b][masks[b] & valid[b]])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_dropped_slots_repeat_the_kept_row_before_them(family: str, side: str) -> None:
    """So the logits before each kept token are the ones that predict it, and the last slot predicts what follows."""
    model = tiny.build(family)
    batch = tiny.collate(tiny.mixed(model), side)
    with vtprune.apply(model, "norm", keep=KEEP), spy("norm") as records:
        hidden = model.model(**batch).last_hidden_state
    kept = slot_masks(model, batch, records)[None] & batch["attention_mask"].bool()
    for b in range(len(kept)):
        row = torch.zeros_like(hidden[b, 0])
        for slot in range(kept.shape[1]):
            row = hidden[b, slot] if kept[b, slot] else row
            assert torch.equal(hidden[b, slot], row), f"sample {b}, slot {slot}"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_without_restore_logits_have_the_pruned_length_left_padded(family: str, side: str) -> None:
    model, ref = tiny.build(family), reference(family)
    samples = tiny.mixed(model)
    batch = tiny.collate(samples, side)
    with vtprune.apply(model, "norm", keep=KEEP, restore=False), spy("norm") as records:
        logits = model(**batch).logits
    runs = [
        ref.run(ref.prompt(sample), kept) for sample, kept in zip(samples, kept_of(model, batch, records), strict=True)
    ]
    assert logits.shape[1] == max(len(run.slots) for run in runs) < batch["input_ids"].shape[1]
    for b, run in enumerate(runs):
        assert_close(logits[b, -len(run.slots) :], run.logits, LOOSE, f"sample {b}")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_single_token_budgets_and_prompts_that_are_nothing_but_a_picture(family: str) -> None:
    model, ref = tiny.build(family), reference(family)
    picture = tiny.pictures(model, 1)[0]
    for parts in ([picture, 1], [1, picture, picture, 1]):
        sample = tiny.sample(model, parts, seed=5)
        with vtprune.apply(model, "norm", keep=1):
            assert forward_error(model, ref, [sample], sample, "norm") <= FP32


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_embeddings_given_by_the_caller_equal_ids(family: str) -> None:
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, 2)
    prompt = ref.prompt(sample)
    call = {k: v for k, v in sample.items() if k not in ("input_ids", "mm_token_type_ids")}
    call["inputs_embeds"] = model.get_input_embeddings()(sample["input_ids"])
    if family in tiny.QWEN:
        call["position_ids"] = prompt.positions[:, None]  # without ids the model itself cannot know them
    with vtprune.apply(model, "divprune", keep=KEEP), spy("divprune") as records:
        logits = model(**call).logits
    kept = kept_of(model, sample, records)[0]
    assert not bool(kept[None].all())
    run = ref.run(prompt, kept)
    assert_close(logits[0][run.slots], run.logits, FP32)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_generation_from_embeddings_given_by_the_caller(family: str) -> None:
    model, ref = tiny.build(family), reference(family)
    sample = tiny.prompt(model, 2)
    # First of all, because generate() takes the batch size from the first tensor that it is given.
    call = {"inputs_embeds": model.get_input_embeddings()(sample["input_ids"]).detach()}
    call |= {k: v for k, v in sample.items() if k != "input_ids"}
    with vtprune.apply(model, "norm", keep=KEEP), spy("norm") as records:
        out = model.generate(
            **call, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    tokens, logits = ref.greedy(ref.prompt(sample), kept_of(model, sample, records)[0], 4)
    assert out.sequences[0, -4:].tolist() == tokens
    assert_close(torch.cat(out.logits), logits, LOOSE)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_arguments_may_be_positional(family: str) -> None:
    """`model(input_ids, pixel_values)` and `model.model(input_ids)` with the rest by name."""
    model = tiny.build(family)
    sample = tiny.prompt(model, 1)
    rest = {k: v for k, v in sample.items() if k != "input_ids"}
    with vtprune.apply(model, "norm", keep=KEEP):
        assert error(model(sample["input_ids"], **rest).logits, model(**sample).logits) == 0
        hidden = model.model(sample["input_ids"], **rest).last_hidden_state
        assert error(model.lm_head(hidden), model(**sample).logits) <= FP32


@torch.no_grad()
def test_tuple_outputs_work() -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 1)
    with vtprune.apply(model, "norm", keep=KEEP):
        assert torch.equal(model(**sample, return_dict=False)[0], model(**sample).logits)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_half_precision_stays_finite_and_close(family: str) -> None:
    model, single = tiny.build(family, dtype=torch.bfloat16), twin(family)
    sample = tiny.prompt(model, 2)
    with vtprune.apply(model, "idpruner", keep=KEEP):
        logits = model(**sample).logits
    assert logits.dtype == torch.bfloat16 and bool(logits.isfinite().all())
    assert logits.shape[:2] == single(**{**sample, "pixel_values": sample["pixel_values"].float()}).logits.shape[:2]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_caller_s_tensors_are_not_changed(family: str) -> None:
    model = tiny.build(family)
    batch = tiny.collate(tiny.mixed(model), "right")
    copies = {k: v.clone() for k, v in batch.items()}
    with vtprune.apply(model, "divprune", keep=KEEP):
        model(**batch)
        model.generate(**tiny.collate(tiny.mixed(model)), max_new_tokens=2)
    assert all(torch.equal(batch[k], copies[k]) for k in batch)


@pytest.mark.parametrize("stages", [{None: 0.5}, {None: 0.5, 2: 0.2}], ids=["projector", "layers"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_hidden_states_and_attentions_of_all_layers_can_be_asked_for(family: str, stages: dict) -> None:
    """They come at the lengths at which the layers ran; the last one is what the head reads, at full length."""
    model = tiny.build(family, "eager")
    sample = tiny.prompt(model, 2)
    with vtprune.apply(model, "test-layers", keeps=stages), spy("test-layers") as records:
        out = model(**sample, output_hidden_states=True, output_attentions=True)
        plain = model(**sample)
    assert torch.equal(out.logits, plain.logits)
    kept = kept_of(model, sample, records)[0]
    first = int(kept[None].sum())
    last = int((kept[None] & kept.get(2, kept[None])).sum())
    rows = [first] * 3 + [last] * 2
    assert [a.shape[-2:] for a in out.attentions] == [(n, n) for n in rows]
    assert len(out.hidden_states) == tiny.LAYERS + 1
