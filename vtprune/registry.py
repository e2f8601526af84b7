# SPDX-License-Identifier: Apache-2.0
"""The table of methods: name -> pruner class, and the base class that a new method extends."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor

from .budget import Budget
from .errors import ConfigError, VTPruneWarning
from .kernels import select
from .kernels.memory import spare
from .tokens import PROJECTOR, Probe, Selection, Stage, VisualTokens

ENTRY_POINT_GROUP = "vtprune.pruners"

Modality = Literal["image", "video"]
Mechanism = Literal["transformation", "similarity", "attention", "query"]

#: What every method declares (see `Pruner`), and the words it may use; None: True or False.
DECLARED: dict[str, tuple[str, ...] | None] = {
    "modality": get_args(Modality),
    "mechanism": get_args(Mechanism),
    "query_aware": None,
    "training_free": None,
    "adaptive": None,
}

_METHODS: dict[str, type[Pruner]] = {}


class Pruner:
    """Base of all methods. A method is one file with one dataclass; its fields are its options.

    Either override `score` (top-k of the score is kept) or `select` (greedy and adaptive methods). Write over flat
    ragged rows (see `VisualTokens`); no loop over tokens, no host sync; random numbers come from a generator seeded
    with ``(seed, tokens.image_rank)`` and drawn on the CPU, so that the result is the same alone, in a batch and on a
    GPU.
    """

    name: ClassVar[str] = ""
    #: Paper or origin of the method, for `vtprune.methods()` and the documentation.
    paper: ClassVar[str] = ""

    # The next five have no default: every method declares them, and `register` checks that it did.
    #: What it can prune.
    modality: ClassVar[tuple[Modality, ...]]
    #: What its choice rests on, what counts most first: how the encoder attends to tokens, how alike tokens are, what
    #: the question asks for; or that it makes new tokens out of several (merging, pooling). Empty: none of these.
    mechanism: ClassVar[tuple[Mechanism, ...]]
    #: Uses the question, which it is then given in ``VisualTokens.text``.
    query_aware: ClassVar[bool]
    #: Needs no trained weights of its own.
    training_free: ClassVar[bool]
    #: How many tokens it keeps depends on the picture, not on the budget's pools alone (may sync once, for the count).
    adaptive: ClassVar[bool]

    #: Orders all tokens from best to worst: a larger budget keeps what a smaller one does, and more.
    ordered: ClassVar[bool] = True
    #: The allocation (see `Budget`) that it takes where nobody asks for another.
    allocation: ClassVar[str] = "equal"
    #: With ``compile="graph"``, `select` may run as a CUDA graph, replayed on other tokens of the same shapes. Say so
    #: of a method whose choice is the same launches whatever the values are: nothing is kept between calls, drawn, or
    #: copied from the host, but through `kernels._jit.constant`. Classes derived from it say so for themselves.
    capturable: bool = False
    #: Also drop the tokens from the caches of the layers below a stage, once the prompt has gone through all layers.
    prune_early_kv: bool = False

    @property
    def needs(self) -> frozenset[Probe]:
        """Probes without which the method cannot run; checked at `apply`."""
        return frozenset()

    @property
    def wants(self) -> frozenset[Probe]:
        """Probes that the method uses where the model has them."""
        return frozenset()

    def stages(self) -> tuple[Stage, ...]:
        """Where the method acts, in ascending order."""
        return (PROJECTOR,)

    def fit(self, depth: int) -> Pruner:
        """The method with whatever depends on the number of decoder layers filled in; called at `apply`."""
        return self

    def stage_budget(self, budget: Budget, stage: Stage) -> Budget:
        """The budget of one stage, given that of the call."""
        return budget if stage.keep is None else replace(budget, keep=stage.keep)

    def check_model(self, width: int, projector: Any) -> None:
        """Refuse a model that the method cannot serve for a reason that `needs` cannot tell; called at `apply`.

        Parameters
        ----------
        width
            D, of the projected tokens.
        projector
            The module that makes them, as in `VisualTokens`.

        Raises
        ------
        ConfigError, UnsupportedModelError
            Where an option does not fit the model, and where the model lacks something.
        """

    def check_checkpoint(self, checkpoint: str, vocabulary: Tensor) -> None:
        """Refuse a checkpoint that the method knows too little about; called at `apply`.

        Parameters
        ----------
        checkpoint, vocabulary
            As in `VisualTokens`.
        """

    def score(self, tokens: VisualTokens) -> Tensor:
        """Score per token, ``[T]`` fp32, larger is better; NaN counts as -inf."""
        raise NotImplementedError(f"{type(self).__name__} must override score() or select()")

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        """Choose the tokens that stay: the top-k of `score` in each pool, ties to the lowest index."""
        pools, scores = budget.pools(tokens), self.score(tokens)
        if scores.shape != tokens.source.shape:
            raise ConfigError(
                f"{type(self).__name__}.score returned shape {tuple(scores.shape)}; expected one number per token, "
                f"{tuple(tokens.source.shape)}"
            )
        return Selection.from_picks(select.topk(scores, pools.lens, pools.counts), tokens, pools)


def choose(pruner: Pruner, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
    """What ``pruner.select`` chooses; on the CPU, where the device has no memory left for it."""

    def on_cpu() -> Selection:
        here, cpu = tokens.device, torch.device("cpu")
        ctx = {key: value.to(cpu) if isinstance(value, Tensor) else value for key, value in tokens.ctx.items()}
        table = None if tokens.vocabulary is None else tokens.vocabulary.to(cpu)
        before = dict(ctx)
        found = pruner.select(replace(tokens.to(cpu), ctx=ctx, vocabulary=table), budget, stage)
        # What is no tensor (a cache of `evs`, say) is of these tokens on the CPU, and made again where it is wanted.
        new = {key: value for key, value in ctx.items() if value is not before.get(key) and isinstance(value, Tensor)}
        tokens.ctx.update({key: value.to(here) for key, value in new.items()})
        moved = {
            name: value.to(here)
            for name in ("index", "cu_seqlens", "order", "features")
            if (value := getattr(found, name)) is not None
        }
        return replace(found, **moved)

    return spare(lambda: pruner.select(tokens, budget, stage), on_cpu, "the CPU chooses")


P = TypeVar("P", bound=type[Pruner])


def register(name: str) -> Callable[[P], P]:
    """Class decorator: make a `Pruner` dataclass known under `name`.

    Third-party packages name theirs in the entry point group ``vtprune.pruners`` instead.

    Raises
    ------
    ConfigError
        No `Pruner` dataclass, a name that is taken, or something of `DECLARED` that is missing or misspelt.
    """

    def add(cls: P) -> P:
        if not dataclasses.is_dataclass(cls) or not issubclass(cls, Pruner):
            raise ConfigError(f"@register({name!r}) needs a dataclass that extends vtprune.Pruner, got {cls!r}")
        check_declared(name, cls)
        # The same class again is fine: a reloaded module, a notebook cell that ran twice.
        old = _METHODS.get(name, cls)
        if (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"a method named {name!r} exists already ({old!r}); choose another name")
        cls.name = name
        _METHODS[name] = cls
        return cls

    return add


def check_declared(name: str, cls: type[Pruner]) -> None:
    """Refuse a class that does not declare what `DECLARED` lists."""
    own = [word for parent in cls.__mro__ if parent not in Pruner.__mro__ for word in vars(parent)]
    for declared, words in DECLARED.items():
        wanted = "True or False" if words is None else f"a tuple of {', '.join(map(repr, words))}"
        if not hasattr(cls, declared):
            close = difflib.get_close_matches(declared, own, n=1)
            raise ConfigError(
                f"method {name!r} ({cls.__qualname__}) does not declare {declared}"
                + (f", only {close[0]!r}" if close else "")
                + f"; give the class {declared} = ..., {wanted}"
            )
        value = getattr(cls, declared)
        if words is None:
            sound = isinstance(value, bool)
        else:
            sound = isinstance(value, tuple) and all(word in words for word in value)
            # An empty mechanism is that of a baseline; a method for no modality is none.
            sound = sound and (value != () or declared == "mechanism")
        if not sound:
            raise ConfigError(f"method {name!r} ({cls.__qualname__}) declares {declared} = {value!r}; write {wanted}")
    if ("query" in cls.mechanism) != cls.query_aware:
        raise ConfigError(
            f"method {name!r} ({cls.__qualname__}) declares mechanism = {cls.mechanism!r} and query_aware = "
            f"{cls.query_aware}; a method that uses the question says so in both, any other in neither"
        )


@functools.cache
def _entries(find: Callable[..., Iterable[EntryPoint]]) -> tuple[EntryPoint, ...]:
    """Entry points of installed packages, looked up once: it takes a tenth of a second, and every `apply` asks."""
    return tuple(find(group=ENTRY_POINT_GROUP))


def methods() -> dict[str, type[Pruner]]:
    """All known methods by name, sorted: the built-in ones and those that other installed packages provide."""
    from . import pruners  # noqa: F401  # imported here, because every file in there imports this module

    for entry in _entries(entry_points):
        if entry.name not in _METHODS:
            try:
                register(entry.name)(entry.load())
            except Exception as error:  # whatever another package does wrong must not disable the other methods
                message = f"method {entry.name!r} ({entry.value}) was left out: {error}"
                warnings.warn(message, VTPruneWarning, stacklevel=2)
    return dict(sorted(_METHODS.items()))


def nearest(word: str, known: list[str]) -> str:
    """`` (did you mean 'x'?)`` or an empty string."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def build(method: str, options: dict[str, Any]) -> Pruner:
    """Make the pruner called `method` with these options.

    Raises
    ------
    ConfigError
        Unknown method or option (with the nearest known one), or a value that the method refuses.
    """
    table = methods()
    if not isinstance(method, str) or method not in table:
        raise ConfigError(
            f"unknown method {method!r}{nearest(str(method), list(table))}; known methods: {', '.join(table)}"
        )
    cls = table[method]
    fields = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    for option in options:
        if option not in fields:
            known = f"its options are {', '.join(fields)}" if fields else "it has no options"
            raise ConfigError(f"method {method!r} has no option {option!r}{nearest(str(option), fields)}; {known}")
    return cls(**options)
