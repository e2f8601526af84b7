# SPDX-License-Identifier: Apache-2.0
"""``vtprune eval``."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import ConfigError, InputError
from .board import print_overall
from .common import DTYPES, EVAL_KEEPS, app, check_dtype, one_line, quiet, ready

EVAL_METHODS = ["dense", "blank", "question-only", "downsample", "random", "idpruner"]


@app.command("eval")
def evaluate(
    tasks: Annotated[list[str] | None, typer.Argument(help="Tasks, as with --task.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the board; or rows.jsonl, a file of answers.", show_default=False)
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="pocketvqa/basic, pope:FOLDER, lmms:NAME, ...; a,b or repeated; a wrong name lists them; all: what "
            "a pocket model was trained for.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        list[str],
        typer.Option(help="A method with its options, several (norm+idpruner), or a control; a,b or repeated; all."),
    ] = EVAL_METHODS,
    keep: Annotated[list[str], typer.Option(help="As for ask; a,b or repeated.")] = EVAL_KEEPS,
    model: Annotated[
        list[str], typer.Option(help="A model that ships with vtprune, a checkpoint folder, or a hub name; a,b.")
    ] = ["pocket-llava"],  # noqa: B006 (typer wants a list)
    split: Annotated[str, typer.Option(help="val for choices, test for final tables.")] = "val",
    count: Annotated[int, typer.Option(min=1, help="Questions of each task.")] = 300,
    per_kind: Annotated[
        int | None, typer.Option(min=1, help="Questions of each kind, instead of --count.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed gives other questions.")] = 0,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Questions that are answered together.", show_default="found; 25 for a file"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda:0; auto: spread over all GPUs.", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}; half precision flips answers.")] = "float32",
    workers: Annotated[int, typer.Option(min=1, help="Processes on one device, for small models.")] = 1,
    costs: Annotated[bool, typer.Option(help="Measure time and memory.")] = True,
    paper: Annotated[
        str | None, typer.Option(help="Run a paper's own table, such as idpruner.", show_default=False)
    ] = None,
    table: Annotated[Path | None, typer.Option(help="Also write the table as CSV.", show_default=False)] = None,
) -> None:
    """Measure accuracy and time: tasks x methods x budgets, with 95% intervals, beside honest controls."""
    named = listed([*(tasks or []), *(task or [])])
    models, chosen, keeps = listed(model), listed(method), listed(keep)
    check_dtype(dtype)
    if paper is None and out is None:
        raise ConfigError("--out is missing; name a folder for a board, or a file such as rows.jsonl for answers alone")
    if paper is None and not named:
        raise ConfigError("no task is named; give one or several, for example --task pocketvqa/basic")
    if out is not None and out.suffix == ".jsonl" and paper is None:
        if len(models) > 1 or "all" in [*named, *chosen]:
            raise ConfigError(f"--out {out} is a file of one model's answers; name a folder for a board")
        _evaluate_to_file(models[0], named, chosen, keeps, out, split, count, seed, batch or 25, device, dtype, table)
        return
    if table is not None:
        raise ConfigError(f"--table {table} is for answers in a file; a board has its tables in its folder")
    from ..eval.sweep import Request

    settings: dict[str, Any] = {"split": split, "count": count, "per_kind": per_kind, "seed": seed, "batch": batch}
    settings |= {"dtype": dtype, "device": device, "costs": costs}
    with quiet(False):
        ready(None if device == "auto" else device)
        if paper is not None:
            from ..eval.papers import run as run_paper

            with _progress() as (say, begin, tick):
                print(run_paper(paper, out, device=device, dtype=dtype, say=say, begin=begin, tick=tick))
            return
        assert out is not None
        request = Request(tuple(models), tuple(named), tuple(chosen), tuple(keeps), **settings)
        _sweep(request, out, workers)


def listed(items: Sequence[str]) -> list[str]:
    """``a,b`` as two items; commas in brackets and quotes stay."""
    parts = [part for item in items for part in re.findall(r"(?:[^,\[\"{]|\[[^\]]*\]|\"[^\"]*\"|\{[^}]*\})+", item)]
    return [part.strip() for part in parts if part.strip()]


def _evaluate_to_file(
    model: str,
    tasks: list[str],
    methods: list[str],
    keeps: list[str],
    out: Path,
    split: str,
    count: int,
    seed: int,
    batch: int,
    device: str | None,
    dtype: str,
    table: Path | None,
) -> None:
    from ..eval import evaluate as run
    from ..eval import to_csv, to_markdown

    with quiet(False) as say:
        ready(None if device == "auto" else device)
        import torch

        settings: dict[str, Any] = {"split": split, "count": count, "seed": seed, "batch": batch, "device": device}
        summary = run(model, tasks, methods, keeps, out, dtype=getattr(torch, dtype), say=say, **settings)
    if table is not None:
        to_csv(summary, table)
    print(to_markdown(summary))


def _sweep(request: Any, out: Path, workers: int) -> None:
    """Run a sweep with a progress bar, then make its tables and pages."""
    from ..eval import board, page
    from ..eval.sweep import launched, sweep

    with _progress() as (say, begin, tick):
        sweep(request, out, workers=workers, say=say, begin=begin, tick=tick)
        say("making tables")
        try:
            board.write([out], out)
        except InputError as error:
            if launched()[1] == 1:
                raise
            # Other processes are still at it; the last one to end makes the tables.
            print(f"this process is done; the board is not yet: {one_line(error)}", file=sys.stderr)
            return
        made = page.draw(out)
    print_overall(board.from_csv(out / "overall.csv"))
    print("board:", made)


@contextlib.contextmanager
def _progress() -> Iterator[tuple[Callable[[str], None], Callable[[int], None], Callable[[int], None]]]:
    """A bar on stderr: say what is going on, begin with a total, tick with what was done. No bar without a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("starting", total=None)
        yield (
            lambda text: progress.update(bar, description=text.splitlines()[-1] if text else ""),
            lambda total: progress.update(bar, total=total, completed=0),
            lambda done: progress.update(bar, advance=done),
        )
