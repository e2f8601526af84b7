# SPDX-License-Identifier: Apache-2.0
"""On a GPU, in bf16: the methods inside the language model on trained models, and decoding on core neurons."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import vtprune
from vtprune.decoding import core_neurons, evictmerge
from vtprune.eval import controls, tasks
from vtprune.kernels import neuron_match
from vtprune.models import find_family

from .helpers import FLASH, Record, first_call, spy
from .test_layer_methods import METHODS as DROPPING

pytestmark = pytest.mark.gpu
METHODS = {**DROPPING, "tokensparse": ("tokensparse", {"layers": [2, 3, 5]})}
MODELS = {"pocket-llava": "pocketvqa/basic", "pocket-qwen2.5-vl": "pocketvqa/icl"}
KEEP = 0.25


def load(name: str, attention: str, dtype: torch.dtype, device: str = "cuda", count: int = 16) -> tuple[nn.Module, Any]:
    model, processor = vtprune.load(name, device=device, dtype=dtype)
    model.set_attn_implementation("eager" if attention == "eager" else "sdpa")
    if attention == FLASH:
        model.model.language_model.config._attn_implementation = FLASH
    examples = list(tasks.get(MODELS[name]).examples("test", count, 3))
    return model, controls.prepare(find_family(model), processor, examples)


@torch.no_grad()
def stages(model: nn.Module, inputs: Any, case: str) -> dict[int | None, Record]:
    """What was chosen at each stage, and from what."""
    method, options = METHODS[case]
    with vtprune.apply(model, method, keep=KEEP, **options), spy(method) as records:
        logits = model(**inputs, logits_to_keep=1).logits
    assert bool(logits.isfinite().all())
    return first_call(records)


def same_fate(one: Record, other: Record) -> float:
    """Of the tokens that either keeps, the share that both keep."""
    a, b = (set(record.kept_source.tolist()) for record in (one, other))
    return len(a & b) / max(1, len(a | b)) if a or b else 1.0


def apart(one: Record, other: Record) -> float:
    """Largest relative difference, in norm, of what the method was shown at a stage."""
    worst = 0.0
    for probe, rows in one.tokens.probes.items():
        if rows.is_floating_point():
            a, b = rows.double().cpu(), other.tokens.probes[probe].double().cpu()
            worst = max(worst, float((a - b).norm() / a.norm().clamp(min=1e-30)))
    return worst


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_backends_select_the_same_tokens_in_bf16(name: str, case: str) -> None:
    """The layers below a stage round differently under each backend, and clip art is full of near ties. So what a
    method is shown must agree to rounding, and the choices must but for near ties; `-rP` prints the numbers."""
    found = {}
    for attention in ("sdpa", "eager", FLASH):
        model, inputs = load(name, attention, torch.bfloat16)
        found[attention] = stages(model, inputs, case)
    for (a, one), (b, other) in itertools.combinations(found.items(), 2):
        for number, layer in enumerate(one):
            agree = same_fate(one[layer], other[layer])
            print(f"agreement {name}, {case}, {a} and {b}, stage {layer}: {agree:.4f}")
            if number == 0:  # later stages are shown what the first one left
                assert apart(one[layer], other[layer]) <= 0.02, (a, b, layer)
            assert agree >= 0.85, (a, b, layer)


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_the_gpu_selects_as_the_cpu_does_in_fp32(name: str, case: str) -> None:
    there, here = (stages(*load(name, "sdpa", torch.float32, device, 4), case) for device in ("cuda", "cpu"))
    for number, layer in enumerate(there):
        agree = same_fate(there[layer], here[layer])
        print(f"agreement {name}, {case}, GPU and CPU, stage {layer}: {agree:.4f}")
        if number == 0:
            assert apart(there[layer], here[layer]) <= 1e-3, layer
        assert agree >= 0.95, layer


@pytest.mark.parametrize("attention", ["sdpa", "eager", FLASH])
@pytest.mark.parametrize("case", METHODS)
@torch.no_grad()
def test_decoding_equals_a_longer_prompt(case: str, attention: str) -> None:
    """Tokens on the pruned cache against the same tokens as part of the prompt; all methods look at the prompt's end,
    so the same rows are kept by force."""
    method, options = METHODS[case]
    model, inputs = load("pocket-llava", attention, torch.bfloat16, count=4)
    extra = inputs["input_ids"][:, -4:]
    with vtprune.apply(model, method, keep=KEEP, **options), spy(method) as records:
        cache = model(**inputs, use_cache=True).past_key_values
        steps = [model(input_ids=extra[:, t : t + 1], past_key_values=cache).logits[:, 0].float() for t in range(4)]
        chosen = [record.selection for record in records]
        cls = vtprune.methods()[method]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cls, "select", lambda *_: chosen.pop(0))
            whole = {
                **inputs,
                "input_ids": torch.cat([inputs["input_ids"], extra], 1),
                "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(extra)], 1),
            }
            again = model(**whole).logits[:, -4:].float()
    for t, step in enumerate(steps):
        assert (step - again[:, t]).abs().max() <= 0.05 * again.abs().max(), t


@torch.no_grad()
def test_a_gpu_evicts_and_merges_what_a_cpu_does() -> None:
    found = []
    for device in ("cuda", "cpu"):
        model, inputs = load("pocket-llava", "sdpa", torch.float32, device, 4)
        with evictmerge(model, keep=KEEP):
            cache = model(**inputs, use_cache=True).past_key_values
            step = model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache).logits
        found.append((step.float().cpu(), [layer.keys.cpu() for layer in cache.layers]))
    (logits, keys), (plain, expected) = found
    assert (logits - plain).abs().max() <= 0.05 * plain.abs().max()
    for one, other in zip(keys, expected, strict=True):  # near ties apart
        assert one.shape == other.shape and float(((one - other).abs().amax(-1) > 1e-2).float().mean()) <= 0.05


@pytest.mark.parametrize("shape", [(4096, 11008), (3584, 18944)], ids=str)
@torch.no_grad()
def test_a_sparse_ffn_is_the_dense_one_with_a_mask(shape: tuple[int, int]) -> None:
    width, inner = shape
    torch.manual_seed(0)
    with torch.device("cuda"):
        gate, up = (torch.randn(inner, width, dtype=torch.bfloat16) * 0.02 for _ in range(2))
        down = torch.randn(width, inner, dtype=torch.bfloat16) * 0.02
        x = torch.randn(1, width, dtype=torch.bfloat16) * 0.1
    ids = torch.randperm(inner)[: int(0.4 * inner)].sort().values.cuda()
    linear, silu = nn.functional.linear, nn.functional.silu
    act = silu(linear(x, gate)) * linear(x, up)
    expected = linear(torch.zeros_like(act).index_copy_(1, ids, act[:, ids]), down)
    gathered = linear(silu(linear(x, gate[ids])) * linear(x, up[ids]), down[:, ids].contiguous())
    assert (gathered - expected).abs().max() <= 1e-3
    reading = neuron_match.sparse_ffn(x, gate, up, down.t().contiguous().t(), ids)
    assert (reading - expected).abs().max() <= 1e-3


@torch.no_grad()
def test_decoding_on_core_neurons_is_the_dense_model_with_a_mask_in_bf16() -> None:
    model, inputs = load("pocket-llava", "sdpa", torch.bfloat16, count=1)
    layers = range(1, 5)
    masks: dict[int, torch.Tensor] = {}

    def steps(remember: bool = False) -> torch.Tensor:
        cache = model(**inputs, use_cache=True).past_key_values
        given = inputs["input_ids"][:, -6:]
        out = torch.cat([model(input_ids=given[:, t : t + 1], past_key_values=cache).logits for t in range(6)], 1)
        for i, core in cache._vtprune_neurons.layers.items() if remember else ():
            ids = neuron_match.core(core.votes, 0.4)[0][0]
            masks[i] = torch.zeros(core.votes.shape[1] + 1, device=ids.device).index_fill_(0, ids, 1.0)[:-1]
        return out.float()

    def mask(layer: int, args: tuple[torch.Tensor]) -> Any:
        return (args[0] * masks[layer].to(args[0]),) if args[0].shape[1] == 1 else None

    with core_neurons(model, layers=layers):
        sparse = steps(remember=True)
    dense = steps()
    assert masks.keys() == set(layers)
    for i in layers:
        down = model.model.language_model.layers[i].mlp.down_proj
        down.register_forward_pre_hook(lambda _, args, i=i: mask(i, args))
    masked = steps()
    assert (sparse - masked).abs().max() <= 0.02 * masked.abs().max()
    assert (sparse - dense).abs().max() > 2 * (sparse - masked).abs().max()


@pytest.mark.parametrize("case", METHODS)
@torch.no_grad()
def test_an_offloaded_cache_serves_a_prompt_and_its_answer(case: str) -> None:
    """Keys leave the GPU as soon as a layer has read them, before its attention rows are asked for."""
    method, options = METHODS[case]
    model, inputs = load("pocket-llava", "sdpa", torch.float32, count=4)
    with vtprune.apply(model, method, keep=KEEP, **options):
        plain, offloaded = (
            model.generate(**inputs, max_new_tokens=6, do_sample=False, **cache)
            for cache in ({}, {"past_key_values": DynamicCache(config=model.config.text_config, offloading=True)})
        )
    assert torch.equal(plain, offloaded)
