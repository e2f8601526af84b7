# SPDX-License-Identifier: Apache-2.0
"""The table of tasks, and the examples that they yield."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vtprune
from vtprune.errors import ConfigError
from vtprune.eval import runner, tasks
from vtprune.eval.tasks import Example, Task
from vtprune.models.pocket import easyvqa

POCKET = [name for name in tasks.names() if name.startswith("pocketvqa/")]


@pytest.mark.parametrize("name", POCKET)
def test_pocket_tasks(name: str) -> None:
    first, again = (list(tasks.get(name).examples("val", 3, 0)) for _ in range(2))
    other = list(tasks.get(name).examples("test", 3, 0))
    assert [(e.id, e.kind, e.answer) for e in first] == [(e.id, e.kind, e.answer) for e in again]
    ids = [e.id for e in [*first, *other, *tasks.get(name).examples("val", 3, 1)]]
    assert len(set(ids)) == 9
    for example in first:
        assert example.task == name
        assert [m["role"] for m in example.messages] == ["user", "assistant"] * (len(example.messages) // 2) + ["user"]
        assert example.messages[-1]["content"][-1]["type"] == "text"
        assert bool(example.parts("video")) == (name == "pocketvqa/video")
        assert all(isinstance(part["image"], Image.Image) for part in example.parts("image"))


def test_demonstrations_are_earlier_turns() -> None:
    (example,) = tasks.get("pocketvqa/icl").examples("val", 1, 0)
    shown = [m["content"][0]["text"] for m in example.messages if m["role"] == "assistant"]
    assert len(shown) == 4
    assert len(example.parts("image")) == 5
    assert example.answer in shown


def test_a_larger_count_begins_the_same() -> None:
    few, many = (list(tasks.get("pocketvqa/basic").examples("val", n, 0)) for n in (2, 7))
    assert [e.id for e in few] == [e.id for e in many][:2]


def test_changing_pictures() -> None:
    (clip,) = itertools.islice(tasks.get("pocketvqa/video").examples("val", 1, 0), 1)
    small = clip.map_pictures(lambda picture: picture.resize((8, 8)))
    assert {frame.size for frame in small.parts("video")[0]["video"]} == {(8, 8)}
    assert clip.parts("video")[0]["video"][0].size != (8, 8)
    assert small.without_pictures().parts("video") == []
    assert small.without_pictures().parts("text") == clip.parts("text")


def test_easyvqa(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [(0, "is there a red shape ?", "yes"), (1, "what is the color of the circle ?", "blue")]
    questions += [(1, "what shape is present ?", "circle"), (0, "what is the red shape ?", "triangle")]
    pictures = np.stack([np.full((64, 64, 3), level, np.uint8) for level in (10, 200)])
    monkeypatch.setattr(easyvqa, "load", lambda split: easyvqa.EasyVQA(pictures, tuple(questions)))
    examples = list(tasks.get("easy-vqa").examples("test", 4, 0))
    assert [e.id for e in examples] == [e.id for e in tasks.get("easy-vqa").examples("test", 9, 0)]
    found = {e.id: (e.kind, e.answer, e.parts("image")[0]["image"].getpixel((0, 0))[0]) for e in examples}
    assert found == {
        "easy-vqa/test/0": ("yes or no", "yes", 10),
        "easy-vqa/test/1": ("color", "blue", 200),
        "easy-vqa/test/2": ("shape", "circle", 200),
        "easy-vqa/test/3": ("shape", "triangle", 10),
    }
    assert {e.parts("image")[0]["image"].size for e in examples} == {(336, 336)}
    orders = {tuple(e.id for e in tasks.get("easy-vqa").examples("test", 4, seed)) for seed in range(5)}
    assert len(orders) > 1


@pytest.mark.parametrize("name", ["pocket-llava", "pocket-qwen2.5-vl"])
def test_easyvqa_is_answered_as_the_cards_say(name: str, tmp_path: Path) -> None:
    """At 64 pixels a processor that keeps sizes gave Qwen four tokens, and half of the answers."""
    model, processor = vtprune.load(name, dtype=torch.float32)
    rows = runner.run(model, processor, ["easy-vqa"], ["dense"], ["1"], tmp_path / "rows.jsonl", split="test", count=9)
    assert sum(row["correct"] for row in rows) >= 8 and all(row["tokens_in"] >= 144 for row in rows)


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))

    def none(split: str, count: int, seed: int) -> itertools.repeat[Example]:
        raise AssertionError

    mine = tasks.register(Task("mine", none))
    assert tasks.get("mine") is mine is tasks.register(mine)
    with pytest.raises(ConfigError, match="exists already"):
        tasks.register(Task("mine", none, max_new_tokens=3))
    with pytest.raises(ConfigError, match=r"did you mean 'pocketvqa/basic'\?"):
        tasks.get("pocketvqa/basics")
    with pytest.raises(ConfigError, match="split"):
        next(tasks.get("pocketvqa/basic").examples("exam", 1, 0))
