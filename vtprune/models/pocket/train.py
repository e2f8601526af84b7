# SPDX-License-Identifier: Apache-2.0
"""Train ``pocket-llava`` from scratch on PocketVQA, on one GPU.

``python -m vtprune.models.pocket.train --steps N --minutes M --out DIR [--resume DIR]``

Everything depends on the seed and the step alone (data, noise, learning rate), so a run that was stopped and resumed
sees what an unbroken run would have seen. The state is safetensors shards of at most 15 MiB and one JSON file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import vocab
from .batch import IGNORE, PREFIX, Renderer, TrainingBatches, picture_arrays, scene_targets, text_arrays, text_mask
from .data import KINDS, exam
from .model import ATTENTION, PIXEL_MEAN, PIXEL_STD, Heads, llava_config, packed_attention

SHARDS = 4  # weights and two moments in bf16 are about 45 MiB
STATE_FILE = "state.json"
LOG_FILE = "train_log.jsonl"


@dataclass(frozen=True)
class Recipe:
    """What a training run is, apart from the network; saved with the state.

    ``steps`` fixes the learning-rate schedule: linear warm-up, then cosine to ``floor`` of the peak at the last step.
    """

    steps: int
    seed: int = 0
    batch: int = 256
    peak: float = 1.2e-3
    floor: float = 0.03
    warmup: int = 300
    decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    patch_weight: float = 0.3
    scene_weight: float = 0.1
    log_every: int = 100
    check_every: int = 500
    save_every: int = 1000
    check_questions: int = 768
    test_questions: int = 2000

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return self.peak * min(1.0, (step + 1) / self.warmup) * (self.floor + (1 - self.floor) * cosine)


class Trainer:
    """The network, its optimiser and the step count.

    Parameters
    ----------
    recipe
        The run.
    config
        The network.
    device
        Where to train; on a GPU the forward pass runs in bf16.
    compiled
        Compile both towers.
    """

    def __init__(self, recipe: Recipe, config: LlavaConfig, device: str, compiled: bool):
        torch.manual_seed(recipe.seed)
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, packed_attention)
        self.recipe, self.device, self.step = recipe, torch.device(device), 0
        self.model = LlavaForConditionalGeneration(config).to(self.device)
        self.model.model.language_model.config._attn_implementation = ATTENTION
        self.heads = Heads(config.vision_config.hidden_size).to(self.device)
        self.renderer = Renderer(self.device)
        self.noise = torch.Generator(self.device)
        self.named = dict(self.model.named_parameters()) | {f"heads.{n}": p for n, p in self.heads.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            self.named.values(),
            lr=recipe.peak,
            betas=recipe.betas,
            weight_decay=recipe.decay,
            fused=self.device.type == "cuda",
        )
        self.see = torch.compile(self._see) if compiled else self._see
        self.speak = torch.compile(self._speak) if compiled else self._speak

    def _see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model.model.vision_tower(pixel_values=pixels, output_hidden_states=True)
        return out.hidden_states[self.model.config.vision_feature_layer][:, 1:], out.pooler_output

    def _speak(self, embeddings: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        return self.model.model.language_model(
            inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state

    def forward(self, arrays: dict[str, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run a batch.

        Parameters
        ----------
        arrays
            From ``picture_arrays`` and ``text_arrays``, on the device.
        seed
            Of the pixel noise.

        Returns
        -------
        tuple of Tensor
            Logits float32 [B, L, V] that predict ``arrays["ids"]``; patch features [B, 576, D]; pooled CLS [B, D];
            the coverage of the pictures.
        """
        model, ids = self.model, arrays["ids"]
        # Compiled code is for training only: evaluation has other shapes, and would compile for each anew.
        see, speak = (self.see, self.speak) if torch.is_grad_enabled() else (self._see, self._speak)
        with torch.no_grad():
            coverage = self.renderer.coverage(arrays)
            pixels = self.renderer.pixels(arrays, coverage, self.noise.manual_seed(seed))
            pixels = (pixels - PIXEL_MEAN) / PIXEL_STD
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            patches, pooled = see(pixels)
            embed = model.get_input_embeddings()
            rows = embed(torch.cat([torch.full_like(ids[:, :1], vocab.BOS), ids], 1))
            visual = model.model.multi_modal_projector(patches).to(rows.dtype)
            rows = torch.cat([rows[:, :1], visual, rows[:, 1:]], 1)
            prefix = torch.arange(PREFIX, device=ids.device).expand(len(ids), -1)
            positions = torch.cat([prefix, arrays["positions"]], 1)
            hidden = speak(rows, positions, text_mask(arrays["turn"]))
            logits = model.lm_head(hidden[:, PREFIX - 1 : -1])
        return logits.float(), patches, pooled, coverage

    def train_step(self, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take one optimiser step; return the three losses, still on the device."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(self.step)
        arrays = self.move(arrays)
        logits, patches, pooled, coverage = self.forward(arrays, (recipe.seed << 32) + self.step)
        answer = F.cross_entropy(logits.flatten(0, 1), arrays["labels"].flatten(), ignore_index=IGNORE)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            patch = self.heads.patch_loss(patches, *self.renderer.patch_targets(arrays, coverage))
            whole = self.heads.scene_loss(pooled, scene_targets(arrays))
        loss = answer + recipe.patch_weight * patch + recipe.scene_weight * whole
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.named.values(), recipe.clip)
        self.optimizer.step()
        self.step += 1
        return {"ce": answer.detach(), "aux": patch.detach(), "cls": whole.detach()}

    def move(self, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy a batch to the device."""
        return {name: array.to(self.device, non_blocking=True) for name, array in arrays.items()}

    @torch.no_grad()
    def accuracy(self, batches: Iterable[tuple[list[str], dict[str, Tensor]]]) -> dict[str, float]:
        """Share of questions answered right, each asked alone: per kind, and ``mean`` over the kinds.

        An answer counts when all its tokens and ``</s>`` are the most likely ones, which is what greedy decoding needs.
        """
        right, asked = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
        for number, (kinds, arrays) in enumerate(batches):
            arrays = self.move(arrays)
            logits, *_ = self.forward(arrays, number)
            labels = arrays["labels"]
            hits = ((logits.argmax(-1) == labels) | (labels == IGNORE)).all(1).tolist()
            for kind, hit in zip(kinds, hits, strict=True):
                right[kind] += hit
                asked[kind] += 1
        share = {kind: right[kind] / max(1, asked[kind]) for kind in KINDS}
        return {"mean": sum(share.values()) / len(share), **share}

    def save(self, folder: Path) -> None:
        """Write weights and AdamW moments (bf16), the recipe and the step."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {f"weight/{name}": p.detach() for name, p in self.named.items()}
        for name, p in self.named.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{moment}/{name}"] = self.optimizer.state[p][moment]
        shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
        filled = [0] * SHARDS
        for name, tensor in sorted(state.items(), key=lambda item: -item[1].numel()):
            emptiest = filled.index(min(filled))
            shards[emptiest][name] = tensor.to(torch.bfloat16).cpu().contiguous()
            filled[emptiest] += tensor.numel()
        for number, shard in enumerate(shards):
            save_file(shard, folder / f"state-{number}.safetensors")
        meta = {"step": self.step, "recipe": asdict(self.recipe), "config": self.model.config.to_dict()}
        (folder / STATE_FILE).write_text(json.dumps(meta, indent=1, default=str) + "\n")

    def load(self, folder: Path) -> None:
        """Continue from a saved state.

        Raises
        ------
        ValueError
            If the state belongs to another network or recipe. The number of steps may differ: the schedule is then
            that of the new number from here on.
        """
        meta = json.loads((folder / STATE_FILE).read_text())
        saved = {**meta["recipe"], "steps": self.recipe.steps}
        if saved != json.loads(json.dumps(asdict(self.recipe))):
            raise ValueError(f"{folder} was trained with another recipe: {meta['recipe']}")
        state: dict[str, Tensor] = {}
        for path in sorted(folder.glob("state-*.safetensors")):
            state |= load_file(path)
        wanted = {f"{part}/{name}" for name in self.named for part in ("weight", "exp_avg", "exp_avg_sq")}
        if state.keys() != wanted:
            raise ValueError(f"{folder} holds another network: {len(state.keys() ^ wanted)} tensors differ in name")
        self.step = meta["step"]
        for name, p in self.named.items():
            p.data.copy_(state[f"weight/{name}"])
            self.optimizer.state[p] = {
                "step": torch.tensor(float(self.step), device=p.device),
                "exp_avg": state[f"exp_avg/{name}"].to(p),
                "exp_avg_sq": state[f"exp_avg_sq/{name}"].to(p),
            }


def exam_batches(split: str, count: int, batch: int) -> list[tuple[list[str], dict[str, Tensor]]]:
    """Batches of one picture and one question per row, for ``Trainer.accuracy``, with the kinds of the questions."""
    pairs = list(exam(split, count))
    batches = []
    for start in range(0, count, batch):
        part = pairs[start : start + batch]
        arrays = picture_arrays([s for s, _ in part]) | text_arrays([[q] for _, q in part], [False] * len(part))
        batches.append(([q.kind for _, q in part], arrays))
    return batches


def train(
    trainer: Trainer, out: Path, seconds: float = math.inf, workers: int = 0, stop: int | None = None,
    say: Callable[[str], None] = print,
) -> bool:  # fmt: skip
    """Train until the schedule ends, the time is up or ``stop`` steps are done; save the state and append to the log.

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
        Step at which to stop early.
    say
        Receives each log line.

    Returns
    -------
    bool
        Whether the schedule was finished.
    """
    begun, recipe = time.monotonic(), trainer.recipe
    out.mkdir(parents=True, exist_ok=True)
    last = min(recipe.steps, stop or recipe.steps)
    cuda = trainer.device.type == "cuda"
    gpu = torch.cuda.get_device_name(trainer.device) if cuda else "cpu"
    loader = torch.utils.data.DataLoader(
        TrainingBatches(recipe.batch, recipe.seed),
        batch_size=None,
        sampler=range(trainer.step, last),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=cuda,
    )
    checks = exam_batches("val", recipe.check_questions, recipe.batch)
    with (out / LOG_FILE).open("a") as log:

        def write(row: dict) -> None:
            row = {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}
            line = json.dumps(row)
            log.write(line + "\n")
            log.flush()
            say(line)

        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        write({"event": "start", "step": trainer.step, "gpu": gpu, **versions, **asdict(recipe)})
        mark, marked = time.monotonic(), trainer.step
        for arrays in loader:
            losses = trainer.train_step(arrays)
            step = trainer.step
            if step % recipe.log_every == 0:
                values = {name: float(value) for name, value in losses.items()}
                now = time.monotonic()
                speed = round((step - marked) * recipe.batch / (now - mark))
                mark, marked = now, step
                row = {"step": step, **values, "lr": recipe.rate(step - 1), "img/s": speed}
                write({**row, "seconds": round(now - begun, 1), "gpu": gpu})
            if step % recipe.check_every == 0 or step == recipe.steps:
                write({"event": "val", "step": step, **trainer.accuracy(checks)})
                mark, marked = time.monotonic(), step
            if step % recipe.save_every == 0:
                trainer.save(out)
            if time.monotonic() - begun > seconds:
                break
        trainer.save(out)
        write({"event": "stop", "step": trainer.step, "seconds": round(time.monotonic() - begun, 1)})
        if trainer.step < recipe.steps:
            return False
        for p in trainer.named.values():  # score the weights that are exported
            p.data.copy_(p.to(torch.bfloat16))
        tests = exam_batches("test", recipe.test_questions, recipe.batch)
        write({"event": "test", "questions": recipe.test_questions, **trainer.accuracy(tests)})
    return True


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train pocket-llava from scratch on PocketVQA.")
    parser.add_argument("--steps", type=int, required=True, help="length of the schedule, over all runs")
    parser.add_argument("--minutes", type=float, default=math.inf, help="save and stop after this wall time")
    parser.add_argument("--out", type=Path, required=True, help="folder for the state and the log")
    parser.add_argument("--resume", type=Path, help="folder with the state of an earlier run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=14, help="processes that make batches")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the towers")
    args = parser.parse_args()
    begun = time.monotonic()
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = Trainer(Recipe(args.steps, args.seed), llava_config(), device, not args.no_compile)
    print(f"{sum(p.numel() for p in trainer.model.parameters()) / 1e6:.2f} M parameters on {device}", flush=True)
    if args.resume:
        trainer.load(args.resume)
    left = args.minutes * 60 - (time.monotonic() - begun)
    train(trainer, args.out, left, args.workers, say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
