# SPDX-License-Identifier: Apache-2.0
"""VASparse (arXiv 2501.06553): decoding against hallucination. Contrast, selection in the KV cache, sink penalty.

Hooks on the text model and on its attention modules see queries, positions and masks; the cache's own layers (`cache`)
hold what is remembered and hand out penalised keys. Once something is evicted, the engine carries the cache on like any
pruned one: explicit masks, and positions that do not depend on its length.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessorList

from ..engine import positions as pos
from ..engine.attach import LOCK, Engine, attached
from ..engine.call import Call
from ..engine.probes import placeholder_masks
from ..errors import ConfigError, InputError, UnsupportedModelError, VTPruneWarning
from ..models import find_family
from ..models.base import PIXEL_KEYS, Family
from .cache import CLOCK, GENERATED, TEXT, VISUAL, Clock, TrackedLayer, track
from .contrast import SparseContrast
from .rows import attention_rows, chunks, logit_rows, rotated_queries
from .scores import density_peaks, key_values, top

_ATTRIBUTE = "_vtprune_vasparse"
SELECT = ("generated", "visual", "both")
MERGE = (None, "mean", "sum")
SCORES = ("attention", "logits")
#: Dropped tokens per cluster that stands for them; the paper does not say.
PER_CLUSTER = 4


@dataclass
class Step:
    """One forward of the text model."""

    call: Call | None
    past: int
    batch: int
    rows: int
    device: torch.device
    mask: Tensor | None
    positions: Tensor | None
    visual: Tensor | None

    def valid(self, layer: int, slots: int) -> Tensor:
        """``[B, slots]`` bool: which slots of that layer's cache hold tokens."""
        if self.call is not None and self.call.state is not None:
            return self.call.state.masks[self.call.state.group(layer)]
        if self.mask is not None:
            return self.mask.bool()
        return torch.ones(self.batch, slots, dtype=torch.bool, device=self.device)

    def kinds(self, layer: int, rows: int) -> Tensor:
        """``[B, rows]`` int8: what the new slots of that layer hold."""
        if self.visual is None:
            kind = GENERATED if self.past and self.rows == 1 else TEXT
            return torch.full((self.batch, rows), kind, dtype=torch.int8, device=self.device)
        visual = self.visual
        for plan in self.call.packs if self.call is not None else ():
            visual = visual.gather(1, plan.index.to(visual.device)) & plan.valid.to(visual.device)
        return torch.where(visual, VISUAL, TEXT).to(torch.int8)


class _Local(threading.local):
    visual: Tensor | None = None
    step: Step | None = None
    queries: Tensor | None = None


class Session:
    """The hooks of one `vasparse` block. What it learns about tokens lives on the layers of their cache."""

    def __init__(
        self,
        family: Family,
        engine: Engine,
        *,
        keep: float,
        lam: float,
        beta: float,
        every: int,
        select: str,
        scores: str,
        merge: str | None,
    ) -> None:
        self.family, self.engine = family, engine
        self.keep, self.lam, self.beta, self.every = keep, lam, beta, every
        self.select, self.scores, self.merge = select, scores, merge
        self.active = True
        self.local = _Local()
        self.handles: list[Any] = []

    def __deepcopy__(self, memo: Any) -> Session:
        return self  # a copied cache belongs to the same block

    @property
    def step(self) -> Step:
        """The forward that runs now in this thread."""
        assert self.local.step is not None
        return self.local.step

    # -- on and off ---------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Put the hooks on the model; refuse one that has them, or cannot have them."""
        inner, lm = self.family.inner, self.family.lm
        if getattr(inner, _ATTRIBUTE, None) is not None:
            raise ConfigError("vasparse is on this model already; leave its block before entering another")
        for layer in lm.layers:
            if not hasattr(layer.self_attn, "q_proj"):
                raise UnsupportedModelError(
                    f"the attention {type(layer.self_attn).__name__} has no q_proj, from which vasparse recomputes "
                    "attention; use keep=1.0 and beta=0"
                )
        self.handles = [
            inner.register_forward_pre_hook(self._enter, with_kwargs=True),
            lm.register_forward_pre_hook(self._enter_text_model, with_kwargs=True),
            lm.register_forward_hook(self._leave_text_model, with_kwargs=True),
        ]
        for index, layer in enumerate(lm.layers):
            attend = functools.partial(self._attended, index)
            self.handles += [
                layer.self_attn.q_proj.register_forward_hook(self._query),
                layer.self_attn.register_forward_hook(attend, with_kwargs=True),
            ]
        setattr(inner, _ATTRIBUTE, self)

    def detach(self) -> None:
        """Take the hooks off again."""
        self.active = False
        for handle in self.handles:
            handle.remove()
        if getattr(self.family.inner, _ATTRIBUTE, None) is self:
            self.family.inner.__dict__.pop(_ATTRIBUTE)

    # -- one forward --------------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Where the pictures of this prompt are."""
        shown = any(kwargs.get(k) is not None for k in (*PIXEL_KEYS, "mm_encoder_outputs"))
        self.local.visual = None
        if shown:
            masks = placeholder_masks(self.family, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            self.local.visual = functools.reduce(torch.logical_or, masks.values())

    def _enter_text_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        use = kwargs.get("use_cache")
        if not (self.family.lm.config.use_cache if use is None else use):
            raise InputError(
                "vasparse selects and penalises in the KV cache, but use_cache is False; use the cache, or keep=1.0 "
                "and beta=0"
            )
        kw = dict(kwargs)
        if kw.get("past_key_values") is None:
            kw["past_key_values"] = DynamicCache(config=self.family.lm.config)
        cache, mask = kw["past_key_values"], kw.get("attention_mask")
        mask = mask.get("full_attention") if isinstance(mask, dict) else mask
        if mask is not None and mask.ndim != 2:
            raise InputError(
                f"vasparse cannot read a {mask.ndim}-D attention mask (static cache, or a custom mask); pass a 2-D "
                "mask and a dynamic cache"
            )
        track(cache, self, len(self.family.lm.layers))
        given = kw["inputs_embeds"] if kw.get("inputs_embeds") is not None else kw.get("input_ids", *args[:1])
        call, visual = self.engine.local.call, self.local.visual
        past = int(cache.get_seq_length())
        batch, rows = given.shape[:2]
        self.local.step = Step(call, past, batch, rows, given.device, mask, kw.get("position_ids"), visual)
        return args, kw

    def _query(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        self.local.queries = out.detach()

    @torch.no_grad()
    def _attended(self, index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Remember what this layer's attention did with its keys."""
        layer: TrackedLayer = self._cache_of(kwargs).layers[index]
        step, track, keys = self.step, layer.track, layer.seen
        assert track is not None and keys is not None and self.local.queries is not None
        layer.seen = None
        decoding = bool(step.past)
        last = decoding or (self.select != "generated" and step.visual is not None)
        if not (last or self.beta):
            return
        query = rotated_queries(module, self.local.queries, kwargs["position_embeddings"])
        keys = keys.detach()
        slots = torch.arange(keys.shape[2] - query.shape[2], keys.shape[2], device=keys.device)
        valid = step.valid(index, keys.shape[2]).to(keys.device)
        asks = valid[:, -query.shape[2] :]
        scaling = getattr(module, "scaling", module.head_dim**-0.5)
        shown = track.kind[:, -1:] == VISUAL
        for part in chunks(query, keys.shape[2]):
            if self.beta:
                rows = attention_rows(query[:, :, part], keys, slots[part], valid, scaling)
                track.columns += (rows * asks[:, None, None, part, None]).sum(3).mean(2)
                rows = rows[:, -1:, -1:]
            elif last:
                rows = attention_rows(query[:, -1:, part], keys[:, -1:], slots[part], valid, scaling)
            mass = (rows * shown[:, :, None, None]).sum(-1)[:, :, 0]
            track.mass[..., slots[part]] = mass.expand(-1, track.mass.shape[1], -1)
        if self._due(step, self._clock(kwargs), 1):
            newest = (asks * torch.arange(1, asks.shape[1] + 1, device=keys.device)).argmax(1)
            query = query.gather(2, newest[:, None, None, None].expand(-1, query.shape[1], -1, query.shape[3]))
            if self.scores == "attention":
                rows = attention_rows(query, keys, slots[newest][:, None], valid, scaling)
            else:
                rows = logit_rows(query, keys)
            track.squares = rows.square().mean(2).squeeze(2)

    @staticmethod
    def _cache_of(kwargs: dict[str, Any]) -> Any:
        # Older transformers (4.57 and before) may use the singular.
        return kwargs["past_key_values"] if "past_key_values" in kwargs else kwargs["past_key_value"]

    def _clock(self, kwargs: dict[str, Any]) -> Clock:
        clock: Clock = getattr(self._cache_of(kwargs), CLOCK)
        return clock

    def _due(self, step: Step, clock: Clock, ahead: int) -> int | None:
        """The kind of tokens to select among after this step, if any; the clock may be `ahead` steps behind."""
        if self.keep == 1.0:
            return None
        if step.visual is not None:
            return VISUAL if self.select != "generated" else None
        decoded = step.past and step.rows == 1
        return GENERATED if decoded and self.select != "visual" and clock.since + ahead >= self.every else None

    @torch.no_grad()
    def _leave_text_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        step, cache, clock = self.step, kwargs["past_key_values"], self._clock(kwargs)
        self.local.step = self.local.queries = self.local.visual = None
        if step.visual is None and step.past and step.rows == 1:
            clock.generated, clock.since = clock.generated + 1, clock.since + 1
        kind = self._due(step, clock, 0)
        if kind is not None:
            clock.since = 0
            self._select(cache, clock, step, kind)

    # -- selection ----------------------------------------------------------------------------------------------------

    def _select(self, cache: Any, clock: Clock, step: Step, kind: int) -> None:
        """Let go of what is worth least among the tokens of one kind, in every layer."""
        kinds = cache.layers[0].checked(int(cache.get_seq_length())).kind
        if kind == GENERATED:
            counts = [clock.generated] * step.batch
        else:  # one sync per prompt
            counts = (kinds[:, 0, step.past :] == VISUAL).sum(-1).tolist()
        keeps = [max(min(n, 1), int(n * self.keep + 1e-6)) for n in counts]
        lost = [n - k for n, k in zip(counts, keeps, strict=True)]
        peaks = [-(-n // PER_CLUSTER) if self.merge else 0 for n in lost]
        gone = [n - c for n, c in zip(lost, peaks, strict=True)]
        if not any(gone):
            return
        state = pos.state_of(cache) or fresh_state(cache, step, self.family.mrope)
        if kind == VISUAL and len(state.masks) > 1:
            raise InputError(
                f"select={self.select!r} does not combine with pruning inside the language model, whose layers hold "
                "different visual tokens; use select='generated', or a method that prunes at the projector"
            )
        if kind == GENERATED:
            shorter, even = gone[0], True
        else:  # one more sync per prompt
            rest = [n - less for n, less in zip(state.masks[0].sum(1).tolist(), gone, strict=True)]
            shorter, even = state.length - max(rest), len(set(rest)) == 1
        masks, full = dict(state.masks), dict(state.full)
        for index, layer in enumerate(cache.layers):
            group = state.group(index)
            valid = state.masks[group].to(layer.keys.device)
            since = step.past if kind == VISUAL else 0
            mask = self._evict(layer, kind, since, valid, keeps, peaks, max(lost), shorter)
            if index == group:
                masks[group] = mask
                full[group] = even and (kind == VISUAL or state.full[group])
        if kind == GENERATED:
            clock.generated -= gone[0]
        length = state.length - shorter
        state = replace(state, masks=masks, full=full, length=length, floor=length)
        pos.commit(cache, state, self.engine.caches)

    def _evict(
        self,
        layer: TrackedLayer,
        kind: int,
        since: int,
        valid: Tensor,
        keeps: list[int],
        peaks: list[int],
        lost: int,
        shorter: int,
    ) -> Tensor:
        """Shorten one layer by `shorter` slots; returns ``[B, kv - shorter]`` bool, which of the rest hold tokens."""
        track = layer.checked(layer.keys.shape[2])
        slots = torch.arange(track.kind.shape[2], device=track.kind.device)
        among = (track.kind == kind) & (slots >= since) & valid[:, None]  # padding may be what was dropped before
        value = key_values(track.squares, track.mass, among, self.lam)
        if kind == GENERATED:  # never the newest token
            value = value.masked_fill(among & (slots == len(slots) - 1), torch.inf)
        heads = track.kind.shape[1]
        count = torch.tensor(keeps, device=slots.device)[:, None].expand(-1, heads)
        drop = among & ~top(value, count)
        if self.merge:
            clusters = torch.tensor(peaks, device=slots.device)[:, None].expand(-1, heads)
            drop = self._merge(layer, drop, clusters, lost)
        keep = valid[:, None] & ~drop
        # A stable sort brings dropped slots and padding to the left, and kept ones, in order, to the right.
        index = keep.to(torch.int8).argsort(dim=-1, stable=True)[..., shorter:]
        layer.take(index)
        return keep.gather(2, index)[:, 0]

    def _merge(self, layer: TrackedLayer, drop: Tensor, clusters: Tensor, most: int) -> Tensor:
        """Let peaks of the dropped keys, at most `most` in a row, stand for their clusters; returns what is dropped."""
        rows = drop.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most]
        among = drop.gather(2, rows).flatten(0, 1)
        wide = rows[..., None].expand(-1, -1, -1, layer.keys.shape[-1])
        keys, values = (x.gather(2, wide) for x in (layer.keys, layer.values))
        home = density_peaks(keys.flatten(0, 1), among, clusters.flatten())
        member = nn.functional.one_hot(home, most).mT.float() * among[:, None]  # [N, peak, key]
        size = member.sum(-1, keepdim=True)
        for x, name in ((keys, "keys"), (values, "values")):
            total = (member @ x.flatten(0, 1).float()).view_as(x)
            if self.merge == "mean":
                total = total / size.view(*x.shape[:3], 1).clamp_min(1)
            stands = (size.view(*x.shape[:3], 1) > 0).expand_as(x)
            setattr(layer, name, getattr(layer, name).scatter(2, wide, torch.where(stands, total.to(x.dtype), x)))
        gone = among & (size[..., 0] == 0)
        return torch.zeros_like(drop).scatter(2, rows, gone.view_as(rows))


def fresh_state(cache: Any, step: Step, mrope: bool) -> pos.CacheState:
    """What the engine has to know of a cache in which nothing was dropped so far."""
    length = int(cache.get_seq_length())
    device = cache.layers[0].keys.device
    valid = step.valid(0, length).to(device)
    new = valid[:, step.past :]
    positions = step.positions
    if positions is None:
        positions = pos.contiguous(1, length - step.past, step.past, device)
    positions = pos.without_text_row(positions).to(device)
    positions = positions.expand(*positions.shape[:-2], step.batch, -1)
    following = pos.last_position(positions, new) + 1
    return pos.CacheState(
        masks={0: valid},
        full={0: step.mask is None or bool(valid.all())},
        length=length,
        floor=length,
        prompt_length=length,
        next_original=following,
        next_position=following,
        mrope=mrope,
    )


@contextmanager
def vasparse(
    model: nn.Module,
    *,
    alpha: float = 0.1,
    keep: float = 0.9,
    beta: float = 0.1,
    lam: float = 0.1,
    plausibility: float = 0.1,
    every: int = 16,
    select: str = "generated",
    scores: str = "attention",
    merge: str | None = "mean",
) -> Iterator[LogitsProcessorList]:
    """VASparse, a decoding method that makes a model say less about what is not in the picture.

    Three parts, each of which can be switched off by itself. With all of them off, generation is the model's own.

    Parameters
    ----------
    model
        A model of a supported family, with or without `vtprune.apply` on it.
    alpha
        Sparse visual contrastive decoding: the prior that
        ignores the picture is subtracted from the logits, ``(1 + alpha) * full - alpha * prior``. 0 switches it off.
    keep
        Visual-aware token selection: the share of tokens that stay in the KV cache, in (0, 1]. Keys and values of the
        others are taken out of it; positions stay. 1.0 switches it off.
    beta
        Sink penalty: logits of keys become ``1 + beta - beta * w`` times as large, where w is how large a share of all
        attention the key has drawn. It acts on every forward on a filled cache. 0 switches it off.
    lam
        How much a token's own attention to the picture counts when it is decided what stays.
    plausibility
        Tokens less likely than this share of the likeliest cannot be chosen. Belongs to `alpha`.
    every
        Generated tokens between two selections.
    select
        What is selected among: ``"generated"`` tokens (the paper), the ``"visual"`` ones of the prompt, once, right
        after the prefill, or ``"both"``. All other text, and the newest token, stay.
    scores
        ``"attention"``: a key's score is its attention weight. ``"logits"``: the raw product of query and key, as the
        paper writes it, which is so large that `lam` has no say.
    merge
        What becomes of dropped tokens: ``"mean"`` or ``"sum"`` (the paper) of each cluster of keys, and of its values,
        stays in the place of its peak, one for every four; None: nothing stays.

    Yields
    ------
    LogitsProcessorList
        To be passed to ``generate(logits_processor=...)``. Empty with ``alpha=0``.

    Raises
    ------
    ConfigError
        A value cannot be used, or the model is in such a block already.
    InputError
        By the forward: no KV cache, or one that tokens cannot be taken out of (static, sliding-window, quantised); a
        cache that was filled elsewhere; assisted generation.

    Warns
    -----
    VTPruneWarning
        At the end of the block, if the processors were not passed to ``generate``.

    Notes
    -----
    Departures from the paper, where it is silent or cannot be meant literally:

    - Heads that share a KV head share a selection: the mean of their squared scores, which minimises the sum of their
      objectives. With one query head per KV head this is the paper's rule.
    - `every`, the number of clusters (a quarter of what is dropped), and where merged tokens stand are not given there.
    - ``merge="sum"`` adds up rotated keys, and so scales logits up; the default is the mean.
    - Attention is recomputed from each layer's queries and cached keys, for the newest query while decoding, and over
      the whole prompt once if `beta` (column sums) or `select` needs it. The mask of the contrasted branch has no
      effect at layer 0 and is left out; see `SparseContrast`.
    - Nothing changes during the prefill, so the first token is affected by the contrast only.

    Threads that generate with this model while the block is open are all under it.

    Examples
    --------
    >>> with vtprune.decoding.vasparse(model) as processors:
    ...     output = model.generate(**inputs, logits_processor=processors)
    """
    _check(alpha, keep, beta, lam, plausibility, every, select, scores, merge)
    family = find_family(model)
    processors = LogitsProcessorList()
    if alpha:
        head = getattr(family.model, "get_output_embeddings", lambda: None)()
        if head is None:
            raise UnsupportedModelError(
                f"{type(family.model).__name__} has no language-model head, which the contrast needs; pass the model "
                "with its head, or alpha=0"
            )
        processors.append(SparseContrast(family.model, float(alpha), plausibility))
    if keep == 1.0 and not beta:
        yield processors
    else:
        with attached(family) as engine:
            session = Session(
                family,
                engine,
                keep=float(keep),
                lam=lam,
                beta=beta,
                every=every,
                select=select,
                scores=scores,
                merge=merge,
            )
            with LOCK:
                session.attach()
            try:
                yield processors
            finally:
                session.detach()
    if alpha and not processors[0].fired:
        warnings.warn(
            "vasparse's contrast was never used: pass generate(..., logits_processor=processors), or alpha=0",
            VTPruneWarning,
            stacklevel=3,
        )


def _check(
    alpha: Any, keep: Any, beta: Any, lam: Any, plausibility: Any, every: Any, select: Any, scores: Any, merge: Any
) -> None:
    for name, value, low, high in (
        ("alpha", alpha, 0, None),
        ("beta", beta, 0, None),
        ("lam", lam, 0, None),
        ("plausibility", plausibility, 0, 1),
    ):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value < float("inf") or (high is not None and value > high):
            raise ConfigError(f"{name}={value!r} must be a number {'in [0, 1]' if high else 'of at least 0'}")
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise ConfigError(f"keep={keep!r} must be a share in (0, 1]; 1.0 switches the selection off")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ConfigError(f"every={every!r} must be a whole number of tokens, at least 1")
    for name, value, known in (("select", select, SELECT), ("scores", scores, SCORES), ("merge", merge, MERGE)):
        if value not in known:
            raise ConfigError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, known))}")
