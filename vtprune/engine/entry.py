# SPDX-License-Identifier: Apache-2.0
"""Visual tokens that enter between two layers: below, the language model runs text alone; from there on, everything.

This is pruning upside down. The prompt is packed to its text, and layers below the entry cache that alone; at the entry
the projected rows are put where they stood (`layers.bring_in`), and layers from there on have caches, masks and
positions of the whole prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedModelError
from ..models.base import Family
from . import positions as pos
from .prefill import Pack, Prompt, gather, joined, pack, past_masks, positions_at, prompt_positions

if TYPE_CHECKING:
    from .call import Call


@dataclass(frozen=True)
class Entry:
    """What enters, before which decoder layer, and where.

    Parameters
    ----------
    layer
        From 0.
    text, plan : Pack
        How the prompt ``[B, L]`` is packed to its text, and to all of its rows.
    rows : Tensor
        ``[R, D]``: everything that came out of the projector, newlines among the views of a picture included.
    slots, visual : Tensor
        Where these rows, and which of them visual tokens (``[T]``), stand in the packed prompt, ``sample * P + slot``.
    positions : Tensor
        ``[B, P]`` or, for M-RoPE, ``[3, B, P]``: positions of the packed prompt.
    rotary
        The model's rotary embedding.
    counts
        Rows of each sample from `layer` on.
    """

    layer: int
    text: Pack
    plan: Pack
    rows: Tensor
    slots: Tensor
    visual: Tensor
    positions: Tensor
    rotary: Any
    counts: list[int]


def hold_back(
    family: Family,
    call: Call,
    kw: dict[str, Any],
    before: pos.CacheState | None,
    prompt: Prompt,
    layer: int,
) -> None:
    """Hand the text model the text of a prompt alone, through `kw`, and note what enters before `layer`.

    Parameters
    ----------
    kw, before, prompt
        As for `prune_prompt`.
    """
    if kw.get("deepstack_visual_embeds") is not None:
        raise UnsupportedModelError(
            "this model adds features of its encoder to the visual tokens of its first layers (DeepStack), where they "
            "would not be yet; visual tokens cannot enter later"
        )
    embeds, slots, valid, rows = kw["inputs_embeds"], call.slots, prompt.valid, prompt.rows
    assert slots is not None
    length, width = embeds.shape[1:]
    positions, next_original = prompt_positions(family, call, kw.get("position_ids"), before, prompt)

    held = torch.stack(list(call.masks.values())).any(0).to(embeds.device)
    flat = held.reshape(-1).nonzero().squeeze(1)  # waits for the device: this is an experiment, not a way to save time
    held_per_sample = held.sum(1).cpu().numpy()
    bare = (held_per_sample > 0) & (held_per_sample == rows)
    if bare.any():
        raise InputError(
            f"sample {int(bare.argmax())} has pictures and no text, so the layers below {layer} would have nothing of "
            "it; add text"
        )
    text = pack(valid & ~held, (rows - held_per_sample).tolist())
    plan = pack(valid, rows.tolist())
    packed_width = plan.index.shape[1]

    def moved(at: Tensor) -> Tensor:
        return (at // length) * packed_width + plan.slot_of.reshape(-1)[at]

    call.entry = Entry(
        layer=layer,
        text=text,
        plan=plan,
        rows=embeds.reshape(-1, width)[flat],
        slots=moved(flat),
        visual=moved(slots),
        positions=positions_at(positions, plan.index),
        rotary=family.lm.rotary_emb,
        counts=rows.tolist(),
    )
    call.slots = None
    call.packs.append(text)
    call.counts.append((rows - held_per_sample).tolist())
    masks, full = (before.masks, before.full) if before is not None else past_masks(kw, call.past, valid)
    below = {first: max(k for k in masks if k <= first) for first in sorted({*masks, layer})}
    call.state = pos.CacheState(
        masks={first: joined(masks[k], text.valid) for first, k in below.items()},
        full={first: full[k] and text.full for first, k in below.items()},
        length=call.past + text.index.shape[1],
        floor=call.past + text.index.shape[1] - prompt.tail,
        prompt_length=(before.prompt_length if before is not None else call.past) + length,
        next_original=next_original,
        next_position=next_original,
        mrope=family.mrope,
    )
    call.set_sequence(kw, gather(embeds, text.index, 1), positions_at(positions, text.index))
