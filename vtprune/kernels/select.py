# SPDX-License-Identifier: Apache-2.0
"""Greedy selection of rows: what pruners call. Runs the kernels of `greedy` on a GPU, `reference` elsewhere.

All ops take *flat ragged rows*: the rows of all pools one after the other, with `lens` rows and `counts` picks per pool
as host numbers. Nothing waits for the device, and calls can be captured in a CUDA graph (after one that was not, as
always). Ties go to the lowest row; broken rows (NaN, infinity) come last.

On a GPU, half-precision rows are compared by cosines whose products run on the tensor cores (exact, summed in fp32) and
which are kept in steps of 2^-14: each pick's fp32 score, given the picks before it, is at most 1e-3 below the best.
fp32 rows get the picks of the reference, whose cosines are summed in fp64, and so are the same on every device. The
picks of a pool are the same alone and in a batch, and the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from .coverage import coverage as slow_coverage
from .dispatch import forgiving, half, resolve
from .dpp import dpp as slow_dpp


@dataclass(frozen=True)
class Picks:
    """Rows that were picked, ``[sum(counts)]`` int64 flat rows each.

    Parameters
    ----------
    order : Tensor
        Pool after pool, each in the order of choice.
    index : Tensor
        The same rows, ascending.
    """

    order: Tensor
    index: Tensor


def _in_order(order: Tensor) -> Picks:
    return Picks(order, order.sort().values)


@forgiving
@torch.no_grad()
def topk(scores: Tensor, lens: Sequence[int], counts: Sequence[int], backend: str = "auto") -> Picks:
    """The rows with the largest scores of each pool; see `reference.topk`, which has the same picks on every device.

    Parameters
    ----------
    scores : Tensor
        ``[T]``, compared as fp32; NaN counts as -inf.
    lens, counts, backend
        As in `mmr`.
    """
    if resolve(backend, scores) == "triton":
        from . import topk as kernel

        if kernel.fits(lens):
            return Picks(*kernel.topk(scores, lens, counts))
    return _in_order(reference.topk(scores, lens, counts))


@forgiving
@torch.no_grad()
def mmr(
    features: Tensor,
    importance: Tensor,
    lens: Sequence[int],
    counts: Sequence[int],
    lam: float,
    parallel_k: int = 1,
    backend: str = "auto",
    minmax: bool = False,
) -> Picks:
    """Maximal marginal relevance: ``lam * importance - (1 - lam) * (largest cosine to a pick)``, see `reference.mmr`.

    Parameters
    ----------
    features : Tensor
        ``[T, D]``.
    importance : Tensor
        ``[T]``, on the scale of a cosine. NaN and -inf come last.
    lens, counts
        Rows and picks per pool, ``0 <= counts[p] <= lens[p]``.
    lam
        In [0, 1].
    parallel_k
        Picks per round; those of one round do not see each other.
    backend
        ``"auto"``, ``"triton"`` or ``"torch"``, see `dispatch.resolve`.
    minmax
        Map the importance of each pool to [0, 1] first, as `reference.minmax` does.
    """
    if importance.shape != features.shape[:1]:
        raise ValueError(f"importance of shape {tuple(importance.shape)} for {features.shape[0]} rows")

    def slow(features: Tensor, importance: Tensor, lens: Sequence[int], counts: Sequence[int]) -> Tensor:
        scores = reference.minmax(importance, lens) if minmax else importance
        return reference.mmr(features, scores, lens, counts, lam, parallel_k)

    if resolve(backend, features) == "torch":
        return _in_order(slow(features, importance, lens, counts))
    from . import greedy

    def one(rows: slice, k: int) -> Tensor:
        return slow(features[rows], importance[rows], (rows.stop - rows.start,), (k,))

    return Picks(*greedy.pick(greedy.MMR, features, importance, lens, counts, one, lam, parallel_k, minmax))


@forgiving
@torch.no_grad()
def max_min(features: Tensor, lens: Sequence[int], counts: Sequence[int], backend: str = "auto") -> Picks:
    """Farthest points by cosine distance, from the row whose nearest neighbour is farthest; see `reference.max_min`.

    Parameters as in `mmr`.
    """
    if resolve(backend, features) == "torch":
        return _in_order(reference.max_min(features, lens, counts))
    from . import greedy

    def slow(rows: slice, k: int) -> Tensor:
        return reference.max_min(features[rows], (rows.stop - rows.start,), (k,))

    return Picks(*greedy.pick(greedy.MAX_MIN, features, None, lens, counts, slow))


@forgiving
@torch.no_grad()
def sads(
    features: Tensor, importance: Tensor, lens: Sequence[int], counts: Sequence[int], backend: str = "auto"
) -> Picks:
    """``importance * (1 - largest cosine to a pick)``, seeded at the largest importance; see `reference.sads`.

    Parameters as in `mmr`, with importance in [0, 1].
    """
    if importance.shape != features.shape[:1]:
        raise ValueError(f"importance of shape {tuple(importance.shape)} for {features.shape[0]} rows")
    if resolve(backend, features) == "torch":
        return _in_order(reference.sads(features, importance, lens, counts))
    from . import greedy

    def slow(rows: slice, k: int) -> Tensor:
        return reference.sads(features[rows], importance[rows], (rows.stop - rows.start,), (k,))

    return Picks(*greedy.pick(greedy.SADS, features, importance, lens, counts, slow))


@forgiving
@torch.no_grad()
def coverage(
    features: Tensor, weight: Tensor, lens: Sequence[int], counts: Sequence[int], backend: str = "auto"
) -> Picks:
    """``weight * gain`` in the coverage of all rows; see `coverage.coverage`.

    Parameters as in `mmr`, with weights that are not negative. fp32 rows run in PyTorch.
    """
    if weight.shape != features.shape[:1]:
        raise ValueError(f"weight of shape {tuple(weight.shape)} for {features.shape[0]} rows")
    if resolve(backend, features) == "torch" or not half(features):
        return _in_order(slow_coverage(features, weight, lens, counts))
    from . import cooperative

    def slow(rows: slice, k: int) -> Tensor:
        return slow_coverage(features[rows], weight[rows], (rows.stop - rows.start,), (k,))

    return Picks(*cooperative.cover(features, weight, lens, counts, slow))


@forgiving
@torch.no_grad()
def dpp(features: Tensor, quality: Tensor, lens: Sequence[int], counts: Sequence[int], backend: str = "auto") -> Picks:
    """The determinant of ``quality_i * quality_j * cosine_ij`` over the picks; see `dpp.dpp`.

    Parameters as in `mmr`, with qualities that are not negative. fp32 rows run in PyTorch.
    """
    if quality.shape != features.shape[:1]:
        raise ValueError(f"quality of shape {tuple(quality.shape)} for {features.shape[0]} rows")
    if resolve(backend, features) == "torch" or not half(features):
        return _in_order(slow_dpp(features, quality, lens, counts))
    from . import cooperative

    def slow(rows: slice, k: int) -> Tensor:
        return slow_dpp(features[rows], quality[rows], (rows.stop - rows.start,), (k,))

    return Picks(*cooperative.volume(features, quality, lens, counts, slow))
