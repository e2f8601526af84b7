# SPDX-License-Identifier: Apache-2.0
"""An empty cache keeps the keys and values of a pruned prompt as they are: the same numbers, and nothing left on it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from conformance.helpers import FP32, assert_close
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache

import vtprune
from vtprune.decoding import evictmerge, vasparse
from vtprune.engine import first_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = ["llava", "llava_next", "qwen2_5_vl"]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_rows, "DEVICES", (DEVICE,))


def model_and_prompt(family: str = "llava", pictures: int = 1) -> tuple[nn.Module, dict[str, Any]]:
    model = tiny.build(family)
    batch = tiny.prompt(model, pictures)
    return model.to(DEVICE), {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in batch.items()}


def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that layers of caches hold whenever they join new ones to them."""
    seen: list[int] = []
    own = DynamicLayer.update

    def update(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(int(self.get_seq_length()))
        return own(self, keys, values, *args, **kwargs)

    monkeypatch.setattr(DynamicLayer, "update", update)
    return seen


def layers_of(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def untouched(cache: Any) -> bool:
    return not any("update" in vars(layer) for layer in cache.layers)


@pytest.mark.parametrize("given", [True, False], ids=["cache given", "cache made"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prompt_is_not_copied_and_nothing_changes(family: str, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_prompt(family)
    seen = copies(monkeypatch)

    def run() -> tuple[Tensor, Any, Tensor]:
        cache = {"past_key_values": DynamicCache(config=model.model.language_model.config)} if given else {}
        out = model(**batch, **cache, use_cache=True)
        prompt = copy.deepcopy(layers_of(out.past_key_values))
        later = model(input_ids=batch["input_ids"][:, -1:], past_key_values=out.past_key_values).logits
        return out.logits, prompt, later

    with vtprune.apply(model, "norm", keep=0.4):
        logits, prompt, later = run()
        assert seen and 0 not in seen  # the step of decoding alone
        monkeypatch.setattr(first_rows, "DEVICES", ())
        expected, kept, after = run()
        assert 0 in seen
    assert torch.equal(logits, expected) and torch.equal(later, after)
    for ours, theirs in zip(prompt, kept, strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("heads", [8, 2], ids=["own keys", "shared keys"])
@torch.no_grad()
def test_a_decoder_of_real_width_gives_the_same_bits(
    dtype: torch.dtype, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention runs in the kernels of large models here, which read keys and values where they lie."""
    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 3, "vocab_size": 99}
    config = LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=heads)
    lm = LlamaModel(config).to("cuda", dtype).eval()

    def run(rows: Tensor) -> list[Tensor]:
        kw = {"inputs_embeds": rows, "use_cache": True}
        layers = first_rows.take_first_rows(lm, kw)
        assert bool(layers) == bool(first_rows.DEVICES)
        out = lm(**kw)
        assert all("update" not in vars(layer) for layer in layers)
        later = lm(inputs_embeds=rows[:, :1], past_key_values=out.past_key_values)
        return [out.last_hidden_state, later.last_hidden_state]

    for batch, length in ((1, 128), (1, 640), (3, 77)):
        rows = torch.randn(batch, length, 1024, device="cuda", dtype=dtype)
        ours = run(rows)
        with monkeypatch.context() as patch:
            patch.setattr(first_rows, "DEVICES", ())
            assert all(map(torch.equal, ours, run(rows)))


@torch.no_grad()
def test_generation_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llava")
    batch = tiny.collate(tiny.mixed(model))
    model = model.to(DEVICE)
    batch = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in batch.items()}
    ways: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}]

    def all_of_it() -> list[Tensor]:
        found = []
        for way in ways:
            torch.manual_seed(0)
            found.append(model.generate(**batch, max_new_tokens=5, **{"do_sample": False, **way}))
        return found

    for method in ("norm", "fastv", "pyramiddrop"):
        with vtprune.apply(model, method, keep=0.4), monkeypatch.context() as patch:
            ours = all_of_it()
            patch.setattr(first_rows, "DEVICES", ())
            assert all(map(torch.equal, ours, all_of_it())), method


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_what_else_is_done_to_the_cache_goes_on(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_prompt(family)

    def sparse() -> Tensor:
        with vasparse(model, keep=0.5):
            return model.generate(**batch, max_new_tokens=6, do_sample=False)

    def merged() -> Tensor:
        with evictmerge(model, keep=0.5):
            return model.generate(**batch, max_new_tokens=6, do_sample=False)

    for way in (sparse, merged):
        with vtprune.apply(model, "norm", keep=0.5), monkeypatch.context() as patch:
            ours = way()
            patch.setattr(first_rows, "DEVICES", ())
            assert torch.equal(ours, way()), way.__name__


@torch.no_grad()
def test_an_update_that_somebody_puts_around_stays() -> None:
    model, batch = model_and_prompt()
    lm, seen = model.model.language_model, []

    def watch(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        for layer in kwargs["past_key_values"].layers:
            if getattr(layer.update, "__name__", "") != "watched":
                own = layer.update

                def watched(*args: Any, own: Any = own) -> Any:
                    seen.append(args[0].shape[2])
                    return own(*args)

                layer.update = watched

    with vtprune.apply(model, "norm", keep=0.4):
        handle = lm.register_forward_pre_hook(watch, with_kwargs=True)  # after ours
        out = model(**batch, past_key_values=DynamicCache(config=lm.config))
        handle.remove()
        model(input_ids=batch["input_ids"][:, -1:], past_key_values=out.past_key_values)
    rows = out.past_key_values.get_seq_length() - 1
    assert seen == [rows] * len(lm.layers) + [1] * len(lm.layers)


@torch.no_grad()
def test_an_interrupted_forward_leaves_nothing_once_another_begins() -> None:
    model, batch = model_and_prompt()
    lm = model.model.language_model
    cache = DynamicCache(config=lm.config)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with vtprune.apply(model, "norm", keep=0.4):
        handle = lm.layers[-1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**batch, past_key_values=cache)
        handle.remove()
        model(**batch)
        assert untouched(cache)


@torch.no_grad()
def test_nothing_stays_on_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_prompt()
    lm = model.model.language_model
    with vtprune.apply(model, "norm", keep=0.4):
        cache = model(**batch, use_cache=True).past_key_values
        assert untouched(cache)
        # A forward that fails half-way.
        cache = DynamicCache(config=lm.config)

        def fail(*_: Any) -> None:
            assert not untouched(cache)
            raise RuntimeError("half-way")

        handle = lm.layers[-1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="half-way"):
            model(**batch, past_key_values=cache)
        handle.remove()
        assert untouched(cache)
        # What it kept until then is a prompt like any other.
        layer = cache.layers[0]
        rows = layer.keys.shape[2]
        layer.update(layer.keys, layer.values)
        assert layer.keys.shape[2] == 2 * rows


@torch.no_grad()
def test_an_interrupted_layer_does_as_ever_on_whatever_comes() -> None:
    model, _ = model_and_prompt()
    with vtprune.apply(model, "norm", keep=0.4):
        cache = DynamicCache(config=model.model.language_model.config)
        inputs = {"inputs_embeds": torch.zeros(1, 1, 8, device=DEVICE), "past_key_values": cache}
        layers = first_rows.take_first_rows(model.model.language_model, inputs)
        assert len(layers) == len(cache.layers)
        other = copy.deepcopy(cache)
        rows = torch.randn(1, 2, 3, 8, device=DEVICE)
        for one in (cache, other):
            keys, values = one.layers[0].update(rows, rows)
            assert keys is rows and values is rows
            keys, _ = one.layers[0].update(rows, rows)
            assert torch.equal(keys, torch.cat([rows, rows], 2)) and "update" not in vars(one.layers[0])
            DynamicLayer.update(one.layers[1], rows, rows)  # filled in another way
            keys, _ = one.layers[1].update(rows, rows)
            assert torch.equal(keys, torch.cat([rows, rows], 2)) and "update" not in vars(one.layers[1])
        first_rows.release(layers)
        assert untouched(cache) and not untouched(other)


@pytest.mark.parametrize("part", ["keys", "values"])
def test_a_part_of_something_larger_is_copied(part: str) -> None:
    model, _ = model_and_prompt()
    lm = model.model.language_model
    with torch.no_grad():
        inputs = {"inputs_embeds": torch.zeros(1, 1, 8, device=DEVICE), "use_cache": True}
        layer = first_rows.take_first_rows(lm, inputs)[0]
        whole, part_of = torch.randn(1, 2, 3, 8, device=DEVICE), torch.randn(1, 2, 3, 16, device=DEVICE)[..., :8]
        given = {"keys": whole, "values": whole, part: part_of}
        layer.update(given["keys"], given["values"])
        kept = getattr(layer, part)
        assert torch.equal(kept, part_of) and kept.untyped_storage().nbytes() == kept.nbytes


def test_only_where_nothing_else_could_be_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = model_and_prompt()
    lm = model.model.language_model
    embeds = torch.zeros(1, 1, 8, device=DEVICE)

    def taken(**kw: Any) -> int:
        layers = first_rows.take_first_rows(lm, {"inputs_embeds": embeds, **kw})
        first_rows.release(layers)
        return len(layers)

    assert not taken(use_cache=True)  # gradients
    with torch.no_grad():
        every = len(lm.layers)
        assert taken(use_cache=True) == every
        assert not taken() and not taken(use_cache=False)
        cache = DynamicCache(config=lm.config)
        assert taken(past_key_values=cache, use_cache=False) == every
        cache.layers[0].update(*torch.zeros(2, 1, 2, 3, 8, device=DEVICE))
        assert taken(past_key_values=cache) == every - 1
        mine = DynamicCache(config=lm.config)
        mine.layers[0].update = lambda *_: None  # somebody's own
        assert taken(past_key_values=mine) == every - 1 and "update" in vars(mine.layers[0])
        assert not taken(past_key_values=StaticCache(config=lm.config, max_cache_len=8))
        monkeypatch.setattr(cache, "offloading", True)
        assert not taken(past_key_values=cache)
        monkeypatch.setattr(lm.config, "_attn_implementation", "eager")
        assert not taken(use_cache=True)
        monkeypatch.setattr(lm.config, "_attn_implementation", "sdpa")
        lm.layers[1].compile(backend="eager")
        assert not taken(use_cache=True)


@pytest.mark.parametrize("what", ["layer", "text model", "forward", "attention"])
@torch.no_grad()
def test_compiled_models_give_the_same(what: str) -> None:
    model, batch = model_and_prompt()
    lm = model.model.language_model

    def run() -> list[Tensor]:
        out = [model(**batch, use_cache=True) for _ in range(3)][-1]
        later = model(input_ids=batch["input_ids"][:, -1:], past_key_values=out.past_key_values).logits
        return [out.logits, later]

    with vtprune.apply(model, "norm", keep=0.4):
        expected = run()
        if what == "layer":
            lm.layers[0].compile(backend="eager")
        elif what == "text model":
            lm.compile(backend="eager")
        elif what == "attention":
            lm.layers[0].self_attn.compile(backend="eager", fullgraph=True)
        else:
            lm.forward = torch.compile(lm.forward, backend="eager", fullgraph=True)
        for ours, theirs in zip(run(), expected, strict=True):
            assert_close(ours, theirs, FP32)  # transformers gives compiled models a mask, and attention another kernel
