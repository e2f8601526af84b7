# SPDX-License-Identifier: Apache-2.0
"""VASparse's formulas as functions of tensors: contrast, sink weights, the value of a key, and clusters of keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def contrast(full: Tensor, prior: Tensor, alpha: float, plausibility: float) -> Tensor:
    """Contrastive log-probabilities of the next token.

    ``(1 + alpha) * full - alpha * prior`` over the tokens whose probability under `full` is at least `plausibility`
    times the largest one; normalised, so that beams can add them up. Constants added to a row of either input cancel.

    Parameters
    ----------
    full : Tensor
        ``[B, V]`` logits or log-probabilities of the model.
    prior : Tensor
        ``[B, V]`` logits of the model that has not looked at the picture.
    alpha
        Strength, > 0.
    plausibility
        Share of the largest probability, in [0, 1]; 0 lets every token pass.

    Returns
    -------
    Tensor
        ``[B, V]`` in the dtype of `full`; -inf where a token is not plausible.
    """
    rows = full.float()
    mixed = (1 + alpha) * rows - alpha * prior.float()
    if plausibility > 0:
        floor = rows.amax(-1, keepdim=True) + math.log(plausibility)
        mixed = mixed.masked_fill(rows < floor, -math.inf)
    return mixed.log_softmax(-1).to(full.dtype)


def sink_factors(columns: Tensor, valid: Tensor, beta: float) -> Tensor:
    """What the sink penalty multiplies each attention logit by: ``1 + beta - beta * w``, in [1, 1 + beta].

    Parameters
    ----------
    columns : Tensor
        ``[B, H, kv]`` fp32 attention that each key has received so far, summed over queries.
    valid : Tensor
        ``[B, kv]`` bool, False at padding.
    beta
        Strength, >= 0.

    Returns
    -------
    Tensor
        ``[B, H, kv]`` fp32, where ``w = softmax(columns)`` over the valid keys.
    """
    weights = columns.masked_fill(~valid[:, None], -math.inf).softmax(-1).nan_to_num()
    return 1 + beta - beta * weights


def key_values(squares: Tensor, mass: Tensor, among: Tensor, lam: float) -> Tensor:
    """Value of each candidate: ``delta_i = score_i ** 2 + lam * P_i``, where ``P = softmax(mass)`` over candidates.

    Keeping the S largest minimises ``sum of dropped score_i ** 2 - lam * sum of kept P_i``, exactly, because that
    objective is a sum over keys.

    Parameters
    ----------
    squares : Tensor
        ``[..., kv]`` fp32 squared scores of the newest query; over the heads that share a selection, their mean.
    mass : Tensor
        ``[..., kv]`` fp32, how much each token attended to the picture when it was itself the query.
    among : Tensor
        ``[..., kv]`` bool, the candidates.

    Returns
    -------
    Tensor
        ``[..., kv]`` fp32, -inf where a key is no candidate; a candidate with NaN is worth less than any other.
    """
    attention = mass.masked_fill(~among, -math.inf).softmax(-1)
    value = (squares + lam * attention).nan_to_num(nan=torch.finfo(torch.float32).min, posinf=math.inf)
    return value.masked_fill(~among, -math.inf)


def top(value: Tensor, count: Tensor) -> Tensor:
    """``[..., kv]`` bool: the `count` (``[...]``) largest values of each row; ties go to the lowest index."""
    order = value.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(value.shape[-1], device=value.device).expand_as(order)
    )
    return (rank < count[..., None]) & (value > -math.inf)


def density_peaks(keys: Tensor, among: Tensor, clusters: Tensor, neighbours: int = 5) -> Tensor:
    """Cluster keys around density peaks (k-nearest-neighbour density, as VASparse's paper names it).

    Density is ``exp(-mean squared distance to the nearest neighbours)``; a peak is dense and far from all that is
    denser. Every key goes to its nearest peak. Ties go to the lowest index.

    Parameters
    ----------
    keys : Tensor
        ``[N, n, d]``.
    among : Tensor
        ``[N, n]`` bool, the keys to cluster.
    clusters : Tensor
        ``[N]`` int64, how many peaks.

    Returns
    -------
    Tensor
        ``[N, n]`` int64 index of the peak that each key belongs to; its own index where `among` is False.
    """
    rows = keys.float()
    count, own = rows.shape[1], torch.arange(rows.shape[1], device=keys.device)
    distance = torch.cdist(rows, rows) / rows.shape[-1] ** 0.5
    apart = ~(among[:, :, None] & among[:, None])
    near = distance.masked_fill(apart | torch.eye(count, dtype=torch.bool, device=keys.device), math.inf)
    nearest = near.topk(min(neighbours, count), largest=False).values
    known = nearest.isfinite()
    mean = nearest.masked_fill(~known, 0).square().sum(-1) / known.sum(-1).clamp_min(1)
    density = (-mean).exp()
    denser = (density[:, None] > density[:, :, None]) | (
        (density[:, None] == density[:, :, None]) & (own[None, None] < own[None, :, None])
    )
    far = distance.masked_fill(~denser | apart, math.inf).amin(-1)
    # The densest key of all has nothing denser to be far from: it counts as farthest.
    widest = distance.masked_fill(apart, 0).amax((-1, -2))
    far = torch.where(far.isfinite(), far, widest[:, None])
    peak = top((density * far).masked_fill(~among, -math.inf), clusters)
    home = distance.masked_fill(~peak[:, None], math.inf).argmin(-1)
    return torch.where(among & ~peak, home, own)
