# SPDX-License-Identifier: Apache-2.0
"""Does VASparse make a model name fewer things that are not there, and what does it cost?

    python -m benchmarks.vasparse                                # on two CPU cores: about five minutes
    python -m benchmarks.vasparse --pictures 200 --tokens 256    # on a GPU

The pocket models cannot list freely what they see: they were trained on answers alone, and end each after a word or
two. So the list is asked for. Each picture is put into the cache once, the cache is repeated, and on it "is there a red
circle ?" is asked for every colour and shape. What is answered with yes is what the model names. `benchmarks/README.md`
explains the columns.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import vtprune
from vtprune.budget import parse_keep
from vtprune.decoding import vasparse
from vtprune.eval import controls, runner, tasks
from vtprune.eval.runner import current_commit as commit
from vtprune.models import find_family
from vtprune.models.pocket.data import COLORS, SHAPES, Scene, article, questions, render, scene
from vtprune.models.pocket.worlds import clutter_scene

OFF: dict[str, Any] = {"alpha": 0, "keep": 1.0, "beta": 0}
#: Name -> options of `vasparse`; None: no block at all.
METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "contrast": OFF | {"alpha": 0.1},
    "contrast alpha=1": OFF | {"alpha": 1.0},
    "sink": OFF | {"beta": 0.1},
    "select": OFF | {"keep": 0.9},
    "select visual": OFF | {"keep": 0.9, "select": "visual"},
    "vasparse": {},
    "vasparse select=both": {"select": "both"},
}
#: What is shown: which pictures, and what is done to them.
SHOWN = ("basic", "clutter", "1/9 of basic", "1/18 of basic")
PAIRS = [(color, shape) for color in COLORS for shape in SHAPES]


def text(color: str, shape: str) -> str:
    """The question, in the words that the models know."""
    return f"is there {article(color)} {color} {shape} ?"


def pictures(shown: str, split: str, count: int) -> Iterator[tuple[Scene, Image.Image]]:
    """Scenes and what the model sees of them."""
    for index in range(count):
        found = clutter_scene(split, index, 0) if shown == "clutter" else scene(split, index)
        yield found, render(found)


@contextmanager
def decoding(model: Any, options: dict[str, Any] | None) -> Iterator[LogitsProcessorList]:
    """`vasparse` with these options, or nothing."""
    if options is None:
        yield LogitsProcessorList()
    else:
        with vasparse(model, **options) as processors:
            yield processors


@torch.inference_mode()
def ask(
    model: Any, processor: Any, inputs: dict[str, Tensor], tails: Tensor, methods: list[str]
) -> dict[str, np.ndarray]:
    """Which questions are answered with yes under each method, ``[N]`` bool.

    Parameters
    ----------
    inputs
        One prompt up to the end of its picture.
    tails
        ``[N, q]`` int64, the words of each question.
    """
    yes = processor.tokenizer.convert_tokens_to_ids("yes")
    ids = torch.cat([inputs["input_ids"].expand(len(tails), -1), tails], 1)
    # Methods that differ in the contrast alone share the forward.
    groups: dict[tuple[tuple[str, Any], ...], list[str]] = {}
    for method in methods:
        options = OFF if METHODS[method] is None else METHODS[method]
        groups.setdefault(tuple((k, v) for k, v in options.items() if k != "alpha"), []).append(method)
    said = {}
    for group, members in groups.items():
        with decoding(model, dict(group, alpha=0)):
            cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(len(tails))
            logits = model(input_ids=tails, past_key_values=cache, use_cache=True).logits[:, -1].float()
        for method in members:
            options = METHODS[method]
            alpha = 0 if options is None else options.get("alpha", 0.1)
            with decoding(model, OFF | {"alpha": alpha}) as processors:
                said[method] = (processors(ids, logits).argmax(-1) == yes).cpu().numpy()
    return said


def prompts(model: Any, processor: Any, picture: Image.Image) -> tuple[dict[str, Tensor], Tensor]:
    """The prompt up to the end of the picture, and what follows it for each of `PAIRS`, ``[48, q]``."""

    def example(shown: Image.Image, words: str) -> tasks.Example:
        parts = ({"type": "image", "image": shown}, {"type": "text", "text": words})
        return tasks.Example("listing", "", "exist", (tasks.user(*parts),), "")

    family = find_family(model)
    inputs = controls.prepare(family, processor, [example(picture, text(*PAIRS[0]))])
    ids = inputs["input_ids"][0]
    words = processor.tokenizer(
        [text(*pair) for pair in PAIRS], add_special_tokens=False, return_tensors="pt"
    ).input_ids
    words = words.to(ids.device)
    begin = len(ids) - words.shape[1]
    assert torch.equal(ids[begin:], words[0]), "the chat template puts something after the question"
    cut = {
        k: v[:, :begin] if k in ("input_ids", "attention_mask", "mm_token_type_ids") else v for k, v in inputs.items()
    }
    return cut, words


def listing(
    model: Any, processor: Any, shown: str, split: str, count: int, methods: list[str]
) -> Iterator[dict[str, Any]]:
    """One row for each method: what it named that is not there."""
    named: dict[str, list[np.ndarray]] = {method: [] for method in methods}
    truth, asked = [], []
    for found, picture in pictures(shown, split, count):
        there = {(s.color, s.shape) for s in found.shapes}
        truth.append(np.array([pair in there for pair in PAIRS]))
        own = {q.text for q in questions(found, limit=64) if q.kind.endswith("exist")}
        asked.append(np.array([text(*pair) in own for pair in PAIRS]))
        inputs, tails = prompts(model, processor, picture)
        part = shown.split(" of ")[0]
        pruned = vtprune.using(model, "random", keep=parse_keep(part)) if part != shown else nullcontext()
        with runner.encode_once(model), pruned:
            for method, said in ask(model, processor, inputs, tails, methods).items():
                named[method].append(said)
    there, own = np.stack(truth), np.stack(asked)
    for method in methods:
        said = np.stack(named[method])
        wrong = said & ~there
        rate, margin = share(wrong, ~there)
        missed, missed_margin = share(~said & there, there)
        yield {
            "shown": shown,
            "method": method,
            "pictures": count,
            "absent": int((~there).sum()),
            "false_yes": rate,
            "false_yes_pm": margin,
            "false_no": missed,
            "false_no_pm": missed_margin,
            "exist_false_yes": share(wrong & own, ~there & own)[0],
            "exist_right": share((said == there) & own, own)[0],
            "wrong_per_picture": round(float(wrong.sum(1).mean()), 3),
            "wrong_of_named": round(float(wrong.sum() / max(1, said.sum())), 4),
            "pictures_with_wrong": round(float(wrong.any(1).mean()), 4),
        }


def share(hits: np.ndarray, of: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """Hits as a share of what they are of, and half the width of its 95 % bootstrap interval over pictures."""
    hit, all_of = hits.sum(1), of.sum(1)
    drawn = np.random.default_rng(0).integers(0, len(hit), (draws, len(hit)))
    rates = hit[drawn].sum(1) / np.maximum(1, all_of[drawn].sum(1))
    low, high = np.quantile(rates, [0.025, 0.975])
    return round(float(hit.sum() / max(1, all_of.sum())), 4), round(float(high - low) / 2, 4)


@torch.inference_mode()
def speed(model: Any, processor: Any, split: str, tokens: int, runs: int, methods: list[str]) -> dict[str, float]:
    """Tokens a second (on a CPU: of one core's time), prefill left out: median of `runs`, the methods taking turns."""
    _, picture = next(pictures("basic", split, 1))
    inputs, tails = prompts(model, processor, picture)
    ids = torch.cat([inputs["input_ids"], tails[:1]], 1)
    whole = {k: v for k, v in inputs.items() if k not in ("attention_mask", "mm_token_type_ids")} | {"input_ids": ids}
    if "mm_token_type_ids" in inputs:
        whole["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tails[:1])], 1)
    whole["attention_mask"] = torch.ones_like(ids)

    class Clock(LogitsProcessor):
        """When each token was there."""

        def __init__(self) -> None:
            self.ticks: list[float] = []

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if scores.is_cuda:
                torch.cuda.synchronize()
            self.ticks.append(time.perf_counter() if scores.is_cuda else time.process_time())
            return scores

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a CPU: its own time on one core, so that nothing else on the machine counts
    found_rates: dict[str, list[float]] = {method: [] for method in methods}
    for run in range(runs + 1):
        for method in methods:
            clock = Clock()
            with decoding(model, METHODS[method]) as processors:
                model.generate(
                    **whole,
                    max_new_tokens=tokens + 1,
                    min_new_tokens=tokens + 1,
                    do_sample=False,
                    logits_processor=LogitsProcessorList([*processors, clock]),
                )
            if run:  # the first one warms up
                found_rates[method].append(tokens / (clock.ticks[-1] - clock.ticks[0]))
    torch.set_num_threads(threads)
    return {method: round(statistics.median(rates), 2) for method, rates in found_rates.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-llava")
    parser.add_argument("--pictures", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens that speed is measured over")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--split", default="test", choices=["val", "test"])
    parser.add_argument("--shown", nargs="+", default=list(SHOWN), choices=SHOWN)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args(arguments)

    model, processor = vtprune.load(given.model, dtype=torch.float32)
    where = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
    out = given.out or Path(__file__).parent / "results" / f"vasparse-{where.lower().replace(' ', '-')}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "device": where,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": given.commit or commit(),
        "model": given.model,
        "split": given.split,
    }
    fast = speed(model, processor, given.split, given.tokens, given.runs, given.methods)
    lines = []
    for shown in given.shown:
        for row in listing(model, processor, shown, given.split, given.pictures, given.methods):
            lines.append({**about, **row, "tokens_per_s": fast[row["method"]]})
            print({key: value for key, value in lines[-1].items() if key not in about}, flush=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
