# SPDX-License-Identifier: Apache-2.0
"""What the models are trained on: stages of training, and the batches of each.

A batch has one shape: one kind of picture, so many of them in each prompt. A stage mixes such plans. Batch number ``i``
of a stage depends on the seed, the stage and ``i`` alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import data, easyvqa, qwen, vocab
from .batch import IGNORE, PICTURE_TURN, picture_arrays, text_arrays
from .data import Question, Scene, questions, scene
from .families import Family, Geometry, Span
from .recall import KINDS, recall
from .worlds import (
    HIRES_SIZES,
    Dialogue,
    clip,
    clutter_candidates,
    clutter_scene,
    extended_candidates,
    extended_scene,
    hires_candidates,
    hires_scene,
    icl,
    pair,
)

BLANK = Scene("", (), (), ((0.0,) * 3,) * 4)  # stands where a picture comes from elsewhere
BANK = 16  # pictures that a batch of recall takes its visual tokens from
LABEL_TURN = len(vocab.encode("which color label ?")) + 2  # the question, its answer and </s>


@dataclass(frozen=True)
class Plan:
    """One kind of batch.

    Attributes
    ----------
    world
        ``mixed`` (see :func:`mixed`), ``basic``, ``pair``, ``icl``, ``told`` (as ``icl``, but each class is named and
        no picture is shown), ``recall`` (see :mod:`.recall`), ``hires`` or ``clip``.
    prompts
        Prompts in a batch.
    geometry
        Of each picture.
    pictures
        In each prompt; of ``told`` and ``recall``, turns.
    text
        Tokens of packed questions; 0 where the prompt is one conversation.
    named
        Of ``icl``: shares of turns whose question names the class, the prompts taking turns. The way to the label can
        be learnt in steps.
    """

    world: str
    prompts: int
    geometry: Geometry = field(default_factory=Geometry)
    pictures: int = 1
    text: int = 95
    named: tuple[float, ...] = (0, 0.5, 0, 1)


@dataclass(frozen=True)
class Stage:
    """A part of the training of one model, with a learning-rate schedule of its own.

    Attributes
    ----------
    name, steps, peak
        Its name, number of steps and highest learning rate.
    plans
        Plans and their weights in the mixture.
    keeps
        Fractions of visual tokens that the language model sees, one drawn per batch; 1 is all of them. At 0 there is
        no picture in the prompt, so that what a question alone gives away is learnt too.
    frozen
        Whether the vision tower stands still. It must where tokens are dropped: else it learns to spread what it
        sees over all patches, and dropping them would stop to matter.
    first
        Number of its first batch. Batches of one number show the same pictures in every stage, so a stage that is to
        see new ones begins after those of the stages before it.
    """

    name: str
    steps: int
    peak: float
    plans: tuple[tuple[Plan, float], ...]
    keeps: tuple[float, ...] = (1.0,)
    frozen: bool = False
    first: int = 0


def _shown(total: int, named: tuple[float, ...] = Plan.named) -> tuple[tuple[Plan, float], ...]:
    shots = (2, 3, 4, 5, 7)
    return tuple((Plan("icl", total // (n + 1), Geometry(), n + 1, 0, named), 1 / len(shots)) for n in shots)


def _labelling(total: int, told: float = 0.2) -> tuple[tuple[Plan, float], ...]:
    return (*_weighted(_shown(total), 1 - told), (Plan("told", total, Geometry(), 8, 0), told))


def _weighted(plans: tuple[tuple[Plan, float], ...], share: float) -> tuple[tuple[Plan, float], ...]:
    return tuple((plan, weight * share) for plan, weight in plans)


_HIRES = tuple(
    (Plan("hires", 240 // views, Geometry(*size), 1, 95), weight)
    for size, views, weight in zip(HIRES_SIZES, (5, 5, 5, 4, 4, 3, 3), (0.58, *[0.07] * 6), strict=True)
)
_LLAVA = ((Plan("mixed", 256), 0.78), (Plan("pair", 128, pictures=2), 0.06), *_weighted(_labelling(256), 0.16))
_KEEPS = (1.0, 1.0, 1 / 2, 1 / 4, 1 / 9, 1 / 9, 1 / 18, 0.0)
_RECALL = Plan("recall", 384, Geometry(), 10, 0)
_CLIPS = tuple((Plan("clip", 1024 // frames, Geometry(4, 4, frames), text=45), 1 / 3) for frames in (8, 16, 32))
_QWEN = (
    (Plan("mixed", 256, text=93), 0.6),
    (Plan("hires", 64, Geometry(12, 12), text=93), 0.16),
    (Plan("pair", 128, pictures=2, text=91), 0.04),
    *_weighted(_CLIPS, 0.2),
)
STAGES: dict[str, tuple[Stage, ...]] = {
    "pocket-llava": (
        Stage("basic", 8500, 1.2e-3, ((Plan("basic", 256, text=79), 1.0),)),
        Stage("full", 5400, 8e-4, _LLAVA),
        Stage("drop", 2000, 6e-4, _LLAVA, _KEEPS, True),
        Stage("more", 2600, 7e-4, _LLAVA, first=16_000),
        Stage("settle", 1600, 6e-4, _LLAVA, _KEEPS, True, 19_000),
    ),
    "pocket-llava-next": (
        Stage("hires", 3500, 7e-4, (*_weighted(_HIRES, 0.84), (Plan("mixed", 80), 0.16))),
        Stage("drop", 600, 5e-4, (*_weighted(_HIRES, 0.8), (Plan("mixed", 80), 0.2)), _KEEPS, True),
    ),
    "pocket-qwen2.5-vl": (
        Stage(
            "full", 11800, 1.2e-3,
            (
                (Plan("mixed", 256, text=93), 0.41),
                (Plan("hires", 64, Geometry(12, 12), text=93), 0.05),
                (Plan("pair", 128, pictures=2, text=91), 0.02),
                *_weighted(_labelling(256, 0.7), 0.4),
                *_weighted(_CLIPS, 0.12),
            ),
        ),
        Stage(
            "drop", 900, 5e-4,
            (
                (Plan("mixed", 256, text=93), 0.56),
                (Plan("hires", 64, Geometry(12, 12), text=93), 0.14),
                *_weighted(_labelling(256), 0.16),
                *_weighted(_CLIPS, 0.14),
            ),
            _KEEPS, True,
        ),
        # Looking back comes first and alone: where answers can be seen, the model never begins to look back.
        Stage("recall", 1200, 1.6e-3, ((_RECALL, 1.0),), frozen=True, first=20_000),
        Stage("show", 1400, 1.2e-3, ((_RECALL, 0.2), *_weighted(_shown(256), 0.8)), frozen=True, first=22_000),
        Stage("again", 1400, 1.2e-3, ((_RECALL, 0.2), *_weighted(_shown(256), 0.8)), frozen=True, first=23_400),
        Stage(
            "label", 4700, 1.1e-3,
            (*_weighted(_QWEN, 0.7), (_RECALL, 0.05), *_weighted(_shown(256, (0, 0, 0, 1)), 0.25)),
            frozen=True, first=24_800,
        ),
        Stage(
            "settle", 600, 5e-4,
            (*_weighted(_QWEN, 0.82), (_RECALL, 0.02), *_weighted(_shown(256, (0,)), 0.16)), _KEEPS, True, 30_000,
        ),
    ),
}  # fmt: skip


@lru_cache(maxsize=64)
def prefix(family: Family, spans: tuple[Span, ...], time_counts: bool = False) -> dict[str, Tensor]:
    """``<s>`` and pictures one after another.

    Returns
    -------
    dict
        ``ids`` int64 [S]; ``visual`` bool [S]; ``separator`` bool [S], the placeholders that are never dropped;
        ``positions`` int64 [S], or [3, S] for M-RoPE; ``next`` the position after it, an int64 scalar.
    """
    runs: list[int | tuple[int, int, int]] = [1]
    ids, visual, separator = [vocab.BOS], [False], [False]
    for span in spans:
        ids += [*span.before, *[span.token] * span.count, *span.after]
        visual += [False] * len(span.before) + [True] * span.count + [False] * len(span.after)
        kept = np.zeros(span.count, bool)
        kept[list(span.separators)] = True
        separator += [False] * len(span.before) + kept.tolist() + [False] * len(span.after)
        runs += [len(span.before), span.grid or span.count, len(span.after)]
    if family.mrope:
        positions = qwen.positions([*runs, 1], time_counts=time_counts)
        positions, after = positions[:, :-1], positions[0, -1]
    else:
        positions, after = torch.arange(len(ids)), torch.tensor(len(ids))
    return {
        "ids": torch.tensor(ids), "visual": torch.tensor(visual), "separator": torch.tensor(separator),
        "positions": positions, "next": after,
    }  # fmt: skip


def packed(
    family: Family, groups: Sequence[Sequence[Scene]], rows: Sequence[Sequence[Question]], plan: Plan,
    chat: Sequence[bool] | None = None, time_counts: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Prompts of pictures followed by several questions; see ``text_arrays``.

    Returns
    -------
    dict
        Those of ``picture_arrays``, and ``ids``, ``labels``, ``turn`` int64 [B, S]; ``positions`` int64 [B, S] or
        [3, B, S]; ``visual`` and ``separator`` bool [S].
    """
    head = prefix(family, (family.span(plan.geometry),) * plan.pictures, time_counts)
    batch, length = len(groups), len(head["ids"])
    tail = text_arrays(rows, chat or [False] * batch, int(head["next"]), plan.text, strict=False)
    positions = tail["positions"].expand(3, -1, -1) if family.mrope else tail["positions"]
    before = head["positions"][:, None].expand(-1, batch, -1) if family.mrope else head["positions"].expand(batch, -1)
    none = torch.zeros(plan.text, dtype=torch.bool)
    return picture_arrays([s for group in groups for s in group]) | {
        "ids": torch.cat([head["ids"].expand(batch, -1), tail["ids"]], 1),
        "labels": torch.cat([torch.full((batch, length), IGNORE), tail["labels"]], 1),
        "turn": torch.cat([torch.full((batch, length), PICTURE_TURN), tail["turn"]], 1),
        "positions": torch.cat([before, positions], -1),
        "visual": torch.cat([head["visual"], none]),
        "separator": torch.cat([head["separator"], none]),
    }


def demonstrated(family: Family, dialogues: Sequence[Dialogue], plan: Plan) -> dict[str, Tensor]:
    """Conversations with one picture a turn, all of one length; as ``packed``, with no text after the prefix.

    A label counts where its class was shown before. With a ``told`` plan there are no pictures.
    """
    span = family.span(plan.geometry) if plan.world == "icl" else Span((), vocab.IMAGE, 0, ())
    turn = Span(span.before, span.token, span.count, (*span.after, *[vocab.PAD] * LABEL_TURN), span.grid)
    head = prefix(family, (turn,) * plan.pictures)
    ids = head["ids"].repeat(len(dialogues), 1)
    labels = torch.full_like(ids, IGNORE)
    step = len(turn.before) + turn.count + len(turn.after)
    for b, dialogue in enumerate(dialogues):
        known = set()
        for number, one in enumerate(dialogue.turns):
            end = 1 + (number + 1) * step
            words = vocab.encode(one.question.text)
            answer = [*vocab.encode_answer(one.question), vocab.EOS]
            ids[b, end - LABEL_TURN : end] = torch.tensor(words + answer)
            if one.question.answer in known:
                labels[b, end - len(answer) : end] = torch.tensor(answer)
            known.add(one.question.answer)
    positions = head["positions"]
    pictures = picture_arrays([t.pictures[0] for d in dialogues for t in d.turns]) if plan.world == "icl" else {}
    return pictures | {
        "ids": ids, "labels": labels, "turn": torch.zeros_like(ids),
        "positions": positions[:, None].repeat(1, len(ids), 1) if family.mrope else positions.repeat(len(ids), 1),
        "visual": head["visual"], "separator": head["separator"],
    }  # fmt: skip


def glance(family: Family) -> Span:
    """A picture of four visual tokens, as the prompts of ``recall`` show."""
    span = family.span(Geometry())
    return replace(span, count=4, grid=span.grid and (1, 2, 2), separators=())


def recalled(family: Family, plan: Plan, number: int, seed: int) -> dict[str, Tensor]:
    """Prompts of :mod:`.recall`, and a few pictures whose visual tokens fill the placeholders, in no order.

    Returns
    -------
    dict
        As ``demonstrated``, but which tokens are visual differs from prompt to prompt, so ``visual`` is all False and
        ``glances`` int64 [n] says which row of all pictures each placeholder shows.
    """
    span = glance(family)
    look = [*span.before, *[span.token] * span.count, *span.after]
    key = f"recall/{seed}/{number}"
    ids, labels = recall(plan.prompts, plan.pictures, look, key)
    rng = random.Random(key)
    scenes = [extended_scene("train", number * BANK + i, seed + 7) for i in range(BANK)]
    rows = BANK * family.span(plan.geometry).count
    turn = replace(span, after=(*span.after, *[vocab.PAD] * LABEL_TURN))
    seen = prefix(family, (turn,) * plan.pictures)["positions"]
    plain = torch.arange(ids.shape[1]).expand_as(seen)
    behind = torch.tensor([KINDS[i % len(KINDS)].endswith("pictures") for i in range(plan.prompts)])
    positions = torch.where(behind[:, None], seen[..., None, :], plain[..., None, :])
    none = torch.zeros(ids.shape[1], dtype=torch.bool)
    glances = torch.tensor([rng.randrange(rows) for _ in range(int((ids == span.token).sum()))])
    return picture_arrays(scenes) | {
        "ids": ids, "labels": labels, "turn": torch.zeros_like(ids), "positions": positions,
        "visual": none, "separator": none, "glances": glances,
    }  # fmt: skip


@lru_cache(maxsize=1)
def easy_questions() -> list[list[Question]]:
    """Questions about each training picture of easy-VQA."""
    split = easyvqa.load("train")
    found: list[list[Question]] = [[] for _ in split.pictures]
    for picture, text, answer in split.questions:
        found[picture].append(Question("easy", text, answer))
    return found


def mixed(family: Family, plan: Plan, first: int, seed: int) -> dict[str, Tensor]:
    """Of ten pictures two basic, one cluttered, four extended, two with several texts, one of easy-VQA.

    Every fourth row is a conversation.

    Returns
    -------
    dict
        As ``packed``, and ``easy`` int64 [B]: number of the easy-VQA picture that takes the place of this one, or -1.
    """
    groups, rows, easy = [], [], []
    for i in range(first, first + plan.prompts):
        rng = random.Random(f"mixed/{seed}/{i}")
        number = -1
        if i % 10 in (0, 5):
            picture = scene("train", i, seed + 1)
            asked = questions(picture)
        elif i % 10 == 1:
            picture = clutter_scene("train", i, seed)
            asked = data.in_turn(rng, clutter_candidates(picture, rng))[:8]
        elif i % 10 in (6, 9):
            picture = hires_scene("train", i, seed, (data.GRID, data.GRID))
            asked = data.in_turn(rng, hires_candidates(picture, rng))[:8]
        elif i % 10 in (2, 3, 7, 8):
            picture = extended_scene("train", i, seed)
            found = extended_candidates(picture, rng)
            # One look at the added kinds first: rows are short, and the basic kinds are asked elsewhere too.
            asked = data.in_turn(rng, {k: v for k, v in found.items() if k not in data.KINDS})[:6]
            asked = rng.sample(asked, len(asked)) + data.in_turn(rng, {k: found[k] for k in data.KINDS})[:4]
        else:
            picture, number = BLANK, rng.randrange(len(easy_questions()))
            asked = rng.sample(easy_questions()[number], min(8, len(easy_questions()[number])))
        groups.append((picture,))
        rows.append(asked)
        easy.append(number)
    chat = [i % 4 == 3 for i in range(first, first + plan.prompts)]
    return packed(family, groups, rows, plan, chat) | {"easy": torch.tensor(easy)}


def batch(family: Family, plan: Plan, number: int, seed: int) -> dict[str, Tensor]:
    """Training batch of a plan; another number gives other samples."""
    first = number * plan.prompts
    indices = range(first, first + plan.prompts)
    size = (plan.geometry.rows, plan.geometry.columns)
    if plan.world == "mixed":
        return mixed(family, plan, first, seed)
    if plan.world == "basic":
        scenes = [scene("train", i, seed) for i in indices]
        asked = [questions(s) for s in scenes]
        return packed(family, [(s,) for s in scenes], asked, plan, [i % 4 == 3 for i in range(plan.prompts)])
    if plan.world == "hires":
        scenes = [hires_scene("train", i, seed, size) for i in indices]
        asked = []
        for s in scenes:
            rng = random.Random(f"{s.key}/questions")
            asked.append(data.in_turn(rng, hires_candidates(s, rng))[:8])
        return packed(family, [(s,) for s in scenes], asked, plan)
    if plan.world == "pair":
        pairs = [pair("train", i, seed) for i in indices]
        return packed(family, [scenes for scenes, _ in pairs], [asked[:6] for _, asked in pairs], plan)
    if plan.world == "clip":
        clips = [clip("train", i, seed, plan.geometry.frames) for i in indices]
        asked = [questions for _, questions in clips]
        return packed(family, [c for c, _ in clips], asked, plan, time_counts=number % 2 == 1)
    if plan.world == "recall":
        return recalled(family, plan, number, seed)
    named = [1.0 if plan.world == "told" else plan.named[i % len(plan.named)] for i in indices]
    dialogues = [icl("train", i, seed, plan.pictures - 1, share) for i, share in zip(indices, named, strict=True)]
    return demonstrated(family, dialogues, plan)


class Batches(torch.utils.data.Dataset[Any]):
    """Batches of a stage: ``plan`` and ``keep``, and the tensors. The first is of the first plan."""

    def __init__(self, family: Family, stage: Stage, seed: int):
        self.family, self.stage, self.seed = family, stage, seed

    def draw(self, step: int) -> tuple[Plan, float]:
        """The plan of a batch, and the fraction of visual tokens that is kept."""
        rng = random.Random(f"{self.stage.name}/{self.seed}/{step}")
        plans, weights = zip(*self.stage.plans, strict=True)
        plan = plans[0] if step == 0 else rng.choices(plans, weights)[0]
        keep = rng.choice(self.stage.keeps)
        if plan.world in ("told", "recall"):
            return plan, 1.0
        return plan, keep if plan.text else max(keep, 1 / 18)  # a label cannot be told without pictures

    def __getitem__(self, step: int) -> tuple[Plan, float, dict[str, Tensor]]:
        plan, keep = self.draw(step)
        return plan, keep, batch(self.family, plan, self.stage.first + step, self.seed)
