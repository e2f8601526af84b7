# SPDX-License-Identifier: Apache-2.0
"""How many visual tokens may stay, and how that number is spread over images, views and frames."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from .errors import ConfigError
from .tokens import Probe, VisualTokens

SCOPES = ("per_image", "joint")
#: Allocations that need to know nothing but lengths; methods add theirs with `allocation`.
ALLOCATIONS = ("equal", "proportional", "pooled")


class Policy(NamedTuple):
    """An allocation that looks at the tokens: what it does, and the probes that it uses where the model has them."""

    split: Callable[[VisualTokens, float | int, Sequence[int]], tuple[int, ...]]
    wants: frozenset[Probe]


_POLICIES: dict[str, Policy] = {}


def allocation(name: str, wants: frozenset[Probe] = frozenset()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: make ``split(tokens, keep, counts)`` known as the allocation `name`.

    It gets the tokens, `Budget.keep` and how many tokens each image may keep, and returns the count of each segment as
    host numbers: no more than the segment has, and in sum no more than the image may keep.
    """

    def add(split: Callable[..., Any]) -> Callable[..., Any]:
        _POLICIES[name] = Policy(split, wants)
        return split

    return add


def allocations() -> tuple[str, ...]:
    """All known allocations."""
    from . import pruners  # noqa: F401  # imported here, because every file in there imports this module

    return (*ALLOCATIONS, *sorted(_POLICIES))


class Pools(NamedTuple):
    """Consecutive runs of flat rows in which tokens compete, and how many each run may keep (host numbers).

    A pool is a segment, an image or a sample, as the budget says; no pool reaches across samples.
    """

    lens: tuple[int, ...]
    counts: tuple[int, ...]


def segments_of(tokens: VisualTokens, lens: Sequence[int]) -> list[slice]:
    """The segments that each pool (of so many rows) spans. One without rows goes with its image."""
    samples = [tokens.image_sample[image] for image in tokens.seg_image]
    kinds: tuple[tuple[Sequence[int], int], ...] = (
        (range(len(samples)), len(samples)),
        (tokens.seg_image, tokens.num_images),
        (samples, tokens.num_samples),
    )
    for owners, number in kinds:
        segments, rows = [0] * number, [0] * number
        for owner, n in zip(owners, tokens.seqlens, strict=True):
            segments[owner] += 1
            rows[owner] += n
        if rows == list(lens):
            return [slice(end - k, end) for end, k in zip(accumulate(segments), segments, strict=True)]
    spans, stop = [], 0
    for left in lens:  # pools of another kind
        start = stop
        while stop < len(samples) and tokens.seqlens[stop] <= left:
            left -= tokens.seqlens[stop]
            stop += 1
        spans.append(slice(start, stop))
    return spans


def largest_remainder(total: int, weights: Sequence[int]) -> tuple[int, ...]:
    """Split `total` in proportion to `weights` (never above a weight); what is left over goes to the largest
    remainders, ties to the lowest index. Needs ``total <= sum(weights)``."""
    full = sum(weights)
    if full == 0:
        return tuple(0 for _ in weights)
    shares = [total * w // full for w in weights]
    # Integer remainders: exact, so that ties are ties on every machine.
    by_remainder = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % full), i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return tuple(shares)


def fill(total: int, weights: Sequence[float], caps: Sequence[int]) -> tuple[int, ...]:
    """Split `total` in proportion to `weights`, none above its cap: what a cap cuts off goes to the others in
    proportion, what rounding leaves to the largest remainders, ties to the lowest index.

    Where the weights of those that have room are all 0, their caps are their weights. Needs ``total <= sum(caps)``.
    """
    shares = [0.0] * len(caps)
    free = set(range(len(caps)))
    left = float(total)
    while free and left > 0:
        scale = sum(weights[i] for i in free)
        part = {i: left * (weights[i] / scale if scale > 0 else caps[i] / sum(caps[j] for j in free)) for i in free}
        full = [i for i in sorted(free) if part[i] >= caps[i]]
        if not full:
            for i in free:
                shares[i] = part[i]
            break
        for i in full:
            shares[i] = float(caps[i])
            left -= caps[i]
            free.discard(i)
        if scale <= 0:
            break
    # 1e-9: a share that is whole up to rounding is whole, and remainders that differ by rounding tie.
    counts = [min(cap, math.floor(x + 1e-9)) for x, cap in zip(shares, caps, strict=True)]
    by_remainder = sorted(range(len(caps)), key=lambda i: (-round(shares[i] - counts[i], 9), i))
    missing = total - sum(counts)
    while missing > 0:
        for i in by_remainder:
            if missing > 0 and counts[i] < caps[i]:
                counts[i] += 1
                missing -= 1
    return tuple(counts)


def check_keep(keep: Any) -> float | int:
    """Return `keep` as a float in (0, 1] (a fraction kept) or an int >= 1 (a count per image).

    Raises
    ------
    ConfigError
        For any other value, with the cure.
    """
    cure = "give a fraction kept in (0, 1], such as 0.25, or a whole number of tokens per image, such as 128"
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real):
        raise ConfigError(f"keep={keep!r} is a {type(keep).__name__}; {cure}")
    if isinstance(keep, numbers.Integral):
        if keep < 1:
            raise ConfigError(f"keep={keep} keeps no token; {cure}")
        return int(keep)
    value = float(keep)
    if not math.isfinite(value) or not 0.0 < value <= 1.0:
        hint = f" (did you mean the count keep={int(value)}?)" if value > 1 and value.is_integer() else ""
        raise ConfigError(f"keep={keep!r} lies outside (0, 1]{hint}; {cure}")
    return value


def parse_keep(text: str) -> float | int:
    """Read a budget from the command line: ``0.25``, ``1/9`` and ``25%`` are fractions kept, ``128t`` is a count.

    A bare whole number is refused, because ``1`` could mean everything or one token.
    """
    s = text.strip().lower()
    cure = "write a fraction (0.25, 1/9, 25%) or a count of tokens per image (128t)"
    try:
        if s.endswith("t"):
            return check_keep(int(s[:-1]))
        if s.endswith("%"):
            return check_keep(float(s[:-1]) / 100)
        if "/" in s:
            top, bottom = s.split("/")
            return check_keep(float(int(top) / int(bottom)))
        if s.lstrip("+-").isdigit():
            check_keep(int(s))
            raise ConfigError(f"keep {text!r} could be a fraction or a count; write {s}t for {s} tokens or 1.0 for all")
        return check_keep(float(s))
    except ConfigError:
        raise
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ConfigError(f"keep {text!r} is not a budget; {cure}") from None


@dataclass(frozen=True)
class Budget:
    """How many visual tokens may stay; separators (newlines, vision_start/end) do not count.

    Parameters
    ----------
    keep
        A float is the fraction KEPT, in (0, 1]; an int is a count per image. A video counts as one image.
        ``K_image = max(1, floor(N_image * keep + 1e-6))`` for a fraction, ``min(keep, N_image)`` for a count.
    scope
        ``"per_image"``: every image has its own budget. ``"joint"``: the images of one sample share the sum.
    allocation
        How budgets meet segments (AnyRes views, video frames).

        - ``"equal"``: every segment of an image keeps the same share of its tokens (largest remainder, ties to the
          lowest index).
        - ``"proportional"``: the images of a sample share the sum of their budgets, and every segment of all of them
          keeps the same share of its tokens. Beside ``"equal"`` that matters where `keep` is a count and images differ
          in size: the count is then the mean of the sample.
        - ``"pooled"``: all segments of an image compete.
        - ``"globalcom2"``: crops for which the thumbnail has more to show, and frames that differ more from their clip,
          keep more (see `vtprune.pruners.globalcom2`). One wait for the device.
        - ``"change"``: frames keep in proportion to how much they change since the one before (`vtprune.pruners.evs`).
        - ``"vidcom2"``: frames unlike their clip keep more (`vtprune.pruners.vidcom2`). Both wait for the device once.

        With ``scope="joint"`` everything in the sample competes, and this has no say.
    """

    keep: float | int = 0.25
    scope: str = "per_image"
    allocation: str = "equal"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", check_keep(self.keep))
        if self.scope not in SCOPES:
            raise ConfigError(f"scope={self.scope!r} is unknown; choose one of {', '.join(SCOPES)}")
        if self.allocation not in ALLOCATIONS and self.allocation not in allocations():
            raise ConfigError(f"allocation={self.allocation!r} is unknown; choose one of {', '.join(allocations())}")

    @property
    def wants(self) -> frozenset[Probe]:
        """Probes that the allocation uses where the model has them."""
        policy = None if self.scope == "joint" else _POLICIES.get(self.allocation)
        return frozenset() if policy is None else policy.wants

    def image_count(self, n: int) -> int:
        """Tokens that an image of `n` visual tokens keeps."""
        if n == 0:
            return 0
        if isinstance(self.keep, int):
            return min(self.keep, n)
        return min(n, max(1, math.floor(n * self.keep + 1e-6)))

    def pools(self, tokens: VisualTokens) -> Pools:
        """Where tokens compete and how many win, as host numbers. Pools follow the order of the flat rows.

        At a layer stage, where earlier stages have already dropped tokens, the budget still counts from the tokens
        that the images came with (``tokens.ctx["image_lens"]``), and never exceeds what is left.
        """
        image_lens = tokens.image_lens
        whole = tuple(tokens.ctx.get("image_lens", image_lens))
        if self.scope != "joint" and self.allocation in _POLICIES:
            counts = tuple(map(min, map(self.image_count, whole), image_lens))
            return Pools(tokens.seqlens, _POLICIES[self.allocation].split(tokens, self.keep, counts))
        # 1 and 1.0 are equal, and are not the same budget.
        return _pools(
            self, isinstance(self.keep, int), image_lens, whole, tokens.image_sample, tokens.seqlens, tokens.seg_image
        )


@lru_cache(maxsize=256)
def _pools(
    budget: Budget,
    counted: bool,
    image_lens: tuple[int, ...],
    whole: tuple[int, ...],
    image_sample: tuple[int, ...],
    seqlens: tuple[int, ...],
    seg_image: tuple[int, ...],
) -> Pools:
    """`Budget.pools` where lengths and the fields of the budget say everything: a prefill asks three times, and the
    next like it again."""
    wanted = [budget.image_count(n) for n in whole]
    num_samples = max(image_sample, default=-1) + 1
    if budget.scope == "joint":
        lens, totals = [0] * num_samples, [0] * num_samples
        for image, sample in enumerate(image_sample):
            lens[sample] += image_lens[image]
            totals[sample] += wanted[image]
        return Pools(tuple(lens), tuple(map(min, totals, lens)))
    counts = tuple(map(min, wanted, image_lens))
    if budget.allocation == "pooled":
        return Pools(image_lens, counts)
    shares: list[int] = []
    if budget.allocation == "proportional":
        for sample in range(num_samples):
            own = [image for image, s in enumerate(image_sample) if s == sample]
            segments = [n for n, i in zip(seqlens, seg_image, strict=True) if i in own]
            shares.extend(largest_remainder(min(sum(segments), sum(wanted[i] for i in own)), segments))
        return Pools(seqlens, tuple(shares))
    for image, k in enumerate(counts):
        segments = [n for n, i in zip(seqlens, seg_image, strict=True) if i == image]
        shares.extend(largest_remainder(k, segments))
    return Pools(seqlens, tuple(shares))


@dataclass(frozen=True)
class SteppedBudget(Budget):
    """A step on the way down to `keep`: of N tokens, K of which stay in the end, ``floor(N (K / N) ** power)`` stay."""

    power: float = 1.0

    def image_count(self, n: int) -> int:
        last = super().image_count(n)
        return max(last, math.floor(n * (last / n) ** self.power + 1e-6)) if n else 0

    @classmethod
    def towards(cls, budget: Budget, power: float) -> SteppedBudget:
        """A step towards `budget`; towards what a step leaves, so many steps of it."""
        whole = budget.power if isinstance(budget, SteppedBudget) else 1.0
        return cls(budget.keep, budget.scope, budget.allocation, power * whole)


_NONE = Pools((), ())


@dataclass(frozen=True)
class FixedBudget(Budget):
    """A budget whose pools were worked out before, for a method that sees only what another one left."""

    given: Pools = _NONE

    def pools(self, tokens: VisualTokens) -> Pools:
        return self.given
