# SPDX-License-Identifier: Apache-2.0
"""`zoo`: tokens to which the projector is sensitive, and that differ from those already kept."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..budget import Budget
from ..errors import ConfigError, UnsupportedModelError
from ..kernels import reference, select
from ..kernels import sensitivity as op
from ..kernels.dispatch import half, resolve
from ..kernels.memory import spare
from ..registry import Pruner, register
from ..tokens import PRE_PROJECTOR, PROJECTOR, Probe, Selection, Stage, VisualTokens

ESTIMATORS = ("fd", "fd_fused", "jvp", "frobenius")
#: Values that one block of directions may take, per intermediate tensor.
BLOCK = 1 << 24
#: Tokens at a time, where memory is short.
FEW = 64

Projector = Callable[[Tensor], Tensor]


class Diagnostics(NamedTuple):
    """What the sensitivity of one image is worth; NaN where a number has no meaning.

    Parameters
    ----------
    spearman_norm
        Rank correlation with the L2 norm of the projected tokens. Near 1, `norm` would have ranked them alike for free.
    split_half
        Rank correlation between the first and the second half of the directions. Near 1, fewer would do.
    spread
        ``(max - min) / max``; tokens cannot be told apart where it is near 0.
    """

    spearman_norm: float
    split_half: float
    spread: float


@register("zoo")
@dataclass
class ZooPruner(Pruner):
    r"""ZOO-Prune: sensitivity of the projector times distance to what is kept, greedily.

    Let x_i be the encoder rows of token i, Z_i = M(x_i) its projected row, and u_1 ... u_m random directions of unit
    length, the same for all tokens. Its sensitivity, and the pick that follows the kept set P, are::

        S_i  = 1/m * sum_j || M(x_i + h u_j) - M(x_i - h u_j) || / (2 h)
        S^_i = (S_i - min S) / (max S - min S + 1e-8)
        pick   argmax_i  S^_i * min_{p in P} (1 - cos(Z_i, Z_p))       first pick: argmax_i S^_i

    Paper: "ZOO-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models",
    CVPR 2026, https://arxiv.org/abs/2509.24837. Four ways to S, for a two-layer projector ``W2 act(W1 x + b1) + b2``
    with ``a = W1 x + b1``, ``c_j = W1 u_j``, ``g = act'(a)``:

    - ``"fd"``: the formula above, two runs of the projector per direction.
    - ``"fd_fused"``: ``|| W2 [act(a + h c_j) - act(a - h c_j)] || / (2 h)``; the same number (b2 and the first layer
      cancel), for less than half the matrix products, and the difference is taken before it can be rounded away.
    - ``"jvp"``: ``|| W2 (g * c_j) ||``, the limit for h -> 0.
    - ``"frobenius"``: ``sqrt(g^T G g / d_v)`` with ``G = (W1 W1^T) * (W2^T W2)``: the root mean square of
      ``||J u||`` over all directions, exact, without directions. G is made once per checkpoint, as is what a GPU takes
      for W2 in the two before; weights that were written through ``.data`` are noticed by the next ``apply``.

    Any other projector (PatchMergers, whose norm makes each token's first layer its own; adapters) has no closed form:
    there ``"fd_fused"`` runs as ``"jvp"``, which goes through `torch.func.jvp`, and ``"frobenius"`` takes one such
    product per input dimension: exact, but slow. The 2 x 2 rows that a merger joins move along the
    same direction. The report names what ran: ``report.info["estimator"]``.

    Deviations:

    - The authors perturb in the model's half precision, where most of a step of 0.01 is rounded away. Here the step is
      taken, and the projector run, in fp32, or in fp64 where encoder rows are fp32: rounding then tells no copies
      apart, and a GPU keeps what a CPU keeps. ``"fd"`` subtracts two nearly equal outputs: in fp32 with TF32 matrix
      products allowed it is noise, so leave that to the other estimators.
    - The default is ``"fd_fused"``, not ``"fd"``. The authors' low-rank stand-in for the projector is not offered.
    - Directions come from a seeded generator; theirs are different in each run. All images and prompts share them.
    - Where all tokens are equally sensitive up to rounding (a linear projector), S^ is 1 for all: farthest points from
      the lowest index. The authors compare max and min exactly on LLaVA, and not at all on LLaVA-NeXT.
    - Min-max and selection happen in each pool of the budget. With ``allocation="equal"`` these are the views of an
      AnyRes picture, as in the authors' code. There each view gets ``int(2880 * keep) // views`` tokens; here the
      picture's tokens after unpadding are what is counted, and views share by their size (`Budget`).
    - Newlines are separators: always kept, never counted. The authors mean to keep them, but their indices are 576 rows
      off.
    - The authors renumber positions; here ``apply(positions=...)`` decides. Video is pruned frame by frame; they use
      the first frame only.
    - Cosines above 1 - 1e-6 count as 1, so that rounding does not tell copies apart. Ties go to the lowest index.

    Parameters
    ----------
    estimator
        One of the four above.
    m
        Number of directions (``"frobenius"`` has none).
    h
        Step (``"fd"`` and ``"fd_fused"``).
    seed
        Not negative. Another seed, other directions.
    diagnostics
        True: the report's ``info`` has the mean of each number of `Diagnostics`, which costs a second estimate and a
        wait for the device.
    """

    paper = "arXiv:2509.24837"
    modality = ("image", "video")
    mechanism = ("similarity",)
    query_aware = False
    training_free = True
    adaptive = False

    estimator: str = "fd_fused"
    m: int = 64
    h: float = 0.01
    seed: int = 0
    diagnostics: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.estimator, str) or self.estimator not in ESTIMATORS:
            raise ConfigError(f"estimator={self.estimator!r} is unknown; choose one of {', '.join(ESTIMATORS)}")
        if isinstance(self.m, bool) or not isinstance(self.m, int) or self.m < 1:
            raise ConfigError(f"m={self.m!r} is no number of directions; give a whole number from 1 on")
        h = self.h
        if isinstance(h, bool) or not isinstance(h, int | float) or not math.isfinite(h) or h <= 0:
            raise ConfigError(f"h={h!r} is no step; give a number above 0, such as 0.01")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError(f"seed={self.seed!r} cannot seed a generator; give a whole number from 0 on")
        if not isinstance(self.diagnostics, bool):
            raise ConfigError(f"diagnostics={self.diagnostics!r} is no switch; give True or False")

    @property
    def needs(self) -> frozenset[Probe]:
        return frozenset({PRE_PROJECTOR})

    def check_model(self, width: int, projector: Any) -> None:
        if not isinstance(projector, nn.Module):
            return
        _check_weights(projector)
        if (layers := two_layers(projector)) is not None:
            _MADE.pop(layers[0].weight, None)  # what was written through ``.data`` leaves no trace
        # Kernels of quantised layers that keep their weights elsewhere have no derivative, and give zero for it.
        if all(p.ndim < 2 for p in projector.parameters()):
            raise UnsupportedModelError(
                f"'zoo' computes with the projector's weights, but this {type(projector).__name__} has no weight "
                f"matrix among its parameters (quantised layers keep theirs elsewhere); {_CURE}"
            )

    def score(self, tokens: VisualTokens) -> Tensor:
        """Sensitivity S of each token, ``[T]`` fp32."""
        return self._estimate(tokens)[0]

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        pools = budget.pools(tokens)
        scores, noise, ran = self._estimate(tokens)
        picks = select.sads(tokens.features, normalise(scores, pools.lens, noise), pools.lens, pools.counts)
        info = {"estimator": ran}
        if self.diagnostics:
            found = np.array(self.diagnose(tokens)).reshape(-1, 3)
            for name, column in zip(Diagnostics._fields, found.T, strict=True):
                sound = column[~np.isnan(column)]
                info[name] = f"{sound.mean():.3f}" if len(sound) else "nan"
        return Selection.from_picks(picks, tokens, None, **info)

    def diagnose(self, tokens: VisualTokens) -> list[Diagnostics]:
        """How far each image's sensitivity can be trusted, and what it adds to the norm. Waits for the device."""
        norms, half, parts = _norms(tokens).cpu(), self.m // 2, []
        if self.estimator != "frobenius" and half:
            parts = [self._estimate(tokens, part)[0].cpu() for part in (slice(half), slice(half, None))]
            whole = torch.lerp(parts[1], parts[0], half / self.m)
        else:
            whole = self._estimate(tokens)[0].cpu()
        found, start = [], 0
        for n in tokens.image_lens:
            rows = slice(start, start + n)
            start += n
            mine = whole[rows][whole[rows].isfinite()]
            high, low = (float(mine.max()), float(mine.min())) if len(mine) else (math.nan, math.nan)
            split = spearman(parts[0][rows], parts[1][rows]) if parts else math.nan
            found.append(Diagnostics(spearman(whole[rows], norms[rows]), split, (high - low) / high if high else 0.0))
        return found

    def _estimate(self, tokens: VisualTokens, part: slice = slice(None)) -> tuple[Tensor, Tensor, str]:
        """``[T]`` fp32 sensitivity, ``[T]`` the part of it that rounding may have made, and the estimator that ran."""
        raw = tokens.probes.get(PRE_PROJECTOR)
        if raw is None or tokens.projector is None:
            raise ConfigError("'zoo' needs the rows before the projector and the projector; make tokens with encode()")
        total = len(tokens.source)
        scores = tokens.features.new_zeros(total, dtype=torch.float32)
        noise = torch.zeros_like(scores)
        layers = two_layers(tokens.projector)
        ran = "jvp" if self.estimator == "fd_fused" and layers is None else self.estimator
        if not total:
            return scores, noise, ran
        projector, group = tokens.projector, raw.shape[0] // total
        directions = bank(raw.shape[1], self.m, self.seed)[part].to(raw.device, non_blocking=True)
        # In fp64 where rows are fp32: copies then have one sensitivity, and it is the same on every device.
        dtype = reference.wide(raw) if raw.dtype == torch.float32 else raw.dtype
        start = 0
        for n in tokens.image_lens:  # image by image, in memory of its own: rounded alike alone and in a batch
            rows = raw[start * group : (start + n) * group].detach().to(dtype, copy=True)
            if n:
                measure = functools.partial(
                    sensitivity, projector=projector, directions=directions, h=self.h, estimator=ran, group=group
                )
                few = functools.partial(_part_by_part, measure, rows, group)
                how = "the projector is asked about a few tokens at a time"
                found = spare(functools.partial(measure, rows), few, how)
                scores[start : start + n] = found.to(scores, non_blocking=True)
            start += n
        if ran in ("fd", "fd_fused"):
            noise = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * _norms(tokens) / (2 * self.h)
        return scores, noise, ran


def _part_by_part(measure: Callable[[Tensor], Tensor], rows: Tensor, group: int) -> Tensor:
    return torch.cat([measure(some) for some in rows.split(FEW * group)])


def _norms(tokens: VisualTokens) -> Tensor:
    return torch.linalg.vector_norm(tokens.features.detach().float(), dim=1)


# -- sensitivity ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def bank(dim: int, m: int, seed: int) -> Tensor:
    """Directions of unit length, ``[m, dim]`` fp32 on the CPU, the same for the same seed on every machine."""
    drawn = np.random.default_rng(seed).standard_normal((m, dim), dtype=np.float32)
    return torch.from_numpy(drawn / np.maximum(np.linalg.norm(drawn, axis=1, keepdims=True), 1e-12))


@torch.no_grad()
def sensitivity(
    rows: Tensor, projector: Projector, directions: Tensor, h: float = 0.01, estimator: str = "fd", group: int = 1
) -> Tensor:
    """How much each token's projection changes per unit of change in its encoder rows.

    Parameters
    ----------
    rows : Tensor
        ``[n * group, d_v]`` encoder rows. The work is done in fp32, or fp64 where they are fp64. On a GPU the kernels
        of `vtprune.kernels.sensitivity` multiply the half-precision weights of two layers as they are.
    projector
        Maps them to ``[n, D]``.
    directions : Tensor
        ``[m, d_v]`` of unit length; ``"frobenius"`` reads only their width.
    h, estimator
        See `ZooPruner`.
    group
        Rows per token; they move together.

    Returns
    -------
    Tensor
        ``[n]``, in the dtype in which it was computed.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    layers = None if estimator == "fd" else two_layers(projector)
    projector = projector if layers else _cast(projector, dtype)
    place = next(projector.parameters(), rows).device if isinstance(projector, nn.Module) else rows.device
    if layers is not None and group == 1 and dtype == torch.float32 and _has_kernel(layers):
        return _by_kernel(layers, rows.detach().to(place), directions.to(place), h, estimator)
    rows, directions = (x.detach().to(place, dtype, non_blocking=True) for x in (rows, directions))
    n, dim = rows.shape[0] // group, rows.shape[1]
    with torch.autocast(rows.device.type, enabled=False):
        if layers is not None and estimator == "frobenius":
            slope = _slope(layers[1], _hidden(layers, rows))
            return ((slope @ _gram(layers, dtype)) * slope).sum(1).clamp(min=0).div(dim).sqrt()
        squared = estimator == "frobenius"
        if squared:
            directions = torch.eye(dim, dtype=dtype, device=rows.device)
        change = _closed(layers, rows, h, estimator) if layers else _open(projector, rows, h, estimator)
        sizes = [max(p.shape, default=1) for p in projector.parameters()] if isinstance(projector, nn.Module) else []
        block = max(1, BLOCK // max(1, n * max(group * dim, *sizes, 1)))
        total = rows.new_zeros(n)
        for some in directions.split(block):
            norms = torch.linalg.vector_norm(change(some).view(len(some), n, -1), dim=-1)
            total += (norms.square() if squared else norms).sum(0)
        return (total / len(directions)).sqrt() if squared else total / len(directions)


def _has_kernel(layers: Layers) -> bool:
    return half(layers[2].weight) and resolve("auto", layers[2].weight) == "triton"


def _by_kernel(layers: Layers, rows: Tensor, directions: Tensor, h: float, estimator: str) -> Tensor:
    weights = op.Layers(layers[0].weight, layers[0].bias, layers[1], layers[2].weight)
    with torch.autocast(rows.device.type, enabled=False):
        if estimator == "frobenius":
            return op.mean_square_change(rows, weights, _gram(layers, torch.float32, torch.bfloat16))
        triangle = _triangle(layers)
        if triangle is not None:
            weights = weights._replace(outer=triangle)
        h = h if estimator == "fd_fused" else 0.0
        return op.mean_change(rows, weights, directions, h, triangular=triangle is not None)


Change = Callable[[Tensor], Tensor]


def _closed(layers: Layers, rows: Tensor, h: float, estimator: str) -> Change:
    """Directions ``[c, d_v]`` -> change of all tokens along each, ``[c, n, D]``: from the weights of two layers."""
    first, act, second = layers
    inner, outer = first.weight.detach().to(rows.dtype), second.weight.detach().to(rows.dtype)
    at = _hidden(layers, rows)
    slope = _slope(act, at) if estimator == "jvp" else None

    def change(some: Tensor) -> Tensor:
        step = (some @ inner.T)[:, None]
        if slope is not None:
            return (slope * step) @ outer.T
        return ((act(at + h * step) - act(at - h * step)) / (2 * h)) @ outer.T

    return change


def _open(projector: Projector, rows: Tensor, h: float, estimator: str) -> Change:
    """The same by running the projector."""

    def moved(some: Tensor) -> Tensor:
        return projector((rows + h * some[:, None]).flatten(0, 1))

    def along(direction: Tensor) -> Tensor:
        return torch.func.jvp(projector, (rows,), (direction.expand_as(rows),))[1]

    def change(some: Tensor) -> Tensor:
        if estimator == "fd":
            return (moved(some) - moved(-some)) / (2 * h)
        return torch.func.vmap(along)(some)

    return change


Layers = tuple[nn.Linear, Callable[[Tensor], Tensor], nn.Linear]


def two_layers(projector: Any) -> Layers | None:
    """The linear layers and the activation of ``W2 act(W1 x + b1) + b2``; None for whatever else a projector is."""
    if isinstance(projector, nn.Module):
        children = dict(projector.named_children())
        if tuple(children) == ("linear_1", "act", "linear_2") or type(projector) is nn.Sequential:
            parts = list(children.values())
            # Exactly nn.Linear: quantised and adapted layers extend it, and do something else with their weight.
            if len(parts) == 3 and type(parts[0]) is type(parts[2]) is nn.Linear and not [*parts[1].parameters()]:
                return None if any(p.is_meta for p in projector.parameters()) else cast(Layers, tuple(parts))
    return None


def _hidden(layers: Layers, rows: Tensor) -> Tensor:
    bias = layers[0].bias
    return nn.functional.linear(
        rows, layers[0].weight.detach().to(rows.dtype), None if bias is None else bias.detach().to(rows.dtype)
    )


def _slope(act: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Derivative of an elementwise function."""
    return torch.func.jvp(act, (at,), (torch.ones_like(at),))[1]


#: By the first layer's weight: what was made of both weights, and what they were then (versions, places).
_MADE: Any = WeakTensorKeyDictionary()


def _unversioned(layers: Layers) -> bool:
    """Whether nobody could tell that a weight has changed: tensors of inference mode have no version."""
    return bool(layers[0].weight.is_inference() or layers[2].weight.is_inference())


def _once(layers: Layers, name: tuple[Any, ...], make: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What `make` makes of both weights, once per checkpoint."""
    inner, outer = layers[0].weight, layers[2].weight
    if _unversioned(layers):
        return make(inner.detach(), outer.detach())
    stamp = [(w.data_ptr(), w._version, w.device) for w in (inner, outer)]
    made = _MADE.setdefault(inner, {})
    if name not in made or made[name][0] != stamp:
        made[name] = stamp, make(inner.detach(), outer.detach())
        if inner.is_cuda:  # other streams may read it next
            torch.cuda.current_stream(inner.device).synchronize()
    return cast(Tensor, made[name][1])


def _gram(layers: Layers, dtype: torch.dtype, kept: torch.dtype | None = None) -> Tensor:
    """G, computed in `dtype` and kept in another if asked to."""

    def make(inner: Tensor, outer: Tensor) -> Tensor:
        one, two = inner.to(dtype), outer.to(dtype)
        return ((one @ one.T) * (two.T @ two)).to(kept or dtype)

    return _once(layers, ("gram", dtype, kept or dtype), make)


def _triangle(layers: Layers) -> Tensor | None:
    """What stands for W2 in lengths. None where it would be made again and again, worth ten products each time (weights
    that train, or whose changes nobody can tell), and where there is no memory for it."""
    if _unversioned(layers) or layers[2].training:
        return None
    try:
        return _once(layers, ("triangle",), lambda _, outer: op.triangle(outer))
    except torch.cuda.OutOfMemoryError:
        return None


_CURE = "load the projector in floating point on a device, or choose another method or importance"


def _check_weights(projector: nn.Module) -> None:
    """Refuse weights that are not there, or not numbers to compute with."""
    for name, p in projector.named_parameters():
        packed = type(p) not in (nn.Parameter, Tensor)  # torchao's weights are tensors of a class of their own
        if p.is_meta or packed or not p.is_floating_point():
            kind = type(p).__name__ if packed else p.dtype
            state = "are offloaded" if p.is_meta else f"are quantised ({kind})"
            raise UnsupportedModelError(
                f"'zoo' computes with the projector's weights, but those of {name!r} {state}; {_CURE}"
            )


def _cast(projector: Projector, dtype: torch.dtype) -> Projector:
    """The projector in another precision, as a copy without hooks: other threads may be running the original."""
    if not isinstance(projector, nn.Module):
        return projector
    _check_weights(projector)

    def twin(module: nn.Module) -> nn.Module:
        made = object.__new__(type(module))
        state = made.__dict__
        state.update(module.__dict__)
        for kind in ("_parameters", "_buffers"):
            state[kind] = {
                name: x.detach().to(dtype) if x is not None and x.is_floating_point() else x
                for name, x in getattr(module, kind).items()
            }
        state["_modules"] = {name: None if m is None else twin(m) for name, m in module._modules.items()}
        state.update({name: OrderedDict() for name in state if name.endswith("_hooks")}, training=False)
        state.pop("forward", None)  # set on the instance: bound to the original
        return made

    return cast(Projector, twin(projector))


# -- selection --------------------------------------------------------------------------------------------------------


def _spans(lens: Sequence[int]) -> Iterator[slice]:
    start = 0
    for n in lens:
        if n:
            yield slice(start, start + n)
        start += n


def normalise(scores: Tensor, lens: Sequence[int], noise: Tensor | float = 0.0) -> Tensor:
    """Map the finite scores of each pool to [0, 1]; all to 1 where they are equal up to 1e-6 of the largest and
    the pool's median of `noise`."""
    noise = torch.as_tensor(noise, dtype=torch.float32, device=scores.device).expand_as(scores)
    out = torch.empty_like(scores)
    for rows in _spans(lens):
        mine = scores[rows]
        sound = mine.isfinite()
        low, high = mine.where(sound, torch.inf).amin(), mine.where(sound, -torch.inf).amax()
        same = high - low <= 1e-6 * high + _median(noise[rows])
        out[rows] = torch.where(same & sound, 1.0, (mine - low) / (high - low + 1e-8))
    return out


def _median(values: Tensor) -> Tensor:
    """The lower median ``[1]`` of what is not NaN; `torch.nanmedian` waits for the device."""
    ranked = values.sort().values  # NaN comes last
    return ranked[((~values.isnan()).sum(0, keepdim=True) - 1).clamp_min(0) // 2]


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of what is finite in both; ties share their mean rank. NaN where either is flat."""
    sound = a.isfinite() & b.isfinite()
    if int(sound.sum()) < 2:
        return math.nan
    ranks = []
    for values in (a[sound], b[sound]):
        _, place, count = values.unique(return_inverse=True, return_counts=True)
        ranks.append((count.cumsum(0).to(reference.wide(count)) - (count - 1) / 2)[place])
    x, y = (r - r.mean() for r in ranks)
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale else math.nan
