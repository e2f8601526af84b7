# SPDX-License-Identifier: Apache-2.0
"""Pruned vision transformers against the same pass written out by hand, and what must stay as it was."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import timm
import torch
from conformance.helpers import hooks
from torch import Tensor, nn

import vtprune
from vtprune.errors import ConfigError, InputError, UnsupportedModelError, VTPruneError, VTPruneWarning
from vtprune.tokens import CLS_LOGITS, CLS_ROW

from . import tiny_vits
from .tiny_vits import ALL, CLIP, DEPTH, SIDE, TIMM, build, by_hand, first

PATCHES = (SIDE // 8) ** 2
LAYER = DEPTH // 3 - 1
METHODS = ("random", "grid", "norm", "divprune", "idpruner", "visionzip", "hiprune", "dart", "scope", "pool", "tome")


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def pictures(count: int = 3, side: int = SIDE) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def kept(handle: vtprune.Handle) -> Tensor:
    """Patches that the report says were kept, ``[B, K]``."""
    images = handle.report().images
    return torch.stack([torch.from_numpy(image.segments[0].kept).nonzero()[:, 0] for image in images])


def same_everywhere(one: Any, other: Any) -> bool:
    flat = [x if isinstance(x, tuple) else (x,) for x in (one, other)]
    return all(torch.equal(a, b) for a, b in zip(*flat, strict=True))


@pytest.mark.parametrize("kind", ALL)
def test_the_rest_of_the_encoder_sees_the_kept_patches_alone(kind: str) -> None:
    model, x = build(kind), pictures()
    dense = model(x)
    with vtprune.apply(model, "norm", keep=0.4) as handle:
        out, keep = model(x), kept(handle)
    assert keep.shape == (3, 10) and len({tuple(row) for row in keep.tolist()}) > 1
    torch.testing.assert_close(first(out), by_hand(model, kind, x, LAYER, keep), atol=1e-5, rtol=1e-5)
    assert [t.shape for t in _parts(out)] == [t.shape for t in _parts(dense)]
    assert not torch.allclose(first(out), first(dense), atol=1e-4)


def _parts(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("kind", ALL)
def test_keeping_all_and_removing_change_no_bit_and_leave_no_hook(kind: str) -> None:
    model, x = build(kind), pictures()
    clean, dense = hooks(model), model(x)
    before = set(model.__dict__)
    for keep in (1.0, 0.3):
        with vtprune.apply(model, "idpruner", keep=keep):
            assert same_everywhere(model(x), dense) == (keep == 1.0)
        assert same_everywhere(model(x), dense)
    assert hooks(model) == clean and set(model.__dict__) == before


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_its_count_alone_and_in_a_batch(method: str) -> None:
    model, x = build("registers"), pictures()
    with vtprune.apply(model, method, keep=7) as handle:
        out, keep = model(x), kept(handle)
        report = handle.report()
        assert keep.shape == (3, 7) and report.tokens_in == 3 * PATCHES and report.stages == (f"block {LAYER}",)
        for i in range(3):
            torch.testing.assert_close(model(x[i : i + 1]), out[i : i + 1], atol=1e-5, rtol=1e-5)
            assert torch.equal(kept(handle)[0], keep[i])


@pytest.mark.parametrize("kind", ["token", "avg", "avgmax", "map", "registers", "eva"])
def test_features_have_all_rows_and_may_be_pooled_by_hand(kind: str) -> None:
    model: Any = build(kind)
    x = pictures()
    shape = model.forward_features(x).shape
    with vtprune.apply(model, "norm", keep=0.4) as handle:
        rows, out = model.forward_features(x), model(x)
        other = model.forward_features(pictures().flip(0))  # pooling must go by the rows, not by the last pass
        assert rows.shape == other.shape == shape
        torch.testing.assert_close(model.forward_head(rows), out, atol=1e-6, rtol=1e-5)
        keep = kept(handle).flip(0)
    prefix = model.num_prefix_tokens
    for row, mine in zip(rows[:, prefix:], keep, strict=True):
        gone = torch.ones(PATCHES, dtype=torch.bool).index_fill_(0, mine, False)
        torch.testing.assert_close(row[gone], row[mine].mean(0).expand(int(gone.sum()), -1))


def test_some_pictures_of_a_batch_may_be_pooled_by_attention() -> None:
    model: Any = build("map")
    with vtprune.apply(model, "norm", keep=0.4):
        rows = model.forward_features(pictures(4))
        out = model.forward_head(rows)
        for some in (slice(2), slice(2, 4), slice(1, None, 2)):
            torch.testing.assert_close(model.forward_head(rows[some]), out[some], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["token", "avg", "map", "clip", "clip avg"])
def test_intermediates_are_pictures(kind: str) -> None:
    model: Any = build(kind)
    x = pictures()
    with vtprune.apply(model, "norm", keep=0.4):
        out = model(x)
        got = model.forward_intermediates(x)
        if kind in CLIP:
            maps, pooled = got["image_intermediates"], got["image_features"]
        else:
            maps, pooled = got[1], model.forward_head(got[0])
    assert len(maps) == DEPTH and {tuple(m.shape) for m in maps} == {(3, 32, SIDE // 8, SIDE // 8)}
    torch.testing.assert_close(pooled, out, atol=1e-5, rtol=1e-4)


def test_unrestored_rows_are_the_kept_ones() -> None:
    model: Any = build("avg")
    with vtprune.apply(model, vtprune.PruneConfig("norm", 0.4, restore=False)):
        rows = model.forward_features(pictures())
        assert rows.shape == (3, model.num_prefix_tokens + 10, 32)


def test_the_cls_row_is_that_of_the_attention() -> None:
    """Against the whole attention map, made by hand from the block's own weights."""
    for kind in ("registers", "clip"):
        model: Any = build(kind)
        seen: dict[str, Any] = {}

        class Spy(vtprune.methods()["norm"]):  # type: ignore[misc]
            wants = frozenset({CLS_ROW, CLS_LOGITS})

            def score(self, tokens: vtprune.VisualTokens, seen: dict[str, Any] = seen) -> Tensor:
                seen.update(tokens.probes)
                return super().score(tokens)

        block = (model.blocks if kind in TIMM else model.transformer.resblocks)[LAYER]
        caught: list[Tensor] = []
        handle = block.register_forward_pre_hook(lambda _, args, caught=caught: caught.append(args[0]))
        vtprune.registry._METHODS["test-spy"] = vtprune.registry.dataclasses.dataclass(Spy)
        try:
            with vtprune.apply(model, "test-spy", keep=0.4):
                model(pictures())
        finally:
            vtprune.registry._METHODS.pop("test-spy")
            handle.remove()
        attention = block.attn
        if kind in TIMM:
            rows, weight, bias = block.norm1(caught[0]), attention.qkv.weight, attention.qkv.bias
            prefix = model.num_prefix_tokens
        else:
            rows, weight, bias, prefix = block.ln_1(caught[0]), attention.in_proj_weight, attention.in_proj_bias, 1
        q, k, _ = ((rows @ weight.T + bias).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)).unbind(0)
        logits = q @ k.transpose(-1, -2) / 4
        for probe, whole in ((CLS_LOGITS, logits), (CLS_ROW, logits.softmax(-1))):
            want = whole.mean(1)[:, 0, prefix:].flatten()
            torch.testing.assert_close(seen[probe], want, atol=1e-5, rtol=1e-4)


def test_several_blocks_take_steps_down_to_the_budget() -> None:
    model: Any = build("registers")
    with vtprune.apply(model, "tome", keep=5, layer=range(DEPTH - 1), rounds=1) as handle:
        model(pictures())
        report = handle.report()
    assert report.stages == tuple(f"block {i}" for i in range(DEPTH - 1)) and report.tokens_out == 15
    assert vtprune.PruneConfig.from_json(handle.config.to_json()) == handle.config
    # Written out: 25 (1/5) ** (i / 5) patches are left after stage i.
    left = [int(PATCHES * (5 / PATCHES) ** (i / 5) + 1e-6) for i in range(1, 6)]
    rows = [4 + 1 + n for n in (PATCHES, *left)]
    weights = sum(p.numel() for p in model.blocks[0].parameters() if p.ndim == 2)
    assert report.flops_after == 3 * sum(2 * n * weights + 4 * n * n * 32 for n in rows)
    assert "blocks of the encoder" in str(report) and report.flops_after < report.flops_before


def test_a_later_stage_counts_and_names_patches_of_the_whole_picture() -> None:
    model, x = build("token"), pictures()
    with vtprune.apply(model, "norm", keep=0.4, layer=[0, 3]) as handle:
        out, last = model(x), kept(handle)
    embedded: Any = model
    rows = embedded._pos_embed(embedded.patch_embed(x))
    index = torch.arange(PATCHES).expand(3, -1)
    for i, block in enumerate(embedded.blocks):
        rows = block(rows)
        if i in (0, 3):
            count = 10 if i == 3 else int(PATCHES * (10 / PATCHES) ** 0.5 + 1e-6)
            mine = rows[:, 1:].norm(dim=-1).topk(count).indices.sort().values
            rows, index = tiny_vits.pick(rows, mine, 1), index.gather(1, mine)
    assert torch.equal(index, last)
    torch.testing.assert_close(out, embedded.forward_head(embedded.norm(rows)), atol=1e-5, rtol=1e-5)


def test_the_order_of_choice_is_reported() -> None:
    model = build("token")
    with vtprune.apply(model, "norm", keep=3, layer=[0, 2]) as handle:
        model(pictures(2))
        for image in handle.report().images:
            order = image.segments[0].order
            assert order is not None and ((order >= 0) == image.segments[0].kept).all()


def test_a_whole_clip_is_pruned_in_its_tower_and_zero_shot_keeps_its_shape() -> None:
    model: Any = tiny_vits.clip()
    x, text = pictures(), torch.randint(1, 400, (4, 16))
    dense = model(x, text)
    with vtprune.apply(model, "idpruner", keep=0.4) as handle:
        pruned = model(x, text)
        assert handle.report().info == {"importance": "cls_logits"}
    assert pruned[0].shape == dense[0].shape and not torch.equal(pruned[0], dense[0])
    assert torch.equal(pruned[1], dense[1]), "the text tower is untouched"
    assert all(torch.equal(a, b) for a, b in zip(model(x, text)[:2], dense[:2], strict=True))


def test_other_sizes_have_other_grids() -> None:
    model = build("any size")
    with vtprune.apply(model, "norm", keep=0.5) as handle:
        model(torch.randn(2, 3, 24, 56))
        assert [image.segments[0].grid for image in handle.report().images] == [(3, 7)] * 2
        assert handle.report().tokens_out == 20


def test_gradients_flow_through_the_kept_patches() -> None:
    model = build("token").train()
    with torch.enable_grad(), vtprune.apply(model, "norm", keep=0.4):
        model(pictures()).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_settings_of_one_block_of_code_and_replacement() -> None:
    model, x = build("token"), pictures()
    dense = model(x)
    with vtprune.using(model, "norm", keep=0.4, layer=3):
        inside = model(x)
        assert vtprune.report(model).stages == ("block 3",)
        with vtprune.using(model, None):
            assert torch.equal(model(x), dense)
    assert torch.equal(model(x), dense) and not torch.equal(inside, dense)
    vtprune.apply(model, "grid", keep=0.4)
    vtprune.apply(model, "norm", keep=0.4, layer=3)
    assert torch.equal(model(x), inside)
    with pytest.raises(VTPruneError, match="cannot be copied"):
        copy.deepcopy(model)
    vtprune.remove(model)
    assert torch.equal(copy.deepcopy(model)(x), dense)
    with pytest.warns(VTPruneWarning, match="never fired: no forward was run"):
        vtprune.apply(model, "norm").remove()


def test_counts_above_the_grid_keep_all_and_say_so() -> None:
    model, x = build("token"), pictures()
    dense = model(x)
    with (
        vtprune.apply(model, "norm", keep=99),
        pytest.warns(VTPruneWarning, match="keep=99 is not below the 25 patches"),
    ):
        assert torch.equal(model(x), dense)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("fastv", {}, "prunes inside a language model"),
        ("cdpruner", {}, "looks at the question"),
        ("zoo", {}, "needs 'pre_projector'"),
        ("embedlens", {}, "there is no calibration"),
        ("norm", {"layer": DEPTH - 1}, r"choose a layer in 0\.\.4"),
        ("norm", {"layer": -1}, "names no block"),
        ("norm", {"layer": [3, 1]}, "several that ascend"),
        ("norm", {"layer": True}, "names no block"),
        ("norm", {"positions": "compact"}, "has only 'original'"),
        ("norm", {"compile": "graph"}, "has only None"),
        ("norm", {"depth": 2}, "has no option 'depth'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(method: str, options: dict[str, Any], message: str) -> None:
    model = build("token")
    clean = hooks(model)
    with pytest.raises(VTPruneError, match=message) as caught:
        vtprune.apply(model, method, keep=0.5, **options)
    assert "\n" not in str(caught.value) and hooks(model) == clean
    assert not any(name.startswith("_vtprune") or name == "forward_intermediates" for name in model.__dict__)


def test_methods_that_need_cls_are_refused_without_one_and_methods_that_count_too() -> None:
    with pytest.raises(UnsupportedModelError, match=r"cls_row.*importance='auto'"):
        vtprune.apply(build("map"), "idpruner", importance="cls")
    vtprune.registry._METHODS["test-counts"] = type("Counts", (vtprune.methods()["norm"],), {"adaptive": True})
    try:
        with pytest.raises(ConfigError, match="a count of its own"):
            vtprune.apply(build("token"), "test-counts")
    finally:
        vtprune.registry._METHODS.pop("test-counts")


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet18", "beit_base_patch16_224"])
def test_encoders_of_other_kinds_are_refused(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedModelError, match="is no plain vision transformer"):
        vtprune.apply(model, "norm")


def test_packages_that_are_too_old_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("clip")
    monkeypatch.delattr(type(model), "forward_intermediates")
    with pytest.raises(UnsupportedModelError, match=r"this open_clip is too old"):
        vtprune.apply(model, "norm")


def test_a_config_says_everything_of_an_encoder_too() -> None:
    with pytest.raises(ConfigError, match="got a PruneConfig and also layer"):
        vtprune.apply(build("token"), vtprune.PruneConfig("norm", 0.5), layer=2)


def test_an_encoder_without_room_and_other_modules_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="has 1 block"):
        vtprune.apply(tiny_vits.timm_vit(depth=1), "norm")
    with pytest.raises(UnsupportedModelError, match="vision transformers of timm"):
        vtprune.apply(nn.Linear(2, 2), "norm")
    import tiny

    with pytest.raises(ConfigError, match="has no option 'layer'"):
        vtprune.apply(tiny.build("llava"), "norm", layer=3)
    with pytest.raises(ConfigError, match=r"of an encoder alone.* options=\{'layer': 3\}"):
        vtprune.apply(tiny.build("llava"), vtprune.PruneConfig("fastv", layer=3))
    with vtprune.apply(tiny.build("llava"), "fastv", layer=1) as handle:
        assert handle.config.options == {"layer": 1} and handle.config.layer is None


def test_masks_dropout_and_checkpointing_are_refused_while_pruned() -> None:
    model: Any = build("token")
    with vtprune.apply(model, "norm", keep=0.4):
        with pytest.raises(InputError, match="attention mask is for all patches"):
            model.forward_features(pictures(), attn_mask=torch.ones(PATCHES + 1, PATCHES + 1))
        model.set_grad_checkpointing()
        model(pictures())  # nothing is to run again
        for trained in (True, False):
            with torch.enable_grad(), pytest.raises(UnsupportedModelError, match="gradient checkpointing"):
                model.train(trained)(pictures())
    dropping = tiny_vits.timm_vit(patch_drop_rate=0.5).train()
    with vtprune.apply(dropping, "norm", keep=0.4), pytest.raises(InputError, match="patch dropout"):
        dropping(pictures())


def test_lora_and_half_precision() -> None:
    import peft

    x = pictures()
    tuned = peft.get_peft_model(build("token"), peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False))
    dense = tuned(x)
    with vtprune.apply(tuned, "idpruner", keep=0.4) as handle:
        assert not torch.equal(tuned(x), dense) and handle.report().info == {"importance": "cls_logits"}
    assert torch.equal(tuned(x), dense)
    half = build("avg").bfloat16()
    with vtprune.apply(half, "idpruner", keep=0.4), warnings.catch_warnings():
        out = half(x.bfloat16())
        assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())
