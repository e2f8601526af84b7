# SPDX-License-Identifier: Apache-2.0
"""Greedy selection, cosines included: what `benchmarks.kernels` times of `vtprune.kernels.select`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels import Work, register
from vtprune.kernels import reference, select

#: Rows, picks, width and the target for MMR in milliseconds on an H100.
SHAPES = (
    (576, 64, 4096, 0.10),
    (1296, 324, 3584, 0.25),
    (2880, 320, 4096, 0.35),
    (4096, 1024, 3584, 0.85),
    (16384, 4096, 3584, 12.0),
)
LAM = 0.5


def rows(n: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows in clusters with a part that all share, as the tokens of a picture are, in bf16; importance in [0, 1]."""
    generator = torch.Generator(device).manual_seed(0)
    crowd = torch.randn(max(2, n // 12), dim, generator=generator, device=device)
    own = torch.randn(n, dim, generator=generator, device=device)
    common = torch.randn(dim, generator=generator, device=device)
    x = crowd[torch.randint(len(crowd), (n,), generator=generator, device=device)] + 0.7 * own + common
    return x.bfloat16(), torch.rand(n, generator=generator, device=device)


# -- the usual loops: one round of small kernels per pick ------------------------------------------------------------


def cosines(x: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(x, dim=1)
    return (unit @ unit.T).float()


def loop(cosine: Tensor, first: Tensor, score: Callable[[Tensor], Tensor], k: int) -> Tensor:
    closest = cosine.new_full((cosine.shape[0],), -2.0)
    left, picks = torch.zeros_like(closest), []
    for step in range(k):
        pick = ((first if step == 0 else score(closest)) + left).argmax()
        picks.append(pick)
        left[pick] = -torch.inf
        closest = torch.maximum(closest, cosine[pick])
    return torch.stack(picks)


def naive_mmr(x: Tensor, w: Tensor, k: int) -> Tensor:
    return loop(cosines(x), w, lambda closest: LAM * w - (1 - LAM) * closest, k)


def naive_max_min(x: Tensor, w: Tensor, k: int) -> Tensor:
    cosine = cosines(x)
    nearest = cosine.clone().fill_diagonal_(-2.0).amax(1)
    return loop(cosine, -nearest, lambda closest: -closest, k)


def naive_sads(x: Tensor, w: Tensor, k: int) -> Tensor:
    return loop(cosines(x), w, lambda closest: w * (1 - closest), k)


def naive_coverage(x: Tensor, w: Tensor, k: int) -> Tensor:
    cosine = cosines(x)
    covered, left, picks = torch.zeros_like(w), torch.zeros_like(w), []
    for _ in range(k):
        pick = ((cosine - covered).clamp(min=0).sum(1) * w + left).argmax()
        picks.append(pick)
        left[pick] = -torch.inf
        covered = torch.maximum(covered, cosine[pick])
    return torch.stack(picks)


def naive_dpp(x: Tensor, w: Tensor, k: int) -> Tensor:
    kernel = w[:, None] * cosines(x) * w
    columns = kernel.new_zeros(k, kernel.shape[0])
    left, picks = kernel.diagonal().clone(), []
    for step in range(k):
        pick = left.argmax()
        picks.append(pick)
        column = (kernel[pick] - columns[:step, pick] @ columns[:step]) / left[pick].sqrt()
        columns[step] = column
        left = left - column * column
        left[pick] = -torch.inf
    return torch.stack(picks)


Naive = Callable[[Tensor, Tensor, int], Tensor]
OPS: dict[str, tuple[Callable[[Tensor, Tensor, tuple[int, ...], tuple[int, ...]], select.Picks], Naive]] = {
    "mmr": (lambda x, w, lens, counts: select.mmr(x, w, lens, counts, LAM), naive_mmr),
    "max-min": (lambda x, w, lens, counts: select.max_min(x, lens, counts), naive_max_min),
    "sads": (select.sads, naive_sads),
    "coverage": (select.coverage, naive_coverage),
    "dpp": (select.dpp, naive_dpp),
}


def add(name: str, n: int, k: int, dim: int, target: float | None, pools: int = 1, tiny: bool = False) -> None:
    op, naive = OPS[name]
    shape = f"{n}/{k} D={dim}" + (f" x{pools}" if pools > 1 else "")

    @register(f"greedy {name}", shape, target, tiny)
    def make(device: torch.device) -> Work:
        x, w = rows(n * pools, dim, device)
        lens, counts = (n,) * pools, (k,) * pools
        if pools > 1:
            return Work(lambda: op(x, w, lens, counts), graph=True)
        return Work(lambda: op(x, w, lens, counts), lambda: naive(x, w, k), lambda: x @ x.T, graph=True)


for n, k, dim, target in SHAPES:
    add("mmr", n, k, dim, target)
    if n <= 4096:
        add("mmr", n, k, dim, round(1.2 * target, 3), pools=8)
for other in ("max-min", "sads"):
    for n, k, dim, target in SHAPES[:4]:
        add(other, n, k, dim, target)
for other in ("coverage", "dpp"):
    for n, k, dim, _ in SHAPES[:4]:
        add(other, n, k, dim, None)
for name in OPS:
    add(name, 40, 8, 32, None, tiny=True)
    add(name, 40, 8, 32, None, pools=2, tiny=True)


@register("greedy mmr", "32768/1024 D=3584, columns as needed")
def lazy(device: torch.device) -> Work:
    """A pool whose matrix would not fit: each pick computes its column."""
    x, w = rows(32768, 3584, device)
    return Work(lambda: reference.mmr(x, w, (32768,), (1024,), LAM))
