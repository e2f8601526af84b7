# SPDX-License-Identifier: Apache-2.0
"""Train a `selector` for a checkpoint, which stays as it is.

``python -m vtprune.training.selector --model pocket-llava --task pocketvqa/basic pocketvqa/extended --out FILE``

Any supported checkpoint and any task of `vtprune.eval.tasks` (a benchmark's own files, ``format:folder``, too). The
unpruned model answers the questions once (`lessons`); what it answers rightly, or with ``--unlabelled`` whatever it
answers, is what the pruned model is to go on saying. Then, on prompts that are already short:

1. *Taught.* Some of the tokens, drawn at random, stay. The gradient of the answer's cross-entropy with respect to a
   bias on the attention logits of each token says how much the answer wants that token, with so many others gone; its
   positive part, normalised, is the distribution that the softmax of the scores learns (cross-entropy).
2. *End to end.* The score of each token, brought to deviation 1 in its picture, plus Gumbel noise that falls, goes
   through a soft top-k whose temperature falls; the logarithm of a token's membership is its bias in every layer, so a
   token of membership 1 is there and one of membership 0 is gone. Tokens far below the k-th are really dropped, so
   that a step costs what a pruned prompt costs. The cross-entropy of the answer trains the scores through the frozen
   language model. The budget falls from ``--widest``, and then is drawn
   anew for each batch, so one training serves all.

Differentiable top-k, frozen model and the falling temperature are VisionSelector's (arXiv:2510.16598), gates as biases
are as in ``vtprune.models.pocket.train_scorer``; the gradient as a teacher, the noise and the dropped rest are ours.
Of all checks on held-out questions, the best one's weights are written (fp16), with a log beside them.

A checkpoint of 7 B: lessons hold the rows of a prompt in bf16, 5 MB for 576 tokens, in host memory; no optimiser state
but the selector's, no gradient of the checkpoint's weights, activations of short prompts alone. ``--batch 16
--examples 5000`` fits a card that runs the checkpoint in bf16 with 10 GB to spare. `pocket-llava`'s was made by
``vtprune.models.pocket.train_selector``, which differs in where its lessons come from.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models.loading import load
from ..pruners.scorer import soft_topk
from ..pruners.selector import Network
from . import lessons as school
from .lessons import Batch, Lesson

FAINT = 1e-6  # memberships below are taken for this one: their logarithm would be -inf
LOW = 1 / 24  # smallest share of the tokens that is kept
SOFT, HARD = 0.3, 0.04  # temperature, in deviations of the scores
NOISE = 0.3  # of the Gumbel noise at first, in the same
REACH = 2.5  # tokens that stay in a step, in units of the budget
CHECKED = (1 / 9, 1 / 18)
FRESH = 1_000_003  # seed of the questions: models that ship were trained on those of small seeds


class Trainer:
    """A selector in training.

    Parameters
    ----------
    model
        The checkpoint's model.
    steps, taught
        Of the whole run, and those in which it is taught.
    peak
        Highest learning rate; it warms up for a twentieth of the steps and falls to 0 along a cosine.
    seed
        Of weights, batches, budgets and noise.
    widest, high
        Shares of the tokens: that is kept at first, and that is kept at most later on; `widest` is also how many stay
        while it is taught.
    """

    def __init__(
        self, model: Any, steps: int, taught: int, peak: float, seed: int, widest: float = 1 / 3, high: float = 1 / 5
    ):
        self.model, self.steps, self.taught, self.peak, self.seed = model, steps, taught, peak, seed
        self.widest, self.high = widest, high
        self.model.requires_grad_(False).eval()
        self.table = model.get_input_embeddings().weight.detach()
        torch.manual_seed(seed)
        self.network = Network(self.table.shape[1]).to(self.table.device)
        decayed = [p for p in self.network.parameters() if p.ndim > 1]
        others = [p for p in self.network.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
            lr=peak, betas=(0.9, 0.98),
        )  # fmt: skip
        self.step = 0

    def rate(self, progress: float) -> float:
        """Learning rate at a share of the run."""
        warm = min(1.0, (self.step + 1) / max(1, self.steps / 20))
        return self.peak * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def scores(self, batch: Batch) -> Tensor:
        """``[I, N]`` fp32, -inf where there is no token."""
        scores = self.network(batch.visual.float(), batch.places, batch.words.float(), batch.sound, batch.spoken)
        return scores.float().masked_fill(~batch.sound, -torch.inf)

    def learn(self, lessons: list[Lesson], progress: float) -> dict[str, Tensor]:
        """One step; the loss, still on the device."""
        batch = school.collate(lessons, self.table)
        generator = torch.Generator().manual_seed((self.seed << 32) + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(progress)
        if self.step < self.taught:
            loss, name = self.taught_loss(batch, generator), "taught"
        else:
            part = (self.step - self.taught) / max(1, self.steps - self.taught)
            part = max(part, (progress - self.start) / max(1e-6, 1 - self.start))
            loss, name = self.answer_loss(batch, part, generator), "answer"
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        if self.step == self.taught:
            self.start = progress
        return {name: loss.detach()}

    start = 0.0  # share of the run after which it is not taught any more

    def taught_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Cross-entropy of the scores' softmax with what the answer wants, over a random share of the tokens."""
        drawn = torch.rand(batch.sound.shape, generator=generator).to(batch.sound.device)
        drawn = drawn.masked_fill(~batch.sound, -1)
        chosen = drawn.topk(max(1, int(drawn.shape[1] * self.widest)), dim=1).indices.sort(1).values
        bias = torch.zeros(chosen.shape, device=chosen.device, requires_grad=True)
        logits, labels = school.answer_logits(self.model, batch, chosen, bias)
        # The sum: the gradient of one prompt must not depend on how many are in the batch.
        total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        (wanted,) = torch.autograd.grad(total, bias)
        target = (-wanted).clamp_min(0) * batch.sound.gather(1, chosen)
        target = target / target.sum(1, keepdim=True).clamp_min(1e-12)
        return -(target * self.scores(batch).gather(1, chosen).log_softmax(1).clamp_min(-30)).sum(1).mean()

    def answer_loss(self, batch: Batch, part: float, generator: torch.Generator) -> Tensor:
        """Cross-entropy of the answers given what the selector keeps, softly; `part` of this phase is over."""
        scores = self.scores(batch)
        there = batch.sound
        count = there.sum(1, keepdim=True)
        mean = scores.masked_fill(~there, 0).sum(1, keepdim=True) / count
        centred = (scores - mean).masked_fill(~there, 0)
        spread = centred / (centred.square().sum(1, keepdim=True) / count).sqrt().clamp_min(1e-6)
        uniform = torch.rand(there.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(there.device)
        noise = NOISE * max(0.0, 1 - part / 0.8) * -(-uniform.log()).log()
        values = (spread + noise).masked_fill(~there, -torch.inf)
        keep = self.budget(part, random.Random(f"budget/{self.seed}/{self.step}"))
        goal = (keep * count.squeeze(1)).clamp_min(1)
        reach = min(there.shape[1], int(REACH * keep * there.shape[1]) + 8)
        temperature = SOFT * (HARD / SOFT) ** min(1.0, part)
        member = soft_topk(values / temperature, goal)
        chosen = values.detach().topk(reach, dim=1).indices.sort(1).values
        bias = member.gather(1, chosen).clamp_min(FAINT).log()
        return school.cross_entropy(*school.answer_logits(self.model, batch, chosen, bias))

    @torch.no_grad()
    def accuracy(self, lessons: list[Lesson], keep: float, size: int) -> float:
        """Share of lessons whose answer survives, the best `keep` of the tokens of each picture kept and no others."""
        right = 0
        for first in range(0, len(lessons), size):
            batch = school.collate(lessons[first : first + size], self.table)
            counts = (batch.sound.sum(1) * keep + 1e-6).floor().clamp_min(1).long()
            ranked = self.scores(batch).sort(dim=1, descending=True, stable=True).indices[:, : int(counts.max())]
            stays = torch.arange(ranked.shape[1], device=ranked.device) < counts[:, None]
            right += int(school.exact_matches(self.model, batch, ranked, stays).sum())
        return right / len(lessons)

    def budget(self, part: float, rng: random.Random) -> float:
        """Share of the tokens that is kept when `part` of the phase is over."""
        fall = part / 0.25
        if fall < 1:
            return self.widest * (LOW / self.widest) ** fall
        return LOW * (self.high / LOW) ** rng.random()

    def weights(self) -> dict[str, Tensor]:
        """A copy on the CPU, fp16."""
        return {name: p.detach().to("cpu", torch.float16, copy=True) for name, p in self.network.state_dict().items()}


def train(
    trainer: Trainer, lessons: list[Lesson], held: list[Lesson], out: Path, size: int, seconds: float,
    check_every: int = 250, say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Run a trainer to its last step, or until `seconds` are over; write the best weights to `out`, a log beside it.

    Whichever of the two the run is nearer to says how far it is, so that it anneals to the end in either case.
    """
    begun = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    best = -1.0
    losses: list[Tensor] = []
    rng = random.Random(f"batches/{trainer.seed}")
    deck: list[int] = []
    with out.with_suffix(".jsonl").open("w") as log:

        def write(row: dict[str, Any]) -> None:
            row = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
            log.write(json.dumps(row) + "\n")
            log.flush()
            say(json.dumps(row))

        where = torch.cuda.get_device_name() if trainer.table.device.type == "cuda" else "cpu"
        write({"event": "start", "device": where, "torch": torch.__version__, "transformers": transformers.__version__,
               "lessons": len(lessons), "held": len(held), "batch": size, "steps": trainer.steps,
               "taught": trainer.taught, "peak": trainer.peak, "seed": trainer.seed})  # fmt: skip
        while True:
            progress = max(trainer.step / trainer.steps, (time.monotonic() - begun) / seconds)
            over = progress >= 1
            if trainer.step and (trainer.step % check_every == 0 or over):
                found = [trainer.accuracy(held, keep, 2 * size) for keep in CHECKED]
                row = {"step": trainer.step, "loss": float(torch.stack(losses).mean()) if losses else None}
                losses = []
                row |= {f"held {keep:.4f}": value for keep, value in zip(CHECKED, found, strict=True)}
                write({**row, "seconds": round(time.monotonic() - begun, 1)})
                if sum(found) / len(found) >= best:
                    best = sum(found) / len(found)
                    save_file(trainer.weights(), out)
            if over:
                break
            while len(deck) < size:
                fresh = list(range(len(lessons)))
                rng.shuffle(fresh)
                deck += fresh
            drawn, deck = deck[:size], deck[size:]
            losses += trainer.learn([lessons[i] for i in drawn], progress).values()
        write({"event": "stop", "step": trainer.step, "best": best})


def options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options of a run, whatever its lessons are made of."""
    parser.add_argument("--model", default="pocket-llava", help="embedded model, folder or hub name")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write; a log lies beside it")
    parser.add_argument("--held", type=float, default=0.04, help="share of the lessons that is checked on")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--taught", type=int, default=400, help="steps in which gradients teach")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--widest", type=float, default=1 / 3, help="share of the tokens that is kept at first")
    parser.add_argument("--high", type=float, default=1 / 5, help="share that is kept at most later on")
    parser.add_argument("--check-every", type=int, default=250, help="steps between two checks")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of wall time, from the start of the command")
    parser.add_argument("--cache", default="cpu", help="device on which lessons wait")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def apart(lessons: list[Lesson], share: float) -> tuple[list[Lesson], list[Lesson]]:
    """Lessons that are checked on, the first ones, and those that are learnt from, about other pictures (all lessons,
    where none are left)."""

    def pictures(lesson: Lesson) -> set[bytes]:
        # A few rows tell a picture from others: in an encoder every row looks at all of it.
        return {lesson.rows[at[:4]].float().cpu().numpy().tobytes() for at in lesson.images}

    count = max(1, round(share * len(lessons)))
    shown = set().union(*map(pictures, lessons[:count]))
    return lessons[:count], [one for one in lessons[count:] if not pictures(one) & shown] or lessons


def run(given: argparse.Namespace, make: Callable[[Any, Any, Callable[[str], None]], list[Lesson]]) -> int:
    """Load the model, let ``make(model, processor, say)`` make lessons, and train."""
    begun = time.monotonic()
    for name in ("steps", "batch"):
        school.check_count(f"--{name}", getattr(given, name))

    def say(line: str) -> None:
        print(f"[{time.monotonic() - begun:6.1f} s] {line}", flush=True)

    model, processor = load(given.model)
    made = make(model, processor, say)
    held, rest = apart(made, given.held)
    trainer = Trainer(model, given.steps, given.taught, given.peak, given.seed, given.widest, given.high)
    left = 60 * given.minutes - (time.monotonic() - begun)
    train(trainer, rest, held, given.out, given.batch, max(left, 1.0), given.check_every, say)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser)
    parser.add_argument("--task", nargs="+", required=True, help="tasks whose questions are learnt from, in turn")
    parser.add_argument("--examples", type=int, default=4000, help="questions of each task")
    parser.add_argument("--split", default="train")
    parser.add_argument("--unlabelled", action="store_true", help="learn from wrong answers of the model as well")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw pictures")
    given = parser.parse_args(arguments)
    school.check_count("--examples", given.examples)
    return run(
        given,
        lambda model, processor, say: school.make(
            model, processor, given.task, given.examples, split=given.split, seed=FRESH + given.seed,
            batch=given.batch, workers=given.workers, cache=given.cache, labelled=not given.unlabelled, say=say,
        ),
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
