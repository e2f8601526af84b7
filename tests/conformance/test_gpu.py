# SPDX-License-Identifier: Apache-2.0
"""On a GPU: the trained model with sdpa, and with PyTorch's own flash kernel behind the FlashAttention contract."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import vtprune
from vtprune.engine import force_pack
from vtprune.models import find_family
from vtprune.models.pocket import data
from vtprune.tokens import PROJECTOR

from . import flash_contract
from .helpers import same
from .test_pocket_main_job import answers, inputs_for

pytestmark = pytest.mark.gpu
METHODS = [name for name, method in vtprune.methods().items() if method().stages() == (PROJECTOR,)]
#: The stand-in runs on PyTorch's own flash kernel; the real package is tested too where it is installed.
FLASH = [flash_contract.NAME] + ["flash_attention_2"] * (importlib.util.find_spec("flash_attn") is not None)


def load(attention: str, dtype: torch.dtype) -> tuple[nn.Module, Any, dict[str, torch.Tensor]]:
    model, processor = vtprune.load("pocket-llava", device="cuda", dtype=dtype)
    if attention in FLASH:
        model.model.language_model.config._attn_implementation = attention
    pairs = list(data.exam("test", 12, 5))
    inputs = {k: v.to("cuda") for k, v in inputs_for(processor, pairs).items()}
    return model, processor, inputs


@pytest.fixture(scope="module", params=["sdpa", *FLASH])
def half(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, Any, dict[str, torch.Tensor]]]:
    model, processor, inputs = load(request.param, torch.bfloat16)
    yield model, processor, {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    vtprune.remove(model)


def rows(inputs: dict[str, torch.Tensor], some: slice) -> dict[str, torch.Tensor]:
    return {k: v[some] for k, v in inputs.items()}


@torch.no_grad()
def test_keeping_everything_is_bit_identical_and_packing_everything_agrees(half: Any) -> None:
    model, _, inputs = half
    dense = model(**inputs).logits
    with vtprune.apply(model, "norm", keep=1.0):
        assert same(model(**inputs).logits, dense)
        with force_pack():
            packed = model(**inputs).logits
    valid = inputs["attention_mask"].bool()
    assert (packed - dense)[valid].abs().max() <= 0.02 * dense[valid].abs().max()
    assert same(model(**inputs).logits, dense)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_flash_and_sdpa_give_the_same_pruned_logits(method: str) -> None:
    found = []
    for attention in ("sdpa", *FLASH):
        model, _, inputs = load(attention, torch.float16)
        inputs = {k: v.half() if v.is_floating_point() else v for k, v in inputs.items()}
        flash_contract.calls.clear()
        with vtprune.apply(model, method, keep=0.25):
            batch, alone = model(**inputs).logits[:, -1].float(), model(**rows(inputs, slice(0, 1))).logits[:, -1]
        found.append(batch)
        assert (alone[0].float() - batch[0]).abs().max() <= 0.05 * batch.abs().max()
    assert flash_contract.calls and "packed" not in flash_contract.calls
    for other in found[1:]:
        assert (found[0] - other).abs().max() <= 0.05 * found[0].abs().max()


@torch.no_grad()
def test_several_tokens_on_a_pruned_cache(half: Any) -> None:
    """More than one query on a cache that is not empty: where flash takes gaps for packed sequences, and goes wrong."""
    model, _, inputs = half
    one = rows(inputs, slice(0, 1))
    extra = one["input_ids"][:, -5:]
    whole = torch.cat([one["attention_mask"], torch.ones_like(extra)], 1)
    flash_contract.calls.clear()
    with vtprune.apply(model, "norm", keep=0.25):
        cache = model(**one, use_cache=True).past_key_values
        together = model(input_ids=extra, attention_mask=whole, past_key_values=cache).logits.float()
        full = {**one, "input_ids": torch.cat([one["input_ids"], extra], 1), "attention_mask": whole}
        again = model(**full).logits[:, -5:].float()
    assert "packed" not in flash_contract.calls
    assert (together - again).abs().max() <= 0.05 * again.abs().max()


def test_the_gpu_answers_as_the_cpu_does() -> None:
    model, processor, inputs = load("sdpa", torch.float32)
    on_cpu, _ = vtprune.load("pocket-llava", device="cpu")
    at_home = {k: v.cpu() for k, v in inputs.items()}
    for method in METHODS:
        given = []
        for where, these in ((model, inputs), (on_cpu, at_home)):
            with vtprune.apply(where, method, keep=0.25):
                given.append(answers(where, processor, these))
        assert sum(a == b for a, b in zip(*given, strict=True)) >= 11, (method, given)


@torch.no_grad()
def test_the_gpu_chooses_as_the_cpu_does_from_the_same_features() -> None:
    model, _, inputs = load("sdpa", torch.float32)
    on_cpu, _ = vtprune.load("pocket-llava", device="cpu")
    encoded = vtprune.encode(model, inputs)
    at_home = replace(
        encoded,
        features=encoded.features.cpu(),
        source=encoded.source.cpu(),
        coords=encoded.coords.cpu(),
        text=encoded.text.cpu(),
        projector=find_family(on_cpu).projector,
        probes={k: v.cpu() for k, v in encoded.probes.items()},
    )
    for method in METHODS:
        there, here = (vtprune.select(tokens, method, keep=1 / 9).index.cpu() for tokens in (encoded, at_home))
        assert torch.equal(there, here), (method, torch.isin(there, here).float().mean())


@torch.no_grad()
def test_a_lora_step_on_the_gpu_changes_only_its_weights() -> None:
    peft = pytest.importorskip("peft")
    model, _, inputs = load("sdpa", torch.float32)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before = {k: v.clone() for k, v in tuned.named_parameters() if not v.requires_grad}
    with torch.enable_grad(), vtprune.apply(tuned, "norm", keep=0.25):
        loss = tuned(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1).step()
    assert loss.isfinite()
    assert all(same(v, before[k]) for k, v in tuned.named_parameters() if k in before)
