# SPDX-License-Identifier: Apache-2.0
"""Pictures, videos and questions of strangers: limits, and one clear line for whatever is refused."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from .. import video
from ..errors import InputError

MAX_BYTES = 25 * 1024 * 1024
MAX_PIXELS = 50_000_000
MAX_SECONDS = 60
MAX_QUESTION = 500
#: Pixels of a video's frame; all of them are decoded, up to the last one that is shown.
MAX_FRAME_PIXELS = 4096 * 2304
#: What is kept of a picture: no model of ours reads more of its longer side.
KEPT_SIDE = 2048
#: Nothing that runs code or fetches files (SVG, EPS, PDF) and no rare decoder.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def picture(path: str | Path) -> Image.Image:
    """Open an uploaded picture.

    Returns
    -------
    PIL.Image.Image
        RGB, the right way up, its longer side at most `KEPT_SIDE` pixels; of an animation the first frame.

    Raises
    ------
    InputError
        It is too large, no picture, damaged, or unfolds to more pixels than `MAX_PIXELS`.
    """
    _check_bytes(path, "picture")
    cure = "give a PNG, JPEG, WebP, GIF or BMP file"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            with Image.open(path, formats=FORMATS) as file:
                # The header says so; nothing has been unpacked yet.
                if file.width * file.height > MAX_PIXELS:
                    raise InputError(
                        f"the picture has {file.width} x {file.height} pixels, and {MAX_PIXELS // 10**6} million is "
                        "the limit; make it smaller"
                    )
                file.draft("RGB", (KEPT_SIDE, KEPT_SIDE))
                opened = ImageOps.exif_transpose(file)
                if opened.mode in ("RGBA", "LA", "PA") or "transparency" in opened.info:
                    # What is transparent is white, as on most pages, not whatever colour hides below.
                    clear = opened.convert("RGBA")
                    opened = Image.alpha_composite(Image.new("RGBA", clear.size, (255, 255, 255, 255)), clear)
                opened = opened.convert("RGB")
    except UnidentifiedImageError:
        raise InputError(f"this is not a picture that can be read here; {cure}") from None
    except Image.DecompressionBombError:
        raise InputError("the picture unfolds to far too many pixels; make it smaller") from None
    except (OSError, SyntaxError, ValueError, MemoryError, struct.error) as error:  # the last of its EXIF data
        raise InputError(f"the picture is damaged ({' '.join(str(error).split())[:120]}); {cure}") from None
    if max(opened.size) > KEPT_SIDE:
        opened.thumbnail((KEPT_SIDE, KEPT_SIDE), Image.Resampling.BICUBIC)
    return opened


def clip(path: str | Path, *, fps: float, frames: int, side: int, backend: str | None = None) -> video.Clip:
    """Read an uploaded video; see `vtprune.video.read`.

    Raises
    ------
    InputError
        It is too large, too long, no video, or damaged.
    """
    _check_bytes(path, "video")
    return video.read(
        path,
        fps=fps,
        frames=frames,
        side=side,
        max_seconds=MAX_SECONDS,
        max_pixels=MAX_FRAME_PIXELS,
        backend=backend,
    )


def question(text: str | None) -> str:
    """A question in one line.

    Raises
    ------
    InputError
        It is empty or too long.
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in text or "").split())
    if not text:
        raise InputError("the question is empty; write one, or take one of those below it")
    if len(text) > MAX_QUESTION:
        raise InputError(f"the question has {len(text)} characters, and {MAX_QUESTION} is the limit; shorten it")
    return text


def _check_bytes(path: str | Path, what: str) -> None:
    try:
        size = Path(path).stat().st_size
    except OSError:
        raise InputError(f"the {what} did not arrive; upload it again") from None
    if size > MAX_BYTES:
        raise InputError(
            f"the {what} has {size / 2**20:.0f} MB, and {MAX_BYTES // 2**20} MB is the limit; make it smaller"
        )
