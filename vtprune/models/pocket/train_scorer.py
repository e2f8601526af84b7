# SPDX-License-Identifier: Apache-2.0
"""Train a scorer for ``IDPruner(importance="scorer")`` on ``pocket-llava``, which stays as it is.

``python -m vtprune.models.pocket.train_scorer --out scorer.safetensors [--steps N] [--prompts N] [--workers N]``

The scorer and the idea are VisionSelector's (arXiv:2510.16598), which IDPruner (arXiv:2602.13315) takes its importance
from: scores, a differentiable top-k, the cross-entropy of the answers through the frozen model, and a curriculum from
soft to hard. Deviations, each because of what it is for:

- A gate is a bias ``log(gate)`` on its token's key, in every layer. A token of gate 1 is there, one of gate 0 is gone
  for all others, as if it had been dropped. A gate that multiplies the token's embedding is undone by the RMSNorm in
  front of the attention: only the smallest gates would do anything.
- The top-k is that of scores with mean 0 and deviation 1 in each picture, divided by a temperature that falls. How hard
  the selection is depends on the step alone then, and the scorer cannot soften it with small scores. It begins at 0.3
  already: with gates that are all alike nothing is pruned, because the softmax of the attention divides by their sum.
  The authors raise the weight of a regulariser instead (from 0.1 to 2).
- The authors train at one budget, a fifth. Here it falls from 1/2 to 1/18, and then is drawn anew for each batch, so
  that the order is right from the first few tokens on.

The pictures are of PocketVQA's training split, under a seed of their own: the model was not trained on them.

Everything depends on the seed and the step alone, on a GPU up to the rounding of its kernels. Beside the weights, the
run writes a log with the suffix ``.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...pruners.scorer import Scorer, soft_topk
from . import data, plans
from .families import Family, Llava, folder_weights
from .model import packed_attention
from .plans import Plan, Stage
from .train import Check, Recipe, Trainer, exam_check
from .worlds import clutter_candidates, clutter_scene, extended_candidates, extended_scene

GATED = "pocket_gated"
HERE = Path(__file__).parent
FRESH = 1_000_003  # added to the seed of the pictures; the models were trained on those of small seeds
GONE = -1e4  # log of the gate of a token that is not there
FAINT = 1e-6  # gates below are taken for this one: their logarithm would be -inf, and nothing sees them anyway
CHECKED = (1 / 4, 1 / 9, 1 / 18)

#: Scenes of 6 x 6 cells and their questions, taking turns.
WORLDS = (
    (data.scene, data.candidates),
    (extended_scene, extended_candidates),
    (clutter_scene, clutter_candidates),
    (extended_scene, extended_candidates),
)


@dataclass(frozen=True)
class Schedule:
    """What share of the tokens is kept, and how soft the top-k is.

    Attributes
    ----------
    steps
        Of the whole run.
    widest, low, high
        The budget falls from ``widest`` to ``low``, by the same factor each step, and then is drawn between ``low`` and
        ``high``, evenly in its logarithm.
    fall
        Share of the steps in which it falls.
    soft, hard
        First and last temperature, in deviations of the scores; it falls by the same factor each step.
    """

    steps: int
    widest: float = 1 / 2
    low: float = 1 / 18
    high: float = 1 / 4
    fall: float = 0.5
    soft: float = 0.3
    hard: float = 0.03

    def keep(self, step: int, seed: int) -> float:
        """Share of the tokens that stays in a step."""
        part = step / max(1.0, self.fall * self.steps)
        if part < 1:
            return self.widest * (self.low / self.widest) ** part
        drawn = random.Random(f"keep/{seed}/{step}").random()
        return self.low * (self.high / self.low) ** drawn

    def temperature(self, step: int) -> float:
        """What the scores are divided by in a step."""
        return self.soft * (self.hard / self.soft) ** min(1.0, step / max(1, self.steps - 1))


class Lessons(torch.utils.data.Dataset):
    """Batches by step: the plan, the budget, and pictures with their questions as ``plans.packed`` gives them."""

    def __init__(self, family: Family, plan: Plan, schedule: Schedule, seed: int):
        self.family, self.plan, self.schedule, self.seed = family, plan, schedule, seed

    def __getitem__(self, step: int) -> tuple[Plan, float, dict[str, Tensor]]:
        first, scenes, asked = step * self.plan.prompts, [], []
        for i in range(first, first + self.plan.prompts):
            make, candidates = WORLDS[i % len(WORLDS)]
            scene = make("train", i, self.seed + FRESH)
            rng = random.Random(f"{scene.key}/questions")
            scenes.append((scene,))
            asked.append(data.in_turn(rng, candidates(scene, rng))[:8])
        arrays = plans.packed(self.family, scenes, asked, self.plan)
        return self.plan, self.schedule.keep(step, self.seed), arrays


def gated_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float,
    log_gate: Tensor, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """``packed_attention`` with ``log_gate`` [B, S] added to the logits of each key.

    It is one more column of queries and keys, so the gradient goes through the fast kernels, and no S x S bias is made.
    """
    width = query.shape[-1]
    gate = log_gate.to(key.dtype)[:, None, :, None].expand(-1, key.shape[1], -1, -1)
    one = torch.full_like(query[..., :1], 1 / scaling)
    # Seven columns of zeros: fused kernels want a multiple of eight.
    query, key = F.pad(torch.cat([query, one], -1), (0, 7)), F.pad(torch.cat([key, gate], -1), (0, 7))
    out, _none = packed_attention(module, query, key, F.pad(value, (0, 8)), attention_mask, scaling)
    return out[..., :width], None


class ScorerTrainer(Trainer):
    """A scorer in training; with gradients its selection is soft, without it is the hard top-k of its scores.

    Parameters
    ----------
    family
        The network, which is frozen.
    recipe, schedule
        The run; of the recipe, what concerns the optimiser and the log.
    peak
        Highest learning rate.
    device
        Where to train; on a GPU the model runs in bf16, the scorer in fp32.
    """

    def __init__(self, family: Llava, recipe: Recipe, schedule: Schedule, peak: float, device: str):
        self.schedule = schedule
        torch.manual_seed(recipe.seed)
        self.scorer = Scorer(family.model.config.text_config.hidden_size).to(device)
        super().__init__(family, recipe, Stage("scorer", schedule.steps, peak, ()), device, compiled=False)
        ALL_ATTENTION_FUNCTIONS.register(GATED, gated_attention)
        self.model.model.language_model.config._attn_implementation = GATED

    def begin(self, stage: Stage) -> None:
        """Freeze all but the scorer, and make its optimiser."""
        self.stage, self.step, self.fresh = stage, 0, 0
        self.model.requires_grad_(False).eval()
        self.trained = dict(self.scorer.named_parameters())
        # It adds the same to all scores of a picture. No selection sees that, so its gradient is noise around 0.
        nn.init.zeros_(self.trained.pop("query.bias").requires_grad_(False))
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=stage.peak, betas=self.recipe.betas, weight_decay=self.recipe.decay
        )

    def log_gates(self, visual: Tensor, keep: float) -> Tensor:
        """Logarithm of the gate of each token: fp32 [P, N], from the tokens [P, N, D]."""
        pictures, count = visual.shape[:2]
        scores = self.scorer(visual.flatten(0, 1), (count,) * pictures).view(pictures, count)
        if not torch.is_grad_enabled():
            kept = scores.topk(max(1, math.floor(keep * count + 1e-6)), dim=1).indices
            return torch.full_like(scores, GONE).scatter(1, kept, 0.0)
        spread = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True).clamp_min(1e-6)
        return soft_topk(spread / self.schedule.temperature(self.step), keep * count).clamp_min(FAINT).log()

    def forward(
        self, plan: Plan, arrays: dict[str, Tensor], seed: int, keep: float = 1.0
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """As in `Trainer`, with the tokens that the scorer lets through; prompts have one picture."""
        pixels, _ = self.draw(plan, arrays, seed)
        ids, at = arrays["ids"], arrays["visual"].nonzero().squeeze(1)
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")
        with torch.no_grad(), half:
            visual = self.family.look(pixels, plan.geometry, self.family.see).visual
            rows = self.model.get_input_embeddings()(ids).to(visual.dtype).index_copy(1, at, visual)
        gates = torch.zeros(ids.shape, device=self.device).index_copy(1, at, self.log_gates(visual, keep))

        def speak(rows: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
            return self.model.model.language_model(
                inputs_embeds=rows, position_ids=positions, attention_mask=mask, log_gate=gates, use_cache=False
            ).last_hidden_state

        with half:
            return *self.answers(rows, arrays, plan, speak), []


def train(
    trainer: ScorerTrainer, prompts: int, out: Path, workers: int = 0, say: Callable[[str], None] = print
) -> None:
    """Run the schedule; write the scorer to ``out`` and a log beside it.

    Parameters
    ----------
    trainer
        A new one.
    prompts
        Pictures in a batch, each with up to eight questions.
    out
        A safetensors file; it and the log are replaced.
    workers
        Processes that make batches.
    say
        Receives each log line.
    """
    begun, recipe, family = time.monotonic(), trainer.recipe, trainer.family
    cuda = trainer.device.type == "cuda"
    out.parent.mkdir(parents=True, exist_ok=True)
    checks: list[Check] = [exam_check(family, w, "val", recipe.check_questions) for w in ("basic", "extended")]
    loader = torch.utils.data.DataLoader(
        Lessons(family, Plan("scorer", prompts), trainer.schedule, recipe.seed),
        batch_size=None,
        sampler=range(trainer.schedule.steps),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=cuda,
    )
    with out.with_suffix(".jsonl").open("w") as log:

        def write(row: dict) -> None:
            row = {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}
            log.write(json.dumps(row) + "\n")
            log.flush()
            say(json.dumps(row))

        def check() -> None:
            for keep in CHECKED:
                found = {name: value for name, value in trainer.accuracy(checks, keep).items() if "/mean" in name}
                write({"event": "val", "step": trainer.step, "keep": keep, **found})

        gpu = torch.cuda.get_device_name(trainer.device) if cuda else "cpu"
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        shape = {"prompts": prompts, "peak": trainer.stage.peak, **asdict(trainer.schedule)}
        write({"event": "start", "gpu": gpu, **versions, **shape, "seed": recipe.seed, "decay": recipe.decay,
               "warmup": recipe.warmup, "clip": recipe.clip, "betas": recipe.betas})  # fmt: skip
        check()
        losses: list[Tensor] = []
        for plan, keep, arrays in loader:
            temperature, rate = trainer.schedule.temperature(trainer.step), recipe.rate(trainer.stage, trainer.step)
            losses.append(trainer.train_step(plan, keep, arrays)["ce"])
            if trainer.step % recipe.log_every == 0 or trainer.step == trainer.schedule.steps:
                row = {"step": trainer.step, "ce": float(torch.stack(losses).mean()), "keep": keep}
                write({**row, "temperature": temperature, "lr": rate, "seconds": round(time.monotonic() - begun, 1)})
                losses = []
        save_file({name: tensor.cpu().contiguous() for name, tensor in trainer.scorer.state_dict().items()}, out)
        check()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train a scorer on a frozen pocket-llava.")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write; the log lies beside it")
    parser.add_argument(
        "--model", type=Path, default=HERE / Llava.name, help="folder of the model; default the shipped"
    )
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--prompts", type=int, default=64, help="pictures in a batch")
    parser.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=8, help="processes that make batches")
    parser.add_argument("--questions", type=int, default=240, help="of each world, before and after training")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    recipe = Recipe(args.seed, warmup=20, decay=0.0, log_every=20, check_questions=args.questions)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = ScorerTrainer(Llava(), recipe, Schedule(args.steps), args.peak, device)
    trainer.start(trainer.family.start(folder_weights(args.model)))
    train(trainer, args.prompts, args.out, args.workers, say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
