# SPDX-License-Identifier: Apache-2.0
"""Any method on any family's tiny model: prompts with 0 to 8 pictures anywhere, padded batches, exceptions inside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tiny
import torch
from conformance.helpers import LOOSE, forward_error, generation_error, hooks, kept_of, later_hook, same, spy
from conformance.reference import Reference
from conformance.test_reversible import Sitting
from hypothesis import strategies as st
from torch import Tensor, nn

import vtprune
from vtprune.errors import ConfigError, UnsupportedModelError

from .choices import keeps, selector

FAMILIES = (*tiny.FAMILIES, *tiny.MORE)
METHODS = tuple(name for name in vtprune.methods() if not name.startswith("test-"))
#: Pictures in the words of `tiny`; small, so that eight of them are a short prompt.
SIZES: dict[str, tuple[tiny.Image, ...]] = {
    "llava": (tiny.Image(56, 56),),
    "llava_next": (tiny.Image(40, 110), tiny.Image(100, 60), tiny.Image(60, 150)),
    "llava_onevision": (tiny.Image(40, 110), tiny.Image(100, 60), tiny.Image(60, 150)),
    "qwen2_vl": (tiny.Image(2, 2), tiny.Image(4, 6), tiny.Image(10, 4), tiny.Image(2, 8)),
    "qwen2_5_vl": (tiny.Image(2, 2), tiny.Image(4, 6), tiny.Image(10, 6), tiny.Image(2, 8)),
    "qwen3_vl": (tiny.Image(2, 2), tiny.Image(4, 6), tiny.Image(10, 6), tiny.Image(2, 8)),
    "internvl": (tiny.Image(1, 1), tiny.Image(1, 2), tiny.Image(2, 1)),
    "idefics3": (tiny.Image(1, 1), tiny.Image(1, 2), tiny.Image(2, 1)),
    "smolvlm": (tiny.Image(1, 1), tiny.Image(1, 2), tiny.Image(2, 1)),
    "pixtral": (tiny.Image(2, 2), tiny.Image(2, 4), tiny.Image(6, 2)),
    "mistral3": (tiny.Image(4, 4), tiny.Image(4, 8), tiny.Image(8, 4)),
}
WITH_CLIPS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision")
#: Merges whose rows the reference, which only drops, does not know.
MERGING = ("visionzip", "tome", "pool", "prumerge+", "sparsevlm")
TROUBLE: tuple[type[BaseException], ...] = (torch.OutOfMemoryError, KeyboardInterrupt, ZeroDivisionError)


@dataclass(frozen=True)
class Case:
    """A model, what is applied, and the prompts that are run."""

    family: str
    dtype: torch.dtype
    method: str | tuple[str, ...]
    keep: float | int
    positions: str
    scope: str
    allocation: str
    samples: tuple[tuple[tiny.Part, ...], ...]
    side: str
    masked: bool  # the attention mask is passed
    steps: int  # tokens that are generated
    trouble: tuple[int, int, bool] | None  # a decoder layer, which exception it raises, and within `using`
    seed: int


def _prompts(family: str, most: int) -> st.SearchStrategy[tuple[tiny.Part, ...]]:
    part: st.SearchStrategy[Any] = st.sampled_from(SIZES[family])
    if family in WITH_CLIPS:
        clips = [tiny.Video(2, 2, 4)] if family == "llava_onevision" else [tiny.Video(2, 2, 4), tiny.Video(3, 4, 2)]
        part = st.one_of(part, part, part, st.sampled_from(clips))
    between = st.integers(0, 4)

    def join(start: int, parts: list[tuple[Any, int]], end: int) -> tuple[tiny.Part, ...]:
        return (start, *(x for pair in parts for x in pair), end)

    return st.builds(join, st.integers(1, 4), st.lists(st.tuples(part, between), max_size=most), between)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    family = draw(st.sampled_from(FAMILIES))
    most = 8 if draw(st.integers(0, 5)) == 0 else 3
    # One text token at least: the bare start of a prompt is never a picture in practice, and `generate` needs a row.
    samples = tuple(draw(st.lists(_prompts(family, most), min_size=1, max_size=3)))
    method: str | tuple[str, ...] = draw(st.sampled_from(METHODS))
    if draw(st.integers(0, 9)) == 0:
        method = tuple(draw(st.lists(st.sampled_from(METHODS), min_size=2, max_size=2)))
    return Case(
        family,
        draw(st.sampled_from((torch.float32, torch.float32, torch.float64, torch.bfloat16))),
        method,
        draw(keeps),
        draw(st.sampled_from(("original", "original", "compact"))),
        draw(st.sampled_from(("per_image", "per_image", "joint"))),
        draw(st.sampled_from(("auto", "auto", "equal", "pooled", "proportional"))),
        samples,
        draw(st.sampled_from(("left", "right"))),
        draw(st.integers(0, 3)) > 0,
        draw(st.sampled_from((0, 0, 3))),
        draw(st.one_of(st.none(), st.tuples(st.integers(0, 4), st.integers(0, len(TROUBLE) - 1), st.booleans()))),
        draw(st.integers(0, 2**31)),
    )


@functools.cache
def built(family: str, dtype: torch.dtype, twin: bool) -> nn.Module:
    """A model, and an untouched twin of it. The model is shared by all cases: what one leaves behind, others trip on.

    Deep enough that layers named by methods lie as in a usual checkpoint with regard to DeepStack."""
    model = tiny.build(family, dtype=dtype, layers=12 if family == "qwen3_vl" else tiny.LAYERS)
    parts = [2, *SIZES[family][:1], *([tiny.Video(2, 2, 4)] if family in WITH_CLIPS else []), 2]
    model.generate(**tiny.sample(model, parts), max_new_tokens=2)  # transformers installs hooks of its own at first
    return model


@contextmanager
def failing(layer: nn.Module, error: type[BaseException]) -> Iterator[None]:
    """A layer that raises when it is run, after everybody else's hooks."""

    def fail(kwargs: dict[str, Any]) -> None:
        raise error("told to fail")

    with later_hook(layer, fail):
        yield


def _settings(case: Case) -> dict[str, Any]:
    given: dict[str, Any] = {"keep": case.keep, "positions": case.positions, "scope": case.scope}
    names = (case.method,) if isinstance(case.method, str) else case.method
    if "embedlens" in names:
        anchors = {"vit_sink": (7,), "dead": tuple(range(40, 60))}
        given["calibration"] = {
            "checkpoint": "tiny", "vocabulary": tiny.VOCABULARY, "width": 32, "anchors": anchors,
            "excluded": (tiny.PAD, tiny.IMAGE, tiny.VIDEO),
        }  # fmt: skip
    if "selector" in names:
        given["weights"] = selector(32)
    return {"method": case.method, "allocation": case.allocation, **given}


def _text_survives(model: nn.Module, batch: tiny.Inputs, packed: dict[str, Any]) -> None:
    """All tokens that are no placeholders, and in order, are among the rows that the language model was given."""
    table = model.get_input_embeddings().weight
    rows, mask = packed["inputs_embeds"], packed.get("attention_mask")
    valid = batch["attention_mask"].bool()
    placeholder = torch.isin(batch["input_ids"], torch.tensor(tiny.placeholders(model)))
    for b, row in enumerate(rows):
        row = row if mask is None else row[mask[b].bool()]
        like = (row[:, None] == table[None]).all(-1)
        found = like.int().argmax(1)[like.any(1)].tolist()
        assert found == batch["input_ids"][b][valid[b] & ~placeholder[b]].tolist(), "text was lost, or moved"


@torch.no_grad()
def check(case: Case) -> str:
    """Run a case; ``"refused"`` where the method cannot serve the model, else ``"ran"``."""
    model, plain = (built(case.family, case.dtype, twin) for twin in (False, True))
    samples = [tiny.sample(model, parts, case.seed + i) for i, parts in enumerate(case.samples)]
    batch = tiny.collate(samples, case.side) if len(samples) > 1 else dict(samples[0])
    call = dict(batch)
    whole = bool(batch["attention_mask"].all())
    if not case.masked and whole:
        del call["attention_mask"]
    visual = [bool(torch.isin(s["input_ids"], torch.tensor(tiny.placeholders(model))).any()) for s in samples]
    clean = hooks(model)
    settings = _settings(case)
    try:
        handle = vtprune.apply(model, **settings)
    except (ConfigError, UnsupportedModelError) as refusal:
        assert "\n" not in str(refusal) and hooks(model) == clean
        return "refused"
    dense = plain(**call).logits
    valid = batch["attention_mask"].bool()
    try:
        with handle:
            _pruned(case, model, samples, batch, call, dense, valid, visual, settings)
            handle._engine.fired = True  # a prompt without pictures is no mistake here
    finally:
        vtprune.remove(model)
    assert hooks(model) == clean, "hooks were left"
    assert same(model(**call).logits, dense), "not bit-equal after removal"
    return "ran"


def _pruned(
    case: Case,
    model: nn.Module,
    samples: list[tiny.Inputs],
    batch: tiny.Inputs,
    call: tiny.Inputs,
    dense: Tensor,
    valid: Tensor,
    visual: list[bool],
    settings: dict[str, Any],
) -> None:
    single = case.method if isinstance(case.method, str) else None
    seen: list[dict[str, Any]] = []
    with later_hook(tiny.decoder(model), lambda kwargs: seen.append(dict(kwargs))), spy(single or "norm") as records:
        logits = model(**call).logits
    assert logits.shape == dense.shape
    _text_survives(model, batch, seen[-1])
    if not any(visual):
        assert same(logits, dense), "a prompt without pictures changed"
        return
    report = vtprune.report(model)
    assert report.tokens_out <= report.tokens_in and bool(logits[valid].isfinite().all())
    if case.keep == 1.0 and isinstance(case.keep, float):
        assert same(logits, dense), "keep=1.0 changed a bit"
    cls = None if single is None else vtprune.methods()[single]
    # CATP's demonstrations share one budget, which rounds once.
    if cls is not None and not cls().adaptive and single not in ("visual-exit", "catp"):
        counts = [vtprune.Budget(case.keep).image_count(image.tokens_in) for image in report.images]
        most = sum(counts)
        assert 0 < report.tokens_out <= most, (report.tokens_out, most)
        if case.allocation in ("equal", "pooled", "proportional"):
            assert report.tokens_out == most, (report.tokens_out, most)
    assert same(model(**call).logits, logits), "the second forward differs from the first"
    if case.trouble is not None:
        _in_trouble(case, model, call, logits, settings)
    if single is not None and not records:
        assert report.tokens_out == report.tokens_in and same(logits, dense)
        return
    tolerance = LOOSE if case.dtype in (torch.float32, torch.float64) else None
    if tolerance is None or single is None or single in MERGING:
        return
    sits = single == "tokensparse"
    if sits and case.family == "qwen3_vl":  # DeepStack's rows are not known to the reference of what sits out
        return _alone(case, model, samples, batch, single, visual)
    ref = (Sitting if sits else Reference)(built(case.family, case.dtype, True))
    worst = forward_error(model, ref, samples, batch, single, positions=case.positions)
    assert worst <= tolerance, f"{worst:.3g} from the language model called by hand"
    _alone(case, model, samples, batch, single, visual)
    if case.steps and case.side == "left":
        worst = generation_error(model, ref, samples, batch, single, case.steps, case.positions)
        assert worst <= tolerance, f"{worst:.3g} from recomputation without a cache"


def _alone(
    case: Case, model: nn.Module, samples: list[tiny.Inputs], batch: tiny.Inputs, method: str, visual: list[bool]
) -> None:
    """What is kept of each prompt is what is kept of it alone."""
    if len(samples) == 1:
        return
    with spy(method) as records:
        model(**batch)
    together = kept_of(model, batch, records) if records else []
    for b, sample in enumerate(samples):
        if visual[b] and together:
            with spy(method) as records:
                model(**sample)
            if records:
                for stage, mask in kept_of(model, sample, records)[0].items():
                    assert same(mask, together[b][stage]), f"sample {b} is another alone, at stage {stage}"


def _in_trouble(case: Case, model: nn.Module, call: tiny.Inputs, logits: Tensor, settings: dict[str, Any]) -> None:
    """An exception from inside a forward comes out as it is, and what comes after is as if it had never been."""
    assert case.trouble is not None
    at, which, inside = case.trouble
    layers, raised = tiny.decoder(model).layers, TROUBLE[which]
    before = hooks(model)
    run: Callable[[], Any] = lambda: model(**call)  # noqa: E731
    with failing(layers[at % len(layers)], raised):
        try:
            if inside:
                with vtprune.using(model, "random", keep=0.5):
                    run()
            else:
                run()
        except raised:
            pass
        else:
            raise AssertionError("the exception was swallowed")
    assert hooks(model) == before, "an exception left hooks"
    assert same(model(**call).logits, logits), "a forward after an exception differs"
