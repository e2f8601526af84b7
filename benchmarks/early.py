# SPDX-License-Identifier: Apache-2.0
"""What ``tower_keep`` costs in answers and gives in time: patches that leave the vision tower half-way.

    python -m benchmarks.early                           # pocket-llava: nine minutes of one core
    python -m benchmarks.early --shape llava-1.5-7b      # time alone, at that shape with random weights, on a GPU

Each line is one method and budget with one ``tower_keep`` after one block. Accuracy stands beside the same questions
with the whole tower (``tower_keep=1``): ``gain`` is the paired difference with its 95 % interval. Times are medians of
single requests, lines taking turns in one process: the vision tower with what brings its rows back, and everything from
pixels to the first logits; ratios are to the line with the whole tower.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import vtprune
from vtprune.bench import shapes
from vtprune.bench.clocks import Clock
from vtprune.budget import parse_keep
from vtprune.eval import controls, runner, stats, tasks
from vtprune.eval.runner import current_commit as commit
from vtprune.eval.table import score_of
from vtprune.models import find_family

SHARES = (1.0, 0.75, 0.5, 0.25)


@dataclass
class Line:
    """A method and a budget, with what the tower drops; milliseconds of its runs."""

    method: str
    keep: str
    share: float = 1.0
    layer: int | None = None
    compile: str | None = None
    vision: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    left: int | None = None
    out: int = 0
    ran_as: str = ""

    @property
    def label(self) -> str:
        """As `vtprune.eval` writes methods with options."""
        return self.method if self.layer is None else f"{self.method} tower_keep={self.share} tower_layer={self.layer}"

    def config(self) -> vtprune.PruneConfig:
        return vtprune.PruneConfig(
            self.method, parse_keep(self.keep), compile=self.compile, tower_keep=self.share, tower_layer=self.layer
        )


def lines(methods: Sequence[str], keeps: Sequence[str], layers: Sequence[int], compile: str | None) -> list[Line]:
    plans = [(1.0, None), *itertools.product(SHARES[1:], layers)]
    return [
        Line(method, keep, share, layer, compile)
        for method, keep in itertools.product(methods, keeps)
        for share, layer in plans
    ]


@torch.inference_mode()
def time_them(model: Any, inputs: Sequence[dict[str, Any]], table: Sequence[Line], rounds: int, warm_up: int) -> None:
    """Fill in times and counts. Lines take turns; each turn is a request of its own."""
    clock, tower = Clock(model.device), find_family(model).inner.vision_tower
    for turn in range(warm_up + rounds):
        for line in table:
            handle = vtprune.apply(model, line.config())
            marks: list[Any] = []
            hooks = [  # registered last: before the tower's own work begins, and after its rows are brought back
                tower.register_forward_pre_hook(lambda *_, marks=marks: marks.append(clock.mark())),
                tower.register_forward_hook(lambda *_, marks=marks: marks.append(clock.mark())),
            ]
            given = inputs[turn % len(inputs)]
            start = clock.mark()
            model(**given, use_cache=True, logits_to_keep=1)
            end = clock.mark()
            clock.wait()
            for hook in hooks:
                hook.remove()
            if turn >= warm_up:
                line.vision.append(clock.milliseconds(*marks))
                line.total.append(clock.milliseconds(start, end))
            report = handle.report()
            line.left, line.out = (
                report.tokens_in if report.tower_left is None else report.tower_left,
                report.tokens_out,
            )
            line.ran_as = "; ".join(f"{part} {how.split(' ')[0].strip(':;')}" for part, how in report.compiled.items())
    vtprune.remove(model)


def time_columns(line: Line, whole: Line) -> dict[str, Any]:
    vision, total = statistics.median(line.vision), statistics.median(line.total)
    return {
        "method": line.method,
        "keep": line.keep,
        "tower_keep": line.share,
        "tower_layer": "" if line.layer is None else line.layer,
        "compile": line.compile or "",
        "ran_as": line.ran_as,
        "tower_left": line.left,
        "tokens_out": line.out,
        "runs": len(line.total),
        "vision_ms": round(vision, 3),
        "vision_ratio": round(vision / statistics.median(whole.vision), 4),
        "ttft_ms": round(total, 3),
        "ttft_ratio": round(total / statistics.median(whole.total), 4),
    }


def whole_of(line: Line, table: Sequence[Line]) -> Line:
    """The line with the whole tower."""
    same = (line.method, line.keep, line.compile)
    return next(one for one in table if (one.method, one.keep, one.compile) == same and one.layer is None)


def answers(model: Any, processor: Any, table: Sequence[Line], given: argparse.Namespace) -> list[runner.Row]:
    methods, keeps = (list(dict.fromkeys(getattr(line, name) for line in table)) for name in ("label", "keep"))
    with tempfile.TemporaryDirectory() as folder:
        return runner.run(
            *(model, processor, given.tasks, methods, keeps, given.rows or Path(folder) / "rows.jsonl"),
            **{"split": "test", "count": given.questions, "batch": given.batch, "name": given.model, "say": print},
        )


def accuracy_columns(rows: Sequence[runner.Row], line: Line, whole: Line) -> dict[str, Any]:
    """Mean over kinds, and the paired difference to the whole tower, in points of accuracy from 0 to 1."""
    found = [
        {row["id"]: row for row in rows if (row["method"], row["keep"]) == (one.label, one.keep)}
        for one in (line, whole)
    ]
    kinds = [row["kind"] for row in found[0].values()]
    own, other = (np.asarray([score_of(rows[name]) for name in found[0]]) for rows in found)
    mean = stats.accuracy(own[:, None], kinds)[0]
    gain = stats.difference(own, other, kinds)
    names = ("accuracy", "low", "high", "gain", "gain_low", "gain_high")
    return {name: round(value, 4) for name, value in zip(names, (*mean, *gain), strict=True)}


def markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table of docs/bench.md: accuracy with the whole tower, gains without; ratios are medians over the lines."""
    columns = [(r["task"], r["method"], r["keep"]) for r in rows]
    columns = list(dict.fromkeys(columns))
    heads = [f"{task.split('/')[-1]}, `{method}` {keep}" for task, method, keep in columns]
    out = [
        f"| tower_keep | after block | tower | first token | {' | '.join(heads)} |",
        f"|---|---|---|---|{'---|' * len(columns)}",
    ]
    for share, layer in dict.fromkeys((r["tower_keep"], r["tower_layer"]) for r in rows):
        these = {
            (r["task"], r["method"], r["keep"]): r
            for r in rows
            if (r["tower_keep"], r["tower_layer"]) == (share, layer)
        }
        ratios = [
            f"{statistics.median(float(r[name]) for r in these.values()):.2f}"
            for name in ("vision_ratio", "ttft_ratio")
        ]
        cells = []
        for column in columns:
            r = {k: float(v) for k, v in these[column].items() if k.startswith(("accuracy", "gain"))}
            if layer == "":
                cells.append(f"{100 * r['accuracy']:.1f}")
                continue
            cell = f"{100 * r['gain']:+.1f} [{100 * r['gain_low']:+.1f}, {100 * r['gain_high']:+.1f}]"
            cells.append(f"**{cell}**" if r["gain_high"] < 0 or r["gain_low"] > 0 else cell)
        out.append(f"| {float(share):g} | {layer} | {' | '.join([*ratios, *cells])} |")
    return out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-llava")
    parser.add_argument("--shape", help=f"time alone, random weights: {', '.join(shapes.PRESETS)}")
    parser.add_argument("--tasks", nargs="+", default=["pocketvqa/basic", "pocketvqa/clutter"])
    parser.add_argument("--questions", type=int, default=150)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--methods", nargs="+", default=["idpruner", "norm"])
    parser.add_argument("--keep", nargs="+", default=["1/4", "1/9"])
    parser.add_argument("--layers", nargs="+", type=int, help="blocks after which patches go; default 1/3 and 2/3 deep")
    parser.add_argument("--samples", type=int, nargs="+", default=[1], help="with --shape: requests in a batch")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=Path, help="JSONL of every answer, which an interrupted run goes on from")
    parser.add_argument("--commit", default=None)
    parser.add_argument("--table", type=Path, help="only print the table of a file that was written before")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args(arguments)
    if given.table:
        with given.table.open(encoding="utf-8") as file:
            print("\n".join(markdown(list(csv.DictReader(file)))))
        return 0

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    about = {
        "device": where,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": given.commit or commit(),
        "threads": torch.get_num_threads(),
        "model": given.shape or given.model,
    }
    if given.shape:
        model, processor = shapes.build(given.shape, device), None
    else:
        model, processor = vtprune.load(given.model, device=device, dtype=torch.float32)
    depth = find_family(model).config.vision_config.num_hidden_layers
    layers = given.layers or [depth // 3 - 1, 2 * depth // 3 - 1]

    out: list[dict[str, Any]] = []
    if given.shape:
        for batch, compile in itertools.product(given.samples, (None, "graph") if device.type == "cuda" else (None,)):
            table = lines(given.methods[:1], given.keep[-1:], layers, compile)
            time_them(model, [shapes.make_inputs(model, batch)], table, given.rounds, 4)
            out += [{**about, "samples": batch, **time_columns(line, whole_of(line, table))} for line in table]
    else:
        table = lines(given.methods, given.keep, layers, None)
        rows = answers(model, processor, table, given)
        for task in given.tasks:
            first = itertools.islice(tasks.get(task).examples("test", given.rounds, 0), given.rounds)
            inputs = [controls.prepare(find_family(model), processor, [example]) for example in first]
            for line in table:
                line.vision, line.total = [], []
            time_them(model, inputs, table, given.rounds, 1)
            mine = [row for row in rows if row["task"] == task]
            for line in table:
                whole = whole_of(line, table)
                beside = {"task": task, "questions": given.questions}
                out.append({**about, **beside, **time_columns(line, whole), **accuracy_columns(mine, line, whole)})
    path = given.out or Path(__file__).parent / "results" / f"early-{where.lower().replace(' ', '-')}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(out[0]))
        writer.writeheader()
        writer.writerows(out)
    for row in out:
        print({key: value for key, value in row.items() if key not in about})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
