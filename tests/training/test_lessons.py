# SPDX-License-Identifier: Apache-2.0
"""Lessons: what is replayed is what the pruned model does; and the selector's training on a model that ships."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from helpers import Declared
from torch import Tensor, nn

import vtprune
from vtprune import registry
from vtprune.budget import Budget
from vtprune.errors import UnsupportedModelError
from vtprune.models import find_family
from vtprune.pruners.selector import PLACE, load
from vtprune.tokens import PROJECTOR, Selection, Stage, VisualTokens
from vtprune.training import lessons as school
from vtprune.training import selector as training

ANSWERS = [[7, 9, 11], [13, 8]]


@dataclass
class Chosen(Declared):
    """Test-only: keeps the rows that it is told to."""

    allocation = "pooled"
    rows: ClassVar[Tensor]

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        return Selection.from_order(self.rows, tokens)


def lessons_of(model: nn.Module, samples: Sequence[tiny.Inputs]) -> list[school.Lesson]:
    batch = tiny.collate(list(samples))
    family = find_family(model)
    with school._prefill(family) as seen, torch.no_grad():
        model(**batch)
    return list(school._lessons(family, batch, seen, ANSWERS[: len(samples)], "cpu"))


def exact(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lessons wait in bf16; the comparison is to be in fp32."""
    monkeypatch.setattr(torch, "bfloat16", torch.float32)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_a_replayed_prompt_says_what_the_pruned_model_says(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build(family)
    exact(model, monkeypatch)
    samples = [tiny.prompt(model, 2, seed=1), tiny.prompt(model, 1, seed=2, end=4)]
    lessons = lessons_of(model, samples)
    batch = school.collate(lessons, model.get_input_embeddings().weight.detach())
    chosen = torch.tensor([[1, 2, 4]] * 3)
    logits, labels = school.answer_logits(model, batch, chosen)
    assert labels.tolist() == [*ANSWERS[0], *ANSWERS[1]]
    registry.register("test-chosen")(Chosen)
    try:
        start = 0
        for sample, lesson, answer in zip(samples, lessons, ANSWERS, strict=True):
            lens = [len(image) for image in lesson.images]
            rows = torch.cat([torch.tensor([1, 2, 4]) + sum(lens[:i]) for i in range(len(lens))])
            said = {k: v for k, v in sample.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
            ids = torch.cat([sample["input_ids"], torch.tensor([answer[:-1]])], 1)
            said |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if "mm_token_type_ids" in sample:
                said["mm_token_type_ids"] = tiny.token_types(ids)
            with torch.no_grad(), kept(model, rows):
                want = model(**said).logits[0, -len(answer) :]
            torch.testing.assert_close(logits[start : start + len(answer)], want, atol=2e-5, rtol=1e-4)
            start += len(answer)
    finally:
        registry._METHODS.pop("test-chosen", None)


def kept(model: nn.Module, rows: Tensor) -> Any:
    Chosen.rows = rows
    return vtprune.apply(model, "test-chosen", keep=3)


def test_a_bias_of_minus_infinity_is_a_token_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llava")
    exact(model, monkeypatch)
    batch = school.collate(
        lessons_of(model, [tiny.prompt(model, 2), tiny.prompt(model, 1)]), model.get_input_embeddings().weight.detach()
    )
    few, many = torch.tensor([[0, 3, 9]] * 3), torch.tensor([[0, 2, 3, 7, 9]] * 3)
    bias = torch.tensor([[0.0, -1e9, 0.0, -1e9, 0.0]] * 3)
    want = school.answer_logits(model, batch, few)[0]
    torch.testing.assert_close(school.answer_logits(model, batch, many, bias)[0], want, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(school.answer_logits(model, batch, many)[0], want, atol=1e-3)
    stays = bias == 0
    torch.testing.assert_close(school.answer_logits(model, batch, many, None, stays)[0], want, atol=2e-5, rtol=1e-4)


def test_the_gradient_of_a_bias_is_that_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llava", dtype=torch.float64)
    monkeypatch.setattr(torch, "bfloat16", torch.float64)
    batch = school.collate(lessons_of(model, [tiny.prompt(model, 1)]), model.get_input_embeddings().weight.detach())
    chosen = torch.tensor([[1, 5, 8]])

    def loss(bias: Tensor) -> Tensor:
        logits, labels = school.answer_logits(model, batch, chosen, bias)
        return school.cross_entropy(logits, labels)

    bias = torch.zeros(1, 3, dtype=torch.float32, requires_grad=True)
    (found,) = torch.autograd.grad(loss(bias), bias)
    for i in range(3):
        step = torch.zeros(1, 3)
        step[0, i] = 0.02
        want = float((loss(step) - loss(-step)).detach()) / 0.04
        assert abs(float(found[0, i]) - want) < 1e-3
    assert float(found.abs().max()) > 1e-4


def test_lessons_hold_the_places_and_the_words_of_their_prompt() -> None:
    model = tiny.build("llava_next")
    sample = tiny.prompt(model, 2, start=3, between=2, end=6)
    (lesson,) = lessons_of(model, [sample])
    tokens = vtprune.encode(model, sample)
    assert [len(image) for image in lesson.images] == list(tokens.image_lens)
    assert [tuple(place.shape) for place in lesson.places] == [(n, PLACE) for n in tokens.image_lens]
    visual = torch.cat([lesson.rows[image] for image in lesson.images])
    torch.testing.assert_close(visual.float(), tokens.features, atol=0.02, rtol=0.02)
    assert tokens.text is not None
    torch.testing.assert_close(lesson.words.float(), tokens.text, atol=0.01, rtol=0.01)


def test_a_model_with_deepstack_is_refused() -> None:
    model = tiny.build("qwen3_vl", layers=12)
    with pytest.raises(UnsupportedModelError, match="DeepStack"):
        lessons_of(model, [tiny.prompt(model, 1)])


def test_both_phases_train_the_selector_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = tiny.build("llava")
    exact(model, monkeypatch)
    lessons = lessons_of(model, [tiny.prompt(model, 1, seed=s) for s in (1, 2)])
    trainer = training.Trainer(model, steps=4, taught=2, peak=5e-3, seed=0)
    found = [trainer.learn(lessons, i / 4) for i in range(4)]
    assert [next(iter(row)) for row in found] == ["taught", "taught", "answer", "answer"]
    assert all(bool(next(iter(row.values())).isfinite()) for row in found)
    batch = school.collate(lessons, trainer.table)
    for make in (trainer.taught_loss, lambda batch, draw: trainer.answer_loss(batch, 0.5, draw)):
        losses = []
        optimizer = torch.optim.Adam(trainer.network.parameters(), lr=1e-3)
        for _ in range(4):
            loss = make(batch, torch.Generator().manual_seed(0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
    assert all(p.grad is None for p in model.parameters()), "the checkpoint was trained"


def test_budgets_fall_and_then_are_drawn() -> None:
    trainer = training.Trainer(tiny.build("llava"), 4, 2, 1e-3, 0, widest=1 / 3, high=1 / 5)
    assert trainer.budget(0.0, random.Random(0)) == pytest.approx(1 / 3)
    assert trainer.budget(0.125, random.Random(0)) == pytest.approx((1 / 3 * 1 / 24) ** 0.5)
    drawn = [trainer.budget(0.5, random.Random(i)) for i in range(50)]
    assert min(drawn) >= 1 / 24 and max(drawn) <= 1 / 5 and max(drawn) > 2 * min(drawn)


def test_no_picture_is_learnt_from_and_checked_on() -> None:
    def lesson(picture: int, question: int) -> school.Lesson:
        rows = torch.tensor([[0.0], [picture], [picture], [question]])
        return school.Lesson(rows, torch.arange(4), (torch.tensor([1, 2]),), (), rows[3:], torch.tensor([1]))

    made = [lesson(picture, question) for picture in range(3) for question in range(4)]
    held, rest = training.apart(made, 0.5)
    assert held == made[:6] and rest == made[8:]
    assert training.apart(made[:4], 0.5) == (made[:2], made[:4])


def test_the_command_writes_a_selector_that_the_method_takes(tmp_path: Path) -> None:
    out = tmp_path / "selector.safetensors"
    command = "--task pocketvqa/basic --examples 3 --steps 1 --taught 0 --batch 2 --held 0.3 --out"
    assert training.main([*command.split(), str(out)]) == 0
    assert out.stat().st_size < 2**20 and load(out).width == 256
    log = out.with_suffix(".jsonl").read_text()
    assert '"event": "stop", "step": 1' in log and "held 0.1111" in log
