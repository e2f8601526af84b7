# SPDX-License-Identifier: Apache-2.0
"""Every kernel against the usual PyTorch code and against what bounds it, side by side in one run.

    python -m benchmarks.kernels                      # on a GPU; writes benchmarks/results/kernels-<gpu>.csv and .png
    python -m benchmarks.kernels --ops greedy         # only ops whose name starts so
    python -m benchmarks.kernels --tiny --out x.csv   # anywhere: small shapes, proves that the script runs

Ops are registered in the modules of `CASES`: see `register`. Each line is written as soon as it is measured, and a line
that fails costs only itself. `benchmarks/README.md` explains the columns.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import math
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

#: Modules that register ops when they are imported.
CASES = ("benchmarks.kernels_greedy", "benchmarks.kernels_ops")
WARM_UP, MIN_RUNS, MAX_RUNS = 3, 5, 50
#: Milliseconds that one line may take, warm-up included.
LINE_MS = 1500.0

Run = Callable[[], Any]


@dataclass(frozen=True)
class Work:
    """What is timed for one op at one shape.

    Parameters
    ----------
    ours
        The op as a user calls it.
    naive
        The usual PyTorch code for the same.
    floor
        What no implementation can do without, such as the matrix product alone.
    graph
        Also time `ours` replayed from a CUDA graph: the GPU's share, without the launches.
    """

    ours: Run
    naive: Run | None = None
    floor: Run | None = None
    graph: bool = False


@dataclass(frozen=True)
class Entry:
    op: str
    shape: str
    make: Callable[[torch.device], Work]
    target_ms: float | None = None
    tiny: bool = False


ENTRIES: list[Entry] = []


def register(
    op: str, shape: str, target_ms: float | None = None, tiny: bool = False
) -> Callable[[Callable[[torch.device], Work]], Callable[[torch.device], Work]]:
    """Register what makes the inputs on a device and returns the work. `tiny`: a shape for ``--tiny``."""

    def add(make: Callable[[torch.device], Work]) -> Callable[[torch.device], Work]:
        ENTRIES.append(Entry(op, shape, make, target_ms, tiny))
        return make

    return add


@dataclass(frozen=True)
class Row:
    """One line of the CSV; see benchmarks/README.md."""

    gpu: str
    torch: str
    triton: str
    commit: str
    op: str
    shape: str
    what: str
    runs: int
    median_ms: float
    p90_ms: float
    target_ms: str


@dataclass
class Table:
    """The CSV, written line by line."""

    out: Path
    gpu: str
    commit: str
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self.out.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow([f.name for f in fields(Row)])

    def add(self, entry: Entry, what: str, times: Sequence[float]) -> None:
        times = sorted(times)
        median, p90 = statistics.median(times), times[math.ceil(0.9 * len(times)) - 1]
        target = "" if entry.target_ms is None or what not in ("ours", "ours, graph") else f"{entry.target_ms:g}"
        row = Row(
            self.gpu, torch.__version__, _triton(), self.commit, entry.op, entry.shape, what, len(times),
            float(f"{median:.4g}"), float(f"{p90:.4g}"), target,
        )  # fmt: skip
        self.rows.append(row)
        with self.out.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow(asdict(row).values())
        print(
            f"{row.op:24} {row.shape:24} {row.what:12} {row.median_ms:10.4g} ms  p90 {row.p90_ms:<10.4g} {target}",
            flush=True,
        )


def _triton() -> str:
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return ""


def timed(run: Run, device: torch.device) -> list[float]:
    """Milliseconds of each run, on the device's own time line. One run follows the other without a pause, as in use."""
    on_gpu = device.type == "cuda"

    def mark() -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    run()
    wait()
    start = time.perf_counter()
    run()
    wait()
    once = 1000 * (time.perf_counter() - start)
    runs = max(MIN_RUNS, min(MAX_RUNS, int(LINE_MS / max(once, 1e-3)) - WARM_UP))
    if once * MIN_RUNS < LINE_MS:
        for _ in range(WARM_UP):
            run()
        wait()
    marks = []
    for _ in range(runs):
        start = mark()
        run()
        marks.append((start, mark()))
    wait()
    return [a.elapsed_time(b) if on_gpu else 1000 * (b - a) for a, b in marks]


def graphed(run: Run) -> Run:
    """The same work, replayed from a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(entry: Entry, device: torch.device, table: Table) -> bool:
    """All lines of an entry; False if one of them failed."""
    done = True
    try:
        work = entry.make(device)
        lines: list[tuple[str, Run | None]] = [("ours", work.ours)]
        if work.graph and device.type == "cuda":
            lines.append(("ours, graph", graphed(work.ours)))
        lines += [("naive", work.naive), ("floor", work.floor)]
    except Exception:
        traceback.print_exc()
        return False
    for what, run in lines:
        try:
            if run is not None:
                table.add(entry, what, timed(run, device))
        except Exception:
            print(f"{entry.op} {entry.shape} {what}", file=sys.stderr)
            traceback.print_exc()
            done = False
    return done


#: What is timed of each op.
WHATS = ("ours", "ours, graph", "naive", "floor")


def plot(rows: Sequence[Row], out: Path) -> None:
    """Bars on a logarithmic scale: naive, ours and the floor of each op and shape, with a mark at the target."""
    colours = {"naive": "#c8c8c8", "ours": "#2a6fdb", "ours, graph": "#7fb0ff", "floor": "#3aa655"}
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.op, row.shape), []).append(row)
    left, wide, bar, gap, font = 330, 620, 14, 12, ImageFont.load_default()
    low = math.floor(math.log10(min(r.median_ms for r in rows)))
    high = math.ceil(math.log10(max(r.median_ms for r in rows)) + 1e-9)
    height = 60 + sum(bar * len(g) + gap for g in groups.values())
    picture = Image.new("RGB", (left + wide + 90, height), "white")
    draw = ImageDraw.Draw(picture)

    def x(ms: float) -> float:
        return left + wide * (math.log10(ms) - low) / max(1, high - low)

    for power in range(low, high + 1):
        draw.line([(x(10.0**power), 30), (x(10.0**power), height - 8)], fill="#e4e4e4")
        draw.text((x(10.0**power) - 12, 16), f"{10.0**power:g} ms", fill="black", font=font)
    y = 36
    for (op, shape), group in groups.items():
        draw.text((8, y), f"{op}  {shape}", fill="black", font=font)
        for row in group:
            draw.rectangle([left, y, max(left + 1, x(row.median_ms)), y + bar - 3], fill=colours[row.what])
            draw.text((x(row.median_ms) + 4, y), f"{row.median_ms:.3g} {row.what}", fill="black", font=font)
            if row.target_ms and row.what == "ours":
                draw.line(
                    [(x(float(row.target_ms)), y - 2), (x(float(row.target_ms)), y + bar)], fill="#d0021b", width=2
                )
            y += bar
        y += gap
    title = f"{rows[0].gpu}, torch {rows[0].torch}, triton {rows[0].triton}, {rows[0].commit}; red: target"
    draw.text((8, 2), title, fill="black", font=font)
    picture.save(out)


def markdown(file: Path) -> str:
    """A CSV file of results as a table: one line per op and shape, median milliseconds."""
    found: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    with file.open(encoding="utf-8", newline="") as opened:
        for row in csv.DictReader(opened):
            found.setdefault((row["op"], row["shape"]), {})[row["what"]] = row
    lines = ["| op | shape | target | ours | ours, graph | naive | floor |", "| --- " * 7 + "|"]
    for (op, shape), cell in found.items():
        target = next(iter(cell.values()))["target_ms"] or "–"
        shown = [f"{float(cell[w]['median_ms']):.3g}" if w in cell else "–" for w in WHATS]
        lines.append("| " + " | ".join([op, shape, target, *shown]) + " |")
    return "\n".join(lines)


def commit() -> str:
    run = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV file; default: benchmarks/results/kernels-<gpu>.csv")
    parser.add_argument("--ops", default="", help="only ops whose name starts with this")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on any machine")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no op after this many seconds")
    parser.add_argument("--commit", default=None, help="where there is no git repository")
    parser.add_argument("--report", type=Path, metavar="CSV", help="print the table of such a file, and time nothing")
    args = parser.parse_args(argv)
    if args.report:
        print(markdown(args.report))
        return 0
    for module in CASES:
        importlib.import_module(module)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        parser.error("there is no CUDA device; --tiny runs small shapes anywhere")
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    name = gpu.lower().replace(" ", "-")
    out = args.out or Path(__file__).parent / "results" / f"kernels-{name}.csv"
    table = Table(out, gpu, args.commit or commit())
    start, failed = time.perf_counter(), 0
    for entry in ENTRIES:
        if entry.tiny == args.tiny and entry.op.startswith(args.ops) and time.perf_counter() - start < args.seconds:
            failed += not measure(entry, device, table)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if table.rows:
        plot(table.rows, out.with_suffix(".png"))
    return int(failed > 0)


if __name__ == "__main__":
    # The modules of CASES register with the imported module, not with this copy of it.
    sys.exit(importlib.import_module("benchmarks.kernels").main())
