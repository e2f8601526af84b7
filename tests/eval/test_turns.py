# SPDX-License-Identifier: Apache-2.0
"""A second question about a pruned picture: on the cache of the first, and the same as the whole conversation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vtprune
from vtprune.eval import runner
from vtprune.eval.controls import prepare
from vtprune.eval.tasks import assistant, get, user
from vtprune.models import find_family


@pytest.mark.parametrize("name", ["pocket-llava", "pocket-qwen2.5-vl"])
def test_second_answers(name: str, tmp_path: Path) -> None:
    model, processor = vtprune.load(name, device="cpu", dtype=torch.float32)
    family = find_family(model)
    task = get("turns/pocketvqa/basic")
    methods, keeps = ["dense", "norm", "fastv", "question-only"], ["1/4"]
    rows = runner.run(model, processor, [task], methods, keeps, tmp_path / "x.jsonl", count=4, batch=4)
    said = {(row["method"], row["id"]): row["prediction"] for row in rows}
    assert {row["kind"] for row in rows} == {"exist", "color", "shape", "count"}
    assert sum(row["correct"] for row in rows if row["method"] == "dense") >= 2
    for example in task.examples("val", 4, 0):
        assert example.then and example.then != example.parts("text")[0]["text"]
        first = runner.generate(model, processor, prepare(family, processor, [example]), 8)[0]
        # Without pruning, the conversation as one prompt is the same.
        chat = (*example.messages, assistant(first), user({"type": "text", "text": example.then}))
        inputs = prepare(family, processor, [replace(example, messages=chat)])
        assert said["dense", example.id] == runner.generate(model, processor, inputs, 8)[0]


def test_easy_vqa(tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa")
    found = list(get("turns/easy-vqa").examples("test", 5, 0))
    plain = list(get("easy-vqa").examples("test", 5, 0))
    for a, b in zip(found, plain, strict=True):
        assert (a.id, a.answer, a.kind) == (b.id, b.answer, b.kind)
        assert a.then == b.parts("text")[0]["text"] and a.parts("image") == b.parts("image")
    assert any(a.then != a.parts("text")[0]["text"] for a in found)


def test_the_picture_is_pruned_for_the_first_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the second question reaches the choice of tokens, and no token comes back for it."""
    model, processor = vtprune.load("pocket-llava", device="cpu", dtype=torch.float32)
    family = find_family(model)
    example = next(iter(get("turns/pocketvqa/basic").examples("val", 1, 0)))
    chosen: list[Any] = []
    original = vtprune.methods()["cdpruner"].select

    def watched(self: Any, tokens: Any, *rest: Any) -> Any:
        chosen.append(original(self, tokens, *rest).index.tolist())
        return original(self, tokens, *rest)

    monkeypatch.setattr(vtprune.methods()["cdpruner"], "select", watched)
    for then in (example.then, "what does the text say ?"):
        inputs = prepare(family, processor, [example])
        with vtprune.using(model, "cdpruner", keep=0.1):
            runner.second_turn(model, processor, inputs, replace(example, then=then), 8)
    assert len(chosen) == 2 and chosen[0] == chosen[1] and len(chosen[0]) == 57
