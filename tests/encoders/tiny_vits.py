# SPDX-License-Identifier: Apache-2.0
"""Small random vision transformers of timm and open_clip, and the same pass written out by hand."""

from __future__ import annotations

from typing import Any

import open_clip
import timm
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

DEPTH = 6
SIDE = 40
CLIP_CODES = 64


def timm_vit(name: str = "vit_tiny_patch16_224", **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": DEPTH, "num_classes": 5}
    model: nn.Module = timm.create_model(name, **{**shape, **changes})
    return varied(model)


def clip(**vision: Any) -> nn.Module:
    torch.manual_seed(0)
    eyes = CLIPVisionCfg(layers=DEPTH, width=32, head_width=16, patch_size=8, image_size=SIDE, **vision)
    words = CLIPTextCfg(context_length=16, vocab_size=49408, width=32, heads=2, layers=2)
    return varied(open_clip.CLIP(32, eyes, words))


def varied(model: nn.Module) -> nn.Module:
    """Weights that start at zero or one would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


TIMM: dict[str, dict[str, Any]] = {
    "token": {},
    "avg": {"global_pool": "avg"},
    "avgmax": {"global_pool": "avgmax"},
    "map": {"global_pool": "map", "class_token": False},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "any size": {"dynamic_img_size": True},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "eva": {"name": "eva02_tiny_patch14_224"},
    "dinov3": {"name": "vit_small_patch16_dinov3"},
    "rope of each head": {"name": "vit_small_patch16_rope_mixed_224"},
}
CLIP: dict[str, dict[str, Any]] = {
    "clip": {},
    "clip avg": {"pool_type": "avg"},
    "clip norm last": {"pool_type": "avg", "final_ln_after_pool": True},
    "clip coca": {"attentional_pool": True, "attn_pooler_queries": 5},
    "clip parallel": {"attentional_pool": "parallel", "attn_pooler_queries": 5},
    "clip tokens": {"output_tokens": True},
    "clip qk norm": {"qk_norm": True},
}
ALL = (*TIMM, *CLIP)


def build(kind: str) -> nn.Module:
    """The vision transformer; of CLIP its tower."""
    return clip(**CLIP[kind]).visual if kind in CLIP else timm_vit(**TIMM[kind])  # type: ignore[return-value]


def first(out: Any) -> Tensor:
    """The pooled features or logits."""
    return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


def by_hand(model: Any, kind: str, pictures: Tensor, layer: int, keep: Tensor) -> Tensor:
    """What the model says of patches ``keep [B, K]`` alone from the block after `layer` on, written out."""
    if kind in CLIP:
        rows, blocks = model._embeds(pictures), model.transformer.resblocks
        for i, block in enumerate(blocks):
            rows = block(rows)
            rows = pick(rows, keep, 1) if i == layer else rows
        pooled, _ = model._pool(rows)
        return pooled if model.proj is None else pooled @ model.proj  # type: ignore[no-any-return]
    rows, rope = model.patch_embed(pictures), None
    rows = model._pos_embed(rows)
    if isinstance(rows, tuple):
        rows, rope = rows
    rows = model.norm_pre(rows)
    for i, block in enumerate(model.blocks):
        if rope is None:
            rows = block(rows)
        else:
            own = rope[i] if getattr(model, "rope_mixed", False) else rope
            if i > layer:
                own = own[keep][:, None] if own.ndim == 2 else torch.stack([own[:, mine] for mine in keep])
            rows = block(rows, rope=own)
        rows = pick(rows, keep, model.num_prefix_tokens) if i == layer else rows
    return model.forward_head(model.norm(rows))  # type: ignore[no-any-return]


def pick(rows: Tensor, keep: Tensor, prefix: int) -> Tensor:
    return torch.stack([torch.cat([row[:prefix], row[prefix:][mine]]) for row, mine in zip(rows, keep, strict=True)])
