# SPDX-License-Identifier: Apache-2.0
"""What EmbedLens says of a pocket model: words by layer, classes, what they are worth, later layers, skipped sublayers.

    python -m benchmarks.lens calibrate --model pocket-llava    # writes embedlens.json beside the model's config
    python -m benchmarks.lens words shares remove inject skip patches                      # on a GPU
    python -m benchmarks.lens words shares remove inject skip patches --questions 120      # on two CPU cores

One CSV per experiment. `benchmarks/README.md` explains the columns, docs/lens.md what was found.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

import vtprune
from vtprune import registry
from vtprune.budget import Budget
from vtprune.eval import controls, runner, stats, tasks
from vtprune.eval.runner import current_commit as commit
from vtprune.lens import Calibration, Lens, calibrate, clusters, compression, inject, skip
from vtprune.models import find_family
from vtprune.models.loading import EMBEDDED, build_inputs
from vtprune.models.pocket import data
from vtprune.tokens import PROJECTOR, Selection, Stage, VisualTokens

Row = dict[str, Any]
TASK = "pocketvqa/basic"
CALIBRATED_ON = ("pocketvqa/basic", "pocketvqa/extended")
CONTROL_SEEDS = (0, 1, 2)
#: Share of a patch that an object must cover for the patch to be called the object's.
COVERED = 0.5
TOPS = (1, 5)


@dataclass
class Bench:
    """What every experiment needs."""

    model: Any
    processor: Any
    name: str
    questions: int
    batch: int

    @property
    def family(self) -> Any:
        return find_family(self.model)

    @property
    def depth(self) -> int:
        return len(self.family.lm.layers)

    def examples(self, task: str = TASK) -> list[tasks.Example]:
        return list(tasks.get(task).examples("test", self.questions, 0))

    def batches(self, examples: Sequence[tasks.Example]) -> Iterator[tuple[Sequence[tasks.Example], Any]]:
        for start in range(0, len(examples), self.batch):
            part = examples[start : start + self.batch]
            yield part, controls.prepare(self.family, self.processor, part)


def pictures(task: str, split: str, count: int, seed: int = 0) -> list[Image.Image]:
    return [example.parts("image")[0]["image"] for example in tasks.get(task).examples(split, count, seed)]


def with_interval(values: Sequence[float], prefix: str = "") -> Row:
    found = stats.accuracy(np.asarray(values, float)[:, None], ["all"] * len(values))[0]
    return dict(
        zip(
            (prefix or "value", f"{prefix}{'_' * bool(prefix)}low", f"{prefix}{'_' * bool(prefix)}high"),
            found,
            strict=True,
        )
    )


# -- calibration and shares -------------------------------------------------------------------------------------------


def training_pictures(count: int, seed: int = 0) -> list[Image.Image]:
    each = count // len(CALIBRATED_ON)
    return [picture for task in CALIBRATED_ON for picture in pictures(task, "train", each, seed)]


def calibrate_it(bench: Bench) -> None:
    found = calibrate(bench.model, bench.processor, training_pictures(clusters.ENOUGH))
    path = found.save(EMBEDDED / bench.name)
    print(path, found.classes, found.words, found.evidence)


def shares(bench: Bench) -> Iterator[Row]:
    """The shipped calibration on fresh pictures, and calibrations of other pictures and seeds on the same."""
    count = min(bench.questions, 200)
    shown = {task: pictures(task, "test", count) for task in ("pocketvqa/basic", "pocketvqa/clutter")}
    rules = {"shipped": Calibration.find(bench.family.checkpoint)}
    for seed in CONTROL_SEEDS:
        few = training_pictures(min(count, 60), seed + 1)
        rules[f"seed {seed + 1}"] = calibrate(bench.model, bench.processor, few, seeds=(seed + 1,))
    for name, rule in rules.items():
        for task, images in shown.items():
            if name != "shipped" and task != "pocketvqa/basic":
                continue
            for kind, found in clusters.shares(bench.model, bench.processor, images, rule).items():
                anchors = " ".join(rule.words.get(kind, ()))
                yield {
                    "calibration": name,
                    "task": task,
                    "pictures": len(images),
                    "class": kind,
                    "anchors": anchors,
                } | dict(zip(("share", "low", "high"), found, strict=True))


# -- words ------------------------------------------------------------------------------------------------------------


def owner_of(scene: data.Scene, seen: Lens) -> np.ndarray:
    """Index of the shape that covers most of each token's patch, ``[T]``; -1 where none covers enough."""
    height, width = scene.rows * data.CELL, scene.columns * data.CELL
    cover = np.zeros((len(scene.shapes), height, width), np.float32)
    for i, shape in enumerate(scene.shapes):
        mask = data.shape_masks()[data.SHAPES.index(shape.shape), tuple(data.SIZES).index(shape.size)] / 255
        top, left = (x * data.CELL for x in divmod(shape.cell, scene.columns))
        cover[i, top : top + data.CELL, left : left + data.CELL] = mask
    owners = []
    start = 0
    for view in seen.views:
        top, left, bottom, right = view.box
        for _, row, column in seen.coords[start : start + view.count]:
            y0, y1 = ((top + (bottom - top) * (row + d) / view.grid[0]) * height for d in (0, 1))
            x0, x1 = ((left + (right - left) * (column + d) / view.grid[1]) * width for d in (0, 1))
            part = cover[:, max(0, round(y0)) : max(0, round(y1)), max(0, round(x0)) : max(0, round(x1))]
            share = part.mean((1, 2)) if part.size else np.zeros(len(scene.shapes))
            owners.append(int(share.argmax()) if share.max() >= COVERED else -1)
        start += view.count
    return np.array(owners)


def words(bench: Bench) -> Iterator[Row]:
    """How often the words nearest to an object's patches name its colour or shape; chance: another object's label."""
    ids = {word: bench.processor.tokenizer.convert_tokens_to_ids(word) for word in (*data.COLORS, *data.SHAPES)}
    scenes = [data.scene("test", i) for i in range(min(bench.questions, 200))]
    everything = [(shape.color, shape.shape) for scene in scenes for shape in scene.shapes]
    rng = random.Random(0)
    hits: dict[tuple[int, str, int], list[tuple[float, float]]] = {}
    patches = 0
    for scene in scenes:
        inputs = build_inputs(bench.model, bench.processor, data.render(scene), clusters.QUESTION)
        seen = vtprune.lens(bench.model, inputs, topk=max(TOPS), processor=bench.processor)
        owner = owner_of(scene, seen)
        tokens = np.flatnonzero(owner >= 0)
        if not len(tokens):
            continue
        patches += len(tokens)
        labels = [(shape.color, shape.shape) for shape in scene.shapes]
        others = [rng.choice(everything) for _ in labels]
        for i, attribute in enumerate(("color", "shape")):
            right = np.array([ids[labels[owner[t]][i]] for t in tokens])
            wrong = np.array([ids[others[owner[t]][i]] for t in tokens])
            for at, layer in enumerate(seen.layers):
                for top in TOPS:
                    near = seen.ids[at, tokens, :top]
                    mine = float((near == right[:, None]).any(1).mean()), float((near == wrong[:, None]).any(1).mean())
                    hits.setdefault((layer, attribute, top), []).append(mine)
    for (layer, attribute, top), found in sorted(hits.items()):
        mine, chance = np.array(found).T
        row = {"layer": layer, "attribute": attribute, "top": top, "pictures": len(found), "patches": patches}
        yield row | with_interval(mine, "hit") | with_interval(chance, "chance")


# -- accuracy ---------------------------------------------------------------------------------------------------------


def _run(bench: Bench, methods: Sequence[str], keep: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        return runner.run(
            *(bench.model, bench.processor, [TASK], methods, [keep], Path(folder) / "rows.jsonl"),
            **{"split": "test", "count": bench.questions, "batch": bench.batch, "name": bench.name},
        )


def _of(rows: Sequence[Row], label: str, kinds: Sequence[str] | dict[str, str]) -> np.ndarray:
    """Right or wrong, and tokens left, of each question under a method, ``[E, 2]``."""
    mine = {row["id"]: row for row in rows if row["method"] == label}
    return np.array([[mine[i]["correct"], mine[i]["tokens_out"]] for i in kinds], float)


def remove(bench: Bench) -> Iterator[Row]:
    """Accuracy without each class, and without as many random others."""
    rule = Calibration.find(bench.family.checkpoint)
    wanted = [*rule.classes, *(["dead,sink"] if len(rule.classes) > 1 else [])]
    methods = ["dense", "question-only"]
    for name in wanted:
        methods += [f"embedlens mode=drop classes={name}", f"embedlens mode=only classes={name}"]
        # Of a class with most of the tokens there are not as many others: a random choice of all is matched then too.
        methods += [
            f"embedlens mode={mode} classes={name} seed={seed}"
            for mode in ("control", "random")
            for seed in CONTROL_SEEDS
        ]
    rows = _run(bench, methods, "1/2")
    kinds = {row["id"]: row["kind"] for row in rows}
    of = {label: _of(rows, label, kinds) for label in methods}
    names = list(kinds.values())

    def line(removed: str, what: str, found: np.ndarray, against: np.ndarray) -> Row:
        row: Row = {"removed": removed, "what": what, "questions": len(names), "tokens": float(found[:, 1].mean())}
        mean = stats.accuracy(found[:, :1], names)[0]
        row |= dict(zip(("accuracy", "low", "high"), mean, strict=True))
        gain = stats.difference(found[:, 0], against[:, 0], names)
        row |= dict(zip(("to_dense", "to_dense_low", "to_dense_high"), gain, strict=True))
        return row | {kind: float(share) for kind, share in stats.per_kind(found[:, 0], names).items()}

    for label in ("dense", "question-only"):
        yield line("nothing" if label == "dense" else "everything", label, of[label], of["dense"])
    for name in wanted:
        drop = of[f"embedlens mode=drop classes={name}"]
        control, chance = (
            np.mean([of[f"embedlens mode={mode} classes={name} seed={s}"] for s in CONTROL_SEEDS], 0)
            for mode in ("control", "random")
        )
        row = line(name, "the class", drop, of["dense"])
        for column, other in (("to_others", control), ("to_all", chance)):
            gain = stats.difference(drop[:, 0], other[:, 0], names)
            row |= dict(zip((column, f"{column}_low", f"{column}_high"), gain, strict=True))
        yield row
        yield line(name, f"as many others, mean of {len(CONTROL_SEEDS)} seeds", control, of["dense"])
        yield line(name, f"as many of all tokens, mean of {len(CONTROL_SEEDS)} seeds", chance, of["dense"])
        yield line(name, "all but the class", of[f"embedlens mode=only classes={name}"], of["dense"])


Plan = tuple[Row, Callable[[], AbstractContextManager[Any]]]


def answers(bench: Bench, plans: Sequence[Plan]) -> Iterator[Row]:
    """Accuracy, over all kinds and per kind, with intervals and the paired difference to the first plan."""
    examples = bench.examples()
    correct = np.zeros((len(examples), len(plans)))
    done = 0
    for part, inputs in bench.batches(examples):
        with runner.encode_once(bench.model):
            vtprune.encode(bench.model, inputs)
            for p, (_, block) in enumerate(plans):
                with block():
                    given = runner.generate(bench.model, bench.processor, inputs, tasks.get(TASK).max_new_tokens)
                correct[done : done + len(part), p] = [a == e.answer for a, e in zip(given, part, strict=True)]
        done += len(part)
        print(f"{done} of {len(examples)}", flush=True)
    kinds = [example.kind for example in examples]
    for kind in ("all", *dict.fromkeys(kinds)):
        rows = [i for i, k in enumerate(kinds) if kind in ("all", k)]
        own = [kinds[i] for i in rows]
        found = stats.accuracy(correct[rows], own)
        for p, (label, _) in enumerate(plans):
            gain = stats.difference(correct[rows, p], correct[rows, 0], own)
            row = {**label, "kind": kind, "questions": len(rows)}
            row |= dict(zip(("accuracy", "low", "high"), found[p], strict=True))
            yield row | dict(zip(("to_baseline", "to_baseline_low", "to_baseline_high"), gain, strict=True))


def injection(bench: Bench) -> Iterator[Row]:
    """Visual tokens that enter before layer L, and (where `visual-exit` is there) that leave after layer L."""
    plans: list[Plan] = [
        ({"way": "enter before", "layer": layer}, lambda layer=layer: inject(bench.model, layer))
        for layer in range(bench.depth)
    ]
    if "visual-exit" in vtprune.methods():
        plans += [
            (
                {"way": "leave after", "layer": layer},
                lambda layer=layer: vtprune.using(bench.model, "visual-exit", layer=layer, keep=0.5),
            )
            for layer in range(bench.depth - 1)
        ]
    yield from answers(bench, plans)


def skipping(bench: Bench) -> Iterator[Row]:
    """Each sublayer silenced for all visual tokens; and all attention, all MLPs, for all tokens and for each class."""
    rule = Calibration.find(bench.family.checkpoint)
    plans: list[Plan] = [({"tokens": "none", "sublayers": "none"}, nullcontext)]

    def add(label: str, sublayers: Sequence[float], tokens: str) -> None:
        block = lambda: skip(bench.model, sublayers, tokens=tokens)  # noqa: E731
        plans.append(({"tokens": tokens, "sublayers": label}, block))

    for half in range(2 * bench.depth):
        add(f"{half / 2:g}", [half / 2], "all")
    layers = range(bench.depth)
    for tokens in ("all", "alive", *rule.classes):
        add("attention", [float(layer) for layer in layers], tokens)
        add("mlp", [layer + 0.5 for layer in layers], tokens)
        add("both", [half / 2 for half in range(2 * bench.depth)], tokens)
    yield from answers(bench, plans)


# -- one patch --------------------------------------------------------------------------------------------------------

IDENTITY = "what shape is the {color} object ?"
ASK = {
    "object": IDENTITY,
    "color": "what color is the {object} ?",
    "count": "how many objects are there ?",
    "character": "what does the text say ?",
}


@dataclass
class OneTokenPruner(vtprune.Pruner):
    """Keep the token at a place in the grid of the only picture of each sample."""

    paper = "benchmark"
    modality = ("image",)
    mechanism = ()
    query_aware = False
    training_free = True
    adaptive = False

    places: Sequence[Sequence[int]] = ()

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage = PROJECTOR) -> Selection:
        lens = torch.tensor(tokens.seqlens)
        place = torch.tensor(self.places).repeat_interleave(lens, 0).to(tokens.device)
        here = (tokens.coords[:, 1:] == place).all(1)
        return Selection.from_order(here.nonzero().squeeze(1), tokens)


def patch_compression(bench: Bench) -> Iterator[Row]:
    """EmbedLens-style, rebuilt: something in one patch; is it among the words of its token, and is it answered?"""
    with one_token_known():
        yield from _patch_compression(bench, min(bench.questions, 300))


@contextmanager
def one_token_known() -> Iterator[None]:
    """Within this block `benchmark-one-token` is a method; it is none for users."""
    registry.register("benchmark-one-token")(OneTokenPruner)
    try:
        yield
    finally:
        registry._METHODS.pop("benchmark-one-token", None)


def _patch_compression(bench: Bench, count: int) -> Iterator[Row]:
    tokenizer = bench.processor.tokenizer
    grid = bench.model.config.vision_config.image_size // bench.model.config.vision_config.patch_size
    for kind in compression.KINDS:
        items = list(compression.patches(kind, count, grid, grid, bench.model.config.vision_config.patch_size))
        hits: dict[int, list[bool]] = {}
        right: dict[str, list[bool]] = {name: [] for name in ("answer", "identity", "answer_alone", "identity_alone")}
        for start in range(0, count, bench.batch):
            part = items[start : start + bench.batch]
            for name, question in (("identity", IDENTITY), ("answer", ASK[kind])):
                examples = [_asked(item, question) for item in part]
                inputs = controls.prepare(bench.family, bench.processor, examples)
                if name == "answer":
                    seen = vtprune.lens(bench.model, inputs, topk=max(TOPS), processor=bench.processor)
                    for i, item in enumerate(part):
                        word = f"##{item.answer}" if kind == "character" else item.answer
                        token = i * grid * grid + item.row * grid + item.column
                        for at, layer in enumerate(seen.layers):
                            near = seen.ids[at, token].tolist()
                            hits.setdefault(layer, []).append(tokenizer.convert_tokens_to_ids(word) in near)
                places = [(item.row, item.column) for item in part]
                alone = vtprune.using(bench.model, "benchmark-one-token", places=places, keep=1)
                for suffix, block in (("", nullcontext()), ("_alone", alone)):
                    with block:
                        given = runner.generate(bench.model, bench.processor, inputs, 8)
                    shape = [item.object if kind in ("object", "color") else "square" for item in part]
                    wanted = [item.answer for item in part] if name == "answer" else shape
                    # A text of one character is read as three, which the model was trained to write.
                    right[name + suffix] += [
                        w in g if kind == "character" and name == "answer" else w == g
                        for w, g in zip(wanted, given, strict=True)
                    ]
        about: Row = {"kind": kind, "pictures": count}
        for layer, found in sorted(hits.items()):
            yield {**about, "measure": f"word in the nearest {max(TOPS)}, layer {layer}"} | with_interval(found)
        yield {**about, "measure": "answer"} | with_interval(right["answer"])
        yield {**about, "measure": "answer, only this token kept"} | with_interval(right["answer_alone"])
        if kind in ("color", "count"):
            for suffix, what in (("", ""), ("_alone", ", only this token kept")):
                known = [a for a, i in zip(right["answer" + suffix], right["identity" + suffix], strict=True) if i]
                yield {**about, "measure": f"identity{what}"} | with_interval(right["identity" + suffix])
                if known:
                    measure = f"answer where the object is identified ({len(known)}){what}"
                    yield {**about, "measure": measure} | with_interval(known)


def _asked(item: compression.Patch, question: str) -> tasks.Example:
    text = question.format(color=item.color, object=item.object)
    parts = ({"type": "image", "image": item.picture}, {"type": "text", "text": text})
    return tasks.Example("patches", "", item.kind, (tasks.user(*parts),), item.answer)


EXPERIMENTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "words": words,
    "shares": shares,
    "remove": remove,
    "inject": injection,
    "skip": skipping,
    "patches": patch_compression,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=["calibrate", *EXPERIMENTS])
    parser.add_argument("--model", default="pocket-llava")
    parser.add_argument("--questions", type=int, default=1200, help="of the test split; pictures where there are none")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="a folder")
    given = parser.parse_args(arguments)

    model, processor = vtprune.load(given.model, dtype=torch.float32)
    bench = Bench(model, processor, given.model, given.questions, given.batch)
    where = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
    about = {"device": where, "torch": torch.__version__, "transformers": transformers.__version__}
    about |= {"commit": given.commit or commit(), "model": given.model}
    for name in given.experiments:
        if name == "calibrate":
            calibrate_it(bench)
            continue
        rows = [{**about, **row} for row in EXPERIMENTS[name](bench)]
        given.out.mkdir(parents=True, exist_ok=True)
        file = given.out / f"lens-{name}-{given.model}-{where.lower().replace(' ', '-')}.csv"
        with file.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(dict.fromkeys(itertools.chain.from_iterable(rows))))
            writer.writeheader()
            writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        for row in rows:
            print({key: value for key, value in row.items() if key not in about})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
