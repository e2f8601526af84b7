# SPDX-License-Identifier: Apache-2.0
"""Several methods, one after the other: each sees what the one before it left."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from .budget import Budget, FixedBudget, Pools, SteppedBudget, check_keep, parse_keep
from .errors import ConfigError
from .registry import Pruner, build, methods, nearest
from .tokens import PROJECTOR, Probe, Selection, Stage, VisualTokens


@dataclass
class Composed(Pruner):
    """Methods in this order, at one place or further and further into the model. The last one meets the budget.

    Counts are worked out before the first method of a place runs, from the tokens that all of them start with, so that
    every pool of the budget (image, view, frame) is met exactly whatever lies between. A method before the last never
    keeps fewer than the next one will. Between two methods at one place lies one wait for the device.

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
        layers = [[-1 if s.layer is None else s.layer for s in m.stages()] for m in self.members]
        if any(max(one) > min(other) for one, other in pairwise(layers)):
            where = "; ".join(f"{m.name!r} at {', '.join(s.name for s in m.stages())}" for m in self.members)
            raise ConfigError(f"a method cannot begin before the one before it is done ({where}); choose another order")
        own = [stage for m in self.members for stage in m.stages()]
        sitting = {stage.layer for stage in own if stage.reversible}
        if sitting and any(s.layer is not None and not s.reversible for s in own):
            raise ConfigError(
                f"{'+'.join(m.name for m in self.members)!r}: where one method lets tokens sit out the attention of a "
                "layer, no other can drop them inside the language model; choose one that prunes before it"
            )
        self.at = tuple(
            Stage(None if at < 0 else at, reversible=at in sitting)
            for at in sorted({at for own in layers for at in own})
        )
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

    def fit(self, depth: int) -> Composed:
        return replace(self, members=tuple(m.fit(depth) for m in self.members))

    @property
    def prune_early_kv(self) -> bool:  # type: ignore[override]
        return any(m.prune_early_kv for m in self.members)

    def _here(self, stage: Stage) -> list[tuple[int, Stage]]:
        """Which members act at a place, and their own stage there."""
        own = [(i, next((s for s in m.stages() if s.layer == stage.layer), None)) for i, m in enumerate(self.members)]
        return [(i, s) for i, s in own if s is not None]

    def _budget(self, budget: Budget, member: int, stage: Stage) -> Budget:
        """What this member may leave at one of its stages, given the budget of the call."""
        if member + 1 < len(self.members):
            if self.keeps:
                budget = replace(budget, keep=float(math.prod(self.keeps[: member + 1])))
            else:
                budget = SteppedBudget.towards(budget, (member + 1) / len(self.members))
        return self.members[member].stage_budget(budget, stage)

    def _drops(self, member: int, stage: Stage) -> bool:
        """Whether this member drops tokens at that stage, and not only looks (as SparseVLM does at the projector)."""
        return self.members[member].stage_budget(Budget(0.5), stage).keep != 1.0

    def stage_budget(self, budget: Budget, stage: Stage) -> Budget:
        here = self._here(stage)
        return self._budget(budget, *([one for one in here if self._drops(*one)] or here)[-1])

    def check_checkpoint(self, checkpoint: str, vocabulary: Tensor) -> None:
        for member in self.members:
            member.check_checkpoint(checkpoint, vocabulary)

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        here = self._here(stage)
        lens, steps = self._counts(tokens, budget, here)
        left, starts = tokens, lens
        index, info = torch.arange(len(tokens.source), device=tokens.device), {}
        order = features = None
        for i, ((place, own), counts) in enumerate(zip(here, steps, strict=True)):
            member = self.members[place]
            counts = tuple(map(min, counts, lens))  # an adaptive method may have left fewer
            fixed = FixedBudget(budget.keep, budget.scope, budget.allocation, Pools(lens, counts))
            chosen = member.select(left, fixed, own)
            info.update({f"{member.name}.{key}": value for key, value in chosen.info.items()})
            order = None if chosen.order is None else index[chosen.order]
            index = index[chosen.index]
            if chosen.features is not None or features is not None:
                features = left.features[chosen.index] if chosen.features is None else chosen.features
            if i + 1 < len(here):
                left = left.subset(chosen.index, chosen.cu_seqlens)
                left = left if features is None else replace(left, features=features.to(tokens.features.dtype))
                if tokens.prompt_rows is not None:  # at one place, the prompt is still the one that the layer saw
                    acts = {probe: act for probe, act in tokens.probes.items() if probe.name == "ffn_act"}
                    left = replace(left, prompt_rows=tokens.prompt_rows[index], prompt_lens=tokens.prompt_lens)
                    left = left.with_probes(acts)
                lens = _found(index, starts) if member.adaptive else counts
        return Selection(index, torch.searchsorted(index, tokens.cu_seqlens), order, features, info)

    def _counts(
        self, tokens: VisualTokens, budget: Budget, here: list[tuple[int, Stage]]
    ) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """Rows of each pool at a place, and how many of them each member there leaves; `budget` is that of the last one
        that drops any."""
        lens, last = budget.pools(tokens)
        drops = [self._drops(*one) for one in here]
        acting = [one for one, does in zip(here, drops, strict=True) if does]
        steps = [last]
        for i in range(len(acting) - 1, 0, -1):
            if self.keeps:
                # Not `replace`: the last one may count in a way of its own.
                share = float(math.prod(self.keeps[: acting[i - 1][0] + 1]))
                plain = Budget(share, budget.scope, budget.allocation).pools(tokens)
                counts = plain.counts if plain.lens == lens else tuple(math.floor(n * share + 1e-6) for n in lens)
            else:
                counts = tuple(
                    math.floor(n * (k / n) ** (i / len(acting)) + 1e-6) if k else 0
                    for n, k in zip(lens, last, strict=True)
                )
            steps.insert(0, tuple(map(max, counts, steps[0])))
        return lens, [steps[done - 1] if done else lens for done in accumulate(drops)]


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
