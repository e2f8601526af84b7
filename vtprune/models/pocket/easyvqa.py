# SPDX-License-Identifier: Apache-2.0
"""easy-VQA: pictures and questions from the PyPI package ``easy-vqa`` (MIT), which nobody here wrote.

4,000 pictures and 38,575 questions for training, 1,000 and 9,673 for testing. The package is optional; nothing of it
is shipped here.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ...errors import ConfigError, InputError

SPLITS = ("train", "test")
SIDE = 64  # pixels, height and width
ANSWERS = (
    *("yes", "no", "circle", "rectangle", "triangle"),
    *("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
)
# Every word of the questions, and every answer.
WORDS = (
    *("?", "a", "color", "contain", "does", "image", "in", "is", "not", "of", "present", "shape"),
    *("the", "there", "what"),
    *ANSWERS,
)
# SHA-256 of the pixels, then of "<picture>\t<question>\t<answer>\n" for every question, in version 1.0 of the package.
SHA256 = {
    "train": "b1a573b24e1c5566eabcf1d4259a083f74732222fe21447dd97e91efd3eab6cd",
    "test": "9226c428df5f5683483bc17bdd50ecaff357d5c0c2e887445bb9f8aac4e10e80",
}


@dataclass(frozen=True)
class EasyVQA:
    """One split of easy-VQA.

    Attributes
    ----------
    pictures
        uint8 ``[N, 64, 64, 3]``, RGB, in the order of the package's picture numbers.
    questions
        Index of the picture, question and answer (one of ``ANSWERS``). Questions are lower case with a space before
        the question mark, such as ``"is there a red shape ?"``.
    """

    pictures: np.ndarray
    questions: tuple[tuple[int, str, str], ...]


def load(split: str) -> EasyVQA:
    """Read one split from the installed package; the 4,000 pictures of ``"train"`` take about a second.

    Parameters
    ----------
    split
        ``"train"`` or ``"test"``.

    Returns
    -------
    EasyVQA
        The same on every machine: its hash is checked.

    Raises
    ------
    ConfigError
        If the split is unknown, or ``easy-vqa`` is not installed or is not version 1.0.
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r} of easy-VQA; choose one of {', '.join(SPLITS)}")
    try:
        package = importlib.import_module("easy_vqa")
    except ModuleNotFoundError:
        raise ConfigError("easy-VQA needs the package easy-vqa: pip install 'vtprune[pocket]'") from None
    texts, answers, numbers = getattr(package, f"get_{split}_questions")()
    paths = getattr(package, f"get_{split}_image_paths")()
    pictures = np.empty((len(paths), SIDE, SIDE, 3), np.uint8)
    for number in range(len(paths)):
        with Image.open(paths[number]) as image:
            pictures[number] = np.asarray(image.convert("RGB"))
    spaced = [" ".join(re.findall(r"\w+|[^\w\s]", text.lower())) for text in texts]
    questions = tuple(zip(numbers, spaced, answers, strict=True))
    digest = hashlib.sha256(pictures.data)
    digest.update("".join(f"{number}\t{text}\t{answer}\n" for number, text, answer in questions).encode())
    if digest.hexdigest() != SHA256[split]:
        raise ConfigError(
            f"the {split} split of easy-VQA has SHA-256 {digest.hexdigest()}, expected {SHA256[split]}: "
            "pip install --force-reinstall easy-vqa==1.0"
        )
    return EasyVQA(pictures, questions)


def upscale(pictures: Tensor, side: int) -> Tensor:
    """Enlarge pictures as the stock CLIP image processor does: bicubic, rounded to 8 bits.

    Parameters
    ----------
    pictures
        uint8 ``[B, 64, 64, 3]``, on any device.
    side
        Height and width of the result in pixels.

    Returns
    -------
    Tensor
        float32 ``[B, 3, side, side]`` in [0, 1], on the same device, not yet normalised.

    Raises
    ------
    InputError
        If the pictures have another type or shape.
    """
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1:] != (SIDE, SIDE, 3):
        raise InputError(f"pictures must be uint8 [B, 64, 64, 3], got {pictures.dtype} {list(pictures.shape)}")
    pixels = pictures.permute(0, 3, 1, 2).float()
    # The processor's resize goes along the rows, then along the columns, and rounds to 8 bits after each. `antialias`
    # smooths nothing in an enlargement; it is here because torch then uses Pillow's cubic (a = -0.5).
    for size in ((SIDE, side), (side, side)):
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).round().clamp(0, 255)
    return pixels / 255
