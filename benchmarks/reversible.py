# SPDX-License-Identifier: Apache-2.0
"""Does it help that a token may come back? Reversible selection beside pruning for good, at equal work.

    python -m benchmarks.reversible                                  # one GPU: minutes; run it again and it goes on
    python -m benchmarks.reversible --questions 4 --keep 1/4 --out build/x    # anywhere, to try it

`tokensparse` saves attention and no FFN, pruning for good saves both, so equal tokens are not equal work. For every
setting of `tokensparse`, each method that prunes for good gets the budget at which the language model's whole prefill,
and the one at which its attention alone (projections and products), costs as many FLOPs, worked out from the lengths of
the world's first prompts. Chance at the same work stands beside them: `random` after the layer after which `fastv`
drops. Where sparse layers follow each other, tokensparse projects the keys of those that sit out once more, to rank
them; that is not counted. Test split, paired differences, 95 % intervals; `benchmarks/README.md` explains the columns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import vtprune
from benchmarks.answers import RESULTS, ROWS, Answers, answer, batch_of, rows_file, write
from benchmarks.neighbours import PRICED
from benchmarks.papers import rows_of
from benchmarks.side_by_side import Job, default_workers, loaded, side_by_side
from vtprune.engine.report import prefill_flops
from vtprune.eval import controls, runner, tasks
from vtprune.eval.runner import current_commit as commit
from vtprune.models import find_family
from vtprune.registry import Pruner

MODEL, WORLDS, KEEPS = "pocket-qwen2.5-vl", ("icl", "video"), ("1/2", "1/4", "1/9")
REVERSIBLE = ("tokensparse", "tokensparse layers=[2,3,4,5]")
FOR_GOOD = ("fastv", "pyramiddrop", "random layer=1")
KINDS = ("overall", "attention")


class Prompt(NamedTuple):
    """Rows of one prompt, and visual tokens of each of its pictures."""

    rows: int
    images: tuple[int, ...]


class Work(NamedTuple):
    """FLOPs of a prefill of the language model, head left out."""

    overall: float
    attention: float


def work(pruner: Pruner | None, budget: vtprune.Budget, prompt: Prompt, config: Any) -> Work:
    """What a prompt costs under a method inside the language model, or under none."""
    ffn = 6 * config.hidden_size * config.intermediate_size
    stages = {} if pruner is None else {s.layer + 1: s for s in pruner.stages() if s.layer is not None}
    rows, overall, attention = prompt.rows, 0, 0
    for layer in range(config.num_hidden_layers):
        attending = rows
        if layer in stages:
            assert pruner is not None
            own = pruner.stage_budget(budget, stages[layer])
            left = prompt.rows - sum(prompt.images) + sum(map(own.image_count, prompt.images))
            attending, rows = left, rows if stages[layer].reversible else left
        one = prefill_flops(rows, config, attending)
        overall, attention = overall + one, attention + one - rows * ffn
    return Work(overall, attention)


def share(method: str, keep: str, prompts: Sequence[Prompt], config: Any) -> Work:
    """The same as a share of the dense model, mean over prompts."""
    settings = runner.Method.parse(method).config(keep)
    pruner = settings.pruner().fit(config.num_hidden_layers)
    pairs = [
        (work(pruner, settings.budget(), prompt, config), work(None, settings.budget(), prompt, config))
        for prompt in prompts
    ]
    return Work(*(statistics.fmean(own[i] / dense[i] for own, dense in pairs) for i in range(2)))


def matching(method: str, kind: str, target: Work, prompts: Sequence[Prompt], config: Any) -> str:
    """The budget at which `method` costs as much as `target`, in thousandths; the nearest there is."""
    steps = [f"{i / 1000:g}" for i in range(1, 1000)]
    low, high = 0, len(steps) - 1
    while low < high:  # work grows with the budget
        middle = (low + high) // 2
        enough = getattr(share(method, steps[middle], prompts, config), kind) >= getattr(target, kind)
        low, high = (low, middle) if enough else (middle + 1, high)
    near = steps[max(0, low - 1) : low + 1]
    return min(near, key=lambda keep: abs(getattr(share(method, keep, prompts, config), kind) - getattr(target, kind)))


@torch.inference_mode()
def prompts_of(model: str, world: str) -> list[Prompt]:
    """The first prompts of a world."""
    loaded_model, processor = loaded(model)
    family, found = find_family(loaded_model), []
    for example in tasks.get(f"pocketvqa/{world}").examples("test", PRICED, 0):
        inputs = controls.prepare(family, processor, [example])
        found.append(Prompt(int(inputs["attention_mask"].sum()), vtprune.encode(loaded_model, inputs).image_lens))
    return found


def plan(given: argparse.Namespace, world: str) -> tuple[list[Job], list[dict[str, Any]]]:
    """Jobs of a world, and its table without the answers: one row for each method, budget and what it is matched to."""
    prompts, config = prompts_of(MODEL, world), loaded(MODEL)[0].config.text_config
    rows: list[dict[str, Any]] = [{"method": "dense", "keep": "1", "work": Work(1.0, 1.0), "equal": "", "to": None}]
    keeps: dict[str, list[str]] = {method: list(given.keep) for method in REVERSIBLE}
    for method in REVERSIBLE:
        for keep in given.keep:
            target = share(method, keep, prompts, config)
            rows.append({"method": method, "keep": keep, "work": target, "equal": "", "to": None})
            for other in FOR_GOOD:
                for kind in KINDS:
                    own = matching(other, kind, target, prompts, config)
                    keeps.setdefault(other, []).append(own)
                    cost = share(other, own, prompts, config)
                    rows.append({"method": other, "keep": own, "work": cost, "equal": kind, "to": (method, keep)})
    size = min(batch_of(MODEL, world), given.questions)
    jobs = []
    for number, (method, own) in enumerate(keeps.items()):  # each has budgets of its own
        names = ["dense", method] if not number else [method]
        common = {"model": MODEL, "world": world, "methods": names, "keeps": list(dict.fromkeys(own)), "batch": size}
        folder = given.rows / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        for seed, first in enumerate(range(0, given.questions, size)):
            count = min(size, given.questions - first)
            jobs.append({**common, "seed": seed, "count": count, "commit": given.commit, "folder": folder})
    return jobs, rows


def table(answers: Answers, world: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a world with accuracies, and what is gained by coming back."""
    found = []
    for row in rows:
        column, to = (row["method"], row["keep"]), row["to"]
        told = {(r["method"], r["keep"]): r for r in rows_of(answers, MODEL, world, lambda _, c=column: c)}
        own, other = told[column], told[to] if to else None
        line = {key: own[key] for key in ("model", "world", "method", "keep", "tokens")}
        line |= {"flops": round(row["work"].overall, 4), "attention_flops": round(row["work"].attention, 4)}
        line |= {key: own[key] for key in ("n", "accuracy", "low", "high")}
        line |= {"equal": row["equal"], "to": " at ".join(to) if to else ""}
        for end in ("", "_low", "_high"):
            line[f"reversible_minus_this{end}"] = other[f"difference{end}"] if other else ""
        found.append({**line, **{key: own[key] for key in ("gpu", "torch", "transformers", "commit")}})
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS))
    parser.add_argument("--keep", nargs="+", default=list(KEEPS), help="budgets of tokensparse; the others follow")
    parser.add_argument("--questions", type=int, default=480, help="of each world")
    parser.add_argument("--workers", type=int, default=None, help="processes; default 14 on a GPU, 1 on a CPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no more jobs after this time")
    parser.add_argument("--rows", type=Path, default=ROWS.parent / "reversible", help="folder of all answers")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--commit", default=None)
    given = parser.parse_args(arguments)
    given.commit = given.commit or commit()
    planned = {world: plan(given, world) for world in given.worlds}
    jobs = [job for own, _ in planned.values() for job in own]
    begun, done = time.monotonic(), 0
    workers = min(len(jobs), given.workers or default_workers())
    for job, seconds in side_by_side(answer, jobs, workers, 60 * given.minutes):
        done += 1
        print(f"{done}/{len(jobs)} {job['world']} {job['methods'][-1]} {job['seed']}: {seconds:.1f} s", flush=True)
    print(f"{done} of {len(jobs)} jobs in {time.monotonic() - begun:.0f} s", flush=True)
    if done < len(jobs):
        return 1
    lines = []
    for world, (own, rows) in planned.items():
        lines += table(Answers([rows_file(job) for job in own]), world, rows)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    path = given.out / f"reversible-{name.lower().replace(' ', '-')}.csv"
    write(path, lines)
    for line in lines:
        print({key: value for key, value in line.items() if key not in ("model", "gpu", "torch", "transformers")})
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
