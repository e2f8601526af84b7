# SPDX-License-Identifier: Apache-2.0
"""The engine: hooks on, hooks off, and which hook does what.

Three hooks carry it, all removable and none on a class: one on the inner multimodal model, which sees ids, pixels,
grids and the cache; one on its text model, which sees embeddings, positions and mask; one on the text model's rotary
embedding, which gets the true positions while everything else sees contiguous ones, because attention code takes gaps
in positions for borders between packed sequences. Beside them the inner model's ``get_*_features`` are wrapped on the
instance: newer transformers encode pictures in generate(), before the forward, and take grids and sizes away. Two other
methods of it, which wait for the device, are spared the wait (`shortcuts`), and the rotary embedding of a pruned
sequence is looked up (`rotary`).
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from .. import compat
from ..config import PruneConfig
from ..errors import ConfigError, InputError, UnsupportedModelError, VTPruneError, VTPruneWarning
from ..models.base import PIXEL_KEYS, Family
from ..tokens import ATTENTION_ROWS, LAYER_PROBES, Probe, Stage
from . import early, layer_probes, probes, reversible
from . import positions as pos
from .call import Call, Encoded, Job
from .entry import hold_back
from .fetched import Fetched, fetch
from .first_rows import release
from .graph import PrefillGraphs
from .layers import enter_layer, prune_cache
from .prefill import Prompt, prune_prompt, unpack
from .replay import Unfit
from .report import Report, make_report
from .rotary import RotaryTable
from .shortcuts import Shortcuts

ATTRIBUTE = "_vtprune_engine"
#: Guards hooks on and hooks off, of any model.
LOCK = threading.RLock()
_force_pack: ContextVar[bool] = ContextVar("vtprune_force_pack", default=False)
_override: ContextVar[tuple[tuple[weakref.ref[Any], Any], ...]] = ContextVar("vtprune_override", default=())


@contextmanager
def force_pack() -> Iterator[None]:
    """Run the whole packing machinery even where every row is kept, so that a test can tell it from a bypass."""
    token = _force_pack.set(True)
    try:
        yield
    finally:
        _force_pack.reset(token)


class _Local(threading.local):
    def __init__(self) -> None:  # nothing on the class, which older Dynamo takes for what a thread has
        self.call: Call | None = None
        self.labels: Tensor | None = None
        self.ahead = 0
        self.encode: frozenset[Probe] | None = None
        self.watchers: tuple[Callable[[Call], None], ...] = ()
        self.entry: int | None = None  # decoder layer before which visual tokens enter
        self.report: Callable[[], Report] | None = None


class Engine:
    """One per model, found with `engine_of`. Holds no tensor of a past call but what the report needs."""

    def __init__(self, family: Family) -> None:
        if not hasattr(family.lm, "rotary_emb") or not hasattr(family.lm, "layers"):
            raise UnsupportedModelError(
                f"the language model {type(family.lm).__name__} has no rotary_emb or no layers, so its positions "
                "cannot be kept; use a checkpoint with a Llama-like or Qwen-like language model"
            )
        compat.check_transformers(transformers.__version__)
        self.family = family
        self.tap = probes.EncoderTap(family, self._wanted_probes)
        self.shortcuts = Shortcuts(family, self.active_job, lambda: self.local.call)
        self.rotary = RotaryTable(family.lm.rotary_emb, lambda: self.local.call)
        self.signature = list(inspect.signature(family.inner.forward).parameters)
        self.job: Job | None = None
        self.users = 0
        self.local = _Local()
        self.handles: list[Any] = []
        self.first_hooked_layer = len(family.lm.layers)
        self.hooked_probes: set[Probe] = set()
        self.hooked_attention: set[int] = set()
        self.caches: weakref.WeakSet[Any] = weakref.WeakSet()
        self.graphs: PrefillGraphs | None = None
        self.no_graphs = ""
        self.reset_counters()

    last_report: Callable[[], Report] | None

    def reset_counters(self) -> None:
        """Forget what has fired; `silence` says why nothing has."""
        self.local.report = self.last_report = None
        self.fired = False
        self.silence = "no forward was run"

    def __deepcopy__(self, memo: Any) -> Engine:
        raise VTPruneError("a model with vtprune applied cannot be copied; call vtprune.remove(model) first")

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise VTPruneError("a model with vtprune applied cannot be pickled; call vtprune.remove(model) first")

    # -- on and off ---------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        inner, lm, outer = self.family.inner, self.family.lm, self.family.model
        self.handles += [
            inner.register_forward_pre_hook(self._enter, with_kwargs=True),
            inner.register_forward_hook(self._leave, always_call=True),
            lm.register_forward_pre_hook(self._enter_text_model, with_kwargs=True),
            lm.register_forward_hook(self._leave_text_model),
            lm.register_forward_hook(self._leave_direct_call, always_call=True),
            lm.rotary_emb.register_forward_pre_hook(self._rotary, with_kwargs=True),
        ]
        if outer is not inner:
            self._hook_outer(outer)
        self.tap.attach()
        self.shortcuts.attach()
        self.rotary.attach()
        setattr(inner, ATTRIBUTE, self)

    def _hook_outer(self, outer: Any) -> None:
        self.handles.append(outer.register_forward_pre_hook(self._copy_labels, with_kwargs=True))

    def meet(self, family: Family) -> None:
        """If vtprune was put on the inner model, and now the model with its head comes, see to its labels too."""
        if self.family.model is self.family.inner and family.model is not family.inner:
            self.family.model = family.model
            self._hook_outer(family.model)

    def detach(self) -> None:
        self._leave()  # after an interrupted forward
        self.drop_graphs()
        for handle in self.handles:
            handle.remove()
        self.handles, self.first_hooked_layer = [], len(self.family.lm.layers)
        self.hooked_probes.clear()
        self.hooked_attention.clear()
        self.tap.detach()
        self.shortcuts.detach()
        self.rotary.detach()
        self.family.inner.__dict__.pop(ATTRIBUTE, None)
        for cache in self.caches:
            pos.refuse(cache)

    def prepare(self, config: PruneConfig) -> Job:
        """Check that `config` can run on this model, and hook what only it needs.

        Raises
        ------
        ConfigError, UnsupportedModelError
            The method needs a layer, or a probe, that the model does not have.
        """
        if config.layer is not None:
            raise ConfigError(
                f"layer={config.layer!r} of a config is the block of an encoder alone after which patches go, and this "
                f"model has a language model; leave it out, or if {config.label!r} has such an option, give "
                f"options={{'layer': {config.layer!r}}}"
            )
        pruner = config.pruner().fit(len(self.family.lm.layers))
        stages = pruner.stages()
        for stage in stages:
            self._check_stage(config, stage)
        for probe in pruner.needs:
            has_probe = self.family.has_layer_probe if probe.name in LAYER_PROBES else self.family.has_probe
            if not has_probe(probe):
                part = "decoder" if probe.name in LAYER_PROBES else "encoder"
                has = "cannot give" if probe.name in ATTENTION_ROWS else "does not have"
                raise UnsupportedModelError(
                    f"method {config.method!r} needs {probe.name!r} of {part} layer {probe.layer}, which this "
                    f"{self.family.label} {part} {has}; choose another method"
                    + (" or importance='auto'" if probe.name == "cls_row" else "")
                )
        budget = config.budget()
        inside = frozenset(p for p in pruner.needs if p.name in LAYER_PROBES)
        wanted = (pruner.needs - inside) | {p for p in pruner.wants | budget.wants if self.family.has_probe(p)}
        if (left := early.left_probe(self.family, config)) is not None:
            wanted |= {left}
        job = Job(config, pruner, budget, stages, wanted, inside)
        self.tap.hook(wanted)
        if job.layer_stages:
            self._hook_layers(min(job.layer_stages))
        self._hook_attention(layer for layer, stage in job.layer_stages.items() if stage.reversible)
        self._hook_layer_probes(inside)
        if config.compile is not None:
            self._make_graphs()
        return job

    def _make_graphs(self) -> None:
        """Make ready to capture, or note why that cannot be. What was captured stays while it is sound."""
        with LOCK:
            if self.graphs is not None and self.graphs.tampered():
                self.drop_graphs()
            if self.graphs is None:
                try:
                    self.graphs = PrefillGraphs(
                        self.family,
                        self.tap,
                        self.active_job,
                        lambda: self.local.call,
                        lambda: {handle.id for handle in self.handles},
                    )
                except Unfit as why:
                    self.no_graphs = str(why)

    def drop_graphs(self) -> None:
        """Free the graphs, and take their wrappers off the model."""
        if self.graphs is not None:
            self.graphs.detach()
            self.graphs, self.no_graphs = None, "it was taken off the model"

    def _check_stage(self, config: PruneConfig, stage: Stage) -> None:
        """Refuse a layer that does not exist, and one that needs the rows of dropped tokens later on."""
        last = len(self.family.lm.layers) - 1
        if stage.layer is None:
            return
        if not 0 <= stage.layer < last:
            raise ConfigError(
                f"method {config.method!r} prunes after layer {stage.layer}, but the model has layers 0 to {last}; "
                f"choose a layer in 0..{last - 1}"
            )
        deep = len(getattr(self.family.config.vision_config, "deepstack_visual_indexes", None) or ())
        if stage.layer < deep - 1 and not stage.reversible:
            raise ConfigError(
                f"method {config.method!r} prunes after layer {stage.layer}, but the model adds features of the "
                f"encoder to the visual tokens up to layer {deep - 1} (DeepStack); choose a layer from {deep - 1} on"
            )

    def _hook_layer_probes(self, wanted: Collection[Probe]) -> None:
        """Make sure that these probes can be captured."""
        with LOCK:
            for probe in wanted:
                if probe not in self.hooked_probes:
                    self.handles.append(layer_probes.hook(self.family, probe, lambda: self.local.call))
                    self.hooked_probes.add(probe)

    def _hook_attention(self, wanted: Iterable[int]) -> None:
        """Make sure that tokens can sit out the attention of these layers."""
        with LOCK:
            for layer in wanted:
                if layer not in self.hooked_attention:
                    attention = self.family.lm.layers[layer].self_attn
                    self.handles += reversible.hook(attention, layer, lambda: self.local.call)
                    self.hooked_attention.add(layer)

    def _hook_layers(self, first: int) -> None:
        """Hook every decoder layer from `first` on, once."""
        layers = self.family.lm.layers
        if any(getattr(layer.self_attn, "sliding_window", None) for layer in layers):
            raise UnsupportedModelError(
                "pruning inside a language model with sliding-window layers is not supported; use a method that "
                "prunes at the projector"
            )
        with LOCK:
            for i in range(first, self.first_hooked_layer):
                hook = functools.partial(self._enter_layer, i)
                self.handles.append(layers[i].register_forward_pre_hook(hook, with_kwargs=True))
            self.first_hooked_layer = min(first, self.first_hooked_layer)

    # -- which job ----------------------------------------------------------------------------------------------------

    def active_job(self) -> Job | None:
        """The innermost override of this thread or task, else what was applied."""
        job: Job | None = job_of(self)
        return job

    def _wanted_probes(self) -> Collection[Probe]:
        if self.local.encode is not None:
            return self.local.encode
        job = self.active_job()
        return job.probes if job is not None else ()

    # -- the model with its head --------------------------------------------------------------------------------------

    def _copy_labels(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the loss read a copy of the labels, in which those of dropped tokens will be ignored."""
        # generate() asks for one row of logits of a prompt, and for one more with each candidate.
        rows = kwargs.get("logits_to_keep")
        cached = kwargs.get("past_key_values") is not None
        self.local.ahead = max(0, rows - 1) if isinstance(rows, int) and cached else 0
        labels = kwargs.get("labels")
        self.local.labels = None if labels is None or self.active_job() is None else labels.clone()
        return None if self.local.labels is None else (args, {**kwargs, "labels": self.local.labels})

    # -- the multimodal model -----------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kw = {**dict(zip(self.signature, args, strict=False)), **kwargs}
        if self.local.call is not None:  # one that was interrupted
            release(self.local.call.first_rows)
        call = self.local.call = Call(self.active_job(), labels=self.local.labels, ahead=self.local.ahead)
        self.local.labels, self.local.ahead = None, 0
        self.tap.collect_into(call.encodings)
        ids, embeds, cache = kw.get("input_ids"), kw.get("inputs_embeds"), kw.get("past_key_values")
        state = pos.state_of(cache)
        encoded = {m: out for m, out in (kw.get("mm_encoder_outputs") or {}).items() if out is not None}
        visual = bool(encoded) or any(kw.get(k) is not None for k in PIXEL_KEYS)
        if visual:
            self.silence = "no forward with pictures got as far as the language model"
        if not visual and (cache is None or cache.get_seq_length() == 0):
            self.silence = (
                "the inputs were embeddings without pixels, so no row is known to be visual"
                if ids is None
                else "no forward had pictures in its inputs"
            )
        asked = self.local.encode is not None or self.local.watchers or self.local.entry
        if visual and (call.job is not None or state is not None or asked):
            call.ids = ids
            call.given = {k: kw[k] for k in ("second_per_grid_ts", "mm_token_type_ids") if kw.get(k) is not None}
            if ids is not None:
                call.shape = ids.shape
                call.masks = functools.partial(probes.placeholder_masks, self.family, ids, None)
            elif embeds is not None:  # before the model puts pictures there
                call.shape = embeds.shape[:2]
                call.masks = probes.placeholder_masks(self.family, None, embeds)
            positions = None if self.family.mrope else kw.get("position_ids")
            call.fetched = fetch(ids, kw.get("attention_mask"), positions)
            for modality, out in encoded.items():
                call.encodings[modality] = probes.encoding_of(modality, out, self.tap.local.recent or {})
                call.given[f"{modality}_features"] = getattr(out, "pooler_output", None)
        elif state is not None and kw.get("position_ids") is None:
            # A hand-written decoding loop: the model would count positions from the length of the pruned cache.
            new: Any = ids if ids is not None else embeds
            valid = pos.all_valid(len(new), new.shape[1], new.device)
            kw["position_ids"] = pos.advance(state.next_original, valid)[0]
        return (), kw

    def _leave(self, *_: Any) -> None:
        if self.local.call is not None:
            release(self.local.call.first_rows)
        self.local.call = None
        self.tap.collect_into(None)

    def _leave_direct_call(self, *_: Any) -> None:
        if self.local.call is not None and self.local.call.direct:
            self.local.call = None

    # -- the text model -----------------------------------------------------------------------------------------------

    def _enter_text_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call, cache, embeds = self.local.call, kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
        if call is not None and call.left_behind(embeds):
            self._leave()
            call = None
        state = pos.state_of(cache)
        kw = dict(kwargs)
        if call is None and state is not None:
            call = self.local.call = Call(None, direct=True, entered=True)
            if embeds is None:
                ids = kw.pop("input_ids") if "input_ids" in kw else args[0]
                embeds = kw["inputs_embeds"] = self.family.lm.get_input_embeddings()(ids)
                args = ()
        if call is None or embeds is None or not (call.shape or state is not None):
            return None
        call.cache, call.past = cache, int(cache.get_seq_length()) if cache is not None else 0
        valid = new_rows(kw.get("attention_mask"), state, call.past, embeds, call.fetched)
        if call.shape:
            return (args, kw) if self._prune(call, kw, state, valid) else None
        assert state is not None
        self._continue(call, kw, state, valid)
        return args, kw

    def _prune(self, call: Call, kw: dict[str, Any], state: pos.CacheState | None, valid: Tensor | None) -> bool:
        """A prompt with pictures, on an empty or a filled cache; False where there is nothing to drop."""
        embeds, job = kw["inputs_embeds"], call.job
        new = pos.all_valid(len(embeds), embeds.shape[1], embeds.device) if valid is None else valid
        host_new, host_masks, host_ids = probes.to_host(self.family, call, kw.get("attention_mask"), new)
        layout = probes.match(self.family, call, host_masks, host_ids, embeds)
        unpadded = valid is None or bool(host_new.all())
        if not unpadded and not host_new.reshape(-1)[layout.position].all():
            raise InputError("the attention mask hides visual tokens; mask only padding")
        placed = layout.on(embeds.device, *embeds.shape[:2])
        call.tokens = functools.partial(probes.tokens_of, self.family, call, layout, embeds, placed)
        if self.local.encode is not None or (job is not None and job.pruner.query_aware):
            call.tokens = probes.with_question(
                self.family, call.seen(), call, layout, embeds, host_new, host_masks, host_ids
            )
        if self.local.encode is not None:
            raise Encoded(call.seen())
        call.slots = placed.position
        call.watched = bool(self.local.watchers)
        for watch in self.local.watchers:
            watch(call)
        if unpadded:
            rows = np.full(len(host_new), host_new.shape[1])
            tail = host_new.shape[1] - 1 - layout.end if layout.end >= 0 else 0
        else:
            rows = host_new.sum(1)
            lasts = zip(host_new, layout.last, strict=True)
            tail = min((int(row[last + 1 :].sum()) for row, last in lasts if last >= 0), default=0)
        starts_with_text = unpadded and not any(mask[:, 0].any() for mask in host_masks.values())
        prompt = Prompt(new, rows, placed, layout.sample_lens, unpadded, starts_with_text, tail)
        if self.local.entry:
            if job is not None:
                raise ConfigError("visual tokens cannot be injected while they are pruned; leave one of the two blocks")
            self._refuse_inside(call)
            hold_back(self.family, call, kw, state, prompt, self.local.entry)
            self._hook_stages(call)
            return True
        if job is not None:  # the report is made when someone asks, so that a forward never waits for it
            self.local.report = self.last_report = functools.partial(
                make_report,
                job.config,
                layout,
                rows.tolist(),
                call.trace,
                call.counts,
                call.attending_rows,
                self.family.config.text_config,
                call.compiled,
            )
            if job.config.compile is not None and self.graphs is None:
                call.compiled["language model"] = f"eager: {self.no_graphs}"
        early.leave(self.family, call)
        as_graph = self.graphs is not None and job is not None and job.config.compile is not None
        # A graph runs packed prompts, also where nothing is dropped; what the tower dropped is never left in.
        packs = as_graph or _force_pack.get() or bool(call.trace)
        if not packs and state is None and (job is None or job.keeps_everything(call.seen())):
            if job is not None:
                self._note_nothing_dropped(job, max(call.seen().image_lens, default=0))
            return False
        if job is not None and job.layer_stages:
            self._refuse_inside(call)
        if job is not None and call.ahead and job.reads_question:
            raise InputError(
                f"{job.config.label!r} looks at the question, and {call.ahead} candidates of assisted generation came "
                "along with this prompt; generate without an assistant, or with a method that looks at pictures alone"
            )
        choose = None
        if as_graph and self.graphs is not None and not call.trace:  # what the tower left is another set of rows
            choose = functools.partial(self.graphs.choose, call, layout, placed, embeds)
        prune_prompt(self.family, call, kw, state, prompt, choose)
        self._hook_stages(call)
        return True

    def _refuse_inside(self, call: Call) -> None:
        """Rows cannot change between two layers of every model."""
        if getattr(call.cache, "is_compileable", False):
            raise InputError(
                f"a {type(call.cache).__name__} has one length for all layers, but pruning inside the language model "
                "gives each its own; use a dynamic cache, or a method that prunes at the projector"
            )
        if (away := layer_probes.put_away(call.cache)) and call.job is not None:
            if call.job.pruner.prune_early_kv:
                raise InputError(
                    f"prune_early_kv takes tokens out of caches, which does not work with one that is {away}; leave it "
                    "off, or use a plain dynamic cache"
                )
            if call.past and any(probe.name in ATTENTION_ROWS for probe in call.job.layer_probes):
                raise InputError(
                    f"{call.job.config.label!r} reads the keys of earlier turns, which a cache that is {away} does not "
                    "have at hand; use a plain dynamic cache, or a method that prunes at the projector"
                )
        if module_checkpoints(self.family.lm):
            raise UnsupportedModelError(
                "changing the rows inside the language model does not work with gradient checkpointing, which runs "
                "layers again; switch it off or use a method that prunes at the projector"
            )

    def _note_nothing_dropped(self, job: Job, largest: int) -> None:
        self.fired = True  # it did what it was told to
        if isinstance(job.budget.keep, int) and largest:
            warnings.warn(
                f"keep={job.budget.keep} is not below the {largest} visual tokens of any image: all are kept; give a "
                "smaller number, or a fraction",
                VTPruneWarning,
                stacklevel=2,
            )

    def _continue(self, call: Call, kw: dict[str, Any], state: pos.CacheState, valid: Tensor | None) -> None:
        """New text on a pruned cache."""
        embeds = kw["inputs_embeds"]
        batch, queries, _ = embeds.shape
        if state.next_original.shape[0] == 1 < batch == call.cache.layers[0].keys.shape[0]:
            state = state.repeated(batch)
        if state.next_original.shape[0] != batch:
            raise InputError(
                f"the pruned cache belongs to a batch of {state.next_original.shape[0]}, but {batch} rows came; start "
                "with a new cache"
            )
        # The one wait of a step with a mask: where it hides nothing the model gets none, and does not look itself.
        all_valid = valid is None or bool(valid.all())
        new = pos.all_valid(batch, queries, embeds.device) if valid is None else valid
        original, next_original = pos.advance(state.next_original, new)
        positions, next_position = pos.advance(state.next_position, new)
        pos.check_continuation(kw.get("position_ids"), original, new)
        call.state = replace(
            state,
            masks={k: torch.cat([m, new], 1) for k, m in state.masks.items()},
            full={k: f and all_valid for k, f in state.full.items()},
            length=state.length + queries,
            prompt_length=state.prompt_length + queries,
            next_original=next_original,
            next_position=next_position,
            reach=None if state.reach is None else state.reach + queries,
        )
        call.set_sequence(kw, embeds, positions.expand(3, -1, -1) if state.mrope else positions)
        self._hook_stages(call)

    def _hook_stages(self, call: Call) -> None:
        """A cache that was pruned inside the language model needs the layer hooks whatever is applied by now."""
        assert call.state is not None
        first = min((k for k in call.state.masks if k), default=None)
        if first is not None:
            self._hook_layers(first)

    def _rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.local.call
        if call is None or call.rotary is None:
            return None
        # The text model asks once, before its layers; a KV-cache compressor may ask for other positions later.
        positions, call.rotary = call.rotary, None
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": positions}
        return (args[0], positions, *args[2:]), kwargs

    def _enter_layer(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.local.call
        if call is None or call.state is None or call.state.group(index) == 0:
            return None
        kw = dict(kwargs)
        hidden = args[0] if args else kw["hidden_states"]
        hidden = enter_layer(call, index, hidden, kw, self.family.lm.config._attn_implementation)
        return ((hidden, *args[1:]), kw) if args else (args, {**kw, "hidden_states": hidden})

    def _leave_text_model(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        call = self.local.call
        if call is None or call.state is None:
            return None
        cache = call.cache
        if cache is None:  # the text model may have made one
            values = out if isinstance(out, tuple) else (getattr(out, "past_key_values", None),)
            cache = next((v for v in values if hasattr(v, "get_seq_length")), None)
        if cache is not None:
            if call.job is not None and call.job.pruner.prune_early_kv and len(call.packs) > 1:
                prune_cache(call, cache)
            pos.commit(cache, pos.adopt(cache, call.state), self.caches)
        if not call.packs:
            return None
        self.fired = self.fired or bool(call.trace)
        slot_of = call.packs[0].slot_of
        for later in call.packs[1:]:
            moved = later.slot_of.to(slot_of.device).gather(1, slot_of.clamp_min(0))
            slot_of = torch.where(slot_of < 0, slot_of, moved)
        restore = call.job is None or call.job.config.restore
        if call.labels is not None:
            ignore_dropped(call.labels, slot_of, restore)
        if not restore:
            return None
        starts = call.packs[0].starts and len(call.packs) == 1
        if isinstance(out, tuple):
            return (unpack(out[0], slot_of, starts), *out[1:])
        out.last_hidden_state = unpack(out.last_hidden_state, slot_of, starts)
        return out


@contextmanager
def watching(family: Family, watch: Callable[[Call], None] | None = None, entry: int | None = None) -> Iterator[Engine]:
    """Within this block and thread, `watch` is told of every prompt with pictures before the language model runs it.

    It finds ``call.tokens`` and ``call.slots``, may note something in ``call.marks``, and its hooks find the call in
    ``engine.local.call``. With an `entry`, visual tokens enter before that decoder layer instead of with the prompt.
    """
    with attached(family) as engine:
        before = engine.local.watchers, engine.local.entry
        try:
            if entry:
                engine._hook_layers(entry)
            engine.local.watchers = before[0] if watch is None else (*before[0], watch)
            engine.local.entry = before[1] if entry is None else entry
            yield engine
        finally:
            engine.local.watchers, engine.local.entry = before


def new_rows(
    mask: Any, state: pos.CacheState | None, past: int, embeds: Tensor, fetched: Fetched | None = None
) -> Tensor | None:
    """Which new rows are tokens, ``[B, q]`` bool; None if all are and nobody has to ask the device for that.

    Raises
    ------
    InputError
        The mask is of a kind, or a length, that does not fit the cache.
    """
    mask = mask.get("full_attention") if isinstance(mask, dict) else mask
    if mask is None:
        return None
    if mask.ndim != 2:
        raise InputError(
            f"a {mask.ndim}-D attention mask (static cache, or a custom mask) cannot be pruned; pass a 2-D mask and a "
            "dynamic cache"
        )
    queries = embeds.shape[1]
    before = state.prompt_length if state is not None else past
    if mask.shape[1] != before + queries:
        raise InputError(
            f"the attention mask has {mask.shape[1]} columns, but {before} tokens were passed before and {queries} are "
            "new; pass only the new tokens, with the mask of the whole conversation (dropped tokens and padding "
            "included)"
        )
    if fetched is not None and fetched.mask is mask and fetched.all_valid:
        return None
    return mask[:, before:].to(embeds.device).bool()


def ignore_dropped(labels: Tensor, slot_of: Tensor, restore: bool) -> None:
    """Set the labels ``[B, L]`` of dropped tokens to -100, in place."""
    if not restore:
        raise InputError("labels need restore=True, which brings logits back to the length of the labels")
    # A slot was kept if its packed slot is not its predecessor's.
    before = torch.nn.functional.pad(slot_of[:, :-1], (1, 0), value=-1)
    kept = (slot_of != before) & (before >= 0)  # the first kept row has no predecessor that could predict it
    labels.masked_fill_(~kept.to(labels.device), -100)


def module_checkpoints(lm: Any) -> bool:
    return bool(lm.training and getattr(lm, "gradient_checkpointing", False))


def engine_of(family: Family) -> Engine | None:
    """The engine on this model, if vtprune is on it."""
    return getattr(family.inner, ATTRIBUTE, None)


def job_of(engine: Any) -> Any:
    """What an engine has to do: the innermost override of this thread or task, else what was applied."""
    for other, job in reversed(_override.get()):
        if other() is engine:
            return job
    return engine.job


@contextmanager
def attached(family: Family) -> Iterator[Engine]:
    """Keep the engine on this model, whatever is applied or removed meanwhile."""
    with LOCK:
        engine = engine_of(family) or Engine(family)
        if engine_of(family) is None:
            engine.attach()
        engine.meet(family)
        engine.users += 1
    try:
        yield engine
    finally:
        with LOCK:
            engine.users -= 1
            if not engine.users:
                engine.detach()


@contextmanager
def overriding(engine: Any, job: Any) -> Iterator[None]:
    """Let `job` replace the engine's own in this thread or task."""
    token = _override.set((*_override.get(), (weakref.ref(engine), job)))
    try:
        yield
    finally:
        _override.reset(token)
