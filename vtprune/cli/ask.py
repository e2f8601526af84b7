# SPDX-License-Identifier: Apache-2.0
"""``vtprune ask``."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import ConfigError, InputError
from . import common
from .common import DTYPES, app, config_of, open_image, quiet

#: generate() is repeated until this much time is spent, at least once and at most REPEATS times; medians are shown.
REPEAT_SECONDS, REPEATS = 2.0, 9


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
    picture = open_image(image)
    with quiet(as_json) as say:
        say("starting")
        config = config_of(method, keep, option or [])
        say(f"loading {model}")
        net, processor = common.load(model, device, dtype)
        from ..models.loading import build_inputs

        inputs = build_inputs(net, processor, picture, question)
        say("answering with all visual tokens")
        dense = _measure(net, processor, inputs, max_new_tokens)

        import vtprune

        with vtprune.apply(net, config) as handle:
            say(f"answering with the tokens that {method} keeps")
            pruned = _measure(net, processor, inputs, max_new_tokens)
            report = handle.report()
        if overlay is not None:
            from ..viz import overlay as draw
            from ..viz import seen_image

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


def _measure(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> dict[str, Any]:
    """The fields of `Measured` that need a clock: answer, prefill_ms, total_ms, both from the same generate()."""
    from ..eval.cost import Clock

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
