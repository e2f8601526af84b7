# SPDX-License-Identifier: Apache-2.0
"""What a GPU does between the vision tower and the language model of a prefill that runs as graphs, kernel by kernel.

    python -m benchmarks.between --preset llava-1.5-7b   # a minute: build, capture, 30 timed runs of each line

Per line: milliseconds to the first token beside the ideal's, and of one profiled prefill what the GPU does before the
tower's graph, between it and that of the language model, and after that; and how long before the GPU came to it the
host had launched the language model (negative: the GPU waited for the host).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from vtprune import bench
from vtprune.bench import runner
from vtprune.bench.clocks import Times, timed_runs
from vtprune.bench.shapes import default_size
from vtprune.config import PruneConfig
from vtprune.engine import decoder, graph
from vtprune.engine.attach import attached
from vtprune.models import find_family

METHODS = ("grid", "norm", "idpruner", "divprune")
KEEP = {"llava-next-7b": 1 / 18}


def timeline(call: Any) -> str:
    """One call under the profiler, in words."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    launches = {e["args"]["correlation"]: e for e in events if e["name"].startswith("cudaGraphLaunch")}
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    device.sort(key=lambda e: e["ts"])
    waits = [e for e in events if e["name"] in ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")]
    of_graph: dict[int, list[Any]] = {}
    for e in device:
        if e["args"].get("correlation") in launches:
            of_graph.setdefault(e["args"]["correlation"], []).append(e)
    if len(of_graph) < 2:
        return f"{len(of_graph)} graphs were launched, {len(device)} kernels ran: nothing to tell apart"
    spans = [(min(e["ts"] for e in es), max(e["ts"] + e["dur"] for e in es), c) for c, es in of_graph.items()]
    spans.sort()
    (start, tower, first), (lm, end, last) = spans[0], spans[-1]
    host = min(e["ts"] for e in events if e.get("cat") == "cpu_op")

    def about(name: str, part: list[Any], begin: float, stop: float) -> str:
        busy = sum(e["dur"] for e in part)
        return f"  {name}: {len(part)} kernels, {busy:.0f} us busy of {stop - begin:.0f} us"

    before = [e for e in device if e["ts"] < start]
    middle = [e for e in device if tower <= e["ts"] < lm]
    after = [e for e in device if e["ts"] >= end]
    lines = [
        about("before the tower", before, host, start),
        about("tower", of_graph[first], start, tower),
        about("middle", middle, tower, lm),
        about("language model", of_graph[last], lm, end),
        about("after", after, end, max((e["ts"] + e["dur"] for e in after), default=end)),
        f"  language model launched {lm - launches[last]['ts']:.0f} us before it ran, "
        f"{tower - launches[last]['ts']:.0f} us before the tower was through",
        f"  waits of the host: {[(w['name'][4:], round(w['ts'] - host), round(w['dur'])) for w in waits[:-1]]}",
    ]
    previous = tower
    for e in [*middle, *after]:
        if e["ts"] >= end > previous:
            previous = end
            lines.append("    -- language model --")
        lines.append(f"    {e['ts'] - previous:6.1f} idle, {e['dur']:6.1f} us {e['name'][:110]}")
        previous = e["ts"] + e["dur"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llava-1.5-7b")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--eager-choice", action="store_true", help="also without the choice of tokens as a graph")
    args = parser.parse_args()
    decoder.TUNED_ROWS = 0  # tuning takes a minute, and gives nothing here
    model = bench.build(args.preset, torch.device(args.device))
    size = default_size(args.preset, model)
    inputs = bench.make_inputs(model, 1, size)
    keep = KEEP.get(args.preset, 1 / 9)
    lines = {"ideal": runner.ideal(model, inputs, keep, "k", "graph")}
    for method in METHODS:
        lines[method] = runner.pruned(model, inputs, PruneConfig(method, keep=keep, compile="graph"), "k")
    many, least = graph.CAPTURED_AFTER, [False, True] if args.eager_choice else [False]
    with ExitStack() as stack:
        stack.enter_context(attached(find_family(model)))
        for eager in least:
            graph.CAPTURED_AFTER = 1 << 30 if eager else many
            if eager:
                print("\n== the choice of tokens without a graph")
            found = {name: Times() for name in lines}
            for _ in range(args.rounds):
                for name, line in lines.items():
                    with line.enter() as running:
                        timed_runs(model, running.prefill, found[name], 3, warm_up=4)
            base = found["ideal"].quantile("ttft", 0.5)
            for name, line in lines.items():
                parts = {p: found[name].quantile(p, 0.5) for p in ("ttft", "vision", "score", "pack", "lm")}
                said = ", ".join(f"{p} {v:.3f}" for p, v in parts.items() if v is not None)
                print(f"{name}: {said} ms; {(parts['ttft'] or 0) / (base or 1):.3f} x ideal")
                with line.enter() as running, torch.inference_mode():
                    for _ in range(4):
                        running.prefill()
                    if args.device == "cuda":
                        torch.cuda.synchronize()
                        print(timeline(running.prefill))
                    if running.report is not None:
                        print(f"  {running.report().compiled}")


if __name__ == "__main__":
    main()
