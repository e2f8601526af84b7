# SPDX-License-Identifier: Apache-2.0
"""The number of tokens that stay is the number that was asked for, and the report says it."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from tiny import Image, Video

import vtprune
from vtprune.errors import ConfigError, InputError, VTPruneWarning

from .helpers import FAMILIES_COUNTS, METHODS, first_call, hooks, kept_of, reference, same, spy, twin


def expected_count(tokens: int, keep: float | int) -> int:
    """DESIGN's rule, written down once more."""
    if isinstance(keep, int):
        return min(keep, tokens)
    return min(tokens, max(1, math.floor(tokens * keep + 1e-6)))


def picture_counts(family: str, images: int) -> list[int]:
    return [FAMILIES_COUNTS[family][i % 3] for i in range(images)]


@pytest.mark.parametrize("keep", [1 / 9, 0.25, 0.5, 0.999, 1e-9, 1, 3, 7])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_realised_counts_per_picture(family: str, keep: float | int) -> None:
    model, ref = tiny.build(family), reference(family)
    samples = tiny.mixed(model)
    batch = tiny.collate(samples)
    numbers = [2, 0, 1, 3]
    with vtprune.apply(model, "norm", keep=keep) as handle, spy("norm") as records:
        model(**batch)
        report = handle.report()
    counts = [n for number in numbers for n in picture_counts(family, number)]
    want = [expected_count(n, keep) for n in counts]
    assert [i.tokens_in for i in report.images] == counts
    assert [i.tokens_out for i in report.images] == want
    assert [i.sample for i in report.images] == [0, 0, 2, 3, 3, 3]
    assert (report.tokens_in, report.tokens_out, report.samples) == (sum(counts), sum(want), 4)
    assert report.ratio == pytest.approx(sum(want) / sum(counts))
    assert report.stages == ("projector",)
    for sample, kept, number, start in zip(samples, kept_of(model, batch, records), numbers, (0, 2, 2, 3), strict=True):
        visual = ref.prompt(sample).visual
        assert int((kept[None] & visual).sum()) == sum(want[start : start + number])
        assert bool(kept[None][~visual].all()), "only visual tokens are ever dropped"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("allocation", ["equal", "pooled"])
@torch.no_grad()
def test_every_method_keeps_exactly_its_budget(method: str, allocation: str) -> None:
    for family in ("llava_next", "qwen2_5_vl"):
        model = tiny.build(family)
        sample = tiny.prompt(model, 3)
        for keep in (1, 5, 0.3):
            with vtprune.apply(model, method, keep=keep, allocation=allocation) as handle:
                model(**sample)
                report = handle.report()
            assert [i.tokens_out for i in report.images] == [expected_count(i.tokens_in, keep) for i in report.images]
            for image in report.images:
                assert image.tokens_out == sum(int(s.kept.sum()) for s in image.segments)
                assert image.tokens_in == sum(len(s.kept) for s in image.segments)


@torch.no_grad()
def test_equal_allocation_gives_every_view_its_share() -> None:
    model = tiny.build("llava_next")
    sample = tiny.sample(model, [2, Image(112, 112), 3])
    with vtprune.apply(model, "norm", keep=0.25) as handle:
        model(**sample)
        segments = handle.report().images[0].segments
    assert [len(s.kept) for s in segments] == [16] * 5
    assert [int(s.kept.sum()) for s in segments] == [4] * 5
    with vtprune.apply(model, "norm", keep=7) as handle:
        model(**sample)
        segments = handle.report().images[0].segments
    assert [int(s.kept.sum()) for s in segments] == [2, 2, 1, 1, 1], "largest remainder, ties to the lowest index"


@pytest.mark.parametrize("family", tiny.QWEN)
@torch.no_grad()
def test_a_video_is_one_clip(family: str) -> None:
    model = tiny.build(family)
    sample = tiny.sample(model, [2, Video(3, 4, 4), 1, Image(8, 8), 3])
    for keep, want in ((6, [6, 6]), (0.5, [6, 8]), (1 / 9, [1, 1])):
        with vtprune.apply(model, "norm", keep=keep) as handle:
            model(**sample)
            report = handle.report()
        assert [(i.tokens_in, i.tokens_out) for i in report.images] == [(12, want[0]), (16, want[1])]
        assert [s.kind for s in report.images[0].segments] == ["frame"] * 3
        assert [s.kind for s in report.images[1].segments] == ["image"]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_joint_scope_pools_the_pictures_of_a_sample(family: str) -> None:
    model, ref = tiny.build(family), reference(family)
    samples = [tiny.prompt(model, 3, 1), tiny.prompt(model, 1, 2)]
    batch = tiny.collate(samples)
    with vtprune.apply(model, "norm", keep=0.3, scope="joint") as handle, spy("norm") as records:
        model(**batch)
        report = handle.report()
    by_sample = [picture_counts(family, 3), picture_counts(family, 1)]
    want = [sum(expected_count(n, 0.3) for n in counts) for counts in by_sample]
    got = [sum(i.tokens_out for i in report.images if i.sample == s) for s in (0, 1)]
    assert got == want
    for b, sample in enumerate(samples):
        prompt = ref.prompt(sample)
        visual = prompt.visual.nonzero().flatten()
        best = visual[prompt.embeds[visual].norm(dim=-1).topk(want[b]).indices].sort().values
        kept = kept_of(model, batch, records)[b][None]
        assert torch.equal((kept & prompt.visual).nonzero().flatten(), best)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_asking_for_more_than_exist_keeps_all_and_says_so(family: str) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 2)
    most = max(picture_counts(family, 2))
    with pytest.warns(VTPruneWarning, match="999"), vtprune.apply(model, "norm", keep=999) as handle:
        assert same(model(**sample).logits, twin(family)(**sample).logits)
        report = handle.report()
    assert report.tokens_out == report.tokens_in
    assert len(report.notes) == 2 and all("999" in n and "all kept" in n for n in report.notes)
    if family != "llava":  # pictures of different size: only the smaller one keeps all
        with vtprune.apply(model, "norm", keep=most - 1) as handle:
            model(**sample)
            report = handle.report()
        assert [i.tokens_out for i in report.images] == [min(n, most - 1) for n in picture_counts(family, 2)]
        assert len(report.notes) == 1 and str(most - 1) in report.notes[0]


@torch.no_grad()
def test_keep_all_is_reported_as_such() -> None:
    model = tiny.build("llava")
    with vtprune.apply(model, "norm", keep=1.0) as handle:
        model(**tiny.prompt(model, 2))
        report = handle.report()
    assert (report.tokens_in, report.tokens_out, report.ratio, report.stages) == (32, 32, 1.0, ())
    assert report.flops_before == report.flops_after


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_reported_flags_and_order_are_what_happened(family: str) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 2)
    with vtprune.apply(model, "idpruner", keep=KEEP_SOME) as handle, spy("idpruner") as records:
        model(**sample)
        report = handle.report()
    record = first_call(records)[None]
    flags = torch.cat([torch.from_numpy(s.kept) for i in report.images for s in i.segments])
    assert torch.equal(flags.nonzero().flatten(), record.selection.index)
    coords = torch.cat([torch.from_numpy(s.coords) for i in report.images for s in i.segments])
    assert torch.equal(coords.float(), record.tokens.coords)
    assert record.selection.order is not None
    order = torch.cat([torch.from_numpy(s.order) for i in report.images for s in i.segments])
    assert torch.equal(flags, order >= 0)
    ranked = flags.nonzero().flatten()[order[flags].argsort()]
    assert torch.equal(ranked, record.selection.order)
    assert report.info.get("importance"), "the report must name the importance that was used"


KEEP_SOME = 0.3


@torch.no_grad()
def test_flops_follow_the_formula() -> None:
    """DESIGN: per layer 2n[d dh (2H + 2Hkv) + 3 d m] + 4 n n H dh, n rows at that layer, head excluded."""
    d, dh, heads, kv, m = 32, 8, 4, 2, 64

    def layer(n: int) -> int:
        return 2 * n * (d * dh * (2 * heads + 2 * kv) + 3 * d * m) + 4 * n * n * heads * dh

    for family in tiny.FAMILIES:
        model = tiny.build(family)
        samples = [tiny.prompt(model, 2, 1), tiny.prompt(model, 1, 2)]
        batch = tiny.collate(samples)
        full = [s["input_ids"].shape[1] for s in samples]
        with vtprune.apply(model, "test-layers", keeps={None: 0.6, 1: 0.2}) as handle, spy("test-layers") as records:
            model(**batch)
            report = handle.report()
        kept = kept_of(model, batch, records)
        first = [int(k[None].sum()) for k in kept]
        second = [int((k[None] & k[1]).sum()) for k in kept]
        assert report.flops_before == sum(5 * layer(n) for n in full)
        assert report.flops_after == sum(2 * layer(n) for n in first) + sum(3 * layer(n) for n in second)


@torch.no_grad()
def test_the_report_is_of_the_last_prompt_not_of_decode_steps() -> None:
    model = tiny.build("llava")
    with vtprune.apply(model, "norm", keep=4) as handle:
        model.generate(**tiny.prompt(model, 2), max_new_tokens=3)
        assert (handle.report().tokens_in, handle.report().tokens_out) == (32, 8)
        assert vtprune.report(model).tokens_out == 8
        model(**tiny.prompt(model, 1))
        assert handle.report().tokens_in == 16
        assert "norm" in str(handle.report())


def test_there_is_no_report_before_a_forward() -> None:
    model = tiny.build("llava")
    with pytest.raises(InputError):
        vtprune.report(model)
    vtprune.apply(model, "norm", keep=4)
    with pytest.raises(InputError):
        vtprune.report(model)


@pytest.mark.parametrize("keep", [0, -1, 0.0, -0.5, 1.5, math.nan, math.inf, "half", True, [0.5], 2.0])
def test_impossible_budgets_are_refused_and_leave_the_model_alone(keep: object) -> None:
    model = tiny.build("llava")
    clean = hooks(model)
    with pytest.raises(ConfigError) as caught:
        vtprune.apply(model, "norm", keep=keep)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and "0.25" in str(caught.value), "one line that names the cure"
    assert hooks(model) == clean
