# SPDX-License-Identifier: Apache-2.0
"""Start the demo's server, safe by default."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from .studio import Studio

#: Looked for where `vtprune demo` is run, if no folder of results is given.
RESULTS = Path("benchmarks/results")


def parse_auth(text: str | None) -> tuple[str, str] | None:
    """``name:password`` as a pair.

    Raises
    ------
    ConfigError
        One of the two is missing.
    """
    if text is None:
        return None
    name, colon, password = text.partition(":")
    if not (name and colon and password):
        raise ConfigError("--auth is not of the form name:password, for example --auth me:secret")
    return name, password


@contextmanager
def running(
    studio: Studio,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    auth: tuple[str, str] | None = None,
    results: Path | None = None,
    video_backend: str | None = None,
) -> Iterator[str]:
    """Within this block the demo is served; yields its address.

    Parameters
    ----------
    studio
        Does the work; it begins to load its model.
    host, port
        Where to listen: by default on this machine alone, on the first free port from 7860 on.
    share
        Also open a public address, through Gradio's servers.
    auth
        Name and password that everyone must give.
    results
        Folder of results for the board.
    video_backend
        See `vtprune.video.read`.
    """
    studio.start()
    # A folder of our own, that nobody else can read, for what is uploaded.
    folder = tempfile.mkdtemp(prefix="vtprune-demo-")
    settings = {
        "GRADIO_TEMP_DIR": folder,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    page: Any = None
    try:
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"the demo needs gradio ({error}); pip install 'vtprune[demo]'") from None
        from . import pages
        from .app import QUEUE_LENGTH, App, theme
        from .guard import MAX_BYTES

        page = App(studio, results, video_backend).build().queue(max_size=QUEUE_LENGTH)
        try:
            _, local, public = page.launch(
                server_name=host,
                server_port=port,
                share=share,
                auth=auth,
                max_file_size=MAX_BYTES,
                prevent_thread_lock=True,
                show_error=False,  # what is not an error of ours says nothing of this machine
                quiet=True,
                inbrowser=False,
                ssr_mode=False,
                footer_links=[],
                state_session_capacity=256,
                theme=theme(),
                head=f"<style>{pages.CSS}</style>",  # as it is; `css=` puts the container before each rule
            )
        except OSError as error:  # a port that is taken, an address that is not ours
            raise ConfigError(f"cannot listen on {host}, port {port or 'any'} ({error}); choose others") from None
        yield public or local
    finally:
        if page is not None:
            page.close(verbose=False)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)
