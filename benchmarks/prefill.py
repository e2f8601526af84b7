# SPDX-License-Identifier: Apache-2.0
"""Dense against pruned prefill at the shapes of LLaVA-1.5-7B and Qwen2.5-VL-7B, end to end, with random weights.

    python -m benchmarks.prefill                      # on a GPU: about five minutes, 7B shapes in bf16
    python -m benchmarks.prefill --tiny --out x.csv   # anywhere: seconds, tiny shapes, proves that the script runs

Speed does not depend on what the weights are, only on their shapes, so nothing is downloaded; accuracy is not measured
here. Every row is written as soon as it is measured. `benchmarks/README.md` explains the columns.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import vtprune
from vtprune import bench
from vtprune.bench.clocks import Clock

KEEPS = (Fraction(1), Fraction(1, 2), Fraction(1, 4), Fraction(1, 9))
METHODS = ("random", "norm", "divprune", "idpruner")
TEXT_TOKENS = 40
WARM_UP, MIN_RUNS, MAX_RUNS = 3, 10, 30


@dataclass(frozen=True)
class Case:
    """One model at one batch and picture size: `grid` counts visual tokens down and across a picture."""

    model: str
    batch: int
    grid: tuple[int, int]

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


CASES = (
    Case("llava-1.5-7b", 1, (24, 24)),
    Case("llava-1.5-7b", 8, (24, 24)),
    Case("qwen2.5-vl-7b", 1, (36, 36)),
    Case("qwen2.5-vl-7b", 1, (64, 64)),
)
TINY_CASES = (Case("tiny-llava", 2, (4, 4)), Case("tiny-qwen2.5-vl", 1, (4, 6)))


@dataclass(frozen=True)
class Row:
    """One line of the CSV; see benchmarks/README.md."""

    gpu: str
    torch: str
    transformers: str
    commit: str
    model: str
    dtype: str
    attention: str
    batch: int
    tokens_per_image: int
    text_tokens: int
    method: str
    keep: str
    kept_per_image: int
    runs: int
    total_ms_median: float
    total_ms_p90: float
    llm_ms_median: float
    llm_ms_p90: float
    before_llm_ms_median: float
    peak_mib: int
    weights_mib: int


def build(name: str, device: torch.device) -> nn.Module:
    """A preset of `vtprune.bench` with random weights."""
    return bench.build(name, device)


def make_inputs(model: nn.Module, case: Case) -> dict[str, Tensor]:
    """A prompt of `TEXT_TOKENS` words around one picture of noise, `case.batch` times, on the model's device."""
    height, width = (28 * side for side in case.grid)  # of Qwen2.5-VL; a picture of LLaVA has one size
    return bench.make_inputs(model, case.batch, (height, width), TEXT_TOKENS)


@contextmanager
def llm_marks(model: nn.Module, clock: Clock) -> Iterator[dict[str, Any]]:
    """Marks where the language model starts, after packing, and where it ends, before rows are put back."""
    marks: dict[str, Any] = {}
    language_model = model.model.language_model
    # Entered after `apply`, so the first hook runs after the engine's own; the second is put before it.
    start = language_model.register_forward_pre_hook(lambda *_: marks.update(start=clock.mark()))
    end = language_model.register_forward_hook(lambda *_: marks.update(end=clock.mark()), prepend=True)
    try:
        yield marks
    finally:
        start.remove()
        end.remove()


def measure(model: nn.Module, call: Callable[[], object], seconds: float) -> dict[str, Any]:
    """Run `call` until the time is up, and tell medians, 90th percentiles and peak memory."""
    clock = Clock(model.device)
    totals, llms = [], []
    with llm_marks(model, clock) as marks, torch.inference_mode():
        for _ in range(WARM_UP):
            call()
        clock.wait()
        if clock.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        deadline = time.perf_counter() + seconds
        while len(totals) < MIN_RUNS or (len(totals) < MAX_RUNS and time.perf_counter() < deadline):
            start = clock.mark()
            call()
            end = clock.mark()
            clock.wait()
            totals.append(clock.milliseconds(start, end))
            llms.append(clock.milliseconds(marks["start"], marks["end"]))
    peak = torch.cuda.max_memory_allocated() if clock.on_gpu else 0
    before = [total - llm for total, llm in zip(totals, llms, strict=True)]
    return {
        "runs": len(totals),
        "total_ms_median": round(statistics.median(totals), 3),
        "total_ms_p90": round(float(np.quantile(totals, 0.9)), 3),
        "llm_ms_median": round(statistics.median(llms), 3),
        "llm_ms_p90": round(float(np.quantile(llms, 0.9)), 3),
        "before_llm_ms_median": round(statistics.median(before), 3),
        "peak_mib": peak >> 20,
    }


def variants(model: nn.Module, case: Case, seconds: float) -> Iterator[tuple[str, Fraction, Callable[[], dict]]]:
    """Every line of one case: method, fraction kept, and a function that measures it."""
    inputs = make_inputs(model, case)

    def forward() -> object:
        return model(**inputs, use_cache=True, logits_to_keep=1)

    def dense() -> dict[str, Any]:
        return {"kept_per_image": case.tokens} | measure(model, forward, seconds)

    def pruned(method: str, keep: Fraction) -> dict[str, Any]:
        with vtprune.apply(model, method, keep=float(keep)) as handle:
            result = measure(model, forward, seconds)
            return {"kept_per_image": handle.report().tokens_out // case.batch} | result

    def ideal(keep: Fraction) -> dict[str, Any]:
        """The language model alone, given a prompt that never had more rows: what no pruner can beat."""
        kept = max(1, int(case.tokens * keep))
        rows = torch.randn(case.batch, kept + TEXT_TOKENS, model.get_input_embeddings().embedding_dim)
        rows = rows.to(model.device, model.dtype)
        mask = torch.ones(rows.shape[:2], dtype=torch.long, device=model.device)

        def call() -> object:
            return model.model.language_model(inputs_embeds=rows, attention_mask=mask, use_cache=True)

        return {"kept_per_image": kept} | measure(model, call, seconds)

    yield "dense", Fraction(1), dense
    for keep in KEEPS:
        yield "ideal", keep, lambda keep=keep: ideal(keep)
        for method in METHODS:
            yield method, keep, lambda method=method, keep=keep: pruned(method, keep)


def commit() -> str:
    """The commit of the source folder, with a + when files were changed since."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, capture_output=True, check=True)
        state = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.decode().strip() + ("+" if state.stdout.strip() else "")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV to write (default: benchmarks/results/prefill-<gpu>.csv)")
    parser.add_argument("--seconds", type=float, default=270, help="time to spend in all (default: 270)")
    parser.add_argument("--commit", help="what to write into the commit column (default: ask git)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU if there is no GPU")
    options = parser.parse_args(arguments)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        parser.error("the 7B shapes need a CUDA device; use --tiny to try the script without one")
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    name = gpu.lower().replace("nvidia ", "").replace(" ", "-")
    out = options.out or Path(__file__).parent / "results" / f"prefill-{name}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)

    cases = TINY_CASES if options.tiny else CASES
    lines = len(cases) * (1 + len(KEEPS) * (1 + len(METHODS)))
    # The rest of the time is for building, for warming up and for the runs that each line has whatever they take.
    share = 0.6 * options.seconds / lines
    stop_at = time.perf_counter() + options.seconds
    complete = True
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for name, group in itertools.groupby(cases, key=lambda case: case.model):
            try:
                model = build(name, device)
                weights = sum(p.numel() * p.element_size() for p in model.parameters()) >> 20
                about = {"gpu": gpu, "torch": torch.__version__, "transformers": transformers.__version__}
                about |= {"commit": options.commit or commit(), "model": name, "attention": "sdpa"}
                about |= {"dtype": str(model.dtype).removeprefix("torch."), "weights_mib": weights}
                for case in group:
                    for row in run_case(model, case, about, share, stop_at):
                        complete &= row is not None
                        if row is not None:
                            writer.writerow(asdict(row))
                            file.flush()
            except Exception:
                complete = False
                print(f"FAILED {name}\n{traceback.format_exc()}", file=sys.stderr)
            model = None  # before the next one is built: two of them may not fit
            gc.collect()
            torch.cuda.empty_cache()
    print(out)
    return 0 if complete else 1


def run_case(model: Any, case: Case, about: dict[str, Any], share: float, stop_at: float) -> Iterator[Row | None]:
    """Measure every line of one case; None stands for a line that failed, or for which no time was left."""
    for method, keep, run in variants(model, case, share):
        label = f"{case.model} batch {case.batch} tokens {case.tokens} {method} keep {keep}"
        if time.perf_counter() > stop_at:
            print(f"NO TIME LEFT for {label}", file=sys.stderr)
            yield None
            continue
        try:
            measured = run()
        except Exception:  # one line that fails must not cost the others
            print(f"FAILED {label}\n{traceback.format_exc()}", file=sys.stderr)
            yield None
            continue
        row = Row(
            **about,
            batch=case.batch,
            tokens_per_image=case.tokens,
            text_tokens=TEXT_TOKENS,
            method=method,
            keep=str(keep),
            **measured,
        )
        print(f"{label}: {row.total_ms_median} ms, LLM {row.llm_ms_median} ms", flush=True)
        yield row


if __name__ == "__main__":
    sys.exit(main())
