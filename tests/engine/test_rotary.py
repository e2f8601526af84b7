# SPDX-License-Identifier: Apache-2.0
"""Looked-up rotary embeddings are the module's own to the bit, and only where nothing else could be meant."""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

import pytest
import tiny
import torch
from conformance.helpers import FP32, assert_close
from torch import Tensor, nn

import vtprune
from vtprune.engine import rotary
from vtprune.engine.attach import engine_of
from vtprune.models import find_family

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary, "DEVICES", (DEVICE,))


def calls(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions the module computes, each time it does."""
    asked: list[int] = []
    cls, own = type(module), type(module).forward

    def forward(self: Any, x: Tensor, position_ids: Tensor) -> Any:
        asked.append(position_ids.shape[-1])
        return own(self, x, position_ids)

    monkeypatch.setattr(cls, "forward", forward)
    return asked


@torch.no_grad()
def test_prompts_and_steps_look_it_up_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llava").to(DEVICE)
    batch = {k: v.to(DEVICE) for k, v in tiny.prompt(model, 1).items()}
    asked = calls(model.model.language_model.rotary_emb, monkeypatch)
    with vtprune.apply(model, "norm", keep=0.4):
        out = [model(**batch).logits, model.generate(**batch, max_new_tokens=4, do_sample=False)]
        assert asked == [1024]  # the table, once
        monkeypatch.setattr(rotary, "DEVICES", ())
        expected = [model(**batch).logits, model.generate(**batch, max_new_tokens=4, do_sample=False)]
        assert len(asked) == 6
    assert all(map(torch.equal, out, expected))
    assert "forward" not in model.model.language_model.rotary_emb.__dict__


@torch.no_grad()
def test_nothing_is_looked_up_in_what_is_being_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llava").to(DEVICE)
    batch = {k: v.to(DEVICE) for k, v in tiny.prompt(model, 1).items()}
    asked = calls(model.model.language_model.rotary_emb, monkeypatch)
    with vtprune.apply(model, "norm", keep=0.4):
        expected = model(**batch).logits
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert_close(model(**batch).logits, expected, FP32)  # with a mask, which on a GPU is another kernel
    assert len(asked) == 2 and asked[0] == 1024 > asked[1]


@torch.no_grad()
def test_a_changed_module_gets_another_table() -> None:
    model = tiny.build("llava").to(DEVICE)
    batch = {k: v.to(DEVICE) for k, v in tiny.prompt(model, 1).items()}
    module = model.model.language_model.rotary_emb
    with vtprune.apply(model, "norm", keep=0.4):
        before = model(**batch).logits
        module.inv_freq.mul_(0.5)
        after = model(**batch).logits
        assert not torch.equal(before, after)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rotary, "DEVICES", ())
            assert torch.equal(after, model(**batch).logits)
        module.inv_freq = module.inv_freq * 2.0
        assert torch.equal(before, model(**batch).logits)


@torch.no_grad()
def test_positions_of_the_callers_own_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llava").to(DEVICE)
    batch = {k: v.to(DEVICE) for k, v in tiny.prompt(model, 1).items()}
    asked = calls(model.model.language_model.rotary_emb, monkeypatch)
    positions = torch.arange(batch["input_ids"].shape[1], device=DEVICE)[None] + 5000
    with vtprune.apply(model, "norm", keep=0.4):
        model(**batch, position_ids=positions)
        assert asked and 1024 not in asked and 8192 not in asked


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
@torch.no_grad()
def test_given_positions_count_whether_or_not_they_are_slots(family: str) -> None:
    model = tiny.build(family)
    batch = {k: v.to(DEVICE) for k, v in tiny.prompt(model, 1).items()}
    model = model.to(DEVICE)
    slots = torch.arange(batch["input_ids"].shape[1], device=DEVICE)[None]
    shapes: list[int] = []
    with vtprune.apply(model, "norm", keep=0.4):
        expected = model(**batch).logits
        module = model.model.language_model.rotary_emb
        handle = module.register_forward_pre_hook(
            lambda _, args, kwargs: shapes.append([*args, *kwargs.values()][1].ndim), with_kwargs=True
        )
        same = model(**batch, position_ids=slots).logits
        handle.remove()
        assert shapes == [3 if family == "qwen2_5_vl" else 2]  # as the module is given them without us
        assert torch.equal(same, expected) == (family != "qwen2_5_vl")  # whose own are those of the picture's grid
        stretched = model(**batch, position_ids=2 * slots).logits
        assert not torch.equal(stretched, same)
        one = slots.clone()
        one[0, -1] += 1
        assert not torch.equal(model(**batch, position_ids=one).logits, same)


@torch.no_grad()
def test_padded_batches_and_later_turns_are_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llava").to(DEVICE)
    batch = tiny.collate(tiny.mixed(model))
    batch = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    single = {k: v.to(DEVICE) for k, v in tiny.prompt(model, 1).items()}
    more = torch.tensor([[5, 6, 7]], device=DEVICE)
    asked = calls(model.model.language_model.rotary_emb, monkeypatch)

    def all_of_it() -> list[torch.Tensor]:
        found = [model.generate(**batch, max_new_tokens=4, do_sample=False)]
        out = model(**single)
        wide = torch.ones(1, single["input_ids"].shape[1] + 3, dtype=torch.long, device=DEVICE)
        out = model(input_ids=more, attention_mask=wide, past_key_values=out.past_key_values)
        return [*found, out.logits]

    with vtprune.apply(model, "norm", keep=0.4, positions="compact"):
        compact = all_of_it()
    with vtprune.apply(model, "norm", keep=0.4):
        plain = all_of_it()
        assert 1024 in asked
        monkeypatch.setattr(rotary, "DEVICES", ())
        assert all(map(torch.equal, plain, all_of_it()))
    with vtprune.apply(model, "norm", keep=0.4, positions="compact"):
        assert all(map(torch.equal, compact, all_of_it()))


@torch.no_grad()
def test_a_table_serves_inference_and_training() -> None:
    model = tiny.build("llava").to(DEVICE)
    batch = {k: v.to(DEVICE) for k, v in tiny.prompt(model, 1).items()}
    with vtprune.apply(model, "norm", keep=0.4):
        with torch.inference_mode():
            model(**batch)
        with torch.enable_grad():
            model(**batch).logits.sum().backward()
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.grad is not None


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@torch.no_grad()
def test_kinds_that_depend_on_the_length_are_computed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llava").to(DEVICE)
    batch = {k: v.to(DEVICE) for k, v in tiny.prompt(model, 1).items()}
    module = model.model.language_model.rotary_emb
    asked = calls(module, monkeypatch)
    with vtprune.apply(model, "norm", keep=0.4):
        monkeypatch.setattr(module, "rope_type", kind)
        with contextlib.suppress(AttributeError, KeyError):  # a default one lacks what such a kind needs
            model(**batch)
    assert asked and 1024 not in asked


def test_a_forward_that_somebody_replaced_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llava")
    module = model.model.language_model.rotary_emb
    own, later = module.forward, lambda *a, **k: own(*a, **k)
    module.forward = own
    with vtprune.apply(model, "norm", keep=0.4):
        assert module.__dict__["forward"] is own
    del module.__dict__["forward"]
    with vtprune.apply(model, "norm", keep=0.4):
        assert engine_of(find_family(model)).rotary.wrapper is not None
        module.forward = later
    assert module.__dict__["forward"] is later


def test_a_wrapper_that_was_left_behind_does_what_the_module_does() -> None:
    """As accelerate leaves it, when its hook is put on after vtprune and taken off after it."""
    model = tiny.build("llava")
    module = model.model.language_model.rotary_emb
    with vtprune.apply(model, "norm", keep=0.4):
        left = module.__dict__.pop("forward")
    module.forward = left
    x, slots = torch.zeros(1, 5, 8), torch.arange(5)[None]
    twin = copy.deepcopy(module)
    assert twin.__dict__["forward"].__self__ is twin
    twin.inv_freq.mul_(2.0)
    assert not torch.equal(twin(x, slots)[0], module(x, slots)[0])
    own = type(module).forward(module, x, slots)
    assert all(map(torch.equal, module(x, slots), own))
    with vtprune.apply(model, "norm", keep=0.4):
        assert module.__dict__["forward"] is not left
    assert "forward" not in module.__dict__


def test_only_the_wrapper_itself_counts_as_vtprunes() -> None:
    model = tiny.build("llava")
    module = model.model.language_model.rotary_emb
    with vtprune.apply(model, "norm", keep=0.4):
        wrapper = module.forward
        assert rotary.ours(wrapper)

        @functools.wraps(wrapper)
        def other(*args: Any, **kwargs: Any) -> Any:
            return wrapper(*args, **kwargs)

        assert not rotary.ours(other) and not rotary.ours(functools.partial(wrapper)) and not rotary.ours(None)


@torch.no_grad()
def test_frequencies_whose_changes_are_not_counted_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llava").to(DEVICE)
    batch = {k: v.to(DEVICE) for k, v in tiny.prompt(model, 1).items()}
    module = model.model.language_model.rotary_emb
    asked = calls(module, monkeypatch)
    with torch.inference_mode():
        module.inv_freq = module.inv_freq.clone()
        with vtprune.apply(model, "norm", keep=0.4):
            model(**batch)
    assert asked and 1024 not in asked


@torch.no_grad()
def test_no_table_where_matrix_products_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llava").to(DEVICE)
    batch = {k: v.to(DEVICE) for k, v in tiny.prompt(model, 1).items()}
    asked = calls(model.model.language_model.rotary_emb, monkeypatch)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    with vtprune.apply(model, "norm", keep=0.4):
        model(**batch)
    assert asked and 1024 not in asked


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reach", [3, 640, 1024, 3000, 30000])
@torch.no_grad()
def test_rows_of_the_table_are_those_of_the_module(dtype: torch.dtype, reach: int) -> None:
    model = tiny.build("llava").to("cuda")
    module = model.model.language_model.rotary_emb
    table = rotary.RotaryTable(module, lambda: None)
    x = torch.empty(1, 1, 8, dtype=dtype, device="cuda")
    generator = torch.Generator().manual_seed(reach)
    for rows in (1, 7, min(reach, 500)):
        places = torch.randperm(reach, generator=generator)[:rows].sort().values.cuda()[None]
        own = module(x, places)
        for mine, theirs in zip(table._table(x, reach), own, strict=True):
            assert torch.equal(mine[places[0]], theirs[0])
