# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning with fewer visual tokens: LoRA under `vtprune.apply`, activation memory and accuracy against dense.

    python -m benchmarks.lora                                    # one GPU, about three minutes (needs peft)
    python -m benchmarks.lora --memory                           # anywhere: memory alone, which needs no training
    python -m benchmarks.lora --steps 2 --questions 8 --methods random --keep 1/9   # anywhere, to see it run

The lesson of LeMo (memory-efficient fine-tuning by dropping tokens whose contribution is redundant): what fine-tuning
holds in memory is the activations, and they shrink with the tokens. In: tokens are dropped before the language model,
for training as for inference, and gradients flow through what is left. Left out: LeMo's choice of tokens in each layer
by a predictor of its own, and its kernels.

`pocket-llava` is to learn words that it has never said for what it sees: the colour and shape questions of
PocketVQA, answered in 14 words of a made-up language ("dax" for red). Without training it gets none right. LoRA (rank 8
on every projection of the language model); vision tower and projector stand still.

`lora-<device>.csv`, a row per method and budget in training: `saved_mib`, what autograd holds between forward and
backward per prompt, counted by saved-tensor hooks (each storage once, weights not), the same on every machine;
`peak_mib` of a step above what the model itself holds (CUDA alone), `step_ms`; accuracy on 14-word test questions with
95 % intervals, served with the tokens that it was trained with (`accuracy`), served dense (`dense_accuracy`), and what
dense training is better by when both are served as trained, question by question (`dense_minus`).
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from torch import Tensor

import vtprune
from benchmarks.answers import RESULTS, write
from benchmarks.papers import named
from vtprune.eval import controls, runner, stats, tasks
from vtprune.eval.runner import current_commit as commit
from vtprune.models import find_family
from vtprune.models.pocket.data import COLORS, SHAPES
from vtprune.models.pocket.worlds import LABELS

MODEL, TASK = "pocket-llava", "pocketvqa/basic"
KINDS = ("color", "shape")
KEEPS = ("1/4", "1/9", "1/18")
#: None that looks at the question: in training the answer stands behind it, and would be looked at, too.
METHODS = ("random", "idpruner", "zoo", "globalcom2", "embedlens", f"idpruner importance=scorer scorer={MODEL}")
WORDS = dict(zip((*COLORS, *SHAPES), LABELS, strict=False))
MIB = 2**20


def examples(split: str, count: int, seed: int) -> Iterator[tasks.Example]:
    """Questions about colours and shapes, with their answers in the new words."""
    task = tasks.get(TASK)
    assert task.drafts is not None
    found = (e for e in task.drafts(split, 6 * count, seed) if e.kind in KINDS)
    for example in itertools.islice(found, count):
        yield replace(example.ready(), answer=WORDS[example.answer])


def labelled(model: Any, processor: Any, batch: Sequence[tasks.Example]) -> dict[str, Tensor]:
    """A batch with answers, on which the loss is."""
    inputs = controls.prepare(find_family(model), processor, batch)
    end = model.generation_config.eos_token_id
    answers = [[*processor.tokenizer(e.answer, add_special_tokens=False)["input_ids"], end] for e in batch]
    assert len({len(answer) for answer in answers}) == 1, "every new word is one token"
    new = torch.tensor(answers, device=model.device)
    silent = torch.full_like(inputs["input_ids"], -100)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1)
    return {**inputs, "labels": torch.cat([silent, new], 1)}


class Saved:
    """Within this block, `mib` is what autograd holds: every storage that is saved for the backward pass, once."""

    def __init__(self, model: Any):
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages: dict[int, Any] = {}

    @property
    def mib(self) -> float:
        return sum(storage.nbytes() for storage in self.storages.values()) / MIB

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = storage  # held, so that its address is not given away
        return tensor

    def __enter__(self) -> Saved:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)


@contextmanager
def pruned(model: Any, method: str, keep: str) -> Iterator[None]:
    """Within this block the model is pruned, or not at all."""
    config = None if method == "dense" else runner.Method.parse(method).config(keep)
    with nullcontext() if config is None else vtprune.using(model, config):
        yield


def adapted(model: Any) -> Any:
    """The model with fresh LoRA weights, in fp32, in training mode."""
    torch.manual_seed(0)
    target = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=target))


def memory(model: Any, inputs: dict[str, Tensor], method: str, keep: str) -> float:
    """MiB that autograd holds for each prompt of a batch."""
    with pruned(model, method, keep), Saved(model) as saved:
        loss = model(**inputs).loss
    loss.backward()
    model.zero_grad()
    return saved.mib / len(inputs["input_ids"])


def trained(model: Any, batches: Sequence[dict[str, Tensor]], method: str, keep: str, steps: int, peak: float) -> Any:
    """A step for each batch, again and again; milliseconds of a step (median) and the peak of memory in MiB."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=peak, weight_decay=0.0)
    cuda = model.device.type == "cuda"
    times, top = [], 0.0
    order = random.Random(0)
    with pruned(model, method, keep):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1.0, (step + 1) / 10) * (1 - step / steps)
            inputs = batches[order.randrange(len(batches))]
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            base, begun = (torch.cuda.memory_allocated() if cuda else 0), time.perf_counter()
            loss = model(**inputs).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if cuda:
                torch.cuda.synchronize()
                top = max(top, (torch.cuda.max_memory_allocated() - base) / MIB)
            times.append(1000 * (time.perf_counter() - begun))
    return float(np.median(times[len(times) // 5 :])), (top if cuda else None), float(loss.detach())


def answers(model: Any, processor: Any, prepared: Sequence[Any], method: str, keep: str) -> list[bool]:
    """Which questions are answered rightly."""
    right = []
    with pruned(model, method, keep), torch.no_grad():
        for batch, inputs in prepared:
            texts = runner.generate(model, processor, inputs, 3)
            right += [text == example.answer for text, example in zip(texts, batch, strict=True)]
    return right


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="measure memory alone")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--examples", type=int, default=1600, help="training questions")
    parser.add_argument("--questions", type=int, default=480, help="test questions")
    parser.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--keep", nargs="+", default=list(KEEPS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", default=None)
    given = parser.parse_args(arguments)
    model, processor = vtprune.load(MODEL, dtype=torch.float32)
    plans = [("dense", "1"), *itertools.product(given.methods, given.keep)]

    def batched(split: str, count: int, size: int) -> Iterator[list[tasks.Example]]:
        rows = examples(split, count, 0 if split == "test" else 31)
        while some := list(itertools.islice(rows, size)):
            yield some

    first = next(batched("train", 4, 4))
    source = {
        "model": MODEL, "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
        "commit": given.commit or commit(),
    }  # fmt: skip
    batches = prepared = None
    if not given.memory:
        batches = [labelled(model, processor, some) for some in batched("train", given.examples, given.batch)]
        prepared = [
            (some, controls.prepare(find_family(model), processor, some))
            for some in batched("test", given.questions, 4 * given.batch)
        ]
    table: list[dict[str, Any]] = []
    right: list[list[list[bool]]] = []
    for method, keep in plans:
        tuned = adapted(model)
        row: dict[str, Any] = {"method": method, "keep": keep}
        row["saved_mib"] = round(memory(tuned, labelled(model, processor, first), method, keep), 2)
        if batches is not None and prepared is not None:
            tuned.train()
            step, peak, loss = trained(tuned, batches, method, keep, given.steps, given.peak)
            tuned.eval()
            row |= {"step_ms": round(step, 1), "peak_mib": "" if peak is None else round(peak, 1)}
            row |= {"last_loss": round(loss, 4), "steps": given.steps, "batch": given.batch}
            right.append([answers(model, processor, prepared, *how) for how in ((method, keep), ("dense", "1"))])
        table.append(row)
        model = tuned.unload()
        print(row, flush=True)
    if prepared is not None:
        kinds = [example.kind for some, _ in prepared for example in some]
        served = np.array([r[0] for r in right] + [r[1] for r in right], float).T
        means, drawn = stats.macro(served, kinds), stats.bootstrap(served, kinds)
        for m, row in enumerate(table):
            d = m + len(table)
            row |= named(("accuracy", "low", "high"), stats.interval(means[m], drawn[:, m]))
            row |= named(("dense_accuracy", "dense_low", "dense_high"), stats.interval(means[d], drawn[:, d]))
            minus = stats.interval(means[0] - means[m], drawn[:, 0] - drawn[:, m])
            row |= named(("dense_minus", "minus_low", "minus_high"), minus) | {"n": len(kinds)}
            print(row, flush=True)
    name = "memory" if given.memory else source["device"].lower().replace(" ", "-")
    write(given.out / f"lora-{name}.csv", [{**row, **source} for row in table])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
