# SPDX-License-Identifier: Apache-2.0
"""What fuzzing found wrong, one test each."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from eval.test_local import MAKERS
from helpers import make_tokens
from PIL import Image

import vtprune
from vtprune import video
from vtprune.cli.common import config_of
from vtprune.errors import ConfigError, InputError, VTPruneError
from vtprune.eval import papers, runner, table
from vtprune.eval.tasks import get
from vtprune.lens import Calibration
from vtprune.lens.probe import Lens
from vtprune.tokens import PRE_PROJECTOR

from . import choices, readers

DEEP = "[" * 100_000


def test_methods_in_a_row_may_find_nothing_to_choose_from() -> None:
    tokens = make_tokens([[]])
    tokens = replace(tokens, projector=torch.nn.Linear(8, 8)).with_probes({PRE_PROJECTOR: torch.zeros(0, 8)})
    assert len(vtprune.select(tokens, ("norm", "zoo"), keep=0.5)) == 0


def test_embedlens_sees_models_in_double_precision() -> None:
    half = replace(make_tokens([[[(4, 6)]]]), vocabulary=torch.randn(choices.VOCABULARY, 8))
    double = replace(half, features=half.features.double(), vocabulary=half.vocabulary.double())
    picked = [vtprune.select(x, "embedlens", calibration=choices.calibration(8)).index for x in (half, double)]
    assert torch.equal(*picked)


@pytest.mark.parametrize("method", choices.METHODS)
def test_what_says_that_it_orders_does(method: str) -> None:
    """A lattice said that it has an order, and `worst` of it was refused in the middle of a forward."""
    cls = vtprune.methods()[method]
    if method not in ("embedlens", "selector", "zoo") and not cls.adaptive:  # these need more than rows
        found = vtprune.select(make_tokens([[[(4, 6)]]], cls_row=True), method, keep=0.5)
        assert (found.order is not None) == cls().ordered


@pytest.mark.parametrize("method", ["frames", "grid", "pool"])
def test_an_empty_picture_takes_no_frame_from_another_sample(method: str) -> None:
    clip = make_tokens([[[(1, 2), (1, 2), (1, 2)]]], kind="frame")
    beside = make_tokens([[[(1, 2), (1, 2), (1, 2)]], [[(0, 0)], [(0, 3)]]], kind="frame")
    assert beside.seqlens == (2, 2, 2, 0, 0)
    chosen = [vtprune.select(x, method, keep=1 / 3, allocation="pooled").index for x in (clip, beside)]
    assert torch.equal(*chosen)


def test_a_stage_that_emptied_the_last_frame_leaves_the_next_clip_alone() -> None:
    """The frames that pools span were found by counting, and an empty one could go to either side."""
    tokens = make_tokens([[[(1, 2)] * 4], [[(1, 2)] * 4]], kind="frame")
    left = tokens.subset(torch.tensor([0, 1, 2, 3, 12, 13, 14, 15]), torch.tensor([0, 2, 4, 4, 4, 4, 4, 6, 8]))
    assert left.seqlens == (2, 2, 0, 0, 0, 0, 2, 2)
    found = []
    for sample in range(2):
        alone, start = choices.only(left, sample)
        found.append(vtprune.select(alone, "frames", keep=0.75).index + start)
    assert torch.equal(vtprune.select(left, "frames", keep=0.75).index, torch.cat(found))


def test_json_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "deep.json"
    file.write_text(DEEP + "\n")
    for read in (lambda: vtprune.PruneConfig.load(file), lambda: Calibration.load(file), lambda: table.read(file)):
        with pytest.raises(ConfigError, match="nested too deeply"):
            read()
    with pytest.raises(ConfigError, match="nested too deeply"):
        Lens.from_json(DEEP)
    file.with_suffix(".toml").write_text(f"x = {DEEP}")
    with pytest.raises(ConfigError, match="cannot read the claims"):
        papers.load(str(file.with_suffix(".toml")))
    for parse in (
        lambda: config_of("random", "1/4", [f"seed={DEEP}"]),
        lambda: runner.combinations([f"random seed={DEEP}"], ["1/4"]),
    ):
        with pytest.raises(ConfigError, match="seed="):
            parse()


@pytest.mark.parametrize(
    "key,value", [("words", None), ("views", [3]), ("layers", 7), ("coords", [10**400]), ("ids", [])]
)
def test_a_lens_with_other_values_is_refused(key: str, value: Any) -> None:
    document = {**readers._lens(), key: value}
    with pytest.raises(ConfigError, match="not a lens"):
        Lens.from_json(json.dumps(document))


def test_a_video_that_nothing_decodes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "clip.avi"
    video.write(file, [Image.new("RGB", (32, 32))] * 3, 5.0, "mpeg4")
    file.write_bytes(file.read_bytes().replace(b"FMP4", b"ZZZZ"))
    with pytest.raises(InputError, match="nothing here decodes"):
        video.read(file, backend="av")


CHANGES: dict[str, tuple[str, str, Any, str]] = {
    "a question that is a number": ("textvqa", "question", 5, "question is '5' (int); expected text"),
    "answers that are text": ("textvqa", "answers", "stop", "answers is 'stop' (str); expected a list"),
    "an answer that is a number": ("textvqa", "answers", [3], "an answer is '3' (int); expected text"),
    "an id that is nothing": ("textvqa", "question_id", None, "question_id is 'None'"),
    "an answer that is text": ("scienceqa", "answer", "B", "answer is 'B' (str); expected a whole number"),
    "choices that are a number": ("scienceqa", "choices", 2, "choices is '2' (int); expected a list"),
    "a picture that is a number": ("scienceqa", "image", 9, "image is '9' (int); expected text"),
    "a label that is true": ("pope", "label", True, "label is 'True' (bool); expected text"),
    "a text that is nothing": ("pope", "text", None, "text is 'None' (NoneType); expected text"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_tasks_with_values_of_another_kind_are_refused(what: str, tmp_path: Path) -> None:
    kind, key, value, message = CHANGES[what]
    MAKERS[kind](tmp_path)
    file = next(tmp_path.glob("*.json"))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    inner = {"textvqa": lambda: rows[0]["data"][0], "scienceqa": lambda: rows[0]["5"], "pope": lambda: rows[0]}[kind]()
    inner[key] = value
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError) as caught:
        get(f"{kind}:{tmp_path}")
    assert message in str(caught.value)


def test_a_picture_in_a_table_that_is_not_even_ascii_is_a_broken_sample(tmp_path: Path) -> None:
    MAKERS["mmbench"](tmp_path)
    file = next(tmp_path.glob("*.tsv"))
    stream = io.BytesIO()
    Image.new("RGB", (32, 24), "red").save(stream, "PNG")
    whole = base64.b64encode(stream.getvalue()).decode()
    file.write_text(file.read_text().replace(whole, "\u0080" + whole[1:]), encoding="utf-8")
    assert all("not base64" in example.broken for example in get(f"mmbench:{tmp_path}").examples("test", 2, 0))


@pytest.mark.skipif("sys.version_info < (3, 11)", reason="TOML is read from Python 3.11 on")
@pytest.mark.parametrize("old,new", [("[[table]]", "[table]"), ("576", "true"), ("60.0", '"x"'), ('"m"', "[1]")])
def test_claims_of_another_form_are_refused(old: str, new: str, tmp_path: Path) -> None:
    pytest.importorskip("tomllib")
    file = tmp_path / "claims.toml"
    file.write_text(readers.PAPER)
    assert papers.load(str(file))["method"] == "norm"
    file.write_text(readers.PAPER.replace(old, new, 1))
    with pytest.raises(ConfigError, match="what a file of claims holds"):
        papers.load(str(file))


def test_errors_are_one_line_whatever_they_name() -> None:
    assert str(VTPruneError("no file 'a\nb\u2028c'\r\n  here")) == "no file 'a b c' here"
