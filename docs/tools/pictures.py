# SPDX-License-Identifier: Apache-2.0
"""The picture of each method: an embedded model is run on one prompt, and what the method keeps is drawn.

    python -m docs.tools.pictures                 # all, on a CPU core two minutes
    python -m docs.tools.pictures idpruner norm   # these

``docs/methods/kept.json`` has the tokens that were kept, which a test compares with what is kept today.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

import vtprune
from docs.tools import pages
from vtprune import viz
from vtprune.engine.report import Report
from vtprune.eval import controls, tasks
from vtprune.models import find_family

KEEP = "1/9"
WIDTH = 560


@dataclass(frozen=True)
class Prompt:
    """What is asked, of which model, and why this prompt."""

    model: str
    task: str
    index: int
    what: str
    seed: int = 0


PICTURE = Prompt("pocket-llava", "pocketvqa/basic", 1, "one picture")
CROPS = Prompt("pocket-llava-next", "pocketvqa/hires", 0, "a large picture: its thumbnail and its crops")
CLIP = Prompt("pocket-qwen2.5-vl", "pocketvqa/video", 0, "a clip")
SHOWN = Prompt("pocket-qwen2.5-vl", "pocketvqa/icl", 0, "demonstrations, and the picture that is asked about last")
#: Methods made for another prompt than one picture.
PROMPTS = {"globalcom2": CROPS, "evs": CLIP, "vidcom2": CLIP, "frames": CLIP, "catp": SHOWN}


@functools.cache
def _model(name: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    return vtprune.load(name, device="cpu", dtype=torch.float32)


@functools.cache
def _example(prompt: Prompt) -> tasks.Example:
    examples = tasks.get(prompt.task).examples("test", prompt.index + 1, prompt.seed)
    return next(itertools.islice(examples, prompt.index, None)).ready()


@functools.cache
def _inputs(prompt: Prompt) -> dict[str, Any]:
    model, processor = _model(prompt.model)
    return controls.prepare(find_family(model), processor, [_example(prompt)])


@torch.inference_mode()
def run(method: str) -> Report:
    """What a forward under the method reports."""
    prompt = PROMPTS.get(method, PICTURE)
    model, _ = _model(prompt.model)
    with vtprune.apply(model, method, keep=1 / 9) as handle:
        model(**_inputs(prompt), use_cache=True, logits_to_keep=1)
        return handle.report()


def facts(method: str) -> dict[str, Any]:
    """What the page says under the picture: the prompt, and which tokens stayed."""
    prompt, report = PROMPTS.get(method, PICTURE), run(method)
    question = _example(prompt).parts("text")[-1]["text"]
    kept = [np.flatnonzero(np.concatenate([s.kept for s in image.segments])).tolist() for image in report.images]
    digest = hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]
    return {
        **{"model": prompt.model, "prompt": prompt.what, "question": question, "keep": KEEP},
        **{"tokens_in": report.tokens_in, "tokens_out": report.tokens_out, "stages": list(report.stages)},
        "kept": digest,
    }


def draw(method: str) -> Image.Image:
    """The picture of one method."""
    prompt, report = PROMPTS.get(method, PICTURE), run(method)
    example, (_, processor) = _example(prompt), _model(prompt.model)
    clips = example.parts("video")
    if clips:
        return viz.video_strip(clips[0]["video"], report.images[0], method)
    pictures = [part["image"] for part in example.parts("image")]
    sheets = [
        viz.overlay(viz.seen_image(processor, _inputs(prompt), picture, i), image, method)
        for i, (picture, image) in enumerate(zip(pictures, report.images, strict=True))
    ]
    return sheets[0] if len(sheets) == 1 else _in_rows(sheets)


def _in_rows(sheets: list[Image.Image], columns: int = 3) -> Image.Image:
    """Pictures of one size side by side."""
    width, height = sheets[0].size
    result = Image.new("RGB", (columns * width, -(-len(sheets) // columns) * height), (255, 255, 255))
    for i, sheet in enumerate(sheets):
        result.paste(sheet, (i % columns * width, i // columns * height))
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD")
    known = json.loads(pages.KEPT.read_text(encoding="utf-8")) if pages.KEPT.exists() else {}
    # A method that must be trained first is drawn where somebody asks for it.
    methods = parser.parse_args(arguments).methods or [
        n for n, c in pages.ours().items() if c.training_free or n in known
    ]
    (pages.DOCS / "methods" / "img").mkdir(exist_ok=True)
    for method in methods:
        known[method] = facts(method)
        picture = draw(method)
        if picture.width > WIDTH:
            size = (WIDTH, round(picture.height * WIDTH / picture.width))
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        picture.save(pages.DOCS / pages.picture_of(method), "WEBP", quality=72, method=6)
        print(method, known[method]["tokens_out"], "of", known[method]["tokens_in"])
    lines = [f" {json.dumps(name)}: {json.dumps(known[name], ensure_ascii=False)}" for name in sorted(known)]
    pages.KEPT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
