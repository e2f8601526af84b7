# SPDX-License-Identifier: Apache-2.0
"""Pruning inside the language model: above a stage each layer has a cache length, and so a mask, of its own.

A stage prunes the input of a layer, in a hook on that layer. The text model's loop knows nothing of it and goes on to
hand out full-length positions and masks, so every layer above the first stage is given its own. No layer runs twice.
Stages that are reversible prune what enters one layer's attention instead (`reversible`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, UnsupportedModelError
from ..tokens import Selection, Stage, VisualTokens
from . import positions as pos
from .layer_probes import row_of
from .prefill import Pack, gather, pack
from .report import Trace
from .reversible import Attending

if TYPE_CHECKING:
    from .call import Call
    from .entry import Entry


def backend(implementation: str) -> str:
    """Which kind of mask an attention implementation takes: ``"flash"`` (2-D), ``"sdpa"`` (bool) or ``"eager"``."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    function = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)
    name = getattr(function, "__name__", "") + implementation
    for kind in ("flash", "sdpa", "eager"):
        if kind in name and "flex" not in name:
            return kind
    raise UnsupportedModelError(
        f"pruning inside the language model does not know the masks of attn_implementation={implementation!r}; "
        "use 'sdpa', 'eager' or a flash attention"
    )


def layer_mask(implementation: str, mask: Tensor, full: bool, queries: int, dtype: torch.dtype) -> Tensor | None:
    """The attention mask for `queries` new slots on a cache whose slots `mask` (``[B, kv]`` bool) describes.

    Parameters
    ----------
    full
        `mask` is all True (a host value, so that no sync is needed).

    Returns
    -------
    Tensor or None
        None where the backend's own causal rule suffices; ``[B, kv]`` bool for flash attention; ``[B, 1, q, kv]``
        bool for sdpa; the same in `dtype` with 0 and the least number for eager.
    """
    kind = backend(implementation)
    slots = mask.shape[1]
    if kind == "flash":
        return None if full else mask
    if kind == "sdpa" and full and (queries == 1 or queries == slots):
        return None
    key = torch.arange(slots, device=mask.device)
    query = key[slots - queries :, None]
    # A padding slot may see itself: a row without any key would give NaN, which would spread through its value.
    allowed = ((key <= query) & mask[:, None, None, :]) | (key == query)
    if kind == "sdpa":
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=mask.device).masked_fill(~allowed, torch.finfo(dtype).min)


def enter_layer(call: Call, layer: int, hidden: Tensor, kw: dict[str, Any], implementation: str) -> Tensor:
    """Prune the input of `layer` if a stage is due, and give the layer its own mask and positions through `kw`."""
    assert call.state is not None
    group = call.state.group(layer)
    if layer == group:
        if call.entry is not None and call.entry.layer == layer:
            hidden = bring_in(call, call.entry, hidden, kw)
        for earlier in call.attending.values():
            earlier.hidden = None
        stage = call.job.layer_stages.get(layer) if call.job is not None and call.packs else None
        if stage is not None and stage.reversible:
            queries = sit_out(call, stage, layer, hidden, kw)
        else:
            hidden = hidden if stage is None else prune_layer(call, stage, layer, hidden, kw)
            queries = hidden.shape[1]
        mask, full = call.state.masks[group], call.state.full[group]
        mask = mask.to(hidden.device)
        call.layer_masks[group] = layer_mask(implementation, mask, full, queries, hidden.dtype)
    kw.update(call.layer_inputs)
    if layer in call.attending:
        kw.update(call.attending[layer].inputs)
    kw["attention_mask"] = call.layer_masks[group]
    return hidden


def prune_cache(call: Call, cache: Any) -> None:
    """Take what the stages dropped out of the caches of the layers below them, now that the prompt is through."""
    state, packs = call.state, call.packs
    assert state is not None and call.job is not None
    last = packs[-1]
    width = last.index.shape[1]
    firsts = sorted(call.job.layer_stages)
    for i, layer in enumerate(cache.layers):
        done = sum(first <= i for first in firsts)  # packs that this layer has seen, after that of the prompt
        if done == len(packs) - 1:
            continue
        index = last.index
        for plan in reversed(packs[done + 1 : -1]):
            index = plan.index.to(index.device).gather(1, index)
        if layer.keys.shape[2] != state.masks[state.group(i)].shape[1]:
            raise InputError(
                f"layer {i} caches {layer.keys.shape[2]} of {state.masks[state.group(i)].shape[1]} slots: something "
                "shortened the cache during the forward (a KV-cache compressor?); leave prune_early_kv off beside it"
            )
        past = layer.keys.shape[2] - packs[done].index.shape[1]
        index = index.to(layer.keys.device)
        if hasattr(layer, "take"):  # it remembers something about its slots (see `decoding.cache`)
            kept = torch.cat([pos.contiguous(len(index), past, 0, index.device), past + index], 1)
            layer.take(kept[:, None].expand(-1, layer.keys.shape[1], -1))
            continue
        index = index[:, None, :, None]
        for name in ("keys", "values"):
            rows = getattr(layer, name)
            setattr(layer, name, torch.cat([rows[:, :, :past], rows[:, :, past:].take_along_dim(index, 2)], 2))
    masks, full = {}, {}
    for first, mask in state.masks.items():
        past = mask.shape[1] - packs[sum(f <= first for f in firsts)].index.shape[1]
        masks[first] = torch.cat([mask[:, :past], last.valid.to(mask.device)], 1)
        full[first] = last.full and (state.full[first] or not past)
    gone = packs[0].index.shape[1] - width
    call.state = replace(state, masks=masks, full=full, length=state.length - gone, floor=state.floor - gone)


class Chosen(NamedTuple):
    """What a stage inside the language model chose of a packed batch ``[B, P]``.

    Parameters
    ----------
    tokens, selection
        What the pruner was shown, and what it said.
    keep : Tensor
        ``[B, P]`` bool, rows that stay: the selection, and all that is no visual token.
    slots : Tensor
        The selection as packed slots ``sample * P + slot``.
    plan, counts
        How the rows that stay would be packed, and how many each sample has.
    """

    tokens: VisualTokens
    selection: Selection
    keep: Tensor
    slots: Tensor
    plan: Pack
    counts: list[int]


def choose(call: Call, stage: Stage, hidden: Tensor) -> Chosen:
    """Let the pruner choose among the visual rows of ``hidden [B, P, D]``, and note what it did."""
    job, state, tokens, slots = call.job, call.state, call.tokens, call.slots
    assert job is not None and state is not None and tokens is not None and slots is not None
    batch, width, dim = hidden.shape
    slots = slots.to(hidden.device)
    flat = hidden.reshape(-1, dim)
    text = None if call.text_slots is None else flat[call.text_slots.to(hidden.device)].detach()
    rows = row_of(slots, width, call.counts[-1])
    tokens = replace(
        tokens, features=flat[slots].detach(), text=text, prompt_rows=rows, prompt_lens=tuple(call.counts[-1])
    ).to(hidden.device)  # this layer may be on another device than the one before
    selection, kept = job.select(tokens, stage, batch)
    alive = torch.arange(len(slots), device=hidden.device) if call.alive is None else call.alive.to(hidden.device)
    order = None if selection.order is None else alive[selection.order]
    call.trace.append(Trace(stage, alive[selection.index], order, selection.info))

    keep = call.packs[-1].valid.to(hidden.device).clone()
    keep.view(-1).index_fill_(0, slots, False)
    slots = slots[selection.index]
    keep.view(-1).index_fill_(0, slots, True)
    counts = np.asarray(call.counts[-1]) - tokens.sample_lens(batch) + kept
    emptied = (counts == 0) & (np.asarray(call.counts[-1]) > 0)  # a row of nothing but padding has nothing to lose
    if emptied.any():
        raise InputError(
            f"sample {int(emptied.argmax())} has pictures and no text, and {job.config.label!r} leaves nothing of it; "
            "add text, or choose another method"
        )
    return Chosen(tokens, selection, keep, slots, pack(keep, counts.tolist()), counts.tolist())


def prune_layer(call: Call, stage: Stage, layer: int, hidden: Tensor, kw: dict[str, Any]) -> Tensor:
    """Drop visual rows of ``hidden [B, P, D]``; returns ``[B, P', D]``."""
    tokens, selection, _, slots, plan, counts = choose(call, stage, hidden)
    state, (batch, width, dim) = call.state, hidden.shape
    assert state is not None
    if selection.features is not None:
        merged = selection.features.to(hidden.dtype)
        hidden = hidden.reshape(-1, dim).index_copy(0, slots, merged).view(batch, width, dim)
    call.packs.append(plan)
    call.counts.append(counts)
    call.tokens = tokens.subset(selection.index, selection.cu_seqlens)
    call.slots = plan.move(slots)
    call.text_slots = None if call.text_slots is None else plan.move(call.text_slots.to(hidden.device))

    above = [first for first in state.masks if first >= layer]
    past = {first: state.masks[first][:, : state.masks[first].shape[1] - width] for first in above}
    call.state = replace(
        state,
        masks={**state.masks, **{f: torch.cat([past[f], plan.valid.to(past[f].device)], 1) for f in above}},
        full={**state.full, **{first: plan.full and (state.full[first] or not past[first].numel()) for first in above}},
    )
    now = {**kw, **call.layer_inputs}
    rotary = tuple(gather(e, plan.index, e.ndim - 2) for e in now["position_embeddings"])
    call.layer_inputs = inputs_of(call, now, rotary, plan.index.shape, hidden.device)
    return gather(hidden, plan.index, 1)


def sit_out(call: Call, stage: Stage, layer: int, hidden: Tensor, kw: dict[str, Any]) -> int:
    """Let the pruner say who takes part in the attention of `layer`; returns Q, with padding."""
    chosen = choose(call, stage, hidden)
    plan, width, state = chosen.plan, hidden.shape[1], call.state
    assert state is not None
    call.attending_rows[layer] = chosen.counts
    past = state.masks[layer][:, : state.masks[layer].shape[1] - width]
    call.state = replace(
        state,
        masks={**state.masks, layer: torch.cat([past, plan.valid.to(past.device)], 1)},
        full={**state.full, layer: plan.full and (state.full[layer] or not past.numel())},
    )
    now = {**kw, **call.layer_inputs}
    everyone = now["position_embeddings"]
    rotary = tuple(gather(e, plan.index, e.ndim - 2) for e in everyone)
    call.attending[layer] = Attending(
        into=plan.index.masked_fill(~plan.valid, -1),
        back=plan.slot_of.masked_fill(~chosen.keep, -1),
        inputs=inputs_of(call, now, rotary, plan.index.shape, hidden.device),
        rotary=everyone,
    )
    return plan.index.shape[1]


def inputs_of(
    call: Call, now: dict[str, Any], rotary: tuple[Tensor, ...], shape: tuple[int, ...], device: torch.device
) -> dict[str, Any]:
    """What a layer gets with ``shape = [B, P]`` rows, in place of what it was given up to `now`."""
    inputs: dict[str, Any] = {"position_embeddings": rotary}
    # Attention backends read these two only for their lengths and for borders between packed sequences.
    if now.get("position_ids") is not None:
        inputs["position_ids"] = pos.contiguous(shape[0], shape[1], call.past, device)
    if now.get("cache_position") is not None:  # older transformers (5.0, 4.57)
        inputs["cache_position"] = call.past + torch.arange(shape[1], device=device)
    return inputs


def bring_in(call: Call, entry: Entry, hidden: Tensor, kw: dict[str, Any]) -> Tensor:
    """Put visual rows into ``hidden [B, P, D]``, which has text alone so far; returns ``[B, P', D]``.

    Text is where it stood among them in the prompt; the projected rows come as they are.
    """
    assert call.state is not None
    width, dim = hidden.shape[1], hidden.shape[2]
    plan = entry.plan
    # Each packed slot of the whole prompt, by the slot that it had in the packed text (at padding and pictures: any).
    text = entry.text.slot_of.gather(1, plan.index).clamp_min(0).to(hidden.device)
    rows = gather(hidden, text, 1)
    slots = entry.slots.to(hidden.device)
    rows = rows.reshape(-1, dim).index_copy(0, slots, entry.rows.to(hidden)).view_as(rows)
    call.slots = entry.visual.to(hidden.device)
    call.packs, call.counts = [plan], [*call.counts, entry.counts]
    masks, full = dict(call.state.masks), dict(call.state.full)
    for first in (first for first in masks if first >= entry.layer):
        past = masks[first][:, : masks[first].shape[1] - width]
        masks[first] = torch.cat([past, plan.valid], 1)
        full[first] = plan.full and (full[first] or not past.numel())
    call.state = replace(call.state, masks=masks, full=full)
    if entry.positions.ndim == 2:
        call.rotary = entry.positions  # the rotary embedding is hooked, and takes them from here
    rotary = entry.rotary(rows, entry.positions)
    call.layer_inputs = inputs_of(call, {**kw, **call.layer_inputs}, rotary, plan.index.shape, hidden.device)
    return rows
