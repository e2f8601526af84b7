# SPDX-License-Identifier: Apache-2.0
"""`embedlens`: the analytic vectors, each mode worked out by hand, the guarded control, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from helpers import make_tokens
from torch import Tensor

import vtprune
from vtprune.errors import ConfigError
from vtprune.lens import Calibration
from vtprune.tokens import VisualTokens

#: The table of the specification, and tokens whose three nearest words are worked out there.
TABLE = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0.6, 0.8]])


def calibration(**anchors: tuple[int, ...]) -> dict[str, Any]:
    return dataclasses.asdict(Calibration("by hand", 4, 2, anchors))


def tokens_of(rows: Tensor, samples: Any = None) -> VisualTokens:
    tokens = make_tokens(samples or [[[(1, len(rows))]]], features=rows)
    return dataclasses.replace(tokens, vocabulary=TABLE, checkpoint="by hand")


def kept(rows: Tensor, samples: Any = None, keep: float | int = 0.5, **options: Any) -> list[int]:
    return vtprune.select(tokens_of(rows, samples), "embedlens", keep=keep, **options).index.tolist()


def test_the_analytic_vectors() -> None:
    h = torch.tensor([[10.0, 1], [1e-3, 1e-4], [1e6, 1e5]])
    for anchor, member in ((2, False), (1, True), (0, True), (3, True)):
        rule = Calibration.from_dict(calibration(dead=(anchor,)))
        assert rule.classify(h, TABLE).flatten().tolist() == [member] * 3, anchor
    both = Calibration.from_dict(calibration(vit_sink=(1,), dead=(0, 2)))
    assert both.classify(h, TABLE).tolist() == [[True, True]] * 3


ROWS = torch.tensor([[0.0, 2], [1, -0.5], [-3, 0.1], [-1, -1], [1, 1]])
# Three nearest of the four, that is, all but the farthest. Row 0: words 0 and 2 tie, and the higher id is out; row 1:
# 2 is out; row 2: 0 is out; row 3: 3 is out, with -.99; row 4: 2 is out.


def test_drop_only_and_control() -> None:
    two = calibration(dead=(2,))  # rows 2 and 3 have word 2 among their nearest
    assert kept(ROWS, mode="drop", calibration=two) == [0, 1, 4]
    assert kept(ROWS, mode="only", calibration=two) == [2, 3]
    control = kept(ROWS, mode="control", calibration=two)
    assert len(control) == 3 and {2, 3} <= set(control)  # two of the others are gone
    assert control == kept(ROWS, mode="control", calibration=two)
    assert len({tuple(kept(ROWS, mode="control", calibration=two, seed=s)) for s in range(9)}) > 1
    # Nothing matches: nothing is dropped, by the control neither.
    alive = ROWS[[0, 1, 4]]
    assert kept(alive, mode="drop", calibration=two) == kept(alive, mode="control", calibration=two) == [0, 1, 2]
    # More than half match: the control drops all the others.
    assert kept(ROWS[[2, 3, 4]], mode="control", calibration=two) == [0, 1]
    # Random is matched then too: two of the three go, whichever they are.
    found = [kept(ROWS[[2, 3, 4]], mode="random", calibration=two, seed=s) for s in range(30)]
    assert {len(one) for one in found} == {1} and {i for one in found for i in one} == {0, 1, 2}
    assert len(kept(ROWS, mode="random", calibration=two)) == 3
    # All match: the one that is least like the anchor (-1, 0) stays.
    assert kept(ROWS[[2, 3]], mode="drop", calibration=two) == [1]
    # keep=1.0 drops nothing in a model, but a selection is what the mode says whatever the budget.
    assert kept(ROWS, keep=1, mode="drop", calibration=two) == [0, 1, 4]


def test_rank_meets_the_budget_with_members_last() -> None:
    two = calibration(dead=(2,))  # likeness to (-1, 0): 0, -.89, .999, .707, -.707
    order = vtprune.select(tokens_of(ROWS), "embedlens", keep=5, calibration=two).order
    assert order is not None and order.tolist() == [1, 4, 0, 3, 2]
    assert kept(ROWS, keep=2, calibration=two) == [1, 4]


def test_each_image_by_itself() -> None:
    two = calibration(dead=(2,))
    samples = [[[(1, 2)], [(1, 3)]], [], [[(1, 5)]]]
    rows = torch.cat([ROWS, ROWS])
    picked = kept(rows, samples, mode="control", calibration=two)
    assert picked[-3:] == [5 + i for i in kept(ROWS, mode="control", calibration=two)]
    # The first image has nothing to match, and stays whole; of the second all but one, and the control takes that one.
    assert picked[:-3] == [0, 1, 2, 3]


def test_a_model_end_to_end(invented: Calibration, tmp_path: Path) -> None:
    model = tiny.build("llava_next")
    batch = tiny.collate(tiny.mixed(model))
    path = invented.save(tmp_path / "mine.json")
    tokens = vtprune.encode(model, batch)
    member = invented.classify(tokens.features, tokens.vocabulary).any(1)
    assert 0.1 < float(member.float().mean()) < 0.9
    with torch.no_grad(), vtprune.apply(model, "embedlens", mode="drop", calibration=str(path)) as handle:
        model(**batch)
        report = handle.report()
        found = np.concatenate([s.kept for image in report.images for s in image.segments])
    assert np.array_equal(found, (~member).numpy())
    with (
        torch.no_grad(),
        vtprune.apply(model, ["embedlens", "norm"], keep=[1.0, 0.1], mode="drop", calibration=str(path)) as h,
    ):
        model(**batch)
        found = np.concatenate([s.kept for image in h.report().images for s in image.segments])
    assert 0 < found.sum() < len(found) * 0.11 and not (found & member.numpy()).any()
    config = vtprune.PruneConfig(
        "embedlens", options={"calibration": dataclasses.asdict(invented), "classes": ["dead"]}
    )
    assert vtprune.PruneConfig.from_json(config.to_json()).pruner().names == ("dead",)


def test_nothing_matched_is_the_model_as_it_is(invented: Calibration) -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 2)
    tokens = vtprune.encode(model, sample)
    near = set(vtprune.lens(model, sample, layers=0, topk=3).ids.flatten().tolist())
    free = next(i for i in range(5, 100) if i not in near)
    rule = dataclasses.replace(invented, anchors={"dead": (free,)})
    assert not bool(rule.classify(tokens.features, tokens.vocabulary).any())
    with torch.no_grad():
        dense = model(**sample).logits
        written = model.generate(**sample, max_new_tokens=6, do_sample=False)
        for mode in ("drop", "control"):
            with vtprune.apply(model, "embedlens", mode=mode, calibration=dataclasses.asdict(rule)):
                assert torch.equal(model(**sample).logits, dense)
                assert torch.equal(model.generate(**sample, max_new_tokens=6, do_sample=False), written)


def test_what_is_refused(invented: Calibration) -> None:
    model = tiny.build("llava")
    with pytest.raises(ConfigError, match="no calibration"):
        vtprune.apply(model, "embedlens")
    with pytest.raises(ConfigError, match="no calibration"):
        vtprune.apply(model, ["embedlens", "norm"])
    with pytest.raises(ConfigError, match="nothing of llm_sink"):
        rule = dataclasses.asdict(dataclasses.replace(invented, anchors={"dead": (9,)}))
        vtprune.apply(model, "embedlens", classes="llm_sink", calibration=rule)
    with pytest.raises(ConfigError, match="32"):
        vtprune.apply(model, "embedlens", calibration=dataclasses.asdict(dataclasses.replace(invented, width=31)))
    for options, message in (
        ({"mode": "all"}, "mode='all'"),
        ({"classes": "ded"}, "'ded' is no class"),
        ({"classes": "alive"}, "'alive' is no class"),
        ({"classes": []}, "no class"),
        ({"seed": -1}, "seed=-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            vtprune.PruneConfig("embedlens", options=options)
