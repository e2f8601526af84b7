# SPDX-License-Identifier: Apache-2.0
"""From the pixels to the first token: methods beside the unpruned model, the ideal, and what others do, in one run.

    python -m benchmarks.endtoend                    # one GPU, about eight minutes, 7B shapes with random weights
    python -m benchmarks.endtoend --only llava next  # some of the presets
    python -m benchmarks.endtoend --only llava --compared  # of these, only lines whose time has a target
    python -m benchmarks.endtoend --tiny --out x     # anywhere: seconds, tiny shapes, proves that the script runs

Every row is written as soon as it is measured, and what the rows say about our targets is printed at the end and goes
into a second file. `benchmarks/README.md` has the presets, `docs/bench.md` the columns.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import vtprune
from benchmarks.kernels_greedy import naive_max_min
from vtprune import bench, registry
from vtprune.bench import Case, Line, Row, runner
from vtprune.config import PruneConfig
from vtprune.engine import decoder, replay
from vtprune.errors import VTPruneError
from vtprune.eval.runner import current_commit as commit
from vtprune.models import find_family
from vtprune.registry import Pruner
from vtprune.tokens import PROJECTOR, Selection, Stage, VisualTokens

#: Methods whose overhead has a target; the others are measured too where it says `others`.
HELD_TO = ("grid", "norm", "idpruner", "divprune")
NAIVE, MAPS = "divprune, naive loop", "fastv, attention map"
LAYER = 1  # after the second layer, as FastV has it

#: Height and width in pixels of pictures with so many tokens.
SIZE_16K, SIZE_4K = (3584, 3584), (1792, 1792)


@dataclass
class NaiveDivPrune(Pruner):
    """DivPrune as the usual loop: a matrix of cosines, and a round of small kernels for each token kept."""

    modality = ("image",)
    mechanism = ("similarity",)
    query_aware = False
    training_free = True
    adaptive = False

    def select(self, tokens: VisualTokens, budget: vtprune.Budget, stage: Stage = PROJECTOR) -> Selection:
        pools, picks, first = budget.pools(tokens), [], 0
        for length, count in zip(pools.lens, pools.counts, strict=True):
            rows = tokens.features[first : first + length]
            if count:
                picks.append(first + naive_max_min(rows, rows[:, 0], count))
            first += length
        return Selection.from_order(torch.cat(picks), tokens)


@dataclass
class MapFastV(Pruner):
    """FastV with the layer's whole attention map, as its paper describes it; see `eager_attention_at`."""

    modality = ("image",)
    mechanism = ("query",)
    query_aware = True
    training_free = True
    adaptive = False

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(LAYER),)

    def score(self, tokens: VisualTokens) -> Tensor:
        assert MapFastV.seen is not None and tokens.prompt_rows is not None
        return MapFastV.seen.reshape(-1)[tokens.prompt_rows].float()

    #: ``[B, P]``: the last token's attention, mean over heads, of the prompt that is running.
    seen: ClassVar[Any] = None


@contextmanager
def eager_attention_at(model: nn.Module, layer: int) -> Iterator[None]:
    """Within this block one decoder layer computes its attention map, and `MapFastV` is given its last row."""
    attention = find_family(model).lm.layers[layer].self_attn
    config = attention.config
    attention.config = copy.copy(config)
    attention.config._attn_implementation = "eager"

    def give_mask(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        rows = hidden.shape[1]
        if rows == 1:  # decoding
            return args, {**kwargs, "attention_mask": None}
        mask = torch.full((rows, rows), torch.finfo(hidden.dtype).min, dtype=hidden.dtype, device=hidden.device).triu(1)
        return args, {**kwargs, "attention_mask": mask[None, None]}

    def take_row(_module: Any, _args: Any, out: Any) -> None:
        MapFastV.seen = out[1][:, :, -1].mean(1)

    handles = [
        attention.register_forward_pre_hook(give_mask, with_kwargs=True),
        attention.register_forward_hook(take_row),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        attention.config, MapFastV.seen = config, None


@contextmanager
def registered() -> Iterator[None]:
    """Within this block the two peers go by a name; afterwards nobody else meets them."""
    peers = {"naive-divprune": NaiveDivPrune, "map-fastv": MapFastV}
    for name, cls in peers.items():
        vtprune.register(name)(cls)
    try:
        yield
    finally:
        for name in peers:
            registry._METHODS.pop(name)


def map_fastv(model: nn.Module, inputs: dict[str, Any], keep: float, label: str) -> Line:
    line = bench.pruned(model, inputs, PruneConfig("map-fastv", keep=keep), label, MAPS)

    @contextmanager
    def enter() -> Iterator[Any]:
        with eager_attention_at(model, LAYER), line.enter() as running:
            yield running

    return replace(line, enter=enter)


@dataclass(frozen=True)
class Preset:
    """One model and prompt shape, and what is measured there."""

    model: str
    case: Case
    keep: float
    label: str
    methods: tuple[str, ...] = HELD_TO
    neighbours: tuple[str, ...] = (NAIVE, "fastv", MAPS, "downsampled picture")
    graphs: bool = True
    others: bool = False
    seconds: float = 40.0
    new_tokens: int = 8
    flops: bool = True
    min_runs: int = 10
    turns: int = 10  # fewest runs of the lines that are compared to 5 %, and take turns; of graphs too
    warm_up: int = 4  # the choice of tokens is captured at the third prompt


PRESETS = {
    "llava": Preset("llava-1.5-7b", Case(1, None, 64), 1 / 9, "1/9", others=True, seconds=25, turns=200),
    "llava-batch": Preset(
        "llava-1.5-7b", Case(8, None, 64), 1 / 9, "1/9", graphs=False, neighbours=(), seconds=8, turns=60
    ),
    "next": Preset("llava-next-7b", Case(1, None, 64), 1 / 18, "1/18", seconds=15, turns=80),
    "globalcom2": Preset("llava-next-7b", Case(1, None, 64), 0.1, "1/10", ("globalcom2",), (), graphs=False, seconds=4),
    "qwen-4k": Preset(
        "qwen2.5-vl-7b",
        Case(1, SIZE_4K, 64),
        1 / 4,
        "1/4",
        graphs=False,
        seconds=10,
        new_tokens=4,
        flops=False,
        min_runs=6,
        turns=24,
    ),
    # A prefill takes seconds here, and the attention map of a layer more memory than the GPU has.
    "qwen-16k": Preset(
        "qwen2.5-vl-7b",
        Case(1, SIZE_16K, 64),
        1 / 4,
        "1/4",
        neighbours=(NAIVE, "downsampled picture"),
        graphs=False,
        seconds=1,
        new_tokens=0,
        flops=False,
        min_runs=7,
        warm_up=1,
    ),
    "variants": Preset("llava-1.5-7b", Case(1, None, 64), 1 / 9, "1/9", seconds=6, flops=False, new_tokens=0),
    "cpu": Preset("pocket-llava", Case(1, None, 64), 1 / 9, "1/9", graphs=False, neighbours=(), seconds=60),
}
#: What stands in for a model, and how long it may take, with ``--tiny``.
TINY = {"llava-1.5-7b": "tiny-llava", "llava-next-7b": "tiny-llava-next", "qwen2.5-vl-7b": "tiny-qwen2.5-vl"}
#: Presets that share a model, so that it is built once.
ORDER = ("llava", "llava-batch", "variants", "next", "globalcom2", "qwen-4k", "qwen-16k", "cpu")


def lines_of(model: nn.Module, preset: Preset) -> list[Line]:
    """Everything of a preset, graphs last."""
    case, keep, label = preset.case, preset.keep, preset.label
    inputs = bench.make_inputs(model, case.batch, case.size, case.text)

    def method(name: str, compile: str | None = None) -> Line:
        return bench.pruned(model, inputs, PruneConfig(name, keep=keep, compile=compile), label)

    lines = [bench.dense(model, inputs), bench.ideal(model, inputs, keep, label)]
    lines += [method(name) for name in preset.methods]
    makers = {
        NAIVE: lambda: bench.pruned(model, inputs, PruneConfig("naive-divprune", keep=keep), label, NAIVE),
        "fastv": lambda: method("fastv"),
        MAPS: lambda: map_fastv(model, inputs, keep, label),
        "downsampled picture": lambda: runner.downsampled(model, case, keep, label),
    }
    lines += [makers[name]() for name in preset.neighbours]
    if preset.others:
        lines += [method(name) for name in others(model) if name not in preset.methods]
    if preset.graphs:
        whole = PruneConfig("grid", keep=1.0, compile="graph")
        lines.append(bench.pruned(model, inputs, whole, "1", "dense"))
        lines.append(bench.ideal(model, inputs, keep, label, "graph"))
        lines += [method(name, "graph") for name in preset.methods]
    return lines


def others(model: nn.Module) -> list[str]:
    """Methods that run on this model without a file of their own."""
    names = []
    for name in vtprune.methods():
        if name in ("naive-divprune", "map-fastv", "worst", "embedlens", "fastv"):
            continue  # a control, one that needs a calibration, and what is measured beside
        with contextlib.suppress(VTPruneError), vtprune.using(model, name, keep=0.5):
            names.append(name)
    return names


def variants(model: nn.Module, preset: Preset) -> Iterator[tuple[str, Callable[[], None], list[Line]]]:
    """The graph of the language model as it is, with fused kernels, and with tuned matrix products."""
    inputs = bench.make_inputs(model, preset.case.batch, preset.case.size, preset.case.text)

    def setting(fuses: bool, tuned: int) -> None:
        replay.Replay.fuses, decoder.TUNED_ROWS = fuses, tuned

    for name, fuses, tuned in (("as it is", False, 0), ("fused", True, 0), ("fused, tuned", True, 512)):
        config = PruneConfig("grid", keep=preset.keep, compile="graph")
        line = bench.pruned(model, inputs, config, preset.label, f"grid, graph {name}")
        yield name, partial(setting, fuses, tuned), [line]


# -- targets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One number that we set out for: `value` is to be at most, or at least, `goal`."""

    preset: str
    what: str
    value: float
    goal: float
    at_most: bool

    @property
    def met(self) -> bool:
        return self.value <= self.goal if self.at_most else self.value >= self.goal


def targets(name: str, rows: Sequence[Row]) -> Iterator[Target]:
    """What the rows of a preset say about the targets of an H100; ratios are within one run."""

    def find(method: str, compile: str = "", keep: str | None = None) -> Row | None:
        return next((r for r in rows if (r.method, r.compile) == (method, compile) and keep in (None, r.keep)), None)

    dense, dense_graph = find("dense"), find("dense", "graph")
    for row in rows:
        ideal = find("ideal", row.compile)
        if row.method in HELD_TO and ideal is not None and row.keep == ideal.keep and name != "variants":
            bound = 1.05 if row.visual_tokens <= 4096 else 1.12
            how = f"{row.method}{', graph' * bool(row.compile)}"
            yield Target(name, f"TTFT of {how} over ideal", ratio(row.ttft_ms_p50, ideal.ttft_ms_p50), bound, True)
        # Without graphs no method may need more memory than the unpruned model.
        ours = row.method not in ("dense", "ideal", NAIVE, MAPS, "downsampled picture") and not row.compile
        if ours and dense is not None and dense.peak_mib and row.peak_mib:
            yield Target(name, f"peak memory of {row.method} over dense", row.peak_mib / dense.peak_mib, 1.0, True)
        if dense is not None and dense.kv_bytes and row.kv_bytes and row.method in HELD_TO:
            share = (row.kept + row.text_tokens) / (dense.kept + dense.text_tokens)
            exact = abs(row.kv_bytes - share * dense.kv_bytes)
            yield Target(
                name, f"KV bytes of {row.method}{', graph' * bool(row.compile)} beyond their share", exact, 0.5, True
            )
    best = min(
        (r for r in rows if r.compile and r.method in HELD_TO and r.lm_ms_p50), key=lambda r: r.lm_ms_p50, default=None
    )
    ms, eager, graphs = {"llava": (7.0, 3.5, 2.3), "next": (9.5, 9.0, 9.0)}.get(name, (0.0, 0.0, 0.0))
    if ms and best is not None and dense is not None:
        yield Target(name, "LM prefill, ms", best.lm_ms_p50 or 0.0, ms, True)
        yield Target(
            name, "LM prefill, eager dense over graph pruned", ratio(dense.lm_ms_p50, best.lm_ms_p50), eager, False
        )
        if dense_graph is not None:
            gain = ratio(dense_graph.lm_ms_p50, best.lm_ms_p50)
            yield Target(name, "LM prefill, dense with graphs over pruned with graphs", gain, graphs, False)
    grid = find("grid") or find("globalcom2") or find("norm")
    if dense is None or grid is None:
        return
    if name == "qwen-16k":
        yield Target(name, "LM prefill, dense over pruned", ratio(dense.lm_ms_p50, grid.lm_ms_p50), 3.8, False)
    if name == "globalcom2" and dense.peak_mib and grid.peak_mib:
        yield Target(name, "memory, dense over pruned (the paper: 1.65)", dense.peak_mib / grid.peak_mib, 1.65, False)
        yield Target(
            name, "samples/s over dense (the paper: 1.8)", ratio(grid.samples_per_s, dense.samples_per_s), 1.8, False
        )
    if name == "cpu" and (norm := find("norm")) is not None:
        yield Target(name, "LM prefill, dense over pruned", ratio(dense.lm_ms_p50, norm.lm_ms_p50), 3.5, False)
        share = ratio(dense.vision_ms, dense.ttft_ms_p50)
        what = f"end to end, dense over pruned (vision tower {share:.0%} of dense)"
        yield Target(name, what, ratio(dense.ttft_ms_p50, norm.ttft_ms_p50), 1.4, False)


def ratio(over: float | None, under: float | None) -> float:
    return over / under if over and under else float("nan")


# -- the run ----------------------------------------------------------------------------------------------------------


class Table:
    """A CSV that gets its rows one by one, so that an interrupted run keeps what it has. Rows of presets, and of lines
    of a preset, that are not run again stay in it.

    Parameters
    ----------
    path, columns
        The file, and what it has; rows of a file with others are dropped.
    presets
        Those that are run again as a whole.
    """

    def __init__(self, path: Path, columns: Sequence[str], presets: Sequence[str]) -> None:
        self.path, self.columns = path, columns
        self.identity = [column for column in ("preset", "method", "compile", "what") if column in columns]
        self.rows: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                rows = [*csv.DictReader(file)]
            self.rows = [row for row in rows if row["preset"] not in presets and set(row) == set(columns)]
        self._write()

    def _write(self) -> None:
        whole = self.path.with_suffix(".tmp")  # a run that is killed while it writes leaves the old file
        with whole.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
        whole.replace(self.path)

    def sort(self) -> None:
        """Put presets in their order, whichever were measured last."""
        self.rows.sort(key=lambda row: ORDER.index(row["preset"]))
        self._write()

    def add(self, row: dict[str, Any]) -> None:
        """Put a row in the place of the one that says the same, or at the end."""
        mine = [row[column] for column in self.identity]
        at = (i for i, old in enumerate(self.rows) if [old[column] for column in self.identity] == mine)
        place = next(at, len(self.rows))
        self.rows[place : place + 1] = [row]
        self._write()


def run_preset(model: nn.Module, name: str, preset: Preset, add: Callable[[Row], None], stop_at: float) -> bool:
    """Measure one preset line by line; True if every line was measured. One that fails must not cost the others."""
    complete = True
    settings: list[tuple[str, Callable[[], None], list[Line]]] = [("", lambda: None, lines_of(model, preset))]
    if name == "variants":
        settings = list(variants(model, preset))
    before = replay.Replay.fuses, decoder.TUNED_ROWS
    given: dict[str, Any] = {name: getattr(preset, name) for name in ("new_tokens", "flops", "warm_up")}
    for label, prepare, lines in settings:
        prepare()
        # Lines that are compared to 5 % take turns, others have each their own, and graphs are captured once for all.
        eager = [line for line in lines if not line.compile]
        on_cpu = find_family(model).model.device.type == "cpu"
        turns = [line for line in eager if on_cpu or line.method in ("dense", "ideal", *preset.methods)]
        alone = [[line] for line in eager if line not in turns]
        graphs = [line for line in lines if line.compile]
        batches = [turns, *alone, graphs]
        for batch in filter(None, batches):
            if time.perf_counter() > stop_at:
                print(f"NO TIME LEFT for {name} {label} {[line.method for line in batch]}", file=sys.stderr)
                complete = False
                continue
            seconds = preset.seconds * len(batch) / len(lines)
            try:
                runs = max(preset.turns, preset.min_runs) if batch is turns or batch is graphs else preset.min_runs
                measured = bench.measure(
                    model, preset.model, preset.case, batch, seconds=seconds, min_runs=runs, **given
                )
                for row in measured:
                    add(row)
            except Exception:
                print(f"FAILED {name} {[line.method for line in batch]}\n{traceback.format_exc()}", file=sys.stderr)
                complete = False
                torch.cuda.empty_cache()
    replay.Replay.fuses, decoder.TUNED_ROWS = before
    return complete


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ORDER, default=[], metavar="PRESET", help=", ".join(ORDER))
    parser.add_argument(
        "--compared",
        action="store_true",
        help="only lines whose time has a target; rows of the others stay",
    )
    parser.add_argument("--out", type=Path, help="folder for the CSV files (default: benchmarks/results)")
    parser.add_argument("--seconds", type=float, default=540, help="no line is begun after so long (default: 540)")
    parser.add_argument("--commit", help="what to write into the commit column (default: ask git)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU if there is no GPU")
    options = parser.parse_args(arguments)

    on_gpu = torch.cuda.is_available()
    names = options.only or [n for n in ORDER if n != "cpu"]
    if not on_gpu and not options.tiny and set(names) != {"cpu"}:
        parser.error("the 7B shapes need a CUDA device; use --only cpu, or --tiny to try the script without one")
    if options.tiny and options.out is None:
        parser.error("--tiny proves that the script runs; give --out, so that it does not write among the results")
    gpu = torch.cuda.get_device_name() if on_gpu and set(names) != {"cpu"} else "cpu"
    suffix = gpu.lower().replace(" ", "-")
    out = options.out or Path(__file__).parent / "results"
    written = options.commit or commit()
    whole = [n for n in names if not options.compared or not (PRESETS[n].others or PRESETS[n].neighbours)]
    rows_file = Table(out / f"endtoend-{suffix}.csv", ["preset", *(f.name for f in fields(Row)), "commit"], whole)
    targets_file = Table(
        out / f"endtoend-targets-{suffix}.csv", ["preset", "what", "value", "goal", "met", "device", "commit"], whole
    )

    with registered():
        complete = run(names, options, on_gpu, rows_file, targets_file, written)
    rows_file.sort()
    targets_file.sort()
    print(rows_file.path, targets_file.path, sep="\n")
    return 0 if complete else 1


def run(
    names: Sequence[str],
    options: argparse.Namespace,
    on_gpu: bool,
    rows_file: Table,
    targets_file: Table,
    written: str,
) -> bool:
    """Measure these presets; True if every line was measured."""
    start, complete = time.perf_counter(), True
    model: nn.Module | None = None
    built: tuple[str, torch.device] | None = None
    for name in (n for n in ORDER if n in names):
        preset = PRESETS[name]
        device = torch.device("cuda" if on_gpu and name != "cpu" else "cpu")
        if options.tiny:
            case = replace(preset.case, size=None)
            preset = replace(
                preset, model=TINY.get(preset.model, preset.model), case=case, seconds=1, turns=3, new_tokens=1
            )
        if options.compared:
            preset = replace(preset, others=False, neighbours=())
        rows: list[Row] = []

        def add(row: Row, name: str = name, rows: list[Row] = rows) -> None:
            rows.append(row)
            rows_file.add({"preset": name, **asdict(row), "commit": written})
            print(
                f"[{time.perf_counter() - start:4.0f} s] {name:12} {row.method:24} {row.keep:5} {row.compile:6} "
                f"ttft {row.ttft_ms_p50} lm {row.lm_ms_p50} score {row.score_ms} peak {row.peak_mib} {row.ran_as}",
                flush=True,
            )

        try:
            if (preset.model, device) != built:
                model = None  # before the next one is built: two of them may not fit
                gc.collect()
                if on_gpu:
                    torch.cuda.empty_cache()
                model, built = bench.build(preset.model, device), (preset.model, device)
            assert model is not None
            complete &= run_preset(model, name, preset, add, start + options.seconds)
        except Exception:
            complete = False
            print(f"FAILED {name}\n{traceback.format_exc()}", file=sys.stderr)
        print(bench.amdahl(rows), *bench.break_even(rows), sep="\n")
        for target in targets(name, rows):
            device_name = rows[0].device
            about = {"met": target.met, "device": device_name, "commit": written}
            shown = {k: v for k, v in asdict(target).items() if k != "at_most"}
            targets_file.add(shown | {"value": round(target.value, 4)} | about)
            sign = "<=" if target.at_most else ">="
            verdict = "MET " if target.met else "MISS"
            print(f"{verdict} {name}: {target.what}: {target.value:.3f} (goal {sign} {target.goal})")
    return complete


if __name__ == "__main__":
    sys.exit(main())
