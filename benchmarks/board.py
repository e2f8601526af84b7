# SPDX-License-Identifier: Apache-2.0
"""The board: accuracy and measured time of every method on the pocket models, as tables, a page and a picture.

    python -m benchmarks.board --full       # one GPU: all methods at three budgets; run it again and it goes on
    python -m benchmarks.board --whole --models pocket-llava --rows A    # and 1/18 and worst ends; a part of it
    python -m benchmarks.board --merge A B C                             # parts to one board: what is committed
    python -m benchmarks.board --small      # two CPU cores: one model, 8 methods, 50 questions of each task
    python -m benchmarks.board --ci         # two methods, 20 questions
    python -m benchmarks.board --once       # what encoding once saves: seconds of a sweep, and of each row alone
    python -m benchmarks.board --draw       # pages and picture once more, from the committed tables

It is `vtprune eval` and `vtprune board` without a command line of typer's, and compares methods with one another
(`claims`). Answers stay in ``--rows``; ``board.csv``, ``overall.csv``, ``pairs.csv``, ``clock.csv`` (what the runs
took), ``about.json``, ``index.html`` and ``board.png`` go to ``--out``. `benchmarks/README.md` has them.
"""

from __future__ import annotations

import argparse
import csv
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import claims
from benchmarks.answers import write
from vtprune.errors import InputError
from vtprune.eval import board, page, runner
from vtprune.eval.sweep import EXAMS, Request, load_model, processors, sweep
from vtprune.eval.table import Row

HERE = Path(__file__).parent
ROWS = HERE.parent / "build" / "board"
KEEPS = ("1/2", "1/4", "1/9", "1/18")
THREE = KEEPS[:3]
TIMED = "1/9"  # whose time the tables of the guide have
SMALL = ("norm", "divprune", "idpruner", "visionzip", "scope", "cdpruner", "fastv", "tome")
#: Of a folder of answers: what each run took.
CLOCK = "clock.jsonl"
#: Below it stand tables that are made.
MARK = "<!-- python -m benchmarks.board --draw -->"
SETS = {
    "full": (tuple(EXAMS), ("all",), 300, THREE),
    "whole": (tuple(EXAMS), ("all", *(f"worst of={name}" for name in claims.VALUING)), 300, KEEPS),
    "small": (("pocket-llava",), SMALL, 50, THREE),
    "ci": (("pocket-llava",), ("norm", "divprune"), 20, ("1/9",)),
}


def request_of(which: str, given: argparse.Namespace) -> Request:
    """What one of `SETS` asks."""
    models, methods, count, keeps = SETS[which]
    tasks = ("pocketvqa/basic",) if which == "ci" else tuple(given.tasks)
    models, keeps = tuple(given.models or models), tuple(given.keep or keeps)
    count = given.questions or count
    return Request(models, tasks, methods, keeps, "test", count, device=given.device, costs=not given.untimed)


def where() -> str:
    """The device, as a part of a file's name."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return name.lower().replace(" ", "-")


def clocks() -> np.ndarray:
    """Seconds by the clock and of this process's CPU time, which a busy machine does not stretch."""
    return np.array([time.monotonic(), time.process_time()])


def once(given: argparse.Namespace) -> int:
    """Seconds of one sweep, and of every row of it alone; the answers must be the same.

    A row alone is what `vtprune eval` does with one method and one budget: the model is loaded, pictures are drawn and
    encoded. ``apart_warm_s`` leaves the loading out, so it is what the encoder and the greedy orders save.
    """
    request = Request(("pocket-llava",), (), (), (), device=given.device)
    methods, count = ["dense", "random", "grid", *SMALL], given.questions or 20
    settings = {"count": count, "batch": min(count, 24), "split": "test", "commit": "-"}
    with tempfile.TemporaryDirectory() as folder:

        def seconds(methods: list[str], keeps: list[str], name: str) -> np.ndarray:
            """Of the whole run and of loading the model by the clock, then the same of this process's CPU time."""
            begun = clocks()
            model, processor = load_model("pocket-llava", request)
            loaded = clocks() - begun
            out = Path(folder) / name
            runner.run(model, processor, ["pocketvqa/basic"], methods, keeps, out, about=about, **settings)
            return np.array([clocks() - begun, loaded]).T.ravel()

        model, _ = load_model("pocket-llava", request)
        about = runner.provenance(model, "pocket-llava")
        seconds(["dense"], ["1/9"], "warm.jsonl")
        together, apart, said = seconds(methods, list(THREE), "all.jsonl"), np.zeros(4), {}
        for number, (method, keep) in enumerate(runner.combinations(methods, THREE)):
            apart += seconds([method.label], [keep], f"{number}.jsonl")
            for row in board.read(Path(folder) / f"{number}.jsonl")[1]:
                said[row["method"], row["keep"], row["id"]] = row["prediction"]
        rows = board.read(Path(folder) / "all.jsonl")[1]
    differ = sum(said[row["method"], row["keep"], row["id"]] != row["prediction"] for row in rows)
    line = {"device": where(), "torch": torch.__version__, "commit": runner.current_commit(), "questions": count}
    line |= {"combinations": len(rows) // count, "answers": len(rows), "answers_that_differ": differ}
    for at, name in ((0, ""), (2, "cpu_")):
        own = {
            "together_s": together[at],
            "apart_s": apart[at],
            "ratio": apart[at] / together[at],
            "apart_warm_s": apart[at] - apart[at + 1],
            "ratio_warm": (apart[at] - apart[at + 1]) / (together[at] - together[at + 1]),
        }
        line |= {f"{name}{key}": round(float(value), 2) for key, value in own.items()}
    print(line)
    write((given.out or HERE / "results") / f"encode-once-{where()}.csv", [line])
    return 0 if not differ else 1


def tables(overall: Sequence[Row]) -> str:
    """The scores of ``overall.csv`` as Markdown: percent of dense, with half of the 95 % interval, and the time."""
    parts = []
    for model in board.models_of(overall):
        rows = [row for row in overall if row["model"] == model and not row["method"].startswith("worst of=")]
        keeps = [keep for keep in KEEPS if any(row["keep"] == keep for row in rows)]
        lines = [f"### {model}", "", f"| method | {' | '.join(f'keep {keep}' for keep in keeps)} | time at {TIMED} |"]
        lines.append("|---" * (len(keeps) + 2) + "|")
        ranked = {}
        for method in dict.fromkeys(row["method"] for row in rows):
            own = {row["keep"]: row for row in rows if row["method"] == method}
            if any(keep in own for keep in keeps):
                ranked[method] = own
            else:  # what knows no budget
                row = next(iter(own.values()))
                lines.append(f"| {method} | {_score(row)} |" + " – |" * (len(keeps) - 1) + f" {_time(row)} |")
        for method, own in sorted(ranked.items(), key=lambda item: -item[1][TIMED]["relative"]):
            cells = " | ".join(_score(own[keep]) for keep in keeps)
            lines.append(f"| `{method}` | {cells} | {_time(own[TIMED])} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _score(row: Row) -> str:
    few = f" ({row['tasks']:g} of {row['of']:g} tasks)" if row["tasks"] < row["of"] else ""
    half = (row["relative_high"] - row["relative_low"]) / 2
    return f"{100 * row['relative']:.1f} ± {100 * half:.1f}{few}"


def _time(row: Row) -> str:
    return "–" if row["ttft"] is None else f"{row['ttft']:.2f}"


def below_the_mark(out: Path) -> str:
    """All that is made for the guide from the tables of a board."""
    numbers = ("n", "difference", "low", "high")
    with (out / "pairs.csv").open(encoding="utf-8", newline="") as file:
        pairs = [{k: float(v) if k in numbers else v for k, v in row.items()} for row in csv.DictReader(file)]
    return f"{tables(board.from_csv(out / 'overall.csv'))}\n{claims.sections(pairs)}\n"


def document(out: Path, page: Path = HERE.parent / "docs" / "board.md") -> None:
    """Write the tables of a board into the guide that tells what they show, below its mark."""
    head = page.read_text(encoding="utf-8").split(MARK)[0]
    page.write_text(f"{head}{MARK}\n\n{below_the_mark(out)}", encoding="utf-8")


def note_time(rows: Path, seconds: float, answers: int, total: int, workers: int, request: Request) -> None:
    """Add what one run of the script took, from its first line on, to what the folder knows."""
    line = {"device": where(), "processors": processors(), "workers": workers, "commit": runner.current_commit()}
    line |= {"models": " ".join(request.models), "tasks": " ".join(request.tasks), "keeps": " ".join(request.keeps)}
    line |= {"questions": request.count, "seconds": round(seconds), "answers": answers, "of": total}
    with (rows / CLOCK).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def finish(folders: Sequence[Path], out: Path) -> None:
    """Tables, page and picture of one board, or of several that are parts of one, and what its runs took."""
    board.write(folders, out)
    notes = [folder / CLOCK for folder in folders if (folder / CLOCK).exists()]
    if notes:
        write(out / "clock.csv", [json.loads(line) for note in notes for line in note.read_text().splitlines()])
    board.to_csv(out / "pairs.csv", list(claims.pairs(board.gather(folders))))
    print(page.draw(out))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_mutually_exclusive_group(required=True)
    for name in (*SETS, "once", "draw"):
        kinds.add_argument(f"--{name}", action="store_const", const=name, dest="which")
    kinds.add_argument("--merge", nargs="+", type=Path, metavar="ROWS", help="folders of answers, parts of one board")
    parser.add_argument("--models", nargs="+", default=None)
    parser.add_argument("--tasks", nargs="+", default=["all"])
    parser.add_argument("--keep", nargs="+", default=None)
    parser.add_argument("--questions", type=int, default=None, help="of each task")
    parser.add_argument("--workers", type=int, default=None, help="processes; default 6 on a GPU, 1 on a CPU")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no more batches after this time")
    parser.add_argument("--device", default=None)
    parser.add_argument("--untimed", action="store_true", help="answers alone: no time, no memory")
    parser.add_argument("--rows", type=Path, default=None, help="folder of all answers; what it holds is not run again")
    parser.add_argument("--out", type=Path, default=None, help="folder of the tables and the page")
    given = parser.parse_args(arguments)
    if given.which == "once":
        return once(given)
    out = given.out or HERE / "results" / f"board-{where()}"
    if given.which == "draw":
        print(page.draw(out))
        if out.resolve().parent == HERE / "results":  # the guide tells of committed boards
            document(out)
        return 0
    if given.merge:
        finish(given.merge, out)
        return 0
    # A run that is stopped from outside notes its time all the same.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows = given.rows or ROWS / given.which
    workers = given.workers or (max(1, min(6, processors() - 2)) if torch.cuda.is_available() else 1)
    begun = time.monotonic()
    told = [0.0, 0.0]

    def say(text: str) -> None:
        if time.monotonic() - told[0] > 5:
            told[0] = time.monotonic()
            print(f"{told[0] - begun:.0f} s, {told[1]:.0f} answers: {text}", flush=True)

    def tick(done: int) -> None:
        told[1] += done

    def begin(total: int) -> None:
        asked.append(total)
        print(f"planned and timed after {time.monotonic() - begun:.0f} s: {total} answers", flush=True)

    request, asked = request_of(given.which, given), [0]
    try:
        sweep(request, rows, workers=workers, minutes=given.minutes, say=say, tick=tick, begin=begin)
    finally:
        note_time(rows, time.monotonic() - begun, int(told[1]), asked[-1], workers, request)
    print(f"swept in {time.monotonic() - begun:.0f} s", flush=True)
    try:
        finish([rows], out)
    except InputError as error:
        print(f"not finished: {error}")
        return 1
    print(f"after {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
