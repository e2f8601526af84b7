# SPDX-License-Identifier: Apache-2.0
"""Train a router of `vtprune.lens.skiprouter` for a checkpoint, which stays as it is.

``python -m vtprune.training.skiprouter --model pocket-llava --task pocketvqa/basic pocketvqa/extended --out FILE``

The unpruned model answers the questions once (`lessons`). Then each layer's output for a visual token is multiplied by
that token's gate, the soft top-k of the router's scores; the cross-entropy of the answers trains the router. The
temperature falls, and the share of the tokens is drawn anew for each batch, so one training serves all.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..lens.skiprouter import Router, features
from ..models import find_family
from ..models.loading import load
from ..pruners.scorer import soft_topk
from . import lessons as school
from .lessons import Batch

LOW, HIGH = 1 / 18, 1 / 2
SOFT, HARD = 0.5, 0.05
FRESH = 2_000_003


@contextmanager
def gated(model: Any, router: Router, batch: Batch, keep: float, temperature: float) -> Iterator[None]:
    """Within this block, a forward over all rows of `batch` is routed, softly; with temperature 0 as it will be used.

    The last row of a prompt is the one that says the first token of the answer.
    """
    family = find_family(model)
    last = (batch.labels != -100).int().argmax(1)
    stack, gates = ExitStack(), {}
    flat = (batch.owner[:, None] * batch.valid.shape[1] + batch.slots)[batch.sound]
    counts = batch.sound.sum(1)

    def choose(index: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        scores = torch.full(batch.sound.shape, -torch.inf, device=hidden.device)
        for i, sample in enumerate(batch.owner.tolist()):
            rows = hidden[sample, batch.slots[i, : int(counts[i])]].detach()
            scores[i, : len(rows)] = router(index, features(rows, hidden[sample, last[sample]].detach(), keep))
        goal = (counts * keep + 1e-6).floor().clamp_min(1)
        if temperature:
            sound = batch.sound
            mean = scores.masked_fill(~sound, 0).sum(1, keepdim=True) / counts[:, None]
            centred = (scores - mean).masked_fill(~sound, 0)
            spread = centred / (centred.square().sum(1, keepdim=True) / counts[:, None]).sqrt().clamp_min(1e-6)
            member = soft_topk((spread / temperature).masked_fill(~sound, -torch.inf), goal)
        else:
            rank = scores.sort(dim=1, descending=True, stable=True).indices.argsort(1)
            member = (rank < goal[:, None]).float()
        whole = torch.ones(batch.valid.numel(), device=hidden.device).index_put((flat,), member[batch.sound])
        gates[index] = whole.view(*batch.valid.shape, 1).to(hidden.dtype)

    def weigh(index: int, _module: nn.Module, _args: Any, out: Any) -> Any:
        hidden = (out[0] if isinstance(out, tuple) else out) * gates[index]
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    with stack:
        for i, layer in enumerate(family.lm.layers):
            hook = layer.register_forward_pre_hook(lambda *given, i=i: choose(i, *given), with_kwargs=True)
            stack.callback(hook.remove)
            for part in (layer.self_attn, layer.mlp):
                stack.callback(part.register_forward_hook(lambda *given, i=i: weigh(i, *given)).remove)
        yield


def train(
    model: Any, lessons: list[school.Lesson], steps: int, size: int, peak: float, seed: int, seconds: float,
    say: Callable[[str], None] = print,
) -> Router:  # fmt: skip
    """Train a router until the last step, or until `seconds` are over."""
    begun = time.monotonic()
    model.requires_grad_(False).eval()
    table = model.get_input_embeddings().weight.detach()
    torch.manual_seed(seed)
    router = Router(len(find_family(model).lm.layers)).to(table.device)
    optimizer = torch.optim.AdamW(router.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.0)
    losses: list[Tensor] = []
    step = 0
    while (part := max(step / steps, (time.monotonic() - begun) / seconds)) < 1:
        rng = random.Random(f"skiprouter/{seed}/{step}")
        keep = LOW * (HIGH / LOW) ** rng.random()
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * part))
        batch = school.collate([lessons[rng.randrange(len(lessons))] for _ in range(size)], table)
        with gated(model, router, batch, keep, SOFT * (HARD / SOFT) ** part):
            loss = school.cross_entropy(*school.answer_logits(model, batch))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(router.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        step += 1
        if step % 50 == 0:
            say(json.dumps({"step": step, "loss": round(float(torch.stack(losses[-50:]).mean()), 5)}))
    return router.requires_grad_(False).eval()


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-llava", help="embedded model, folder or hub name")
    parser.add_argument("--task", nargs="+", required=True, help="tasks whose questions are learnt from, in turn")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--examples", type=int, default=1500, help="questions of each task")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--peak", type=float, default=5e-3, help="highest learning rate")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of wall time, from the start of the command")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw pictures")
    parser.add_argument("--cache", default="cpu", help="device on which lessons wait")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    begun = time.monotonic()
    for name in ("examples", "steps", "batch"):
        school.check_count(f"--{name}", getattr(given, name))

    def say(line: str) -> None:
        print(f"[{time.monotonic() - begun:6.1f} s] {line}", flush=True)

    model, processor = load(given.model)
    made = school.make(
        model, processor, given.task, given.examples, seed=FRESH + given.seed, batch=given.batch,
        workers=given.workers, cache=given.cache, say=say,
    )  # fmt: skip
    left = max(1.0, 60 * given.minutes - (time.monotonic() - begun))
    router = train(model, made, given.steps, given.batch, given.peak, given.seed, left, say)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().cpu().contiguous() for name, p in router.state_dict().items()}, given.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
