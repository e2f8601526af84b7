# SPDX-License-Identifier: Apache-2.0
"""Score the folder of a pocket model on test questions, as the end of training scores what it trained.

``python -m vtprune.models.pocket.score MODEL [--folder DIR] [--worlds basic hires] [--questions N] [--write]``

The weights are those that ship, after whatever was done to them since training. With ``--write`` the scores take the
place of those in the folder's log, and its model card is written anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .card import model_card
from .export import HERE, MODELS, read_log, sha256
from .families import FAMILIES
from .layout import WEIGHTS_FILE
from .model import LOG_FILE
from .plans import STAGES
from .train import EXAMS, Recipe, Trainer, exam_check


def score(
    name: str,
    folder: Path | None = None,
    worlds: Sequence[str] | None = None,
    questions: int = Recipe.test_questions,
    device: str | None = None,
) -> dict[str, Any]:
    """Accuracy of the weights in a folder: `Trainer.accuracy` on the test split, with all visual tokens.

    Parameters
    ----------
    name
        One of ``FAMILIES``.
    folder
        A model's folder; by default the one in the package.
    worlds
        What to ask, by default all that the model is scored on.
    questions
        Of each world; of easy-VQA, always all of its test split.
    device
        On a GPU, the default where there is one, the forward runs in bf16.

    Returns
    -------
    dict
        The row of the log: means and kinds of each world, and the SHA-256 of the weights.

    Raises
    ------
    ValueError
        A world that the model is not scored on, or a folder without weights.
    """
    folder = folder or HERE / name
    worlds = EXAMS[name] if worlds is None else worlds
    for world in worlds:
        if world not in EXAMS[name]:
            raise ValueError(f"{name} is not scored on {world!r}; choose of {', '.join(EXAMS[name])}")
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise ValueError(f"there are no weights {weights}; give the folder of a model")
    family = FAMILIES[name]()
    # Its sizes are those of the folder, which may have fewer neurons than were trained.
    family.model = type(family.model).from_pretrained(folder, dtype=torch.float32)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(family, Recipe(), STAGES[name][0], device, compiled=False)
    checks = [exam_check(family, world, "test", 1 << 30 if world == "easy-vqa" else questions) for world in worlds]
    found = {key: round(value, 6) for key, value in trainer.accuracy(checks).items()}
    return {"event": "test", "questions": questions, "weights": sha256(weights), **found}


def write(name: str, row: dict[str, Any], folder: Path | None = None) -> None:
    """Put the scores into the folder's log, in place of those that are there, and write its card anew.

    Raises
    ------
    ValueError
        The scores are not of all worlds, or of other weights.
    """
    folder = folder or HERE / name
    missing = [world for world in EXAMS[name] if f"{world}/mean" not in row]
    if missing or row["weights"] != sha256(folder / WEIGHTS_FILE):
        raise ValueError(
            f"these are no scores of {folder}: " + (f"{', '.join(missing)} are missing" if missing else "other weights")
        )
    log = [*(old for old in read_log(folder / LOG_FILE) if old.get("event") != "test"), row]
    parameters = sum(p.numel() for p in type(FAMILIES[name]().model).from_pretrained(folder).parameters())
    card = model_card(name, log, parameters, (folder / WEIGHTS_FILE).stat().st_size)
    (folder / LOG_FILE).write_text("".join(json.dumps(old) + "\n" for old in log))
    (folder / "README.md").write_text(card)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Score the folder of a pocket model on test questions.")
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--folder", type=Path, help="folder of the model; default the one in the package")
    parser.add_argument("--worlds", nargs="+", help="default: all that it is scored on")
    parser.add_argument("--questions", type=int, default=Recipe.test_questions, help="of each world")
    parser.add_argument("--write", action="store_true", help="put the scores into the folder's log and its card")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    try:
        row = score(args.model, args.folder, args.worlds, args.questions)
        print(json.dumps(row), flush=True)
        if args.write:
            write(args.model, row, args.folder)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
