# SPDX-License-Identifier: Apache-2.0
"""``tower_keep``: a vision tower that drops patches half-way, against a loop over its blocks written by hand."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conformance.helpers import FP32, assert_close, generate, hooks, later_hook, same, spy
from torch import Tensor, nn

import vtprune
from engine.test_graph import anywhere  # noqa: F401  # a fixture
from vtprune import bench
from vtprune.engine.attach import engine_of
from vtprune.engine.early import Left, choose, minus_cosine_to_mean
from vtprune.errors import ConfigError, UnsupportedModelError
from vtprune.eval.runner import encode_once
from vtprune.models import find_family
from vtprune.tokens import CLS_LOGITS, CLS_ROW, PRE_PROJECTOR

FAMILIES = ("llava", "llava_next")
METHODS = [name for name in vtprune.methods() if not name.startswith("test-")]
SHARE, BLOCK = 0.5, 0
CLOSE = 1e-5


def build(family: str, siglip: bool = False) -> nn.Module:
    """Of the three blocks of the tower all are read, so that two lie behind the first."""
    if siglip:
        return without_cls()
    model = tiny.build(family)
    model.config.vision_feature_layer = -1
    return model


def without_cls() -> nn.Module:
    import transformers

    config = tiny._config("llava", tiny.LAYERS)
    vision = {k: getattr(config.vision_config, k) for k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config.vision_config = transformers.SiglipVisionConfig(
        **vision, num_attention_heads=4, image_size=tiny.CROP, patch_size=14, vision_use_head=False
    )
    config.vision_feature_select_strategy, config.vision_feature_layer = "full", -1
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(4 if "vision_tower" in name and p.ndim > 1 else 1)
    return model


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    model = build(request.param)
    yield model
    vtprune.remove(model)


def batch_of(model: nn.Module) -> tiny.Inputs:
    return tiny.collate(tiny.mixed(model))


# -- by hand ----------------------------------------------------------------------------------------------------------


def attention_row(block: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What row 0 attends to, from whole attention maps, mean over heads: after, and before the softmax."""
    attention, heads = block.self_attn, block.self_attn.num_heads
    rows = block.layer_norm1(rows)
    query, key = (
        f(rows).view(*rows.shape[:2], heads, -1).transpose(1, 2) for f in (attention.q_proj, attention.k_proj)
    )
    logits = query @ key.transpose(-1, -2) * attention.scale
    return logits.softmax(-1)[:, :, 0].mean(1), logits[:, :, 0].mean(1)


@torch.no_grad()
def by_hand(model: nn.Module, inputs: tiny.Inputs, block: int = BLOCK, share: float = SHARE) -> dict[str, Any]:
    """Projected rows ``[raw, D]``, which are left ``[raw]``, and what the last block's CLS row attends to."""
    family, pixels = find_family(model), inputs["pixel_values"]
    layouts = family.layouts("image", inputs)
    if pixels.ndim == 5:
        counts = [len(layout.seg_lens) for layout in layouts]
        pixels = torch.cat([views[:n] for views, n in zip(pixels, counts, strict=True)])
    tower = family.tower
    prefix = int(family.has_cls)
    rows = tower.embeddings(pixels)
    rows = tower.pre_layrnorm(rows) if prefix else rows
    patches = rows.shape[1] - prefix
    count = max(1, int(np.floor(patches * share + 1e-6)))
    cut = np.ones(sum(layout.raw_length for layout in layouts), bool)
    first = 0
    for layout in layouts:
        cut[first + layout.raw] = False
        first += layout.raw_length
    picks = None
    for i, layer in enumerate(tower.encoder.layers):
        before = rows
        rows = layer(rows, *[None] * (len(inspect.signature(layer.forward).parameters) - 2))  # (4.57: two masks)
        rows = rows[0] if isinstance(rows, tuple) else rows
        if i == block:
            if prefix:
                scores = attention_row(layer, before)[0][:, prefix:]
            else:
                mean = rows.double().mean(1, keepdim=True).expand_as(rows)
                scores = -torch.cosine_similarity(rows.double(), mean, dim=-1).float()
            scores, padding = scores.numpy(), cut.reshape(-1, patches)
            picks = [
                sorted(sorted(range(patches), key=lambda p: (padding[v, p], -scores[v, p], p))[:count])
                for v in range(len(rows))
            ]
            rows = torch.stack([rows[v, [*range(prefix), *(prefix + p for p in own)]] for v, own in enumerate(picks)])
    assert picks is not None
    left = np.zeros((len(rows), patches), bool)
    for view, own in enumerate(picks):
        left[view, own] = True
    full = torch.zeros(len(rows), patches, rows.shape[-1])
    full[torch.from_numpy(left)] = rows[:, prefix:].flatten(0, 1)
    cls = torch.zeros(2, *left.shape)
    if prefix:  # of the last block but one, where that lies behind the drop
        for kind, values in zip(cls, attention_row(tower.encoder.layers[-1], before), strict=True):
            kind[torch.from_numpy(left)] = values[:, prefix:].flatten()
    left = left.reshape(-1) & ~cut
    return {
        "projected": model.model.multi_modal_projector(full).flatten(0, 1),
        "raw": full.flatten(0, 1),
        "left": left,
        "last_cls": cls[1].flatten(),
        "layouts": layouts,
    }


def in_order(hand: dict[str, Any]) -> np.ndarray:
    """Raw rows of the visual tokens of all pictures, in the order of the tokens."""
    starts = np.cumsum([0, *(layout.raw_length for layout in hand["layouts"])])
    return np.concatenate([start + layout.raw for start, layout in zip(starts, hand["layouts"], strict=False)])


@pytest.mark.parametrize(("family", "siglip"), [("llava", False), ("llava_next", False), ("llava", True)])
@pytest.mark.parametrize("block", [0, 1])
@torch.no_grad()
def test_it_is_the_loop_written_by_hand(family: str, siglip: bool, block: int) -> None:
    model = build(family, siglip)
    inputs = batch_of(model)
    hand = by_hand(model, inputs, block)
    raw = in_order(hand)
    expected = raw[hand["left"][raw]]
    for method in ("zoo", "norm"):  # the first needs rows before the projector
        with vtprune.apply(model, method, keep=0.3, tower_keep=SHARE, tower_layer=block), spy(method) as records:
            model(**inputs)
        tokens = records[0].tokens
        assert_close(tokens.features, hand["projected"][expected], CLOSE)
        assert not any(isinstance(probe, Left) for probe in tokens.probes)
        if method == "zoo":
            assert_close(tokens.probes[PRE_PROJECTOR], hand["raw"][expected], CLOSE)
        assert tokens.image_lens == tuple(
            int(hand["left"][start : start + layout.raw_length].sum())
            for start, layout in zip(
                np.cumsum([0, *(layout.raw_length for layout in hand["layouts"])]), hand["layouts"], strict=False
            )
        )


@torch.no_grad()
def test_cls_rows_behind_the_drop_are_those_of_the_rows_that_are_left(model: nn.Module) -> None:
    inputs = batch_of(model)
    hand = by_hand(model, inputs)
    raw = in_order(hand)
    with vtprune.apply(model, "norm", keep=0.3, tower_keep=SHARE, tower_layer=BLOCK), spy("norm") as records:
        engine = engine_of(find_family(model))
        assert engine is not None and engine.job is not None
        last = dataclasses.replace(CLS_LOGITS, layer=-1)
        engine.job.probes |= {last, CLS_ROW, dataclasses.replace(CLS_ROW, layer=0)}
        engine.tap.hook(engine.job.probes)
        model(**inputs)
    tokens = records[0].tokens
    assert_close(tokens.probes[last], hand["last_cls"][raw[hand["left"][raw]]], CLOSE)
    assert all(len(value) == len(tokens.source) for value in tokens.probes.values())


def test_ties_and_broken_scores() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, torch.nan, 2.0, torch.inf], [0.0, 0.0, 0.0, 0.0, -1.0, -torch.inf]])
    index, left = choose(scores, 3, None)
    assert index.tolist() == [[1, 2, 4], [0, 1, 2]] and left.sum(1).tolist() == [3, 3]
    assert choose(scores, 5, None)[0].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    cut = torch.tensor([False, True, False, False, False, False, True, True, True, True, False, False])
    assert choose(scores, 3, cut)[0].tolist() == [[0, 2, 4], [0, 4, 5]]
    assert choose(scores, 5, cut)[0].tolist() == [[0, 2, 3, 4, 5], [0, 1, 2, 4, 5]]
    rows = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [torch.nan, 0.0], [0.0, 1.0]]])
    found = minus_cosine_to_mean(rows)[0]
    assert found[2].isnan() and int(found.nan_to_num(-9).argmax()) == 3


# -- whoever chooses --------------------------------------------------------------------------------------------------


def kept_and_left(model: nn.Module, inputs: tiny.Inputs, method: str, **settings: Any) -> tuple[Any, np.ndarray]:
    with vtprune.apply(model, method, **settings) as handle:
        model(**inputs)
        report = handle.report()
    return report, np.concatenate([s.kept for m in report.images for s in m.segments])


@torch.no_grad()
def test_no_method_keeps_what_the_tower_dropped(model: nn.Module) -> None:
    inputs = batch_of(model)
    drop: dict[str, Any] = {"tower_keep": SHARE, "tower_layer": BLOCK}
    everything, left = kept_and_left(model, inputs, "norm", keep=1.0, **drop)
    assert everything.tower_left == left.sum() == everything.tokens_out < everything.tokens_in
    assert everything.stages == ("vision tower block 0",)
    for method in METHODS:
        for keep in (1.0, 0.25, 9):
            try:
                report, kept = kept_and_left(model, inputs, method, keep=keep, allocation="equal", **drop)
            except (UnsupportedModelError, ConfigError):
                with pytest.raises((UnsupportedModelError, ConfigError)):  # without the drop too
                    vtprune.apply(model, method, keep=keep)
                continue
            assert not (kept & ~left).any(), (method, keep)
            assert report.tower_left == left.sum() and report.tokens_in == len(left)
            cls = vtprune.methods()[method]
            if not cls.adaptive and all(stage.layer is None for stage in cls().stages()):
                for one, whole in zip(report.images, everything.images, strict=True):
                    wanted = vtprune.Budget(keep).image_count(one.tokens_in)
                    assert one.tokens_out == min(wanted, whole.tokens_out), (method, keep)
            if keep == 1.0:
                assert (kept == left).all(), method


@torch.no_grad()
def test_dropped_rows_never_reach_the_language_model(model: nn.Module) -> None:
    """The projector makes the same row of every slot that was filled with zeros: it must not be found anywhere."""
    inputs = batch_of(model)
    nothing = model.model.multi_modal_projector(torch.zeros(1, 1, 32))[0, 0]
    for method, keep in (("norm", 1.0), ("random", 0.9), ("fastv", 0.5), ("pool", 1.0), (["norm", "grid"], 0.3)):
        seen: list[Tensor] = []
        with (
            vtprune.apply(model, method, keep=keep, tower_keep=SHARE, tower_layer=BLOCK) as handle,
            later_hook(model.model.language_model, lambda kw, seen=seen: seen.append(kw["inputs_embeds"])),
        ):
            model(**inputs)
            report = handle.report()
        assert not (seen[0] == nothing).all(-1).any(), method
        if method != "fastv":
            text = int(inputs["attention_mask"].sum()) - report.tokens_in
            assert seen[0].shape[1] <= text + report.tokens_out


@torch.no_grad()
def test_counts_are_those_of_the_whole_picture(model: nn.Module) -> None:
    inputs = batch_of(model)
    for keep, share in ((0.25, 0.5), (0.25, 0.3), (1 / 9, 0.75)):
        report, _ = kept_and_left(model, inputs, "norm", keep=keep, tower_keep=share, tower_layer=0)
        grids = [[(s.kept.size, int(np.prod(s.grid))) for s in m.segments] for m in report.images]
        left = [sum(min(n, vtprune.Budget(share).image_count(p)) for n, p in views) for views in grids]
        assert report.tower_left == sum(left)
        wanted = [vtprune.Budget(keep).image_count(m.tokens_in) for m in report.images]
        assert [m.tokens_out for m in report.images] == [min(a, b) for a, b in zip(wanted, left, strict=True)]
    report, _ = kept_and_left(model, inputs, "norm", keep=0.9, tower_keep=0.25, tower_layer=0)
    assert any("asks for more" in note for note in report.notes) and f"{report.tower_left} of" in str(report)


# -- the same otherwise -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_off_is_bit_equal_and_removal_leaves_nothing(model: nn.Module) -> None:
    inputs = batch_of(model)
    dense = model(**inputs).logits  # transformers hooks itself in at its first forward
    before = hooks(model)
    with vtprune.apply(model, "idpruner", keep=0.4):
        pruned, on = model(**inputs).logits, hooks(model)
    with vtprune.apply(model, "idpruner", keep=0.4, tower_keep=1.0, tower_layer=0):
        assert same(model(**inputs).logits, pruned) and {k: v[-2:] for k, v in hooks(model).items()} == {
            k: v[-2:] for k, v in on.items()
        }
    with vtprune.apply(model, "idpruner", keep=0.4, tower_keep=SHARE, tower_layer=0):
        assert not same(model(**inputs).logits, pruned)
        with vtprune.using(model, "idpruner", keep=0.4):
            assert same(model(**inputs).logits, pruned)
        with vtprune.using(model, None):
            assert same(model(**inputs).logits, dense)
    assert same(model(**inputs).logits, dense) and hooks(model) == before
    with vtprune.using(model, "idpruner", keep=0.4, tower_keep=SHARE, tower_layer=0):
        assert not same(model(**inputs).logits, pruned)
    assert same(model(**inputs).logits, dense) and hooks(model) == before


@pytest.mark.parametrize("method", ["idpruner", "fastv"])
@torch.no_grad()
def test_alone_in_a_batch_and_written_on(model: nn.Module, method: str) -> None:
    samples = tiny.mixed(model)
    batch = tiny.collate(samples)
    with vtprune.apply(model, method, keep=0.3, tower_keep=SHARE, tower_layer=BLOCK):
        tokens, logits = generate(model, batch)
        for b, sample in enumerate(samples):
            if "pixel_values" not in sample:
                continue
            own, own_logits = generate(model, sample)
            assert own[0].tolist() == tokens[b].tolist()
            assert_close(own_logits[0], logits[b], FP32)
            again, again_logits = generate(model, sample, use_cache=False) if method != "fastv" else (own, own_logits)
            assert again[0].tolist() == own[0].tolist()
            assert_close(again_logits, own_logits, FP32)


@torch.no_grad()
def test_encoding_once(model: nn.Module) -> None:
    """What was encoded for one setting does not serve another."""
    inputs = tiny.prompt(model, 2)
    plans: list[dict[str, Any]] = [{}, {"tower_keep": 0.5}, {"tower_keep": 0.25}, {"tower_keep": 0.5}, {}]

    def answer(plan: dict[str, Any]) -> Tensor:
        with vtprune.using(model, "norm", keep=0.2, **plan):
            return model(**inputs).logits

    expected = [answer(plan) for plan in plans]
    with encode_once(model):
        whole = vtprune.encode(model, inputs)
        for plan, logits in zip(plans, expected, strict=True):
            assert same(answer(plan), logits), plan
    with vtprune.apply(model, "norm", keep=0.2, tower_keep=0.5):
        assert torch.equal(vtprune.encode(model, inputs).features, whole.features)  # of the whole tower
        model(**inputs)


@torch.no_grad()
def test_in_a_graph(anywhere: Any, model: nn.Module) -> None:  # noqa: F811
    """The captured tower drops the same patches; pictures of other sizes, and so other padding, share a capture."""
    prompts = [tiny.prompt(model, 2, seed) for seed in range(2)]
    prompts += [tiny.sample(model, [3, tiny.Image(60, 100), tiny.Image(110, 40), 5], 3)]
    expected, found = [], []
    for where, how in ((expected, None), (found, "graph")):
        with vtprune.apply(model, "idpruner", keep=0.3, tower_keep=SHARE, tower_layer=BLOCK, compile=how) as handle:
            for inputs in prompts:
                where.append((model(**inputs).logits, generate(model, inputs)[1]))
            if how:
                said = handle.report().compiled["vision tower"]
                vtprune.apply(model, "idpruner", keep=0.3, compile=how)
                model(**prompts[0])  # in transformers 5.0 no tower is captured
                assert said[:5] == vtprune.report(model).compiled["vision tower"][:5]
    for one, other in zip(expected, found, strict=True):
        for a, b in zip(one, other, strict=True):
            assert_close(a, b, FP32)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pocket-llava", "pocket-llava-next"])
@torch.no_grad()
def test_in_a_captured_tower(name: str) -> None:
    """On a GPU: the same patches and logits as eager, whatever the size of the pictures, and so their padding."""
    model, _ = vtprune.load(name, device="cuda", dtype=torch.float32)
    sizes = [None] if name == "pocket-llava" else [(500, 672), (672, 500), (672, 672)]
    prompts = [bench.make_inputs(model, 1, size, 160) for size in (*sizes, *sizes)]
    expected, found = [], []
    for where, how in ((expected, None), (found, "graph")):
        with vtprune.apply(model, "norm", keep=1 / 9, tower_keep=0.5, compile=how) as handle:
            for inputs in prompts:
                logits = model(**inputs).logits
                report = handle.report()
                where.append((logits, report.tower_left, [s.kept for m in report.images for s in m.segments]))
                assert how is None or report.compiled["vision tower"].startswith("graph"), report.compiled
    for (logits, left, kept), (logits_2, left_2, kept_2) in zip(expected, found, strict=True):
        assert left == left_2 and all(map(np.array_equal, kept, kept_2))
        assert float((logits - logits_2).abs().max()) <= 2e-3 * float(logits.abs().max())


def test_gradients_reach_the_tower(model: nn.Module) -> None:
    inputs = tiny.prompt(model, 1)
    with vtprune.apply(model, "norm", keep=0.5, tower_keep=SHARE, tower_layer=BLOCK):
        model(**inputs).logits.square().mean().backward()
        blocks = find_family(model).tower.encoder.layers
        assert all(float(block.mlp.fc1.weight.grad.abs().sum()) > 0 for block in blocks)
        model.model.vision_tower.gradient_checkpointing_enable()
        with pytest.raises(UnsupportedModelError, match="gradient checkpointing"):
            model.train()(**inputs)


# -- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.0, 1.5, -0.5, True, "0.5", None, float("nan")])
def test_a_share_is_a_share(share: Any) -> None:
    with pytest.raises(ConfigError, match=r"tower_keep=.* is no share"):
        vtprune.PruneConfig("norm", tower_keep=share)


@pytest.mark.parametrize("layer", [-1, 1.5, True, "3", [1]])
def test_a_block_is_a_number(layer: Any) -> None:
    with pytest.raises(ConfigError, match="names no block"):
        vtprune.PruneConfig("norm", tower_keep=0.5, tower_layer=layer)


@pytest.mark.parametrize("family", [f for f in (*tiny.FAMILIES, *tiny.MORE) if f not in FAMILIES])
def test_other_families_refuse(family: str) -> None:
    model = tiny.build(family, layers=2)
    before = hooks(model)
    with pytest.raises(UnsupportedModelError, match="one token of each patch"):
        vtprune.apply(model, "norm", keep=0.5, tower_keep=0.5)
    assert hooks(model) == before


def test_a_block_must_exist_and_be_worth_it(model: nn.Module) -> None:
    before = hooks(model)
    for layer in (2, 3, 99):
        with pytest.raises(ConfigError, match=r"0 to 2 .* choose a block in 0\.\.1"):
            vtprune.apply(model, "norm", keep=0.5, tower_keep=0.5, tower_layer=layer)
    model.config.vision_feature_layer = -2  # the last block is not read
    with pytest.raises(ConfigError, match=r"choose a block in 0\.\.0"):
        vtprune.apply(model, "norm", keep=0.5, tower_keep=0.5, tower_layer=1)
    assert hooks(model) == before
    tokens = vtprune.encode(model, tiny.prompt(model, 1))
    with pytest.raises(ConfigError, match="use apply"):
        vtprune.select(tokens, "norm", keep=0.5, tower_keep=0.5)
    with pytest.raises(ConfigError, match="and also tower_keep"):
        vtprune.apply(model, vtprune.PruneConfig("norm"), tower_keep=0.5)
