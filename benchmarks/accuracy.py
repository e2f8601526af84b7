# SPDX-License-Identifier: Apache-2.0
"""Accuracy of pocket-llava on fresh PocketVQA questions under every pruner, with measured time on the same row.

    python -m benchmarks.accuracy                                            # on a GPU: about five minutes
    python -m benchmarks.accuracy --questions 480 --batch 40 --keep 1/4 1/9  # on two CPU cores: a quarter of an hour

Beside the methods stand the unpruned model, ``random``, ``grid``, and a picture that was simply made smaller until the
encoder puts out about as many tokens. `benchmarks/README.md` explains the columns.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import vtprune
from benchmarks.prefill import commit
from vtprune.models.pocket.data import KINDS, exam, render

KEEPS = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 9), Fraction(1, 18))
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("random", {}),
    ("grid", {}),
    ("norm", {}),
    ("divprune", {}),
    ("idpruner", {"importance": "norm"}),
    ("idpruner", {"importance": "cls"}),
    ("idpruner", {}),
)
ANSWER_TOKENS = 4
#: Timed forwards and forwards before them; a forward takes seconds on a CPU, milliseconds on a GPU.
RUNS = {"cuda": (10, 3), "cpu": (3, 1)}


def batches(processor: Any, split: str, questions: int, size: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Processed batches of one picture and one question per row, with ``kinds`` and ``answers``."""
    pairs = list(exam(split, questions))
    for start in range(0, questions, size):
        part = pairs[start : start + size]
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.text}]}],
                add_generation_prompt=True,
            )
            for _, q in part
        ]
        pictures = [render(scene) for scene, _ in part]
        inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt").to(device)
        yield {"inputs": dict(inputs), "kinds": [q.kind for _, q in part], "answers": [q.answer for _, q in part]}


@contextmanager
def downsampled(model: Any, side: int) -> Iterator[None]:
    """Let the vision tower see a picture of `side` x `side` patches; its position embeddings are interpolated."""
    pixels = side * model.config.vision_config.patch_size

    def shrink(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs.pop("pixel_values") if "pixel_values" in kwargs else args[0]
        small = torch.nn.functional.interpolate(given, (pixels, pixels), mode="bicubic", antialias=True)
        return args[1:], {**kwargs, "pixel_values": small, "interpolate_pos_encoding": True}

    hook = model.model.vision_tower.register_forward_pre_hook(shrink, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def fewer_placeholders(inputs: dict[str, Tensor], image_token: int, n: int) -> dict[str, Tensor]:
    """The same prompts with `n` placeholders per picture."""
    is_image = inputs["input_ids"] == image_token
    keep = ~is_image | (is_image.cumsum(1) <= n)
    rows = len(keep)
    cut = {k: inputs[k][keep].view(rows, -1) for k in ("input_ids", "attention_mask")}
    return {**inputs, **cut}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def prefill_ms(model: Any, inputs: dict[str, Tensor], device: torch.device) -> float:
    """Median time of one forward over the batch: vision tower, scoring, packing, language model."""
    times = []
    runs, warm_up = RUNS[device.type]
    for _ in range(warm_up + runs):
        synchronize(device)
        start = time.perf_counter()
        model(**inputs, use_cache=True, logits_to_keep=1)
        synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[warm_up:])


@torch.inference_mode()
def measure(
    model: Any, processor: Any, data: list[dict[str, Any]], change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Any]:
    """Share of exact greedy answers per kind, their mean, and the prefill time of the first batch."""
    right, asked = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for batch in data:
        inputs = change(batch["inputs"])
        out = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        answers = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for kind, answer, given in zip(batch["kinds"], batch["answers"], answers, strict=True):
            right[kind] += given.strip() == answer
            asked[kind] += 1
    shares = {kind: right[kind] / max(1, asked[kind]) for kind in KINDS}
    mean, total = sum(right.values()) / sum(asked.values()), sum(asked.values())
    return {
        "accuracy": round(mean, 4),
        "plus_minus": round(1.96 * (mean * (1 - mean) / total) ** 0.5, 4),
        **{kind: round(share, 4) for kind, share in shares.items()},
        "prefill_ms": round(prefill_ms(model, change(data[0]["inputs"]), data[0]["inputs"]["input_ids"].device), 2),
    }


def rows(
    model: Any, processor: Any, data: list[dict[str, Any]], keeps: list[Fraction], methods: list[str]
) -> Iterator[dict[str, Any]]:
    """One row per method and budget, dense first."""
    image_token = model.config.image_token_id
    full = int((data[0]["inputs"]["input_ids"][0] == image_token).sum())
    full_side = round(full**0.5)
    yield {"method": "dense", "keep": "1", "tokens": full, **measure(model, processor, data, lambda x: x)}
    for keep in keeps:
        side = round(full_side * float(keep) ** 0.5)
        with downsampled(model, side):
            result = measure(model, processor, data, lambda x, n=side**2: fewer_placeholders(x, image_token, n))
        yield {"method": "downsampled picture", "keep": str(keep), "tokens": side**2, **result}
        for method, options in METHODS:
            label = " ".join([method, *(f"{k}={v}" for k, v in options.items())])
            if label not in methods:
                continue
            with vtprune.apply(model, method, keep=float(keep), **options) as handle:
                result = measure(model, processor, data, lambda x: x)
                tokens = handle.report().images[0].tokens_out
            yield {"method": label, "keep": str(keep), "tokens": tokens, **result}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--split", default="test", choices=["val", "test"])
    parser.add_argument("--keep", nargs="+", type=Fraction, default=list(KEEPS))
    known = [" ".join([m, *(f"{k}={v}" for k, v in options.items())]) for m, options in METHODS]
    parser.add_argument("--methods", nargs="+", default=known, choices=known, metavar="METHOD", help=", ".join(known))
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args(arguments)

    model, processor = vtprune.load("pocket-llava", dtype=torch.float32)
    device = model.device
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    out = given.out or Path(__file__).parent / "results" / f"accuracy-{where.lower().replace(' ', '-')}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "device": where,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": given.commit or commit(),
        "model": "pocket-llava",
        "split": given.split,
        "questions": given.questions,
        "batch": given.batch,
    }
    data = list(batches(processor, given.split, given.questions, given.batch, device))
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = None
        for row in rows(model, processor, data, given.keep, given.methods):
            full = {**about, **row}
            if writer is None:
                writer = csv.DictWriter(file, list(full))
                writer.writeheader()
            writer.writerow(full)
            file.flush()
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
