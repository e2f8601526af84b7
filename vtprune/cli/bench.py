# SPDX-License-Identifier: Apache-2.0
"""``vtprune bench``."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import ConfigError
from .common import DTYPES, EVAL_KEEPS, app, check_dtype, config_of, quiet, ready

BENCH_METHODS = ["grid", "norm", "idpruner", "divprune"]


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
    configs = [(m, k, config_of(m, k, [])) for m in method for k in keep]
    sizes = [_size(text) for text in size] if size else [None]
    target = None if target_ttft is None else _milliseconds(target_ttft)
    for path, kinds in ((out, (".csv", ".json")), (plot, (".png", ".svg", ".pdf"))):
        if path is not None and path.suffix.lower() not in kinds:
            raise ConfigError(f"{path} is of no kind that can be written here; name it {' or '.join(kinds)}")
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: the folder {path.parent} does not exist; create it first")
    check_dtype(dtype)
    if plot is not None:
        from ..bench.plot import check

        check()
    from ..config import PruneConfig

    PruneConfig(compile=compile)  # a wrong word is an error before the model is loaded
    with quiet(False) as say:
        ready(device)
        import torch

        from ..bench import Case, build, keep_for, report

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
        from ..bench.plot import draw

        draw(rows, plot)
        console.print(f"plot: {plot}", markup=False)
    if out is not None:
        console.print(f"rows: {out}", markup=False)


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
