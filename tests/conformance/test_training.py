# SPDX-License-Identifier: Apache-2.0
"""Training under pruning: the loss and the gradients of the reference, a LoRA step, gradient checkpointing."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import vtprune
from vtprune.errors import InputError, UnsupportedModelError, VTPruneError

from .helpers import ATTENTIONS, KEEP, assert_close, kept_of, placeholder_mask, same, spy
from .reference import Reference

LOSS = 1e-5
GRADIENT = 1e-4
STAGES = {"norm": {}, "test-layers": {"keeps": {None: 0.7, 2: 0.3}}}


def with_labels(model: nn.Module, sample: tiny.Inputs, how: str) -> tiny.Inputs:
    """Labels on the answer alone, on all text, or on everything as a careless user sets them."""
    labels = sample["input_ids"].clone()
    labels[:, 0] = -100  # nothing comes before it; left padding would, in the stock model as well
    if how == "answer":
        labels[:, :-4] = -100
    elif how == "text":
        labels[placeholder_mask(model, labels)] = -100
    return {**sample, "labels": labels}


def packed_loss(ref: Reference, samples: list[tiny.Inputs], kept: list[Any]) -> Tensor:
    """Cross entropy over the kept rows: each predicts the label of the kept row after it."""
    logits, targets = [], []
    for sample, k in zip(samples, kept, strict=True):
        run = ref.run(ref.prompt({n: v for n, v in sample.items() if n != "labels"}), k)
        logits.append(run.logits[:-1])
        targets.append(sample["labels"][0][run.slots][1:])
    return cross_entropy(torch.cat(logits).float(), torch.cat(targets), ignore_index=-100)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, gradient in want.items():
        if float(gradient.abs().max()) == 0 and name not in got:
            continue
        scale = max(1.0, float(gradient.abs().max()))
        assert name in got, f"no gradient reached {name}"
        assert_close(got[name] / scale, gradient / scale, GRADIENT, name)


@pytest.mark.parametrize("method", STAGES)
@pytest.mark.parametrize("how", ["answer", "text", "everything"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loss_and_gradients_equal_the_reference(family: str, how: str, method: str) -> None:
    model, other = tiny.build(family), tiny.build(family)
    sample = with_labels(model, tiny.prompt(model, 2), how)
    labels = sample["labels"].clone()
    with vtprune.apply(model, method, keep=KEEP, **STAGES[method]), spy(method) as records:
        out = model(**sample)
        out.loss.backward()
    assert same(sample["labels"], labels), "the caller's labels were changed"
    loss = packed_loss(Reference(other), [sample], kept_of(model, sample, records))
    loss.backward()
    assert abs(float(out.loss - loss)) <= LOSS
    assert out.logits.shape[:2] == labels.shape
    want = gradients(other)
    assert_same_gradients(gradients(model), want)
    eye = "visual" if family in tiny.QWEN else "vision_tower"
    mouth = "merger" if family in tiny.QWEN else "multi_modal_projector"
    for part in (eye, mouth, "language_model.embed_tokens", "layers.4"):
        assert any(part in n and float(g.abs().max()) > 0 for n, g in want.items()), f"{part} is not trained at all"


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loss_of_a_padded_batch_equals_the_reference(family: str, side: str, attention: str) -> None:
    model, other = tiny.build(family, attention), tiny.build(family)
    samples = [with_labels(model, s, "text") for s in tiny.mixed(model)]
    batch = tiny.collate(samples, side)
    with vtprune.apply(model, "norm", keep=KEEP), spy("norm") as records:
        model.train()
        loss = model(**batch).loss
        loss.backward()
    want = packed_loss(Reference(other), samples, kept_of(model, batch, records))
    want.backward()
    assert abs(float(loss - want)) <= LOSS
    assert_same_gradients(gradients(model), gradients(other))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_keep_all_and_text_only_losses_are_bit_identical(family: str) -> None:
    model, other = tiny.build(family), tiny.build(family)
    batch = tiny.collate([with_labels(model, s, "text") for s in tiny.mixed(model)], "right")
    with vtprune.apply(model, "norm", keep=1.0):
        assert same(model(**batch).loss, other(**batch).loss)
    text = with_labels(model, tiny.prompt(model, 0), "text")
    with vtprune.apply(model, "norm", keep=KEEP):
        model(**batch)
        assert same(model(**text).loss, other(**text).loss)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_without_restore_the_length_is_the_pruned_one_and_full_length_labels_are_refused(family: str) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 2)
    with vtprune.apply(model, "norm", keep=KEEP, restore=False) as handle:
        logits = model(**sample).logits
        assert logits.shape[1] == sample["input_ids"].shape[1] - handle.report().tokens_in + handle.report().tokens_out
        with pytest.raises(InputError, match="restore"):
            model(**with_labels(model, sample, "text"))
        assert model(**sample).loss is None


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", STAGES)
def test_several_steps_reduce_the_loss_as_the_reference_does(family: str, method: str) -> None:
    """Nothing of one step leaks into the next: three steps of gradient descent end at the same weights."""
    model, other = tiny.build(family), tiny.build(family)
    sample = with_labels(model, tiny.prompt(model, 1), "answer")
    losses: list[list[float]] = [[], []]
    with vtprune.apply(model, method, keep=KEEP, **STAGES[method]):
        steps = torch.optim.SGD(model.parameters(), lr=0.02)
        others = torch.optim.SGD(other.parameters(), lr=0.02)
        for _ in range(3):
            with spy(method) as records:
                loss = model(**sample).loss
            want = packed_loss(Reference(other), [sample], kept_of(model, sample, records))
            for optimizer, value in ((steps, loss), (others, want)):
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
            losses[0].append(float(loss))
            losses[1].append(float(want))
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", STAGES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradient_checkpointing_is_right_or_refused(family: str, method: str, reentrant: bool) -> None:
    model, plain = tiny.build(family), tiny.build(family)
    sample = with_labels(model, tiny.prompt(model, 2), "text")
    with vtprune.apply(plain, method, keep=KEEP, **STAGES[method]):
        plain.train()
        plain(**sample).loss.backward()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    with vtprune.apply(model, method, keep=KEEP, **STAGES[method]):
        try:
            model(**sample).loss.backward()
        except VTPruneError as refusal:
            assert method == "test-layers", "a method that acts at the projector must work with checkpointing"
            assert isinstance(refusal, UnsupportedModelError) and "checkpointing" in str(refusal)
            return
    assert_same_gradients(gradients(model), gradients(plain))


def lora_step(model: Any, sample: tiny.Inputs) -> tuple[set[str], set[str]]:
    """Names of the parameters that one optimizer step changed, and of all others."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # the first step moves only B, which starts at zero
        optimizer.zero_grad()
        model(**sample).loss.backward()
        optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p.detach(), before[n])}
    return changed, set(before) - changed


@pytest.mark.parametrize("order", ["apply first", "LoRA first"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_lora_step_changes_lora_weights_and_nothing_else(family: str, order: str) -> None:
    model, plain = tiny.build(family), tiny.build(family)
    sample = with_labels(model, tiny.prompt(model, 2), "answer")
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    with torch.no_grad():
        dense = plain(**sample).loss
    if order == "apply first":
        vtprune.apply(model, "norm", keep=KEEP)
        tuned = peft.get_peft_model(model, config)
    else:
        tuned = peft.get_peft_model(model, config)
        vtprune.apply(tuned, "norm", keep=KEEP)
    with torch.no_grad():
        start = tuned(**sample).loss
    assert not same(start, dense), "the wrapped model is not pruned"
    changed, unchanged = lora_step(tuned, sample)
    assert changed and all("lora_" in name for name in changed)
    assert all("lora_" not in name for name in unchanged)
    with torch.no_grad():
        assert tuned(**sample).loss < start
    vtprune.remove(tuned if order == "LoRA first" else model)
    bare = tuned.unload()
    with torch.no_grad():
        assert same(bare(**sample).loss, dense)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_training_mode_and_inference_alternate(family: str) -> None:
    model, plain = tiny.build(family), tiny.build(family)
    sample = tiny.prompt(model, 1)
    labelled = with_labels(model, sample, "answer")
    with vtprune.apply(model, "norm", keep=KEEP), vtprune.apply(plain, "norm", keep=KEEP):
        want = plain.generate(**sample, max_new_tokens=4, do_sample=False)
        for _ in range(2):
            model.train()
            model(**labelled).loss.backward()
            model.eval()
            assert same(model.generate(**sample, max_new_tokens=4, do_sample=False), want)
