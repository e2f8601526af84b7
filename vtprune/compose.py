# SPDX-License-Identifier: Apache-2.0
"""Several methods, one after the other: each sees what the one before it left."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .budget import Budget, FixedBudget, Pools, check_keep, parse_keep
from .errors import ConfigError
from .registry import Pruner, build, methods, nearest
from .tokens import PROJECTOR, Probe, Selection, Stage, VisualTokens


@dataclass
class Composed(Pruner):
    """Methods that act at the same place, in this order. The last one meets the budget.

    Counts are worked out before the first method runs, from the tokens that all of them start with, so that every pool
    of the budget (image, view, frame) is met exactly whatever lies between. A method before the last never keeps fewer
    than the next one will. Between two methods lies one wait for the device.

    Parameters
    ----------
    members
        Two or more.
    keeps
        What each keeps of what it sees: fractions, but for the last, which may have a count. Empty: equal steps down to
        the budget; of n methods, method i leaves ``N * (K / N) ** (i / n)`` of N tokens for a budget of K.
    """

    members: tuple[Pruner, ...]
    keeps: tuple[float | int, ...] = ()
    at: tuple[Stage, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if any(m.stages() != self.members[0].stages() for m in self.members) or len(self.members[0].stages()) != 1:
            where = "; ".join(f"{m.name!r} at {', '.join(s.name for s in m.stages())}" for m in self.members)
            raise ConfigError(f"methods run after one another only at one and the same place ({where}); choose others")
        self.at = self.members[0].stages()
        # What a class says about itself, each instance says here.
        self.__dict__.update(
            name="+".join(m.name for m in self.members),
            paper=", ".join(dict.fromkeys(m.paper for m in self.members)),
            mechanism=tuple(dict.fromkeys(word for m in self.members for word in m.mechanism)),
            query_aware=any(m.query_aware for m in self.members),
            training_free=all(m.training_free for m in self.members),
            adaptive=any(m.adaptive for m in self.members),
            modality=tuple(word for word in self.members[0].modality if all(word in m.modality for m in self.members)),
            allocation=self.members[-1].allocation,
        )

    @property
    def needs(self) -> frozenset[Probe]:
        return frozenset().union(*(m.needs for m in self.members))

    @property
    def wants(self) -> frozenset[Probe]:
        return frozenset().union(*(m.wants for m in self.members))

    def stages(self) -> tuple[Stage, ...]:
        return self.at

    def check_model(self, width: int, projector: Any) -> None:
        for member in self.members:
            member.check_model(width, projector)

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        lens, steps = self._counts(tokens, budget)
        left, starts = tokens, lens
        index, info = torch.arange(len(tokens.source), device=tokens.device), {}
        order = features = None
        for i, (member, counts) in enumerate(zip(self.members, steps, strict=True)):
            counts = tuple(map(min, counts, lens))  # an adaptive method may have left fewer
            fixed = FixedBudget(budget.keep, budget.scope, budget.allocation, Pools(lens, counts))
            chosen = member.select(left, fixed, stage)
            info.update({f"{member.name}.{key}": value for key, value in chosen.info.items()})
            order = None if chosen.order is None else index[chosen.order]
            index = index[chosen.index]
            if chosen.features is not None or features is not None:
                features = left.features[chosen.index] if chosen.features is None else chosen.features
            if i + 1 < len(self.members):
                left = left.subset(chosen.index, chosen.cu_seqlens)
                left = left if features is None else replace(left, features=features.to(tokens.features.dtype))
                lens = _found(index, starts) if member.adaptive else counts
        return Selection(index, torch.searchsorted(index, tokens.cu_seqlens), order, features, info)

    def _counts(self, tokens: VisualTokens, budget: Budget) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """Rows of each pool, and how many of them each member leaves."""
        lens, last = budget.pools(tokens)
        steps = [last]
        for i in range(len(self.members) - 1, 0, -1):
            if self.keeps:
                share = math.prod(self.keeps[:i])
                counts = replace(budget, keep=float(share)).pools(tokens).counts
            else:
                counts = tuple(
                    math.floor(n * (k / n) ** (i / len(self.members)) + 1e-6) if k else 0
                    for n, k in zip(lens, last, strict=True)
                )
            steps.insert(0, tuple(map(max, counts, steps[0])))
        return lens, steps


def _found(index: Tensor, lens: Sequence[int]) -> tuple[int, ...]:
    """Rows of `index` in each pool of so many rows. Waits for the device."""
    borders = torch.tensor(list(accumulate(lens)), device=index.device)
    found = torch.bincount(torch.bucketize(index, borders, right=True), minlength=len(lens))
    return tuple(found.tolist())


def compose(names: Sequence[str], keeps: tuple[float | int, ...], options: dict[str, Any]) -> Composed:
    """The methods called `names` as one. An option goes to every one of them that has it."""
    table, known = methods(), {}
    for name in names:
        build(name, {})  # an unknown name, or one that cannot do without options, says so itself
        known[name] = [f.name for f in dataclasses.fields(table[name]) if f.init]  # type: ignore[arg-type]
    everything = sorted({option for own in known.values() for option in own})
    for option in options:
        if option not in everything:
            raise ConfigError(
                f"none of the methods {', '.join(names)} has an option {option!r}{nearest(str(option), everything)}; "
                f"their options are {', '.join(everything) or 'none'}"
            )
    return Composed(tuple(build(name, {k: v for k, v in options.items() if k in known[name]}) for name in names), keeps)


def parse_names(text: str) -> str | tuple[str, ...]:
    """One method's name, or those of ``"norm+idpruner"``. A name may end in a plus: ``"prumerge++idpruner"``."""
    names = (text,) if text in methods() else tuple(re.split(r"\+(?=\w)", text))
    return text if len(names) == 1 else names


def parse_keeps(text: str) -> float | int | tuple[float | int, ...]:
    """A budget as on the command line, or one for each method: ``"1/2+64t"``.

    Raises
    ------
    ConfigError
        A part is no budget.
    """
    keeps = tuple(map(parse_keep, text.split("+")))
    return keeps[0] if len(keeps) == 1 else keeps


def check_keeps(keep: Any, methods: int) -> tuple[float | int, ...]:
    """`keep` of a list of methods as one number for each: fractions, the last of which may be a count."""
    keeps = tuple(check_keep(k) for k in keep)
    if len(keeps) != methods:
        raise ConfigError(
            f"keep={list(keep)!r} has {len(keeps)} numbers for {methods} methods; give one number, or each its own"
        )
    for k in keeps[:-1]:
        if isinstance(k, int):
            raise ConfigError(
                f"keep={list(keep)!r} has the count {k} before its end; a count belongs to the last method, give the "
                "others a fraction in (0, 1]"
            )
    return keeps
