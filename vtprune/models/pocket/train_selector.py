# SPDX-License-Identifier: Apache-2.0
"""Train the selector that ships with ``pocket-llava``: `vtprune.training.selector`, with lessons that cost less.

``python -m vtprune.models.pocket.train_selector --out selector.safetensors --pictures 2000 --minutes 4``

A picture is drawn and seen once for up to eight questions, and the answers are PocketVQA's own; the model is not asked
for them. Pictures are of the training split, under a seed of their own: the model was not trained on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...api import encode
from ...pruners.selector import places
from ...training import lessons as school
from ...training.lessons import Lesson
from ...training.selector import options, run
from . import vocab
from .batch import IGNORE, PATCHES, PICTURE_TURN
from .families import Llava, folder_weights
from .layout import golden_inputs
from .plans import Plan, Stage
from .train import Recipe, Trainer
from .train_scorer import HERE, Lessons, Schedule

TOGETHER = 8  # pictures that are seen at a time: one round of the worlds


@torch.no_grad()
def lessons(
    model: Any, pictures: int, seed: int, cache: str = "cpu", say: Callable[[str], None] = lambda _: None
) -> list[Lesson]:
    """Lessons about so many pictures, of the worlds that `train_scorer` takes."""
    family = Llava()
    trainer = Trainer(family, Recipe(seed), Stage("selector", 1, 0.0, ()), str(model.device), False)
    trainer.start(family.start(folder_weights(HERE / family.name)))
    table = model.get_input_embeddings().weight.detach()
    where = places(encode(model, {k: v.to(model.device) for k, v in golden_inputs().items()})).to(cache)
    plan = Plan("selector", TOGETHER)
    drawn = Lessons(family, plan, Schedule(1), seed)
    visual_at = torch.arange(1, 1 + PATCHES, device=cache)
    half = torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")
    made: list[Lesson] = []
    rounds = -(-pictures // TOGETHER)
    for number in range(rounds):
        _, _, arrays = drawn[number]
        arrays = trainer.move(arrays)
        pixels, _ = trainer.draw(plan, arrays, (seed << 32) + number)
        with half:
            seen = family.look(pixels, plan.geometry, family.see).visual
        for ids, labels, turn, visual in zip(arrays["ids"], arrays["labels"], arrays["turn"], seen, strict=True):
            start = table[vocab.BOS : vocab.BOS + 1]
            for question, answer in _asked(ids, labels, turn):
                words = table[question]
                rows = torch.cat([start, visual.to(table.dtype), words])
                made.append(Lesson(
                    rows.to(cache, torch.bfloat16), torch.arange(len(rows), device=cache), (visual_at,), (where,),
                    words.to(cache, torch.bfloat16), answer.to(cache),
                ))  # fmt: skip
        if (number + 1) % max(1, rounds // 8) == 0:
            say(f"{len(made)} lessons from {(number + 1) * TOGETHER} of {pictures} pictures")
    return made


def _asked(ids: Tensor, labels: Tensor, turn: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Questions and answers, ids without padding, of one packed prompt."""
    found = []
    for number in sorted(set(turn.tolist()) - {PICTURE_TURN}):
        mine = turn == number
        question, answer = ids[mine & (labels == IGNORE)], labels[mine & (labels != IGNORE)]
        if len(answer):
            found.append((question[question != vocab.PAD], answer))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser)
    parser.add_argument("--pictures", type=int, default=2000)
    given = parser.parse_args(arguments)
    school.check_count("--pictures", given.pictures)
    return run(given, lambda model, _, say: lessons(model, given.pictures, given.seed, given.cache, say))


if __name__ == "__main__":
    raise SystemExit(main())
