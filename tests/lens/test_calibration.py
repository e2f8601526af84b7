# SPDX-License-Identifier: Apache-2.0
"""The calibration: files, what is refused, classes and anchors found in tokens that are made to have them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vtprune.errors import ConfigError, InputError
from vtprune.lens import CLASSES, Calibration, Categories, clusters


def test_files_come_back_the_same_and_lie_beside_the_config(invented: Calibration, tmp_path: Path) -> None:
    assert invented.save(tmp_path) == tmp_path / "embedlens.json"
    assert Calibration.find(str(tmp_path)) == Calibration.load(tmp_path) == invented
    assert Calibration.of(json.loads(invented.to_json()), "") == Calibration.of(invented, "") == invented


def test_llava_is_built_in_and_nothing_else_is_guessed() -> None:
    for name in ("llava-hf/llava-1.5-7b-hf", "/models/llava-v1.5-7b/", "liuhaotian/LLaVA-v1.5-7B"):
        rule = Calibration.find(name)
        assert rule.anchors == {"vit_sink": (1141,), "llm_sink": (26673,), "dead": (30296,)}
        assert rule.top == 3 and rule.width == 4096
    for name in ("", "llava-hf/llava-1.5-13b-hf", "Qwen/Qwen2.5-VL-7B-Instruct", "/nowhere/at/all"):
        with pytest.raises(ConfigError, match=r"no calibration.*lens\.calibrate"):
            Calibration.find(name)


def test_what_is_refused(invented: Calibration, tmp_path: Path) -> None:
    data = json.loads(invented.to_json())
    for change, message in (
        ({"version": 2}, "version 2"),
        ({"version": 2, "what will be": 1}, "version 2"),
        ({"anchors": {"ghost": [1]}}, "'ghost'"),
        ({"anchors": {"dead": []}}, "anchors of 'dead'"),
        ({"anchors": {"dead": [120]}}, "0 to 119"),
        ({"tops": 3}, "no 'tops'"),
        ({"top": 0}, "top=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Calibration.from_dict({**data, **change})
    del data["width"]
    with pytest.raises(ConfigError, match="not a calibration"):
        Calibration.from_dict(data)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read"):
        Calibration.load(tmp_path / "broken.json")
    with pytest.raises(ConfigError, match="120 x 32; this model's are 120 x 16"):
        invented.inverse(torch.zeros(120, 16))


def test_categories_overlap_and_the_rest_is_alive() -> None:
    found = Categories(("vit_sink", "dead"), np.array([[1, 1], [0, 1], [0, 0], [0, 0]], bool))
    assert found.labels == ["vit_sink", "dead", "alive", "alive"]
    assert found.shares() == {"vit_sink": 0.25, "dead": 0.5, "alive": 0.5}
    assert found.mask("sink").tolist() == [True, False, False, False] and not found.mask("llm_sink").any()
    assert found.mask("all").all() and found.mask("dead,alive").all()
    assert Categories((), np.zeros((3, 0), bool)).labels == ["alive"] * 3


def pictures_of(seed: int, count: int = 12, dim: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit rows with a planted dead direction (60 %), a planted sink (two tokens of each picture) and random others."""
    generator = torch.Generator().manual_seed(seed)
    dead, sink = torch.nn.functional.normalize(torch.randn(2, dim, generator=generator), dim=1)
    rows, truth, owner = [], [], []
    for picture in range(count):
        noise = torch.randn(50, dim, generator=generator) / dim**0.5
        own = torch.cat([dead + 0.05 * noise[:30], sink + 0.01 * noise[30:32], noise[32:]])
        rows.append(torch.nn.functional.normalize(own, dim=1))
        truth += [1] * 30 + [2] * 2 + [0] * 18
        owner += [picture] * 50
    return torch.cat(rows), torch.tensor(truth), torch.tensor(owner)


@pytest.mark.parametrize("seed", range(3))
def test_planted_classes_are_found(seed: int) -> None:
    rows, truth, owner = pictures_of(seed)
    found = clusters._clusters(rows, owner, seed)
    for like, kind in ((0.0, "vit_sink"), (0.95, "llm_sink")):
        classes = clusters._classes(found, torch.full((100,), like))
        assert set(classes) == {"dead", kind}
        assert torch.equal(classes["dead"].inside, truth == 1) and torch.equal(classes[kind].inside, truth == 2)
    assert classes["dead"].share == pytest.approx(0.6) and classes["dead"].cross > 0.99


def test_noise_has_no_classes() -> None:
    rows = torch.nn.functional.normalize(torch.randn(600, 24, generator=torch.Generator().manual_seed(1)), dim=1)
    owner = torch.arange(12).repeat_interleave(50)
    assert clusters._classes(clusters._clusters(rows, owner, 0), torch.zeros(100)) == {}


def test_anchors_cover_a_class_and_leave_the_rest() -> None:
    inside = torch.zeros(1000, dtype=torch.bool)
    inside[:100] = True
    near = torch.randint(20, 50, (1000, 3), generator=torch.Generator().manual_seed(0))
    near[:60, 1] = 3  # word 3 gives 60 of them away, word 4 the others, and word 5 all, but 20 of the rest as well
    near[60:100, 0] = 4
    near[:120, 2] = 5
    ids, coverage, leak = clusters.find_anchors(near, inside, 50)
    assert ids == (3, 4) and coverage == 1.0 and leak == 0.0
    near[100:105, 0] = 3  # 5 of 900 are few enough
    assert clusters.find_anchors(near, inside, 50)[0] == (3, 4)
    near[100:110, 0] = 3  # 10 are not
    ids, coverage, leak = clusters.find_anchors(near, inside, 50)
    assert ids == (4,) and coverage == pytest.approx(0.4) and leak == 0.0


def test_the_shipped_calibration_sorts_a_pocket_model(pocket: tuple[Any, Any]) -> None:
    from vtprune.models.pocket.data import render, scene

    model, processor = pocket
    rule = Calibration.find(model.config._name_or_path)
    assert set(rule.classes) <= set(CLASSES) and "dead" in rule.classes and rule.evidence["pictures"] >= clusters.ENOUGH
    images = [render(scene("val", i)) for i in range(3)]
    found = clusters.shares(model, processor, images, draws=200)
    assert 0.5 < found["dead"].value < 0.9 and found["dead"].low <= found["dead"].value <= found["dead"].high
    with pytest.raises(InputError, match="no pictures"):
        clusters.shares(model, processor, [])
    with pytest.raises(InputError, match="two pictures"):
        clusters.calibrate(model, processor, images[:1])
    with pytest.warns(UserWarning, match="2 pictures is a guess"):
        small = clusters.calibrate(model, processor, images[:2], seeds=(0,))
    assert dataclasses.replace(small, evidence={}).width == 256 and "dead" in small.classes


def test_rows_on_the_host_are_bounded_and_drawn_alike_at_both_layers(
    pocket: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vtprune.models import find_family
    from vtprune.models.pocket.data import render, scene

    model, processor = pocket
    images = [render(scene("val", i)) for i in range(2)]
    family = find_family(model)
    table = family.vocabulary
    inverse = clusters.inverse_norms(table)
    whole = clusters._collect(model, processor, images, table, inverse, 3)
    first = clusters._first_tokens(family, processor, images, 576)
    assert [len(part) for part in (*whole, first)] == [2 * 576] * 4
    monkeypatch.setattr(clusters, "HELD", 2 * 100 * table.shape[1])
    some = clusters._collect(model, processor, images, table, inverse, 3)
    drawn = torch.cat([576 * i + clusters._draw(576, 100, i) for i in range(2)])
    assert len(drawn.unique()) == 200 and not torch.equal(drawn[:100] + 576, drawn[100:200])
    for found, all_of_them in zip(some, whole, strict=True):
        assert torch.equal(found, all_of_them[drawn])
    assert torch.equal(clusters._first_tokens(family, processor, images, 100), first[drawn])


def test_likeness_is_the_cosine_to_the_nearest_mean_or_anchor(invented: Calibration) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, table = torch.randn(600, 32, generator=generator), torch.randn(120, 32, generator=generator)
    rows[7] = torch.nan
    found = invented.similarity(rows, table, ("dead",))
    anchors = table[list(invented.anchors["dead"])].double()
    wanted = torch.cosine_similarity(rows.double()[:, None], anchors[None], dim=2).amax(1)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6, equal_nan=True)
    mean = dataclasses.replace(invented, anchors={}, means={"dead": tuple(anchors[0].tolist())})
    wanted = torch.cosine_similarity(rows.double(), anchors[:1], dim=1)
    torch.testing.assert_close(
        mean.similarity(rows, table, ("dead",)).double(), wanted, rtol=0, atol=1e-6, equal_nan=True
    )
