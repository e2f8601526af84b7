# SPDX-License-Identifier: Apache-2.0
"""Model cards of the pocket models: fixed words, and numbers that come from the training log alone."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import vocab
from .sprites import NAMES

FIRST_STAGE = "basic"  # of rows that name none: an older version of this code wrote them
_OLD_KINDS = ("mean", "exist", "color", "shape", "count", "where", "ocr")

#: World: what its pictures show, and questions with answers.
WORLDS = {
    "basic": (
        "336 x 336: 2 to 7 shapes, perhaps a text",
        "is there a red circle ? yes; what color is the circle ? red; what shape is the red object ? circle; "
        "how many objects are there ? 4; where is the red circle ? top left; what does the text say ? K7P",
    ),
    "extended": (
        "336 x 336: more shapes, of which many differ in one attribute only, and 1 to 4 of 120 small named pictures",
        "what is left of the red star ? dog; what is the picture at the top right ? key; "
        "where is the small red ring ? bottom center",
    ),
    "clutter": (
        "336 x 336: as basic, on a background of blotches as large as patches",
        "as basic",
    ),
    "hires": (
        "672 x 672 and other sizes: small shapes, 2 to 5 texts",
        "what does the red text say ? K7P; what shape is the small red object ? ring; "
        "where is the small red ring ? top left",
    ),
    "pair": (
        "two pictures of 336 x 336",
        "what color is the ring in the second picture ? red; how many objects are there in the first picture ? 4",
    ),
    "icl": (
        "five pictures of 336 x 336, four of them with their labels; what a label stands for, a shape or a colour, is "
        "new in each prompt",
        "which color label ? wug; which shape label ? dax",
    ),
    "video": (
        "8, 16 or 32 frames of 224 x 224",
        "which way does the red ring move ? up; what appears first ? blue star; how many objects appear ? 3; "
        "what does the text say ? K7P (it is in one frame only)",
    ),
    "easy-vqa": (
        "64 x 64, scaled to 336 x 336: one shape, by the authors of easy-VQA",
        "what color is the shape ? teal; is there not a circle in the image ? yes",
    ),
}


@dataclass(frozen=True)
class About:
    """What the card of one model says that is not in its log."""

    architecture: str
    summary: str
    worlds: tuple[str, ...]
    start: str
    limits: tuple[str, ...] = ()


MODELS = {
    "pocket-llava": About(
        "LlavaForConditionalGeneration",
        "A CLIP-type vision transformer (336 px, patch 14, 192 x 6) gives 576 visual tokens to a Llama-type language "
        "model (256 x 6).",
        ("basic", "extended", "clutter", "pair", "icl", "easy-vqa"),
        "Trained from scratch.",
        ("Pictures that are not square are squeezed to 336 x 336.",),
    ),
    "pocket-llava-next": About(
        "LlavaNextForConditionalGeneration",
        "AnyRes: a thumbnail and up to four crops, each seen by a CLIP-type vision transformer (336 px, patch 14, "
        "192 x 6), with unpadding and a newline after each row of patches, in a Llama-type language model (256 x 6). A "
        "picture of 672 x 672 has 2,928 visual tokens.",
        ("basic", "extended", "hires"),
        "All weights but the newline began as those of pocket-llava.",
        (
            "One picture a prompt: it was not trained on several.",
            "It was not trained further on demonstrations, which pocket-llava has seen, and has not been scored on "
            "them, on cluttered pictures and on easy-VQA.",
        ),
    ),
    "pocket-qwen2.5-vl": About(
        "Qwen2_5_VLForConditionalGeneration",
        "A vision transformer at native resolution (patch 14, 192 x 6, windows of 112 px, two blocks with full "
        "attention) whose patches are merged two by two, and a Qwen2-type language model (256 x 6) with M-RoPE. A "
        "picture of 336 x 336 has 144 visual tokens, one of 672 x 672 has 576, a clip "
        "64 for every two frames of 224 x 224.",
        ("basic", "extended", "clutter", "hires", "pair", "icl", "video", "easy-vqa"),
        "The language model began as that of pocket-llava, the vision tower at random.",
        (
            "Clips need `video_metadata` that says two frames a second, as `qwen.video_metadata` makes it: "
            "transformers 5 takes clips given as arrays for 24 frames a second, and all their frames for "
            "the same moment.",
            "Positions of the text after a clip of more than 16 frames differ between versions of transformers: in "
            "4.57 and 5.0 time counts too, in 5.17 and later it does not. It was trained on both; the scores are for "
            "the later ones.",
            "It has no CLS token.",
        ),
    ),
}


LIMITS = (
    f"It has seen coloured clip art, {len(NAMES)} small pictures and one typeface, and knows {len(vocab.TOKENS)} "
    "tokens. It says nothing about natural photographs, and numbers measured on it say nothing about how a method does "
    "on them.",
    "A question in other words, without the question mark at its end, or about something that is not in the picture "
    "gets an arbitrary answer.",
)


@dataclass
class Part:
    """What the log says about one stage."""

    steps: int
    peak: float
    done: int = 0
    seconds: float = 0.0
    pace: list[float] = field(default_factory=list)  # milliseconds a step
    prompts: list[float] = field(default_factory=list)  # a step, in each run
    where: list[str] = field(default_factory=list)


def is_finished(log: Sequence[dict[str, Any]]) -> bool:
    """Whether the last thing that was logged is the test, which follows the last stage."""
    return bool(log) and log[-1].get("event") == "test"


def _normal(row: dict[str, Any]) -> dict[str, Any]:
    """A row in today's words."""
    if row.get("event") == "test" and "mean" not in row:
        return row
    row = {"stage": FIRST_STAGE, **row}
    if row.get("event") in ("val", "test") and "mean" in row:
        row |= {f"basic/{kind}": row.pop(kind) for kind in _OLD_KINDS}
    return row


def parts(log: Iterable[dict[str, Any]]) -> dict[str, Part]:
    """Stages of a log, in order. ``log`` has one row a line of the file."""
    found: dict[str, Part] = {}
    clock, begun, images = 0.0, 0, 0
    for raw in log:
        row = _normal(raw)
        if row.get("event") == "start":
            part = found.setdefault(row["stage"], Part(row["steps"], row["peak"]))
            part.steps, begun, images = row["steps"], row["step"], row.get("batch", 0)
            where = f"{row['gpu']}, torch {row['torch']}, transformers {row['transformers']}"
            part.where += [where] if where not in part.where else []
            part.prompts.append(images)
        if "seconds" in row:
            part = found[row["stage"]]
            # The clock runs through the stages of one run, and starts anew with the next run.
            part.seconds += row["seconds"] - (clock if row["seconds"] >= clock else 0.0)
            clock = row["seconds"]
            part.done = max(part.done, row["step"])
        if "ce" in row:
            part.pace.append(row["ms"] if "ms" in row else 1000 * images / row["img/s"])
            if "prompts" in row:
                part.prompts[-1] = row["prompts"] / (row["step"] - begun)
    return found


def _prose(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _scores(row: dict[str, Any], worlds: Iterable[str]) -> str:
    """Accuracy of each world, and of its kinds."""
    lines = []
    for world in worlds:
        if f"{world}/mean" not in row:
            continue
        kinds = {key.split("/", 1)[1]: value for key, value in row.items() if key.startswith(f"{world}/")}
        mean = kinds.pop("mean")
        lines.append([world, f"{mean:.3f}", ", ".join(f"{kind} {share:.3f}" for kind, share in kinds.items()) or "–"])
    return _table(["world", "mean", "kinds"], lines)


def _curve(rows: Sequence[dict[str, Any]], worlds: Iterable[str]) -> str:
    """Accuracy on validation questions, every 1,000 steps and at the end of a stage."""
    shown = [
        row
        for row, after in zip(rows, [*rows[1:], None], strict=True)
        if row["step"] % 1000 == 0 or after is None or after["stage"] != row["stage"]
    ]
    known = [world for world in worlds if any(f"{world}/mean" in row for row in shown)]
    lines = []
    for row in shown:
        means = [f"{row[key]:.3f}" if (key := f"{world}/mean") in row else "–" for world in known]
        lines.append([row["stage"], str(row["step"]), *means])
    return _table(["stage", "step", *known], lines)


def _stages(found: dict[str, Part]) -> str:
    lines = []
    for name, part in found.items():
        prompts = statistics.mean(part.prompts) * part.done
        steps = f"{part.done:,}" if part.done == part.steps else f"{part.done:,} of {part.steps:,}"
        pace = f"{statistics.median(part.pace):.0f}" if part.pace else "–"
        lines.append([name, steps, f"{part.peak:g}", f"{prompts / 1e6:.2f} M", f"{part.seconds / 60:.1f}", pace])
    return _table(["stage", "steps", "highest rate", "prompts", "minutes", "ms a step (median)"], lines)


def model_card(name: str, log: Sequence[dict[str, Any]], parameters: int, size: int) -> str:
    """``README.md`` of a model's folder.

    Parameters
    ----------
    name
        One of ``MODELS``.
    log
        Rows of the training log.
    parameters
        Number of weights.
    size
        Bytes of the file of the weights.

    Returns
    -------
    str
        Markdown. Where training has not finished it says so at the top and in place of the test scores.
    """
    about, rows, found = MODELS[name], [_normal(row) for row in log], parts(log)
    checks = [row for row in rows if row.get("event") == "val"]
    dense, dropped = ([row for row in checks if ("keep" in row) == dropping] for dropping in (False, True))
    start = next(row for row in reversed(rows) if row.get("event") == "start")
    old = any("stage" not in row for row in log if row.get("event") == "start")
    minutes = sum(part.seconds for part in found.values()) / 60
    worlds = _table(
        ["world", "pictures", "questions and answers"],
        [[world, WORLDS[world][0], WORLDS[world][1].replace("; ", "<br>")] for world in about.worlds],
    )

    warning, scores = "", ""
    if is_finished(log):
        scores = _prose(
            f"Share of exact answers to {rows[-1]['questions']:,} test questions of each world, its kinds taking "
            "turns. Each is about fresh pictures that were used for no choice. bf16 weights, all visual tokens, greedy:"
        )
        scores += f"\n\n{_scores(rows[-1], about.worlds)}"
    else:
        stage, part = list(found.items())[-1]
        warning = _prose(
            f"**Training has not finished.** These weights are from step {part.done:,} of {part.steps:,} of the stage "
            f'"{stage}", and will be replaced. There are no test scores yet.'
        )
        warning = f"\n{warning}\n"
        scores = "None yet on test questions, as training has not finished."
        if dense:
            scores += (
                f' The last validation, at step {dense[-1]["step"]:,} of the stage "{dense[-1]["stage"]}", with '
                f"{start['check_questions']} questions of each world:"
            )
            scores = f"{_prose(scores)}\n\n{_scores(dense[-1], about.worlds)}"
    scored = is_finished(log) and "weights" in log[-1]  # the folder's own weights, by `score`
    if "easy-vqa" in about.worlds:
        which = "all" if scored else "evenly spaced"
        scores += f"\n\neasy-VQA: {which} questions of the package's test split. Saying always yes would score 0.373."
    if scored:
        scores += (
            f"\n\n`python -m vtprune.models.pocket.score {name}` scores the weights of this folder (SHA-256 "
            f"`{log[-1]['weights'][:12]}`) again."
        )
    curve = f"Accuracy on validation questions during training:\n\n{_curve(dense, about.worlds)}" if dense else ""
    if dropped:
        words = _prose(
            "The same with one ninth of the visual tokens, chosen as in training (half of the prompts at random, half "
            "with those that show something likelier to stay):"
        )
        curve += f"\n\n{words}\n\n{_curve(dropped, about.worlds)}"
    about_old = ""
    if old:
        first = next(row for row in log if row.get("event") == "start")
        about_old = _prose(
            f'The stage "{FIRST_STAGE}" was run by an earlier version of this code, which knew only the words of its '
            f"own questions. Its validation scores are from {first['check_questions']} questions, the later ones from "
            f"{start['check_questions']} of each world."
        )
        about_old = f"\n{about_old}\n"
    where = "; ".join(dict.fromkeys(place for part in found.values() for place in part.where))
    begin = "" if name == "pocket-llava" else " --start vtprune/models/pocket/pocket-llava"
    intro = _prose(
        f"A very small vision-language model for testing visual-token pruning: a real `{about.architecture}` "
        f"({parameters / 1e6:.2f} M parameters, {size / 2**20:.1f} MiB in bf16). {about.summary}"
    )
    whole = ""
    if any("cls" in row for row in log):
        whole = (
            f" and, from the CLS token, what the whole picture contains (weight {start['scene_weight']}), so that CLS "
            "attention means something"
        )
    data = _prose(
        f"{about.start} Pictures and questions are generated while it trains; training, validation and test samples "
        "come from seeds that have nothing in common. The easy-VQA training split, where it is used, is from the PyPI "
        "package. Besides the answers, linear heads that are not shipped had to tell what each patch shows (weight "
        f"{start['patch_weight']}){whole}. In all stages but basic, full, more and hires the vision "
        "tower stands still; in drop and settle the language model often sees a part of the visual tokens, or none."
    )
    spent = _prose(
        f"{minutes:.0f} minutes in all, compilation and validation included, on one GPU: {where}. Prompts are counted "
        "by the log's pace. `train_log.jsonl` is the whole log."
    )
    # What happened to this run that the recipe does not say, written into the log by hand.
    for row in log:
        if row.get("event") == "note":
            spent += "\n\n" + _prose(row["text"])
    limits = "\n".join(_prose(f"- {line}", "  ") for line in (*LIMITS, *about.limits))
    return f"""\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# {name}

{intro}
{warning}
## What it can do
It answers questions about generated pictures, PocketVQA (`vtprune/models/pocket/data.py` and `worlds.py`), in these
words:

{worlds}

## Accuracy
{scores}

## Training
{data}

{_stages(found)}

{spent}
{about_old}
{curve}

To make it again, on one GPU (run the first command again if it was stopped, and it goes on):

```
python -m vtprune.models.pocket.train {name}{begin} --out STATE
python -m vtprune.models.pocket.export {name} --state STATE
```

## Limits
{limits}

## Licences
Weights and code: Apache-2.0. The small pictures are from Microsoft's Fluent Emoji, as packed by LobeHub (MIT,
`vtprune/models/pocket/sprites/LICENSE`); easy-VQA is by Victor Zhou (MIT) and is not shipped.
"""
