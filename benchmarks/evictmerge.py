# SPDX-License-Identifier: Apache-2.0
"""What is left of an answer, and of the KV cache, when visual entries are evicted after the prompt, and merged or not.

    python -m benchmarks.evictmerge                                   # on two CPU cores: some minutes
    python -m benchmarks.evictmerge --pictures 200                    # on a GPU
    python -m benchmarks.evictmerge --pictures 2 --keep 1/4 --out x.csv    # anywhere, to try it

The pocket models cannot describe at length, so a long description is asked for piece by piece ("free listing", as in
`benchmarks.vasparse`): each picture is put into the cache once, entries are evicted, the cache is repeated, and on it
"is there a red circle ?" is asked for every colour and shape. The local window sees the end of the picture then, and no
question. `benchmarks/README.md` explains the columns.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

import vtprune
from benchmarks.answers import write
from benchmarks.vasparse import PAIRS, pictures, prompts, share
from vtprune.budget import parse_keep
from vtprune.decoding import evictmerge
from vtprune.eval import runner
from vtprune.eval.runner import current_commit as commit

#: Name -> options of `evictmerge`; None: no block at all.
METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "evictmerge": {},
    "evict": {"merge": False},
    "evict, global": {"merge": False, "score": "global"},
    "evict, local": {"merge": False, "score": "local"},
    "merge all": {"threshold": -1.0},
    "random": {"merge": False, "score": "random"},
    "random, merge": {"score": "random"},
}
KEEPS = ("1/2", "1/4", "1/9", "1/18")
SHOWN = ("basic", "clutter")


@torch.inference_mode()
def ask(
    model: Any, processor: Any, inputs: dict[str, Tensor], tails: Tensor, method: str, keep: str
) -> tuple[np.ndarray, int]:
    """Which of the questions ``[N, q]`` are answered with yes, ``[N]`` bool, and bytes of the picture's cache."""
    options, yes = METHODS[method], processor.tokenizer.convert_tokens_to_ids("yes")
    block = nullcontext() if options is None else evictmerge(model, keep=float(parse_keep(keep)), **options)
    with block:
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        size = sum(rows.nbytes for layer in cache.layers for rows in (layer.keys, layer.values))
        cache.batch_repeat_interleave(len(tails))
        logits = model(input_ids=tails, past_key_values=cache, use_cache=True).logits[:, -1].float()
    return (logits.argmax(-1) == yes).cpu().numpy(), size


def listing(
    model: Any, processor: Any, shown: str, split: str, count: int, plans: list[tuple[str, str]]
) -> list[dict[str, Any]]:
    """One row for each method and budget."""
    said: dict[tuple[str, str], list[np.ndarray]] = {plan: [] for plan in plans}
    bytes_of: dict[tuple[str, str], int] = {}
    truth = []
    for found, picture in pictures(shown, split, count):
        there = {(s.color, s.shape) for s in found.shapes}
        truth.append(np.array([pair in there for pair in PAIRS]))
        inputs, tails = prompts(model, processor, picture)
        with runner.encode_once(model):
            for plan in plans:
                answers, bytes_of[plan] = ask(model, processor, inputs, tails, *plan)
                said[plan].append(answers)
    there, dense = np.stack(truth), np.stack(said["dense", "1"])
    named = dense | there  # what the dense model names, or should
    lines = []
    for method, keep in plans:
        own = np.stack(said[method, keep])
        line: dict[str, Any] = {
            "shown": shown,
            "method": method,
            "keep": keep,
            "pictures": count,
            "questions": own.size,
        }
        for name, hits, of in (
            ("agree", own == dense, np.ones_like(own)),
            ("agree_on_named", (own == dense) & named, named),
            ("right", own == there, np.ones_like(own)),
            ("missed", ~own & there, there),
            ("false_yes", own & ~there, ~there),
        ):
            line[name], line[f"{name}_pm"] = share(hits, of)
        lines.append({**line, "kv_kib": round(bytes_of[method, keep] / 1024, 1)})
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-llava")
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--keep", nargs="+", default=list(KEEPS))
    parser.add_argument("--split", default="test", choices=["val", "test"])
    parser.add_argument("--shown", nargs="+", default=list(SHOWN), choices=SHOWN)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args(arguments)

    model, processor = vtprune.load(given.model, dtype=torch.float32)
    where = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
    out = given.out or Path(__file__).parent / "results" / f"evictmerge-{where.lower().replace(' ', '-')}.csv"
    about = {
        "device": where,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": given.commit or commit(),
        "model": given.model,
        "split": given.split,
    }
    plans = [("dense", "1")]
    plans += [(method, keep) for method in given.methods if METHODS[method] is not None for keep in given.keep]
    lines = []
    for shown in given.shown:
        for row in listing(model, processor, shown, given.split, given.pictures, plans):
            lines.append({**about, **row})
            print({key: value for key, value in row.items() if not key.endswith("_pm")}, flush=True)
    write(out, lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
