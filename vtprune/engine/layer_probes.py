# SPDX-License-Identifier: Apache-2.0
"""Probes inside the language model: attention rows, hidden states and FFN activations, captured while a prompt runs.

No layer runs twice and no attention map is asked of the model. An attention row is recomputed from the layer's own
query of that one token and the keys that the layer has just cached, so it is the same under every attention backend.
Sums over the rows of a whole prompt are made a few rows at a time, and never hold its map either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..kernels.attention_rows import attention_rows
from ..models.base import Family
from ..tokens import Probe, cu_seqlens_of
from .prefill import gather

if TYPE_CHECKING:
    from .call import Call

#: Most attention weights that are held at once while those of a whole prompt are summed up (fp32, 64 MiB).
CHUNK = 1 << 24


def hook(family: Family, probe: Probe, active: Callable[[], Call | None]) -> Any:
    """Hook the one module that has what `probe` asks for; `active` says what the current thread is running."""
    layer = family.lm.layers[probe.layer]

    def put(make: Callable[[Call], Tensor]) -> None:
        call = active()
        if call is None or call.job is None or not call.packs or probe not in call.job.layer_probes:
            return
        assert call.tokens is not None
        with torch.no_grad():
            call.tokens = call.tokens.with_probes({probe: make(call)})

    if probe.name == "ffn_act":
        return layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, args: put(lambda call: prompt_rows(args[0].detach(), call.counts[-1]))
        )
    if probe.name == "hidden":

        def after_layer(_: Any, args: tuple[Any, ...], out: Any) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            put(lambda call: hidden.detach().flatten(0, 1)[_slots(call, hidden.device)])

        return layer.register_forward_hook(after_layer)

    def after_attention(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        put(functools.partial(_rows, family=family, probe=probe, attention=module, args=args, kwargs=kwargs))

    return layer.self_attn.register_forward_hook(after_attention, with_kwargs=True)


def prompt_rows(packed: Tensor, lens: Sequence[int]) -> Tensor:
    """The rows of a packed batch ``[B, P, F]`` that hold tokens, sample after sample, ``[sum(lens), F]``."""
    width = packed.shape[1]
    if all(n == width for n in lens):
        return packed.flatten(0, 1)
    index = np.concatenate([np.arange((b + 1) * width - n, (b + 1) * width) for b, n in enumerate(lens)])
    return packed.flatten(0, 1)[torch.from_numpy(index).to(packed.device, non_blocking=True)]


def row_of(slots: Tensor, width: int, lens: Sequence[int]) -> Tensor:
    """Where packed slots ``sample * P + slot`` lie among `prompt_rows`."""
    ends = np.cumsum(lens)
    shift = torch.from_numpy(ends - width * np.arange(1, len(ends) + 1)).to(slots.device, non_blocking=True)
    return slots + shift[slots // width]


def put_away(cache: Any) -> str | None:
    """Why the keys of a cache cannot be read as they are between two layers, in one word; None where they can."""
    if getattr(cache, "offloading", False):
        return "offloaded"
    if any(hasattr(layer, "_dequantize") for layer in getattr(cache, "layers", ())):
        return "quantised"
    return None


def _slots(call: Call, device: torch.device) -> Tensor:
    assert call.slots is not None
    return call.slots.to(device)


def _rows(
    call: Call, family: Family, probe: Probe, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """``[T]`` for the last row of the prompt, or the sum of all; ``[T, Q]`` for those of the question."""
    assert call.state is not None and call.tokens is not None
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    rotary = kwargs["position_embeddings"]
    batch, width, _ = hidden.shape
    mask = call.state.masks[call.state.group(probe.layer)].to(hidden.device)
    past = mask.shape[1] - width
    part = call.attending.get(probe.layer)
    if part is not None and part.hidden is not None:
        # Rows that sit this attention out are told what they would have been attended to, as if nobody had.
        hidden, rotary = part.hidden, part.rotary
        width = hidden.shape[1]
        mask = torch.cat([mask[:, :past], call.packs[-1].valid.to(mask.device)], 1)
    cache = kwargs.get("past_key_values")
    if cache is None or (past == 0 and put_away(cache)):
        k = family.key_heads(attention, hidden, rotary)
    else:
        k = cache.layers[probe.layer].keys
        if part is not None:
            k = torch.cat([k[:, :, :past], family.key_heads(attention, hidden, rotary).to(k.dtype)], 2)
    if k.shape[2] != mask.shape[1]:
        raise UnsupportedModelError(
            f"layer {probe.layer} caches {k.shape[2]} keys where {mask.shape[1]} tokens were passed; pruning inside "
            "the language model needs a dynamic cache, which a compressor may shorten only after vtprune (apply first)"
        )
    slots = _slots(call, hidden.device)

    def heads(rows: Tensor) -> Tensor:
        turned = tuple(gather(e, rows, e.ndim - 2) for e in rotary)
        return family.query_heads(attention, gather(hidden, rows, 1), turned)

    if probe.name == "column_sums":
        total = torch.zeros(batch, mask.shape[1], device=hidden.device)
        every, real = torch.arange(width, device=hidden.device), mask[:, past:]
        step = max(1, CHUNK // (batch * family.lm.config.num_attention_heads * mask.shape[1]))
        for rows in every.split(step):
            at = (past + rows).expand(batch, -1).masked_fill(~real[:, rows], -1)
            sums = attention_rows(
                heads(rows.expand(batch, -1)), k, scale=attention.scaling, mask=mask, slots=at, mean=True
            )
            total += sums * real[:, rows].sum(1, keepdim=True)
        return total[slots // width, past + slots % width]
    query = hidden.new_full((batch, 1), width - 1, dtype=torch.int64)  # prompts end at the right
    inside = None
    if probe.name == "text_rows":
        query, inside = _text_queries(call, batch, width, hidden.device)
    q = heads(query)
    at = query + past if inside is None else (query + past).masked_fill(~inside, -1)
    rows = attention_rows(q, k, scale=attention.scaling, mask=mask, slots=at)  # [B, Q, kv]
    picked = rows.transpose(1, 2)[slots // width, past + slots % width]
    return picked.squeeze(1) if inside is None else picked


def _text_queries(call: Call, batch: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Slots of each sample's question, padded to ``[B, Q]``, and which of them are no padding."""
    tokens, slots = call.tokens, call.text_slots
    assert tokens is not None and tokens.text_lens is not None and slots is not None
    start = cu_seqlens_of(tokens.text_lens, device)
    lane = torch.arange(max(1, *tokens.text_lens), device=device)
    inside = lane < start.diff()[:, None]
    if not slots.shape[0]:
        return torch.zeros_like(inside, dtype=torch.int64), inside
    at = (start[:-1, None] + lane).clamp_max(slots.shape[0] - 1)
    # A lane without a token reads whatever row: it is masked.
    return slots.to(device)[at] % width, inside
