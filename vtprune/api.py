# SPDX-License-Identifier: Apache-2.0
"""The front door: `apply`, `remove`, `using`, `report`, `encode`, `select`. No tensor code lives here."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from .config import PruneConfig
from .encoders import Encoder, find_encoder
from .encoders.engine import EncoderEngine
from .engine.attach import LOCK, Engine, engine_of, overriding
from .engine.call import Encoded
from .engine.report import Report
from .errors import ConfigError, InputError, UnsupportedModelError, VTPruneWarning
from .models import find_family
from .models.base import Family
from .registry import choose
from .tokens import CLS_LOGITS, CLS_ROW, LAST_CLS_LOGITS, PRE_PROJECTOR, Probe, Selection, VisualTokens


class Handle:
    """What `apply` returns: a context manager, and the way to `remove` and `report` this application."""

    def __init__(self, engine: Engine | EncoderEngine, config: PruneConfig) -> None:
        self._engine = engine
        self._job = engine.job
        self.config = config

    def remove(self) -> None:
        """Undo this application. Does nothing if it was removed or replaced by a later `apply`."""
        if self._engine.job is self._job and self._job is not None:
            _release(self._engine)

    def report(self) -> Report:
        """See `vtprune.report`."""
        return _report(self._engine)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self._engine.fired = True  # the exception says enough; no second complaint
        self.remove()

    def __repr__(self) -> str:
        return f"<vtprune {self.config.label} keep={self.config.keep}>"


def apply(
    model: nn.Module,
    method: str | Sequence[str] | PruneConfig = "idpruner",
    *,
    keep: float | int | Sequence[float | int] | None = None,
    positions: str = "original",
    scope: str = "per_image",
    allocation: str = "auto",
    importance: str | None = None,
    restore: bool | None = None,
    compile: str | None = None,
    tower_keep: float = 1.0,
    tower_layer: int | None = None,
    **options: Any,
) -> Handle:
    """Prune the visual tokens of every later forward and ``generate()`` of `model`, in place.

    Parameters
    ----------
    model
        A stock transformers model of a supported family (or a PEFT wrapper around one), or a vision transformer of
        timm or open_clip on its own.
    method
        Name of a method (see `vtprune.methods`), several names for methods that run one after the other, or a
        `PruneConfig`, which then says everything.
    keep
        A float in (0, 1] is the fraction of visual tokens kept, an int a count per image. Default 0.25. For several
        methods, what the last one leaves, or a number for each: fractions multiply, a count belongs to the last.
    positions, scope, allocation, restore, compile, tower_keep, tower_layer
        See `PruneConfig` and `Budget`.
    importance
        Shorthand for the option ``importance`` of methods that have one.
    **options
        The method's own options. Of a vision transformer on its own also ``layer``, see `PruneConfig`.

    Returns
    -------
    Handle
        Also a context manager that removes the pruning on exit. A second `apply` replaces the first.

    Raises
    ------
    ConfigError
        Unknown method, option or value; the model is left as it was.
    UnsupportedModelError
        The model's family is not known, or it lacks what the method needs; the model is left as it was.

    Examples
    --------
    >>> import vtprune
    >>> model, processor = vtprune.load("pocket-llava")
    >>> handle = vtprune.apply(model, "idpruner", keep=0.25)
    >>> # model.generate(**inputs) now works on a quarter of the visual tokens
    >>> vtprune.remove(model)
    """
    bound: Any = _bind(model)
    config = _config(
        bound,
        method,
        keep=keep,
        positions=positions,
        scope=scope,
        allocation=allocation,
        importance=importance,
        restore=restore,
        compile=compile,
        tower_keep=tower_keep,
        tower_layer=tower_layer,
        **options,
    )
    with LOCK:
        engine: Any = engine_of(bound)
        fresh = engine is None
        engine = engine or _engine(bound)
        job = _prepare(engine, config)
        if fresh:
            engine.attach()
        engine.meet(bound)
        if engine.job is None:
            engine.users += 1
        engine.job = job
        if config.compile is None:
            engine.drop_graphs()
        engine.reset_counters()
    return Handle(engine, config)


def _bind(model: nn.Module) -> Family | Encoder:
    """What is known of this kind of model, bound to it."""
    return find_encoder(model) or find_family(model)


def _engine(bound: Any) -> Any:
    return EncoderEngine(bound) if isinstance(bound, Encoder) else Engine(bound)


def _config(bound: Family | Encoder, method: Any, **settings: Any) -> PruneConfig:
    """The config that these arguments mean for this model: ``layer`` is a method's option, or else an encoder's."""
    own = isinstance(bound, Encoder) and not isinstance(method, PruneConfig)
    layer = settings.pop("layer", None) if own else None
    config = make_config(method, **settings)
    return config if layer is None else dataclasses.replace(config, layer=layer)


def _prepare(engine: Engine | EncoderEngine, config: PruneConfig) -> Any:
    """Prepare a job; if that fails on a model without vtprune, leave nothing hooked."""
    try:
        job = engine.prepare(config)
        if isinstance(engine, Engine):
            _check(job, engine.family)
        return job
    except BaseException:
        if not engine.users:
            engine.detach()
        raise


def _check(job: Any, family: Family) -> None:
    """Refuse a model that the pruner cannot serve."""
    if not family.placeholders.keys() & set(job.pruner.modality):
        raise UnsupportedModelError(
            f"method {job.config.label!r} prunes {' and '.join(job.pruner.modality)} tokens, but this {family.label} "
            f"model has only {' and '.join(family.placeholders)} tokens; choose another method"
        )
    job.pruner.check_model(family.config.text_config.hidden_size, family.projector)
    job.pruner.check_checkpoint(family.checkpoint, family.vocabulary)


def make_config(method: str | Sequence[str] | PruneConfig, **settings: Any) -> PruneConfig:
    """The `PruneConfig` that these arguments of `apply` mean."""
    if isinstance(method, PruneConfig):
        defaults = {"positions": "original", "scope": "per_image", "allocation": "auto", "tower_keep": 1.0}
        extra = [k for k, v in settings.items() if v is not None and v != defaults.get(k)]
        if extra:
            raise ConfigError(
                f"got a PruneConfig and also {', '.join(extra)}; put everything into the config "
                "(dataclasses.replace(config, ...))"
            )
        return method
    fields = {f.name for f in dataclasses.fields(PruneConfig)} - {"method", "options", "layer"}
    known = {k: v for k, v in settings.items() if k in fields and not (v is None and k in ("keep", "restore"))}
    options = {k: v for k, v in settings.items() if k not in fields}
    if options.get("importance") is None:
        options.pop("importance", None)
    return PruneConfig(method, **known, options=options)


def remove(model: nn.Module) -> None:
    """Take vtprune off `model`: outputs are bit-identical to before, no hook is left. Does nothing if none was on.

    Warns
    -----
    VTPruneWarning
        If a pruner was applied and never fired, with the reason.
    """
    bound: Any = _bind(model)
    engine = engine_of(bound)
    if engine is not None and engine.job is not None:
        _release(engine)


def _release(engine: Engine | EncoderEngine) -> None:
    with LOCK:
        if not engine.fired:
            assert engine.job is not None
            warnings.warn(
                f"{engine.job.config.method!r} was applied and never fired: {engine.silence}",
                VTPruneWarning,
                stacklevel=3,
            )
        engine.job = None
        engine.users -= 1
        if not engine.users:
            engine.detach()


@contextmanager
def using(
    model: nn.Module, method: str | Sequence[str] | PruneConfig | None = "idpruner", **settings: Any
) -> Iterator[None]:
    """Prune with these settings only inside the ``with`` block and only in this thread or task.

    The settings are captured when a prompt is run, and its cache goes on with them whatever applies later. Two threads
    may use different methods on one model. ``method=None`` switches pruning off inside the block. If vtprune was not on
    the model before, it is off again after the block, and a cache that was pruned in it then refuses to be used.

    Parameters
    ----------
    model, method, **settings
        As for `apply`.
    """
    bound: Any = _bind(model)
    config = None if method is None else _config(bound, method, **settings)
    with LOCK:
        engine: Any = engine_of(bound) or _engine(bound)
        job = None if config is None else _prepare(engine, config)
        if engine_of(bound) is None:
            engine.attach()
        engine.meet(bound)
        engine.users += 1
    try:
        with overriding(engine, job):
            yield
    finally:
        with LOCK:
            engine.users -= 1
            if not engine.users:
                engine.detach()


def report(model: nn.Module) -> Report:
    """What the last forward with pictures did in this thread (else in any thread).

    Raises
    ------
    InputError
        If vtprune is not applied, or no forward with pictures has been run since.
    """
    bound: Any = _bind(model)
    engine = engine_of(bound)
    if engine is None:
        raise InputError("vtprune is not applied to this model; call vtprune.apply(model, ...) and run a forward first")
    return _report(engine)


def _report(engine: Engine | EncoderEngine) -> Report:
    make = engine.local.report or engine.last_report
    if make is None:
        raise InputError(f"there is nothing to report: {engine.silence}; run a forward with a picture first")
    return make()


def encode(model: nn.Module, inputs: Mapping[str, Any]) -> VisualTokens:
    """Run the vision tower and the projector, not the language model: what every pruner would see.

    Parameters
    ----------
    model
        A model of a supported family; vtprune need not be applied.
    inputs
        What the processor returned: ids, mask, pixels, grids.

    Returns
    -------
    VisualTokens
        Features and every probe that the encoder offers, for `select`: sweeps and sliders need no further forward.
    """
    family = find_family(model)
    if inputs.get("input_ids") is None and inputs.get("inputs_embeds") is None:
        raise InputError(
            "the inputs have neither input_ids nor inputs_embeds; pass what the model's processor returned"
        )
    known = (CLS_ROW, CLS_LOGITS, LAST_CLS_LOGITS, PRE_PROJECTOR)
    probes: frozenset[Probe] = frozenset(p for p in known if family.has_probe(p))
    with using(model, None):
        engine = engine_of(family)
        assert engine is not None
        engine.tap.hook(probes)
        engine.local.encode = probes
        try:
            with torch.no_grad():
                given = {k: v for k, v in inputs.items() if k in engine.signature and k != "past_key_values"}
                family.inner(**given, use_cache=False)
        except Encoded as done:
            return done.tokens
        finally:
            engine.local.encode = None
            engine._leave()
    raise InputError(
        "the inputs have no pictures, so there is nothing to encode; pass what the model's processor returned"
    )


def select(encoded: VisualTokens, method: str | Sequence[str] | PruneConfig = "idpruner", **settings: Any) -> Selection:
    """Choose tokens from what `encode` returned, without another model forward.

    Parameters
    ----------
    encoded
        Return value of `encode`.
    method, **settings
        As for `apply`; only methods that act at the projector can be run.
    """
    config = make_config(method, **settings)
    pruner = config.pruner()
    if config.tower_keep < 1.0:
        raise ConfigError(
            f"tower_keep={config.tower_keep} drops patches while the vision tower runs, and it has run; use apply"
        )
    for stage in pruner.stages():
        if stage.layer is not None:
            raise ConfigError(f"method {config.method!r} acts inside the language model; use apply and generate")
    for probe in pruner.needs - encoded.probes.keys():
        raise UnsupportedModelError(
            f"method {config.method!r} needs {probe.name!r}, which this encoder does not have; choose another "
            "importance or method"
        )
    with torch.no_grad():
        return choose(pruner, encoded, config.budget())
