# SPDX-License-Identifier: Apache-2.0
"""Where timm's and open_clip's vision transformers keep what the engine hooks. Neither package is imported here.

Quirks: timm's attention-pooling models (SigLIP) pool over whatever rows come, so rows that were put back must be taken
out again; EVA and DINOv3 hand rotary positions to every block; open_clip normalises before it pools in most models and
after it in some; a hook on torch's own MultiheadAttention switches its fast path off, so none is put there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import InputError, UnsupportedModelError
from ..kernels.attention_rows import attention_rows
from ..models import unwrap
from ..tokens import Probe, VisualTokens

SERVED = "vision transformers of timm (vit_*, deit*, eva02_*, SigLIP, DINOv2, DINOv3) and of open_clip"


class Encoder:
    """A plain vision transformer: one row of patch tokens behind CLS and register tokens, through blocks of one kind.

    Parameters
    ----------
    model : nn.Module
        What the user has.
    inner : nn.Module
        The vision transformer in it.
    """

    label = ""

    def __init__(self, model: nn.Module, inner: Any) -> None:
        self.model = model
        self.inner = inner

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, in the order in which they run."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Length of a row."""
        raise NotImplementedError

    @property
    def prefix(self) -> int:
        """How many rows stand before those of the patches: CLS, distillation and register tokens."""
        raise NotImplementedError

    @property
    def has_cls(self) -> bool:
        """Whether the first of them is a CLS token."""
        raise NotImplementedError

    @property
    def start(self) -> nn.Module:
        """The module that sees the pictures, ``[B, C, H, W]``."""
        raise NotImplementedError

    def grid(self, pictures: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        raise NotImplementedError

    @property
    def exits(self) -> list[nn.Module]:
        """Modules that put out all rows, for the last time or to be pooled."""
        raise NotImplementedError

    @property
    def poolers(self) -> list[nn.Module]:
        """Modules that pool by attention, and so must see the kept rows alone."""
        raise NotImplementedError

    @property
    def checkpoints(self) -> bool:
        """Whether blocks run again in the backward pass, where there is one."""
        raise NotImplementedError

    def watch(self, block: nn.Module, put: Callable[[Tensor], None]) -> Any | None:
        """Hook that calls `put` with what the block's attention reads, ``[B, P + n, d]``; None where the attention is
        of a kind whose CLS row cannot be recomputed."""
        raise NotImplementedError

    def heads(self, block: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor, float]:
        """Query of the CLS token ``[B, H, 1, dh]``, keys of all rows ``[B, H, P + n, dh]``, scale of their products."""
        raise NotImplementedError

    @torch.no_grad()
    def cls_row(self, block: nn.Module, rows: Tensor, softmax: bool) -> Tensor:
        """How much the CLS token attends to each patch in `block`, ``[B * n]`` fp32, mean over heads; `rows` are what
        `watch` saw."""
        query, key, scale = self.heads(block, rows)
        return attention_rows(query, key, scale=scale, softmax=softmax)[:, 0, self.prefix :].flatten()


class TimmViT(Encoder):
    """``timm.models.vision_transformer.VisionTransformer`` and ``timm.models.eva.Eva``."""

    label = "timm"

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.inner.blocks)

    @property
    def width(self) -> int:
        return int(self.inner.embed_dim)

    @property
    def prefix(self) -> int:
        return int(self.inner.num_prefix_tokens)

    @property
    def has_cls(self) -> bool:
        return self.inner.cls_token is not None

    @property
    def start(self) -> nn.Module:
        return self.inner.patch_embed

    def grid(self, pictures: Tensor) -> tuple[int, int]:
        rows, columns = self.inner.patch_embed.dynamic_feat_size(tuple(pictures.shape[-2:]))
        return int(rows), int(columns)

    @property
    def exits(self) -> list[nn.Module]:
        return [self.inner.norm]

    @property
    def poolers(self) -> list[nn.Module]:
        return [] if self.inner.attn_pool is None else [self.inner.attn_pool]

    @property
    def checkpoints(self) -> bool:
        return bool(self.inner.grad_checkpointing)

    def watch(self, block: nn.Module, put: Callable[[Tensor], None]) -> Any | None:
        attention: Any = getattr(block, "attn", None)
        if not _is(attention, "timm.layers.attention", "Attention"):  # EVA's rotates keys
            return None
        return attention.register_forward_pre_hook(lambda _, args: put(args[0].detach()))

    def heads(self, block: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor, float]:
        attention: Any = block.attn
        joined = attention.qkv(rows)  # as a whole, so that wrappers (LoRA, quantised weights) are asked too
        query, key, _ = joined.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return attention.q_norm(query[:, :, :1]), attention.k_norm(key), attention.scale


class OpenClipViT(Encoder):
    """``open_clip.transformer.VisionTransformer``."""

    label = "open_clip"

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.inner.transformer.resblocks)

    @property
    def width(self) -> int:
        return int(self.inner.transformer.width)

    @property
    def prefix(self) -> int:
        return 1

    @property
    def has_cls(self) -> bool:
        return True

    @property
    def start(self) -> nn.Module:
        return self.inner.conv1

    def grid(self, pictures: Tensor) -> tuple[int, int]:
        height, width = self.inner.patch_size
        return pictures.shape[-2] // height, pictures.shape[-1] // width

    @property
    def exits(self) -> list[nn.Module]:
        # In CoCa's way of pooling the norm sees queries, not patches.
        reads_patches = self.inner.attn_pool is None or self.inner.attn_pool_contrastive is not None
        return [self.inner.transformer, *([self.inner.ln_post] if reads_patches else [])]

    @property
    def poolers(self) -> list[nn.Module]:
        own = (getattr(self.inner, name, None) for name in ("attn_pool", "attn_pool_contrastive"))
        return [module for module in own if module is not None]

    @property
    def checkpoints(self) -> bool:
        return bool(self.inner.transformer.grad_checkpointing)

    def watch(self, block: nn.Module, put: Callable[[Tensor], None]) -> Any | None:
        if type(getattr(block, "attn", None)) is not nn.MultiheadAttention or not hasattr(block, "ln_1"):
            return None
        return block.ln_1.register_forward_hook(lambda _module, _args, out: put(out.detach()))  # type: ignore[union-attr]

    def heads(self, block: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor, float]:
        attention: Any = block.attn
        width, (weight, bias) = attention.embed_dim, (attention.in_proj_weight, attention.in_proj_bias)
        query = linear(rows[:, :1], weight[:width], bias[:width])
        key = linear(rows, weight[width : 2 * width], bias[width : 2 * width])
        query, key = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in (query, key))
        return query, key, float(query.shape[-1]) ** -0.5


#: The class that serves a vision transformer, by where its class is defined and what it is called.
_KINDS: dict[tuple[str, str], type[Encoder]] = {
    ("timm.models.vision_transformer", "VisionTransformer"): TimmViT,
    ("timm.models.eva", "Eva"): TimmViT,
    ("open_clip.transformer", "VisionTransformer"): OpenClipViT,
}


def _is(module: Any, home: str, name: str) -> bool:
    return any((cls.__module__, cls.__qualname__) == (home, name) for cls in type(module).__mro__)


def find_encoder(model: Any) -> Encoder | None:
    """The vision transformer of timm or open_clip that `model` is or holds (a CLIP's visual tower, a trunk in it); None
    where it is of neither package.

    Raises
    ------
    UnsupportedModelError
        It is of one of them, but no plain vision transformer.
    """
    if not isinstance(model, nn.Module):
        return None
    outer = inner = unwrap(model)
    for name in ("visual", "trunk", "model"):  # CLIP's tower; a timm model in that; timm's `features_only`
        if _ours(inner) and isinstance(getattr(inner, name, None), nn.Module):
            inner = getattr(inner, name)
    for (home, name), kind in _KINDS.items():
        if _is(inner, home, name):
            encoder = kind(outer, inner)
            _check(encoder)
            return encoder
    if not (_ours(outer) or _ours(inner)):
        return None
    raise UnsupportedModelError(
        f"{type(inner).__name__} is no plain vision transformer: windows, stages, relative positions and convolutions "
        f"need every patch in its place; served are {SERVED}"
    )


def _ours(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] in ("timm", "open_clip")


def _check(encoder: Encoder) -> None:
    if len(encoder.blocks) < 2:
        raise UnsupportedModelError(
            f"this {type(encoder.inner).__name__} has {len(encoder.blocks)} block(s), so there is no place between "
            "two of them; use a deeper one"
        )
    rows_first = not getattr(getattr(encoder.inner, "transformer", None), "batch_first", True)
    if rows_first or not all(hasattr(encoder.inner, name) for name in ("forward_intermediates", "attn_pool")):
        raise UnsupportedModelError(f"this {encoder.label} is too old; use timm 1.0.16, open_clip_torch 2.32, or newer")


def block_flops(block: nn.Module, rows: int, width: int) -> int:
    """FLOPs of one block over so many rows: two for each weight of a matrix and row, and the attention products."""
    return 2 * rows * sum(p.numel() for p in block.parameters() if p.ndim == 2) + 4 * rows * rows * width


def left(rows: Tensor, index: Tensor, patches: int) -> Tensor:
    """Of rows ``[B, P + patches, d]``, P from 0 on, the first P and the patches ``index [B, K]``."""
    prefix = rows.shape[1] - patches
    kept = (index + prefix)[..., None].expand(-1, -1, rows.shape[-1])
    return torch.cat([rows[:, :prefix], rows.gather(1, kept)], 1)


def turns(rope: Tensor, index: Tensor) -> Tensor:
    """Rotary sines and cosines of the patches ``index [B, K]``, to be met by ``[B, H, K, dh]``.

    Parameters
    ----------
    rope : Tensor
        ``[N, 2 dh]``, or ``[H, N, 2 dh]`` where each head has its own.
    """
    if rope.ndim == 2:
        return rope[index][:, None]
    if rope.ndim == 3:
        return rope[:, index].transpose(0, 1)
    raise InputError(f"rotary positions of shape {tuple(rope.shape)} are not known; patch dropout cannot be on")


def pictures(
    grid: tuple[int, int], batch: int, features: Tensor, coords: Tensor, source: Tensor, probes: dict[Probe, Tensor]
) -> VisualTokens:
    """Patches of a batch of pictures of one size, each in a sample of its own."""
    tokens = VisualTokens(
        features=features,
        seqlens=(len(features) // batch,) * batch,
        source=source,
        coords=coords,
        seg_image=tuple(range(batch)),
        image_sample=tuple(range(batch)),
        seg_kind=("image",) * batch,
        seg_grid=(grid,) * batch,
        seg_box=((0.0, 0.0, 1.0, 1.0),) * batch,
        image_grid=((1, 1, 1),) * batch,
        image_size=(None,) * batch,
        probes=probes,
    )
    tokens.ctx["image_lens"] = (grid[0] * grid[1],) * batch
    return tokens
