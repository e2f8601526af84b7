# SPDX-License-Identifier: Apache-2.0
"""Training a scorer, on tiny networks: gates drop tokens, their gradient reaches the scorer, and nothing else moves."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from vtprune.kernels import reference
from vtprune.models.pocket import train_scorer
from vtprune.models.pocket.batch import IGNORE, text_mask
from vtprune.models.pocket.families import Llava, Seen
from vtprune.models.pocket.plans import Plan
from vtprune.models.pocket.train import Recipe
from vtprune.models.pocket.train_scorer import LAMBDA, Lessons, Schedule, ScorerTrainer, pick_values
from vtprune.pruners.scorer import load
from vtprune.registry import build

TINY = {"vision_width": 32, "vision_layers": 2, "vision_heads": 2, "width": 32, "layers": 2, "heads": 2, "ffn": 64}
RECIPE = Recipe(warmup=2, decay=0.0, log_every=1, check_questions=6)
PLAN = Plan("scorer", 2)


def made(steps: int = 4, peak: float = 1e-2, taught: int = 0, **widths: int) -> ScorerTrainer:
    torch.manual_seed(1)
    trainer = ScorerTrainer(Llava(**(TINY | widths)), RECIPE, Schedule(steps, taught), peak, "cpu")
    for weight in trainer.named.values():  # so that attention is not even
        weight.data.add_(torch.randn_like(weight) * 0.1)
    return trainer


def lesson(trainer: ScorerTrainer, step: int = 0) -> dict[str, torch.Tensor]:
    return Lessons(trainer.family, PLAN, trainer.schedule, 0)[step][2]


def test_the_budget_falls_and_then_is_drawn_within_its_bounds():
    schedule = Schedule(200)
    keeps = [schedule.keep(step, seed=0) for step in range(200)]
    assert keeps[0] == 1 / 2
    falling, drawn = keeps[:50], keeps[50:]
    assert all(later < earlier for earlier, later in pairwise(falling))
    assert 1 / 18 < falling[-1] < 1 / 17
    assert min(drawn) >= 1 / 18 and max(drawn) <= 1 / 6 and len(set(drawn)) == 150
    assert min(drawn) < 1 / 17 and max(drawn) > 1 / 7  # all of it
    assert drawn != [schedule.keep(step, seed=1) for step in range(50, 200)]


def test_the_temperature_falls_from_soft_to_hard():
    schedule = Schedule(50)
    found = [schedule.temperature(step) for step in range(50)]
    assert found[0] == schedule.soft and found[-1] == pytest.approx(schedule.hard)
    assert all(later < earlier for earlier, later in pairwise(found))


@pytest.mark.parametrize("count", [1, 7, 64])
def test_the_largest_values_are_the_picks_of_idpruner(count):
    random = torch.Generator().manual_seed(count)
    visual, importance = torch.randn(3, 100, 8, generator=random), torch.rand(3, 100, generator=random)
    importance /= importance.amax(1, keepdim=True)
    importance.requires_grad_()
    values = pick_values(importance, visual, count)
    found = values.topk(count, dim=1).indices.sort(1).values
    lens, counts = (100,) * 3, (count,) * 3
    picks = reference.mmr(visual.flatten(0, 1), importance.detach().flatten(), lens, counts, LAMBDA)
    expected = picks.view(3, count).sort(1).values - torch.arange(0, 300, 100)[:, None]
    assert torch.equal(found, expected)
    values.sum().backward()
    assert torch.equal(importance.grad, torch.full_like(importance, LAMBDA))


def test_it_learns_from_the_cls_token_first():
    trainer = made(steps=1, taught=30)
    losses = [float(trainer.train_step(PLAN, 1 / 9, lesson(trainer))["cls"]) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        visual = trainer.seen(PLAN, trainer.move(lesson(trainer)), 3)
        scores = trainer.scores(visual)
    assert trainer.cls is not None and trainer.cls.shape == scores.shape == (2, 576)
    assert torch.corrcoef(torch.stack([scores[0], trainer.cls[0]]))[0, 1] > 0.5
    assert trainer.train_step(PLAN, 1 / 9, lesson(trainer)).keys() == {"ce"}


def test_gates_become_hard_and_sum_to_the_budget():
    trainer = made(steps=11)
    visual = torch.randn(3, 576, 32, generator=torch.Generator().manual_seed(0))
    loose = []
    for step in (0, 5, 10):
        trainer.step = step
        gates = trainer.log_gates(visual, 1 / 9).exp()
        torch.testing.assert_close(gates.sum(1), torch.full((3,), 64.0), atol=0.05, rtol=0)
        loose.append(float((gates * (1 - gates)).sum().detach()) / 3)
    assert loose[0] > 2 * loose[1] > 4 * loose[2]
    with torch.no_grad():
        hard = trainer.log_gates(visual, 1 / 9)
    assert ((hard == 0).sum(1) == 64).all() and (hard.exp()[hard != 0] == 0).all()
    for soft, chosen in zip(gates, hard == 0, strict=True):
        assert soft[chosen].min() >= soft[~chosen].max()


@torch.no_grad()
def test_a_token_whose_gate_is_shut_is_as_if_it_had_never_been():
    trainer = made()
    arrays, keep = lesson(trainer), 1 / 9
    logits, labels, _ = trainer.forward(PLAN, arrays, 3, keep)
    pixels, _ = trainer.draw(PLAN, arrays, 3)
    visual = trainer.family.look(pixels, PLAN.geometry, trainer.family.see).visual
    kept = (trainer.log_gates(visual, keep) == 0).nonzero()[:, 1].view(2, 64)
    expected = []
    for b in range(2):
        text = torch.arange(577, len(arrays["visual"]))
        index = torch.cat([torch.tensor([0]), kept[b].sort().values + 1, text])
        rows = trainer.model.get_input_embeddings()(arrays["ids"][b])
        rows[1:577] = visual[b]
        hidden = trainer.model.model.language_model(
            inputs_embeds=rows[None, index],
            position_ids=arrays["positions"][b : b + 1, index],
            attention_mask=text_mask(arrays["turn"][b : b + 1, index], PLAN.text),
            log_gate=torch.zeros(1, len(index)),
            use_cache=False,
        ).last_hidden_state[0]
        asked = arrays["labels"][b, index][1:] != IGNORE
        expected.append(trainer.model.lm_head(hidden[:-1][asked]))
    torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=1e-4)
    assert len(labels) == len(logits)
    every, _, _ = trainer.forward(PLAN, arrays, 3, 1.0)
    assert (every - logits).abs().max() > 1e-2


def test_the_gradient_reaches_the_scorer_and_nothing_else_moves():
    trainer = made()
    before = {name: p.detach().clone() for name, p in trainer.named.items()}
    scorer = {name: p.detach().clone() for name, p in trainer.scorer.named_parameters()}
    trainer.train_step(PLAN, 1 / 9, lesson(trainer))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in trainer.named.items())
    assert not trainer.model.training
    # One bias is common to all scores of a picture, so it has nothing to learn.
    assert trainer.trained.keys() == scorer.keys() - {"query.bias"}
    for name, p in trainer.trained.items():
        assert p.grad is not None and p.grad.abs().max() > 1e-7 and not torch.equal(p, scorer[name]), name
    assert not trainer.scorer.query.bias.any()


def test_it_finds_the_tokens_that_hold_the_answer():
    """Text attends to all tokens alike; 32 of 576 hold the answer, all others that of another picture."""
    trainer = made(steps=40, peak=5e-3, layers=1)
    arrays, layer = lesson(trainer), trainer.model.model.language_model.layers[0]
    for projection in (layer.self_attn.v_proj, layer.self_attn.o_proj):
        projection.weight.data = 3 * torch.eye(32)
    for silent in (layer.self_attn.q_proj, layer.mlp.down_proj):
        silent.weight.data.zero_()
    words = trainer.model.get_input_embeddings().weight.data.normal_(generator=torch.Generator().manual_seed(0))
    answers = torch.tensor([20, 30])
    arrays["labels"] = torch.where(arrays["labels"] == IGNORE, IGNORE, answers[:, None])
    random = torch.Generator().manual_seed(0)
    visual = words[answers.flip(0)][:, None] + torch.randn(2, 576, 32, generator=random)
    places = torch.randperm(576, generator=random)[:32]
    mark = torch.zeros(32)
    mark[0] = 4.0
    visual[:, places] += (words[answers] - words[answers.flip(0)])[:, None] + mark
    trainer.family.look = lambda *_: Seen(visual)  # type: ignore[method-assign]
    losses = [float(trainer.train_step(PLAN, 1 / 18, arrays)["ce"]) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        found = trainer.log_gates(visual, 1 / 18) == 0
    assert found[:, places].float().mean() > 0.8  # diversity costs some: they are much alike


def run(out: Path, stop: float = math.inf) -> list[dict[str, Any]]:
    trainer = made(steps=4, taught=2)
    done = train_scorer.train(trainer, 2, out, seconds=stop, check_every=2, say=lambda line: None)
    assert done == (stop == math.inf)
    return [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]


def test_the_same_seed_gives_the_same_scorer_which_idpruner_loads(tmp_path):
    one, two = run(tmp_path / "one.safetensors"), run(tmp_path / "two" / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two" / "two.safetensors").read_bytes()
    assert [row["ce"] for row in one if "ce" in row] == [row["ce"] for row in two if "ce" in row]
    checks = [(row["step"], row["keep"]) for row in one if row.get("event") == "val"]
    assert checks == [(step, keep) for step in (2, 4, 6) for keep in (0.111111, 0.055556)]
    assert load(str(tmp_path / "one.safetensors")).query.in_features == 32
    build("idpruner", {"importance": "scorer", "scorer": str(tmp_path / "one.safetensors")})


def test_a_run_that_was_stopped_goes_on(tmp_path):
    whole = run(tmp_path / "whole.safetensors")
    out = tmp_path / "parts.safetensors"
    for _ in range(3):  # a step at a time
        run(out, stop=0)
    rows = run(out)
    assert [row["step"] for row in rows if row.get("event") == "start"] == [0, 1, 2, 3]
    found, expected = ({row["step"]: row["ce"] for row in log if "ce" in row} for log in (rows, whole))
    assert found == expected and len(found) == 4
    other = made(steps=5, taught=2)
    with pytest.raises(ValueError, match="another run"):
        train_scorer.train(other, 2, out, say=lambda line: None)


def test_the_best_check_is_written(tmp_path, monkeypatch):
    found = iter([{"basic/mean": x, "extended/mean": x} for x in (0.1, 0.1, 0.9, 0.9, 0.2, 0.2)])
    monkeypatch.setattr(ScorerTrainer, "accuracy", lambda *_: next(found))
    kept = []
    weights = ScorerTrainer.weights
    monkeypatch.setattr(ScorerTrainer, "weights", lambda self: kept.append(weights(self)) or kept[-1])
    rows = run(tmp_path / "best.safetensors")
    assert [row["step"] for row in rows if row.get("event") == "best"] == [2, 4]
    written = load(str(tmp_path / "best.safetensors")).state_dict()
    assert len(kept) == 3 and all(torch.equal(written[name], kept[-1][name].float()) for name in written)


def test_lessons_are_the_same_for_the_same_step_and_show_every_world():
    family = Llava(**TINY)
    lessons = Lessons(family, Plan("scorer", 8), Schedule(10, 0), 0)
    plan, keep, arrays = lessons[3]
    again, other = lessons[3][2], lessons[4][2]
    assert all(torch.equal(arrays[name], again[name]) for name in arrays)
    assert not torch.equal(arrays["what"], other["what"])
    assert keep == lessons.schedule.keep(3, 0) and plan.prompts == len(arrays["ids"]) == 8
    assert ((arrays["labels"] != IGNORE).sum(1) >= 8).all()
    assert (arrays["easy"] >= 0).tolist() == [False] * 7 + [True]
