# SPDX-License-Identifier: Apache-2.0
"""Draw the pictures in this folder: ``python examples/make_pictures.py``. The same files on every run.

They come from the test split of PocketVQA, which the embedded models never saw.
"""

from __future__ import annotations

from pathlib import Path

from vtprune.models.pocket.data import questions, render, scene

#: File name -> number of the scene in the test split.
PICTURES = {"shapes": 27, "text": 8}


def main() -> None:
    folder = Path(__file__).parent
    for name, index in PICTURES.items():
        item = scene("test", index)
        render(item).save(folder / f"{name}.png", optimize=True)
        print(f"{name}.png")
        for question in questions(item, limit=6):
            print(f"  {question.text:45s} {question.answer}")


if __name__ == "__main__":
    main()
