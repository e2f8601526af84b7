# SPDX-License-Identifier: Apache-2.0
"""The probe: what it says against a plain computation from hidden states, its formats, and its memory."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from helpers import PeakBytes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import vtprune
from vtprune.errors import ConfigError, InputError, VTPruneError
from vtprune.kernels.lens_topk import inverse_norms, lens_rank, lens_topk
from vtprune.lens import Calibration, Lens
from vtprune.models.loading import build_inputs

SLOW_WIDTH = 3584


def plain(rows: Tensor, table: Tensor, left_out: tuple[int, ...], k: int) -> tuple[Tensor, Tensor]:
    cosines = torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(table, dim=1).T
    cosines[:, list(left_out)] = -torch.inf
    return cosines.topk(k, dim=1)


def hook_count(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_it_says_what_hidden_states_say(family: str) -> None:
    model = tiny.build(family)
    batch = tiny.collate(tiny.mixed(model))
    seen = vtprune.lens(model, batch, topk=4)
    assert seen.layers == tuple(range(tiny.LAYERS + 1))
    tokens = vtprune.encode(model, batch)
    placeholder = torch.isin(batch["input_ids"], torch.tensor(tiny.placeholders(model))).flatten()
    slots = placeholder.nonzero().squeeze(1)[tokens.source]
    out = model.model(**batch, output_hidden_states=True, use_cache=False)
    states = list(out.hidden_states)
    # The last of them has gone through the final norm, which the probe does not look through.
    kept: list[Tensor] = []
    last = model.model.language_model.layers[-1]
    handle = last.register_forward_hook(lambda _m, _a, o: kept.append(o[0] if isinstance(o, tuple) else o))
    model.model(**batch, use_cache=False)
    handle.remove()
    states[-1] = kept[0]
    table = model.get_input_embeddings().weight
    for layer, state in enumerate(states):
        rows = state.reshape(-1, state.shape[-1])[slots]
        values, ids = plain(rows, table, (tiny.PAD, *tiny.placeholders(model)), 4)
        assert np.abs(seen.cosines[layer] - values.numpy()).max() < 1e-5
        assert (seen.ids[layer] == ids.numpy()).mean() > 0.999  # near ties may swap
    assert torch.equal(torch.from_numpy(seen.coords), tokens.coords)
    assert [v.count for v in seen.views] == list(tokens.seqlens) and len(seen) == len(tokens.source)


@torch.no_grad()
def test_it_stops_early_looks_past_pruning_and_leaves_nothing_behind() -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 1)
    ran: list[int] = []
    model(**sample)  # transformers puts hooks of its own on at the first forward
    clean = hook_count(model)
    handles = [
        layer.register_forward_pre_hook(lambda _m, _a, i=i: ran.append(i))
        for i, layer in enumerate(model.model.language_model.layers)
    ]
    full = vtprune.lens(model, sample, layers=[3, 0], topk=2)
    assert full.layers == (0, 3) and ran == [0, 1, 2, 3]  # the fourth begins, and is stopped at its door
    for handle in handles:
        handle.remove()
    dense = model(**sample).logits
    with vtprune.apply(model, "norm", keep=0.3):
        assert np.array_equal(vtprune.lens(model, sample, layers=3, topk=2).ids[0], full.ids[1])
        assert model(**sample).logits.shape == dense.shape
    assert torch.equal(model(**sample).logits, dense)
    assert hook_count(model) == clean


def test_words_records_and_json(pocket: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from vtprune.models.pocket.data import render, scene

    model, processor = pocket
    inputs = build_inputs(model, processor, render(scene("val", 0)), "what ?")
    seen = vtprune.lens(model, inputs, layers=[0, 6], topk=3, processor=processor)
    assert seen.word(int(seen.ids[0, 0, 0])) in processor.tokenizer.get_vocab()
    assert 0 not in seen.ids and 4 not in seen.ids  # padding and the placeholder
    assert seen.checkpoint == "pocket-llava" and model.config._name_or_path not in seen.to_json()
    again = Lens.from_json(seen.to_json())
    for field in dataclasses.fields(Lens):
        mine, its = getattr(seen, field.name), getattr(again, field.name)
        if field.name == "classes":
            same = np.array_equal(mine.members, its.members) and mine.names == its.names
        else:
            same = np.allclose(mine, its, atol=1e-4) if isinstance(mine, np.ndarray) else mine == its
        assert same, field.name
    records = list(seen.records())
    assert len(records) == 2 * 576 * 3
    first = records[0]
    assert first["layer"] == first["rank"] == first["row"] == 0 and first["word"] == seen.word(first["id"])
    assert records[-1]["row"] == records[-1]["column"] == 23 and records[-1]["layer"] == 6

    made: list[Any] = []
    monkeypatch.setitem(
        sys.modules, "pandas", types.SimpleNamespace(DataFrame=lambda rows: made.append(rows) or "frame")
    )
    assert seen.to_pandas() == "frame" and made[0] == records
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(VTPruneError, match="pip install"):
        seen.to_pandas()
    with pytest.raises(ConfigError, match="not a lens"):
        Lens.from_json("{}")
    with pytest.raises(ConfigError, match="format 9"):
        Lens.from_json('{"format": 9}')


def test_what_is_refused(invented: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 1)
    clean = hook_count(model)
    for layers in (-1, tiny.LAYERS + 1, True, [0, 99]):
        with pytest.raises(InputError, match="is not there"):
            vtprune.lens(model, sample, layers=layers)
    with pytest.raises(InputError, match="empty"):
        vtprune.lens(model, sample, layers=[])
    with pytest.raises(InputError, match="topk=0"):
        vtprune.lens(model, sample, topk=0)
    with pytest.raises(InputError, match="no pictures"):
        vtprune.lens(model, tiny.prompt(model, 0))
    assert hook_count(model) == clean
    seen = vtprune.lens(model, sample, layers=[1], topk=2)
    assert seen.layers == (1,) and seen.classes is None
    with pytest.raises(ConfigError, match="no calibration"):
        seen.categories()
    monkeypatch.setattr(model.config, "_name_or_path", "/home/someone/models/mine/")
    away = vtprune.lens(model, sample, layers=[1], topk=2)
    assert away.checkpoint == "mine" and "mine" in away.why and "someone" not in away.to_json()
    found = vtprune.lens(
        model, sample, layers=[1], topk=2, calibration=invented
    )  # classes are told at layer 0 all the same
    assert found.layers == (1,) and np.array_equal(found.ids, seen.ids)
    nearest = vtprune.lens(model, sample, layers=0, topk=3).ids[0]
    for i, name in enumerate(found.categories().names):
        by_words = np.isin(nearest, invented.anchors[name]).any(1)
        assert np.array_equal(found.categories().members[:, i], by_words), name


def test_on_several_devices_rows_come_to_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of a large model is gigabytes; the rows of a prompt are not."""
    model = tiny.build("llava")
    table = model.get_input_embeddings().weight
    moved: list[int] = []
    plain = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        moved.append(self.shape[0] if self.ndim == 2 and self.shape == table.shape else 0)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", to)
    vtprune.lens(model, tiny.prompt(model, 1), topk=2)
    assert moved and not any(moved)


def test_ties_multiples_and_untrained_rows() -> None:
    table = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0.6, 0.8], [1, 0], [0, 0]])
    values, ids = lens_topk(torch.tensor([[10.0, 1], [3, 0], [-2, 0]]), table, 6)
    assert ids[0].tolist()[:3] == [0, 4, 3] and ids[1].tolist()[:2] == [0, 4] and ids[2, 0] == 2
    assert ids[:, 5].tolist() == [-1, -1, -1]  # the zero row was never trained
    assert torch.allclose(values[0, [0, 2]], torch.tensor([0.9950, 0.6766]), atol=1e-4)


def test_long_lists_do_not_go_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its list lies in registers, and its loops over the list are unrolled."""
    op = sys.modules[lens_topk.__module__]
    rows, table = torch.eye(4)[:2], torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    expected = lens_topk(rows, table, 65)
    monkeypatch.setattr(op, "resolve", lambda backend, _tensor: "triton" if backend != "torch" else "torch")
    asked: list[int] = []
    monkeypatch.setattr(op, "_topk_triton", lambda r, t, k, i: asked.append(k) or op.reference_topk(r, t, k, i))
    assert torch.equal(lens_topk(rows, table, 65)[1], expected[1]) and not asked
    assert torch.equal(lens_topk(rows, table, 64)[1], expected[1][:, :64]) and asked == [64]
    with pytest.raises(InputError, match="k=65"):
        lens_topk(rows, table, 65, backend="triton")


def test_memory_is_bounded_whatever_the_vocabulary() -> None:
    """1,296 tokens x 152,064 words x 3,584 dimensions in bf16 need less than 32 MiB, as tensors that have sizes but no
    numbers. The searches are counted on two small parts of the vocabulary, since their need does not grow with it."""

    def peak_of(size: int, search: bool) -> int:
        with FakeTensorMode():
            rows = torch.empty(1296, SLOW_WIDTH, dtype=torch.bfloat16)
            table = torch.empty(size, SLOW_WIDTH, dtype=torch.bfloat16)
            with PeakBytes() as peak:
                inverse = inverse_norms(table)
                if search:
                    lens_topk(rows, table, 10, inverse=inverse)
                    lens_rank(rows, table, torch.empty(3, dtype=torch.int64), inverse=inverse)
            return peak.bytes

    norms, small, twice = peak_of(152_064, False), peak_of(600, True), peak_of(1200, True)
    assert 152_064 * 4 <= norms < 8 << 20
    assert twice - small <= 16 * 600  # norms, and nothing else
    assert 1 << 20 < twice + norms < 32 << 20, f"{(twice + norms) / 2**20:.1f} MiB"


@pytest.mark.gpu
def test_memory_on_a_gpu() -> None:
    """The same sizes with real numbers."""
    generator = torch.Generator("cuda").manual_seed(0)
    rows, table = (
        torch.randn(n, SLOW_WIDTH, device="cuda", generator=generator, dtype=torch.bfloat16) for n in (1296, 152_064)
    )
    anchors = torch.tensor([5, 100_000, 152_063], device="cuda")
    lens_topk(rows[:8], table[:512], 10)  # whatever is set up once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    inverse = inverse_norms(table)
    values, ids = lens_topk(rows, table, 10, inverse=inverse)
    rank = lens_rank(rows, table, anchors, inverse=inverse)
    used = torch.cuda.max_memory_allocated() - before
    assert used < 32 << 20, f"{used / 2**20:.1f} MiB"
    sound = (
        torch.nn.functional.normalize(rows[:64].float(), dim=1) @ torch.nn.functional.normalize(table.float(), dim=1).T
    )
    assert torch.allclose(values[:64], sound.topk(10, dim=1).values, atol=1e-3)
    among = (ids[:64, None] == anchors[:, None]).any(2)
    assert torch.equal(among, rank[:64] < 10)
