# SPDX-License-Identifier: Apache-2.0
"""CoreMatching, measured: its premise, what its two halves do to answers, and what they save.

    python -m benchmarks.corematching                        # on a GPU: about ten minutes, with 7B shapes
    python -m benchmarks.corematching --smoke --out-dir x    # anywhere: tiny, proves that the script runs

Three files. `premise`: do core tokens fire core neurons more than random tokens do, and do they alone point to the same
core? `answers`: accuracy, FLOPs and time of a trained pocket model with core tokens, core neurons and both; answers of
one token and of several apart, because it is later tokens that miss the neurons which the prompt did not fire.
`decode`: dense against sparse FFNs at 7B shapes, alone and inside the whole model, batch 1. `benchmarks/README.md`
explains the columns.
"""

from __future__ import annotations

import argparse
import csv
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import vtprune
from benchmarks.accuracy import prefill_ms, synchronize
from vtprune import bench
from vtprune.bench.clocks import Clock
from vtprune.decoding import core_neurons
from vtprune.eval import controls, runner, stats, tasks
from vtprune.kernels import neuron_match
from vtprune.models import find_family
from vtprune.pruners.corematching import CoreMatchingPruner, elbow

RHO, BETA = 0.2, 0.4
BETAS = (0.2, 0.4, 0.6)
WORDS = 40  # around the picture of a model with random weights
#: Hidden size and neurons of one FFN: LLaVA-1.5-7B and Qwen2.5-VL-7B.
FFNS = {"llava-1.5-7b": (4096, 11008), "qwen2.5-vl-7b": (3584, 18944)}
Row = dict[str, Any]


def write(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# -- the premise ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def activations(model: Any, inputs: Row) -> tuple[list[Tensor], Tensor]:
    """What feeds each down projection of the dense model, ``[L, d_ff]`` per layer, and which rows are visual."""
    family = find_family(model)
    found: list[Tensor] = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: found.append(args[0][0]))
        for layer in family.lm.layers
    ]
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    ids = inputs["input_ids"][0]
    slots = torch.isin(ids, torch.tensor(list(family.placeholders.values()), device=ids.device)).nonzero().flatten()
    return found, slots[vtprune.encode(model, inputs).source]


def overlap(act: Tensor, rows: Tensor, core: Tensor) -> Tensor:
    """Of the active neurons of each row, the share that is in the core ``[F]`` bool."""
    on = act[rows] > 0
    return (on & core).sum(1) / on.sum(1).clamp(min=1)


def core_of(act: Tensor, beta: float = BETA) -> Tensor:
    """Core neurons ``[F]`` bool of these rows."""
    ids = neuron_match.core(neuron_match.top_counts(act, [act.shape[0]], RHO), beta)[0][0]
    return torch.zeros(act.shape[1] + 1, dtype=torch.bool, device=act.device).index_fill_(0, ids, True)[:-1]


def premise(model: Any, processor: Any, source: tasks.Task, split: str, count: int) -> Iterator[Row]:
    """One row per way to choose core tokens and layer: numbers of core tokens, of as many random visual tokens, and of
    all visual tokens."""
    family, found = find_family(model), {}  # type: ignore[var-annotated]
    matching = CoreMatchingPruner().layer
    for number, example in enumerate(source.examples(split, count, 0)):
        inputs = controls.prepare(family, processor, [example])
        acts, visual = activations(model, inputs)
        scores = ((acts[matching][visual] > 0) & core_of(acts[matching])).sum(1)
        best = scores.sort(descending=True, stable=True).indices[: max(1, len(visual) // 4)]
        shuffled = torch.randperm(len(visual), generator=torch.Generator().manual_seed(number)).to(visual.device)
        text = torch.ones(len(acts[0]), dtype=torch.bool, device=visual.device).index_fill_(0, visual, False).nonzero()
        for how, chosen in (("elbow", visual[elbow(scores, (len(visual),))]), ("top quarter", visual[best])):
            random = visual[shuffled[: len(chosen)]]
            for layer, act in enumerate(acts):
                core = core_of(act)
                numbers = {"core_tokens": len(chosen), "visual_tokens": len(visual)}
                for name, rows in (("core", chosen), ("random", random), ("all", visual)):
                    numbers[f"active_in_core_{name}"] = float(overlap(act, rows, core).mean())
                    numbers[f"matches_{name}"] = float(((act[rows] > 0) & core).sum(1).float().mean())
                    # The core of text and these tokens alone: how much of it the whole prompt agrees with.
                    alone = core_of(act[torch.cat([text.flatten(), rows])])
                    numbers[f"same_core_{name}"] = float((alone & core).sum() / (alone | core).sum().clamp(min=1))
                found.setdefault((how, layer), []).append(numbers)
    for (how, layer), rows in sorted(found.items()):
        mean = {key: round(statistics.fmean(r[key] for r in rows), 4) for key in rows[0]}
        yield {"chosen_by": how, "layer": layer, "matching_layer": matching, "prompts": len(rows), **mean}


# -- answers of a trained model ---------------------------------------------------------------------------------------


@contextmanager
def variant(model: Any, name: str, keep: float, beta: float) -> Iterator[None]:
    """``dense``, or any of ``tokens``, ``top-k``, ``random`` and ``neurons``, joined by +."""
    parts = name.split("+")
    with ExitStack() as stack:
        if "tokens" in parts:
            stack.enter_context(vtprune.using(model, "corematching"))
        if "top-k" in parts:
            stack.enter_context(vtprune.using(model, "corematching", mode="top_k", keep=keep))
        if "random" in parts:
            stack.enter_context(vtprune.using(model, "random", layer=CoreMatchingPruner().layer, keep=keep))
        if "neurons" in parts:
            stack.enter_context(core_neurons(model, beta=beta))
        yield


def ffn_share(model: Any, neurons: bool, beta: float) -> float:
    """Multiplications of one decoded token, head and attention products left out, as a share of the dense model's."""
    config = find_family(model).config.text_config
    depth, width, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or width // heads
    attention, ffn = width * head * (2 * heads + 2 * kv), 3 * width * inner
    if not neurons:
        return 1.0
    with core_neurons(model, beta=beta) as handle:
        sparse = len(handle.layers)
    return (depth * attention + (depth - sparse) * ffn + sparse * ffn * beta) / (depth * (attention + ffn))


def answers(
    model: Any,
    processor: Any,
    source: tasks.Task,
    split: str,
    count: int,
    keep: float,
    plans: list[tuple[str, float]],
    timed: int,
) -> Iterator[Row]:
    """Exact answers, one prompt at a time, because core neurons belong to one prompt."""
    family = find_family(model)
    examples = list(source.examples(split, count, 0))
    inputs = [controls.prepare(family, processor, [example]) for example in examples]
    lengths = [len(processor.tokenizer(e.answer, add_special_tokens=False)["input_ids"]) for e in examples]
    for name, beta in plans:
        given, kept, before, after, times = [], [], 0, 0, []
        for i, one in enumerate(inputs):
            with variant(model, name, keep, beta):
                given.append(runner.generate(model, processor, one, source.max_new_tokens)[0])
                if name not in ("dense", "neurons"):
                    report = vtprune.report(model)
                    kept.append(report.tokens_out / report.tokens_in)
                    before, after = before + report.flops_before, after + report.flops_after
                if i < timed:
                    times.append((prefill_ms(model, one), token_ms(model, one, 16 if timed > 1 else 2)))
        right = [text == example.answer for text, example in zip(given, examples, strict=True)]
        value = stats.accuracy(np.array(right, float)[:, None], [e.kind for e in examples])[0]
        row = {"variant": name, "beta": beta if "neurons" in name else "", "questions": len(examples)}
        row |= {"kept": round(statistics.fmean(kept), 4) if kept else 1.0}
        row |= {"accuracy": round(value.value, 4), "plus_minus": round((value.high - value.low) / 2, 4)}
        for label, mine in (("one_token", lambda n: n == 1), ("several_tokens", lambda n: n > 1)):
            found = [r for r, n in zip(right, lengths, strict=True) if mine(n)]
            row |= {f"{label}_questions": len(found), label: round(statistics.fmean(found), 4) if found else ""}
        row |= {"prefill_flops": round(after / before, 4) if before else 1.0}
        row |= {"decode_flops": round(ffn_share(model, "neurons" in name, beta), 4)}
        row |= {"prefill_ms": round(statistics.median(t[0] for t in times), 2)}
        row |= {"token_ms": round(statistics.median(t[1] for t in times), 3)}
        yield row


@torch.inference_mode()
def token_ms(model: Any, inputs: Row, steps: int, runs: int = 3) -> float:
    """Median time of one decoded token, greedy, the prompt and the first token left out."""
    times = []
    for _ in range(runs + 1):
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=out.past_key_values)
        synchronize(model.device)
        start = time.perf_counter()
        for _ in range(steps):
            out = model(input_ids=token, past_key_values=out.past_key_values)
        synchronize(model.device)
        times.append(1000 * (time.perf_counter() - start) / steps)
    return statistics.median(times[1:])


# -- 7B shapes --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def microseconds(call: Callable[[], object], device: torch.device, runs: int) -> float:
    """Median time of one call. Between calls the cache of a GPU is overwritten: decoding reads weights from memory."""
    spoil = torch.empty(256 << 20, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    clock, times = Clock(device), []
    for _ in range(runs + 3):
        if spoil is not None:
            spoil.zero_()
        start = clock.mark()
        call()
        end = clock.mark()
        clock.wait()
        times.append(1000 * clock.milliseconds(start, end))
    return statistics.median(times[3:])


def ffn_alone(device: torch.device, name: str, width: int, inner: int, runs: int) -> Iterator[Row]:
    """One FFN on one row: dense, with its core gathered once, and gathered while reading (`kernels.sparse_ffn`)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    linear, silu = nn.functional.linear, nn.functional.silu
    torch.manual_seed(0)
    with device:
        gate, up = (torch.randn(inner, width, dtype=dtype) / width**0.5 for _ in range(2))
        down = torch.randn(width, inner, dtype=dtype) / inner**0.5
        x = torch.randn(1, width, dtype=dtype)
    turned = down.t().contiguous().t()

    def ffn(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return linear(silu(linear(x, gate)) * linear(x, up), down)

    dense = microseconds(lambda: ffn(gate, up, down), device, runs)
    act = silu(linear(x, gate)) * linear(x, up)
    for beta in BETAS:
        ids = torch.randperm(inner)[: int(beta * inner)].sort().values.to(device)
        expected = linear(torch.zeros_like(act).index_copy_(1, ids, act[:, ids]), down).float()
        calls: dict[str, Callable[[], Tensor]] = {
            "gathered": functools.partial(ffn, gate[ids], up[ids], down[:, ids].contiguous()),
            "sparse_ffn": functools.partial(neuron_match.sparse_ffn, x, gate, up, turned, ids),
        }
        for how, call in calls.items():
            took = microseconds(call, device, runs)
            yield {
                "what": f"ffn {how}",
                "shape": name,
                "beta": beta,
                "dense": round(dense, 2),
                "sparse": round(took, 2),
                "unit": "us",
                "speedup": round(dense / took, 3),
                "largest_error": f"{float((call().float() - expected).abs().max() / expected.abs().max()):.2g}",
            }


def whole_model(device: torch.device, names: tuple[str, ...], steps: int) -> Iterator[Row]:
    """Prefill and decode of a model with random weights: dense, core tokens, core neurons, both."""
    for name in names:
        model: Any = bench.build(name, device)
        side = {"llava-1.5-7b": (24, 24), "qwen2.5-vl-7b": (36, 36)}.get(name, (4, 4))
        inputs = bench.make_inputs(model, 1, (28 * side[0], 28 * side[1]), WORDS)
        depth = len(find_family(model).lm.layers)
        first = min(CoreMatchingPruner().layer, depth - 2)
        every, dense = range(depth), None
        plans = [("dense", None), ("tokens", None), ("neurons", None), ("neurons", every), ("tokens+neurons", every)]
        for how, layers in plans:
            label = how
            with ExitStack() as stack:
                if "tokens" in how:  # random weights have no elbow worth the name
                    stack.enter_context(vtprune.using(model, "corematching", mode="top_k", keep=0.4, layer=first))
                if "neurons" in how:
                    handle = stack.enter_context(core_neurons(model, rho=RHO, beta=BETA, layers=layers))
                    label = f"{how}, {len(handle.layers)} of {depth} layers"
                found = (prefill_ms(model, inputs), token_ms(model, inputs, steps))
            dense = dense or found
            for what, unit, mine, base in zip(("prefill", "decode"), ("ms", "tokens/s"), found, dense, strict=True):
                rate = (lambda t: 1000 / t) if what == "decode" else (lambda t: t)
                yield {
                    "what": f"{what} {label}",
                    "shape": name,
                    "beta": BETA if "neurons" in how else "",
                    "dense": round(rate(base), 2),
                    "sparse": round(rate(mine), 2),
                    "unit": unit,
                    "speedup": round(base / mine, 3),
                    "largest_error": "",
                }
        model = None  # before the next one is built: two of them may not fit
        gc.collect()
        torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-llava", help="the trained model of `premise` and `answers`")
    parser.add_argument("--task", default="pocketvqa/extended", help=", ".join(tasks.names()))
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=60, help="prompts of `premise`")
    parser.add_argument("--split", default="test", choices=["val", "test"])
    parser.add_argument("--only", nargs="+", default=["premise", "answers", "decode"])
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out-dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--smoke", action="store_true", help="a few questions and tiny shapes, on a CPU too")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not given.smoke and "decode" in given.only:
        parser.error("the 7B shapes need a CUDA device; use --smoke, or --only premise answers")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    about = {
        "device": where,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": given.commit or runner.current_commit(),
    }
    suffix = where.lower().replace("nvidia ", "").replace(" ", "-")
    shapes, models, steps, runs, timed = FFNS, tuple(FFNS), 32, 50, 5
    if given.smoke:
        given.questions, given.prompts = 2, 1
        shapes, models, steps, runs, timed = {"tiny": (64, 160)}, ("tiny-llava",), 2, 2, 1

    def save(name: str, rows: Iterator[Row], extra: Row) -> None:
        found = []
        for row in rows:  # written row by row: a run that is cut off leaves what it has
            found.append({**about, **extra, **row})
            write(found, given.out_dir / f"corematching-{name}-{suffix}.csv")
            print(row)

    if "premise" in given.only or "answers" in given.only:
        model, processor = vtprune.load(given.model, dtype=torch.float32)
        source = tasks.get(given.task)
        extra = {"model": Path(given.model).name, "task": given.task, "split": given.split}
        if "premise" in given.only:
            save("premise", premise(model, processor, source, given.split, given.prompts), extra)
        if "answers" in given.only:
            plans = [("dense", BETA), ("tokens", BETA), *(("neurons", beta) for beta in BETAS)]
            plans += [("tokens+neurons", BETA), ("top-k", BETA), ("random", BETA)]
            rows = answers(model, processor, source, given.split, given.questions, 0.25, plans, timed)
            save("answers", rows, extra | {"keep": 0.25})
    if "decode" in given.only:

        def both() -> Iterator[Row]:
            for name, (width, inner) in shapes.items():
                yield from ffn_alone(device, name, width, inner, runs)
            yield from whole_model(device, models, steps)

        save("decode", both(), {"rho": RHO})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
