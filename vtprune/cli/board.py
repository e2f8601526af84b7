# SPDX-License-Identifier: Apache-2.0
"""``vtprune board``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ..errors import ConfigError
from .common import app, percent, plain_table


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
    from ..eval import board, page

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
        print_overall(overall)
        print("board:", made)


def print_overall(rows: list[dict[str, Any]]) -> None:
    console = Console(highlight=False, markup=False)
    for model in dict.fromkeys(row["model"] for row in rows):
        table = plain_table("method", "keep", "tokens %", "score", "of dense % (95%)", "hard", "TTFT %", "memory %")
        for row in (row for row in rows if row["model"] == model):
            inner = f"{percent(row['relative'])} [{percent(row['relative_low'])}, {percent(row['relative_high'])}]"
            shares = [percent(row[key]) for key in ("hard", "ttft", "peak")]
            few = "" if row["tasks"] == row["of"] else f" ({row['tasks']:g} of {row['of']:g} tasks)"
            table.add_row(
                row["method"] + few, row["keep"], percent(row["tokens"]), percent(row["score"]), inner, *shares
            )
        console.print(Text(f"{model}, mean over {int(rows[0]['of'])} tasks", style="bold"))
        console.print(table)


def _print_diff(rows: list[dict[str, Any]], folders: Sequence[Path]) -> None:
    table = plain_table("model", "task", "method", "keep", *map(str, folders), "change (95%)", "flipped", "TTFT ms")
    for row in rows:
        inner = [percent(row[key], "+") for key in ("change", "change_low", "change_high")]
        times = [row["ttft_first"], row["ttft_second"]]
        shown = " -> ".join(f"{ms:.1f}" for ms in times) if None not in times else ""
        scores = [percent(row["first"]), percent(row["second"])]
        names = [row["model"], row["task"], row["method"], row["keep"]]
        table.add_row(*names, *scores, f"{inner[0]} [{inner[1]}, {inner[2]}]", str(row["flipped"]), shown)
    Console(highlight=False, markup=False).print(table)


def _print_advice(rows: list[dict[str, Any]], loss: float) -> None:
    console = Console(highlight=False, markup=False)
    console.print(f"smallest budgets that lose at most {100 * loss:g} points against dense, at 95%:")
    table = plain_table("model", "task", "kind", "keep", "tokens", "method", "against dense")
    for row in rows:
        names = [row["model"], row["task"], row["kind"]]
        if row["method"] is None:
            table.add_row(*names, "1", "", "none is safe", "")
        else:
            gain = f"{percent(row['minus_dense'], '+')} (at worst {percent(row['minus_dense_low'], '+')})"
            table.add_row(*names, row["keep"], f"{row['tokens_out']:g} of {row['tokens_in']:g}", row["method"], gain)
    console.print(table)
