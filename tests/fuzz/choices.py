# SPDX-License-Identifier: Apache-2.0
"""Any method on any visual tokens, without a model: shapes, dtypes, ragged layouts, odd numbers, budgets, options."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import vtprune
from vtprune.budget import Budget, allocations
from vtprune.errors import ConfigError
from vtprune.pruners.selector import Network
from vtprune.registry import Pruner
from vtprune.tokens import CLS_LOGITS, CLS_ROW, LAST_CLS_LOGITS, PRE_PROJECTOR, Selection, VisualTokens

VOCABULARY = 24
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: What rows may be like. Broken ones hold NaN or infinity, and so do probes then.
KINDS = ("random", "zero", "constant", "copies", "few", "broken", "all broken", "infinite", "huge", "tiny", "one-hot")
METHODS = tuple(
    name
    for name, cls in vtprune.methods().items()
    if not name.startswith("test-") and all(stage.layer is None for stage in cls().stages())
)
#: They need a calibration or weights, which `worst` cannot hand to its other method.
WITH_FILES = ("embedlens", "selector")


@dataclass(frozen=True)
class Picture:
    """One image: the grids of its segments, and what they are."""

    kind: str  # "image", "anyres", "video"
    grid: tuple[int, int]
    segments: tuple[int, int]  # frames and 1, or rows and columns of crops
    cut: int = 0  # rows of padding that were taken off the last crop


@dataclass(frozen=True)
class Case:
    """Everything that a case is made of; the tensors follow from `seed`."""

    method: str | tuple[str, ...]
    options: dict[str, Any]
    keep: float | int
    scope: str
    allocation: str
    samples: tuple[tuple[Picture, ...], ...]
    width: int
    dtype: torch.dtype
    kind: str
    cls: bool
    group: int  # encoder rows per token; 0: the probe is not there
    words: tuple[int, ...] | None  # words of the question per sample
    seed: int


_sides = st.integers(0, 4)
_pictures = st.one_of(
    st.builds(Picture, st.just("image"), st.tuples(st.integers(0, 7), _sides), st.just((1, 1))),
    st.builds(Picture, st.just("anyres"), st.tuples(_sides, _sides), st.tuples(st.integers(1, 3), st.integers(1, 2)),
              st.integers(0, 1)),
    st.builds(Picture, st.just("video"), st.tuples(_sides, _sides), st.tuples(st.integers(1, 5), st.just(1))),
)  # fmt: skip
_fractions = st.one_of(st.floats(0.001, 1.0), st.sampled_from((0.25, 1 / 9, 0.5, 1 / 3, 1.0)))
keeps = st.one_of(_fractions, st.integers(1, 40), st.sampled_from((1, 10**9)))
shares = st.one_of(st.floats(0, 1), st.sampled_from((0, 1, 0.5)))


def options_of(method: str, cls: bool, raw: bool) -> st.SearchStrategy[dict[str, Any]]:
    """Options that the method takes; what it needs must be there."""
    probes = (["cls", "cls_logits"] if cls else []) + (["zoo"] if raw else [])
    known: dict[str, dict[str, st.SearchStrategy[Any]]] = {
        "idpruner": {
            "importance": st.sampled_from(["auto", "norm", *probes]),
            "mmr_lambda": shares,
            "parallel_k": st.integers(1, 5),
            "importance_norm": st.sampled_from(("raw_minmax", "soft_topk_minmax")),
        },
        "cdpruner": {"relevance": st.sampled_from(("positive", "negative", "none"))},
        "dart": {"pivots": st.integers(1, 12)},
        "embedlens": {
            "mode": st.sampled_from(("rank", "drop", "control", "random", "only")),
            "classes": st.sampled_from(("dead", "sink", "dead,vit_sink", "dead,sink")),
            "seed": st.integers(0, 9),
        },
        "globalcom2": {"alpha": shares},
        "hiprune": {"alpha": shares},
        "prumerge+": {"neighbours": st.integers(1, 40)},
        "random": {"seed": st.integers(0, 2**40)},
        "scope": {"alpha": st.floats(0, 4)},
        "selector": {"mmr_lambda": shares},
        "tome": {"rounds": st.integers(1, 14)},
        "visionzip": {"dominant": shares},
        "vispruner": {"important": shares, "per_round": st.integers(1, 9)},
        "worst": {"of": st.sampled_from([m for m in METHODS if m not in ("worst", "frames", "grid", "pool")])},
        "zoo": {
            "estimator": st.sampled_from(("fd", "fd_fused", "jvp", "frobenius")),
            "m": st.integers(1, 9),
            "h": st.sampled_from((0.01, 1.0)),
            "seed": st.integers(0, 9),
        },
    }
    return st.fixed_dictionaries({}, optional=known.get(method, {}))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    pictures = st.lists(_pictures, max_size=8) if draw(st.integers(0, 7)) == 0 else st.lists(_pictures, max_size=3)
    samples = tuple(tuple(own) for own in draw(st.lists(pictures, min_size=1, max_size=4)))
    cls, group = draw(st.booleans()), draw(st.sampled_from((0, 1, 1, 4)))
    several = draw(st.integers(0, 5)) == 0
    usable = [m for m in METHODS if group or m != "zoo"]
    method: str | tuple[str, ...] = draw(st.sampled_from(usable))
    options: dict[str, Any] = {}
    if several:
        method = tuple(draw(st.lists(st.sampled_from(usable), min_size=2, max_size=3)))
    else:
        options = draw(options_of(str(method), cls, group > 0))
        if options.get("of") == "zoo" and not group:
            options = {}
    return Case(
        method,
        options,
        draw(keeps),
        draw(st.sampled_from(("per_image", "per_image", "per_image", "joint"))),
        draw(st.sampled_from(("auto", "auto", *allocations()))),
        samples,
        draw(st.integers(1, 33)),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(KINDS)) if draw(st.booleans()) else "random",
        cls,
        group,
        draw(st.one_of(st.none(), st.tuples(*(st.integers(0, 4) for _ in samples)))),
        draw(st.integers(0, 2**31)),
    )


class Merger(nn.Module):
    """A projector that joins `group` rows, as PatchMergers do."""

    def __init__(self, group: int, raw: int, width: int) -> None:
        super().__init__()
        self.group, self.norm = group, nn.LayerNorm(raw)
        self.out = nn.Linear(group * raw, width)

    def forward(self, rows: Tensor) -> Tensor:
        return self.out(self.norm(rows).view(-1, self.group * rows.shape[1]))


def _spoil(rows: Tensor, kind: str, rng: torch.Generator) -> Tensor:
    n = len(rows)
    if kind == "zero":
        return torch.zeros_like(rows)
    if kind == "constant" and n:
        return rows[:1].expand_as(rows).clone()
    if kind == "copies" and n:
        return rows[torch.randint((n + 1) // 2, (n,), generator=rng)]
    if kind == "few" and n:
        return rows[torch.randint(min(n, 3), (n,), generator=rng)]
    if kind == "broken":
        return rows.masked_fill(torch.rand(n, 1, generator=rng) < 0.3, torch.nan)
    if kind == "all broken":
        return torch.full_like(rows, torch.nan)
    if kind == "infinite":
        return rows.masked_fill(torch.rand(n, 1, generator=rng) < 0.3, -torch.inf)
    if kind in ("huge", "tiny"):
        return rows * (1e20 if kind == "huge" else 1e-25)
    if kind == "one-hot":
        return nn.functional.one_hot(torch.randint(rows.shape[1], (n,), generator=rng), rows.shape[1]).to(rows)
    return rows


def tokens_of(case: Case) -> VisualTokens:
    """The batch of a case."""
    rng = torch.Generator().manual_seed(case.seed)
    lens, coords, seg_image, kinds, grids, boxes = [], [], [], [], [], []
    image_sample, image_grid = [], []
    for sample, own in enumerate(case.samples):
        for picture in own:
            (h, w), (down, across), image = picture.grid, picture.segments, len(image_sample)
            image_sample.append(sample)
            image_grid.append((down, 1, 1) if picture.kind == "video" else (1, down, across))
            number = {"image": 1, "video": down, "anyres": 1 + down * across}[picture.kind]
            for s in range(number):
                last = picture.kind == "anyres" and s == number - 1
                rows = max(0, h - picture.cut) if last else h
                lens.append(rows * w)
                t = s if picture.kind == "video" else 0
                coords += [(t, row, col) for row in range(rows) for col in range(w)]
                seg_image.append(image)
                first = "thumbnail" if s == 0 else "crop"
                kinds.append({"image": "image", "video": "frame", "anyres": first}[picture.kind])
                grids.append((h, w))
                box = (0.0, 0.0, 1.0, 1.0)
                if picture.kind == "anyres" and s:
                    i, j = divmod(s - 1, across)
                    box = (i / down, j / across, (i + 1) / down, (j + 1) / across)
                boxes.append(box)
    total = sum(lens)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    features = _spoil(noise(total, case.width), case.kind, rng).to(case.dtype)
    probes: dict[Any, Tensor] = {}
    if case.cls:
        for probe in (CLS_ROW, CLS_LOGITS, LAST_CLS_LOGITS):
            row = noise(total).softmax(0) if probe.softmax and total else noise(total)
            if case.kind in ("zero", "constant"):
                row = torch.full_like(row, 0.5)
            probes[probe] = row.masked_fill(~features.float().isfinite().all(1), torch.nan)
    projector = None
    if case.group:
        raw = 6
        rows = _spoil(noise(total, case.group * raw), case.kind, rng)
        probes[PRE_PROJECTOR] = rows.view(total * case.group, raw).to(case.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed)
            projector = (
                nn.Sequential(nn.Linear(raw, 8), nn.GELU(), nn.Linear(8, case.width))
                if case.group == 1
                else Merger(case.group, raw, case.width)
            )
        projector = projector.to(case.dtype).requires_grad_(False)
    text = None if case.words is None else noise(sum(case.words), case.width).to(case.dtype)
    return VisualTokens(
        features=features,
        seqlens=tuple(lens),
        source=torch.arange(total),
        coords=torch.tensor(coords, dtype=torch.float32).reshape(-1, 3),
        seg_image=tuple(seg_image),
        image_sample=tuple(image_sample),
        seg_kind=tuple(kinds),
        seg_grid=tuple(grids),
        seg_box=tuple(boxes),
        image_grid=tuple(image_grid),
        image_size=(None,) * len(image_sample),
        text=text,
        text_lens=case.words,
        pair_text=None if case.words is None else noise(len(image_sample), case.width),
        probes=probes,
        projector=projector,
        vocabulary=noise(VOCABULARY, case.width).to(case.dtype),
    )


def only(tokens: VisualTokens, sample: int) -> tuple[VisualTokens, int]:
    """One sample of a batch by itself, and its first flat row there."""
    images = [i for i, s in enumerate(tokens.image_sample) if s == sample]
    segments = [s for s, i in enumerate(tokens.seg_image) if i in images]
    ends = list(accumulate(tokens.seqlens, initial=0))
    start = ends[segments[0]] if segments else 0
    stop = ends[segments[-1] + 1] if segments else 0
    group = {probe: len(value) // max(1, len(tokens.source)) for probe, value in tokens.probes.items()}
    words = list(accumulate(tokens.text_lens or (), initial=0))
    return (
        replace(
            tokens,
            features=tokens.features[start:stop].clone(),
            seqlens=tuple(tokens.seqlens[s] for s in segments),
            source=tokens.source[start:stop] - start,
            coords=tokens.coords[start:stop],
            seg_image=tuple(tokens.seg_image[s] - images[0] for s in segments),
            image_sample=(0,) * len(images),
            seg_kind=tuple(tokens.seg_kind[s] for s in segments),
            seg_grid=tuple(tokens.seg_grid[s] for s in segments),
            seg_box=tuple(tokens.seg_box[s] for s in segments),
            image_grid=tuple(tokens.image_grid[i] for i in images),
            image_size=(None,) * len(images),
            text=None if tokens.text is None else tokens.text[words[sample] : words[sample + 1]].clone(),
            text_lens=None if tokens.text_lens is None else (tokens.text_lens[sample],),
            pair_text=None if tokens.pair_text is None else tokens.pair_text[images],
            probes={p: v[start * group[p] : stop * group[p]].clone() for p, v in tokens.probes.items()},
            ctx={},
        ),
        start,
    )


def calibration(width: int) -> dict[str, Any]:
    """Anchors for `embedlens`: any words will do."""
    return {
        "checkpoint": "invented",
        "vocabulary": VOCABULARY,
        "width": width,
        "anchors": {"vit_sink": (3,), "llm_sink": (4, 5), "dead": tuple(range(10, 18))},
    }


@functools.cache
def selector(width: int) -> str:
    """The file of a selector that was never trained."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "selector.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width)
        save_file(Network(width).state_dict(), path)
    return str(path)


def _same(a: Selection, b: Selection, start: int = 0) -> bool:
    def bits(one: Tensor | None, other: Tensor | None) -> bool:
        if one is None or other is None:
            return one is other
        return one.shape == other.shape and torch.equal(one.nan_to_num(nan=7e3), other.nan_to_num(nan=7e3))

    orders = (a.order, None if b.order is None else b.order + start)
    return torch.equal(a.index, b.index + start) and bits(*orders) and bits(a.features, b.features)


def expected_counts(tokens: VisualTokens, budget: Budget, exact: bool) -> None:
    """The budget's pools, against arithmetic by hand."""
    lens, counts = budget.pools(tokens)
    wanted = [
        0 if n == 0 else min(budget.keep, n) if isinstance(budget.keep, int)
        else min(n, max(1, math.floor(n * budget.keep + 1e-6)))
        for n in tokens.image_lens
    ]  # fmt: skip
    assert sum(lens) == len(tokens.source) and all(0 <= k <= n for n, k in zip(lens, counts, strict=True))
    ends, kept = list(accumulate(lens)), list(accumulate(counts, initial=0))

    def total(stop: int) -> int:  # counts of the pools that end at or before a row, which is a border of pools
        return kept[sum(end <= stop for end in ends)] if stop else 0

    rows = list(accumulate(tokens.image_lens))
    for sample in range(tokens.num_samples):
        own = [i for i, s in enumerate(tokens.image_sample) if s == sample]
        if own:
            found = total(rows[own[-1]]) - total(rows[own[0]] - tokens.image_lens[own[0]])
            most = sum(wanted[i] for i in own)
            assert found == most if exact else (found > 0) * 1 <= found <= most, (found, most)


def check(case: Case) -> None:
    """Run a case and hold it to everything that a method promises."""
    tokens = tokens_of(case)
    options = dict(case.options)
    names = (case.method,) if isinstance(case.method, str) else case.method
    if "embedlens" in names:
        options["calibration"] = calibration(case.width)
    if "selector" in names:
        options["weights"] = selector(case.width)
    if options.get("of") in WITH_FILES:
        return check(replace(case, options={}))  # its other method takes no options
    if "worst" in names and len(names) > 1:
        options["of"] = "norm"
    config = vtprune.PruneConfig(case.method, case.keep, scope=case.scope, allocation=case.allocation, options=options)
    pruner: Pruner = config.pruner()
    budget = config.budget()
    untouched = tokens.features.clone()

    def select(given: VisualTokens) -> Selection:
        return vtprune.select(given, config)

    try:
        found = select(tokens)
    except ConfigError as error:
        # The only refusal that a sound config may meet.
        assert "embedlens" in names and "\n" not in str(error)
        raise
    assert torch.equal(tokens.features.nan_to_num(nan=7e3), untouched.nan_to_num(nan=7e3)), "the rows were written to"
    total = len(tokens.source)
    index = found.index
    assert index.dtype == torch.int64 and index.ndim == 1
    assert not len(index) or (bool((index.diff() > 0).all()) and int(index[0]) >= 0 and int(index[-1]) < total)
    assert torch.equal(found.cu_seqlens, torch.searchsorted(index, tokens.cu_seqlens))
    if isinstance(case.method, str) and not pruner.adaptive:
        assert (found.order is not None) == pruner.ordered, "an order that is not as declared"
    if found.order is not None:
        assert torch.equal(found.order.sort().values, index)
    if found.features is not None:
        assert found.features.shape == (len(index), case.width) and found.features.dtype == case.dtype
        kept_sound = tokens.features[index].float().isfinite().all(1)
        assert bool((found.features.float().isfinite().all(1) | ~kept_sound).all()), "a sound row was spoilt"
    if not pruner.adaptive:
        lens, counts = budget.pools(tokens)
        edges = torch.tensor([0, *accumulate(lens)])
        assert tuple(torch.searchsorted(index, edges).diff().tolist()) == counts
        plain = case.scope == "joint" or budget.allocation in ("equal", "pooled", "proportional")
        expected_counts(tokens, budget, exact=plain)
        if case.keep == 1.0 and isinstance(case.keep, float):
            assert len(index) == total
    else:
        shown = {s for s, n in zip(tokens.image_sample, tokens.image_lens, strict=True) if n}
        assert len(shown) <= len(index), "a sample with tokens has lost all"
    assert _same(found, select(replace(tokens, ctx={}))), "not the same again"
    parts, at = [], 0
    for sample in range(len(case.samples)):
        alone, start = only(tokens, sample)
        part = select(alone)
        here = slice(at, at + len(part.index))
        order = None if found.order is None else found.order[here]
        rows = None if found.features is None else found.features[here]
        mine = dataclasses.replace(found, index=index[here], order=order, features=rows)
        if len(alone.source):
            assert _same(mine, part, start), f"sample {sample} is another alone"
        parts.append(part)
        at += len(part.index)
    assert at == len(index)
    _check_prefix(case, config, pruner, tokens)


def _check_prefix(case: Case, config: vtprune.PruneConfig, pruner: Pruner, tokens: VisualTokens) -> None:
    """The picks of a smaller budget come first in a larger one."""
    if not isinstance(case.method, str) or not pruner.ordered or pruner.adaptive or not isinstance(case.keep, int):
        return
    few, more = (replace(config, keep=k, allocation="pooled") for k in (case.keep, case.keep + 1))
    small, large = (vtprune.select(replace(tokens, ctx={}), c) for c in (few, more))
    if small.order is None or large.order is None:
        return
    a = b = 0
    counts: Sequence[Sequence[int]] = [c.budget().pools(tokens).counts for c in (few, more)]
    for one, other in zip(*counts, strict=True):
        assert torch.equal(small.order[a : a + one], large.order[b : b + other][:one]), "not a prefix"
        a, b = a + one, b + other
