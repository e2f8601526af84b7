# SPDX-License-Identifier: Apache-2.0
"""Train a scorer for ``IDPruner(importance="scorer")`` on ``pocket-llava``, which stays as it is.

``python -m vtprune.models.pocket.train_scorer --out scorer.safetensors [--steps N] [--prompts N] [--minutes M]``

The scorer and the idea are VisionSelector's (arXiv:2510.16598), which IDPruner (arXiv:2602.13315) takes its importance
from: scores, a differentiable top-k, the cross-entropy of the answers through the frozen model, and a curriculum from
soft to hard. Deviations, each because of what it is for:

- A gate is a bias ``log(gate)`` on its token's key, in every layer. A token of gate 1 is there, one of gate 0 is gone
  for all others, as if it had been dropped. A gate that multiplies the token's embedding is undone by the RMSNorm in
  front of the attention: only the smallest gates would do anything.
- What is selected in training is what IDPruner will select, diversity included; the authors train the scorer as if its
  top-k were kept, and add diversity afterwards. The values at which maximal marginal relevance picks its tokens never
  rise, and no token that is left has a larger one: picks are the top-k of these values. So the soft top-k is taken of
  ``lambda * importance - (1 - lambda) * (largest cosine to what was picked before)``, whose second part is a constant
  to autograd.
- The top-k is that of values with mean 0 and deviation 1 in each picture, divided by a temperature that falls. How hard
  the selection is depends on the step alone then, and the scorer cannot soften it with small scores. It begins at 0.3
  already: with gates that are all alike nothing is pruned, because the softmax of the attention divides by their sum.
  The authors raise the weight of a regulariser instead (from 0.1 to 2).
- The scorer first learns to foretell the logits of the vision tower's CLS token, the importance that IDPruner takes
  without a scorer, and goes on from there. These first steps need no language model.
- The authors train at one budget, a fifth. Here it falls from 1/2 to 1/18, and then is drawn anew for each batch, so
  that the order is right from the first few tokens on.
- Of all checks on validation questions, the best one's weights are written.

The pictures are of PocketVQA's training split, under a seed of their own: the model was not trained on them.

Everything depends on the seed and the step alone, on a GPU up to the rounding of its kernels. Beside the weights
(fp16), the run writes a log with the suffix ``.jsonl`` and its state with ``.state``: the same command goes on from it.
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
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...pruners.idpruner import IDPruner
from ...pruners.scorer import Scorer, soft_topk
from ..base import cls_row
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
CHECKED = (1 / 9, 1 / 18)
CHECK_WORLDS = ("basic", "extended")
LAMBDA = IDPruner.mmr_lambda

#: Scenes of 6 x 6 cells and their questions, taking turns; None is a picture of easy-VQA.
WORLDS = (
    (data.scene, data.candidates),
    (extended_scene, extended_candidates),
    (data.scene, data.candidates),
    (clutter_scene, clutter_candidates),
    (data.scene, data.candidates),
    (extended_scene, extended_candidates),
    (extended_scene, extended_candidates),
    None,
)


@dataclass(frozen=True)
class Schedule:
    """What share of the tokens is kept, and how soft the top-k is.

    Attributes
    ----------
    steps
        Of the whole run, after those in which it learns from the CLS token.
    taught
        Steps in which it learns from the CLS token.
    widest, low, high
        The budget falls from ``widest`` to ``low``, by the same factor each step, and then is drawn between ``low`` and
        ``high``, evenly in its logarithm.
    fall
        Share of the steps in which it falls.
    soft, hard
        First and last temperature, in deviations of the scores; it falls by the same factor each step.
    """

    steps: int
    taught: int = 300
    widest: float = 1 / 2
    low: float = 1 / 18
    high: float = 1 / 6
    fall: float = 0.25
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


class Lessons(torch.utils.data.Dataset[Any]):
    """Batches by step: the plan, the budget, and pictures with their questions as ``plans.packed`` gives them."""

    def __init__(self, family: Family, plan: Plan, schedule: Schedule, seed: int):
        self.family, self.plan, self.schedule, self.seed = family, plan, schedule, seed

    def __getitem__(self, step: int) -> tuple[Plan, float, dict[str, Tensor]]:
        first, scenes, asked, easy = step * self.plan.prompts, [], [], []
        for i in range(first, first + self.plan.prompts):
            rng = random.Random(f"scorer/{self.seed}/{i}/questions")
            number, world = -1, WORLDS[i % len(WORLDS)]
            if world is None:
                shown = plans.easy_questions()
                number = rng.randrange(len(shown))
                scene, questions = plans.BLANK, rng.sample(shown[number], min(8, len(shown[number])))
            else:
                scene = world[0]("train", i, self.seed + FRESH)
                questions = data.in_turn(rng, world[1](scene, rng))[:8]
            scenes.append((scene,))
            asked.append(questions)
            easy.append(number)
        arrays = plans.packed(self.family, scenes, asked, self.plan) | {"easy": torch.tensor(easy)}
        return self.plan, self.schedule.keep(max(0, step - self.schedule.taught), self.seed), arrays


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


def pick_values(importance: Tensor, visual: Tensor, count: int) -> Tensor:
    """Values whose top `count` are the picks of maximal marginal relevance with ``LAMBDA``.

    Parameters
    ----------
    importance
        ``[P, N]`` in [0, 1]; the gradient goes to them.
    visual
        ``[P, N, D]`` tokens.
    count
        Picks per picture.

    Returns
    -------
    Tensor
        ``[P, N]``: of a pick the value when it was picked, of the others the value that they are left with.
    """
    with torch.no_grad():
        unit = F.normalize(visual.float(), dim=-1)
        gram = unit @ unit.transpose(1, 2)
        base, closest = LAMBDA * importance, torch.full_like(importance, -1.0)
        held, free = torch.zeros_like(importance), torch.ones_like(importance, dtype=torch.bool)
        pick = importance.argmax(1, keepdim=True)
        for _ in range(count):
            held.scatter_(1, pick, closest.gather(1, pick))
            free.scatter_(1, pick, False)
            closest = torch.maximum(closest, gram.gather(1, pick[..., None].expand(-1, -1, gram.shape[2]))[:, 0])
            pick = (base - (1 - LAMBDA) * closest).masked_fill(~free, -torch.inf).argmax(1, keepdim=True)
        held = torch.where(free, closest, held)
    return LAMBDA * importance - (1 - LAMBDA) * held


class ScorerTrainer(Trainer):
    """A scorer in training; with gradients its selection is soft, without it is what IDPruner keeps.

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
        self.best, self.best_weights = -1.0, self.weights()
        super().__init__(family, recipe, Stage("scorer", schedule.taught + schedule.steps, peak, ()), device, False)
        ALL_ATTENTION_FUNCTIONS.register(GATED, gated_attention)
        self.model.model.language_model.config._attn_implementation = GATED
        tower = getattr(self.model.model.vision_tower, "vision_model", self.model.model.vision_tower)
        self.cls: Tensor | None = None  # logits of the CLS token in the last forward of the tower, [P, N]
        tower.encoder.layers[-2].self_attn.register_forward_pre_hook(self._note_cls, with_kwargs=True)

    def _note_cls(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        self.cls = cls_row(module, args[0] if args else kwargs["hidden_states"], softmax=False)

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

    def weights(self) -> dict[str, Tensor]:
        """A copy of the scorer's weights on the CPU, fp16, which halves the file."""
        return {name: p.detach().to("cpu", torch.float16, copy=True) for name, p in self.scorer.state_dict().items()}

    def scores(self, visual: Tensor) -> Tensor:
        """Score of each token: fp32 [P, N], from the tokens [P, N, D]."""
        pictures, count = visual.shape[:2]
        return self.scorer(visual.flatten(0, 1), (count,) * pictures).view(pictures, count)

    def log_gates(self, visual: Tensor, keep: float) -> Tensor:
        """Logarithm of the gate of each token: fp32 [P, N], from the tokens [P, N, D]."""
        scores = self.scores(visual)
        count = max(1, math.floor(keep * scores.shape[1] + 1e-6))
        low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
        values = pick_values((scores - low) / (high - low + 1e-6), visual, count)
        if not torch.is_grad_enabled():
            return torch.full_like(scores, GONE).scatter(1, values.topk(count, dim=1).indices, 0.0)
        spread = (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True).clamp_min(1e-6)
        temperature = self.schedule.temperature(self.step - self.schedule.taught)
        return soft_topk(spread / temperature, keep * scores.shape[1]).clamp_min(FAINT).log()

    def forward(
        self, plan: Plan, arrays: dict[str, Tensor], seed: int, keep: float = 1.0
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """As in `Trainer`, with the tokens that the scorer lets through; prompts have one picture."""
        ids, at = arrays["ids"], arrays["visual"].nonzero().squeeze(1)
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")
        visual = self.seen(plan, arrays, seed)
        with torch.no_grad(), half:
            rows = self.model.get_input_embeddings()(ids).to(visual.dtype).index_copy(1, at, visual)
        gates = torch.zeros(ids.shape, device=self.device).index_copy(1, at, self.log_gates(visual, keep))

        def speak(rows: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
            return self.model.model.language_model(
                inputs_embeds=rows, position_ids=positions, attention_mask=mask, log_gate=gates, use_cache=False
            ).last_hidden_state

        with half:
            return *self.answers(rows, arrays, plan, speak), []

    @torch.no_grad()
    def seen(self, plan: Plan, arrays: dict[str, Tensor], seed: int) -> Tensor:
        """Visual tokens [P, N, D]."""
        pixels, _ = self.draw(plan, arrays, seed)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.family.look(pixels, plan.geometry, self.family.see).visual

    def train_step(self, plan: Plan, keep: float, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        """As in `Trainer`; the first steps are of `taught_step`."""
        if self.step < self.schedule.taught:
            return self.taught_step(plan, arrays)
        if self.step == self.schedule.taught:  # another loss: the old moments say nothing about it
            self.optimizer.state.clear()
            self.fresh = self.step
        return super().train_step(plan, keep, arrays)

    def taught_step(self, plan: Plan, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        """Learn the CLS token's logits, up to scale and offset in each picture."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.peak
        found = self.scores(self.seen(plan, self.move(arrays), (self.recipe.seed << 32) + self.step))
        assert self.cls is not None
        one, two = (x - x.mean(1, keepdim=True) for x in (found, self.cls.float()))
        loss = 1 - F.cosine_similarity(one, two, dim=1).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.values(), self.recipe.clip)
        self.optimizer.step()
        self.step += 1
        return {"cls": loss.detach()}

    def keep_state(self, path: Path, seconds: float) -> None:
        """Write all that `restore` needs; the old state stands until the new one is whole."""
        moments = self.optimizer.state_dict()
        tensors = {f"scorer/{name}": value for name, value in self.scorer.state_dict().items()}
        tensors |= {f"best/{name}": value for name, value in self.best_weights.items()}
        for number, own in moments["state"].items():
            tensors |= {f"optimizer/{number}/{name}": value for name, value in own.items()}
        facts = {"step": self.step, "best": self.best, "seconds": seconds, "run": self.run()}
        facts["groups"] = moments["param_groups"]
        # Copies: safetensors does not take tensors that share memory.
        copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        save_file(copies, path.with_suffix(".part"), {"facts": json.dumps(facts)})
        path.with_suffix(".part").replace(path)

    def run(self) -> dict[str, Any]:
        """What must not change while a run goes on."""
        return json.loads(json.dumps({"recipe": asdict(self.recipe), **asdict(self.schedule), "peak": self.stage.peak}))

    def restore(self, path: Path) -> float:
        """Go on from a state; the seconds that the run has taken.

        Raises
        ------
        ValueError
            If the state is of another run.
        """
        found: dict[str, Any] = {"scorer": {}, "best": {}, "optimizer": {}}
        with safe_open(path, framework="pt", device=str(self.device)) as file:
            facts = json.loads(file.metadata()["facts"])
            for key in file.keys():  # noqa: SIM118  # it is no mapping
                part, _, name = key.partition("/")
                found[part][name] = file.get_tensor(key)
        if facts["run"] != self.run():
            raise ValueError(f"{path} is the state of another run ({facts['run']}); choose another --out or remove it")
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in found["optimizer"].items():
            number, _, name = key.partition("/")
            moments.setdefault(int(number), {})[name] = value
        self.scorer.load_state_dict(found["scorer"])
        self.optimizer.load_state_dict({"state": moments, "param_groups": facts["groups"]})
        self.step, self.best, self.best_weights = facts["step"], facts["best"], found["best"]
        self.fresh = self.schedule.taught if self.step > self.schedule.taught else 0
        return float(facts["seconds"])


def train(
    trainer: ScorerTrainer, prompts: int, out: Path, workers: int = 0, seconds: float = math.inf,
    check_every: int = 200, say: Callable[[str], None] = print,
) -> bool:  # fmt: skip
    """Run the schedule, or go on with it; write the best scorer to ``out``, a log and the state beside it.

    Parameters
    ----------
    trainer
        A new one.
    prompts
        Pictures in a batch, each with up to eight questions.
    out
        A safetensors file; replaced.
    workers
        Processes that make batches.
    seconds
        Wall time after which no further step is begun.
    check_every
        Steps between two checks on validation questions.
    say
        Receives each log line.

    Returns
    -------
    bool
        Whether the schedule was finished.
    """
    begun, recipe, family = time.monotonic(), trainer.recipe, trainer.family
    cuda = trainer.device.type == "cuda"
    out.parent.mkdir(parents=True, exist_ok=True)
    log_file, state_file = out.with_suffix(".jsonl"), out.with_suffix(".state")
    spent = trainer.restore(state_file) if state_file.exists() else 0.0
    total, taught = trainer.stage.steps, trainer.schedule.taught
    checks: list[Check] = [exam_check(family, w, "val", recipe.check_questions) for w in CHECK_WORLDS]
    loader = torch.utils.data.DataLoader(
        Lessons(family, Plan("scorer", prompts), trainer.schedule, recipe.seed),
        batch_size=None,
        sampler=range(trainer.step, total),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=cuda,
    )
    with log_file.open("a" if trainer.step else "w") as log:

        def write(row: dict[str, Any]) -> None:
            row = {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}
            log.write(json.dumps(row) + "\n")
            log.flush()
            say(json.dumps(row))

        def check() -> None:
            means = []
            for keep in CHECKED:
                found = trainer.accuracy(checks, keep)
                means += [found[f"{world}/mean"] for world in CHECK_WORLDS]
                write({"event": "val", "step": trainer.step, "keep": keep, **found})
            if sum(means) / len(means) > trainer.best:
                trainer.best, trainer.best_weights = sum(means) / len(means), trainer.weights()
                write({"event": "best", "step": trainer.step, "mean": trainer.best})
            trainer.keep_state(state_file, spent + time.monotonic() - begun)
            save_file(trainer.best_weights, out)

        gpu = torch.cuda.get_device_name(trainer.device) if cuda else "cpu"
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        shape = {"prompts": prompts, "peak": trainer.stage.peak, **asdict(trainer.schedule)}
        write({"event": "start", "step": trainer.step, "gpu": gpu, **versions, **shape, "seed": recipe.seed,
               "decay": recipe.decay, "warmup": recipe.warmup, "clip": recipe.clip, "betas": recipe.betas})  # fmt: skip
        losses: list[dict[str, Tensor]] = []
        for plan, keep, arrays in loader:
            temperature = trainer.schedule.temperature(max(0, trainer.step - taught))
            losses.append(trainer.train_step(plan, keep, arrays))
            if trainer.step % recipe.log_every == 0 or trainer.step in (taught, total):
                name = next(iter(losses[-1]))
                mean = float(torch.stack([row[name] for row in losses if name in row]).mean())
                row = {"step": trainer.step, name: mean, "keep": keep, "temperature": temperature}
                write({**row, "seconds": round(spent + time.monotonic() - begun, 1)})
                losses = []
            if trainer.step >= taught and (trainer.step - taught) % check_every == 0 and trainer.step < total:
                check()
            if time.monotonic() - begun > seconds:
                break
        check()
        write({"event": "stop", "step": trainer.step, "best": trainer.best})
    return trainer.step == total


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train a scorer on a frozen pocket-llava.")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write; the log lies beside it")
    parser.add_argument(
        "--model", type=Path, default=HERE / Llava.name, help="folder of the model; default the shipped"
    )
    parser.add_argument("--steps", type=int, default=1200, help="of training through the language model")
    parser.add_argument(
        "--taught", type=int, default=Schedule.taught, help="steps before, in which the CLS token teaches"
    )
    parser.add_argument("--prompts", type=int, default=64, help="pictures in a batch")
    parser.add_argument("--peak", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=8, help="processes that make batches")
    parser.add_argument("--questions", type=int, default=480, help="validation questions of each world in a check")
    parser.add_argument("--check-every", type=int, default=200, help="steps between two checks")
    parser.add_argument("--minutes", type=float, default=math.inf, help="save and stop after this wall time")
    args = parser.parse_args()
    begun = time.monotonic()
    torch.set_float32_matmul_precision("high")
    recipe = Recipe(args.seed, warmup=20, decay=0.0, log_every=20, check_questions=args.questions)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = ScorerTrainer(Llava(), recipe, Schedule(args.steps, args.taught), args.peak, device)
    trainer.start(trainer.family.start(folder_weights(args.model)))
    left = 60 * args.minutes - (time.monotonic() - begun)
    done = train(
        *(trainer, args.prompts, args.out, args.workers, left, args.check_every), lambda line: print(line, flush=True)
    )
    raise SystemExit(0 if done else 3)


if __name__ == "__main__":
    main()
