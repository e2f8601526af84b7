# SPDX-License-Identifier: Apache-2.0
"""``tower_keep``: patches that leave a vision tower half-way, so that its other blocks have less to do.

After block L of the tower every view goes on with its CLS token and the share of its patches that the CLS token attends
to most there (one query row, as the ``cls_row`` probe; no attention map). Position embeddings were added before the
first block, so nothing else changes for the rows that stay. What the projector reads is brought back to the full grid,
zeros in the slots of dropped patches, so that everything behind it (dropping the CLS row, projecting, stitching AnyRes
views, filling placeholders) is stock code. Those rows never reach a method, nor the language model: the engine hands a
method what is left, and takes the rest out of the prompt with what the method drops.

Which patches are left travels as a probe of the encoder (`Left`), the way every probe does: to the prompt, through
``generate()``, and out of a CUDA graph.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..budget import Budget
from ..config import PruneConfig
from ..errors import ConfigError, InputError, UnsupportedModelError
from ..kernels import reference
from ..models.base import Family, ImageLayout, cls_row
from ..tokens import Probe, VisualTokens
from .report import TowerStage, Trace

if TYPE_CHECKING:
    from .call import Call
    from .probes import EncoderTap


@dataclass(frozen=True)
class Left(Probe):
    """Which patches the vision tower goes on with after block `layer`: ``[raw rows]`` bool.

    Parameters
    ----------
    share
        Of the patches of each view, by the rounding rule of `Budget`.
    """

    share: float = 1.0

    def count(self, patches: int) -> int:
        """Patches that a view of so many goes on with."""
        return Budget(self.share).image_count(patches)


class Views(NamedTuple):
    """What the tower must know of one call of ``get_image_features``.

    Parameters
    ----------
    cut : Tensor or None
        ``[V, P]`` bool, True at patches that AnyRes cuts away again as padding; None where there are none.
    read
        Hidden states that the projector reads, as the model is told of them.
    """

    cut: Tensor | None
    read: tuple[int, ...]


def left_probe(family: Family, config: PruneConfig) -> Left | None:
    """The probe that makes the tower drop patches as `config` says; None where it asks for none.

    Raises
    ------
    UnsupportedModelError
        The family's tower is not one whose patches can be dropped one by one.
    ConfigError
        There is no such block, or nothing behind it is read.
    """
    if config.tower_keep == 1.0:
        return None
    tower = family.plain_tower
    if tower is None:
        raise UnsupportedModelError(
            f"tower_keep={config.tower_keep} needs a vision tower that makes one token of each patch, and that of this "
            f"{family.label} model does not (windows, merging or interpolation need all patches); leave it out"
        )
    depth = len(tower.blocks)
    used = max(at - 1 if at >= 0 else depth + at for at in _read(family, {}))  # the last block whose output is read
    layer = max(0, depth // 3 - 1) if config.tower_layer is None else config.tower_layer
    if layer >= used:
        raise ConfigError(
            f"tower_layer={layer} leaves no block less to do: of the blocks 0 to {depth - 1} of this vision tower, "
            f"{used} is the last that is read; choose a block in 0..{used - 1}"
        )
    return Left("left", layer=layer, share=config.tower_keep)


def _read(family: Family, inputs: dict[str, Any]) -> tuple[int, ...]:
    read = inputs.get("vision_feature_layer")
    read = family.config.vision_feature_layer if read is None else read
    return (read,) if isinstance(read, int) else tuple(read)


def views(tap: EncoderTap, layouts: Sequence[ImageLayout], inputs: dict[str, Any]) -> Views | None:
    """What the tower must know of the pictures that it is about to see; None where no patch is to be dropped."""
    if wanted(tap) is None:
        return None
    seen = np.zeros(sum(layout.raw_length for layout in layouts), bool)
    first = 0
    for layout in layouts:
        seen[first + layout.raw] = True
        first += layout.raw_length
    padding = None if seen.all() else torch.from_numpy(~seen)
    pixels = inputs.get("pixel_values")
    if padding is not None and isinstance(pixels, Tensor):
        padding = padding.to(pixels.device, non_blocking=True)
    return Views(padding, _read(tap.family, inputs))


def cut(tap: EncoderTap) -> Tensor | None:
    """`Views.cut` of the pictures that are being encoded."""
    return None if tap.local.views is None else tap.local.views.cut


@contextmanager
def cutting(tap: EncoderTap, *buffer: Tensor) -> Iterator[None]:
    """Within this block, hooks read `Views.cut` from a `buffer`, if one is given: for a capture."""
    before = tap.local.views
    if buffer and before is not None:
        tap.local.views = before._replace(cut=buffer[0])
    try:
        yield
    finally:
        tap.local.views = before


def wanted(tap: EncoderTap) -> Left | None:
    """The drop that the current call wants."""
    return next((probe for probe in tap.wanted() if isinstance(probe, Left)), None)


def hook(tap: EncoderTap, probe: Left) -> list[Any]:
    """Hooks that drop patches after block ``probe.layer`` where the current call wants that."""
    tower = tap.family.plain_tower
    assert tower is not None
    prefix, local = int(tower.has_cls), threading.local()

    def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if tap.asks(probe):
            local.scores = cls_row(module, _rows(args, kwargs).detach(), softmax=True)

    def drop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not tap.asks(probe):
            return None
        if module.training and getattr(module, "gradient_checkpointing", False):
            raise UnsupportedModelError(
                "tower_keep does not work with gradient checkpointing in the vision tower, which runs blocks again; "
                "switch it off or leave tower_keep out"
            )
        rows = _rows(args, kwargs)
        if any(isinstance(x, Tensor) for x in (*args[1:], kwargs.get("attention_mask"))):
            raise InputError(
                "the vision tower was given an attention mask, which is for all patches; leave tower_keep out"
            )
        scores = local.scores if tower.has_cls else minus_cosine_to_mean(rows.detach())
        local.scores = None
        index, left = choose(scores, probe.count(scores.shape[1]), cut(tap))
        tap.hand_over({probe: left.flatten()})
        if index.shape[1] == scores.shape[1]:
            return None
        index = torch.cat([index.new_zeros(len(index), prefix), index + prefix], 1)
        kept = rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))
        return ((kept, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": kept})

    def restore(module: Any, args: tuple[Any, ...], out: Any) -> None:
        if not tap.asks(probe) or tap.local.views is None:
            return
        left = (tap.local.captured or {})[probe]
        states = list(out.hidden_states)
        for at in tap.local.views.read:
            states[at] = brought_back(states[at], left, prefix)
        out.hidden_states = tuple(states)

    handles = [
        tower.blocks[probe.layer + 1].register_forward_pre_hook(drop, with_kwargs=True),
        tower.module.register_forward_hook(restore),
    ]
    if tower.has_cls:
        handles.append(tower.blocks[probe.layer].self_attn.register_forward_pre_hook(see, with_kwargs=True))
    return handles


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    rows: Tensor = args[0] if args else kwargs["hidden_states"]
    return rows


@torch.no_grad()
def minus_cosine_to_mean(rows: Tensor) -> Tensor:
    """How unlike the mean of its view each row of ``[V, P, d]`` is, ``[V, P]`` fp32; NaN where it is broken."""
    rows = rows.to(reference.wide(rows))
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    # The cosine does not see the length of the mean, so the sum will do; broken rows must not spoil the others.
    mean = rows.masked_fill(~length.isfinite(), 0.0).sum(1, keepdim=True)
    scale = length * torch.linalg.vector_norm(mean, dim=-1, keepdim=True)
    cosine = (rows * mean).sum(-1) / scale.clamp(min=1e-8).squeeze(-1)
    return -cosine.float()


@torch.no_grad()
def choose(scores: Tensor, count: int, cut: Tensor | None) -> tuple[Tensor, Tensor]:
    """The patches of each view that go on.

    Parameters
    ----------
    scores : Tensor
        ``[V, P]`` fp32. Ties go to the lowest index; what is not finite comes last.
    cut : Tensor or None
        Patches that come after all others, ``[V * P]`` bool.

    Returns
    -------
    index, left : Tensor
        ``[V, count]`` int64, ascending, and the same as ``[V, P]`` bool.
    """
    scores = scores.masked_fill(~scores.isfinite(), torch.finfo(torch.float32).min)
    if cut is not None:
        scores = scores.masked_fill(cut.to(scores.device).view(scores.shape), -torch.inf)
    index = scores.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
    return index, torch.zeros_like(scores, dtype=torch.bool).scatter_(1, index, True)


def brought_back(rows: Tensor, left: Tensor, prefix: int) -> Tensor:
    """Rows ``[V, prefix + K, d]`` on the full grid, ``[V, prefix + P, d]``, zeros where a patch was dropped; `left` is
    ``[V * P]`` bool. Rows that are all there stay as they are."""
    left = left.to(rows.device).view(len(rows), -1)
    if rows.shape[1] == prefix + left.shape[1]:
        return rows
    left = torch.cat([left.new_ones(len(left), prefix), left], 1)
    slot = (left.cumsum(1) - 1).clamp_min(0)
    return rows.gather(1, slot[..., None].expand(-1, -1, rows.shape[-1])).masked_fill(~left[..., None], 0)


def whole(captured: dict[Probe, Tensor]) -> dict[Probe, Tensor]:
    """What probes captured of the blocks behind the drop, with zeros for the patches that were not there."""
    for left in [value for probe, value in captured.items() if isinstance(probe, Left)]:
        slot = (left.cumsum(0) - 1).clamp_min(0)
        captured = {
            # CLS rows are one number per patch; what feeds the projector was brought back.
            probe: value[slot.to(value.device)].masked_fill(~left.to(value.device), 0)
            if probe.name == "cls_row" and len(value) != len(left)
            else value
            for probe, value in captured.items()
        }
    return captured


def leave(family: Family, call: Call) -> None:
    """Take what the tower dropped out of ``call.tokens`` and ``call.slots``, and note it in the trace. If that is all
    that has to go, no stage has anything to do in this call.

    How many are left is known without asking the device: of each view, what the tower kept, or all of its tokens where
    padding makes these fewer.
    """
    probe = next((p for e in call.encodings.values() for p in e.probes if isinstance(p, Left)), None)
    if probe is None:
        return
    tokens, slots = call.tokens, call.slots
    assert tokens is not None and slots is not None
    if probe not in tokens.probes:  # no picture of this prompt
        return
    left = tokens.probes[probe]
    tokens = replace(tokens, probes={p: value for p, value in tokens.probes.items() if p != probe})
    grids = zip(tokens.seqlens, tokens.seg_grid, strict=True)
    lens = tuple(min(n, probe.count(rows * columns)) for n, (rows, columns) in grids)
    index = (~left).to(torch.int8).argsort(stable=True)[: sum(lens)]
    call.tokens, call.slots = tokens.subset(index, None, lens), slots[index]
    tower = family.plain_tower
    source = "cls" if tower is not None and tower.has_cls else "minus_cosine_to_mean"
    call.trace.append(Trace(TowerStage(block=probe.layer), index, None, {"tower importance": source}))
    if call.job is not None and call.job.keeps_everything(call.tokens):
        call.job = replace(call.job, stages=(), layer_probes=frozenset())


def dropped(tokens: VisualTokens, batch: int) -> np.ndarray:
    """How many tokens of each sample the tower dropped, if nobody else has dropped any: ``[batch]`` int64."""
    gone = np.subtract(tokens.ctx["image_lens"], tokens.image_lens)
    return np.bincount(np.asarray(tokens.image_sample, np.int64), gone, batch).astype(np.int64)
