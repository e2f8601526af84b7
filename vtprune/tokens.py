# SPDX-License-Identifier: Apache-2.0
"""What a pruner sees (`VisualTokens`) and what it returns (`Selection`).

Both are *flat ragged rows*: the visual tokens of a whole batch lie in one ``[T, D]`` tensor, sorted by sample, image,
segment and raster order, and host-side tuples say where each segment ends. One call, and one kernel launch, serves a
batch of samples with different images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kernels._jit import on_device
from .kernels.select import Picks

if TYPE_CHECKING:
    from .budget import Pools

#: What a segment can be.
SEGMENT_KINDS = ("image", "thumbnail", "crop", "frame")


@dataclass(frozen=True)
class Probe:
    """A small tensor that the engine captures because a pruner declared that it `needs` (or `wants`) it.

    Parameters
    ----------
    name
        ``"cls_row"``: how much the CLS token of the vision encoder attends to each visual token, ``[T]`` fp32, mean
        over heads.
        ``"pre_projector"``: the encoder rows that feed the projector, ``[T * r, d_v]`` with ``r`` rows per visual
        token (1 for LLaVA, 4 for Qwen's 2x2 PatchMerger), in the order of ``VisualTokens.features``.

        The others (`LAYER_PROBES`) come from decoder layer `layer` of the language model, and are there at stages after
        that layer. Attention is after the softmax over all keys that the query sees, mean over query heads, fp32:

        ``"last_query_row"``: how much the last token of the prompt attends to each visual token, ``[T]``.
        ``"text_rows"``: how much each token of the question does, ``[T, max(text_lens)]``; 0 beyond the question.
        ``"column_sums"``: how much all rows of the prompt do, pictures and all text, summed over them, ``[T]``.
        ``"hidden"``: what the layer puts out for each visual token, ``[T, D]``.
        ``"ffn_act"``: what feeds the down projection of the layer's FFN (activated gate times up), of *every* row of
        the prompts, ``[sum(prompt_lens), d_ff]``; those of the tokens are ``VisualTokens.prompt_rows``.
    layer
        Encoder layer, indexed like a Python list over the layers (-2: the last but one); of `LAYER_PROBES` the decoder
        layer, from 0.
    softmax
        For attention rows of the encoder: after (True) or before (False) the softmax.
    """

    name: str
    layer: int = -2
    softmax: bool = True


CLS_ROW = Probe("cls_row")
CLS_LOGITS = Probe("cls_row", softmax=False)
LAST_CLS_LOGITS = Probe("cls_row", layer=-1, softmax=False)
PRE_PROJECTOR = Probe("pre_projector")
#: Attention rows of decoder layers, and all probes inside the language model.
ATTENTION_ROWS = frozenset({"last_query_row", "text_rows", "column_sums"})
LAYER_PROBES = ATTENTION_ROWS | {"hidden", "ffn_act"}


@dataclass(frozen=True)
class Stage:
    """Where a pruner acts.

    Parameters
    ----------
    layer
        None: on the projected rows, before the language model (``"projector"``). An int K: after decoder layer K has
        run (0-based), that is on the input of layer K + 1.
    keep
        Budget of this stage, where a method prunes in several steps; None takes the budget of the call.
    reversible
        Nothing is dropped: tokens that are not selected sit out the attention of layer K + 1, and are there again after
        it. Inside the language model only.
    """

    layer: int | None = None
    keep: float | int | None = None
    reversible: bool = False

    @property
    def name(self) -> str:
        if self.layer is None:
            return "projector"
        return f"attention of layer {self.layer + 1}" if self.reversible else f"layer {self.layer}"


PROJECTOR = Stage()


def cu_seqlens_of(lens: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Cumulated lengths with a leading 0, ``[len(lens) + 1]`` int64; shared, not to be written to."""
    return on_device((0, *accumulate(lens)), torch.get_default_device() if device is None else torch.device(device))


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one batch, separators (newlines, vision_start/end) excluded.

    Rows are sorted by sample, image (a video counts as one image), segment (AnyRes view or video frame) and raster
    order inside the segment.

    Parameters
    ----------
    features : Tensor
        ``[T, D]``, model dtype. Projected rows at the projector stage, hidden states at a layer stage.
    seqlens : tuple of int
        Tokens per segment, on the host. Zero is allowed.
    source : Tensor
        ``[T]`` int64, rank of each token among all placeholders of the batch in row-major (sample, position) order:
        the way back to the prompt. AnyRes crops are not contiguous there.
    coords : Tensor
        ``[T, 3]`` fp32: time, row, column inside the segment (frame index, patch row, patch column).
    seg_image : tuple of int
        Image of each segment, counted over the batch.
    image_sample : tuple of int
        Sample of each image.
    seg_kind : tuple of str
        One of `SEGMENT_KINDS` per segment.
    seg_grid : tuple of (int, int)
        Rows and columns of the token grid of each segment (before unpadding, so an AnyRes crop may hold fewer tokens).
    seg_box : tuple of (float, float, float, float)
        Top, left, bottom, right of each segment's grid, in fractions of the picture that the model was given. An AnyRes
        grid is padded to whole crops, so its boxes reach beyond 0 and 1.
    image_grid : tuple of (int, int, int)
        Per image, how its segments are arranged: ``(frames, rows of crops, columns of crops)``; (1, 1, 1) for one view.
    image_size : tuple
        Per image the size ``(height, width)`` in pixels where the model is told of it, else None.
    text, text_lens
        Input embeddings of the question ``[sum(text_lens), D]`` and its length per sample; None where there is no text.
        At a layer stage, the hidden states of the same tokens.
    text_ids
        Token ids of the question per sample, on the host; None where there is no text, or embeddings were given.
    pair_text : Tensor or None
        ``[images, D]`` fp32: mean input embedding of the text between each image and the next one of its sample (after
        the last image: of the question); zeros where there is none. For methods that look at the question.
    prompt_rows, prompt_lens
        Where the tokens stand among all rows of the prompts (text, separators, pictures, sample after sample, without
        padding), ``[T]`` int64, and how many rows each sample has, on the host. None before the language model.
    probes : dict
        Captured tensors by `Probe`; see there for shapes.
    projector : callable or None
        Maps pre-projector rows ``[n * r, d_v]`` to ``[n, D]``.
    vocabulary : Tensor or None
        ``[V, D]``, the input embeddings of the language model; not a copy.
    checkpoint
        Where the model was loaded from: a folder, a hub name, or empty.
    ctx : dict
        Free for the pruner; the same object is handed to every stage of one call.
    """

    features: Tensor
    seqlens: tuple[int, ...]
    source: Tensor
    coords: Tensor
    seg_image: tuple[int, ...]
    image_sample: tuple[int, ...]
    seg_kind: tuple[str, ...]
    seg_grid: tuple[tuple[int, int], ...]
    seg_box: tuple[tuple[float, float, float, float], ...]
    image_grid: tuple[tuple[int, int, int], ...]
    image_size: tuple[tuple[int, int] | None, ...]
    text: Tensor | None = None
    text_lens: tuple[int, ...] | None = None
    text_ids: tuple[tuple[int, ...], ...] | None = None
    pair_text: Tensor | None = None
    prompt_rows: Tensor | None = None
    prompt_lens: tuple[int, ...] | None = None
    probes: dict[Probe, Tensor] = field(default_factory=dict)
    projector: Callable[[Tensor], Tensor] | None = None
    vocabulary: Tensor | None = field(default=None, repr=False)
    checkpoint: str = ""
    ctx: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the features are."""
        return self.features.device

    @property
    def num_images(self) -> int:
        """Pictures and clips of the batch."""
        return len(self.image_sample)

    @property
    def num_samples(self) -> int:
        """Samples up to the last that has a picture."""
        return max(self.image_sample, default=-1) + 1

    @property
    def cu_seqlens(self) -> Tensor:
        """``[S + 1]`` int64 on the device of the features: where each segment starts."""
        return cu_seqlens_of(self.seqlens, self.device)

    @functools.cached_property
    def image_lens(self) -> tuple[int, ...]:
        """Tokens per image."""
        lens = [0] * self.num_images
        for image, n in zip(self.seg_image, self.seqlens, strict=True):
            lens[image] += n
        return tuple(lens)

    @property
    def image_rank(self) -> tuple[int, ...]:
        """Index of each image within its own sample: the same alone or in a batch, so it may seed a generator."""
        seen: dict[int, int] = {}
        ranks = []
        for sample in self.image_sample:
            ranks.append(seen.get(sample, 0))
            seen[sample] = ranks[-1] + 1
        return tuple(ranks)

    def sample_lens(self, batch: int) -> tuple[int, ...]:
        """Tokens per sample of a batch; samples without images count 0."""
        lens = [0] * batch
        for sample, n in zip(self.image_sample, self.image_lens, strict=True):
            lens[sample] += n
        return tuple(lens)

    def subset(self, index: Tensor, cu_seqlens: Tensor | None, seqlens: tuple[int, ...] | None = None) -> VisualTokens:
        """The tokens of a `Selection` as `VisualTokens` of their own, for a later stage. Syncs once, for `seqlens`,
        where these are not given.

        Parameters
        ----------
        index, cu_seqlens
            As in `Selection`.
        seqlens
            What is left of each segment, on the host; `cu_seqlens` is not looked at then.
        """
        if seqlens is None:
            assert cu_seqlens is not None
            seqlens = tuple(torch.diff(cu_seqlens).tolist())
        rows = self.features.shape[0]
        # Activations belong to rows of the packed prompt, which are other rows after a stage.
        own = {p: v for p, v in self.probes.items() if p.name != "ffn_act"}
        probes = {p: v.view(rows, len(v) // max(rows, 1), *v.shape[1:])[index].flatten(0, 1) for p, v in own.items()}
        return replace(
            self,
            features=self.features[index],
            seqlens=seqlens,
            source=self.source[index],
            coords=self.coords[index],
            prompt_rows=None,
            prompt_lens=None,
            probes=probes,
        )

    def to(self, device: torch.device) -> VisualTokens:
        """The same with every tensor of its own on `device` (the vocabulary is the model's, and stays); itself where
        they are there already."""
        moved: dict[str, Any] = {
            f.name: value.to(device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor) and f.name != "vocabulary" and value.device != device
        }
        if any(value.device != device for value in self.probes.values()):
            moved["probes"] = {probe: value.to(device) for probe, value in self.probes.items()}
        return replace(self, **moved) if moved else self

    def with_probes(self, probes: dict[Probe, Tensor]) -> VisualTokens:
        """The same tokens with more probes."""
        return replace(self, probes={**self.probes, **probes})


@dataclass(frozen=True)
class Selection:
    """The kept tokens.

    Parameters
    ----------
    index : Tensor
        ``[K]`` int64, flat rows of `VisualTokens` that stay, ascending (so ascending per segment as well).
    cu_seqlens : Tensor
        ``[S + 1]`` int64: kept tokens per segment, cumulated, on the device.
    order : Tensor or None
        ``[K]`` the same rows, pool after pool, in the order in which they were chosen.
    features : Tensor or None
        ``[K, D]`` replacement rows (aligned with `index`) where a method merges tokens; positions stay the anchors'.
    info : dict
        What the pruner wants the report to say, for example ``{"importance": "cls"}``.
    """

    index: Tensor
    cu_seqlens: Tensor
    order: Tensor | None = None
    features: Tensor | None = None
    info: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_order(cls, order: Tensor, tokens: VisualTokens, pools: Pools | None = None, **info: str) -> Selection:
        """A selection from flat rows in the order of choice (``[K]``, no row twice); with the `pools` that they were
        chosen from, if these are known, which may spare a launch."""
        index = order.sort().values
        return cls(index, _borders(index, tokens, pools), order, None, info)

    @classmethod
    def from_picks(cls, picks: Picks, tokens: VisualTokens, pools: Pools | None = None, **info: str) -> Selection:
        """A selection from what a greedy op picked; `pools` as above."""
        return cls(picks.index, _borders(picks.index, tokens, pools), picks.order, None, info)

    @classmethod
    def from_mask(cls, mask: Tensor, tokens: VisualTokens, **info: str) -> Selection:
        """A selection from a keep mask ``[T]`` bool. One host sync, for the count: for adaptive methods."""
        index = mask.nonzero().squeeze(-1)
        return cls(index, torch.searchsorted(index, tokens.cu_seqlens), None, None, info)

    def __len__(self) -> int:
        return self.index.shape[0]


def _borders(index: Tensor, tokens: VisualTokens, pools: Pools | None) -> Tensor:
    """`Selection.cu_seqlens`; the host knows them where pools are segments."""
    if pools is not None and pools.lens == tokens.seqlens:
        return cu_seqlens_of(pools.counts, index.device)
    return torch.searchsorted(index, tokens.cu_seqlens)
