# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of the pocket models: one id per word, and one per character that can be read in a picture."""

from __future__ import annotations

from .data import CHARACTERS, COLORS, COLUMNS, ROWS, SHAPES, Question

PAD, UNK, BOS, EOS, IMAGE = range(5)
SPECIALS = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
CHARACTER_PREFIX = "##"
_WORDS = (
    *("?", "is", "there", "a", "an", "what", "color", "shape", "the", "object", "how", "many", "objects", "are"),
    *("where", "does", "text", "say", "yes", "no"),
)
TOKENS = (
    *SPECIALS,
    *_WORDS,
    *ROWS,
    *COLUMNS,
    *(str(digit) for digit in range(10)),
    *SHAPES,
    *COLORS,
    *(CHARACTER_PREFIX + character for character in CHARACTERS),
)
IDS = {token: i for i, token in enumerate(TOKENS)}


def encode(text: str) -> list[int]:
    """Ids of the words of a text; words are parted by spaces, unknown ones become ``<unk>``."""
    return [IDS.get(word, UNK) for word in text.lower().split()]


def encode_answer(question: Question) -> list[int]:
    """Ids of a question's answer; a text that was read is one id per character."""
    if question.kind == "ocr":
        return [IDS[CHARACTER_PREFIX + character] for character in question.answer]
    return encode(question.answer)
