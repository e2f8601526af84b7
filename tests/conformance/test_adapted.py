# SPDX-License-Identifier: Apache-2.0
"""Models whose weights are not what they were: int8 weights of torchao, LoRA adapters of PEFT, and both."""

from __future__ import annotations

import logging
from typing import Any

import peft
import pytest
import tiny
import torch
from torch import nn

import vtprune
from vtprune.errors import UnsupportedModelError
from vtprune.models.pocket import data

from .helpers import FP32, KEEP, forward_error, generation_error, hooks, same
from .reference import Reference

with pytest.MonkeyPatch.context() as _patch:  # it warns about enums of its own while it is imported
    _patch.setattr(logging.getLogger("torch.utils._pytree"), "disabled", True)
    quantization = pytest.importorskip("torchao.quantization")


def adapted(model: Any, how: str) -> Any:
    """The model with other weights; adapters are random, so that they change what comes out."""
    if "int8" in how:
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        packed = [p for p in model.parameters() if type(p) not in (nn.Parameter, torch.Tensor)]
        assert len(packed) > 20, "nothing was quantised, so nothing is tested"
    if "lora" in how:
        torch.manual_seed(1)
        names = r".*language_model.*\.(q_proj|v_proj|down_proj)"
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    return model.eval()


@pytest.mark.parametrize(("family", "how"), [("llava", "lora on int8"), ("qwen2_5_vl", "int8")])
@torch.no_grad()
def test_they_compute_what_the_language_model_makes_of_the_kept_rows(family: str, how: str) -> None:
    model, plain = adapted(tiny.build(family), how), adapted(tiny.build(family), how)
    bare = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
    samples = [tiny.prompt(bare, n, seed=n) for n in (2, 1)]
    batch = tiny.collate(samples)
    dense = model(**batch).logits
    clean = hooks(model)
    for method, options in {"idpruner": {}, "fastv": {"layer": 1}}.items():
        with vtprune.apply(model, method, keep=1.0, **options):
            assert same(model(**batch).logits, dense), method
        with vtprune.apply(model, method, keep=KEEP, **options) as handle:
            assert forward_error(model, Reference(bare), samples, batch, method) <= 5 * FP32
            assert handle.report().tokens_out < handle.report().tokens_in
    with vtprune.apply(model, "norm", keep=KEEP):
        assert generation_error(model, Reference(bare), samples[:1], samples[0], "norm", steps=2) <= 5 * FP32
    assert same(model(**batch).logits, dense) and hooks(model) == clean


@pytest.mark.parametrize("how", ["int8", "lora"])
@torch.no_grad()
def test_the_trained_model_answers_with_a_quarter_of_its_tokens(how: str) -> None:
    model, processor = vtprune.load("pocket-llava", device="cpu")
    pairs = list(data.exam("test", 3, 11))
    turns = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
        for _, question in pairs
    ]
    texts = [processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]
    pictures = [data.render(scene) for scene, _ in pairs]
    inputs = dict(processor(images=pictures, text=texts, padding=True, return_tensors="pt"))
    if how == "lora":  # as training starts: an adapter that changes nothing yet
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)"))
    else:
        model = adapted(model, how)
    model.eval()
    dense = model(**inputs).logits
    with vtprune.apply(model, "idpruner", keep=1.0):
        assert same(model(**inputs).logits, dense)
    with vtprune.apply(model, "idpruner", keep=0.25) as handle:
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert handle.report().ratio == 0.25
    given = processor.batch_decode(out, skip_special_tokens=True)
    assert sum(a == question.answer for a, (_, question) in zip(given, pairs, strict=True)) >= 2
    assert same(model(**inputs).logits, dense)


def test_what_computes_with_weights_refuses_packed_ones() -> None:
    model = adapted(tiny.build("llava"), "int8")
    clean = hooks(model)
    for options in ({"method": "zoo"}, {"method": "idpruner", "importance": "zoo"}):
        with pytest.raises(UnsupportedModelError, match=r"are quantised \(Int8Tensor\)") as caught:
            vtprune.apply(model, **options)
        assert "\n" not in str(caught.value) and hooks(model) == clean
