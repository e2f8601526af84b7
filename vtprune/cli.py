# SPDX-License-Identifier: Apache-2.0
"""The ``vtprune`` command.

Results go to stdout, progress and errors to stderr. Every mistake of the user is one line ``error: ...`` that names the
cure, with exit code 2. Heavy imports happen inside the commands, so that ``vtprune --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import __version__
from .errors import ConfigError, InputError, VTPruneError, VTPruneWarning

if TYPE_CHECKING:
    from PIL import Image

    from .config import PruneConfig
    from .registry import Pruner

EVAL_METHODS = ["dense", "blank", "question-only", "downsample", "random", "idpruner"]
EVAL_KEEPS = ["1/4", "1/9"]
BENCH_METHODS = ["grid", "norm", "idpruner", "divprune"]
DTYPES = ("float32", "bfloat16", "float16")
#: generate() is repeated until this much time is spent, at least once and at most REPEATS times; medians are shown.
REPEAT_SECONDS, REPEATS = 2.0, 9

#: What the words of `vtprune.models.served` mean.
SERVED = {
    "yes": "the conformance suite runs it, with all that it asks of the encoder",
    "stand-in": "it runs, too; without a CLS token something else takes its place",
    "no": "refused, because the encoder lacks what the method needs, or its layers lie too low (name others)",
    "untested": "a method of another package",
}

app = typer.Typer(
    name="vtprune",
    help="Prune the visual tokens of vision-language models.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@dataclass(frozen=True)
class Measured:
    """One answer and what it cost.

    Parameters
    ----------
    answer
        The generated text.
    visual_tokens
        Visual tokens that the language model was given.
    prefill_ms
        Median time until the first token: vision tower, scoring, packing and the prefill of the language model.
    total_ms
        Median time until the last token, of the same runs.
    prefill_flops
        Operations of the language model's prefill, counted from its shapes.
    """

    answer: str
    visual_tokens: int
    prefill_ms: float
    total_ms: float
    prefill_flops: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        return app(arguments, standalone_mode=False) or 0
    except VTPruneError as error:
        return _fail(error)
    except typer.Abort:
        return 130
    except Exception as error:
        # What the argument parser says about wrong arguments. Its exception classes moved between versions of typer,
        # the method did not.
        if hasattr(error, "format_message"):
            return _fail(error.format_message())
        raise


def _fail(reason: object) -> int:
    print("error:", _one_line(reason), file=sys.stderr)
    return 2


def _one_line(reason: object) -> str:
    return " ".join(str(reason).split())


def _print_version(wanted: bool) -> None:
    if wanted:
        print("vtprune", __version__)
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Prune the visual tokens of vision-language models."""


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its options.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """List the pruning methods: what they declare, and how each family serves them."""
    from .registry import methods as known
    from .registry import nearest

    table = known()
    if name is not None and name not in table:
        raise ConfigError(f"unknown method {name!r}{nearest(name, list(table))}; known methods: {', '.join(table)}")
    found = {n: _describe(cls) for n, cls in table.items() if name in (None, n)}
    if as_json:
        print(json.dumps(found, default=str))
    else:
        _print_methods(found, in_full=name is not None)


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="A picture.", show_default=False)],
    question: Annotated[str, typer.Argument(help="What to ask about it.", show_default=False)],
    model: Annotated[
        str, typer.Option(help="A model that ships with vtprune, a checkpoint folder, or a hub name.")
    ] = "pocket-llava",
    method: Annotated[
        str, typer.Option(help="How to choose tokens; see `vtprune methods`. Several run in a row: norm+idpruner.")
    ] = "idpruner",
    keep: Annotated[
        str, typer.Option(help="What stays: a fraction (0.25, 1/9, 25%) or a count (128t); in a row 1/2+64t.")
    ] = "1/4",
    overlay: Annotated[
        Path | None, typer.Option(help="Write a PNG that shows which patches were kept.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    device: Annotated[str | None, typer.Option(help="For example cpu or cuda:0.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help=f"One of {', '.join(DTYPES)}.", show_default=False)] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="An option of the method, as key=value; repeatable.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Ask about a picture twice: with all visual tokens, and with those that a method keeps."""
    # Everything that can be wrong without the model is checked before the model is loaded.
    if not question.strip():
        raise InputError('the question is empty; write one, for example "what does the text say ?"')
    if overlay is not None and not overlay.absolute().parent.is_dir():
        raise ConfigError(f"--overlay {overlay}: the folder {overlay.parent} does not exist; create it first")
    picture = _open_image(image)
    with _quiet(as_json) as say:
        say("starting")
        config = _config(method, keep, option or [])
        say(f"loading {model}")
        net, processor = _load(model, device, dtype)
        from .models.loading import build_inputs

        inputs = build_inputs(net, processor, picture, question)
        say("answering with all visual tokens")
        dense = _measure(net, processor, inputs, max_new_tokens)

        import vtprune

        with vtprune.apply(net, config) as handle:
            say(f"answering with the tokens that {method} keeps")
            pruned = _measure(net, processor, inputs, max_new_tokens)
            report = handle.report()
        if overlay is not None:
            from .viz import overlay as draw
            from .viz import seen_image

            drawn = draw(seen_image(processor, inputs, picture), report.images[0], method)
            try:
                drawn.save(overlay, format="PNG")
            except OSError as error:
                raise ConfigError(f"cannot write the overlay {overlay} ({error}); choose another path") from None

    rows = {
        "dense": Measured(**dense, visual_tokens=report.tokens_in, prefill_flops=report.flops_before),
        "pruned": Measured(**pruned, visual_tokens=report.tokens_out, prefill_flops=report.flops_after),
    }
    if as_json:
        result: dict[str, Any] = {"image": str(image), "question": question, "model": model}
        result |= {"method": method, "keep": keep, "options": config.options}
        result |= {"device": str(net.device), "dtype": str(net.dtype).removeprefix("torch.")}
        result |= {name: asdict(row) for name, row in rows.items()}
        result |= {"info": report.info, "notes": report.notes, "overlay": str(overlay) if overlay else None}
        print(json.dumps(result))
    else:
        _print_table(rows, f"{model} on {image.name}: {question}")
        details = [f"{method}, keep {keep}", *(f"{key}: {value}" for key, value in report.info.items())]
        console = Console(highlight=False)
        console.print(", ".join(details), style="dim")
        for note in report.notes:
            console.print("note:", note, markup=False)
        if overlay is not None:
            console.print(f"kept patches: {overlay}", markup=False)


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
    named = _split([*(tasks or []), *(task or [])])
    models, chosen, keeps = _split(model), _split(method), _split(keep)
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype} is unknown; choose one of {', '.join(DTYPES)}")
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
    from .eval.sweep import Request

    settings: dict[str, Any] = {"split": split, "count": count, "per_kind": per_kind, "seed": seed, "batch": batch}
    settings |= {"dtype": dtype, "device": device, "costs": costs}
    with _quiet(False):
        _ready(None if device == "auto" else device)
        if paper is not None:
            from .eval.papers import run as run_paper

            with _progress() as (say, begin, tick):
                print(run_paper(paper, out, device=device, dtype=dtype, say=say, begin=begin, tick=tick))
            return
        assert out is not None
        request = Request(tuple(models), tuple(named), tuple(chosen), tuple(keeps), **settings)
        _sweep(request, out, workers)


def _split(items: Sequence[str]) -> list[str]:
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
    from .eval import evaluate as run
    from .eval import to_csv, to_markdown

    with _quiet(False) as say:
        _ready(None if device == "auto" else device)
        import torch

        settings: dict[str, Any] = {"split": split, "count": count, "seed": seed, "batch": batch, "device": device}
        summary = run(model, tasks, methods, keeps, out, dtype=getattr(torch, dtype), say=say, **settings)
    if table is not None:
        to_csv(summary, table)
    print(to_markdown(summary))


@app.command()
def doctor(
    model: Annotated[
        str,
        typer.Argument(
            help="A model that ships with vtprune, a hub name, a checkpoint folder, or one with only a config.json.",
            show_default=False,
        ),
    ],
    device: Annotated[str | None, typer.Option(help="For example cpu or cuda:0.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help=", ".join(DTYPES), show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Say what a model has of what vtprune needs, and what works. Exit code 1 where something does not."""
    with _quiet(as_json) as say:
        from .doctor import bare, examine

        folder = Path(model)
        if (folder / "config.json").is_file() and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
            say(f"building {model} without weights")
            checks = examine(bare(folder))
        else:
            say(f"loading {model}")
            net, processor = _load(model, device, dtype)
            from PIL import Image

            from .models.loading import build_inputs

            say("trying")
            picture = Image.radial_gradient("L").resize((320, 240)).convert("RGB")
            checks = examine(net, build_inputs(net, processor, picture, "what is in the picture ?"))
    if as_json:
        print(json.dumps({"model": model, "checks": [check._asdict() for check in checks]}))
    else:
        table = _plain_table("", "", "")
        for check in checks:
            table.add_row(check.name, check.state, check.note)
        Console(highlight=False, markup=False).print(table)
    if any(check.state == "no" for check in checks):
        raise typer.Exit(1)


@app.command("bench")
def measure_speed(
    model: Annotated[
        str, typer.Argument(help="A model that ships with vtprune, a checkpoint folder, a hub name, or a preset.")
    ] = "pocket-llava",
    method: Annotated[list[str], typer.Option(help="A method, several (norm+idpruner); repeatable.")] = BENCH_METHODS,
    keep: Annotated[list[str], typer.Option(help="As for ask; repeatable.")] = EVAL_KEEPS,
    batch: Annotated[list[int], typer.Option(min=1, help="Samples per request; repeatable.")] = [1],  # noqa: B006
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="Height x width of the picture in pixels, such as 1008x1008; repeatable.", show_default=False
        ),
    ] = None,
    text: Annotated[int, typer.Option(min=4, help="Rows of a prompt that are not visual tokens.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=0, help="Decoding steps that are timed.")] = 8,
    concurrency: Annotated[
        list[int], typer.Option(min=1, help="Requests at once, from so many threads; repeatable.")
    ] = [1],  # noqa: B006
    compile: Annotated[
        str | None, typer.Option(help="graph: methods, ideal and dense also as CUDA graphs.", show_default=False)
    ] = None,
    attention: Annotated[str, typer.Option(help="attn_implementation of transformers.")] = "sdpa",
    seconds: Annotated[float, typer.Option(min=0, help="Time for the timed runs of one picture and batch.")] = 30.0,
    target_ttft: Annotated[
        str | None,
        typer.Option(help="Such as 150ms: find how much to keep to be that fast here.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="rows.csv or rows.json; rows are written one by one.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="A picture (.png, .svg, .pdf); needs the extra plots.", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="For example cpu or cuda:0.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help=f"One of {', '.join(DTYPES)}.", show_default=False)] = None,
) -> None:
    """Measure speed and memory from the pixels on, beside the unpruned model and the ideal; docs/bench.md explains."""
    configs = [(m, k, _config(m, k, [])) for m in method for k in keep]
    sizes = [_size(text) for text in size] if size else [None]
    target = None if target_ttft is None else _milliseconds(target_ttft)
    for path, kinds in ((out, (".csv", ".json")), (plot, (".png", ".svg", ".pdf"))):
        if path is not None and path.suffix.lower() not in kinds:
            raise ConfigError(f"{path} is of no kind that can be written here; name it {' or '.join(kinds)}")
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: the folder {path.parent} does not exist; create it first")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype} is unknown; choose one of {', '.join(DTYPES)}")
    if plot is not None:
        from .bench.plot import check

        check()
    from .config import PruneConfig

    PruneConfig(compile=compile)  # a wrong word is an error before the model is loaded
    with _quiet(False) as say:
        _ready(device)
        import torch

        from .bench import Case, build, keep_for, report

        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        say(f"making {model}")
        net = build(model, where, getattr(torch, dtype) if dtype else None, attention)
        cases = [Case(b, s, text) for s in sizes for b in batch]
        console = Console(highlight=False)
        if target is not None:
            for case in cases:
                for name, found in {m: c for m, _, c in configs}.items():
                    found = dataclasses.replace(found, compile=compile)
                    kept, total, took = keep_for(net, case, found, target, say)
                    console.print(
                        f"{name}, batch {case.batch}: keep {kept} of {total} visual tokens a picture "
                        f"(--keep {kept}t): {took:.1f} ms to the first token, target {target:g} ms",
                        markup=False,
                        soft_wrap=True,
                    )
            return
        rows = report.run(net, model, cases, configs, compile, seconds, new_tokens, concurrency, out, say)
    console.width = max(console.width, 132)  # a table that is cut would say nothing; a terminal wraps it
    report.show(rows, console)
    if plot is not None:
        from .bench.plot import draw

        draw(rows, plot)
        console.print(f"plot: {plot}", markup=False)
    if out is not None:
        console.print(f"rows: {out}", markup=False)


def _sweep(request: Any, out: Path, workers: int) -> None:
    """Run a sweep with a progress bar, then make its tables and pages."""
    from .eval import board, page
    from .eval.sweep import launched, sweep

    with _progress() as (say, begin, tick):
        sweep(request, out, workers=workers, say=say, begin=begin, tick=tick)
        say("making tables")
        try:
            board.write([out], out)
        except InputError as error:
            if launched()[1] == 1:
                raise
            # Other processes are still at it; the last one to end makes the tables.
            print(f"this process is done; the board is not yet: {_one_line(error)}", file=sys.stderr)
            return
        made = page.draw(out)
    _print_overall(board.from_csv(out / "overall.csv"))
    print("board:", made)


@app.command("board")
def show_board(
    folders: Annotated[list[Path], typer.Argument(help="Boards of `vtprune eval`; several are merged.")],
    out: Annotated[
        Path | None, typer.Option(help="Where the tables and the page go.", show_default="the first board")
    ] = None,
    compare: Annotated[bool, typer.Option("--diff", help="Show what changed from one board to another.")] = False,
    advise: Annotated[
        float | None, typer.Option(help="How far one may prune at this loss, 0.02 for two points.", show_default=False)
    ] = None,
    partial: Annotated[bool, typer.Option(help="Use what all methods have answered so far.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Rebuild a board, merge several, compare two, or ask how far one may prune."""
    from .eval import board, page

    if compare:
        if len(folders) != 2:
            raise ConfigError(f"--diff compares two boards, {len(folders)} were given")
        rows = board.diff(*folders)
        print(json.dumps(rows)) if as_json else _print_diff(rows, folders)
        return
    place = out or folders[0]
    if any(any(folder.glob("answers/*/*.jsonl")) for folder in folders) or not (folders[0] / "board.csv").is_file():
        board.write(folders, place, partial)
    rows = board.from_csv(place / "board.csv")
    if advise is not None:
        found = board.advise(rows, advise)
        print(json.dumps(found)) if as_json else _print_advice(found, advise)
        return
    made = page.draw(place)
    overall = board.from_csv(place / "overall.csv")
    if as_json:
        print(json.dumps(overall))
    else:
        _print_overall(overall)
        print("board:", made)


def _percent(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{100 * value:{sign}.1f}"


def _print_overall(rows: list[dict[str, Any]]) -> None:
    console = Console(highlight=False, markup=False)
    for model in dict.fromkeys(row["model"] for row in rows):
        table = _plain_table("method", "keep", "tokens %", "score", "of dense % (95%)", "hard", "TTFT %", "memory %")
        for row in (row for row in rows if row["model"] == model):
            inner = f"{_percent(row['relative'])} [{_percent(row['relative_low'])}, {_percent(row['relative_high'])}]"
            shares = [_percent(row[key]) for key in ("hard", "ttft", "peak")]
            few = "" if row["tasks"] == row["of"] else f" ({row['tasks']:g} of {row['of']:g} tasks)"
            table.add_row(
                row["method"] + few, row["keep"], _percent(row["tokens"]), _percent(row["score"]), inner, *shares
            )
        console.print(Text(f"{model}, mean over {int(rows[0]['of'])} tasks", style="bold"))
        console.print(table)


def _print_diff(rows: list[dict[str, Any]], folders: Sequence[Path]) -> None:
    table = _plain_table("model", "task", "method", "keep", *map(str, folders), "change (95%)", "flipped", "TTFT ms")
    for row in rows:
        inner = [_percent(row[key], "+") for key in ("change", "change_low", "change_high")]
        times = [row["ttft_first"], row["ttft_second"]]
        shown = " -> ".join(f"{ms:.1f}" for ms in times) if None not in times else ""
        scores = [_percent(row["first"]), _percent(row["second"])]
        names = [row["model"], row["task"], row["method"], row["keep"]]
        table.add_row(*names, *scores, f"{inner[0]} [{inner[1]}, {inner[2]}]", str(row["flipped"]), shown)
    Console(highlight=False, markup=False).print(table)


def _print_advice(rows: list[dict[str, Any]], loss: float) -> None:
    console = Console(highlight=False, markup=False)
    console.print(f"smallest budgets that lose at most {100 * loss:g} points against dense, at 95%:")
    table = _plain_table("model", "task", "kind", "keep", "tokens", "method", "against dense")
    for row in rows:
        names = [row["model"], row["task"], row["kind"]]
        if row["method"] is None:
            table.add_row(*names, "1", "", "none is safe", "")
        else:
            gain = f"{_percent(row['minus_dense'], '+')} (at worst {_percent(row['minus_dense_low'], '+')})"
            table.add_row(*names, row["keep"], f"{row['tokens_out']:g} of {row['tokens_in']:g}", row["method"], gain)
    console.print(table)


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


@app.command("lens")
def look(
    image: Annotated[Path, typer.Argument(help="A picture: PNG, JPEG, WebP.", show_default=False)],
    model: Annotated[
        str, typer.Option(help="A model that ships with vtprune, a checkpoint folder, or a hub name.")
    ] = "pocket-llava",
    layer: Annotated[
        int | None, typer.Option(help="Whose words are on the patches; 0: before the first layer.", show_default="last")
    ] = None,
    out: Annotated[Path, typer.Option(help="lens.png: a picture. lens.html: a page with all layers.")] = Path(
        "lens.png"
    ),
    calibration: Annotated[
        Path | None, typer.Option(help="Which tokens are sinks or dead.", show_default="the checkpoint's")
    ] = None,
    topk: Annotated[int, typer.Option(min=1, help="Words per patch and layer of a page.")] = 10,
    device: Annotated[str | None, typer.Option(help="For example cpu or cuda:0.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help=", ".join(DTYPES), show_default=False)] = None,
) -> None:
    """See what each visual token says: the word that it is nearest to, and whether it is sink, dead or alive."""
    paged = out.suffix.lower() in (".html", ".htm")
    if not paged and out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out} is neither a picture nor a page; name it .png or .html")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.parent} does not exist; create it first")
    picture = _open_image(image)
    if calibration is not None:
        from .lens import Calibration

        Calibration.load(calibration)  # an unusable file is an error before the model is loaded
    with _quiet(False) as say:
        say(f"loading {model}")
        net, processor = _load(model, device, dtype)
        from . import viz
        from .lens.probe import check_layers, lens
        from .models import find_family
        from .models.loading import build_inputs

        family = find_family(net)
        shown = len(family.lm.layers) if layer is None else layer
        check_layers(family, shown)  # a page looks at all layers, and would not miss a wrong one until it is drawn
        inputs = build_inputs(net, processor, picture, "what is in the picture ?")
        say("looking")
        seen = lens(net, inputs, None if paged else shown, topk, processor, calibration)
        categories = seen.classes
        drawn = viz.seen_image(processor, inputs, picture)
        try:
            if paged:
                title = f"What {Path(model).name}'s visual tokens say about {image.name}"
                out.write_text(viz.lens_page(drawn, seen, shown, categories, title=title), encoding="utf-8")
            else:
                viz.lens(drawn, seen, shown, categories).save(out, format="PNG")
        except OSError as error:
            raise ConfigError(f"cannot write {out} ({error}); choose another path") from None
    console = Console(highlight=False)
    if categories is not None:
        parts = [f"{name.replace('_', ' ')} {share:.1%}" for name, share in categories.shares().items()]
        console.print(f"{len(seen)} visual tokens: {', '.join(parts)}", markup=False)
    else:
        console.print(f"{len(seen)} visual tokens", markup=False)
        console.print("note: not classified:", seen.why, markup=False, soft_wrap=True)
    console.print(f"{'page' if paged else 'picture'}: {out}", markup=False)


@app.command()
def demo(
    model: Annotated[
        str, typer.Option(help="A model that ships with vtprune, a checkpoint folder, or a hub name.")
    ] = "pocket-llava",
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 lets others in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port.", show_default="first free from 7860")] = None,
    share: Annotated[bool, typer.Option("--share", help="Also open a public address, through Gradio.")] = False,
    auth: Annotated[
        str | None,
        typer.Option(help="name:password that everyone must give.", envvar="VTPRUNE_DEMO_AUTH", show_default=False),
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder of results for the board.", show_default="benchmarks/results")
    ] = None,
    video_backend: Annotated[
        str | None, typer.Option(help="What reads videos: av or decord.", show_default="first installed")
    ] = None,
    device: Annotated[str | None, typer.Option(help="For example cpu or cuda:0.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help=", ".join(DTYPES), show_default=False)] = None,
) -> None:
    """Try a picture or a video in the browser, and look at the tokens."""
    from .demo.serve import RESULTS, parse_auth

    pair = parse_auth(auth)
    if results is not None and not results.is_dir():
        raise ConfigError(f"--results {results} is no folder; give one that holds what `vtprune eval` wrote")
    if video_backend is not None:
        from .video import backends

        if video_backend not in backends():
            raise ConfigError(
                f"--video-backend {video_backend} is not installed; found: {', '.join(backends()) or '-'}"
            )
    folder = results or (RESULTS if RESULTS.is_dir() else None)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype} is unknown; choose one of {', '.join(DTYPES)}")
    with _quiet(False) as say:
        say("starting")
        _ready(device)
        from .demo.serve import running
        from .demo.studio import Studio

        studio = Studio(model, device=device, dtype=dtype)
        options: dict[str, Any] = {"host": host, "port": port, "share": share, "auth": pair}
        with running(studio, **options, results=folder, video_backend=video_backend) as address:
            say(f"loading {model}")
            studio.load(model)  # a model that cannot be loaded is an error here, not in the browser
            print(f"vtprune demo: {address} (Ctrl+C ends it)", flush=True)
            if host not in ("127.0.0.1", "localhost", "::1") or share:
                print("note: others can reach it" + ("" if pair else "; --auth name:password keeps them out"))
            say("serving")
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    time.sleep(3600)


def _describe(cls: type[Pruner]) -> dict[str, Any]:
    """All that there is to say about a method."""
    from .models import served
    from .registry import DECLARED

    # [text before the first section, heading, section, heading, section, ...]
    parts = re.split(r"^(\w+)\n-{3,}\n", inspect.cleandoc(cls.__doc__ or ""), flags=re.MULTILINE)
    section = dict(zip(parts[1::2], parts[2::2], strict=True)).get("Parameters", "")
    about: dict[str, str] = {}
    for names, text in re.findall(r"^(\S.*)\n((?:[ \t]+.*\n?|\n)*)", section, re.MULTILINE):
        about.update(dict.fromkeys(re.split(r",\s*", names.split(":")[0].strip()), _one_line(text).replace("`", "")))
    options: dict[str, dict[str, Any]] = {}
    for field in (f for f in fields(cls) if f.init):  # type: ignore[arg-type]
        default = field.default if field.default_factory is MISSING else field.default_factory()
        options[field.name] = {"about": about.get(field.name, "")}
        options[field.name] |= {} if default is MISSING else {"default": default}
    return {
        "about": _one_line(parts[0].split("\n\n")[0]).replace("`", ""),
        "paper": cls.paper,
        **{word: getattr(cls, word) for word in DECLARED},
        "families": served(cls),
        "options": options,
    }


def _print_methods(found: dict[str, dict[str, Any]], in_full: bool) -> None:
    """Tables of what `_describe` found; `in_full` with what each does and its options."""
    console = Console(highlight=False, markup=False)
    for name, method in found.items() if in_full else ():
        console.print(Text.assemble((name, "bold"), "  ", method["about"], "\n"))
        options = _plain_table("option", "default", "meaning")
        for option, facts in method["options"].items():
            default = json.dumps(facts["default"], default=str) if "default" in facts else "required"
            options.add_row(option, default, facts["about"])
        console.print(options if options.row_count else "It has no options.")
        console.print()
    flags = ("query_aware", "training_free", "adaptive")
    declared = _plain_table("method", "mechanism", "query\naware", "training\nfree", "adaptive", "paper")
    alike: dict[tuple[str, ...], list[str]] = {}  # families that all methods here serve alike share a column
    for kind in next(iter(found.values()))["families"]:
        alike.setdefault(tuple(method["families"][kind] for method in found.values()), []).append(kind)
    served = _plain_table("method", "modality", *("\n".join(kinds) for kinds in alike.values()))
    for name, method in found.items():
        mechanism, modality = (", ".join(method[kind]) for kind in ("mechanism", "modality"))
        yes_no = ["yes" if method[flag] else "no" for flag in flags]
        declared.add_row(name, mechanism or "none", *yes_no, method["paper"])
        served.add_row(name, modality, *(method["families"][kinds[0]] for kinds in alike.values()))
    for table in (declared, served):
        console.print(table)
        console.print()
    met = {word for method in found.values() for word in method["families"].values()}
    for word in (word for word in SERVED if word in met):
        console.print(f"{word}: {SERVED[word]}", style="dim")


def _plain_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        name, paper = column in ("method", "option"), column == "paper"
        table.add_column(column, overflow="fold", no_wrap=name or paper, style="bold" if name else None)
    return table


def _print_table(rows: dict[str, Measured], title: str) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("answer", overflow="fold", ratio=1)
    for column in ("visual tokens", "prefill ms", "total ms", "LLM GFLOP"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in rows.items():
        numbers = [str(row.visual_tokens), f"{row.prefill_ms:.1f}", f"{row.total_ms:.1f}"]
        table.add_row(name, row.answer, *numbers, f"{row.prefill_flops / 1e9:.1f}")
    console = Console(highlight=False)
    console.print(title, markup=False)
    console.print(table, markup=False)


@contextlib.contextmanager
def _quiet(silent: bool) -> Iterator[Callable[[str], None]]:
    """Show what is going on in one moving line on stderr, and keep the libraries below from writing over it."""
    console = Console(stderr=True, highlight=False)

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, VTPruneWarning):
            console.print("warning:", _one_line(message), markup=False, soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", VTPruneWarning)
        warnings.showwarning = show
        # Not a terminal: no line that moves, and no traces of one in a log.
        if not console.is_terminal or silent:
            yield lambda _: None
        else:
            with console.status("starting") as status:
                yield lambda text: status.update(f"{text} …")


def _open_image(path: Path) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    cure = "give the path of a PNG, JPEG or WebP file"
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"there is no image {path}; {cure}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, not an image; {cure}") from None
    except UnidentifiedImageError:
        raise InputError(f"{path} is not a picture that Pillow can read; {cure}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the image {path} ({_one_line(error)}); save it again, or {cure}") from None


def _config(method: str, keep: str, options: Sequence[str]) -> PruneConfig:
    from .compose import parse_keeps, parse_names
    from .config import PruneConfig

    parsed: dict[str, Any] = {}
    for item in options:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--option {item!r} is not of the form key=value, for example importance=norm")
        try:
            parsed[key.strip()] = json.loads(value)  # numbers, true, false, null
        except ValueError:
            parsed[key.strip()] = value
    return PruneConfig(method=parse_names(method), keep=parse_keeps(keep), options=parsed)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    if found is None or 0 in map(int, found.groups()):
        raise ConfigError(f"--size {text!r} is no size; write height x width in pixels, for example 1008x1008")
    return int(found[1]), int(found[2])


def _milliseconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s)", text.strip())
    if found is None or not float(found[1]):
        raise ConfigError(f"--target-ttft {text!r} is no time; write for example 150ms or 0.5s")
    return float(found[1]) * (1000 if found[2] == "s" else 1)


def _load(model: str, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    """The model and its processor, loaded without a word from the libraries below."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype} is unknown; choose one of {', '.join(DTYPES)}")
    _ready(device)
    import torch

    import vtprune

    return vtprune.load(model, device=device, dtype=getattr(torch, dtype) if dtype else None)


def _ready(device: str | None) -> None:
    """Refuse a device that cannot be used, and silence the libraries that load models."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ConfigError(f"--device {device} cannot be used ({_first_line(error)}); try --device cpu") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def _measure(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> dict[str, Any]:
    """The fields of `Measured` that need a clock: answer, prefill_ms, total_ms, both from the same generate()."""
    from .eval.cost import Clock

    greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
    model.generate(**inputs, **greedy)  # the first call allocates and picks kernels
    first: list[float] = []
    total: list[float] = []
    while not total or (len(total) < REPEATS and sum(total) < 1000 * REPEAT_SECONDS):
        clock = Clock(model.device)
        output = model.generate(**inputs, **greedy, streamer=clock)
        total.append(clock.elapsed_ms())
        first.append(clock.first_token_ms)
    answer = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
    return {"answer": answer, "prefill_ms": statistics.median(first), "total_ms": statistics.median(total)}
