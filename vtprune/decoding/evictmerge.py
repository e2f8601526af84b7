# SPDX-License-Identifier: Apache-2.0
"""Evict-then-merge for the visual part of the KV cache: fewer entries per head once the prompt is through.

The prompt runs as it is. Hooks on the attention modules sum up how much each visual token is attended to, some rows at
a time. Then every KV head of every layer keeps the entries that matter to it, and of the others those that are like one
of these are merged into it. From there the engine carries the cache on like any pruned one.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..engine import positions as pos
from ..engine.attach import Engine, watching
from ..engine.call import Call
from ..engine.layer_probes import put_away
from ..errors import ConfigError, InputError, UnsupportedModelError, VTPruneWarning
from ..models import find_family
from ..models.base import Family
from ..tokens import Probe
from .rows import attention_rows, chunks
from .vasparse import Step, fresh_state

SCORES = ("global-local", "global", "local", "random")


@dataclass
class Heard:
    """What one prompt taught: the forward that it was in, and by layer ``[B, Hkv, kv]`` fp32 attention received."""

    step: Step | None = None
    everywhere: dict[int, Tensor] = field(default_factory=dict)
    lately: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def evictmerge(
    model: nn.Module,
    *,
    keep: float = 0.25,
    merge: bool = True,
    threshold: float = 0.6,
    window: int = 16,
    score: str = "global-local",
    seed: int = 0,
) -> Iterator[None]:
    """Within this block, every KV head keeps a share of its visual entries; what is like a kept one is merged into it.

    Of token t in one KV head of one layer, with a[q, t] the attention (after the softmax, mean over the query heads
    that share the KV head) of row q of the prompt: ``G[t]`` is the mean of a[q, t] over the rows that see t, ``L[t]``
    the sum over the last `window` rows. Each is divided by its sum over the visual tokens of the sample, and the
    importance is ``s[t] = max(G[t], L[t])``. The ``max(1, floor(n keep))`` tokens with the largest s stay. Every other
    token i looks for the kept c whose key is most like its own; below a cosine of `threshold` it is gone, else it is a
    member of c, and ``(k, v)[c] <- sum s (k, v) / sum s`` over c and its members. What has no member keeps every bit.
    Text stays.

    Paper: "EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on Global-Local
    Importance", 2024, https://arxiv.org/abs/2412.08521. Written from its abstract and what is told of it; its formulas
    were not at hand. In: importance from global and local attention together, separately for each head; eviction and
    merging in one pass, where what is like no centre belongs to a class of zero and is lost. Left out: how much to
    evict and how much to merge by each head's sparsity and redundancy (here `threshold` says so), the kernel for the
    score, compression of text, and again while the answer grows. Deviations: only visual tokens; once, after the
    prompt; the mean instead of the sum for G, since under a causal mask early tokens have more rows that see them;
    weights, threshold and window are ours.

    It pays where answers are long or many and memory counts. What is asked after the eviction is answered worse than
    under chance at 1/2, and better at 1/9; merging adds little to eviction (``docs/neighbours.md``, pocket
    models). It may add more where the prompt ends in the question, or is thousands of tokens long.

    Example, one head, three visual tokens, G = [.5, .3, .2] and L = [.1, .1, .8] (divided already): s = [.5, .3, .8],
    and of two that may stay token 1 goes. Its key is [1, 0], those of 0 and 2 are [1, 1] and [0, 1]: cosines .71 and 0,
    so it is merged into token 0, whose key becomes (.5 [1, 1] + .3 [1, 0]) / .8 = [1, .625].

    Parameters
    ----------
    model
        A model of a supported family, with or without `vtprune.apply` on it.
    keep
        Share of the visual entries that stay, in (0, 1]; 1.0 switches everything off.
    merge
        Merge what is evicted; False: it is gone (plain eviction).
    threshold
        Least cosine of two keys at which one is merged into the other, in [-1, 1].
    window
        Rows at the end of the prompt whose attention is the local one.
    score
        ``"global-local"``, one of the two alone, or ``"random"``: chance, a control.
    seed
        Of ``"random"``.

    Raises
    ------
    ConfigError
        A value cannot be used.
    UnsupportedModelError
        Attention rows of this model cannot be recomputed.
    InputError
        By the forward: no KV cache, or one that entries cannot be taken out of (static, sliding-window, quantised,
        offloaded); a method that prunes inside the language model.

    Warns
    -----
    VTPruneWarning
        At the end of the block, if it saw no prompt with pictures.

    Notes
    -----
    The block holds for its own thread. The first token of an answer is the unpruned model's: entries go after it. The
    cache must not be used once the block is left, unless `vtprune.apply` is on the model; it refuses.

    Examples
    --------
    >>> with vtprune.decoding.evictmerge(model, keep=0.25):
    ...     output = model.generate(**inputs, max_new_tokens=256)
    """
    _check(keep, merge, threshold, window, score, seed)
    if keep == 1.0:
        yield
        return
    family = find_family(model)
    if not all(family.has_layer_probe(Probe("last_query_row", i)) for i in range(len(family.lm.layers))):
        raise UnsupportedModelError(
            f"evictmerge needs attention rows of every layer, which this {family.label} decoder cannot give; use "
            "keep=1.0"
        )
    session = Session(family, keep=float(keep), merge=merge, threshold=threshold, window=window, score=score, seed=seed)
    with watching(family, session.note) as engine:
        session.attach(engine)
        try:
            yield
        finally:
            session.detach()
        if not session.fired:
            warnings.warn(f"evictmerge changed nothing: {engine.silence}", VTPruneWarning, stacklevel=3)


@dataclass
class Session:
    """The hooks of one block. What it learns about a prompt lives in the marks of its call."""

    family: Family
    keep: float
    merge: bool
    threshold: float
    window: int
    score: str
    seed: int
    fired: bool = False
    handles: list[Any] = field(default_factory=list)

    def attach(self, engine: Engine) -> None:
        self.engine = engine
        lm = self.family.lm
        self.handles = [
            lm.register_forward_pre_hook(self._enter, with_kwargs=True),
            lm.register_forward_hook(self._leave, with_kwargs=True),
        ]
        for index, layer in enumerate(lm.layers):
            hook = functools.partial(self._attended, index)
            self.handles.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()

    def note(self, call: Call) -> None:
        """A prompt with pictures is about to run."""
        call.marks[id(self)] = Heard()

    def _heard(self) -> Heard | None:
        call = self.engine.local.call
        return None if call is None else call.marks.get(id(self))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        heard = self._heard()
        if heard is None:
            return None
        use = kwargs.get("use_cache")
        kw, cache = dict(kwargs), kwargs.get("past_key_values")
        if not (self.family.lm.config.use_cache if use is None else use):
            raise InputError(
                "evictmerge takes entries out of the KV cache, but use_cache is False; use it, or keep=1.0"
            )
        if cache is None:
            cache = kw["past_key_values"] = DynamicCache(config=self.family.lm.config)
        if getattr(cache, "is_compileable", False) or put_away(cache):
            raise InputError(
                f"evictmerge cannot take entries out of a {put_away(cache) or 'static'} {type(cache).__name__}; use a "
                "plain DynamicCache, or keep=1.0"
            )
        mask = kw.get("attention_mask")
        mask = mask.get("full_attention") if isinstance(mask, dict) else mask
        call, embeds = self.engine.local.call, kw["inputs_embeds"]
        past, (batch, rows) = int(cache.get_seq_length()), embeds.shape[:2]
        heard.step = Step(call, past, batch, rows, embeds.device, mask, kw.get("position_ids"), None)
        return args, kw

    @torch.no_grad()
    def _attended(self, index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Sum up what the keys of this layer were attended to."""
        heard = self._heard()
        if heard is None or heard.step is None or self.score == "random":
            return
        step = heard.step
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        keys = kwargs["past_key_values" if "past_key_values" in kwargs else "past_key_value"].layers[index].keys
        length, rows = keys.shape[2], hidden.shape[1]
        valid = step.valid(index, length).to(keys.device)
        slots = torch.arange(length - rows, length, device=keys.device)
        real = valid[:, -rows:]
        late = real & (real.flip(1).cumsum(1).flip(1) <= self.window)
        query = self.family.query_heads(module, hidden, kwargs["position_embeddings"])
        totals = torch.zeros(2, *keys.shape[:3], device=keys.device)
        for part in chunks(query, length):
            weights = attention_rows(query[:, :, part], keys, slots[part], valid, module.scaling).mean(2)
            for total, asks in zip(totals, (real, late), strict=True):
                total += torch.einsum("bhqk,bq->bhk", weights, asks[:, part].float())
        # How many rows see a key: those at its slot and after it.
        seen = torch.cat([real.sum(1, keepdim=True).expand(-1, length - rows), real.flip(1).cumsum(1).flip(1)], 1)
        heard.everywhere[index] = totals[0] / seen[:, None].clamp(min=1)
        heard.lately[index] = totals[1]

    @torch.no_grad()
    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        heard, call = self._heard(), self.engine.local.call
        if heard is None or heard.step is None or call is None:
            return
        assert call.slots is not None
        self.fired = True
        step, cache = heard.step, kwargs["past_key_values"]
        state = pos.state_of(cache) or fresh_state(cache, step, self.family.mrope)
        if len(state.masks) > 1:
            raise InputError(
                "evictmerge does not combine with pruning inside the language model, whose layers hold different "
                "visual tokens; use a method that prunes at the projector"
            )
        valid, own = state.masks[0], torch.bincount(call.slots // step.rows, minlength=step.batch)
        # One wait for the device a prompt: how many entries each row has.
        lens, held = torch.stack([own, valid.sum(1).to(own.device)]).tolist()
        keeps = [max(min(n, 1), int(n * self.keep + 1e-6)) for n in lens]
        if lens == keeps:
            return
        rest = [n - a + k for n, a, k in zip(held, lens, keeps, strict=True)]
        slots = (step.past + call.slots % step.rows).split(lens)
        odd = next((layer for layer in cache.layers if type(layer) is not DynamicLayer), None)
        if odd is not None:
            raise InputError(
                f"evictmerge cannot take entries out of a {type(odd).__name__}; use a plain DynamicCache, without "
                "sliding windows and without another method on its layers (vasparse), or keep=1.0"
            )
        for index, layer in enumerate(cache.layers):
            mask = self._evict(layer, index, heard, slots, keeps, valid.to(layer.keys.device), max(rest))
        state = replace(
            state,
            masks={0: mask.to(valid.device)},
            full={0: all(n == max(rest) for n in rest)},
            length=max(rest),
            floor=max(rest),
        )
        pos.commit(cache, state, self.engine.caches)

    def _evict(
        self,
        layer: Any,
        index: int,
        heard: Heard,
        slots: tuple[Tensor, ...],
        keeps: list[int],
        valid: Tensor,
        width: int,
    ) -> Tensor:
        """Shorten one layer to `width` slots; returns ``[B, width]`` bool, which of them hold entries."""
        keys, values = layer.keys.clone(), layer.values.clone()
        stays = valid[:, None].expand(-1, keys.shape[1], -1).clone()
        for b, (mine, count) in enumerate(zip(slots, keeps, strict=True)):
            mine = mine.to(keys.device)
            if not len(mine):
                continue
            worth = self._worth(index, heard, b, mine, keys.shape[1])
            order = worth.argsort(dim=1, descending=True, stable=True)
            kept, gone = order[:, :count].sort(1).values, order[:, count:].sort(1).values
            stays[b].scatter_(1, mine[gone], False)
            if self.merge and count < len(mine):
                k, v = merged(keys[b][:, mine], values[b][:, mine], worth, kept, gone, self.threshold)
                at = mine[kept][..., None]
                keys[b].scatter_(1, at.expand_as(k), k)
                values[b].scatter_(1, at.expand_as(v), v)
        # A stable sort brings what goes, and padding, to the left, and what stays, in order, to the right.
        take = stays.to(torch.int8).argsort(dim=-1, stable=True)[..., stays.shape[2] - width :]
        layer.keys, layer.values = (x.take_along_dim(take[..., None], 2) for x in (keys, values))
        return stays.gather(2, take)[:, 0]

    def _worth(self, index: int, heard: Heard, sample: int, slots: Tensor, heads: int) -> Tensor:
        """``[Hkv, n]`` fp32, the importance of the visual tokens at `slots`."""
        if self.score == "random":
            drawn = torch.rand(heads, len(slots), generator=torch.Generator().manual_seed(1000 * self.seed + index))
            return drawn.to(slots.device)
        parts = [
            share / share.sum(1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
            for name, table in (("global", heard.everywhere), ("local", heard.lately))
            if name in self.score
            for share in (table[index][sample][:, slots],)
        ]
        return functools.reduce(torch.maximum, parts).nan_to_num(nan=-1.0)


def merged(
    keys: Tensor, values: Tensor, worth: Tensor, kept: Tensor, gone: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """What becomes of kept entries when each of the others is merged into the one whose key is most like its own.

    Parameters
    ----------
    keys, values : Tensor
        ``[H, n, d]``.
    worth : Tensor
        ``[H, n]`` fp32 weights, not negative.
    kept, gone : Tensor
        ``[H, K]`` and ``[H, n - K]`` int64, together all of n.
    threshold
        Least cosine; an entry that is like nothing belongs to no class. Ties go to the first.

    Returns
    -------
    Tensor, Tensor
        ``[H, K, d]``; rows without members as they were.
    """
    unit = nn.functional.normalize(keys.float(), dim=-1)
    near = unit.take_along_dim(gone[..., None], 1) @ unit.take_along_dim(kept[..., None], 1).mT
    like, home = near.max(-1)
    weight = worth.clamp(min=0)
    member = nn.functional.one_hot(home, kept.shape[1]) * (like >= threshold)[..., None]
    shares = member.float() * weight.gather(1, gone)[..., None]  # [H, n - K, K]
    own = weight.gather(1, kept)[..., None]
    total = own + shares.sum(1)[..., None]
    found = []
    for rows in (keys, values):
        centre = rows.take_along_dim(kept[..., None], 1)
        # A product of matrices, unlike scatter_add on a GPU, is the same every time.
        sums = own * centre.float() + shares.mT @ rows.take_along_dim(gone[..., None], 1).float()
        joined = (sums / total.clamp(min=torch.finfo(torch.float32).tiny)).to(rows.dtype)
        found.append(torch.where(shares.sum(1)[..., None] > 0, joined, centre))
    return found[0], found[1]


def _check(keep: Any, merge: Any, threshold: Any, window: Any, score: Any, seed: Any) -> None:
    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    if not number(keep) or not 0 < keep <= 1:
        raise ConfigError(f"keep={keep!r} must be a share in (0, 1]; 1.0 switches evictmerge off")
    if not isinstance(merge, bool):
        raise ConfigError(f"merge={merge!r} must be True or False")
    if not number(threshold) or not -1 <= threshold <= 1:
        raise ConfigError(f"threshold={threshold!r} is no cosine; give a number from -1 to 1")
    for name, value, least in (("window", window, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r} must be a whole number, at least {least}")
    if score not in SCORES:
        raise ConfigError(f"score={score!r} is unknown; use one of {', '.join(map(repr, SCORES))}")
