# SPDX-License-Identifier: Apache-2.0
"""Build the sprite atlas from the npm package ``@lobehub/fluent-emoji-3d`` 1.1.0.

``npm pack @lobehub/fluent-emoji-3d@1.1.0``, then
``python -m vtprune.models.pocket.make_sprites lobehub-fluent-emoji-3d-1.1.0.tgz``

Run once. The atlas is in the repository; its SHA-256, printed here, is ``sprites.ATLAS_SHA256``. Another version of
Pillow can write other bytes for the same pixels.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from .sprites import ATLAS_COLUMNS, ATLAS_FILE, ATLAS_ROWS, NAMES, SIZE

TARBALL_SHA256 = "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
# Name of each sprite's file in the package: its code points.
CODE_POINTS = {
    "airplane": "2708-fe0f",
    "anchor": "2693",
    "apple": "1f34e",
    "backpack": "1f392",
    "balloon": "1f388",
    "banana": "1f34c",
    "bear": "1f43b",
    "bed": "1f6cf-fe0f",
    "bee": "1f41d",
    "bell": "1f514",
    "bicycle": "1f6b2",
    "bone": "1f9b4",
    "book": "1f4d5",
    "boot": "1f462",
    "bread": "1f35e",
    "broccoli": "1f966",
    "broom": "1f9f9",
    "bucket": "1faa3",
    "bus": "1f68c",
    "butterfly": "1f98b",
    "cactus": "1f335",
    "cake": "1f370",
    "camera": "1f4f7",
    "candle": "1f56f-fe0f",
    "car": "1f697",
    "carrot": "1f955",
    "castle": "1f3f0",
    "cat": "1f431",
    "cheese": "1f9c0",
    "cherries": "1f352",
    "chicken": "1f414",
    "cloud": "2601-fe0f",
    "corn": "1f33d",
    "cow": "1f42e",
    "crab": "1f980",
    "crown": "1f451",
    "dog": "1f436",
    "donut": "1f369",
    "dress": "1f457",
    "drum": "1f941",
    "duck": "1f986",
    "eggplant": "1f346",
    "elephant": "1f418",
    "envelope": "2709-fe0f",
    "fish": "1f41f",
    "flamingo": "1f9a9",
    "fox": "1f98a",
    "fries": "1f35f",
    "frog": "1f438",
    "ghost": "1f47b",
    "gift": "1f381",
    "giraffe": "1f992",
    "grapes": "1f347",
    "guitar": "1f3b8",
    "hamburger": "1f354",
    "hammer": "1f528",
    "hat": "1f3a9",
    "helicopter": "1f681",
    "house": "1f3e0",
    "key": "1f511",
    "ladybug": "1f41e",
    "laptop": "1f4bb",
    "lemon": "1f34b",
    "lion": "1f981",
    "lock": "1f512",
    "lollipop": "1f36d",
    "magnet": "1f9f2",
    "microphone": "1f3a4",
    "microscope": "1f52c",
    "monkey": "1f435",
    "mushroom": "1f344",
    "octopus": "1f419",
    "owl": "1f989",
    "panda": "1f43c",
    "parrot": "1f99c",
    "pencil": "270f-fe0f",
    "penguin": "1f427",
    "phone": "1f4f1",
    "piano": "1f3b9",
    "pig": "1f437",
    "pineapple": "1f34d",
    "pizza": "1f355",
    "popcorn": "1f37f",
    "pretzel": "1f968",
    "pumpkin": "1f383",
    "rabbit": "1f430",
    "rainbow": "1f308",
    "robot": "1f916",
    "rocket": "1f680",
    "rose": "1f339",
    "sailboat": "26f5",
    "scissors": "2702-fe0f",
    "shark": "1f988",
    "sheep": "1f411",
    "shirt": "1f455",
    "snail": "1f40c",
    "snake": "1f40d",
    "snowflake": "2744-fe0f",
    "snowman": "26c4",
    "socks": "1f9e6",
    "spider": "1f577-fe0f",
    "strawberry": "1f353",
    "sunflower": "1f33b",
    "taco": "1f32e",
    "teapot": "1fad6",
    "television": "1f4fa",
    "tent": "26fa",
    "tiger": "1f42f",
    "tractor": "1f69c",
    "tree": "1f333",
    "trophy": "1f3c6",
    "truck": "1f69a",
    "trumpet": "1f3ba",
    "turtle": "1f422",
    "umbrella": "2602-fe0f",
    "unicorn": "1f984",
    "volcano": "1f30b",
    "watermelon": "1f349",
    "whale": "1f433",
    "zebra": "1f993",
}


def build(tarball: Path) -> Image.Image:
    """Shrink the pictures of the package and lay them out in the order of ``NAMES``.

    Parameters
    ----------
    tarball
        The package as npm serves it.

    Returns
    -------
    PIL.Image.Image
        RGBA, 12 x 10 sprites of 48 x 48 pixels.

    Raises
    ------
    ValueError
        If the file is not the package's version 1.1.0.
    """
    packed = tarball.read_bytes()
    digest = hashlib.sha256(packed).hexdigest()
    if digest != TARBALL_SHA256:
        raise ValueError(f"{tarball} has SHA-256 {digest}, expected {TARBALL_SHA256}")
    sheet = np.zeros((ATLAS_ROWS * SIZE, ATLAS_COLUMNS * SIZE, 4), np.uint8)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for i, name in enumerate(NAMES):
            member = archive.extractfile(f"package/assets/{CODE_POINTS[name]}.webp")
            assert member is not None
            picture = Image.open(io.BytesIO(member.read())).convert("RGBA")
            # Pillow weights colours by alpha here, so that what lies under transparent pixels does not bleed in.
            pixels = np.array(picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
            pixels[pixels[..., 3] == 0] = 0
            row, column = divmod(i, ATLAS_COLUMNS)
            sheet[row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE] = pixels
    return Image.fromarray(sheet, "RGBA")


def main() -> None:
    """Write the atlas and print its SHA-256."""
    parser = argparse.ArgumentParser(description="Build the sprite atlas.")
    parser.add_argument("tarball", type=Path, help="lobehub-fluent-emoji-3d-1.1.0.tgz")
    parser.add_argument("--out", type=Path, default=ATLAS_FILE)
    arguments = parser.parse_args()
    build(arguments.tarball).save(arguments.out, optimize=True)
    print(hashlib.sha256(arguments.out.read_bytes()).hexdigest())


if __name__ == "__main__":
    main()
