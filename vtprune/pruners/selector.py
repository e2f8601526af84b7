# SPDX-License-Identifier: Apache-2.0
"""`selector`: a small trained network that reads the question and picks the tokens that its answer rests on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..budget import Budget
from ..errors import ConfigError
from ..kernels import reference, select
from ..registry import Pruner, register
from ..tokens import PROJECTOR, Selection, Stage, VisualTokens
from . import common, weights

FILE = "selector.safetensors"
#: Where a model that ships with the package has its selector.
SHIPPED = Path(__file__).parents[1] / "models" / "pocket"
HEAD = 8  # width of an attention head
OCTAVES = 5  # frequencies by which a place is told
PLACE = 6 * OCTAVES + 1


class Block(nn.Module):
    """Attention among all rows and a two-layer network, each added to what comes in (pre-norm, GELU).

    Parameters
    ----------
    hidden
        h, of the rows.
    inner
        a, of queries, keys and values; a multiple of `HEAD`.
    """

    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.first, self.second = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * inner), nn.Linear(inner, hidden)
        self.up, self.down = nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden)

    def forward(self, rows: Tensor, there: Tensor | None) -> Tensor:
        """``[B, M, h]`` to the same; `there` ``[B, M]`` bool says which rows may be looked at, None: all."""
        query, key, value = (
            part.unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in self.qkv(self.first(rows)).chunk(3, -1)
        )
        mask = None if there is None else there[:, None, None]
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        rows = rows + self.out(seen.transpose(1, 2).flatten(2))
        return rows + self.down(F.gelu(self.up(self.second(rows))))


class Network(nn.Module):
    """Scores of visual tokens, from their rows, their places and the words of the question.

    With ``n(v) = v / rms(v)``, a visual row is ``A n(x) + P p`` with its place p, a word ``W n(e) + s(l)`` with s the
    sine code of its rank l; one more row, ``start``, stands for the question as a whole, and alone where there is none.
    All of them go through the blocks, and the score of a visual row r is ``w . LayerNorm(r)``.

    Parameters
    ----------
    width
        D, of projected rows and words.
    hidden, inner, depth
        h (even) and a as in `Block`, and the number of blocks.
    """

    def __init__(self, width: int, hidden: int = 64, inner: int = 32, depth: int = 2):
        super().__init__()
        self.visual, self.word = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.place = nn.Linear(PLACE, hidden, bias=False)
        self.start = nn.Parameter(torch.randn(hidden) * 0.5)
        self.blocks = nn.ModuleList(Block(hidden, inner) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, 1, bias=False)

    @property
    def width(self) -> int:
        """D."""
        return self.visual.in_features

    def forward(
        self, visual: Tensor, place: Tensor, words: Tensor, sound: Tensor | None = None, spoken: Tensor | None = None
    ) -> Tensor:
        """Score tokens.

        Parameters
        ----------
        visual
            ``[B, N, D]`` projected rows, finite.
        place
            ``[B, N, PLACE]``, see `places`.
        words
            ``[B, L, D]`` input embeddings of the question; L may be 0.
        sound, spoken
            ``[B, N]`` and ``[B, L]`` bool: which rows are there; None: all.

        Returns
        -------
        Tensor
            ``[B, N]`` in the dtype of the weights; of a row that is not sound, any number.
        """
        batch, count, _ = visual.shape
        dtype = self.start.dtype
        seen = self.visual(rms(visual.to(dtype))) + self.place(place.to(dtype))
        said = self.word(rms(words.to(dtype))) + order(words.shape[1], self.start)
        rows = torch.cat([self.start.expand(batch, 1, -1), said, seen], 1)
        there = None
        if sound is not None or spoken is not None:
            sound = torch.ones_like(visual[..., 0], dtype=torch.bool) if sound is None else sound
            spoken = torch.ones_like(words[..., 0], dtype=torch.bool) if spoken is None else spoken
            there = torch.cat([torch.ones_like(sound[:, :1]), spoken, sound], 1)
        for block in self.blocks:
            rows = block(rows, there)
        return self.head(self.norm(rows[:, -count:] if count else rows[:, :0])).squeeze(-1)

    def flops(self, count: int, words: int) -> int:
        """Floating-point operations of one call with so many visual tokens and words, a product and a sum counted as
        two; norms, GELU and softmax left out, as in what a prefill is said to cost. Without the cosines by which rows
        are picked: ``N^2 D / 2``."""
        hidden, rows = self.start.shape[0], count + words + 1
        total = count * (self.width + PLACE + 1) * hidden + words * self.width * hidden
        for block in self.blocks:
            assert isinstance(block, Block)
            inner = block.out.in_features
            total += rows * (4 * hidden * inner + 4 * hidden**2) + 2 * rows**2 * inner
        return 2 * total


def rms(rows: Tensor) -> Tensor:
    """Rows divided by the root of their mean square: projected rows are many times longer than words."""
    return rows * (rows.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def order(count: int, like: Tensor) -> Tensor:
    """Sine code of the ranks 0 to `count` - 1, ``[count, h]``: sines, then cosines, periods from 2 pi to 200 pi."""
    half = like.shape[0] // 2
    slow = torch.logspace(0, -2, half, device=like.device, dtype=like.dtype)
    angle = torch.arange(count, device=like.device, dtype=like.dtype)[:, None] * slow
    return torch.cat([angle.sin(), angle.cos()], 1)


def places(tokens: VisualTokens) -> Tensor:
    """Where each token lies, ``[T, PLACE]`` fp32, in no unit of the model's own: views and frames share one code.

    Sine and cosine of ``2^k pi u`` for k below `OCTAVES` and u the time (frame over frames), row and column (both of
    the token's middle, in fractions of the picture), and the height of a token in the picture (log2, over 8).
    """
    parts = []
    first = 0
    frames = dict(enumerate(grid[0] for grid in tokens.image_grid))
    for n, image, (rows, columns), box in zip(
        tokens.seqlens, tokens.seg_image, tokens.seg_grid, tokens.seg_box, strict=True
    ):
        t, row, column = tokens.coords[first : first + n].float().unbind(1)
        first += n
        top, left, bottom, right = box
        high, wide = (bottom - top) / max(rows, 1), (right - left) / max(columns, 1)
        u = torch.stack([t / max(frames[image], 1), top + (row + 0.5) * high, left + (column + 0.5) * wide], 1)
        scale = torch.pi * 2.0 ** torch.arange(OCTAVES, device=u.device)
        angle = (u[:, :, None] * scale).flatten(1)
        size = torch.full_like(angle[:, :1], math.log2(max(high, 1e-6)) / 8)
        parts.append(torch.cat([angle.sin(), angle.cos(), size], 1))
    return torch.cat(parts) if parts else tokens.coords.new_empty(0, PLACE, dtype=torch.float32)


def find(checkpoint: str) -> Path:
    """The weights that lie beside the config of a checkpoint.

    Raises
    ------
    ConfigError
        There are none.
    """
    if checkpoint and (Path(checkpoint) / FILE).is_file():
        return Path(checkpoint) / FILE
    name = checkpoint.replace("\\", "/").rstrip("/").rpartition("/")[2] or "this model"
    raise ConfigError(
        f"there is no selector for {name}, and one model's means nothing to another: train it with "
        f"python -m vtprune.training.selector --model CHECKPOINT --task TASK --out {FILE}, and save it beside the "
        "config, or pass its path as weights="
    )


def load(path: str | Path) -> Network:
    """Read a selector's weights, in fp32 on the CPU.

    Parameters
    ----------
    path
        A safetensors file that `vtprune.training.selector` wrote, a folder with one under the name
        ``selector.safetensors``, or the name of a model that ships with one (``"pocket-llava"``).

    Raises
    ------
    ConfigError
        There is no such file, or it holds something else.
    """
    file = next((f for f in (Path(path), Path(path) / FILE, SHIPPED / path / FILE) if f.is_file()), None)
    if file is None:
        raise ConfigError(f"there is no selector {path}; give the path of a safetensors file")
    state = weights.read(file, path, "selector")
    hidden, width = weights.shape_of(state, "visual.weight", (1, 1))
    _, inner = weights.shape_of(state, "blocks.0.out.weight", (1, HEAD))
    depth = sum(name.endswith(".qkv.weight") for name in state)
    network = Network(width, hidden, max(inner // HEAD, 1) * HEAD, max(depth, 1))
    return weights.filled(network, state, path, "selector")


@register("selector")
@dataclass
class SelectorPruner(Pruner):
    """A trained selector: the tokens to which a two-block transformer over question and picture gives most, and which
    are unlike one another.

    Not of one paper. The idea of a trained score with a differentiable top-k, learnt through the frozen language model,
    is VisionSelector's (arXiv:2510.16598), whose scorer does not see the question (`IDPruner` has it); that the
    question should steer what is kept is the common ground of SparseVLM and CDPruner. Here one small transformer reads
    both (see `Network`), so that what is kept may differ from question to question, and a token's score may fall
    because another one tells the same. It reads nothing but what enters the language model (so any encoder will do),
    and one training serves all budgets: the score does not know the budget, and its training draws one anew for each
    batch. Unless ``mmr_lambda=1``, picks are made by maximal marginal relevance among the better half of each pool (and
    behind it by score), whose cosines cost ``N^2 D / 2``: with the network less than 3 % of the prefill even of
    ``pocket-llava``.

    A selector belongs to one checkpoint, and is trained by `vtprune.training.selector` on prompts that the checkpoint
    answers; neither labels nor gradients of the checkpoint's weights are needed. ``pocket-llava`` ships with one.

    Parameters
    ----------
    weights
        The safetensors file, a folder with one, or the name of a model that ships with one. None: the file
        ``selector.safetensors`` beside the checkpoint's config.
    mmr_lambda
        As in `IDPruner`, with the score as importance: 1 is the top-k that training knows; less keeps tokens that are
        alike from being kept together, which a selector whose training was short has not learnt to avoid.
    """

    paper = "vtprune"
    modality = ("image", "video")
    mechanism = ("query", "similarity")
    query_aware = True
    training_free = False
    adaptive = False

    weights: str | None = None
    mmr_lambda: float = 0.5

    def __post_init__(self) -> None:
        common.share("mmr_lambda", self.mmr_lambda)
        if self.weights is not None and not isinstance(self.weights, str):
            raise ConfigError(f"weights={self.weights!r} is a {type(self.weights).__name__}; give its path as text")
        self._network = None if self.weights is None else load(self.weights)

    def check_model(self, width: int, projector: Any) -> None:
        if self._network is not None:
            self._check_width(self._network, width)

    def check_checkpoint(self, checkpoint: str, vocabulary: Tensor) -> None:
        self._check_width(self.network(checkpoint), vocabulary.shape[1])

    def network(self, checkpoint: str) -> Network:
        """The selector, read at first use."""
        if self._network is None:
            self._network = load(find(checkpoint))
        return self._network

    def _check_width(self, network: Network, width: int) -> None:
        if network.width != width:
            raise ConfigError(
                f"the selector {self.weights or FILE} is for tokens of width {network.width}, this model's have "
                f"{width}; give one that was trained for this model"
            )

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        if self.mmr_lambda == 1:
            return super().select(tokens, budget, stage)
        lens, counts = budget.pools(tokens)
        with common.exact(tokens):
            scores = reference.minmax(self.score(tokens), lens)
            halves = tuple(-(-n // 2) for n in lens)
            rows = reference.topk(scores, lens, halves).sort().values
            few = tuple(map(min, counts, halves))
            picks = select.mmr(tokens.features[rows], scores[rows], halves, few, self.mmr_lambda)
            order = rows[picks.order]
            if few != counts:  # behind its better half, each pool goes on by score alone
                best = reference.topk(scores, lens, counts).split(counts)
                parts = zip(order.split(few), best, few, strict=True)
                order = torch.cat([part for own, ranked, k in parts for part in (own, ranked[k:])])
        return Selection.from_picks(select.Picks(order, order.sort().values), tokens)

    def score(self, tokens: VisualTokens) -> Tensor:
        network = self.network(tokens.checkpoint).to(tokens.device)
        self._check_width(network, tokens.features.shape[1])
        scores = tokens.features.new_empty(tokens.features.shape[0], dtype=torch.float32)
        with common.exact(tokens):
            place = places(tokens)
            for rows, words in _images(tokens):
                # Rows of its own for each image: products then round the same alone and in a batch.
                visual = tokens.features[rows].float()
                sound = visual.isfinite().all(1)
                found = network(visual.where(sound[:, None], 0.0)[None], place[rows][None], words, sound[None])
                scores[rows] = found[0].float().masked_fill(~sound, torch.nan)
        return scores


def _images(tokens: VisualTokens) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each image that has some, and the words of its sample, ``[1, L, D]`` fp32."""
    lens = tokens.text_lens or (0,) * tokens.num_samples
    starts = [sum(lens[:i]) for i in range(len(lens))]
    text = tokens.features[:0] if tokens.text is None else tokens.text
    first = 0
    for n, sample in zip(tokens.image_lens, tokens.image_sample, strict=True):
        if n:
            words = text[starts[sample] : starts[sample] + lens[sample]].float()
            yield slice(first, first + n), words[None]
        first += n
