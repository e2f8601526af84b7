# SPDX-License-Identifier: Apache-2.0
"""Pruning a prompt. Kept rows move to the right of a shorter batch, in their original order."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, VTPruneWarning
from ..kernels._jit import constant
from ..kernels.dispatch import resolve
from ..kernels.pack import by_counting, gather_rows, kept_slots
from ..models.base import Family
from . import early
from . import positions as pos
from .first_rows import take_first_rows
from .layout import Placed
from .report import Trace

if TYPE_CHECKING:
    from ..tokens import Selection
    from .call import Call


@dataclass(frozen=True)
class Pack:
    """How a batch ``[B, L]`` becomes a packed batch ``[B, P]``.

    Parameters
    ----------
    index : Tensor
        ``[B, P]`` int64, the old slot of each packed slot. Padding slots, at the left, name a dropped slot.
    valid : Tensor
        ``[B, P]`` bool, False at padding.
    slot_of : Tensor
        ``[B, L]`` int64, packed slot of the last kept row at or before each old slot; -1 where there is none.
    full
        True if no packed slot is padding (a host value).
    starts
        True if every sample is known to keep its first slot, so that no `slot_of` is -1 (a host value).
    """

    index: Tensor
    valid: Tensor
    slot_of: Tensor
    full: bool
    starts: bool = False

    def move(self, slots: Tensor) -> Tensor:
        """Where rows that were kept lie now: ``sample * L + slot`` becomes ``sample * P + slot``."""
        return (slots // self.slot_of.shape[1]) * self.index.shape[1] + self.slot_of.reshape(-1)[slots]


def pack(keep: Tensor, counts: list[int], starts: bool = False) -> Pack:
    """Plan the packing of the rows where `keep` (``[B, L]`` bool) is True.

    Parameters
    ----------
    counts
        ``keep.sum(1)`` as host numbers, so that no sync is needed here.
    starts
        As in `Pack`.
    """
    width, batch = max(counts), len(counts)
    if min(counts) == width:
        index, slot_of = by_counting(keep, width)
        return Pack(index, pos.all_valid(batch, width, keep.device), slot_of, True, starts)
    kept_so_far = keep.cumsum(1)
    # A stable sort brings dropped slots to the left and kept ones, in order, to the right.
    order = torch.argsort(keep.to(torch.int8), dim=1, stable=True)
    index = order[:, keep.shape[1] - width :]
    slot_of = kept_so_far - 1 + (width - kept_so_far[:, -1:])
    slot_of = slot_of.masked_fill(kept_so_far == 0, -1)
    return Pack(index, keep.gather(1, index), slot_of, False, starts)


def pack_chosen(prompt: Prompt, chosen: Tensor | None, counts: list[int]) -> Pack:
    """Plan the packing of a prompt.

    Parameters
    ----------
    chosen : Tensor or None
        ``[K]`` int64, rows of its visual tokens that stay; None: all of them.
    counts
        Rows that stay of each sample.
    """
    starts = prompt.starts_with_text
    if chosen is None:
        return pack(prompt.valid, counts, starts)
    others, position = prompt.placed.others, prompt.placed.position
    if prompt.unpadded and min(counts) == max(counts):
        index, slot_of = kept_slots(chosen, position, others, counts[0])
        return Pack(index, pos.all_valid(len(counts), counts[0], others.device), slot_of, True, starts)
    text = others if prompt.unpadded else others & prompt.valid
    # Not ``keep.view(-1)[position] = True``: that copies the number to the device, and waits for it.
    keep = text.view(-1).index_fill(0, position.index_select(0, chosen), True).view(text.shape)
    return pack(keep, counts, starts)


def gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Take ``index [B, P]`` along `dim` of `x`, whose dim before that is the batch (of size B or 1)."""
    index = index.to(x.device)
    if index.shape[0] == 1 and x.shape[dim - 1] == 1:
        return x.index_select(dim, index[0])
    if x.shape[dim - 1] == 1 and index.shape[0] > 1:
        x = x.expand(*(index.shape[0] if i == dim - 1 else -1 for i in range(x.ndim)))
    shape = [1] * x.ndim
    shape[dim - 1], shape[dim] = index.shape
    size = list(x.shape)
    size[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand(size))


def positions_at(positions: Tensor | None, index: Tensor) -> Tensor:
    """Positions ``[..., B, P]`` of the slots ``index [B, P]``; None stands for positions that are slots."""
    return index if positions is None else gather(positions, index, positions.ndim - 1)


def packed(plan: Pack, embeds: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows ``[B, P, D]`` and positions ``[..., B, P]`` of a packed prompt; see `positions_at`.

    On a GPU one kernel moves both of a batch, and fills padding slots with zeros. Elsewhere, where gradients flow, and
    in a single prompt, for which the GPU waits for the host, each is gathered by itself, with less work for the host;
    padding slots then hold copies of what was dropped.
    """
    trained = torch.is_grad_enabled() and embeds.requires_grad
    together = embeds.device == plan.index.device and (positions is None or positions.device == embeds.device)
    if len(embeds) == 1 or trained or not together or resolve("auto", embeds) != "triton":
        return gather(embeds, plan.index, 1), positions_at(positions, plan.index)
    if positions is None:
        positions = pos.contiguous(embeds.shape[0], embeds.shape[1], 0, embeds.device)
    index = plan.index if plan.full else plan.index.masked_fill(~plan.valid, -1)
    hidden, moved, *_ = gather_rows(index, embeds, positions)
    assert moved is not None
    return hidden, moved


def unpack(hidden: Tensor, slot_of: Tensor, starts: bool = False) -> Tensor:
    """Bring packed rows ``[B, P, D]`` back to the length of the input, ``[B, L, D]``.

    A kept slot gets its own row. A dropped slot, and padding at the right, gets the row of the last kept token before
    it: the row that precedes the next kept token in the packed prompt, and so the one whose logits predict it. That
    makes shifted labels right without touching them, and ``logits[:, -1]`` right for right-padded batches too. Slots
    before the first kept token are zero. With `starts` there are none (see `Pack`).
    """
    slot_of = slot_of.to(hidden.device)
    if starts:
        return gather(hidden, slot_of, 1)
    rows = gather(hidden, slot_of.clamp_min(0), 1)
    return rows.masked_fill((slot_of < 0)[..., None], 0)


class Prompt(NamedTuple):
    """What the host knows of a prompt ``[B, L]``.

    Parameters
    ----------
    valid : Tensor
        ``[B, L]`` bool, False at padding.
    rows : np.ndarray
        ``valid.sum(1)``.
    placed
        Where its visual tokens are.
    visual : np.ndarray
        ``[B]``, how many each sample has.
    unpadded
        Whether all of it is valid.
    starts_with_text
        Whether all of it is valid, and the first row of every sample is no placeholder.
    tail
        Rows after the last picture, the fewest of any sample that has one.
    """

    valid: Tensor
    rows: np.ndarray
    placed: Placed
    visual: np.ndarray
    unpadded: bool
    starts_with_text: bool
    tail: int


def prune_prompt(
    family: Family,
    call: Call,
    kw: dict[str, Any],
    before: pos.CacheState | None,
    prompt: Prompt,
    graph: Callable[[], tuple[Selection, np.ndarray] | None] | None = None,
) -> None:
    """Choose among the visual tokens of a prompt and hand the text model the packed rest, through `kw`.

    Parameters
    ----------
    kw
        Arguments of the text model; changed in place.
    before
        State of the cache that the prompt extends, if it was pruned already.
    graph
        As in `Job.select`.
    """
    job, embeds, valid = call.job, kw["inputs_embeds"], prompt.valid
    batch, length, width = embeds.shape
    positions, next_original = prompt_positions(family, call, kw.get("position_ids"), before, prompt)

    counts, position = prompt.rows, prompt.placed.position
    stage = None if job is None else job.projector_stage
    chosen = left = call.alive  # rows of all visual tokens that stay; first, by the vision tower; None: all
    if left is not None:
        counts = counts - early.dropped(call.seen(), batch)
    if job is not None and stage is not None:
        selection, kept = job.select(call.seen, stage, batch, graph)
        chosen, order = selection.index, selection.order
        if left is not None:
            chosen, order = left[chosen], None if order is None else left[order]
        call.trace.append(Trace(stage, chosen, order, selection.info))
        counts = counts - (prompt.visual if left is None else call.seen().sample_lens(batch)) + kept
        if kw.get("deepstack_visual_embeds") is not None:
            keep_deepstack(kw, prompt.placed.source[chosen])
        if selection.features is not None:
            merged, places = selection.features.to(embeds.dtype), position.index_select(0, chosen)
            embeds = embeds.reshape(-1, width).index_copy(0, places, merged).view(batch, length, width)
        if job.layer_stages:
            call.tokens = call.seen().subset(selection.index, selection.cu_seqlens)
    plan = pack_chosen(prompt, chosen, counts.tolist())
    if kw.get("visual_pos_masks") is not None:
        kw["visual_pos_masks"] = gather(kw["visual_pos_masks"], plan.index, 1) & plan.valid
    next_position = next_original
    rows_left, packed_positions = packed(plan, embeds, positions)
    if job is not None and job.config.positions == "compact":
        start = before.next_position if before is not None else past_rows(kw, call.past, valid)
        renumbered, next_position = pos.advance(start, plan.valid)
        packed_positions = renumbered.expand_as(packed_positions)

    call.packs.append(plan)
    call.counts.append(counts.tolist())
    call.slots = lambda: plan.move(position if chosen is None else position.index_select(0, chosen))
    call.text_slots = None if call.text_slots is None else plan.move(call.text_slots)
    masks, full = (before.masks, before.full) if before is not None else past_masks(kw, call.past, valid)
    stages = {} if job is None else job.layer_stages
    # Where tokens sit out one layer's attention, the next has a cache of its own again.
    after = {layer + 1 for layer, stage in stages.items() if stage.reversible and layer + 1 < len(family.lm.layers)}
    first_layers = {*masks, *stages, *after}
    below = {first: max(k for k in masks if k <= first) for first in sorted(first_layers)}
    call.state = pos.CacheState(
        masks={first: joined(masks[k], plan.valid) for first, k in below.items()},
        full={first: full[k] and plan.full for first, k in below.items()},
        length=call.past + plan.index.shape[1],
        floor=call.past + plan.index.shape[1] - prompt.tail,
        prompt_length=(before.prompt_length if before is not None else call.past) + length,
        next_original=next_original,
        next_position=next_position,
        mrope=family.mrope,
        reach=length if positions is None else None,
    )
    call.set_sequence(kw, rows_left, packed_positions)
    if before is None and not call.past:
        call.first_rows = take_first_rows(family.lm, kw)


def joined(past: Tensor, new: Tensor) -> Tensor:
    """A mask of old slots and new ones."""
    return torch.cat([past, new], 1) if past.shape[1] else new


def keep_deepstack(kw: dict[str, Any], source: Tensor) -> None:
    """Take the rows of kept tokens (``[K]`` ranks among all placeholders) of the features that Qwen3-VL adds to visual
    rows after its first layers. Those are one row per placeholder, in the order of the prompt, and so are the kept."""
    features = kw.get("deepstack_visual_embeds")
    if features is not None:
        source = source.sort().values
        kw["deepstack_visual_embeds"] = [rows[source.to(rows.device)] for rows in features]


def prompt_positions(
    family: Family, call: Call, given: Tensor | None, before: pos.CacheState | None, prompt: Prompt
) -> tuple[Tensor | None, Tensor]:
    """Positions of the unpruned prompt, ``[B, L]``, or ``[3, B, L]`` for M-RoPE, and the next ones, ``[B]``. None for
    positions that are the slots of the prompt."""
    fetched = call.fetched
    slots = given is None or (fetched is not None and fetched.positions is given and fetched.positions_are_slots)
    if slots and before is None and prompt.unpadded and not family.mrope and not call.past:
        batch, length = prompt.valid.shape
        device = prompt.valid.device
        ends = constant(("ends", batch, length), device, lambda: (torch.full((batch,), length, device=device),))
        return None, ends[0]
    positions = _positions(family, call, given, before, prompt.valid)
    following = pos.last_position(positions, None if prompt.unpadded else prompt.valid) + 1
    if before is not None:  # a row that is all padding stays where it was
        following = torch.maximum(following, before.next_original)
    return positions, following


def _positions(
    family: Family, call: Call, given: Tensor | None, before: pos.CacheState | None, valid: Tensor
) -> Tensor:
    batch, length = valid.shape
    if family.mrope and call.ids is not None:
        untyped = family.needs_token_types and "mm_token_type_ids" not in call.given
        if untyped:
            warnings.warn(
                "the inputs have no mm_token_type_ids, without which this transformers version would give pictures "
                "1-D positions; vtprune made them from input_ids. Pass what the model's processor returns",
                VTPruneWarning,
                stacklevel=2,
            )
        if before is not None or untyped:
            types = torch.zeros_like(call.ids)
            for modality, mask in call.masks.items():
                types = types.masked_fill(mask, {"image": 1, "video": 2}[modality])
            inputs = {k: v for e in call.encodings.values() for k, v in e.inputs.items()} | call.given
            start = 0 if before is None else before.next_original[None, :, None]
            return family.rope_index(call.ids, types.int(), valid, inputs).to(valid.device) + start
    if before is not None:
        if family.mrope:
            raise InputError(
                "a new picture on a pruned cache needs input_ids (its M-RoPE positions follow from them); pass "
                "input_ids instead of inputs_embeds, or start with a new cache"
            )
        positions = pos.advance(before.next_original, valid)[0]
        pos.check_continuation(given, positions, valid)
        return positions
    if given is None:
        given = pos.contiguous(1, length, call.past, valid.device)
        given = given.expand(3, -1, -1) if family.mrope else given
    given = pos.without_text_row(given).to(valid.device)
    if family.mrope and given.ndim == 2:  # as the text model itself spreads them
        given = given.expand(3, -1, -1)
    return given.expand(*given.shape[:-2], batch, -1)


def past_masks(kw: dict[str, Any], past: int, valid: Tensor) -> tuple[dict[int, Tensor], dict[int, bool]]:
    """Masks of what an unpruned cache holds, by first layer of a group, and whether they are full."""
    mask = kw.get("attention_mask")
    if mask is None or not past:
        return {0: pos.all_valid(valid.shape[0], past, valid.device)}, {0: True}
    before = mask[:, :past].to(valid.device).bool()
    return {0: before}, {0: bool(before.all())}


def past_rows(kw: dict[str, Any], past: int, valid: Tensor) -> Tensor:
    """Tokens that an unpruned cache holds, ``[B]`` int64."""
    return past_masks(kw, past, valid)[0][0].sum(1)
