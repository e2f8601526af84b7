# SPDX-License-Identifier: Apache-2.0
"""``vtprune demo``."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .common import DTYPES, app, check_dtype, quiet, ready


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
    from ..demo.serve import RESULTS, parse_auth

    pair = parse_auth(auth)
    if results is not None and not results.is_dir():
        raise ConfigError(f"--results {results} is no folder; give one that holds what `vtprune eval` wrote")
    if video_backend is not None:
        from ..video import backends

        if video_backend not in backends():
            raise ConfigError(
                f"--video-backend {video_backend} is not installed; found: {', '.join(backends()) or '-'}"
            )
    folder = results or (RESULTS if RESULTS.is_dir() else None)
    check_dtype(dtype)
    with quiet(False) as say:
        say("starting")
        ready(device)
        from ..demo.serve import running
        from ..demo.studio import Studio

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
