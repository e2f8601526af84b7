# SPDX-License-Identifier: Apache-2.0
"""A smaller model ranks the visual tokens of a larger one: how well, and when it is cheaper than what it saves.

    python -m benchmarks.draft --train-minutes 2.5      # one GPU, about five minutes in all
    python -m benchmarks.draft --questions 12 --worlds basic   # anywhere, without the narrow draft, to see it run

The target is `pocket-llava`. Drafts: the model itself (what no draft can beat), its first layers alone (an early exit),
and, with ``--train-minutes``, a narrow model that is trained first: the target's own vision tower, projector and
embeddings, frozen, under 3 layers of 2 heads of 32 and 192 neurons, trained from random weights on PocketVQA's training
split. It is not shipped; the table is what is kept. `mmr_lambda=1` is the top-k of the draft's attention.

`draft-<gpu>.csv`: accuracy by world, kind of question, method and budget, and what the best draft is better by, with
95 % intervals (the best is chosen per world on the very questions that are tabled, which flatters it); `draft_share` is
what the draft's language model costs, as a share of the target's dense prefill, and `saved_share` what the target
saves; a draft pays where the first is smaller. `draft_ms` and `saved_ms` are measured, on single prompts, the vision
tower left out on both sides, since the drafts here share the target's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import vtprune
from benchmarks.answers import RESULTS, write
from benchmarks.selector import compared
from vtprune.draft import break_even, draft_row, drafting
from vtprune.eval import controls, runner, tasks
from vtprune.eval.runner import current_commit as commit
from vtprune.models import find_family
from vtprune.models.pocket.families import Llava
from vtprune.models.pocket.model import llava_config
from vtprune.models.pocket.plans import Batches, Plan, Stage
from vtprune.models.pocket.train import Recipe, Trainer

MODEL, WORLDS, KEEPS = "pocket-llava", ("basic", "extended"), ("1/9", "1/18")
#: Chance, a method without a question, and the six that came first.
OTHERS = ("random", "scope", "idpruner", "zoo", "globalcom2", "catp", "corematching mode=top_k", "embedlens")
LAMBDAS = (1.0, 0.5)
TIMED = 5


class Narrow(Llava):
    """`pocket-llava` with a small language model of the same width of rows."""

    name = "narrow-llava"

    def __init__(self) -> None:
        config = llava_config(layers=3, heads=2, ffn=192)
        config.text_config.head_dim = 32
        self.model = transformers.LlavaForConditionalGeneration(config)
        self.feature_width = config.vision_config.hidden_size


def trained(model: Any, minutes: float, say: Callable[[str], None], workers: int, seed: int = 0) -> Any:
    """A narrow draft, trained for so long on the GPU, or on the CPU to see it run."""
    begun = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    family = Narrow()
    prompts = 256 if device == "cuda" else 4
    stage = Stage("draft", 1_000_000, 2e-3, ((Plan("mixed", prompts), 1.0),), frozen=True)
    trainer = Trainer(family, Recipe(seed, warmup=100), stage, device, False)
    trainer.start({
        name: p.detach().float() for name, p in model.named_parameters()
        if "language_model" not in name or "embed_tokens" in name
    })  # fmt: skip
    loader = torch.utils.data.DataLoader(
        Batches(family, stage, seed), batch_size=None, sampler=range(10**6), num_workers=workers,
        prefetch_factor=4 if workers else None,
    )  # fmt: skip
    losses = []
    for plan, keep, arrays in loader:
        part = (time.monotonic() - begun) / (60 * minutes)
        if part >= 1:
            break
        # The rate follows the clock, which is what ends the run.
        trainer.stage = Stage(stage.name, 10**6, 2e-3 * 0.5 * (1 + math.cos(math.pi * part)), stage.plans, frozen=True)
        losses.append(trainer.train_step(plan, keep, arrays)["ce"])
        if len(losses) % 250 == 0:
            say(f"draft: step {len(losses)}, loss {float(torch.stack(losses[-50:]).mean()):.4f}")
    say(f"draft: {len(losses)} steps in {time.monotonic() - begun:.0f} s")
    family.model.model.language_model.config._attn_implementation = "sdpa"
    return family.model.to(model.device, model.dtype).eval()


def milliseconds(run: Callable[[], Any]) -> float:
    """Median of a few runs, after one."""
    found = []
    for _ in range(TIMED + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(1000 * (time.perf_counter() - begun))
    return statistics.median(found[1:])


@torch.no_grad()
def language_ms(model: Any, rows: int, layers: int | None = None) -> float:
    """Time of the first `layers` decoder layers over so many rows of one prompt."""
    lm = find_family(model).lm
    whole = lm.layers
    embeds = torch.randn(1, rows, lm.config.hidden_size, device=model.device, dtype=model.dtype)
    mask = torch.ones(1, rows, dtype=torch.long, device=model.device)
    lm.layers = whole[: len(whole) if layers is None else layers]
    try:
        return milliseconds(lambda: lm(inputs_embeds=embeds, attention_mask=mask, use_cache=False))
    finally:
        lm.layers = whole


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-minutes", type=float, default=0.0, help="of the narrow draft; 0: none")
    parser.add_argument("--questions", type=int, default=480, help="of each world")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS))
    parser.add_argument("--methods", nargs="+", default=list(OTHERS))
    parser.add_argument("--workers", type=int, default=14 if torch.cuda.is_available() else 0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", default=None)
    given = parser.parse_args(arguments)
    model, processor = vtprune.load(MODEL, dtype=torch.float32)
    depth = model.config.text_config.num_hidden_layers
    drafts: dict[str, tuple[Any, tuple[int, ...], int]] = {
        "itself": (model, tuple(range(depth - 1)), depth - 1),
        **{f"first {n} layers": (model, tuple(range(n)), n) for n in (1, 2, 3, 4)},
    }
    if given.train_minutes:
        narrow = trained(model, given.train_minutes, lambda line: print(line, flush=True), given.workers)
        drafts["narrow"] = (narrow, (0, 1), 2)
    source = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "torch": torch.__version__,
        "transformers": transformers.__version__, "commit": given.commit or commit(),
    }  # fmt: skip
    table = []
    for world in given.worlds:
        table += of_world(model, processor, world, drafts, given, source)
    where = source["device"].lower().replace(" ", "-")
    write(given.out / f"draft-{where}.csv", table)
    return 0


@torch.no_grad()
def of_world(
    model: Any, processor: Any, world: str, drafts: dict[str, tuple[Any, tuple[int, ...], int]],
    given: argparse.Namespace, source: dict[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one world."""
    family, task = find_family(model), tasks.get(world if world == "easy-vqa" else f"pocketvqa/{world}")
    examples = task.examples("test", given.questions, 0)
    right: dict[tuple[str, str], list[bool]] = {}
    kinds: list[str] = []
    alone: list[bool] = []  # whether the narrow draft answers by itself
    rows = 0
    while batch := list(itertools.islice(examples, given.batch)):
        kinds += [example.kind for example in batch]
        inputs = controls.prepare(family, processor, batch)
        rows = inputs["input_ids"].shape[1]

        def note(column: tuple[str, str], batch: list[tasks.Example] = batch, inputs: Any = inputs) -> None:
            texts = runner.generate(model, processor, inputs, task.max_new_tokens)
            found = [text == example.answer for text, example in zip(texts, batch, strict=True)]
            right.setdefault(column, []).extend(found)

        with runner.encode_once(model):
            note(("dense", "1"))
            for method, keep in itertools.product(given.methods, KEEPS):
                with vtprune.using(model, runner.Method.parse(method).config(keep)):
                    note((method, keep))
        for name, (draft, layers, _) in drafts.items():
            seen = draft_row(draft, inputs, layers)
            for weight, keep in itertools.product(LAMBDAS, KEEPS):
                config = runner.Method.parse(f"idpruner importance=draft mmr_lambda={weight}").config(keep)
                with vtprune.using(model, config), drafting(model, seen, inputs):
                    note((f"draft: {name}, mmr_lambda={weight:g}", keep))
        if "narrow" in drafts:
            texts = runner.generate(drafts["narrow"][0], processor, inputs, task.max_new_tokens)
            alone += [text == example.answer for text, example in zip(texts, batch, strict=True)]
        print(f"{world}: {len(kinds)} of {given.questions} questions", flush=True)
    tokens = {"1": 576.0, **{keep: 576 * runner.parse_keep(keep) for keep in KEEPS}}
    columns = [(*column, tokens[column[1]]) for column in right]
    correct = np.array([right[column] for column in right]).T
    best = max((c for c in right if c[0].startswith("draft: ")), key=lambda c: sum(right[c]))[0]
    table = compared(correct, kinds, columns, best, {"model": MODEL, "world": world}, source, "best_draft")
    if alone:
        print(json.dumps({"world": world, "the narrow draft alone answers": float(np.mean(alone))}))
    dense = break_even(model.config.text_config, model.config.text_config, rows, 0)[0]
    whole = language_ms(model, rows)
    for row in table:
        row |= dict.fromkeys(("draft_share", "saved_share", "draft_ms", "saved_ms"), "")
        name = row["method"].removeprefix("draft: ").rpartition(",")[0]
        if row["method"].startswith("draft: ") and row["kind"] == "all":
            draft, _, layers = drafts[name]
            kept = rows - 576 + int(576 * runner.parse_keep(row["keep"]))
            texts = (model.config.text_config, draft.config.text_config)
            cost, saved = break_even(*texts, rows, kept, layers)
            row |= {"draft_share": round(cost / dense, 4), "saved_share": round(saved / dense, 4)}
            row |= {"draft_ms": round(language_ms(draft, rows, layers), 3)}
            row |= {"saved_ms": round(whole - language_ms(model, kept), 3)}
    for row in table:
        if row["kind"] == "all":
            shown = ("world", "method", "keep", "accuracy", "low", "high", "draft_share", "saved_share", "draft_ms")
            print({key: row[key] for key in (*shown, "saved_ms")}, flush=True)
    return table


if __name__ == "__main__":
    raise SystemExit(main())
