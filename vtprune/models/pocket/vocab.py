# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of the pocket models: one id per word, and one per character that can be read in a picture.

The list only grows at its end: a checkpoint knows the first so many words.
"""

from __future__ import annotations

from . import easyvqa
from .data import CHARACTERS, COLORS, COLUMNS, ROWS, SHAPES, SIZES, Question
from .sprites import NAMES
from .worlds import LABELS, ORDINALS, WAYS

PAD, UNK, BOS, EOS, IMAGE = range(5)
SPECIALS = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
CHARACTER_PREFIX = "##"
_WORDS = (
    *("?", "is", "there", "a", "an", "what", "color", "shape", "the", "object", "how", "many", "objects", "are"),
    *("where", "does", "text", "say", "yes", "no"),
)
#: What the six basic kinds of question need; the first stage of training knows these alone.
BASIC = (
    *SPECIALS,
    *_WORDS,
    *ROWS,
    *COLUMNS,
    *(str(digit) for digit in range(10)),
    *SHAPES,
    *COLORS,
    *(CHARACTER_PREFIX + character for character in CHARACTERS),
)
VIDEO, VISION_START, VISION_END = (len(BASIC) + i for i in range(3))
VISION_SPECIALS = ("<video>", "<vision_start>", "<vision_end>")
_MORE = (
    *VISION_SPECIALS,
    *("of", "above", "below", "at", "in", "picture", "which", "way", "move", "appear", "appears", "last", "label"),
    *SIZES,
    *ORDINALS,
    *WAYS,
    *NAMES,
    *LABELS,
    *easyvqa.WORDS,
)
TOKENS = tuple(dict.fromkeys((*BASIC, *_MORE)))  # several of the later words are known already
READING_KINDS = ("ocr", "clutter-ocr", "pair-ocr", "hires-ocr", "flash")
IDS = {token: i for i, token in enumerate(TOKENS)}


def encode(text: str) -> list[int]:
    """Ids of the words of a text; words are parted by spaces, unknown ones become ``<unk>``."""
    return [IDS.get(word, UNK) for word in text.lower().split()]


def encode_answer(question: Question) -> list[int]:
    """Ids of a question's answer; a text that was read is one id per character."""
    if question.kind in READING_KINDS:
        return [IDS[CHARACTER_PREFIX + character] for character in question.answer]
    return encode(question.answer)
