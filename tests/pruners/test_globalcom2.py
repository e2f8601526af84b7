# SPDX-License-Identifier: Apache-2.0
"""`globalcom2`: the paper's numbers, a naive copy of its formulas, views with padding, clips, encoders without CLS."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from helpers import NoHostSync, make_tokens
from tiny import Image, Video
from torch import Tensor

import vtprune
from vtprune.budget import Budget
from vtprune.errors import ConfigError
from vtprune.pruners import globalcom2
from vtprune.registry import build
from vtprune.tokens import CLS_LOGITS, CLS_ROW, LAST_CLS_LOGITS, PRE_PROJECTOR, VisualTokens

AUTO = "globalcom2"


def picture(side: int, crops: tuple[int, int], thumbnail: Tensor | float = 0.0, rest: Tensor | float = 0.0) -> Any:
    """One AnyRes picture that fills its crops, with these logits in the thumbnail and the crops."""
    views = 1 + crops[0] * crops[1]
    tokens = make_tokens([[[(side, side)] * views]])
    logits = torch.zeros(views, side * side)
    logits[0], logits[1:] = torch.as_tensor(thumbnail).flatten(), torch.as_tensor(rest)
    boxes = [(r / crops[0], c / crops[1]) for r in range(crops[0]) for c in range(crops[1])]
    ends = [(top + 1 / crops[0], left + 1 / crops[1]) for top, left in boxes]
    return replace(
        tokens,
        seg_kind=("thumbnail",) + ("crop",) * (views - 1),
        image_grid=((1, *crops),),
        seg_box=((0.0, 0.0, 1.0, 1.0), *((*a, *b) for a, b in zip(boxes, ends, strict=True))),
        probes={LAST_CLS_LOGITS: logits.flatten()},
    )


def clip(frames: int, rows: int, cols: int, features: Tensor | None = None) -> VisualTokens:
    tokens = make_tokens([[[(rows, cols)] * frames]], features=features, kind="frame")
    return replace(tokens, image_grid=((frames, 1, 1),))


def counts(tokens: VisualTokens, keep: float | int) -> tuple[int, ...]:
    """Of each segment, asked of the budget and seen in what the method keeps."""
    selection = build("globalcom2", {}).select(tokens, Budget(keep, allocation=AUTO))
    kept = tuple(selection.cu_seqlens.diff().tolist())
    assert Budget(keep, allocation=AUTO).pools(tokens) == (tokens.seqlens, kept)
    assert bool((selection.index.diff() > 0).all())
    return kept


def bright_corner(level: float = 0.2) -> Tensor:
    grid = torch.zeros(24, 24)
    grid[:12, :12] = level
    return grid


# -- how many ---------------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_bright_corner() -> None:
    sums = [0.2 * 144, 0, 0, 0]
    np.testing.assert_allclose(globalcom2.ratios(sums, 0.25), [0.401467, 0.199511, 0.199511, 0.199511], atol=1e-6)
    np.testing.assert_allclose(globalcom2.ratios(sums, 0.9), [1.0, 0.71824, 0.71824, 0.71824], atol=1e-5)
    tokens = picture(24, (2, 2), bright_corner())
    assert counts(tokens, 0.25) == (144, 231, 114, 114, 114)
    assert counts(tokens, 0.9) == (518, 576, 413, 413, 413), "what clipping takes is lost"


def test_a_thumbnail_without_contrast_gives_every_crop_the_same() -> None:
    assert globalcom2.ratios([3.0] * 4, 0.25) == [0.25] * 4
    assert counts(picture(24, (2, 2), 0.7), 0.25) == (144,) * 5
    assert globalcom2.ratios([], 0.25) == [] and globalcom2.ratios([1e6], 0.3) == [pytest.approx(0.3)]


@pytest.mark.parametrize("keep", [0.05, 0.25, 0.5])
def test_bounds_and_sum_of_the_ratios(keep: float) -> None:
    rng = np.random.default_rng(0)
    for n in (2, 3, 4, 9):
        for scale in (0.1, 10.0, 1000.0):
            found = np.array(globalcom2.ratios(scale * rng.standard_normal(n), keep))
            assert (found >= keep * (1 - 1 / n) - 1e-9).all() and (found <= keep * (2 - 1 / n) + 1e-9).all()
            assert found.sum() == pytest.approx(n * keep)


def test_logits_make_a_difference_where_probabilities_would_not() -> None:
    assert max(globalcom2.ratios([150, 40, -30, 10], 0.25)) == pytest.approx(0.4375, abs=1e-4)
    assert max(globalcom2.ratios([0.7, 0.1, 0.1, 0.1], 0.25)) == pytest.approx(0.25 * 1.0115, abs=1e-4)


def test_cells_take_what_is_left_over_at_the_end() -> None:
    tokens = picture(5, (2, 3), torch.arange(25.0))
    (image,) = globalcom2._images(tokens)
    grid = np.arange(25.0).reshape(5, 5)
    rows, cols = (slice(0, 2), slice(2, 5)), (slice(0, 1), slice(1, 2), slice(2, 5))
    assert image.cells(grid.flatten()) == [grid[r, c].sum() for r in rows for c in cols]


def test_a_count_is_met_exactly() -> None:
    tokens = picture(24, (2, 2), bright_corner())
    assert counts(tokens, 720) == (144, 231, 115, 115, 115)
    assert counts(tokens, 2592) == (576, 576, 480, 480, 480), "what clipping takes goes to the others"
    for keep in (1, 2, 3, 17, 719, 2592, 2879, 2880, 9999):
        assert sum(counts(tokens, keep)) == min(keep, 2880)


def test_everything_and_next_to_nothing() -> None:
    tokens = picture(4, (2, 2), torch.arange(16.0), torch.randn(4, 16))
    selection = build("globalcom2", {}).select(tokens, Budget(1.0, allocation=AUTO))
    assert torch.equal(selection.index, torch.arange(80))
    assert sum(counts(tokens, 1e-9)) == 1


def test_padding_never_makes_more_than_the_budget() -> None:
    """Of three crops side by side the outer ones are cut: the middle one's larger share is of more tokens."""
    model = tiny.build("llava_next")
    tokens = vtprune.encode(model, tiny.sample(model, [2, Image(56, 120), 3]))
    assert tokens.seqlens == (16, 8, 16, 8)
    thumbnail = torch.zeros(4, 4)
    thumbnail[:, 1] = 90.0
    tokens.probes[LAST_CLS_LOGITS][:16] = thumbnail.flatten()
    # r = (1/3, 5/6, 1/3) and 1/2 for the thumbnail make 8 + 2 + 13 + 2 = 25 of 48 tokens, where 24 may stay. Shares of
    # 24 in the same proportions are 7.2, 2.4, 12, 2.4.
    assert sum(globalcom2.ratios([0, 360, 0], 0.5)) == pytest.approx(1.5)
    assert counts(tokens, 0.5) == (7, 3, 12, 2)


def test_at_a_later_stage_the_budget_counts_from_all_tokens() -> None:
    tokens = picture(24, (2, 2), bright_corner())
    later = replace(tokens, ctx={"image_lens": (5760,)})
    assert counts(later, 0.25) == counts(tokens, 1440)
    assert sum(counts(later, 0.25)) == 1440


# -- which ------------------------------------------------------------------------------------------------------------


def naive(tokens: VisualTokens, alpha: float = 0.5) -> tuple[Tensor, list[float]]:
    """Scores, and sums of the cells, of one AnyRes picture, token by token, with torch's own resizing."""
    logits = tokens.probes[LAST_CLS_LOGITS].double()
    parts, coords = logits.split(tokens.seqlens), tokens.coords.long().split(tokens.seqlens)
    side, (_, gh, gw) = tokens.seg_grid[0][0], tokens.image_grid[0]
    thumbnail = parts[0].view(side, side)
    at = [(r // gw * side, r % gw * side) for r in range(gh * gw)]
    places = [[(top + y, left + x) for _, y, x in c.tolist()] for (top, left), c in zip(at, coords[1:], strict=True)]
    ys, xs = ({p[axis] for crop in places for p in crop} for axis in (0, 1))
    stitched = thumbnail
    if ys:
        size = (max(ys) - min(ys) + 1, max(xs) - min(xs) + 1)
        stitched = torch.nn.functional.interpolate(thumbnail[None, None], size, mode="bilinear")[0, 0]
    scores = [parts[0] / parts[0].norm()]
    for crop, own in zip(places, parts[1:], strict=True):
        if crop:
            guide = torch.stack([stitched[y - min(ys), x - min(xs)] for y, x in crop])
            scores.append((1 - alpha) * own / own.norm() + alpha * guide / guide.norm())
    sums = [0.0] * (gh * gw)
    for y in range(side):
        for x in range(side):
            row, col = min(y // max(side // gh, 1), gh - 1), min(x // max(side // gw, 1), gw - 1)
            sums[row * gw + col] += float(thumbnail[y, x])
    return torch.cat(scores), sums


@pytest.mark.parametrize("size", [(112, 112), (100, 60), (40, 110), (60, 150), (150, 41), (56, 56), (57, 30), (9, 200)])
def test_scores_and_sums_are_those_of_a_naive_copy(size: tuple[int, int]) -> None:
    model = tiny.build("llava_next")
    tokens = vtprune.encode(model, tiny.sample(model, [2, Image(*size), 3]))
    for alpha in (0.0, 0.5, 0.7, 1.0):
        expected, sums = naive(tokens, alpha)
        found = build("globalcom2", {"alpha": alpha}).score(tokens)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(globalcom2._informative(tokens)[0], sums, rtol=0, atol=1e-5)

    selection = vtprune.select(tokens, "globalcom2", keep=0.5)
    start = 0
    expected, sums = naive(tokens)
    for n, k, r in zip(
        tokens.seqlens, selection.cu_seqlens.diff().tolist(), [0.5, *globalcom2.ratios(sums, 0.5)], strict=True
    ):
        assert k == math.floor(n * r + 1e-6)
        best = (start + expected[start : start + n].topk(k).indices).sort().values
        mine = selection.index[(selection.index >= start) & (selection.index < start + n)]
        assert torch.equal(mine, best)
        start += n


def test_by_hand() -> None:
    """2 x 2 thumbnail, two crops side by side. The thumbnail is bright at the right, the crops say otherwise."""
    tokens = picture(2, (1, 2), torch.tensor([0.0, 40.0, 0.0, 40.0]), torch.tensor([[4.0, 3, 2, 1], [1.0, 2, 3, 4]]))
    # Sums 0 and 80, over 10: sigma is 0 and 1 up to 3e-4, so r = (.2502, .7498) for R = .5: 1 and 2 of 4 tokens.
    assert counts(tokens, 0.5) == (2, 1, 2)
    selection = build("globalcom2", {}).select(tokens, Budget(0.5, allocation=AUTO))
    # Resized to 2 x 4, a thumbnail row is 0, 10, 30, 40. The left crop's own and global parts are
    # (.73, .55, .37, .18) and (0, .71, 0, .71), those of the right (.18, .37, .55, .73) and (.42, .57, .42, .57).
    assert selection.index.tolist() == [1, 3, 5, 10, 11]
    assert selection.order is not None and selection.order.tolist() == [1, 3, 5, 11, 10]
    scores = build("globalcom2", {}).score(tokens)[8:]
    own, guide = torch.tensor([1.0, 2, 3, 4]), torch.tensor([30.0, 40, 30, 40])
    torch.testing.assert_close(scores, (own / own.norm() + guide / guide.norm()) / 2)
    assert selection.info == {"importance": "cls_logits"}


def test_ties_go_to_the_lowest_index() -> None:
    selection = build("globalcom2", {}).select(picture(4, (2, 2), 1.0, 1.0), Budget(0.25, allocation=AUTO))
    assert selection.index.tolist() == [16 * view + i for view in range(5) for i in range(4)]


def test_a_broken_token_goes_first_and_spoils_nothing() -> None:
    rest = torch.rand(4, 16)
    tokens = picture(4, (2, 2), torch.rand(16), rest)
    plain = build("globalcom2", {}).score(tokens)
    tokens.probes[LAST_CLS_LOGITS][[0, 40]] = torch.nan
    scores = build("globalcom2", {}).score(replace(tokens, ctx={}))
    assert scores.isnan().nonzero().flatten().tolist() == [0, 40]
    assert torch.equal(scores[48:], plain[48:]), "the crops that are not above token 0"
    assert sum(counts(replace(tokens, ctx={}), 79)) == 79
    index = build("globalcom2", {}).select(replace(tokens, ctx={}), Budget(15 / 16)).index
    assert 0 not in index and 40 not in index


def test_an_image_is_not_moved_by_its_neighbours() -> None:
    model = tiny.build("llava_next")
    first, second = (
        tiny.sample(model, [2, size, 3], seed) for seed, size in enumerate((Image(100, 60), Image(40, 110)))
    )
    both = vtprune.encode(model, tiny.collate([first, second]))
    chosen = vtprune.select(both, "globalcom2", keep=0.3).index
    alone = [vtprune.encode(model, sample) for sample in (first, second)]
    picks = [vtprune.select(tokens, "globalcom2", keep=0.3).index for tokens in alone]
    assert torch.equal(chosen, torch.cat([picks[0], picks[1] + len(alone[0].source)]))
    two = vtprune.encode(model, tiny.sample(model, [2, Image(100, 60), 3, Image(40, 110), 2]))
    for image, rows in zip(globalcom2._images(two), torch.arange(len(two.source)).split(two.image_lens), strict=True):
        assert torch.arange(len(two.source))[image.rows].equal(rows)


@pytest.mark.parametrize("size", [(112, 112), (100, 60), (40, 110)])
@torch.no_grad()
def test_everything_is_the_prompt_as_it_is_and_newlines_are_one_per_row_with_tokens(size: tuple[int, int]) -> None:
    """Specification 2.10.3, with the model: raster order, so that keeping all changes no bit."""
    model = tiny.build("llava_next")
    sample = tiny.sample(model, [2, Image(*size), 3])
    dense = model(**sample).logits
    with vtprune.apply(model, "globalcom2", keep=1.0):
        assert torch.equal(model(**sample).logits, dense)
    tokens = vtprune.encode(model, sample)
    placeholders = int((sample["input_ids"] == model.config.image_token_id).sum())
    crops = tokens.coords[tokens.seqlens[0] :].long()
    side, (_, _, wide) = tokens.seg_grid[0][0], tokens.image_grid[0]
    view = torch.arange(len(tokens.seqlens) - 1).repeat_interleave(torch.tensor(tokens.seqlens[1:]))
    rows = (view // wide * side + crops[:, 1]).unique()
    assert placeholders - len(tokens.source) == len(rows)
    with vtprune.apply(model, "globalcom2", keep=0.25, restore=False) as handle:
        length = model(**sample).logits.shape[1]
        assert length == sample["input_ids"].shape[1] - len(tokens.source) + handle.report().tokens_out


def test_another_picture_in_the_prompt_moves_nothing_and_is_not_moved() -> None:
    """Specification 2.10.4, in one prompt."""
    model = tiny.build("llava_next")
    sizes = Image(100, 60), Image(40, 110)
    both = vtprune.encode(model, tiny.sample(model, [2, sizes[0], 3, sizes[1], 2]))
    start = both.image_lens[0]
    for image, rows in enumerate((slice(0, start), slice(start, None))):
        views = [i for i, of in enumerate(both.seg_image) if of == image]
        only = replace(
            both,
            features=both.features[rows],
            seqlens=tuple(both.seqlens[i] for i in views),
            source=both.source[rows],
            coords=both.coords[rows],
            seg_image=(0,) * len(views),
            image_sample=(0,),
            seg_kind=tuple(both.seg_kind[i] for i in views),
            seg_grid=tuple(both.seg_grid[i] for i in views),
            seg_box=tuple(both.seg_box[i] for i in views),
            image_grid=(both.image_grid[image],),
            image_size=(both.image_size[image],),
            probes={p: v[rows] for p, v in both.probes.items() if p == LAST_CLS_LOGITS},
            ctx={},
        )
        for keep in (0.3, 9):
            picks = vtprune.select(replace(both, ctx={}), "globalcom2", keep=keep).index
            mine = picks[(picks < start) if image == 0 else (picks >= start)] - image * start
            assert torch.equal(mine, vtprune.select(only, "globalcom2", keep=keep).index)


def test_one_view_keeps_its_best() -> None:
    tokens = make_tokens([[[(4, 4)]], [[(3, 5)]]], cls_row=True)
    assert build("globalcom2", {}).select(tokens, Budget(5, allocation=AUTO)).index.tolist() == sorted(
        [*tokens.probes[CLS_LOGITS][:16].topk(5).indices.tolist()]
        + [16 + i for i in tokens.probes[CLS_LOGITS][16:].topk(5).indices.tolist()]
    )


# -- without CLS, and video -------------------------------------------------------------------------------------------


def test_without_cls_a_token_unlike_the_mean_of_its_view_matters() -> None:
    tokens = replace(picture(4, (2, 2)), probes={})
    score = build("globalcom2", {"alpha": 0.0}).score(tokens)
    raw = torch.randn(160, 6)
    with_raw = build("globalcom2", {"alpha": 0.0}).score(replace(tokens, probes={PRE_PROJECTOR: raw}))
    for found, rows in ((score, tokens.features), (with_raw, raw.view(80, 12))):
        for view in range(5):
            x = rows[16 * view : 16 * (view + 1)].double()
            expected = -torch.cosine_similarity(x, x.mean(0), dim=1)
            part = found[16 * view : 16 * (view + 1)].double()
            torch.testing.assert_close(part, expected / expected.norm(), rtol=0, atol=1e-6)
    selection = build("globalcom2", {}).select(tokens, Budget(0.25))
    assert selection.info == {"importance": "minus_cosine_to_mean"}


def test_a_frame_unlike_its_clip_keeps_more() -> None:
    rng = torch.Generator().manual_seed(0)
    still = torch.randn(1, 64, 8, generator=rng).expand(4, 64, 8).clone()
    assert counts(clip(4, 8, 8, still.flatten(0, 1)), 0.25) == (16,) * 4
    still[2] = -still[2]
    kept = counts(clip(4, 8, 8, still.flatten(0, 1)), 0.25)
    assert kept[2] > 16 > kept[0] == kept[1] == kept[3] and sum(kept) <= 64


def test_the_scores_of_a_clip() -> None:
    tokens = clip(3, 4, 5)
    x = tokens.features.view(3, 20, 8).double()
    pooled = x.mean(0)
    guide = -torch.cosine_similarity(pooled, pooled.mean(0), dim=1)
    own = -torch.cosine_similarity(x, x.mean(1, keepdim=True), dim=2)
    expected = (own / own.norm(dim=1, keepdim=True) + guide / guide.norm()) / 2
    torch.testing.assert_close(build("globalcom2", {}).score(tokens).double(), expected.flatten(), rtol=0, atol=1e-6)
    sums = -torch.cosine_similarity(x, x.mean((0, 1)), dim=2).sum(1)
    np.testing.assert_allclose(globalcom2._informative(tokens)[0], sums, rtol=0, atol=1e-5)


def test_the_scores_of_a_clip_with_a_cls_token() -> None:
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)) + 1
    tokens = replace(clip(3, 2, 3), probes={LAST_CLS_LOGITS: logits.flatten()})
    guide = logits.mean(0)
    expected = (logits / logits.norm(dim=1, keepdim=True) + guide / guide.norm()) / 2
    torch.testing.assert_close(build("globalcom2", {}).score(tokens), expected.flatten())
    np.testing.assert_allclose(globalcom2._informative(tokens)[0], logits.sum(1), rtol=1e-6)


@pytest.mark.parametrize("family", tiny.QWEN)
@torch.no_grad()
def test_pictures_and_clips_in_one_prompt_without_cls(family: str) -> None:
    model = tiny.build(family)
    sample = tiny.sample(model, [2, Video(3, 8, 8), 1, Image(8, 8), 3])
    with vtprune.apply(model, "globalcom2", keep=0.5) as handle:
        model(**sample)
        report = handle.report()
    assert report.info == {"importance": "minus_cosine_to_mean"}
    assert 21 < report.images[0].tokens_out <= 24 and report.images[1].tokens_out == 8
    with vtprune.apply(model, "globalcom2", keep=17) as handle:
        model(**sample)
        assert [image.tokens_out for image in handle.report().images] == [17, 16]


# -- in a model -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_apply_asks_for_the_last_layer_before_the_softmax() -> None:
    model = tiny.build("llava_next", "eager")
    sample = tiny.sample(model, [2, Image(112, 112), 3])
    tokens = vtprune.encode(model, sample)
    vision = model.model.vision_tower
    layer = getattr(vision, "vision_model", vision).encoder.layers[-1]
    seen: list[Tensor] = []
    hook = layer.self_attn.register_forward_hook(lambda _m, _a, out: seen.append(out[1]))
    vtprune.encode(model, sample)
    hook.remove()
    after = seen[0][:5, :, 0].double().log()  # up to a constant per head
    logits = tokens.probes[LAST_CLS_LOGITS].view(5, 16).double()
    torch.testing.assert_close(
        logits - logits.mean(1, keepdim=True),
        after[..., 1:].mean(1) - after[..., 1:].mean((1, 2))[:, None],
        rtol=0,
        atol=1e-4,
    )
    assert not torch.allclose(tokens.probes[LAST_CLS_LOGITS], tokens.probes[CLS_LOGITS])
    with vtprune.apply(model, "globalcom2", keep=0.25) as handle:
        model(**sample)
        report = handle.report()
    segments = report.images[0].segments
    kept = np.concatenate([s.kept for s in segments]).nonzero()[0]
    assert kept.tolist() == vtprune.select(tokens, "globalcom2", keep=0.25).index.tolist()
    assert report.info == {"importance": "cls_logits"}


@torch.no_grad()
def test_the_allocation_is_there_for_every_method_and_can_be_switched_off() -> None:
    model = tiny.build("llava_next")
    sample = tiny.sample(model, [2, Image(112, 112), 3])
    tokens = vtprune.encode(model, sample)
    wanted = Budget(0.5, allocation=AUTO).pools(tokens).counts
    assert len(set(wanted[1:])) > 1, "a test needs crops that differ"

    def kept(method: str, **settings: Any) -> tuple[int, ...]:
        with vtprune.apply(model, method, keep=0.5, **settings) as handle:
            model(**sample)
            return tuple(int(s.kept.sum()) for s in handle.report().images[0].segments)

    assert kept("globalcom2") == kept("norm", allocation="globalcom2") == wanted
    assert kept("globalcom2", allocation="equal") == kept("norm") == (8,) * 5
    assert sum(kept("globalcom2", scope="joint")) == 40


def test_one_wait_for_the_counts_and_none_for_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = picture(4, (2, 2), torch.rand(16), torch.rand(4, 16))
    with NoHostSync():
        build("globalcom2", {}).score(tokens)
        build("globalcom2", {}).score(clip(3, 2, 2))
    Budget(0.25, allocation=AUTO).pools(tokens)
    monkeypatch.setattr(globalcom2, "_images", None)
    Budget(0.5, allocation=AUTO).pools(tokens)


def test_probes() -> None:
    pruner = build("globalcom2", {})
    assert not pruner.needs and pruner.wants == Budget(1, allocation=AUTO).wants == {LAST_CLS_LOGITS, PRE_PROJECTOR}
    assert not Budget(1).wants and not Budget(1, "joint", AUTO).wants
    assert CLS_ROW not in pruner.wants


@pytest.mark.parametrize(
    "option,value",
    [
        *(("alpha", v) for v in (-0.1, 1.1, math.nan, True, "0.5", None)),
        *(("newline", v) for v in ("all_rows", "none", None, 1)),
    ],
    ids=repr,
)
def test_bad_options_are_refused_at_apply(option: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        vtprune.apply(tiny.build("llava_next"), "globalcom2", **{option: value})
    message = str(caught.value)
    assert f"{option}={value!r}" in message and "\n" not in message and ("choose" in message or "give" in message)
