# SPDX-License-Identifier: Apache-2.0
"""The encoder's side: what a pruner asked for is captured while it runs, and turned into `VisualTokens`.

No attention map is ever asked of the model: a CLS row is one product of what the tower's own projections put out.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..models.base import PIXEL_KEYS, Encoding, Family
from ..tokens import PRE_PROJECTOR, Probe, VisualTokens
from . import early
from .call import Call
from .layout import BatchLayout, Placed, build, upload

_ENCODING = "_vtprune_encoding"


class _Local(threading.local):
    def __init__(self) -> None:  # nothing on the class, which older Dynamo takes for what a thread has
        # By modality: the last rows, until a forward is through.
        self.recent: dict[str, tuple[Any, Encoding]] | None = None
        self.captured: dict[Probe, Tensor] | None = None
        self.views: early.Views | None = None  # what `early` must know of the pictures that are being encoded
        self.encodings: dict[str, Encoding] | None = None
        # By method, and what the tower dropped: pixels, output, what was noted.
        self.memory: dict[tuple[str, early.Left | None], tuple[Tensor, Any, Encoding]] | None = None


class EncoderTap:
    """Wraps ``get_*_features`` of one model instance, so that each call leaves an `Encoding` behind.

    Parameters
    ----------
    family
        The family, bound to the model.
    wanted
        Says which probes the current call needs.
    """

    def __init__(self, family: Family, wanted: Callable[[], Collection[Probe]]) -> None:
        self.family = family
        self.wanted = wanted
        self.local = _Local()
        self.wrapped: dict[str, tuple[Any, Any]] = {}  # our wrapper, and what the instance had before (None: nothing)
        self.hooks: dict[Probe, list[Any]] = {}

    def attach(self) -> None:
        inner = self.family.inner
        for name in self.family.feature_methods:
            self.wrapped[name] = (self._wrap(name), inner.__dict__.get(name))
            setattr(inner, name, self.wrapped[name][0])

    def detach(self) -> None:
        for hook in (h for hooks in self.hooks.values() for h in hooks):
            hook.remove()
        own = self.family.inner.__dict__
        for name, (wrapper, before) in self.wrapped.items():
            if own.get(name) is wrapper:
                del own[name]
                own.update({} if before is None else {name: before})
        self.wrapped, self.hooks = {}, {}

    def hook(self, probes: Collection[Probe]) -> None:
        """Make sure that these probes can be captured."""
        for probe in probes:
            if probe not in self.hooks:
                if isinstance(probe, early.Left):
                    self.hooks[probe] = early.hook(self, probe)
                else:
                    self.hooks[probe] = self.family.probe_hooks(probe, self._put) or []

    def collect_into(self, encodings: dict[str, Encoding] | None) -> None:
        """Where this thread's next encodings go, by modality; None: nowhere."""
        self.local.encodings = encodings
        if encodings is None:
            self.local.recent = None

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Within this block and thread, the first encoding of each modality is kept, and handed out again for the very
        same pixels wherever every probe that is wanted was captured then."""
        self.local.memory = {}
        try:
            yield
        finally:
            self.local.memory = None

    @contextmanager
    def capturing(self) -> Iterator[dict[Probe, Tensor]]:
        """Within this block and thread, what probes capture goes into the dict that this yields, and nowhere else."""
        before, self.local.captured = self.local.captured, {}
        try:
            yield self.local.captured
        finally:
            self.local.captured = before

    def hand_over(self, captured: dict[Probe, Tensor]) -> None:
        """Take what was captured elsewhere for the encoding that is being made."""
        if self.local.captured is not None:
            self.local.captured.update(captured)

    def _put(self, probe: Probe, value: Callable[[], Tensor]) -> None:
        if self.asks(probe) and self.local.captured is not None:
            self.local.captured[probe] = value()

    @property
    def encoding(self) -> bool:
        """Whether an encoding is being made in this thread."""
        return self.local.captured is not None

    def asks(self, probe: Probe) -> bool:
        """Whether an encoding is being made, and this probe is wanted of it."""
        return self.local.captured is not None and probe in self.wanted()

    def _wrap(self, name: str) -> Callable[..., Any]:
        original = getattr(self.family.inner, name)
        modality = name.split("_")[1]
        order = list(inspect.signature(original).parameters)

        def encode(args: Any, kwargs: Any, inputs: dict[str, Any]) -> tuple[Any, Encoding]:
            for key in self.family.host_inputs:
                if isinstance(inputs.get(key), Tensor):
                    inputs[key] = inputs[key].cpu()
                    kwargs = {**kwargs, key: inputs[key]} if key in kwargs else kwargs
                    args = tuple(inputs[key] if name == key else arg for name, arg in zip(order, args, strict=False))
            layouts = self.family.layouts(modality, inputs)
            self.local.captured, self.local.views = {}, early.views(self, layouts, inputs)
            try:
                with _own_weights(self.family.inner):
                    out = original(*args, **kwargs)
                captured = early.whole(self.local.captured)
            finally:
                self.local.captured = self.local.views = None
            encoding = Encoding(
                layouts,
                {p: self.family.order_raw(p, v, modality, inputs) for p, v in captured.items()},
                inputs={k: inputs[k] for k in self.family.layout_inputs(modality) if k in inputs},
            )
            if isinstance(getattr(out, "pooler_output", None), list | tuple):
                encoding.features = list(out.pooler_output)
            return out, encoding

        @functools.wraps(original)
        def features(*args: Any, **kwargs: Any) -> Any:
            if self.local.captured is not None:  # one of them goes through another (Qwen3-VL): the outer one notes it
                return original(*args, **kwargs)
            inputs = {**dict(zip(order, args, strict=False)), **kwargs}
            pixels = next((inputs[k] for k in PIXEL_KEYS if k in inputs), None)
            memory, left = self.local.memory, early.wanted(self)
            known = None if memory is None else memory.get((name, left))
            if known is not None and known[0] is pixels and known[2].probes.keys() >= set(self.wanted()):
                _, out, encoding = known
            else:
                out, encoding = encode(args, kwargs, inputs)
                if memory is not None and pixels is not None:
                    memory.setdefault((name, left), (pixels, out, encoding))
            # A pruner must not see what another one asked for.
            wanted = self.wanted()
            if any(probe not in wanted for probe in encoding.probes):
                encoding = replace(encoding, probes={p: v for p, v in encoding.probes.items() if p in wanted})
            if hasattr(out, "__dict__"):
                object.__setattr__(out, _ENCODING, encoding)  # generate() hands this very object to the forward
            if self.local.encodings is not None:
                self.local.encodings[modality] = encoding
            self.local.recent = {**(self.local.recent or {}), modality: (getattr(out, "pooler_output", None), encoding)}
            return out

        return features


@contextmanager
def _own_weights(inner: Any) -> Iterator[None]:
    """Bring weights of the module's own (LLaVA-NeXT's ``image_newline``) that accelerate has put away: its hook does so
    around the forward, but generate() of newer transformers encodes pictures before that, and finds none."""
    hook = getattr(inner, "_hf_hook", None)
    if hook is None or not any(p.is_meta for p in inner.parameters(recurse=False)):
        yield
        return
    hook.pre_forward(inner)
    try:
        yield
    finally:
        hook.post_forward(inner, None)


def encoding_of(modality: str, out: Any, recent: Mapping[str, tuple[Any, Encoding]]) -> Encoding:
    """The encoding that was noted when generate(), or the caller, encoded pictures before the forward.

    Hooks that spread a model over devices (accelerate's) copy what they hand on, and the note with it is lost; `recent`
    is what this thread encoded last, and counts if its rows are these.
    """
    encoding: Encoding | None = getattr(out, _ENCODING, None)
    if encoding is None and modality in recent:
        rows, known = recent[modality]
        now = getattr(out, "pooler_output", None)
        if rows is not None and now is not None and len(now) % max(len(rows), 1) == 0 and len(rows):
            encoding = known if torch.equal(now[0].cpu(), rows[0].cpu()) else None
    if encoding is None:
        raise InputError(
            f"mm_encoder_outputs[{modality!r}] was made before vtprune was applied, or cut up by prefill_chunk_size, "
            "which pruning does not support; encode the pictures again, or pass pixel_values, without chunks"
        )
    return encoding


def placeholder_masks(family: Family, ids: Tensor | None, embeds: Tensor | None) -> dict[str, Tensor]:
    """Per modality ``[B, L]`` bool, True at placeholders; told by their embedding where there are no ids."""
    if ids is not None:
        return {m: ids == token for m, token in family.placeholders.items()}
    assert embeds is not None
    table = family.inner.get_input_embeddings()
    ids_on = functools.partial(torch.tensor, device=embeds.device)
    return {m: (embeds == table(ids_on(token))).all(-1) for m, token in family.placeholders.items()}


def to_host(
    family: Family, call: Call, mask: Any, valid: Tensor
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray | None]:
    """Valid rows, placeholders by modality, and ids where there are some, on the host.

    Waits for the device only where the text model was given another mask than the model, or there are no ids.
    """
    ids, fetched = call.ids, call.fetched
    if fetched is not None and fetched.mask is mask:
        width = fetched.ids.shape[1]
        host_valid = np.ones(fetched.ids.shape, bool) if fetched.valid is None else fetched.valid[:, -width:]
        return host_valid, {m: fetched.ids == token for m, token in family.placeholders.items()}, fetched.ids
    if ids is not None:
        host_valid, host_ids = torch.stack([valid.to(ids.dtype), ids.to(valid.device)]).cpu().numpy()
        return host_valid.astype(bool), {m: host_ids == token for m, token in family.placeholders.items()}, host_ids
    host = torch.stack([valid, *(mask.to(valid.device) for mask in call.masks.values())]).cpu().numpy()
    return host[0], dict(zip(call.masks, host[1:], strict=True)), None


def match(
    family: Family, call: Call, masks: dict[str, np.ndarray], ids: np.ndarray | None, embeds: Tensor
) -> BatchLayout:
    """Match encodings to placeholders; entries that generate() repeated for beams are told by their identity."""
    layouts: dict[str, list[Any]] = {m: [] for m in masks}
    starts: dict[str, list[int]] = {m: [] for m in masks}
    for modality, encoding in call.encodings.items():
        first = list(accumulate((item.raw_length for item in encoding.layouts), initial=0))
        order = _order(encoding, call.given.get(f"{modality}_features"), masks[modality])
        layouts[modality] = [encoding.layouts[i] for i in order]
        starts[modality] = [first[i] for i in order]
        words = (ids if ids is not None else _words(embeds)) if family.reads_ids else None
        layouts[modality], starts[modality] = family.arrange(
            modality, layouts[modality], starts[modality], masks[modality], words
        )
    return build(masks, layouts, starts)


def _order(encoding: Encoding, now: Any, mask: np.ndarray) -> list[int]:
    """Which encoded picture each entry of what the model was given is, where generate() repeated them."""
    count = len(encoding.layouts)
    if isinstance(now, Tensor) and len(now) > count > 0:
        return _repeated([[i] for i in range(count)], encoding, len(now), mask)
    if not encoding.features or not isinstance(now, list | tuple) or len(now) == len(encoding.features):
        return list(range(count))
    entries: list[list[int]] = []  # an entry may hold several views
    at = 0
    for rows in encoding.features:
        entries.append([])
        left = len(rows)
        while left > 0 and at < count:
            entries[-1].append(at)
            left -= encoding.layouts[at].length
            at += 1
    known = {id(rows): entry for rows, entry in zip(encoding.features, entries, strict=True)}
    if all(id(rows) in known for rows in now):
        return [i for rows in now for i in known[id(rows)]]
    return _repeated(entries, encoding, len(now), mask)


def _repeated(entries: list[list[int]], encoding: Encoding, now: int, mask: np.ndarray) -> list[int]:
    """The pictures of `now` entries that are no objects to know again (one tensor, or copies): every sample comes so
    often, each time with all its pictures."""
    order: list[int] = []
    at, times = 0, now // len(entries)
    for placeholders in mask[::times].sum(1):
        mine: list[int] = []
        while at < len(entries) and placeholders > 0:
            mine += entries[at]
            placeholders -= sum(encoding.layouts[i].length for i in entries[at])
            at += 1
        order += mine * times
    return order


def _words(embeds: Tensor) -> np.ndarray:
    """Numbers ``[B, L]`` that are equal where the embeddings are, in place of ids. Waits for the device."""
    same = torch.unique(embeds.detach().flatten(0, 1), dim=0, return_inverse=True)[1]
    return same.view(embeds.shape[:2]).cpu().numpy()


def probes_of(call: Call, layout: BatchLayout) -> dict[Probe, Tensor]:
    """What was captured of the encoder, in the order of the tokens."""
    probes: dict[Probe, Tensor] = {}
    for modality in layout.raw:
        for probe, value in call.encodings[modality].probes.items():
            where = layout.raw_on(modality, value.device, len(value))
            if where is None:
                probes[probe] = value
                continue
            raw, rows = where
            part = value[raw]
            if len(layout.raw) > 1:
                whole = probes.setdefault(probe, part.new_zeros(len(layout.position), *part.shape[1:]))
                whole[rows] = part
            else:
                probes[probe] = part
    for probe, value in probes.items():
        if probe.name == PRE_PROJECTOR.name:
            probes[probe] = value.reshape(-1, value.shape[-1])
    return probes


def tokens_of(family: Family, call: Call, layout: BatchLayout, embeds: Tensor, placed: Placed) -> VisualTokens:
    """What a pruner sees of the prompt ``embeds [B, L, D]``; `placed` is the layout on its device."""
    device, probes = embeds.device, probes_of(call, layout)
    tokens = VisualTokens(
        features=embeds.detach().reshape(-1, embeds.shape[-1]).index_select(0, placed.position),
        seqlens=layout.seqlens,
        source=placed.source,
        coords=placed.coords,
        seg_image=layout.seg_image,
        image_sample=layout.image_sample,
        seg_kind=layout.seg_kind,
        seg_grid=layout.seg_grid,
        seg_box=layout.seg_box,
        image_grid=layout.image_grid,
        image_size=layout.image_size,
        probes=probes,
        projector=family.projector,
        vocabulary=family.vocabulary,
        checkpoint=family.checkpoint,
    )
    tokens.ctx["image_lens"] = tokens.image_lens
    elsewhere = any(value.device != device for value in probes.values())  # where the encoder may be
    return tokens.to(device) if elsewhere else tokens


def with_question(
    family: Family,
    tokens: VisualTokens,
    call: Call,
    layout: BatchLayout,
    embeds: Tensor,
    valid: np.ndarray,
    masks: dict[str, np.ndarray],
    ids: np.ndarray | None,
) -> VisualTokens:
    """Add the question: every valid, non-visual, non-special token after the last picture of its sample.

    Also the mean of the text that follows each picture, and the slots ``sample * L + slot`` of the question.
    """
    text = valid & ~np.logical_or.reduce(list(masks.values()))
    if ids is not None:
        text &= ~np.isin(ids, list(family.special_ids))
    flat = embeds.detach().reshape(-1, embeds.shape[-1])
    paired = pair_text(tokens, layout, flat, text)
    text &= np.arange(valid.shape[1])[None] > layout.last[:, None]
    call.text_slots = upload(np.flatnonzero(text), embeds.device)
    lens = tuple(int(n) for n in text.sum(1))
    words = None if ids is None else tuple(tuple(row[mine].tolist()) for row, mine in zip(ids, text, strict=True))
    return replace(tokens, text=flat[call.text_slots], text_lens=lens, text_ids=words, pair_text=paired)


def pair_text(tokens: VisualTokens, layout: BatchLayout, flat: Tensor, text: np.ndarray) -> Tensor:
    """Mean embedding of the text between each picture and the next of its sample, ``[images, D]`` fp32.

    Parameters
    ----------
    flat : Tensor
        ``[B * L, D]`` embeddings of the prompt.
    text : np.ndarray
        ``[B, L]`` bool, True at ordinary text.
    """
    owner = np.full(text.size, -1)
    owner[layout.position] = np.repeat(np.arange(tokens.num_images), tokens.image_lens)
    owner = np.maximum.accumulate(owner.reshape(text.shape), axis=1)  # images are counted in the order of the prompt
    mine = text & (owner >= 0)
    rows = upload(np.flatnonzero(mine), flat.device)
    lens = upload(np.bincount(owner[mine], minlength=tokens.num_images), flat.device)
    # Row after row in order: the same sum alone and in a batch.
    total = torch.segment_reduce(flat[rows].float(), "sum", lengths=lens, axis=0, unsafe=True, initial=0.0)
    return total / lens.clamp_min(1)[:, None]
