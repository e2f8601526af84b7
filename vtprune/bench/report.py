# SPDX-License-Identifier: Apache-2.0
"""Run a sweep, write its rows as they come, and show them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from ..compose import parse_keeps
from ..config import PruneConfig
from .runner import Case, Line, Row, amdahl, break_even, dense, ideal, measure, pruned
from .shapes import make_inputs

Configured = tuple[str, str, PruneConfig]


def run(
    model: nn.Module,
    name: str,
    cases: Sequence[Case],
    configs: Sequence[Configured],
    compile: str | None,
    seconds: float,
    new_tokens: int,
    concurrency: Sequence[int],
    out: Path | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> list[Row]:
    """Measure every case: dense, and for each budget the ideal and the methods; with `compile` all of it both ways.

    Parameters
    ----------
    configs
        Name and budget as they were given, and what they mean.
    out
        A ``.csv`` or ``.json`` file that is written again after every row.
    """
    rows: list[Row] = []
    for case in cases:
        lines = lines_of(model, case, configs, compile)
        say(f"measuring {len(lines)} lines, {case.batch} samples each")
        for row in measure(model, name, case, lines, seconds=seconds, new_tokens=new_tokens, concurrency=concurrency):
            rows.append(row)
            say(f"{row.method} keep {row.keep}: {row.ttft_ms_p50} ms to the first token")
            if out is not None:
                write(rows, out)
    return rows


def lines_of(model: nn.Module, case: Case, configs: Sequence[Configured], compile: str | None) -> list[Line]:
    """What `run` measures of one case; graphs last."""
    inputs = make_inputs(model, case.batch, case.size, case.text)
    lines = [dense(model, inputs)]
    if compile is not None:
        lines.append(pruned(model, inputs, PruneConfig("grid", keep=1.0, compile=compile), "1", "dense"))
    for how in (None, compile) if compile is not None else (None,):
        for label in dict.fromkeys(keep for _, keep, _ in configs):
            keep = parse_keeps(label)
            if not isinstance(keep, tuple):
                lines.append(ideal(model, inputs, keep, label, how))
            lines += [pruned(model, inputs, replace(c, compile=how), label, n) for n, k, c in configs if k == label]
    return sorted(lines, key=lambda line: bool(line.compile))


def write(rows: Sequence[Row], out: Path) -> None:
    """Write rows to a ``.json`` or a CSV file."""
    if out.suffix.lower() == ".json":
        out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
        return
    with out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def show(rows: Sequence[Row], console: Console) -> None:
    """One table per picture, batch and number of requests; then what follows from it."""
    for key in dict.fromkeys(map(_case, rows)):
        group = [row for row in rows if _case(row) == key]
        first = group[0]
        at_once = f", {first.concurrency} requests at once" if first.concurrency > 1 else ""
        title = f"{first.model} on {first.device}, {first.dtype}: {first.batch} x "
        console.print(f"{title}({first.visual_tokens} visual + {first.text_tokens} other rows){at_once}", markup=False)
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("method", no_wrap=True)
        shown = {name: column for name, column in COLUMNS.items() if any(column(row) is not None for row in group)}
        for column in shown:
            table.add_column(column, justify="right", no_wrap=True)
        for row in group:
            label = f"{row.method}{f' ({row.compile})' if row.compile else ''}"
            table.add_row(label, *("" if (value := column(row)) is None else value for column in shown.values()))
        console.print(table, markup=False)
        for line in filter(None, [amdahl(group), *break_even(group)]):
            console.print(line, markup=False, soft_wrap=True)
        # Two lines that ran the same way need to say so once.
        for how in dict.fromkeys(row.ran_as for row in group if row.ran_as):
            console.print(how, style="dim", markup=False, soft_wrap=True)
        console.print()


def _case(row: Row) -> tuple[Any, ...]:
    return row.concurrency, row.batch, row.visual_tokens, row.text_tokens


def _number(name: str, digits: int = 1, unit: float = 1) -> Callable[[Row], str | None]:
    def column(row: Row) -> str | None:
        value = getattr(row, name)
        return None if value is None else f"{value / unit:.{digits}f}"

    return column


COLUMNS: dict[str, Callable[[Row], str | None]] = {
    "keep": lambda row: row.keep,
    "tokens": lambda row: str(row.kept),
    "ttft ms": _number("ttft_ms_p50"),
    "p90": _number("ttft_ms_p90"),
    "vision": _number("vision_ms"),
    "score": _number("score_ms"),
    "pack": _number("pack_ms"),
    "LM": _number("lm_ms_p50"),
    "tpot ms": _number("tpot_ms", 2),
    "LM GFLOP": _number("lm_gflop"),
    "KV MiB": _number("kv_bytes", 2, 2**20),
    "peak MiB": _number("peak_mib", 0),
    "J": _number("joules"),
    "samples/s": _number("samples_per_s", 2),
}
