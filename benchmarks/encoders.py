# SPDX-License-Identifier: Apache-2.0
"""Accuracy and throughput of a small trained ViT, pruned between its blocks, beside plain timm.

    python -m benchmarks.encoders                        # trains (minutes of one core), then measures
    python -m benchmarks.encoders --side 128 --width 192 --depth 12 --batch 128    # on a GPU

Shape and colour (24 classes) of the one thing in each picture of easy-VQA whose questions tell both: 2,830 pictures to
train on, 702 others to test with. `plain` is timm without vtprune; `plain, smaller picture` the same weights on
pictures that give about as many patches as are kept. The rest are methods at a third of the depth, one of them
elsewhere too, and `tome` after every block. Lines take turns, so that a busy machine slows all of them; the throughput
is that of the median turn, scoring included.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import vtprune
from vtprune.encoders.vit import block_flops
from vtprune.eval.runner import current_commit as commit
from vtprune.models.pocket import easyvqa

SHAPES, COLOURS = easyvqa.ANSWERS[2:5], easyvqa.ANSWERS[5:]
KEEPS = (0.5, 0.25, 0.1)
METHODS = ("random", "grid", "norm", "divprune", "idpruner", "visionzip", "tome")
PATCH = 4


@dataclass
class Line:
    """One row of the table: what to run, and what came of it."""

    method: str
    keep: float = 1.0
    side: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def on(self, model: nn.Module) -> AbstractContextManager[Any]:
        if self.method.startswith("plain"):
            return nullcontext()
        return vtprune.apply(model, self.method, keep=self.keep, **self.options)


def data(split: str, side: int) -> tuple[Tensor, Tensor]:
    """Pictures ``[N, 3, side, side]``, mean 0 and about 1 long, and classes ``[N]`` int64."""
    loaded = easyvqa.load(split)
    shape, colour = [-1] * len(loaded.pictures), [-1] * len(loaded.pictures)
    for picture, question, answer in loaded.questions:
        # "what ... ?" names it; a yes to a question without a negation and with one word of a kind does so too.
        said = answer if answer != "yes" else "" if {"no", "not"} & set(question.split()) else question
        for kind, words in ((shape, SHAPES), (colour, COLOURS)):
            found = [i for i, word in enumerate(words) if word in said.split()]
            if len(found) == 1:
                kind[picture] = found[0]
    known = torch.tensor([i for i, (s, c) in enumerate(zip(shape, colour, strict=True)) if s >= 0 and c >= 0])
    classes = torch.tensor(shape)[known] * len(COLOURS) + torch.tensor(colour)[known]
    pixels = torch.from_numpy(loaded.pictures)[known].permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return resized(pixels, side), classes


def resized(pixels: Tensor, side: int) -> Tensor:
    if pixels.shape[-1] == side:
        return pixels
    return F.interpolate(pixels, (side, side), mode="bilinear", antialias=True, align_corners=False)


def build(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(options.seed)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=options.side,
        patch_size=PATCH,
        embed_dim=options.width,
        depth=options.depth,
        num_heads=max(1, options.width // 32),
        num_classes=len(SHAPES) * len(COLOURS),
        dynamic_img_size=True,
    )
    return model


def train(model: nn.Module, pixels: Tensor, classes: Tensor, options: argparse.Namespace) -> None:
    """AdamW, one cycle, flips; the seed decides everything."""
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
    steps = options.epochs * -(-len(pixels) // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps, pct_start=0.2)
    model.train()
    for epoch in range(options.epochs):
        start, total = time.perf_counter(), 0.0
        for rows in torch.randperm(len(pixels), generator=generator).split(options.batch):
            batch = pixels[rows].to(options.device)
            for axis in (2, 3):
                if torch.rand((), generator=generator) < 0.5:
                    batch = batch.flip(axis)
            loss = F.cross_entropy(model(batch), classes[rows].to(options.device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}/{options.epochs}: loss {total / len(pixels):.3f}, {seconds:.0f} s", flush=True)


def lines(options: argparse.Namespace) -> Iterator[Line]:
    yield Line("plain", side=options.side)
    yield Line("norm", 1.0, options.side)  # what hooks cost that have nothing to do
    for keep in KEEPS:
        yield Line("plain, smaller picture", keep, PATCH * max(1, int(options.side / PATCH * keep**0.5)))
        for method in METHODS:
            yield Line(method, keep, options.side)
        for layer in (0, options.depth // 2):
            yield Line("idpruner", keep, options.side, {"layer": layer})
        every = tuple(range(options.depth - 1))
        yield Line("tome", keep, options.side, {"layer": every, "rounds": 1})


@torch.no_grad()
def measure(model: Any, table: list[Line], pixels: Tensor, classes: Tensor, options: argparse.Namespace) -> Any:
    """Accuracy of every line, then turns of timed batches; yields a row for each line."""
    model.eval()
    right = []
    for line in table:
        given = resized(pixels, line.side)
        with line.on(model):
            guesses = [model(part.to(options.device)).argmax(1).cpu() for part in given.split(options.batch)]
        right.append((torch.cat(guesses) == classes).float().mean().item())
    timed = pixels[: options.batch].to(options.device)
    for turn in range(options.turns + 1):
        for line in table:
            given = resized(timed, line.side)
            with line.on(model):
                start = _now(options.device)
                model(given)
                if turn:  # the first one warms up
                    line.seconds.append(_now(options.device) - start)
    plain = statistics.median(table[0].seconds)
    for line, accuracy in zip(table, right, strict=True):
        seconds = statistics.median(line.seconds)
        patches, kept, blocks = (line.side // PATCH) ** 2, (line.side // PATCH) ** 2, ""
        if not line.method.startswith("plain") and line.keep < 1:
            with line.on(model) as handle:
                model(timed[:1])
                report = handle.report()
                kept, blocks = report.tokens_out, " ".join(stage.split()[1] for stage in report.stages)
                flops = report.flops_after
        else:
            own = list(model.blocks)
            flops = sum(block_flops(block, model.num_prefix_tokens + patches, options.width) for block in own)
        yield {
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu, one thread",
            **{"torch": torch.__version__, "timm": timm.__version__, "commit": options.commit or commit()},
            **{"side": options.side, "width": options.width, "depth": options.depth, "batch": options.batch},
            "method": line.method,
            "keep": line.keep,
            "after_block": "every" if len(blocks.split()) > 1 else blocks,
            **{"patches": patches, "kept": kept, "pictures": len(classes), "accuracy": round(accuracy, 4)},
            "pictures_per_s": round(options.batch / seconds, 1),
            "speedup": round(plain / seconds, 3),
            "mflop": round(flops / 1e6, 1),
        }


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=48, help="pixels of the pictures (default: 48)")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--turns", type=int, default=7, help="timed batches of each line")
    parser.add_argument("--pictures", type=int, default=4000, help="at most so many of each split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, help="safetensors file to read, or to write where there is none")
    parser.add_argument("--out", type=Path, help="CSV to write (default: benchmarks/results/encoders-<device>.csv)")
    parser.add_argument("--commit", help="what to write into the commit column (default: ask git)")
    options = parser.parse_args(arguments)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cpu":
        torch.set_num_threads(1)
    model = build(options).to(options.device)
    if options.weights is not None and options.weights.exists():
        model.load_state_dict(load_file(options.weights))
    else:
        pixels, classes = (part[: options.pictures] for part in data("train", options.side))
        train(model, pixels, classes, options)
        if options.weights is not None:
            save_file(model.state_dict(), options.weights)
    pixels, classes = (part[: options.pictures] for part in data("test", options.side))
    rows = list(measure(model, list(lines(options)), pixels, classes, options))
    name = torch.cuda.get_device_name().lower().replace(" ", "-") if options.device == "cuda" else "cpu"
    out = options.out or Path(__file__).parent / "results" / f"encoders-{name}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print({k: row[k] for k in ("method", "keep", "after_block", "kept", "accuracy", "pictures_per_s", "speedup")})
    print(out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
