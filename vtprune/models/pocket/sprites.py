# SPDX-License-Identifier: Apache-2.0
"""120 small named pictures (dog, key, pizza, ...) for the questions about names.

They are emoji of Microsoft's Fluent set under the MIT licence; ``sprites/`` holds the atlas, the licence and a note on
where it is from, and ``make_sprites`` made it.
"""

from __future__ import annotations

import hashlib
import io
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import ConfigError

# In alphabetical order, which is the order in the atlas, row by row.
NAMES = (
    *("airplane", "anchor", "apple", "backpack", "balloon", "banana", "bear", "bed", "bee", "bell"),
    *("bicycle", "bone", "book", "boot", "bread", "broccoli", "broom", "bucket", "bus", "butterfly"),
    *("cactus", "cake", "camera", "candle", "car", "carrot", "castle", "cat", "cheese", "cherries"),
    *("chicken", "cloud", "corn", "cow", "crab", "crown", "dog", "donut", "dress", "drum"),
    *("duck", "eggplant", "elephant", "envelope", "fish", "flamingo", "fox", "fries", "frog", "ghost"),
    *("gift", "giraffe", "grapes", "guitar", "hamburger", "hammer", "hat", "helicopter", "house", "key"),
    *("ladybug", "laptop", "lemon", "lion", "lock", "lollipop", "magnet", "microphone", "microscope", "monkey"),
    *("mushroom", "octopus", "owl", "panda", "parrot", "pencil", "penguin", "phone", "piano", "pig"),
    *("pineapple", "pizza", "popcorn", "pretzel", "pumpkin", "rabbit", "rainbow", "robot", "rocket", "rose"),
    *("sailboat", "scissors", "shark", "sheep", "shirt", "snail", "snake", "snowflake", "snowman", "socks"),
    *("spider", "strawberry", "sunflower", "taco", "teapot", "television", "tent", "tiger", "tractor", "tree"),
    *("trophy", "truck", "trumpet", "turtle", "umbrella", "unicorn", "volcano", "watermelon", "whale", "zebra"),
)
SIZE = 48  # pixels, height and width; fits a cell of 56
ATLAS_COLUMNS, ATLAS_ROWS = 12, 10
ATLAS_FILE = Path(__file__).parent / "sprites" / "atlas.png"
ATLAS_SHA256 = "23d89afab96454e8c12486abb7f30ba6e10d52ef84269f11fb89e0d159dea755"


@lru_cache(maxsize=1)
def atlas() -> np.ndarray:
    """Read the sprites.

    Returns
    -------
    numpy.ndarray
        uint8 ``[120, 48, 48, 4]``, RGBA with straight alpha, in the order of ``NAMES``; pixels that are wholly
        transparent are zero. Cached, therefore read-only.

    Raises
    ------
    ConfigError
        If the file is missing or is not the one that this version of the package was made with.
    """
    try:
        packed = ATLAS_FILE.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"the sprites are missing: no file {ATLAS_FILE}; reinstall vtprune") from None
    digest = hashlib.sha256(packed).hexdigest()
    if digest != ATLAS_SHA256:
        raise ConfigError(
            f"the sprites are damaged: {ATLAS_FILE} has SHA-256 {digest}, expected {ATLAS_SHA256}; reinstall vtprune"
        )
    with Image.open(io.BytesIO(packed)) as image:
        sheet = np.asarray(image)
    tiles = sheet.reshape(ATLAS_ROWS, SIZE, ATLAS_COLUMNS, SIZE, 4).swapaxes(1, 2)
    sprites = np.ascontiguousarray(tiles).reshape(len(NAMES), SIZE, SIZE, 4)
    sprites.flags.writeable = False
    return sprites
