# SPDX-License-Identifier: Apache-2.0
"""``vtprune doctor``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import common
from .common import DTYPES, app, plain_table, quiet


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
    with quiet(as_json) as say:
        from ..doctor import bare, examine

        folder = Path(model)
        if (folder / "config.json").is_file() and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
            say(f"building {model} without weights")
            checks = examine(bare(folder))
        else:
            say(f"loading {model}")
            net, processor = common.load(model, device, dtype)
            from PIL import Image

            from ..models.loading import build_inputs

            say("trying")
            picture = Image.radial_gradient("L").resize((320, 240)).convert("RGB")
            checks = examine(net, build_inputs(net, processor, picture, "what is in the picture ?"))
    if as_json:
        print(json.dumps({"model": model, "checks": [check._asdict() for check in checks]}))
    else:
        table = plain_table("", "", "")
        for check in checks:
            table.add_row(check.name, check.state, check.note)
        Console(highlight=False, markup=False).print(table)
    if any(check.state == "no" for check in checks):
        raise typer.Exit(1)
