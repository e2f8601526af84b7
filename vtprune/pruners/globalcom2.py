# SPDX-License-Identifier: Apache-2.0
"""`globalcom2`: the thumbnail says how many tokens each crop may keep, and has a say in which."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..budget import Budget, allocation, fill, largest_remainder
from ..errors import ConfigError
from ..kernels import select
from ..registry import Pruner, register
from ..tokens import CLS_LOGITS, LAST_CLS_LOGITS, PRE_PROJECTOR, PROJECTOR, Probe, Selection, Stage, VisualTokens

WANTS = frozenset({LAST_CLS_LOGITS, PRE_PROJECTOR})
TEMPERATURE = 10.0


@register("globalcom2")
@dataclass
class GlobalCom2Pruner(Pruner):
    r"""GlobalCom2: the thumbnail of an AnyRes picture as the commander of its crops.

    Let s be the score of a token in its own view: the attention logit of the vision encoder's CLS token in its last
    layer, mean over heads, before the softmax. The thumbnail keeps the fraction R of its tokens that was asked for. Its
    scores, summed over the cell of the thumbnail that a crop c covers, say how much that crop keeps (n crops), and,
    resized to the crops' grid (bilinear), have a say in which of its tokens::

        a_c     = sum of s over cell c of the thumbnail
        sigma   = softmax(a / 10)
        r_c     = min(R * (1 + sigma_c - 1 / n), 1)
        score_i = (1 - alpha) * s_i / ||s||_2  +  alpha * g_i / ||g||_2          g: the thumbnail's s, resized

    with norms over the tokens of the crop; the ``int(r_c * tokens)`` best ones stay. r_c is the allocation
    ``"globalcom2"``: the default of this method, and open to any other (``apply(..., allocation="globalcom2")``), while
    ``allocation="equal"`` switches it off here.

    Paper: "Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large Vision-Language
    Models", AAAI 2026, https://arxiv.org/abs/2501.05179. What it leaves open, and deviations:

    - The scores are logits, as in the authors' code. After the softmax they add up to 1, and sigma is all but uniform.
    - An encoder without a CLS token gets ``s_i = -cos(x_i, mean of its view)``, x the rows before the projector (the
      rows that a PatchMerger joins count as one).
    - Video: frames are the crops, and the frames' mean, place by place, is the thumbnail g. The clip has no further
      tokens for it. a_f is the sum over frame f of ``-cos(x_i, mean of the clip)`` (of its logits, with a CLS token): a
      frame unlike the rest keeps more. The paper has this in a sentence; the formula is ours.
    - A picture of one view keeps the best of s. The authors' code does not compress it.
    - Counts round down in each view, and what ``r_c <= 1`` cuts off is lost, as in the paper. But an image never keeps
      more than its budget (crops with padding have fewer tokens, so that can happen), nor nothing; then, and where
      `keep` is a count, the budget is met exactly, in proportion to r.
    - Rows come in raster order. The authors' thumbnail comes in the order of its scores.
    - Their code goes by the first image's thumbnail for every image of a batch. Here each image has its own.
    - Sums, softmax and norms are taken in fp32 or fp64, not fp16. Ties go to the lowest index.

    Parameters
    ----------
    alpha
        In [0, 1], the weight of the thumbnail's scores in a crop; 0 is the crop's own scores alone. The paper's is 0.5.
    newline
        Separators are always kept and never counted. ``"valid_rows"``: one per grid row that holds tokens, as in the
        model's prompt. The authors' code adds those of rows that are nothing but padding (``"all_rows"``); they mean
        nothing, a transformers prompt has no place for them, and asking for them is an error.
    """

    paper = "arXiv:2501.05179"
    modality = ("image", "video")
    mechanism = ("attention",)
    query_aware = False
    training_free = True
    adaptive = False
    allocation = "globalcom2"

    alpha: float = 0.5
    newline: str = "valid_rows"

    def __post_init__(self) -> None:
        a = self.alpha
        if isinstance(a, bool) or not isinstance(a, int | float) or not math.isfinite(a) or not 0 <= a <= 1:
            raise ConfigError(f"alpha={a!r} is no weight; give a number from 0 (crop alone) to 1 (thumbnail alone)")
        if self.newline == "all_rows":
            raise ConfigError(
                "newline='all_rows' would add newlines for rows of padding, which have no place in a transformers "
                "prompt; choose 'valid_rows'"
            )
        if self.newline != "valid_rows":
            raise ConfigError(f"newline={self.newline!r} is unknown; choose 'valid_rows'")

    @property
    def wants(self) -> frozenset[Probe]:
        return WANTS

    def score(self, tokens: VisualTokens) -> Tensor:
        scores = tokens.features.new_empty(tokens.features.shape[0], dtype=torch.float32)
        for image in _images(tokens):
            own, guide = _normed(image.scores), _normed(image.guide()).nan_to_num(nan=0.0)
            scores[image.rows] = (own + self.alpha * (guide - own)).flatten()[image.place]
        return scores

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        pools = budget.pools(tokens)
        picks = select.topk(self.score(tokens), pools.lens, pools.counts)
        source = "minus_cosine_to_mean" if _logits(tokens) is None else "cls_logits"
        return Selection.from_picks(picks, tokens, pools, importance=source)


# -- how many: the allocation -----------------------------------------------------------------------------------------


def ratios(sums: Sequence[float], keep: float) -> list[float]:
    """Fraction that each crop keeps: ``min(keep * (1 + softmax(sums / 10) - 1 / n), 1)``, in fp64 on the host."""
    a = np.asarray(sums, np.float64) / TEMPERATURE
    weights = np.exp(a - a.max(initial=-np.inf))
    sigma = weights / (weights.sum() + 1e-8)
    return np.minimum(keep * (1 + sigma - sigma.mean()), 1.0).tolist() if len(a) else []


@allocation("globalcom2", wants=WANTS)
def split(tokens: VisualTokens, keep: float | int, counts: Sequence[int]) -> tuple[int, ...]:
    """Tokens that each segment keeps; see `GlobalCom2Pruner`. Waits for the device, once per batch of tokens."""
    found: list[int] = []
    given = tokens.ctx.get("image_lens", tokens.image_lens)
    for image, (sums, most) in enumerate(zip(_informative(tokens), counts, strict=True)):
        lens = [n for n, i in zip(tokens.seqlens, tokens.seg_image, strict=True) if i == image]
        total = sum(lens)
        if most == total or len(sums) < 2:  # nothing to lose, or nothing to compare
            found += largest_remainder(most, lens)
            continue
        whole = isinstance(keep, float) and total == given[image]
        ratio = keep if whole else most / total
        shares = [n * r for n, r in zip(lens, [ratio] * (len(lens) - len(sums)) + ratios(sums, ratio), strict=True)]
        mine = [math.floor(share + 1e-6) for share in shares]
        found += mine if whole and 0 < sum(mine) <= most else fill(most, shares, lens)
    return tuple(found)


def _informative(tokens: VisualTokens) -> list[list[float]]:
    """Per image, the a_c of its crops or frames; empty where it has none. All pools of a call ask: known ones are kept
    in ``tokens.ctx``."""
    logits, raw = _logits(tokens), tokens.probes.get(PRE_PROJECTOR)
    base = (tokens.source, tokens.features if logits is None and raw is None else raw if logits is None else logits)
    old, sums = tokens.ctx.get("globalcom2", ((), []))
    if len(old) == len(base) and all(a is b for a, b in zip(old, base, strict=True)):
        return sums
    images = list(_images(tokens))
    values = torch.cat([tokens.features.new_zeros(0, dtype=torch.float32), *(i.informative() for i in images)]).cpu()
    sums, start = [], 0
    for image in images:
        n = image.informative_size
        sums.append(image.cells(values[start : start + n].numpy().astype(np.float64)))
        start += n
    tokens.ctx["globalcom2"] = (base, sums)
    return sums


# -- scores -----------------------------------------------------------------------------------------------------------


class _Image(NamedTuple):
    """One image, every segment of it on a full grid of its own: ``[S, M]``, M the cells of its largest grid.

    Parameters
    ----------
    rows
        Its flat rows.
    kind
        ``"thumbnail"`` (and crops), ``"frame"``, or ``"image"``: no segment guides another.
    place : Tensor
        ``[n]`` cell of each token, ``segment * M + row * columns + column``.
    x : Tensor or None
        ``[S, M, d]`` fp32 rows before the projector, where there are no logits.
    scores : Tensor
        ``[S, M]`` fp32: s, NaN where there is no sound token.
    size, crops, first, valid
        Grid of a view; rows and columns of crops; first valid row and column of the stitched grid, and how many are.
    """

    rows: slice
    kind: str
    place: Tensor
    x: Tensor | None
    scores: Tensor
    size: tuple[int, int]
    crops: tuple[int, int]
    first: tuple[int, int]
    valid: tuple[int, int]

    def guide(self) -> Tensor:
        """``[S, M]``: the global score of each cell."""
        if self.kind == "frame":
            if self.x is None:
                return _mean(self.scores, 0).expand_as(self.scores)
            return minus_cosine(_mean(self.x, 0)[None]).expand_as(self.scores)
        if self.kind == "image":
            return self.scores
        height, width = self.size
        thumbnail = self.scores[0, : height * width].view(height, width)
        stitched = bilinear(thumbnail, self.valid)
        whole = stitched.new_full((self.crops[0] * height, self.crops[1] * width), torch.nan)
        (top, left), (tall, wide) = self.first, self.valid
        whole[top : top + tall, left : left + wide] = stitched
        crops = whole.view(self.crops[0], height, self.crops[1], width).transpose(1, 2).reshape(-1, height * width)
        return torch.cat([self.scores[:1], crops])

    def informative(self) -> Tensor:
        """What `cells` needs of the device, ``[informative_size]``."""
        if self.kind == "thumbnail":
            return self.scores[0]
        if self.kind == "frame":
            scores = self.scores if self.x is None else minus_cosine(self.x.flatten(0, 1)[None]).view_as(self.scores)
            return scores.nan_to_num(nan=0.0).sum(1)
        return self.scores.new_zeros(0)

    @property
    def informative_size(self) -> int:
        return {"thumbnail": self.scores.shape[1], "frame": self.scores.shape[0]}.get(self.kind, 0)

    def cells(self, values: np.ndarray) -> list[float]:
        """a of each crop or frame."""
        if self.kind != "thumbnail":
            return [float(v) for v in values]
        height, width = self.size
        thumbnail = np.nan_to_num(values[: height * width]).reshape(height, width)
        borders = [
            [*(min(i * max(n // k, 1), n) for i in range(k)), n] for n, k in zip(self.size, self.crops, strict=True)
        ]
        down, across = ([slice(a, b) for a, b in pairwise(edge)] for edge in borders)
        return [float(thumbnail[rows, cols].sum()) for rows in down for cols in across]


def _logits(tokens: VisualTokens) -> Tensor | None:
    return tokens.probes.get(LAST_CLS_LOGITS, tokens.probes.get(CLS_LOGITS))


def _images(tokens: VisualTokens) -> Iterator[_Image]:
    """Each image in memory of its own: reductions then round alike alone and in a batch."""
    logits, raw = _logits(tokens), tokens.probes.get(PRE_PROJECTOR)
    total, start = len(tokens.source), 0
    for image, n in enumerate(tokens.image_lens):
        rows = slice(start, start + n)
        start += n
        segments = [s for s, i in enumerate(tokens.seg_image) if i == image]
        grids = [tokens.seg_grid[s] for s in segments]
        most = max((h * w for h, w in grids), default=0)
        origins = np.array([(i * most, w) for i, (_, w) in enumerate(grids)], np.int64).reshape(-1, 2)
        origins = origins.repeat([tokens.seqlens[s] for s in segments], axis=0)
        steps = torch.from_numpy(origins).to(tokens.device, non_blocking=True)
        coords = tokens.coords[rows].long()
        place = steps[:, 0] + coords[:, 1] * steps[:, 1] + coords[:, 2]

        def dense(values: Tensor, place: Tensor = place, shape: tuple[int, int] = (len(grids), most)) -> Tensor:
            values = values.detach().float()
            values = values.masked_fill(~values.isfinite(), torch.nan)
            empty = values.new_full((shape[0] * shape[1], *values.shape[1:]), torch.nan)
            return empty.index_copy(0, place, values).view(*shape, *values.shape[1:])

        if logits is not None:
            x, scores = None, dense(logits[rows])
        else:
            base = tokens.features if raw is None else raw.reshape(total, raw.numel() // max(total, 1))
            x = dense(base[rows])
            scores = minus_cosine(x)
        kind, size, crops, first, valid = _shape(tokens, segments, image)
        yield _Image(rows, kind, place, x, scores, size, crops, first, valid)


def _shape(
    tokens: VisualTokens, segments: list[int], image: int
) -> tuple[str, tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]:
    """The last fields of `_Image` and its kind."""
    kinds = [tokens.seg_kind[s] for s in segments]
    grids = {tokens.seg_grid[s] for s in segments}
    size = next(iter(grids), (0, 0))
    crops = tokens.image_grid[image][1:]
    if len(kinds) < 2 or len(grids) > 1 or 0 in size:
        return "image", size, (1, 1), (0, 0), size
    if set(kinds) == {"frame"}:
        return "frame", size, (1, 1), (0, 0), size
    if kinds != ["thumbnail"] + ["crop"] * (crops[0] * crops[1]):
        return "image", size, (1, 1), (0, 0), size
    start, end = tokens.seg_box[segments[1]][:2], tokens.seg_box[segments[-1]][2:]
    first, valid = [], []
    for axis in (0, 1):  # the picture fills one axis of the stitched grid, and is centred on the other
        cells = crops[axis] * size[axis]
        filled = math.floor(cells / max(end[axis] - start[axis], 1.0) + 1e-6)
        first.append((cells - filled) // 2)
        valid.append(cells - 2 * first[-1])
    return "thumbnail", size, crops, (first[0], first[1]), (valid[0], valid[1])


def _mean(values: Tensor, dim: int) -> Tensor:
    """Mean of what is not NaN; NaN where nothing is."""
    return values.nan_to_num(nan=0.0).sum(dim) / (~values.isnan()).sum(dim)


def _normed(values: Tensor) -> Tensor:
    """Each row divided by its L2 norm, NaN left out."""
    return values / torch.linalg.vector_norm(values.nan_to_num(nan=0.0), dim=-1, keepdim=True).clamp(min=1e-12)


def minus_cosine(x: Tensor) -> Tensor:
    """``-cos(x_i, mean x)`` within each ``[n, d]`` of ``x [S, n, d]``; NaN for rows that are not sound."""
    length = torch.linalg.vector_norm(x, dim=-1)
    unsound = ~length.isfinite()
    # The cosine does not see the length of the mean, so the sum will do.
    mean = x.masked_fill(unsound[..., None], 0.0).sum(1, keepdim=True)
    mean = mean / torch.linalg.vector_norm(mean, dim=-1, keepdim=True).clamp(min=1e-8)
    return (-(x * mean).sum(-1) / length.clamp(min=1e-8)).masked_fill(unsound, torch.nan)


def bilinear(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize ``[h, w]`` to `size` (half-pixel centres, no antialiasing); NaN cells have no weight."""
    # No matrix products: TF32 would make other picks on a GPU.
    values = torch.stack([grid.nan_to_num(nan=0.0), (~grid.isnan()).float()])
    for axis in (0, 1):
        n, m = grid.shape[axis], size[axis]
        at = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
        below = np.floor(at).astype(np.int64)
        host = below, np.minimum(below + 1, n - 1), (at - below).astype(np.float32)
        low, high, part = (torch.from_numpy(x).to(grid.device, non_blocking=True) for x in host)
        part = part.view(1, m, 1) if axis == 0 else part
        values = values.index_select(axis + 1, low) * (1 - part) + values.index_select(axis + 1, high) * part
    return values[0] / values[1]
