# SPDX-License-Identifier: Apache-2.0
"""Skipping layers against dropping tokens: a trained router, chance, and the best of the six methods that drop.

    python -m benchmarks.skiprouter --router router.safetensors       # one GPU, about two minutes
    python -m benchmarks.skiprouter --router router.safetensors --questions 6 --worlds basic   # anywhere

`skiprouter-<gpu>.csv`: accuracy of `pocket-llava` on test questions by world, kind of question, way and budget, what
the trained router is better by, with 95 % intervals, and `flops_share`, the language model's prefill over the dense
one: a layer that gathers its rows, were there one, for ways that skip; what is measured to be left, for those that
drop. At the same budget skipping costs more, because every token still gives its key and value to every layer.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import vtprune
from benchmarks.answers import RESULTS, write
from benchmarks.selector import compared
from vtprune.eval import controls, runner, tasks
from vtprune.eval.runner import current_commit as commit
from vtprune.lens.skiprouter import Router, share, skiprouter
from vtprune.models import find_family

MODEL, WORLDS, KEEPS = "pocket-llava", ("basic", "extended"), ("1/2", "1/4", "1/9", "1/18")
DROPS = ("random", "idpruner", "zoo", "globalcom2", "catp", "corematching mode=top_k", "embedlens")
OURS = "skiprouter"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router", type=Path, required=True, help="what vtprune.training.skiprouter wrote")
    parser.add_argument("--questions", type=int, default=480, help="of each world")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS))
    parser.add_argument("--methods", nargs="+", default=list(DROPS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", default=None)
    given = parser.parse_args(arguments)
    model, processor = vtprune.load(MODEL, dtype=torch.float32)
    depth = model.config.text_config.num_hidden_layers
    torch.manual_seed(0)
    indifferent = Router(depth)
    routers = {OURS: Router.load(given.router), "skip: untrained router": Router(depth)}
    routers["skip: first rows"] = indifferent
    indifferent.second.data.zero_()  # all scores are equal, so the lowest index wins
    source = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "torch": torch.__version__,
        "transformers": transformers.__version__, "commit": given.commit or commit(),
    }  # fmt: skip
    table = []
    for world in given.worlds:
        table += of_world(model, processor, world, routers, given, source)
    write(given.out / f"skiprouter-{source['device'].lower().replace(' ', '-')}.csv", table)
    return 0


@torch.no_grad()
def of_world(
    model: Any, processor: Any, world: str, routers: dict[str, Router], given: argparse.Namespace,
    source: dict[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one world."""
    family, task = find_family(model), tasks.get(world if world == "easy-vqa" else f"pocketvqa/{world}")
    ways: dict[tuple[str, str], Callable[[], AbstractContextManager[Any]]] = {}
    ways["dense", "1"] = lambda: vtprune.using(model, None)
    for keep, (name, router) in itertools.product(KEEPS, routers.items()):
        ways[name, keep] = lambda router=router, keep=keep: skiprouter(model, router, runner.parse_keep(keep))
    for keep, method in itertools.product(KEEPS, given.methods):
        config = runner.Method.parse(method).config(keep)
        ways[method, keep] = lambda config=config: vtprune.using(model, config)
    right: dict[tuple[str, str], list[bool]] = {way: [] for way in ways}
    shares: dict[tuple[str, str], float] = {("dense", "1"): 1.0}
    kinds: list[str] = []
    examples = task.examples("test", given.questions, 0)
    while batch := list(itertools.islice(examples, given.batch)):
        kinds += [example.kind for example in batch]
        inputs = controls.prepare(family, processor, batch)
        rows = int(inputs["attention_mask"].sum(1).max())
        with runner.encode_once(model):
            for way, enter in ways.items():
                with enter():
                    texts = runner.generate(model, processor, inputs, task.max_new_tokens)
                    if way not in shares and way[0] in given.methods:
                        report = vtprune.report(model)
                        shares[way] = report.flops_after / report.flops_before
                right[way] += [text == example.answer for text, example in zip(texts, batch, strict=True)]
                if way[0] in routers:
                    shares[way] = share(model.config.text_config, rows, 576, runner.parse_keep(way[1]))
        print(f"{world}: {len(kinds)} of {given.questions} questions", flush=True)
    columns = [(*way, 576 * (1.0 if way[1] == "1" else runner.parse_keep(way[1]))) for way in right]
    correct = np.array([right[way] for way in right]).T
    table = compared(correct, kinds, columns, OURS, {"model": MODEL, "world": world}, source, OURS)
    for row in table:
        row["flops_share"] = round(shares[row["method"], row["keep"]], 4)
        if row["kind"] == "all":
            shown = ("world", "method", "keep", "accuracy", "low", "high", f"{OURS}_minus", "flops_share")
            print({key: row[key] for key in shown}, flush=True)
    return table


if __name__ == "__main__":
    raise SystemExit(main())
