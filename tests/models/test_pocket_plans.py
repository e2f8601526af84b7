# SPDX-License-Identifier: Apache-2.0
"""Training batches: the same for the same number, right answers at the right places, every plan of every stage."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from vtprune.models.pocket import batch, data, plans, qwen, recall, vocab, worlds
from vtprune.models.pocket.data import Question
from vtprune.models.pocket.families import FAMILIES, Family, Geometry, Span
from vtprune.models.pocket.plans import Plan, Stage

TINY = {"vision_width": 32, "vision_layers": 2, "vision_heads": 2, "width": 32, "layers": 2, "heads": 2, "ffn": 64}
QWEN = {**TINY, "vision_ffn": 48, "full_attention": (1,)}
PLANS = [
    pytest.param(name, plan, id=f"{name}-{stage.name}-{number}")
    for name, stages in plans.STAGES.items()
    for stage in stages
    for number, (plan, _) in enumerate(stage.plans)
]


def tiny(name: str) -> Family:
    return FAMILIES[name](**(QWEN if name == "pocket-qwen2.5-vl" else TINY))


@pytest.fixture(scope="module")
def families() -> dict[str, Family]:
    return {name: tiny(name) for name in FAMILIES}


def read(ids: torch.Tensor) -> str:
    return " ".join(vocab.TOKENS[i] for i in ids.tolist())


def spoken(question: Question) -> str:
    return read(torch.tensor([*vocab.encode(question.text), *vocab.encode_answer(question), vocab.EOS]))


def built(family: Family, plan: Plan, number: int = 0) -> dict[str, torch.Tensor]:
    if plan.world == "mixed":
        pytest.importorskip("easy_vqa")
    return plans.batch(family, plan, number, 0)


@pytest.mark.parametrize(("name", "plan"), PLANS)
def test_every_plan_has_the_shape_that_it_claims(families, name, plan):
    family, plan = families[name], replace(plan, prompts=10 if plan.world == "mixed" else 2)
    arrays, span, geometry = built(family, plan), family.span(plan.geometry), plan.geometry
    if plan.wordy:
        span = Span((), span.token, 0, ())
    frames = max(1, geometry.frames)
    pictures = plan.prompts * plan.pictures
    if plan.wordy:
        assert "what" not in arrays
    else:
        assert arrays["what"].shape == (pictures * frames, geometry.rows * geometry.columns)
    length = arrays["visual"].shape[0]
    around = len(span.before) + len(span.after) + (0 if plan.text else plans.LABEL_TURN)
    assert length == 1 + plan.pictures * (span.count + around) + plan.text
    for key in ("ids", "labels", "turn"):
        assert arrays[key].shape == (plan.prompts, length) and arrays[key].dtype == torch.int64
    assert arrays["positions"].shape == ((3,) if family.mrope else ()) + (plan.prompts, length)
    # Placeholders are where pictures go, and nowhere else.
    assert ((arrays["ids"] == span.token) == arrays["visual"]).all()
    assert arrays["visual"].sum() == plan.pictures * span.count
    assert arrays["separator"].sum() == plan.pictures * len(span.separators)
    assert not (arrays["separator"] & ~arrays["visual"]).any()
    # Only words are learnt: those of answers, which are themselves.
    learnt = arrays["labels"] != batch.IGNORE
    assert (arrays["labels"][learnt] == arrays["ids"][learnt]).all()
    assert not arrays["visual"].expand_as(learnt)[learnt].any()
    # A small picture of several texts may leave nothing to ask that one thing alone fits.
    may_be_silent = torch.tensor([plan.world == "mixed" and i % 10 in (6, 9) for i in range(plan.prompts)])
    assert (learnt.any(1) | may_be_silent).all()
    assert not (arrays["ids"] == vocab.UNK).any()
    if plan.text:
        assert (arrays["turn"][:, : length - plan.text] == batch.PICTURE_TURN).all()
        assert (arrays["turn"][:, length - plan.text :] >= 0).all()


def test_batches_depend_on_their_number_alone(families):
    family = families["pocket-llava"]
    stage = Stage("some", 9, 1e-3, ((Plan("basic", 3), 0.5), (Plan("icl", 2, Geometry(), 3, 0), 0.5)), (1.0, 0.25, 0.0))
    drawn = [plans.Batches(family, stage, 0)[step] for step in range(9)]
    assert {plan.world for plan, _, _ in drawn} == {"basic", "icl"}
    assert drawn[0][0] == stage.plans[0][0]  # what is compiled first
    plan, keep, arrays = plans.Batches(family, stage, 0)[7]
    assert (plan, keep) == drawn[7][:2]
    assert all(torch.equal(arrays[name], drawn[7][2][name]) for name in arrays)
    corners = [arrays["corners"] for _, _, arrays in drawn]
    assert not any(torch.equal(a[:1], b[:1]) for a, b in pairwise(corners))
    other = plans.batch(family, stage.plans[0][0], 0, 1)
    assert not torch.equal(other["corners"], plans.batch(family, stage.plans[0][0], 0, 0)["corners"])
    # A label cannot be told without pictures.
    assert min(keep for p, keep, _ in (plans.Batches(family, stage, 1)[s] for s in range(40)) if not p.text) > 0
    assert 0.0 in {plans.Batches(family, stage, 1).draw(s)[1] for s in range(40)}


@pytest.mark.parametrize("name", FAMILIES)
def test_training_never_draws_a_picture_of_another_split(families, name, monkeypatch):
    asked = set()

    def recording(world, split, seed, index, stream=data.stream):
        asked.add(split)
        return stream(world, split, seed, index)

    monkeypatch.setattr(data, "stream", recording)
    for stage in plans.STAGES[name]:
        for plan, _ in stage.plans:
            if plan.world != "mixed":
                plans.batch(families[name], replace(plan, prompts=1), 0, 0)
    assert asked == {"train"}


@pytest.mark.parametrize("name", FAMILIES)
def test_questions_and_answers_are_those_of_the_pictures(families, name):
    family, plan = families[name], Plan("basic", 8, text=79)
    arrays = plans.batch(family, plan, 3, 0)
    start = arrays["ids"].shape[1] - 79
    after = int(plans.prefix(family, (family.span(plan.geometry),))["next"])
    for b in range(8):
        asked = data.questions(data.scene("train", 24 + b, 0))
        chat, at = b % 4 == 3, start
        for number, question in enumerate(asked):
            words = spoken(question)
            size = len(words.split())
            if at + size > start + 79:
                break
            here = slice(at, at + size)
            assert read(arrays["ids"][b, here]) == words
            answer = [*vocab.encode_answer(question), vocab.EOS]
            assert arrays["labels"][b, here].tolist() == [batch.IGNORE] * (size - len(answer)) + answer
            assert (arrays["turn"][b, here] == (0 if chat else number)).all()
            first = after + at - start if chat else after
            positions = arrays["positions"][..., b, here]
            assert (positions == torch.arange(first, first + size)).all()
            at += size
        assert number >= 4
        assert (arrays["ids"][b, at:] == vocab.PAD).all() and (arrays["labels"][b, at:] == batch.IGNORE).all()


@pytest.mark.parametrize("time_counts", [False, True])
def test_positions_are_those_of_the_whole_prompt(families, time_counts):
    family, plan = families["pocket-qwen2.5-vl"], Plan("clip", 1, Geometry(4, 4, 32), text=45)
    arrays = plans.batch(family, plan, int(time_counts), 0)
    first = int((arrays["turn"][0] == 0).sum())
    expected = qwen.positions([2, (16, 8, 8), 1 + first], time_counts=time_counts)
    assert torch.equal(arrays["positions"][:, 0, : expected.shape[1]], expected)
    two = plans.batch(family, Plan("pair", 1, pictures=2, text=91), 0, 0)
    expected = qwen.positions([2, (1, 12, 12), 2, (1, 12, 12), 2])
    assert torch.equal(two["positions"][:, 0, : expected.shape[1]], expected)


@pytest.mark.parametrize("name", ["pocket-llava", "pocket-qwen2.5-vl"])
def test_labels_count_once_their_class_was_shown(families, name):
    family, plan = families[name], Plan("icl", 6, Geometry(), 5, 0)
    arrays = plans.batch(family, plan, 2, 0)
    turns_long = (arrays["ids"].shape[1] - 1) // 5
    for b in range(6):
        turns = worlds.icl("train", 12 + b, 0, 4, (0, 0.5, 0, 1)[b % 4]).turns
        known = set()
        for number, turn in enumerate(turns):
            end = 1 + (number + 1) * turns_long
            here = slice(end - plans.LABEL_TURN, end)
            assert read(arrays["ids"][b, here]) == spoken(turn.question)
            label = turn.question.answer
            expected = [*vocab.encode(label), vocab.EOS] if label in known else [batch.IGNORE] * 2
            assert arrays["labels"][b, end - 2 : end].tolist() == expected
            known.add(label)
        assert (arrays["labels"][b, -2:] != batch.IGNORE).all()  # the last one is always of a class that was shown
    assert (arrays["turn"] == 0).all()
    positions = arrays["positions"][0] if family.mrope else arrays["positions"]
    assert (positions[0].diff() >= (-12 if family.mrope else 1)).all()


def test_what_counts_can_be_looked_up_further_left(families):
    family, plan = families["pocket-qwen2.5-vl"], Plan("recall", 64, Geometry(), 10, 0)
    arrays = plans.batch(family, plan, 5, 0)
    ids, counted = arrays["ids"], arrays["labels"] != batch.IGNORE
    for b in range(64):
        kind, row, marks = b % 4, ids[b].tolist(), counted[b].tolist()
        assert any(marks)
        if kind == 0:  # the copy begins where the first word that counts stands
            period = marks.index(True)
            assert recall.PERIODS[0] <= period <= recall.PERIODS[1] and all(marks[period:])
            assert row[period:] == row[:-period]
            continue
        step = 3 if kind == 1 else plans.LABEL_TURN
        assert row[0] == vocab.BOS and not marks[0]
        meaning = {}
        for start in range(1, len(row), step):
            turn = row[start : start + step]
            word, label = (turn[0], turn[1]) if kind == 1 else (turn[1], turn[4])
            if kind != 1:
                assert read(torch.tensor(turn)).split() == ["which", vocab.TOKENS[word], "label", "?",
                                                            vocab.TOKENS[label], "</s>"]  # fmt: skip
            assert marks[start : start + step] == [False] * (step - 2) + [word in meaning] * 2
            assert meaning.setdefault(word, label) == label
        assert len(set(meaning.values())) == len(meaning) and 1 < len(meaning) <= recall.CLASSES
        if kind == 3:
            assert {vocab.TOKENS[label] for label in meaning.values()} <= set(worlds.LABELS)
    positions = arrays["positions"]
    assert (positions == positions[:1]).all()
    assert {tuple(p.diff().unique().tolist()) for p in positions[0]} == {(1,), (1, 1 + recall.GAP)}
    again = plans.batch(family, plan, 5, 0)
    assert all(torch.equal(again[name], arrays[name]) for name in arrays)
    assert not torch.equal(plans.batch(family, plan, 6, 0)["ids"], ids)


def test_a_mixture_has_every_kind_of_picture(families):
    easy = pytest.importorskip("easy_vqa")
    arrays = plans.batch(families["pocket-llava"], Plan("mixed", 20), 0, 0)
    taken = (arrays["easy"] >= 0).tolist()
    assert taken == [i % 10 == 4 for i in range(20)]
    texts, answers, numbers = easy.get_train_questions()
    known = {(n, t.lower().replace("?", " ?"), a) for t, a, n in zip(texts, answers, numbers, strict=True)}
    for b in (4, 14):
        words = read(arrays["ids"][b]).split(" <image> ")[-1].removeprefix("<image> ")
        for line in words.replace("<pad>", "").split("</s>"):
            if line.strip():
                question, answer = line.strip().rsplit(" ", 1)
                assert (int(arrays["easy"][b]), question, answer) in known
    shown = arrays["what"].amax(1)
    assert (shown[taken] == -1).all()  # a blank stands in their place
    assert any(shown[i] > 24 for i in range(20) if i % 10 in (2, 3, 7, 8))
    assert all((arrays["what"][i] == 24).sum() > 1 for i in (6, 9, 16, 19))  # several texts
    busy = (arrays["corners"].diff(dim=-1).diff(dim=-1).abs().amax((1, 2, 3)) > 1e-3).tolist()
    assert busy == [i % 10 == 1 for i in range(20)]


def test_stages():
    for name, stages in plans.STAGES.items():
        assert len({stage.name for stage in stages}) == len(stages), name
        for stage in stages:
            weights = [weight for _, weight in stage.plans]
            assert sum(weights) == pytest.approx(1, abs=0.05) and min(weights) > 0
            assert all(0 <= keep <= 1 for keep in stage.keeps)
            assert all(plan.text or plan.world == "icl" or plan.wordy for plan, _ in stage.plans)
