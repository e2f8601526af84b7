# SPDX-License-Identifier: Apache-2.0
"""What a pruner may ask for is what it says it is, row for row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch
from conformance.helpers import FP32, assert_close, first_call, hooks, most_images_for_beams, spy, twin
from conformance.test_anyres import by_hand
from conformance.test_controls import window_order
from helpers import Declared
from torch import Tensor, nn

import vtprune
from vtprune import registry
from vtprune.engine import fetched
from vtprune.errors import UnsupportedModelError
from vtprune.models import find_family
from vtprune.models.base import cls_row
from vtprune.tokens import CLS_LOGITS, CLS_ROW, PRE_PROJECTOR, Probe, VisualTokens

CLIP = ("llava", "llava_next")


@dataclass
class Nosy(Declared):
    """Test-only: asks for whatever it is told to ask for."""

    needed: list = field(default_factory=list)
    wanted: list = field(default_factory=list)

    @property
    def needs(self) -> frozenset[Probe]:
        return frozenset(self.needed)

    @property
    def wants(self) -> frozenset[Probe]:
        return frozenset(self.wanted)

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.features.detach().float().norm(dim=-1)


@pytest.fixture(autouse=True)
def _nosy() -> Iterator[None]:
    registry.register("test-nosy")(Nosy)
    yield
    registry._METHODS.pop("test-nosy", None)


def attention_maps(family: str, pixel_values: Tensor) -> list[Tensor]:
    """Per encoder layer ``[views, heads, 1 + P, 1 + P]``, from transformers itself in eager mode."""
    model = tiny.build(family, "eager")
    views = pixel_values.flatten(0, 1) if pixel_values.ndim == 5 else pixel_values
    with torch.no_grad():
        return list(model.model.vision_tower(views, output_attentions=True).attentions)


def raw_index(model: nn.Module, inputs: tiny.Inputs) -> Tensor:
    """Row of every visual token among all rows of all views, ``pixel_values`` flattened, by hand."""
    if tiny.family_of(model) == "llava":
        return torch.arange(16 * len(inputs["pixel_values"]))
    most = inputs["pixel_values"].shape[1]
    rows = []
    for i, size in enumerate(inputs["image_sizes"].tolist()):
        rows += [(i * most + crop) * 16 + row * 4 + col for crop, row, col in by_hand(*size).visual]
    return torch.tensor(rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [-2, -1, 0])
@pytest.mark.parametrize("family", CLIP)
@torch.no_grad()
def test_cls_row_is_the_attention_of_the_cls_token(family: str, layer: int, attention: str) -> None:
    model = tiny.build(family, attention)
    batch = tiny.collate(tiny.mixed(model), "right")
    probe = Probe("cls_row", layer)
    with vtprune.apply(model, "test-nosy", keep=0.5, needed=[probe]), spy("test-nosy") as records:
        model(**batch)
    got = first_call(records)[None].tokens.probes[probe]
    maps = attention_maps(family, batch["pixel_values"])[layer]
    want = maps.mean(1)[:, 0, 1:].flatten()[raw_index(model, batch)]
    assert got.dtype == torch.float32 and got.shape == want.shape
    assert_close(got, want, 1e-6)
    assert float(want.std()) > 1e-4, "the row is flat, so this proves nothing"


@pytest.mark.parametrize("family", CLIP)
@torch.no_grad()
def test_cls_row_before_the_softmax(family: str) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 2)
    probe = Probe("cls_row", -2, softmax=False)
    with vtprune.apply(model, "test-nosy", keep=0.5, needed=[probe, CLS_ROW]), spy("test-nosy") as records:
        model(**sample)
    got = first_call(records)[None].tokens.probes[probe]
    # Up to one constant per view and head, the logarithm of the attention is the row before the softmax.
    logs = attention_maps(family, sample["pixel_values"])[-2].log().mean(1)[:, 0, 1:].flatten()
    index = raw_index(model, sample)
    difference = got - logs[index]
    for view in (index // 16).unique():
        mine = difference[index // 16 == view]
        assert_close(mine, mine[:1].expand_as(mine), 1e-5, f"view {int(view)}")
    assert not torch.equal(got, first_call(records)[None].tokens.probes[CLS_ROW])


class Adapter(nn.Module):
    """What adapters do: they stand in the place of a layer, call it, and add to what it puts out."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 0.3 * x


@pytest.mark.parametrize("family", CLIP)
@pytest.mark.parametrize("when", ["before", "after", "never"])
@torch.no_grad()
def test_a_cls_row_is_made_of_what_the_towers_projections_put_out(family: str, when: str) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 2)
    attention = find_family(model).tower.encoder.layers[-2].self_attn
    own, ran, given = attention.q_proj, [], []
    counter = own.register_forward_hook(lambda *_: ran.append(1))
    if when == "before":
        attention.q_proj = Adapter(own)
    with vtprune.apply(model, "test-nosy", keep=0.5, needed=[CLS_LOGITS]), spy("test-nosy") as records:
        if when == "after":
            attention.q_proj = Adapter(own)

        def see(module: nn.Module, args: Any, kwargs: Any) -> None:
            given.append(kwargs.get("hidden_states", *args))

        seer = attention.register_forward_pre_hook(see, with_kwargs=True)
        model(**sample)
    counter.remove()
    seer.remove()
    assert len(ran) == 1 + (when == "after")  # nothing is computed twice, but where something else stands there now
    got = first_call(records)[None].tokens.probes[CLS_LOGITS]
    want = cls_row(attention, given[0], softmax=False).flatten()[raw_index(model, sample)]
    assert_close(got, want, 1e-5)
    left = [hook for part in attention.modules() for hook in (part._forward_hooks | part._forward_pre_hooks).values()]
    assert all(str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in left), left


@pytest.mark.parametrize("what", ["attention", "its forward", "a hook", "nothing"])
@torch.no_grad()
def test_a_cls_row_is_of_its_own_picture_whatever_was_done_to_the_attention(what: str) -> None:
    model = tiny.build("llava")
    layer = find_family(model).tower.encoder.layers[-2]
    attention, given = layer.self_attn, []
    samples = [tiny.prompt(model, n, seed) for n, seed in ((1, 0), (2, 1), (1, 2), (1, 3))]
    with vtprune.apply(model, "test-nosy", keep=0.5, needed=[CLS_LOGITS]), spy("test-nosy") as records:
        if what == "attention":
            attention.compile(backend="eager")
        elif what == "its forward":
            attention.forward = torch.compile(attention.forward, backend="eager")
        elif what == "a hook":
            attention.q_proj.register_forward_hook(lambda module, args, out: out * 3 + 1)
        layer.layer_norm1.register_forward_hook(lambda module, args, out: given.append(out))
        for sample in samples:
            attention.k_proj(torch.ones(1, 17, attention.k_proj.in_features))  # what others ask of it does not count
            model(**sample)
    for sample, hidden, record in zip(samples, given, records, strict=True):
        want = cls_row(attention, hidden, softmax=False).flatten()[raw_index(model, sample)]
        assert_close(record.tokens.probes[CLS_LOGITS], want, 1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_projecting_the_captured_rows_gives_the_features(family: str) -> None:
    """For Qwen2.5-VL only if the window order was undone."""
    model = tiny.build(family)
    samples = tiny.mixed(model)
    if family in tiny.QWEN:
        samples.append(tiny.sample(model, [1, tiny.Video(2, 8, 12), 1, tiny.Image(8, 4), 2], 4))
    tokens = vtprune.encode(model, tiny.collate(samples))
    rows = tokens.probes[PRE_PROJECTOR]
    assert rows.ndim == 2 and rows.shape[0] == len(tokens.source) * (4 if family in tiny.QWEN else 1)
    assert tokens.projector is not None
    assert_close(tokens.projector(rows).reshape(tokens.features.shape), tokens.features, FP32)


@torch.no_grad()
def test_captured_rows_in_window_order_would_be_noticed() -> None:
    model = tiny.build("qwen2_5_vl")
    sample = tiny.prompt(model, 2)
    tokens = vtprune.encode(model, sample)
    order = window_order(twin("qwen2_5_vl"), sample)
    rows = tokens.probes[PRE_PROJECTOR].view(len(order), -1)[order].view(len(order) * 4, -1)
    assert tokens.projector is not None
    assert float((tokens.projector(rows) - tokens.features).abs().max()) > 0.1


@pytest.mark.parametrize("family", CLIP)
@torch.no_grad()
def test_every_beam_gets_the_probes_of_its_own_pictures(family: str) -> None:
    """generate() repeats what was encoded once; the rows must be repeated with it."""
    model = tiny.build(family)
    samples = [tiny.prompt(model, 1, 1), tiny.prompt(model, most_images_for_beams(family), 2)]
    batch = tiny.collate(samples)
    with vtprune.apply(model, "idpruner", importance="cls", keep=0.4), spy("idpruner") as records:
        model.generate(**batch, max_new_tokens=2, num_beams=3, do_sample=False)
    tokens = first_call(records)[None].tokens
    alone = [vtprune.encode(model, s).probes[CLS_ROW] for s in samples]
    assert_close(tokens.probes[CLS_ROW], torch.cat([alone[0]] * 3 + [alone[1]] * 3), 1e-6)


@torch.no_grad()
def test_importance_from_cls_uses_a_cls_probe_and_says_so() -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 1)
    for importance in ("cls", "cls_logits", "auto", "norm"):
        with vtprune.apply(model, "idpruner", importance=importance, keep=5) as handle, spy("idpruner") as records:
            model(**sample)
            said = handle.report().info["importance"]
        assert said == importance or (importance == "auto" and said.startswith("cls"))
        probes = {probe.name for probe in first_call(records)[None].tokens.probes}
        assert probes == (set() if importance == "norm" else {"cls_row"})
    for family in tiny.QWEN:
        model = tiny.build(family)
        with vtprune.apply(model, "idpruner", importance="auto", keep=5) as handle:
            model(**tiny.prompt(model, 1))
            assert handle.report().info["importance"] not in ("cls", "auto", "")


@torch.no_grad()
def test_nothing_is_captured_unasked() -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 1)
    model(**sample)
    clean = hooks(model)
    with vtprune.apply(model, "norm", keep=5), spy("norm") as records:
        eyes = {name: hooks(model)[name] for name in clean if "vision_tower" in name or "projector" in name}
        assert eyes == {name: clean[name] for name in eyes}, "a method without needs hooked the encoder"
        model(**sample)
    assert first_call(records)[None].tokens.probes == {}
    with vtprune.apply(model, "test-nosy", keep=5, needed=[CLS_ROW, PRE_PROJECTOR]):
        model(**sample)
    assert hooks(model) == clean


def test_a_probe_that_the_family_lacks_is_refused_if_needed_and_absent_if_wanted() -> None:
    for family in tiny.QWEN:
        model = tiny.build(family)
        clean = hooks(model)
        with pytest.raises(UnsupportedModelError, match="cls_row"):
            vtprune.apply(model, "test-nosy", needed=[CLS_ROW])
        assert hooks(model) == clean
        vtprune.apply(model, "test-nosy", keep=3, wanted=[CLS_ROW, PRE_PROJECTOR])
        with spy("test-nosy") as records, torch.no_grad():
            model(**tiny.prompt(model, 1))
        assert set(first_call(records)[None].tokens.probes) == {PRE_PROJECTOR}
    model = tiny.build("llava")
    for probe in (Probe("no_such_thing"), Probe("cls_row", 17)):
        with pytest.raises(UnsupportedModelError, match=probe.name):
            vtprune.apply(model, "test-nosy", needed=[probe])


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_probes_do_not_hold_on_to_a_graph(family: str) -> None:
    model = tiny.build(family)
    sample: dict[str, Any] = tiny.prompt(model, 1)
    vtprune.apply(model, "test-nosy", keep=3, wanted=[CLS_ROW, PRE_PROJECTOR])
    with torch.enable_grad(), spy("test-nosy") as records:
        model(**sample)
    tokens = first_call(records)[None].tokens
    assert not tokens.features.requires_grad and not any(p.requires_grad for p in tokens.probes.values())


def test_ids_and_mask_come_apart_again() -> None:
    """They travel to the host as one sum; ids may be negative, and a mask may hold any number."""
    ids = torch.tensor([[0, -200, 32000, 1], [151_655, -1, 2**31, 7]])
    mask = torch.tensor([[0, 1, 0, 1], [1, 0, 2, 1]])
    apart = fetched.taken_apart(torch.add(ids, mask, alpha=1 << fetched._SHIFT).numpy())
    assert (apart[0] == ids.numpy()).all() and (apart[1] == mask.numpy()).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_prompt_on_the_host_is_the_prompt_on_the_device(dtype: torch.dtype) -> None:
    ids = torch.randint(-5, 200_000, (3, 50))
    mask = (torch.rand(3, 50) < 0.7).to(dtype)
    slots = torch.arange(50).expand(3, -1)
    given = [slots.cuda(), slots.cuda() + 1, slots[:1].cuda()]
    both = [fetched.fetch(ids.cuda() + i, mask.cuda(), given[i]) for i in range(2)]  # two at once share no memory
    for i, prompt in enumerate([*both, fetched.fetch(ids.cuda() + 2, mask.cuda(), given[2])]):
        assert prompt is not None and prompt.valid is not None and not prompt.all_valid
        assert (prompt.ids == ids.numpy() + i).all() and (prompt.valid == mask.bool().numpy()).all()
        assert prompt.positions_are_slots == (i != 1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_positions_of_any_dtype(dtype: torch.dtype) -> None:
    model = tiny.build("llava")
    inputs = tiny.prompt(model, 1)
    slots = torch.arange(inputs["input_ids"].shape[1])[None]
    with vtprune.apply(model, "norm", keep=0.4):
        expected = model(**inputs, position_ids=slots).logits
        assert_close(model(**inputs, position_ids=slots.to(dtype)).logits, expected, FP32)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    model = tiny.build("llava")
    batch = tiny.collate(tiny.mixed(model))
    with vtprune.apply(model, "norm", keep=0.4):
        expected = model(**batch).logits
        assert torch.equal(model(**batch | {"attention_mask": batch["attention_mask"].to(dtype)}).logits, expected)


@torch.no_grad()
def test_a_mask_that_is_written_to_spoils_no_later_prompt() -> None:
    model = tiny.build("llava")
    inputs = tiny.prompt(model, 1)
    inputs["use_cache"] = False  # else no mask is passed where it would hide nothing
    with vtprune.apply(model, "norm", keep=0.4):
        expected = model(**inputs).logits

        def write(module: nn.Module, args: Any, kwargs: Any) -> None:
            kwargs["attention_mask"][:, :2] = 0

        with_hook = tiny.decoder(model).register_forward_pre_hook(write, with_kwargs=True)
        assert not torch.equal(model(**inputs).logits, expected)
        with_hook.remove()
        assert torch.equal(model(**inputs).logits, expected)
