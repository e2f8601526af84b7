# SPDX-License-Identifier: Apache-2.0
"""The table of methods: name -> pruner class, and the base class that a new method extends."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from .budget import Budget
from .errors import ConfigError, VTPruneWarning
from .kernels import reference
from .tokens import PROJECTOR, Probe, Selection, Stage, VisualTokens

ENTRY_POINT_GROUP = "vtprune.pruners"

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
    #: Uses the question.
    query_aware: ClassVar[bool] = False
    #: Needs no trained weights of its own.
    training_free: ClassVar[bool] = True
    #: Finds its own count (may sync once, for the count).
    adaptive: ClassVar[bool] = False
    #: What it can prune.
    modality: ClassVar[frozenset[str]] = frozenset({"image", "video"})
    #: One or two words on how it chooses, for tables.
    mechanism: ClassVar[str] = ""
    #: Orders all tokens from best to worst, so that its worst can be asked for.
    ordered: ClassVar[bool] = True
    #: The allocation (see `Budget`) that it takes where nobody asks for another.
    allocation: ClassVar[str] = "equal"

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
        return Selection.from_order(reference.topk(scores, pools.lens, pools.counts), tokens)


P = TypeVar("P", bound=type[Pruner])


def register(name: str) -> Callable[[P], P]:
    """Class decorator: make a `Pruner` dataclass known under `name`.

    Third-party packages name theirs in the entry point group ``vtprune.pruners`` instead.
    """

    def add(cls: P) -> P:
        if not dataclasses.is_dataclass(cls) or not issubclass(cls, Pruner):
            raise ConfigError(f"@register({name!r}) needs a dataclass that extends vtprune.Pruner, got {cls!r}")
        # The same class again is fine: a reloaded module, a notebook cell that ran twice.
        old = _METHODS.get(name, cls)
        if (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"a method named {name!r} exists already ({old!r}); choose another name")
        cls.name = name
        _METHODS[name] = cls
        return cls

    return add


def methods() -> dict[str, type[Pruner]]:
    """All known methods by name, sorted: the built-in ones and those that other installed packages provide."""
    from . import pruners  # noqa: F401  # imported here, because every file in there imports this module

    for entry in entry_points(group=ENTRY_POINT_GROUP):
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
