# SPDX-License-Identifier: Apache-2.0
"""Calibration: which visual tokens of a checkpoint are the same in every picture, and which words give them away.

EmbedLens (arXiv 2603.00510) describes the classes, but its clustering was not released; this one follows the
description. Projected tokens of many pictures are clustered by cosine. A *sink* is a small cluster whose mean is the
same in every picture; *dead* is the largest cluster that changes little from picture to picture; all else is *alive*.
A sink that looks like the first token of the prompt after two decoder layers is an LLM sink, any other a ViT sink.
Anchors of a class are words that are among the three nearest of nearly all of its tokens, and of hardly any other.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError, VTPruneWarning
from ..eval import stats
from ..kernels.lens_topk import inverse_norms, lens_topk
from ..models import find_family
from ..models.base import Family
from ..models.loading import build_inputs
from .calibration import ALIVE, CLASSES, Calibration, Categories
from .probe import excluded_ids, lens, spell, watch_layers, word_mask

if TYPE_CHECKING:
    from PIL import Image

#: Pictures below which a calibration is not to be trusted.
ENOUGH = 200
#: Clusters that k-means starts from, its steps, and the tokens that it sees.
CLUSTERS, STEPS, SAMPLE = 16, 20, 20_000
#: Clusters whose means are at least so alike are one, and tokens at least so like its mean belong to one.
SAME = 0.95
#: Numbers that the rows of all pictures may take on the host (one gigabyte): of more, each picture gives an even draw.
HELD = 1 << 28
#: k-means gives every token to some cluster; each closes in on its core by dropping what is less like its mean than
#: this.
CLOSING = (0.8, 0.9, SAME)
#: Mean cosine between the means of a cluster in different pictures, from which on it counts as the same everywhere.
SINK_COSINE, DEAD_COSINE = 0.99, 0.95
#: Share of pictures in which such a cluster must occur, and the largest share of tokens of a sink.
SINK_PRESENCE, DEAD_PRESENCE, SINK_SHARE = 0.9, 0.5, 0.2
#: Share of a class's tokens that its anchors must give away, and of others that they may.
COVERAGE, LEAK = 0.9, 0.01
#: Cosine to the first token of the prompt, after so many decoder layers, from which on a sink is the language model's.
FIRST_TOKEN_COSINE, FIRST_TOKEN_LAYER = 0.9, 2
#: Pictures that are run through these layers.
FIRST_TOKEN_PICTURES = 16
QUESTION = "describe the picture"


class _Cluster(NamedTuple):
    """One cluster of one seed."""

    mean: Tensor
    inside: Tensor  # [T] bool
    share: float
    presence: float
    cross: float  # mean cosine between its means in different pictures
    intra: float  # mean cosine of its tokens to its mean


def calibrate(
    model: nn.Module,
    processor: Any,
    images: Sequence[Image.Image],
    seeds: Sequence[int] = (0, 1, 2),
    top: int = 3,
) -> Calibration:
    """Find the classes of a checkpoint's visual tokens and their anchors on pictures of your own.

    Parameters
    ----------
    model, processor
        As `vtprune.load` returns them.
    images
        Two or more; 200 are enough.
        With so many and so large ones that their rows would take more than a gigabyte, each gives a random draw of its
        tokens, the same in every run.
    seeds
        Of the clustering. A token belongs to a class where most of them say so.
    top
        How many nearest words are looked at.

    Returns
    -------
    Calibration
        A class that was not found is missing; ``evidence`` says so. Save it into the checkpoint's folder, where it will
        be found.

    Warns
    -----
    VTPruneWarning
        Fewer than 200 pictures.
    """
    if len(images) < 2 or not seeds:
        raise InputError(
            f"{len(images)} pictures and {len(seeds)} seeds; give two pictures or more, and a seed or more"
        )
    if len(images) < ENOUGH:
        message = f"a calibration from {len(images)} pictures is a guess; give {ENOUGH} or more"
        warnings.warn(message, VTPruneWarning, stacklevel=2)
    family = find_family(model)
    table = family.vocabulary
    tokenizer = getattr(processor, "tokenizer", processor)
    inverse = inverse_norms(table, word_mask(family, len(table), tokenizer))
    unit, near, picture = _collect(model, processor, images, table, inverse, top)
    first = _first_tokens(family, processor, images[:FIRST_TOKEN_PICTURES], _most(table, images))

    votes = {name: torch.zeros(len(unit)) for name in CLASSES}
    per_seed: dict[str, list[dict[str, float]]] = {name: [] for name in CLASSES}
    for seed in seeds:
        for name, cluster in _classes(_clusters(unit, picture, seed), first).items():
            votes[name] += cluster.inside
            found = {"seed": seed, "share": cluster.share, "presence": cluster.presence}
            per_seed[name].append(found | {"cross": cluster.cross, "intra": cluster.intra})

    anchors: dict[str, tuple[int, ...]] = {}
    means: dict[str, tuple[float, ...]] = {}
    evidence: dict[str, Any] = {"pictures": len(images), "tokens": len(unit), "seeds": list(seeds), "classes": {}}
    for name in CLASSES:
        inside = votes[name] > len(seeds) / 2
        entry: dict[str, Any] = {"seeds": [{k: round(v, 4) for k, v in found.items()} for found in per_seed[name]]}
        if bool(inside.any()):
            ids, coverage, leak = find_anchors(near, inside, len(table))
            entry |= {"share": round(float(inside.float().mean()), 4)}
            entry |= {"coverage": round(coverage, 4), "leak": round(leak, 4)}
            mean = torch.nn.functional.normalize(unit[inside].sum(0), dim=0)
            means[name] = tuple(round(x, 5) for x in mean.tolist())
            if coverage >= COVERAGE:
                anchors[name] = ids
            else:
                entry["note"] = "no words give it away; told by its mean"
        else:
            entry["note"] = "no such cluster"
        evidence["classes"][name] = entry
    words = {name: tuple(spell(tokenizer, i) for i in ids) for name, ids in anchors.items()}
    excluded = tuple(i for i in excluded_ids(family) if i < len(tokenizer))
    return Calibration(
        checkpoint=Path(family.checkpoint).name or "unknown",
        vocabulary=min(len(tokenizer), len(table)),
        width=table.shape[1],
        anchors=anchors,
        means=means,
        radius=SAME,
        excluded=excluded,
        top=top,
        words=words,
        evidence=evidence,
    )


def shares(
    model: nn.Module,
    processor: Any,
    images: Sequence[Image.Image],
    calibration: Calibration | None = None,
    draws: int = stats.DRAWS,
    seed: int = 0,
) -> dict[str, stats.Interval]:
    """Share of the visual tokens in each class, with a 95 % bootstrap interval over pictures.

    Parameters
    ----------
    model, processor, images
        As for `calibrate`; other pictures than it saw.
    calibration
        Default: that of the checkpoint.
    draws, seed
        Of the bootstrap.
    """
    if not images:
        raise InputError("there are no pictures to look at; give some")
    found = [each(model, processor, image, calibration).shares() for image in images]
    return intervals(found, draws, seed)


def each(model: nn.Module, processor: Any, image: Image.Image, calibration: Calibration | None = None) -> Categories:
    """Classes of the visual tokens of one picture."""
    inputs = build_inputs(model, processor, image, QUESTION)
    return lens(model, inputs, layers=0, topk=1, calibration=calibration).categories()


def intervals(found: Sequence[dict[str, float]], draws: int = stats.DRAWS, seed: int = 0) -> dict[str, stats.Interval]:
    """Mean over pictures of each share, with its interval."""
    names = [*CLASSES, ALIVE]
    names = [name for name in names if name in found[0]]
    values = np.array([[one[name] for name in names] for one in found])
    return dict(zip(names, stats.accuracy(values, ["all"] * len(values), draws=draws, seed=seed), strict=True))


@torch.no_grad()
def _collect(
    model: nn.Module, processor: Any, images: Sequence[Image.Image], table: Tensor, inverse: Tensor, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows ``[T, D]`` fp32 at layer 0 of all pictures (see `_draw`), their nearest words ``[T, top]``, and which
    picture each belongs to, on the CPU."""
    family, most = find_family(model), _most(table, images)
    rows: list[Tensor] = []
    near: list[Tensor] = []

    def see(_layer: int, own: Tensor, _hidden: Tensor) -> None:
        own = own[_draw(len(own), most, len(rows)).to(own.device)].to(table.device)
        near.append(lens_topk(own, table, top, inverse=inverse)[1].cpu())
        rows.append(torch.nn.functional.normalize(own.float(), dim=1).cpu())

    for image in images:
        watch_layers(family, build_inputs(model, processor, image, QUESTION), [0], see)
    picture = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(own) for own in rows]))
    return torch.cat(rows), torch.cat(near), picture


def _most(table: Tensor, images: Sequence[Image.Image]) -> int:
    """Tokens that one picture may give."""
    return max(1, HELD // table.shape[1] // len(images))


def _draw(count: int, most: int, picture: int) -> Tensor:
    """Which of the `count` tokens of a picture take part: all, or `most` at random; ascending."""
    if count <= most:
        return torch.arange(count)
    return torch.from_numpy(np.random.default_rng(picture).permutation(count)[:most]).sort().values


@torch.no_grad()
def _first_tokens(family: Family, processor: Any, images: Sequence[Image.Image], most: int) -> Tensor:
    """How much each visual token of these pictures that takes part is like the first token after two layers, ``[T']``
    cosines."""
    layer = min(FIRST_TOKEN_LAYER, len(family.lm.layers))
    cosines: list[Tensor] = []

    def see(_layer: int, rows: Tensor, hidden: Tensor) -> None:
        rows = rows[_draw(len(rows), most, len(cosines)).to(rows.device)]
        cosines.append(torch.cosine_similarity(rows.float(), hidden[0, :1].float(), dim=1).cpu())

    for image in images:
        watch_layers(family, build_inputs(family.model, processor, image, QUESTION), [layer], see)
    return torch.cat(cosines)


def _clusters(unit: Tensor, picture: Tensor, seed: int) -> list[_Cluster]:
    """Clusters of unit rows, largest first."""
    generator = torch.Generator().manual_seed(seed)
    sample = unit[torch.randperm(len(unit), generator=generator)[:SAMPLE]]
    means = _merge(sample, _spherical_kmeans(sample, CLUSTERS, generator))
    for radius in CLOSING:
        cosine, label = (sample @ means.T).max(1)
        near = cosine >= radius
        sums = torch.zeros_like(means).index_add_(0, label[near], sample[near])
        means = torch.nn.functional.normalize(sums[sums.any(1)], dim=1)
        if not len(means):  # no two tokens are alike
            return []
    cosine, label = (unit @ means.T).max(1)
    insides = [(label == c) & (cosine >= SAME) for c in range(len(means))]
    found = [_describe(unit, inside, picture) for inside in insides if bool(inside.any())]
    return sorted(found, key=lambda cluster: -cluster.share)


def _spherical_kmeans(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Means of clusters by cosine, ``[k, D]`` unit rows; starts are drawn far from one another (k-means++)."""
    means = rows[torch.randint(len(rows), (1,), generator=generator)]
    distance = 1 - rows @ means[0]
    for _ in range(min(count, len(rows)) - 1):
        weight = distance.clamp_min(0)
        if not float(weight.sum()) > 0:
            break
        chosen = rows[torch.multinomial(weight, 1, generator=generator)]
        means = torch.cat([means, chosen])
        distance = torch.minimum(distance, 1 - rows @ chosen[0])
    for _ in range(STEPS):
        label = (rows @ means.T).argmax(1)
        means = torch.nn.functional.normalize(torch.zeros_like(means).index_add_(0, label, rows), dim=1)
    return means


def _merge(rows: Tensor, means: Tensor) -> Tensor:
    """Join clusters with like means, the most alike first, until none are."""
    size = torch.bincount((rows @ means.T).argmax(1), minlength=len(means)).float()
    means, size = means[size > 0], size[size > 0]
    while len(means) > 1:
        cosines = (means @ means.T).fill_diagonal_(-1)
        a, b = divmod(int(cosines.argmax()), len(means))
        if float(cosines[a, b]) < SAME:
            break
        joined = torch.nn.functional.normalize(size[a] * means[a] + size[b] * means[b], dim=0)
        rest = [i for i in range(len(means)) if i not in (a, b)]
        means = torch.cat([means[rest], joined[None]])
        size = torch.cat([size[rest], (size[a] + size[b])[None]])
    return means


def _describe(unit: Tensor, inside: Tensor, picture: Tensor) -> _Cluster:
    rows, owner = unit[inside], picture[inside]
    pictures = int(picture[-1]) + 1
    sums = torch.zeros(pictures, unit.shape[1]).index_add_(0, owner, rows)
    present = torch.bincount(owner, minlength=pictures) > 0
    means = torch.nn.functional.normalize(sums[present], dim=1)
    mean = torch.nn.functional.normalize(rows.sum(0), dim=0)
    n = len(means)
    # The mean over pairs of different pictures, without a matrix of all pairs.
    cross = (float(means.sum(0).square().sum()) - n) / (n * (n - 1)) if n > 1 else 0.0
    share, presence = float(inside.float().mean()), float(present.float().mean())
    return _Cluster(mean, inside, share, presence, cross, float((rows @ mean).mean()))


def _classes(clusters: Sequence[_Cluster], first: Tensor) -> dict[str, _Cluster]:
    """Which cluster is which class; of several sinks of one kind, the largest."""
    found: dict[str, _Cluster] = {}
    for cluster in clusters:
        everywhere = cluster.cross >= DEAD_COSINE and cluster.presence >= DEAD_PRESENCE
        if "dead" not in found and everywhere and (cluster.share > SINK_SHARE or cluster.cross <= SINK_COSINE):
            found["dead"] = cluster
        elif cluster.cross > SINK_COSINE and cluster.presence >= SINK_PRESENCE and cluster.share <= SINK_SHARE:
            seen = cluster.inside[: len(first)]
            like = float(first[seen].mean()) if bool(seen.any()) else 0.0
            found.setdefault("llm_sink" if like >= FIRST_TOKEN_COSINE else "vit_sink", cluster)
    return found


def find_anchors(near: Tensor, inside: Tensor, size: int) -> tuple[tuple[int, ...], float, float]:
    """Words that give a class away.

    Greedy: the word that finds most of what is not found yet, as long as all of them together are near few others.

    Parameters
    ----------
    near : Tensor
        ``[T, k]`` nearest words of each token, -1 where there is none.
    inside : Tensor
        ``[T]`` bool, the class.
    size
        V.

    Returns
    -------
    ids, coverage, leak
        Anchors, the share of the class's tokens that have one among their nearest words, and that of all others.
    """
    own, rest = near[inside], near[~inside]
    found, lost = torch.zeros(len(own), dtype=torch.bool), torch.zeros(len(rest), dtype=torch.bool)
    ids: list[int] = []
    allowed = LEAK * max(1, len(rest))
    while float(found.float().mean()) < COVERAGE:
        hits = torch.bincount(own[~found].clamp_min(0).flatten(), minlength=size)
        best = None
        for word in torch.argsort(hits, descending=True, stable=True)[:64].tolist():
            leaks = lost | (rest == word).any(1)
            if hits[word] > 0 and int(leaks.sum()) <= allowed and word not in ids:
                best = (word, leaks)
                break
        if best is None:
            break
        ids.append(best[0])
        found, lost = found | (own == best[0]).any(1), best[1]
    leak = float(lost.float().mean()) if len(rest) else 0.0
    return tuple(ids), float(found.float().mean()), leak
