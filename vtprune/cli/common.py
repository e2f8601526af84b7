# SPDX-License-Identifier: Apache-2.0
"""What all commands share: the application, what is said while they run, and what of their input is read alike."""

from __future__ import annotations

import contextlib
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import ConfigError, InputError, VTPruneWarning
from ..plain import parse_json

if TYPE_CHECKING:
    from PIL import Image

    from ..config import PruneConfig

DTYPES = ("float32", "bfloat16", "float16")
EVAL_KEEPS = ["1/4", "1/9"]
app = typer.Typer(
    name="vtprune",
    help="Prune the visual tokens of vision-language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def one_line(reason: object) -> str:
    return " ".join(str(reason).split())


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def percent(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{100 * value:{sign}.1f}"


def plain_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        name, paper = column in ("method", "option"), column == "paper"
        table.add_column(column, overflow="fold", no_wrap=name or paper, style="bold" if name else None)
    return table


@contextlib.contextmanager
def quiet(silent: bool) -> Iterator[Callable[[str], None]]:
    """Show what is going on in one moving line on stderr, and keep the libraries below from writing over it."""
    console = Console(stderr=True, highlight=False)

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, VTPruneWarning):
            console.print("warning:", one_line(message), markup=False, soft_wrap=True)

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


def open_image(path: Path) -> Image.Image:
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
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the image {path} ({one_line(error)}); save it again, or {cure}") from None


def config_of(method: str, keep: str, options: Sequence[str]) -> PruneConfig:
    from ..compose import parse_keeps, parse_names
    from ..config import PruneConfig

    parsed: dict[str, Any] = {}
    for item in options:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--option {item!r} is not of the form key=value, for example importance=norm")
        try:
            parsed[key.strip()] = parse_json(value)  # numbers, true, false, null
        except ValueError:
            parsed[key.strip()] = value
    return PruneConfig(method=parse_names(method), keep=parse_keeps(keep), options=parsed)


def check_dtype(dtype: str | None) -> None:
    """Refuse a dtype that is none of ours."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype} is unknown; choose one of {', '.join(DTYPES)}")


def load(model: str, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    """The model and its processor, loaded without a word from the libraries below."""
    check_dtype(dtype)
    ready(device)
    import torch

    import vtprune

    return vtprune.load(model, device=device, dtype=getattr(torch, dtype) if dtype else None)


def ready(device: str | None) -> None:
    """Refuse a device that cannot be used, and silence the libraries that load models."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ConfigError(f"--device {device} cannot be used ({first_line(error)}); try --device cpu") from None
