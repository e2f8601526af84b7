# SPDX-License-Identifier: Apache-2.0
"""What a pruned forward did: tokens per image, stages that fired, FLOPs of the language model's prefill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from ..config import PruneConfig
from ..tokens import Selection, Stage, VisualTokens
from .layout import BatchLayout


class Trace(NamedTuple):
    """One stage that fired: flat rows (of the unpruned tokens) kept, in prompt order and in the order of choice."""

    stage: Stage
    kept: Tensor
    order: Tensor | None
    info: dict[str, str]


@dataclass(frozen=True)
class TowerStage(Stage):
    """What `tower_keep` does after a block of the vision tower; no method acts here."""

    block: int = 0

    @property
    def name(self) -> str:
        return f"vision tower block {self.block}"


@dataclass(frozen=True)
class SegmentReport:
    """One image, AnyRes view or video frame.

    Parameters
    ----------
    kind, grid, box
        As ``seg_kind``, ``seg_grid`` and ``seg_box`` in `VisualTokens`.
    coords : np.ndarray
        ``[n, 3]`` time, row, column of each token.
    kept : np.ndarray
        ``[n]`` bool.
    order : np.ndarray or None
        ``[n]`` rank of choice among the kept tokens of the batch, -1 where dropped; None if the method has no order.
    """

    kind: str
    grid: tuple[int, int]
    box: tuple[float, float, float, float]
    coords: np.ndarray
    kept: np.ndarray
    order: np.ndarray | None


@dataclass(frozen=True)
class ImageReport:
    """One image or video: `sample` it belongs to, visual tokens in and out, its segments."""

    sample: int
    tokens_in: int
    tokens_out: int
    segments: tuple[SegmentReport, ...]


@dataclass(frozen=True)
class Report:
    """What the last forward with pictures did.

    Parameters
    ----------
    method, keep
        What was asked for.
    samples
        Batch size.
    images
        One `ImageReport` per image, in prompt order.
    tokens_in, tokens_out, ratio
        Visual tokens that came out of the projector, those that were left after the last stage, and their quotient. Of
        a reversible method: those that take part in the last attention that others sit out.
    stages
        Names of the stages that fired, for example ``("projector",)``; empty where every token was kept.
    flops_before, flops_after
        FLOPs of the language model's prefill (head excluded) over all samples, by the formula of `prefill_flops`.
    info
        What the pruner said, for example ``{"importance": "cls"}``.
    notes
        Deviations from what was asked, in words.
    compiled
        Where graphs were asked for (``compile="graph"``): how the vision tower and the language model ran, and if not
        as a graph, why.
    tower_left
        Visual tokens that the vision tower left for the method, where ``tower_keep`` asked for fewer; else None.
    """

    method: str
    keep: float | int | Sequence[float | int]
    samples: int
    images: tuple[ImageReport, ...]
    tokens_in: int
    tokens_out: int
    ratio: float
    stages: tuple[str, ...]
    flops_before: int
    flops_after: int
    info: dict[str, str]
    notes: tuple[str, ...]
    compiled: dict[str, str]
    tower_left: int | None = None

    #: What the FLOPs are of.
    part: ClassVar[str] = "language model prefill"

    def __str__(self) -> str:
        source = "".join(f", {k} {v}" for k, v in self.info.items())
        lines = [
            f"{self.method} keep={self.keep}{source}: {self.tokens_out} of {self.tokens_in} visual tokens "
            f"({self.ratio:.1%}) after {' + '.join(self.stages) or 'no stage'}",
            f"{self.part}: {self.flops_before / 1e9:.2f} -> {self.flops_after / 1e9:.2f} GFLOP",
        ]
        if self.tower_left is not None:
            lines.append(f"vision tower: {self.tower_left} of {self.tokens_in} visual tokens left")
        lines += [f"image {i} (sample {m.sample}): {m.tokens_out} of {m.tokens_in}" for i, m in enumerate(self.images)]
        lines += [f"{part}: {how}" for part, how in self.compiled.items()]
        return "\n".join([*lines, *self.notes])


def prefill_flops(rows: int, config: Any, attending: int | None = None) -> int:
    """FLOPs of one decoder layer over `rows` rows: ``2n[d dh (2H + 2Hkv) + 3 d m] + 4 n n H dh``.

    The first term is the projections (q, k, v, o and a gated FFN), the second the attention products, not halved for
    causality. Embedding, norms and the head are left out. Where only `attending` rows take part in the attention, n is
    that but for the FFN.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or hidden // heads
    n = rows if attending is None else attending
    attention = 2 * n * hidden * head * (2 * heads + 2 * kv_heads) + 4 * n * n * heads * head
    return attention + 2 * rows * 3 * hidden * config.intermediate_size


def image_reports(
    layout: BatchLayout | VisualTokens, kept: np.ndarray, order: np.ndarray | None
) -> tuple[ImageReport, ...]:
    """One report per image from what is known of all tokens.

    Parameters
    ----------
    kept : np.ndarray
        ``[T]`` bool.
    order : np.ndarray or None
        ``[T]`` rank of choice, -1 where dropped.
    """
    coords = np.asarray(layout.coords.cpu() if isinstance(layout.coords, Tensor) else layout.coords)
    images, first, segment = [], 0, 0
    for image, sample in enumerate(layout.image_sample):
        segments, before, after = [], 0, 0
        while segment < len(layout.seqlens) and layout.seg_image[segment] == image:
            part = slice(first, first + layout.seqlens[segment])
            segments.append(
                SegmentReport(
                    layout.seg_kind[segment],
                    layout.seg_grid[segment],
                    layout.seg_box[segment],
                    coords[part],
                    kept[part],
                    None if order is None else order[part],
                )
            )
            before, after = before + layout.seqlens[segment], after + int(kept[part].sum())
            first, segment = part.stop, segment + 1
        images.append(ImageReport(sample, before, after, tuple(segments)))
    return tuple(images)


def selection_reports(tokens: VisualTokens, selection: Selection) -> tuple[ImageReport, ...]:
    """What `vtprune.select` chose, per image, as a `Report` would have it. Syncs with the device."""
    kept = np.zeros(len(tokens.source), bool)
    kept[selection.index.cpu().numpy()] = True
    order = None
    if selection.order is not None:
        order = np.full(len(kept), -1)
        order[selection.order.cpu().numpy()] = np.arange(len(selection))
    return image_reports(tokens, kept, order)


def make_report(
    config: PruneConfig,
    layout: BatchLayout,
    rows: Sequence[int],
    trace: Sequence[Trace],
    counts: Sequence[Sequence[int]],
    attending: Mapping[int, Sequence[int]],
    text_config: Any,
    compiled: dict[str, str],
) -> Report:
    """Build the report from what the engine remembered. Syncs with the device.

    Parameters
    ----------
    rows
        Valid rows of each sample before pruning.
    trace
        One entry per stage that fired.
    counts
        Rows of each sample after packing and after each layer stage; empty where nothing was packed.
    attending
        By layer, rows of each sample in its attention, where some sit it out.
    compiled
        As in `Report`.
    """
    total = len(layout.position)
    kept = np.ones(total, dtype=bool)
    order = None
    if trace:
        kept[:] = False
        kept[trace[-1].kept.cpu().numpy()] = True
        if trace[-1].order is not None:
            chosen = trace[-1].order.cpu().numpy()
            order = np.full(total, -1)
            order[chosen] = np.arange(len(chosen))
    images = image_reports(layout, kept, order)
    num_layers = text_config.num_hidden_layers
    dropped = [t.stage.layer + 1 for t in trace if t.stage.layer is not None and not t.stage.reversible]
    borders = [0, *dropped, num_layers]
    steps = counts or [rows]
    flops_after = sum(
        prefill_flops(int(n), text_config, attending[layer][sample] if layer in attending else None)
        for start, end, step in zip(borders[:-1], borders[1:], steps, strict=True)
        for layer in range(start, end)
        for sample, n in enumerate(step)
    )
    keep = config.budget().keep
    notes = [
        f"keep={keep} is more than the {m.tokens_in} tokens of image {i}: all kept"
        for i, m in enumerate(images)
        if isinstance(keep, int) and keep > m.tokens_in
    ]
    left = next((t.kept for t in trace if isinstance(t.stage, TowerStage)), None)
    if left is not None:
        ends = np.cumsum([m.tokens_in for m in images])
        found = np.diff(np.searchsorted(left.cpu().numpy(), [0, *ends]))
        notes += [
            f"keep={keep} asks for more of image {i} than the {n} tokens that the vision tower left"
            for i, (m, n) in enumerate(zip(images, found, strict=True))
            if config.budget().image_count(m.tokens_in) > n and keep != 1.0
        ]
    return Report(
        method=config.label,
        keep=config.keep,
        samples=len(rows),
        images=images,
        tokens_in=total,
        tokens_out=int(kept.sum()),
        ratio=float(kept.sum()) / total if total else 1.0,
        stages=tuple(t.stage.name for t in trace),
        flops_before=num_layers * sum(prefill_flops(int(n), text_config) for n in rows),
        flops_after=flops_after,
        info={k: v for t in trace for k, v in t.info.items()},
        notes=tuple(notes),
        compiled=dict(compiled),
        tower_left=None if left is None else len(left),
    )
