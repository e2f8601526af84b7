# SPDX-License-Identifier: Apache-2.0
"""``compile="graph"``: prefill through CUDA graphs, because at batch 1 a pruned prompt is bound by kernel launches.

With a fixed budget the length of a packed prompt is known before it runs. It is padded to one of a few lengths
(`bucket`), and for each of them the decoder (`decoder`) is captured once: all layers and the rotary embedding in one
CUDA graph with static input, output and key-value buffers (`replay`). A replay is a single launch. Padding stands at
the right, where causal attention never looks, so no mask is needed and rows of the prompt are the same whatever the
bucket; keys and values of the prompt alone are copied into the caller's cache, which decoding goes on from as ever.

Parameters of the model become views of larger pieces of memory, so nothing is held twice; `PrefillGraphs.detach` gives
each its own memory again. Values never change.

What cannot run this way runs as without it, and `Report.compiled` says why. Nothing here is used unless asked for.
"""

from __future__ import annotations

import functools
import itertools
import operator
import threading
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..budget import ALLOCATIONS
from ..errors import ConfigError
from ..kernels._jit import remember
from ..models.base import Family
from ..tokens import Probe, Selection
from . import early, replay
from . import positions as pos
from .decoder import (
    Shape,
    cache_for,
    decoder_layer,
    fill_cache,
    fused,
    groups,
    last_norm,
    side_by_side,
    unknown,
)
from .layout import BatchLayout, Placed
from .probes import probes_of
from .replay import Captured, Shelf, Unfit, copied
from .rotary import ours

if TYPE_CHECKING:
    from .call import Call, Job
    from .probes import EncoderTap

#: Names under which transformers computes plain causal attention, as the graph does.
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
#: Prompts with pictures of the same shapes that choose their tokens without a graph, before one is captured.
CAPTURED_AFTER = 2
#: Rows of a batch beyond which launches no longer matter and static buffers would cost more than they give.
MAX_ROWS = 1 << 15

#: Arguments of the text model that the graph honours, or that make no difference to a prefill.
_HONOURED = {"inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position"}
_NO_DIFFERENCE = {"return_dict", "mm_token_type_ids", "logits_to_keep", "rope_deltas"}


def bucket(rows: int) -> int:
    """The captured length that `rows` rows are padded to: multiples of 32, then eight lengths per doubling."""
    step = max(32, (1 << (rows - 1).bit_length()) >> 4)
    return -(-rows // step) * step


class _Local(threading.local):
    tower = "the vision tower has not run"


class PrefillGraphs:
    """Graphs of one model's decoder and CLIP-type vision tower; wraps ``forward`` of both instances while attached.

    Parameters
    ----------
    family
        The family, bound to the model.
    tap
        Says which encoder probes are wanted, and takes them.
    job, current
        What applies in this thread, and the forward that is running in it.
    own_hooks
        Ids of the engine's own hooks. Any other hook on a decoder layer would not run, so there is no graph then.

    Raises
    ------
    Unfit
        This model cannot run as a graph.
    """

    def __init__(
        self,
        family: Family,
        tap: EncoderTap,
        job: Callable[[], Job | None],
        current: Callable[[], Call | None],
        own_hooks: Callable[[], Collection[int]],
    ) -> None:
        self.family, self.tap, self.job, self.current, self.own_hooks = family, tap, job, current, own_hooks
        self.local = _Local()
        self.met: dict[Any, int] = {}
        self.captures = 0
        lm = family.lm
        self.device = lm.get_input_embeddings().weight.device
        why = replay.obstacle(self.device) or unknown(lm)
        if why:
            raise Unfit(why)
        attention, config = lm.layers[0].self_attn, lm.config
        self.shape = Shape(
            config.num_attention_heads,
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            attention.head_dim,
            lm.norm.variance_epsilon,
        )
        self.layers = [side_by_side(layer) for layer in lm.layers]
        linears = [linear for layer in lm.layers for group in groups(layer) for linear in group]
        self.joined = [p for linear in linears for p in (linear.weight, linear.bias) if p is not None]
        self.lm_modules = _Modules(lm, ("layers", "norm", "rotary_emb"))
        self.doubtful = False
        self.shelf, self.choices = Shelf(self.device), Shelf(self.device)
        self.wrapped: list[tuple[Any, str, Any]] = []
        self._wrap(lm, "forward", self._text_forward)
        tower = getattr(family.inner, "vision_tower", None)
        self.tower_obstacle = ""
        if tower is None:
            self.tower_obstacle = f"the encoder of {family.label} reads picture sizes as it runs"
        elif "forward" in tower.__dict__ or hasattr(tower, "_hf_hook"):
            self.tower_obstacle = "something else has replaced the vision tower's forward"
        elif custom := [
            m for m in tower.modules() if not type(m).__module__.startswith(("torch.nn.", "transformers."))
        ]:
            # Such as a LoRA layer, which can be switched off without a trace in its parameters.
            self.tower_obstacle = f"the vision tower has a {type(custom[0]).__name__}, which the graph does not know"
        else:
            self.tower_modules = _Modules(tower)
            self.tower_shelf = Shelf(self.device)
            self._wrap(tower, "forward", self._tower_forward)

    def _wrap(self, module: Any, name: str, replacement: Callable[..., Any]) -> None:
        original = getattr(module, name, None)
        if original is None or name in module.__dict__:
            return
        wrapper = functools.wraps(original)(functools.partial(replacement, original))
        setattr(module, name, wrapper)
        self.wrapped.append((module, name, wrapper))

    def tampered(self) -> str:
        """What was done to the decoder, so that a graph would not do what it does; empty where nothing was."""
        try:
            self.lm_modules.check(self.own_hooks())
        except Unfit as why:
            return str(why)
        return ""

    @torch.inference_mode(False)
    def detach(self) -> None:
        """Put everything back; parameters have their own memory again."""
        for module, name, wrapper in self.wrapped:
            if module.__dict__.get(name) is wrapper:
                delattr(module, name)
        self.wrapped, self.layers = [], []
        self.met.clear()
        for shelf in (self.shelf, self.choices, *([] if self.tower_obstacle else [self.tower_shelf])):
            shelf.close()
        self.lm_modules.held.clear()  # or every layer would be held twice below
        for parameter in self.joined:
            parameter.data = parameter.data.clone()
        self.joined = []

    # -- the decoder --------------------------------------------------------------------------------------------------

    def _text_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self.current()
        if call is None or call.job is None or call.job.config.compile is None or not call.packs or args:
            return original(*args, **kwargs)
        call.compiled["vision tower"] = f"eager: {self.tower_obstacle}" if self.tower_obstacle else self.local.tower
        rotary, call.rotary = call.rotary, None  # else the capture's own rotary embedding would be given it
        try:
            self._check(call, kwargs)
            positions = rotary if rotary is not None else pos.without_text_row(kwargs["position_ids"])
            hidden, cache = self.prefill(kwargs["inputs_embeds"], positions, cache_for(self.family.lm, kwargs))
        except Unfit as why:
            call.rotary = rotary
            call.compiled["language model"] = f"eager: {why}"
            return original(**kwargs)
        call.compiled["language model"] = f"graph of {bucket(hidden.shape[1])} rows a sample; {self.shelf.about}"
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)

    def _check(self, call: Call, kw: dict[str, Any]) -> None:
        """Raise `Unfit` where the graph would not do what the model does."""
        job, embeds = call.job, kw["inputs_embeds"]
        assert job is not None and call.state is not None
        config = self.family.lm.config
        ruled_out = {
            "it was taken off the model": not self.layers,
            "the method acts inside the language model": bool(job.layer_stages or job.layer_probes),
            "something looks at the layers": call.watched or call.entry is not None,
            "the prompt extends a cache": call.past > 0,
            "samples of the batch have different lengths": not call.packs[0].full,
            f"its attention is {config._attn_implementation!r}, which the graph would not call": (
                config._attn_implementation not in ATTENTION
            ),
            "a tuple was asked for": kw.get("return_dict") is False,
            "gradients are on": torch.is_grad_enabled() and (embeds.requires_grad or self.lm_modules.trains()),
            "the model is in training mode": self.family.lm.training,
            "autocast is on": torch.is_autocast_enabled(self.device.type),
            "an op counter or another dispatch mode is on": torch._C._len_torch_dispatch_stack() > 0,
            "hidden states or attention maps were asked for": any(
                kw.get(name, getattr(config, name, False)) for name in ("output_hidden_states", "output_attentions")
            ),
            f"{embeds.shape[0]} x {embeds.shape[1]} rows are too many to gain from it": (
                embeds.shape[0] * bucket(embeds.shape[1]) > MAX_ROWS
            ),
            "embeddings are on another device, or of another dtype, than the weights": (
                embeds.device != self.device or embeds.dtype != self.lm_modules.dtype
            ),
        }
        for reason, holds in ruled_out.items():
            if holds:
                raise Unfit(reason)
        for name, value in kw.items():
            known = name in _HONOURED or name in _NO_DIFFERENCE or name.startswith("output_")
            if not known and value is not None and value is not False:
                raise Unfit(f"it does not know the argument {name}")

    def prefill(self, embeds: Tensor, positions: Tensor, cache: Callable[[], Any] | None) -> tuple[Tensor, Any]:
        """Run the decoder over ``embeds [B, P, D]`` without past, all rows valid.

        Parameters
        ----------
        positions : Tensor
            ``[B, P]``, or ``[3, B, P]`` for M-RoPE.
        cache
            Makes, or hands out, an empty `DynamicCache` to fill; None if there is to be none.

        Returns
        -------
        hidden : Tensor
            ``[B, P, D]``, after the last norm.
        cache
            What `cache` returned, filled; or None.

        Raises
        ------
        Unfit
            The graph cannot be captured, or would not do what the model does by now.
        """
        batch, rows, _ = embeds.shape

        def fill(static: Tensor, at: Tensor, _cache: Tensor) -> None:
            static[:, :rows].copy_(embeds)
            static[:, rows:].zero_()  # what stands there reaches no row of the prompt, as long as it is finite
            at[..., :rows].copy_(positions)

        def take(out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
            hidden, kv = out
            return hidden[:, :rows].clone(), None if cache is None else kv[..., :rows, :].clone()

        key = (batch, bucket(rows), positions.ndim)
        if self.doubtful or key not in self.shelf.graphs:
            self._look()
        hidden, kv = self.shelf.run(key, lambda: self._capture(*key, embeds.shape[-1]), fill, take)
        # Looking at every module, and making a cache, take the host a while: the GPU is at work meanwhile. What the
        # graph reads is held, whatever was moved.
        self._look()
        if cache is None:
            return hidden, None
        made = cache()
        fill_cache(made, kv)
        return hidden, made

    def _look(self) -> None:
        self.doubtful = True  # until it was looked at and found sound: the next prefill looks before it runs
        self.lm_modules.check(self.own_hooks())
        self.doubtful = False

    def _capture(self, batch: int, length: int, ndim: int, width: int) -> Captured:
        shape, rows, lm = self.shape, batch * length, self.family.lm
        like = {"device": self.device, "dtype": self.lm_modules.dtype}
        embeds = torch.zeros(batch, length, width, **like)
        positions = torch.zeros(*([3] if ndim == 3 else []), batch, length, dtype=torch.int64, device=self.device)
        cache = torch.zeros(len(self.layers), 2, batch, shape.kv_heads, length, shape.head_dim, **like)
        layer, norm = decoder_layer, last_norm
        if replay.Replay.fuses:
            layer, norm = fused(decoder_layer, rows), fused(last_norm, rows)

        def work() -> tuple[Tensor, Tensor]:
            cos, sin = self.family.plain_rotary(*lm.rotary_emb(embeds, positions))
            cos, sin = (e.expand(batch, -1, -1).unsqueeze(1).contiguous() for e in (cos, sin))
            hidden, update = embeds, torch.zeros_like(embeds)
            for i, weights in enumerate(self.layers):
                hidden, update = layer(hidden, update, cos, sin, cache[i], weights, shape)
            return norm(hidden, update, lm.norm.weight, shape), cache

        run = replay.Replay(work, self.device, self.shelf.pool)
        static = (embeds, positions, cache)
        return Captured(run, static, run.out, sum(t.nbytes for t in static))

    # -- the choice of tokens -----------------------------------------------------------------------------------------

    def choose(
        self, call: Call, layout: BatchLayout, placed: Placed, embeds: Tensor
    ) -> tuple[Selection, np.ndarray] | None:
        """`Job.select` at the projector as a graph; None where that cannot be, or is not worth it yet.

        It depends on the pictures alone, not on the text around them: prompts of any length share it.

        Parameters
        ----------
        layout, placed
            Where the visual tokens are in ``embeds [B, L, D]``.
        """
        try:
            out = self._choose(call, layout, placed, embeds)
        except Unfit as why:
            call.compiled["choice of tokens"] = f"eager: {why}"
            return None
        call.compiled["choice of tokens"] = f"graph; {self.choices.about}"
        return out

    def _choose(self, call: Call, layout: BatchLayout, placed: Placed, embeds: Tensor) -> tuple[Selection, np.ndarray]:
        job = call.job
        assert job is not None and job.projector_stage is not None
        stage, pruner, batch = job.projector_stage, job.pruner, embeds.shape[0]
        # A class derived from one that can be captured may do what cannot.
        if not ("capturable" in vars(type(pruner)) and pruner.capturable) or pruner.adaptive or pruner.query_aware:
            raise Unfit(f"{job.config.label!r} does not say that it can be captured")
        if call.watched or job.layer_stages or job.layer_probes:
            raise Unfit("something else looks at the tokens")
        budget = job.budget_at(stage)
        if budget.scope != "joint" and budget.allocation not in ALLOCATIONS:
            raise Unfit(f"allocation={budget.allocation!r} looks at the tokens")
        if embeds.device != self.device or not len(layout.position):
            raise Unfit("there are no tokens on the model's device")
        if torch.is_autocast_enabled(self.device.type) or torch._C._len_torch_dispatch_stack() > 0:
            raise Unfit("autocast, an op counter or another dispatch mode is on")
        probes = probes_of(call, layout)
        if any(value.device != self.device for value in probes.values()):
            raise Unfit("the vision tower is on another device")
        kinds = tuple((probe, tuple(value.shape), value.dtype) for probe, value in probes.items())
        try:
            written = job.written
        except ConfigError as error:
            raise Unfit(f"its configuration cannot be told from another one's ({error})") from error
        # A job that was applied again finds what was captured for the one before.
        key = (
            type(pruner),
            written,
            layout.images,
            layout.image_sample,
            batch,
            embeds.dtype,
            embeds.shape[-1],
            kinds,
        )
        if key not in self.choices.graphs:
            # A capture takes as long as many prefills, and others have to make room: where more shapes come again and
            # again than there are graphs, each further capture waits twice as long.
            needed = CAPTURED_AFTER << min(max(self.captures - replay.MAX_GRAPHS + 1, 0), 16)
            times = self.met.get(key, 0) + 1
            if times <= needed:
                remember(self.met, key, times, 8 * replay.MAX_GRAPHS)
                raise Unfit("captured when pictures of these shapes come again")

        def make() -> Captured:
            self.captures += 1
            self.met.pop(key, None)
            seen = call.seen()
            features = torch.zeros_like(seen.features)
            given = {probe: torch.zeros_like(value) for probe, value in probes.items()}
            template = replace(seen, features=features, probes=given)

            def work() -> tuple[Any, ...]:
                tokens = replace(template, probes=dict(given), ctx={"image_lens": template.image_lens})
                found, kept = type(job).select(job, tokens, stage, batch)
                return found.index, found.cu_seqlens, found.order, found.features, found.info, kept

            run, static = replay.Replay(work, self.device, self.choices.pool), (features, *given.values())
            return Captured(run, static, run.out, sum(t.nbytes for t in static), template)

        def fill(features: Tensor, *given: Tensor) -> None:
            rows = embeds.detach().reshape(-1, embeds.shape[-1])
            torch.index_select(rows, 0, placed.position, out=features)
            for static, value in zip(given, probes.values(), strict=True):
                static.copy_(value)

        index, cu_seqlens, order, features, info, kept = self.choices.run(key, make, fill, copied)
        return Selection(index, cu_seqlens, order, features, info), kept

    # -- the vision tower ---------------------------------------------------------------------------------------------

    def _tower_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        job = self.job()
        if job is None or job.config.compile is None:
            return original(*args, **kwargs)
        try:
            out = self._run_tower(original, args, kwargs)
        except Unfit as why:
            self.local.tower = f"eager: {why}"
            return original(*args, **kwargs)
        self.local.tower = f"graph; {self.tower_shelf.about}"
        return out

    def _run_tower(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(("pixel_values",), args, strict=False)), **kwargs}
        pixels = given.pop("pixel_values", None)
        if len(args) > 1 or not isinstance(pixels, Tensor) or pixels.device != self.device:
            raise Unfit("pixels did not come as one tensor on the model's device")
        if any(not isinstance(v, bool | int | str | type(None)) for v in given.values()):
            raise Unfit("the vision tower was given more than pixels and switches")
        if torch.is_grad_enabled() and (pixels.requires_grad or self.tower_modules.trains()):
            raise Unfit("gradients are on")
        if self.tower_modules.owner.training:
            raise Unfit("the vision tower is in training mode")
        if torch.is_autocast_enabled(self.device.type) or torch._C._len_torch_dispatch_stack() > 0:
            raise Unfit("autocast, an op counter or another dispatch mode is on")
        if not self.tap.encoding:
            raise Unfit("the vision tower was called by itself")
        ours = {*self.own_hooks(), *(hook.id for hooks in self.tap.hooks.values() for hook in hooks)}
        wanted, cut = frozenset(self.tap.wanted()), early.cut(self.tap)
        inputs = (pixels,) if cut is None else (pixels, cut)

        def make() -> Captured:
            static = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs]

            def work() -> tuple[Any, dict[Probe, Tensor]]:
                with self.tap.capturing() as captured, early.cutting(self.tap, *static[1:]):
                    out = original(static[0], **given)
                return out, captured

            run = replay.Replay(work, self.device, self.tower_shelf.pool)
            return Captured(run, tuple(static), run.out, sum(x.nbytes for x in static))

        def fill(*static: Tensor) -> None:
            for buffer, x in zip(static, inputs, strict=True):
                buffer.copy_(x)

        key = (
            tuple(pixels.shape),
            pixels.dtype,
            wanted,
            cut is not None,
            tuple(sorted(given.items(), key=lambda item: item[0])),
        )
        if key not in self.tower_shelf.graphs:
            self.tower_modules.check(ours)
        out, captured = self.tower_shelf.run(key, make, fill, copied)
        self.tower_modules.check(ours)  # while the GPU is at it; what it reads is held below, whatever was moved
        self.tap.hand_over(captured)
        return out


class _Modules:
    """Modules that a graph stands for, with what must not change about them.

    Parameters
    ----------
    owner
        The one whose ``forward`` is wrapped: its own hooks run around the graph.
    parts
        Its children that the graph stands for; all, if none is named.
    """

    def __init__(self, owner: Any, parts: Collection[str] = ()) -> None:
        self.owner, self.parts = owner, {name: owner._modules[name] for name in parts or owner._modules}
        self.modules = [m for part in self.parts.values() if part is not None for m in part.modules()]
        whole = self.modules if parts else [owner, *self.modules]
        # Lists that are compared in one go: a model has hundreds of modules, and every prefill looks at all of them.
        self.children, self.expected = [m._modules for m in whole], [dict(m._modules) for m in whole]
        tensors = [(where, n, t) for m in whole for where in (m._parameters, m._buffers) for n, t in where.items()]
        owned = [(where, name, t) for where, name, t in tensors if t is not None]
        self.owners, self.names, self.tensors = ([row[i] for row in owned] for i in range(3))
        self.addresses = [t.data_ptr() for t in self.tensors]
        self.held = [t.data for t in self.tensors]
        self.dtype = next(t.dtype for t in self.tensors if t.is_floating_point())
        self.attributes = [m.__dict__ for m in self.modules]
        self.hooks = [hooks for m in self.modules for hooks in (m._forward_pre_hooks, m._forward_hooks)]

    def trains(self) -> bool:
        return any(t.requires_grad for t in self.tensors)

    def check(self, own: Collection[int]) -> None:
        """Raise `Unfit` where a module, a parameter or its memory was replaced, or something hooked itself in."""
        moved = any(self.owner._modules.get(name) is not part for name, part in self.parts.items())
        if moved or self.children != self.expected:
            raise Unfit("a module of the model was replaced after vtprune was applied; apply it again")
        same = all(map(operator.is_, map(dict.get, self.owners, self.names), self.tensors))
        if not same or list(map(Tensor.data_ptr, self.tensors)) != self.addresses:
            raise Unfit("weights of the model were moved after vtprune was applied; apply it again")
        forwards = filter(None, map(dict.get, self.attributes, itertools.repeat("forward")))
        if not all(map(ours, forwards)):
            raise Unfit("the forward of a module was replaced")
        for hooks in filter(None, self.hooks):
            for key, hook in hooks.items():
                # Those of transformers record hidden states and attention maps, where these are asked for.
                if key not in own and not str(getattr(hook, "__module__", "")).startswith("transformers."):
                    raise Unfit("a forward hook that is not vtprune's is on a module")
