# SPDX-License-Identifier: Apache-2.0
"""Train a pocket model on one GPU, through the stages of ``plans.STAGES``.

``python -m vtprune.models.pocket.train MODEL --out DIR [--minutes M] [--start FOLDER]``

Run it again with the same ``--out`` and it goes on where it stopped. Everything depends on the seed, the stage and the
step alone (data, noise, learning rate), so a run that was stopped and resumed sees what an unbroken run would have
seen. The state is safetensors shards of at most 15 MiB and one JSON file. ``pocket-llava-next`` and
``pocket-qwen2.5-vl`` start from a folder of ``pocket-llava`` weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import easyvqa, plans
from .batch import IGNORE, Renderer, patch_targets, scene_targets, text_mask
from .data import SIDE, Question
from .families import FAMILIES, Family, Geometry, Seen, folder_weights
from .model import ATTENTION, LOG_FILE, STATE_FILE, Heads, packed_attention, read_state
from .plans import STAGES, Batches, Plan, Stage
from .worlds import exam

SHARDS = 4  # weights and two moments in bf16 are about 45 MiB

#: Worlds that a model is scored on, as ``exam`` names them.
EXAMS = {
    "pocket-llava": ("basic", "extended", "clutter", "pair", "icl", "easy-vqa"),
    "pocket-llava-next": ("basic", "extended", "hires"),
    "pocket-qwen2.5-vl": ("basic", "extended", "clutter", "hires", "pair", "icl", "video", "easy-vqa"),
}


@dataclass(frozen=True)
class Recipe:
    """What all stages of a run share; saved with the state."""

    seed: int = 0
    floor: float = 0.03
    warmup: int = 300
    rewarm: int = 100
    decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    patch_weight: float = 0.3
    scene_weight: float = 0.1
    log_every: int = 100
    check_every: int = 4000
    save_every: int = 500
    check_questions: int = 240
    test_questions: int = 2000

    def rate(self, stage: Stage, step: int, fresh: int = 0) -> float:
        """Learning rate of a step of a stage: linear warm-up, then cosine to ``floor`` of the peak at the last step.

        ``fresh`` is the step at which the optimiser began anew, for want of its moments; it warms up from there.
        """
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / stage.steps)))
        warm = min(1.0, (step - fresh + 1) / (self.rewarm if fresh else self.warmup))
        return stage.peak * warm * (self.floor + (1 - self.floor) * cosine)


@dataclass(frozen=True)
class Check:
    """Questions of one world, each asked alone: batches and the kinds of their rows."""

    world: str
    batches: tuple[tuple[Plan, dict[str, Tensor], tuple[str, ...]], ...]


def _sees(name: str) -> bool:
    """Whether a parameter, or an auxiliary head's, belongs to the part that sees."""
    return "language_model" not in name and "lm_head" not in name


class Trainer:
    """A network in training.

    Parameters
    ----------
    family
        The network.
    recipe, stage
        The run, and the stage that it is in.
    device
        Where to train; on a GPU the forward pass runs in bf16.
    compiled
        Compile both towers.
    """

    def __init__(self, family: Family, recipe: Recipe, stage: Stage, device: str, compiled: bool):
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, packed_attention)
        self.family, self.recipe, self.device, self.step = family, recipe, torch.device(device), 0
        self.model = family.model.to(self.device)
        self.model.model.language_model.config._attn_implementation = ATTENTION
        torch.manual_seed(recipe.seed)
        self.heads = Heads(family.feature_width).to(self.device)
        self.renderer = Renderer(self.device)
        self.noise, self.dropper = torch.Generator(self.device), torch.Generator(self.device)
        self.easy: Tensor | None = None
        self.named = dict(self.model.named_parameters()) | {f"heads.{n}": p for n, p in self.heads.named_parameters()}
        # One shape only, that of most batches: each takes the compiler half a minute.
        self.fast_see = torch.compile(family.see, dynamic=False) if compiled else family.see
        self.fast_speak = torch.compile(self.speak, dynamic=False) if compiled else self.speak
        self.begin(stage)

    def begin(self, stage: Stage) -> None:
        """Enter a stage: a fresh optimiser, and the vision tower frozen or not."""
        self.stage, self.step, self.fresh = stage, 0, 0
        self.untaught = -math.inf  # step at which the heads were new but the encoder was not
        for name, p in self.named.items():
            p.requires_grad_(not (stage.frozen and _sees(name)))
        self.trained = {name: p for name, p in self.named.items() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=stage.peak,
            betas=self.recipe.betas,
            weight_decay=self.recipe.decay,
            fused=self.device.type == "cuda",
        )

    def start(self, weights: dict[str, Tensor]) -> None:
        """Take over weights, by their names in the model; what is not among them starts as it is."""
        if any(_sees(name) for name in weights):
            self.untaught = 0
        for name, tensor in weights.items():
            self.named[name].data.copy_(tensor)

    def speak(self, embeddings: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        return self.model.model.language_model(
            inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state

    @torch.no_grad()
    def draw(self, plan: Plan, arrays: dict[str, Tensor], seed: int) -> tuple[Tensor, Tensor]:
        """Pictures float [P, 3, H, W] in [0, 1], and how much of each pixel a thing covers [P, H, W]."""
        rows, columns = plan.geometry.rows, plan.geometry.columns
        coverage = self.renderer.coverage(arrays, rows, columns)
        pixels = self.renderer.pixels(arrays, coverage, self.noise.manual_seed(seed), rows, columns)
        if "easy" in arrays:
            if self.easy is None:
                self.easy = torch.from_numpy(easyvqa.load("train").pictures).to(self.device)
            taken = arrays["easy"] >= 0
            pixels[taken] = easyvqa.upscale(self.easy[arrays["easy"][taken]], SIDE)
        elif "pixels" in arrays:
            pixels = arrays["pixels"]
        return pixels, coverage

    @torch.no_grad()
    def kept(self, plan: Plan, arrays: dict[str, Tensor], coverage: Tensor, keep: float, seed: int) -> Tensor:
        """Indices int64 [B, S'] of the tokens that the language model sees: all text, part of each picture.

        Half of the prompts lose tokens at random. In the others those with something on them are likelier to stay, as
        pruning methods would have it, more or less so by chance. With ``keep`` 0 only ``<s>`` and the text are left.
        """
        visual, separator = arrays["visual"], arrays["separator"]
        batch, length = arrays["ids"].shape
        if keep == 0:
            text = torch.arange(length - plan.text, length, device=self.device)
            return torch.cat([text.new_zeros(1), text]).expand(batch, -1)
        free = (visual & ~separator).nonzero().squeeze(1).view(plan.pictures, -1)  # [pictures, N]
        count = free.shape[1]
        k = max(16, round(keep * count / 16) * 16)
        generator = self.dropper.manual_seed(seed)
        uniform = torch.rand(batch, plan.pictures, count, device=self.device, generator=generator)
        score = -(-uniform.clamp(1e-6, 1 - 1e-6).log()).log()
        side = math.isqrt(count)
        if plan.geometry.frames == 1 and side * side == count:
            shown = F.adaptive_avg_pool2d(coverage[:, None], side).view(batch, plan.pictures, count) > 0.05
            weight = torch.rand(batch, 1, 1, device=self.device, generator=generator) * 12 - 6
            score = score + shown * weight.clamp_min(0)
        chosen = free[None].expand(batch, -1, -1).gather(2, score.topk(k, -1).indices)
        mask = (~visual | separator).expand(batch, -1).scatter(1, chosen.flatten(1), True)
        return mask.nonzero()[:, 1].view(batch, -1)

    def forward(
        self, plan: Plan, arrays: dict[str, Tensor], seed: int, keep: float = 1.0
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Run a batch.

        Parameters
        ----------
        plan
            Of the batch.
        arrays
            From ``plans.batch``, on the device.
        seed
            Of the pixel noise and the choice of tokens.
        keep
            Fraction of visual tokens that the language model sees.

        Returns
        -------
        tuple
            Logits float32 [n, V] of the tokens that have a label, in the order of the prompts; their labels [n]; the
            auxiliary losses that this batch has: of patches, and of the whole picture.
        """
        training = torch.is_grad_enabled()
        fast = training and not self.stage.frozen and plan == self.stage.plans[0][0]
        see = self.fast_see if fast else self.family.see
        speak = self.fast_speak if fast and keep == 1 else self.speak
        losses: list[Tensor] = []
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")
        if plan.world == "told":
            with half:
                return *self.answers(self.model.get_input_embeddings()(arrays["ids"]), arrays, plan, speak), losses
        pixels, coverage = self.draw(plan, arrays, seed)
        with half:
            with torch.set_grad_enabled(training and not self.stage.frozen):
                seen = self.family.look(pixels, plan.geometry, see)
                if training and not self.stage.frozen and seen.patches is not None:
                    losses = self.auxiliary(plan, arrays, coverage, seen)
            if self.stage.frozen and training:
                seen = replace(seen, visual=seen.visual.detach())
            ids, positions = arrays["ids"], arrays["positions"]
            rows = self.model.get_input_embeddings()(ids).to(seen.visual.dtype)
            if plan.world == "recall":
                glimpsed = torch.zeros_like(rows)
                at = ids == plans.glance(self.family).token
                glimpsed[at] = seen.visual.detach().flatten(0, 1)[arrays["glances"]]
                return *self.answers(torch.where(at[..., None], glimpsed, rows), arrays, plan, speak), losses
            at = arrays["visual"].nonzero().squeeze(1)
            rows = rows.index_copy(1, at, seen.visual.reshape(len(ids), len(at), -1))
            labels, turn = arrays["labels"], arrays["turn"]
            if keep < 1:
                index = self.kept(plan, arrays, coverage, keep, seed)
                rows = rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))
                labels, turn = labels.gather(1, index), turn.gather(1, index)
                if self.family.mrope:
                    index = index.expand(3, -1, -1)
                positions = positions.gather(-1, index)
                if keep == 0:  # as in a prompt that never had a picture
                    positions[..., 1:] -= positions[..., 1:2] - 1
            left = {"positions": positions, "labels": labels, "turn": turn}
            return *self.answers(rows, left, plan, speak), losses

    def answers(
        self, rows: Tensor, arrays: dict[str, Tensor], plan: Plan, speak: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Logits float32 [n, V] of the tokens that have a label, and their labels [n].

        ``rows`` are embeddings [B, S, D]; of ``arrays``, ``positions``, ``labels`` and ``turn`` are used;
        ``speak(rows, positions, mask)`` gives hidden states [B, S, D].
        """
        hidden = speak(rows, arrays["positions"], text_mask(arrays["turn"], plan.text))
        asked = arrays["labels"][:, 1:] != IGNORE
        return self.model.lm_head(hidden[:, :-1][asked]).float(), arrays["labels"][:, 1:][asked]

    def auxiliary(self, plan: Plan, arrays: dict[str, Tensor], coverage: Tensor, seen: Seen) -> list[Tensor]:
        """Losses of what patches and whole pictures show; easy-VQA pictures have none."""
        rows, columns = plan.geometry.rows, plan.geometry.columns
        ours = arrays["easy"] < 0 if "easy" in arrays else slice(None)
        described = {name: arrays[name][ours] for name in ("what", "color", "chars")}
        targets = patch_targets(described, coverage[ours], rows, columns, seen.patch)
        patches, pooled = seen.patches, seen.pooled
        assert patches is not None
        if self.step < self.untaught + 2 * self.recipe.rewarm:
            # The heads are new, the encoder is not: what they have yet to learn must not pull it about.
            patches, pooled = patches.detach(), None if pooled is None else pooled.detach()
        losses = [self.heads.patch_loss(patches[ours], targets)]
        if pooled is not None:
            losses.append(self.heads.scene_loss(pooled[ours], scene_targets(described)))
        return losses

    def train_step(self, plan: Plan, keep: float, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take one optimiser step; return the losses, still on the device."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(self.stage, self.step, self.fresh)
        logits, labels, auxiliary = self.forward(plan, self.move(arrays), (recipe.seed << 32) + self.step, keep)
        answer = F.cross_entropy(logits, labels)
        loss = answer
        for weight, part in zip((recipe.patch_weight, recipe.scene_weight), auxiliary, strict=False):
            loss = loss + weight * part
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.values(), recipe.clip)
        self.optimizer.step()
        self.step += 1
        names = ("aux", "cls")[: len(auxiliary)]
        return {"ce": answer.detach(), **{n: part.detach() for n, part in zip(names, auxiliary, strict=True)}}

    def move(self, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy a batch to the device."""
        return {name: array.to(self.device, non_blocking=True) for name, array in arrays.items()}

    @torch.no_grad()
    def accuracy(self, checks: list[Check], keep: float = 1.0) -> dict[str, float]:
        """Share of questions answered right, each asked alone: per kind, and per world the mean over its kinds.

        An answer counts when all its tokens and ``</s>`` are the most likely ones, which is what greedy decoding needs.
        """
        found: dict[str, float] = {}
        for check in checks:
            hits: dict[str, list[bool]] = {}
            for number, (plan, arrays, kinds) in enumerate(check.batches):
                moved = self.move(arrays)
                logits, labels, _ = self.forward(plan, moved, number, keep)
                right = (logits.argmax(-1) == labels).long()
                rows = (moved["labels"][:, 1:] != IGNORE).nonzero()[:, 0]
                wrong = torch.zeros(len(kinds), dtype=torch.long, device=self.device).index_add_(0, rows, 1 - right)
                for kind, count in zip(kinds, wrong.tolist(), strict=True):
                    hits.setdefault(kind, []).append(count == 0)
            shares = {kind: sum(row) / len(row) for kind, row in sorted(hits.items())}
            found |= {f"{check.world}/mean": sum(shares.values()) / len(shares)}
            found |= {f"{check.world}/{kind}": share for kind, share in shares.items() if len(shares) > 1}
        return found

    def save(self, folder: Path) -> None:
        """Write weights and AdamW moments (bf16), the recipe, the stage and the step."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {f"weight/{name}": p.detach() for name, p in self.named.items()}
        for name, p in self.trained.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in self.optimizer.state[p]:
                    state[f"{moment}/{name}"] = self.optimizer.state[p][moment]
        shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
        filled = [0] * SHARDS
        for name, tensor in sorted(state.items(), key=lambda item: -item[1].numel()):
            emptiest = filled.index(min(filled))
            shards[emptiest][name] = tensor.to(torch.bfloat16).cpu().contiguous()
            filled[emptiest] += tensor.numel()
        meta = {"model": self.family.name, "stage": self.stage.name, "step": self.step, "recipe": asdict(self.recipe)}
        # A run may be killed while it writes, so the old state stands until the new one is whole.
        made = {f"state-{number}.safetensors": shard for number, shard in enumerate(shards)}
        for name, shard in made.items():
            save_file(shard, folder / f"{name}.part")
        (folder / f"{STATE_FILE}.part").write_text(json.dumps(meta, indent=1) + "\n")
        for name in (*made, STATE_FILE):
            (folder / f"{name}.part").replace(folder / name)

    def load(self, folder: Path) -> None:
        """Continue from a saved state, or from one of weights alone: then with a new optimiser that warms up again.

        Raises
        ------
        ValueError
            If the state belongs to another network or recipe.
        """
        meta = json.loads((folder / STATE_FILE).read_text())
        mine = json.loads(json.dumps(asdict(self.recipe)))
        if meta["recipe"] != mine or meta["model"] != self.family.name:
            raise ValueError(f"{folder} was trained with another recipe: {meta['model']}, {meta['recipe']}")
        state = read_state(folder)
        stage = next(s for s in STAGES[self.family.name] if s.name == meta["stage"])
        self.begin(stage)
        weights = {name for name in self.named if not name.startswith("heads.")}
        moments = {f"{moment}/{name}" for name in self.trained for moment in ("exp_avg", "exp_avg_sq")}
        missing = {f"weight/{name}" for name in weights} - state.keys()
        if missing:
            raise ValueError(f"{folder} holds another network: {len(missing)} tensors are missing")
        for name, p in self.named.items():
            if f"weight/{name}" in state:  # a state of weights alone has no heads either
                p.data.copy_(state[f"weight/{name}"])
        self.step = meta["step"]
        if moments <= state.keys():
            for name, p in self.trained.items():
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(self.step), device=p.device),
                    "exp_avg": state[f"exp_avg/{name}"].to(p),
                    "exp_avg_sq": state[f"exp_avg_sq/{name}"].to(p),
                }
        else:
            self.fresh = self.step
        if not any(f"weight/{name}" in state for name in self.named if name.startswith("heads.")):
            self.untaught = self.step


def _easy_batches(family: Family, count: int, batch: int) -> Iterator[tuple[Plan, dict[str, Tensor], tuple[str, ...]]]:
    easy = easyvqa.load("test")
    asked = easy.questions[:: max(1, len(easy.questions) // count)][:count]
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        plan = Plan("easy", len(part), text=16)
        rows = [[Question("easy", text, answer)] for _, text, answer in part]
        arrays = plans.packed(family, [(plans.BLANK,)] * len(part), rows, plan)
        pictures = torch.from_numpy(easy.pictures[[number for number, _, _ in part]])
        yield plan, arrays | {"pixels": easyvqa.upscale(pictures, SIDE)}, ("easy",) * len(part)


def exam_check(family: Family, world: str, split: str, count: int, batch: int = 64) -> Check:
    """Questions of a world, one to a prompt."""
    if world == "easy-vqa":
        return Check(world, tuple(_easy_batches(family, count, batch)))
    batches = []
    asked = list(exam(world, split, count))
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for dialogue in asked:
        pictures = dialogue.turns[-1].pictures
        shape = (pictures[0].rows, pictures[0].columns, len(pictures), len(dialogue.turns))
        groups.setdefault(shape, []).append(dialogue)
    for (rows, columns, pictures, turns), dialogues in groups.items():
        is_clip = dialogues[0].turns[-1].clip
        geometry = Geometry(rows, columns, pictures if is_clip else 1)
        size = max(1, batch // (turns if turns > 1 else pictures if is_clip else 1))
        for first in range(0, len(dialogues), size):
            part = dialogues[first : first + size]
            kinds = tuple(d.kind for d in part)
            if turns > 1:
                plan = Plan("icl", len(part), geometry, turns, 0)
                arrays = plans.demonstrated(family, part, plan)
                last = arrays["labels"].shape[1] - 2  # the answer and </s> of the last turn
                arrays["labels"][:, :last] = IGNORE
                batches.append((plan, arrays, kinds))
                continue
            plan = Plan(world, len(part), geometry, 1 if is_clip else pictures, 31)
            asked_now = [[d.turns[0].question] for d in part]
            batches.append((plan, plans.packed(family, [d.turns[0].pictures for d in part], asked_now, plan), kinds))
    return Check(world, tuple(batches))


def train(
    trainer: Trainer, out: Path, seconds: float = math.inf, workers: int = 0, stop: int | None = None,
    say: Callable[[str], None] = print,
) -> bool:  # fmt: skip
    """Train until the last stage ends, the time is up or ``stop`` steps of the stage are done; save and log.

    Parameters
    ----------
    trainer
        New, or with a loaded state.
    out
        Folder for the state and ``train_log.jsonl``.
    seconds
        Wall time after which no further step is started.
    workers
        Processes that make batches.
    stop
        Step of the stage at which to stop early.
    say
        Receives each log line.

    Returns
    -------
    bool
        Whether all stages were finished.
    """
    begun, recipe, family = time.monotonic(), trainer.recipe, trainer.family
    out.mkdir(parents=True, exist_ok=True)
    cuda = trainer.device.type == "cuda"
    gpu = torch.cuda.get_device_name(trainer.device) if cuda else "cpu"
    stages = STAGES[family.name]
    with (out / LOG_FILE).open("a") as log:

        def write(row: dict[str, Any]) -> None:
            row = {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}
            line = json.dumps(row)
            log.write(line + "\n")
            log.flush()
            say(line)

        for stage in stages[[s.name for s in stages].index(trainer.stage.name) :]:
            if stage.name != trainer.stage.name:
                trainer.begin(stage)
            worlds = ("basic",) if stage.name == "basic" else EXAMS[family.name]
            checks = [exam_check(family, w, "val", recipe.check_questions) for w in worlds if w != "easy-vqa"]
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            begins = {"event": "start", "stage": stage.name, "step": trainer.step, "fresh": trainer.fresh, "gpu": gpu}
            write({**begins, **versions, "steps": stage.steps, "peak": stage.peak, **asdict(recipe)})
            last = min(stage.steps, stop or stage.steps)
            loader = torch.utils.data.DataLoader(
                Batches(family, stage, recipe.seed),
                batch_size=None,
                sampler=range(trainer.step, last),
                num_workers=workers,
                prefetch_factor=4 if workers else None,
                pin_memory=cuda,
            )
            mark, marked, pictures = time.monotonic(), trainer.step, 0
            mean: dict[str, list[Tensor]] = {}
            for plan, keep, arrays in loader:
                for name, value in trainer.train_step(plan, keep, arrays).items():
                    mean.setdefault(name, []).append(value)
                step = trainer.step
                pictures += plan.prompts
                if step % recipe.log_every == 0:
                    values = {name: float(torch.stack(rows).mean()) for name, rows in mean.items()}
                    now = time.monotonic()
                    pace = {"ms": round(1000 * (now - mark) / (step - marked), 1), "prompts": pictures}
                    mark, marked, mean = now, step, {}
                    row = {
                        "stage": stage.name,
                        "step": step,
                        **values,
                        "lr": recipe.rate(stage, step - 1, trainer.fresh),
                        **pace,
                    }
                    write({**row, "seconds": round(now - begun, 1)})
                if step % recipe.save_every == 0:
                    trainer.save(out)
                if step % recipe.check_every == 0 or step == stage.steps:
                    write({"event": "val", "stage": stage.name, "step": step, **trainer.accuracy(checks)})
                    if stage.frozen:
                        row = {"event": "val", "stage": stage.name, "step": step, "keep": "1/9"}
                        write({**row, **trainer.accuracy(checks, 1 / 9)})
                    trainer.save(out)
                    mark, marked = time.monotonic(), step
                if time.monotonic() - begun > seconds:
                    break
            trainer.save(out)
            write({"event": "stop", "stage": stage.name, "step": trainer.step,
                   "seconds": round(time.monotonic() - begun, 1)})  # fmt: skip
            if trainer.step < stage.steps:
                return False
        for p in trainer.named.values():  # score the weights that are exported
            p.data.copy_(p.to(torch.bfloat16))
        tests = [exam_check(family, world, "test", recipe.test_questions) for world in EXAMS[family.name]]
        write({"event": "test", "questions": recipe.test_questions, **trainer.accuracy(tests)})
    return True


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train a pocket model on PocketVQA.")
    parser.add_argument("model", choices=sorted(FAMILIES))
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the state and the log; resumed if it is one"
    )
    parser.add_argument(
        "--start", type=Path, help="folder with weights to start from: pocket-llava's or the model's own"
    )
    parser.add_argument("--stage", help="stage to start with, when --start holds what the stages before it made")
    parser.add_argument("--minutes", type=float, default=math.inf, help="save and stop after this wall time")
    parser.add_argument("--stop", type=int, help="save and stop at this step of the stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=14, help="processes that make batches")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the towers")
    args = parser.parse_args()
    begun = time.monotonic()
    torch.set_float32_matmul_precision("high")
    # The same seed is to give the same run. A rounding error that differs once is a run that differs, a thousand steps
    # later, by more than what a change of the recipe is worth.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    stages = STAGES[args.model]
    stage = next((s for s in stages if s.name == args.stage), stages[0])
    trainer = Trainer(FAMILIES[args.model](), Recipe(args.seed), stage, device, not args.no_compile)
    print(f"{sum(p.numel() for p in trainer.model.parameters()) / 1e6:.2f} M parameters on {device}", flush=True)
    if (args.out / STATE_FILE).exists():
        trainer.load(args.out)
    elif args.start:
        trainer.start(trainer.family.start(folder_weights(args.start)))
    left = args.minutes * 60 - (time.monotonic() - begun)
    train(trainer, args.out, left, args.workers, args.stop, say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
