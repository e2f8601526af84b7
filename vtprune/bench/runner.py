# SPDX-License-Identifier: Apache-2.0
"""What is measured: the unpruned model, methods, and the ideal that no method can beat, side by side."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import vtprune

from ..budget import Budget
from ..config import PruneConfig
from ..engine.attach import attached, engine_of
from ..engine.decoder import empty_cache_for
from ..engine.replay import Unfit
from ..engine.report import prefill_flops
from ..errors import ConfigError
from ..eval.controls import smaller
from ..models import find_family
from .clocks import MAX_RUNS, MIN_RUNS, WARM_UP, Energy, Times, counted_flops, decode_ms, kv_bytes, timed_runs
from .shapes import default_size, make_inputs

#: Runs in a row before the next line has its turn, where lines take turns.
BURST = 3
#: Milliseconds from which on a run is long enough to have a turn of its own.
SLOW_MS = 200.0


@dataclass(frozen=True)
class Case:
    """One prompt shape.

    Parameters
    ----------
    batch
        Samples, with one picture each.
    size
        Height and width of the picture in pixels; None: what the model usually sees.
    text
        Rows of a sample that are not visual tokens.
    """

    batch: int = 1
    size: tuple[int, int] | None = None
    text: int = 64


@dataclass(frozen=True)
class Row:
    """One line of a table. None where something was not measured. docs/bench.md has more on each.

    Parameters
    ----------
    device, torch, transformers, model, dtype, attention, compile
        What ran, and on what; `compile` is ``"graph"`` or empty.
    batch, concurrency
        Samples per request, and requests at once.
    visual_tokens, text_tokens
        Of one sample, before pruning.
    method, keep, kept
        The line, its budget, and the visual tokens that were left.
    runs
        Timed runs.
    ttft_ms_p50, ttft_ms_p90, lm_ms_p50, lm_ms_p90
        Milliseconds to the first token and of the language model's part of it: median, and 9 of 10 runs.
    vision_ms, score_ms, pack_ms
        Milliseconds of the vision tower, of choosing, and of projector and packing.
    tpot_ms
        Milliseconds of one decoding step.
    peak_mib, weights_mib, kv_bytes
        Memory: allocated at most, of the weights alone, and of the cache.
    lm_gflop, lm_gflop_counted, gflop_counted
        Work of the prefill: of the language model by formula, and as counted, and all of it.
    joules
        Energy of a prefill.
    samples_per_s
        Throughput.
    ran_as
        How the parts ran where graphs were asked for.
    """

    device: str
    torch: str
    transformers: str
    model: str
    dtype: str
    attention: str
    compile: str
    batch: int
    concurrency: int
    visual_tokens: int
    text_tokens: int
    method: str
    keep: str
    kept: int
    runs: int
    ttft_ms_p50: float | None
    ttft_ms_p90: float | None
    vision_ms: float | None
    score_ms: float | None
    pack_ms: float | None
    lm_ms_p50: float | None
    lm_ms_p90: float | None
    tpot_ms: float | None
    peak_mib: float | None
    weights_mib: float
    kv_bytes: int | None
    lm_gflop: float | None
    lm_gflop_counted: float | None
    gflop_counted: float | None
    joules: float | None
    samples_per_s: float | None
    ran_as: str


@dataclass
class Running:
    """A line that is on the model: a prefill, and a decoding step on what it returned."""

    prefill: Callable[[], Any]
    step: Callable[[Any], Any]
    cache: Callable[[Any], Any]
    report: Callable[[], Any] | None = None


@dataclass
class Line:
    """Something to measure.

    Parameters
    ----------
    method, keep, kept, visual_tokens, compile
        As in `Row`.
    enter
        Puts it on the model for as long as the block lasts.
    """

    method: str
    keep: str
    kept: int
    visual_tokens: int
    enter: Callable[[], AbstractContextManager[Running]]
    compile: str = ""


def dense(model: nn.Module, inputs: dict[str, Any]) -> Line:
    """The model as it is, without hooks.

    Parameters
    ----------
    model
        A stock transformers model of a supported family.
    inputs
        Of `make_inputs`.
    """
    total = visual_tokens(model, inputs)

    @contextmanager
    def enter() -> Iterator[Running]:
        yield _stock(model, inputs)

    return Line("dense", "1", total, total, enter)


def downsampled(model: nn.Module, case: Case, keep: float, label: str) -> Line:
    """The model as it is, on a smaller picture with about as many tokens as `keep` leaves (see `eval.controls`)."""
    family = find_family(model)
    inputs = make_inputs(model, case.batch, case.size, case.text)
    total = visual_tokens(model, inputs)

    @contextmanager
    def enter() -> Iterator[Running]:
        if hasattr(family, "merge"):
            yield _stock(model, make_inputs(model, case.batch, _smaller_size(model, case, keep), case.text))
        else:
            with smaller(family, inputs, keep, pad=0) as (small, _):  # type: ignore[arg-type]
                yield _stock(model, small)

    if hasattr(family, "merge"):
        count = visual_tokens(model, make_inputs(model, 1, _smaller_size(model, case, keep), case.text))
    else:
        with smaller(family, inputs, keep, pad=0) as (_, tokens):  # type: ignore[arg-type]
            count = tokens[0]
    return Line("downsampled picture", label, count, total, enter)


def _smaller_size(model: nn.Module, case: Case, keep: float) -> tuple[int, int]:
    family = find_family(model)
    unit = family.merge * family.config.vision_config.patch_size  # type: ignore[attr-defined]
    height, width = (side // unit for side in case.size or default_size("", model))
    return round(height * keep**0.5) * unit, round(width * keep**0.5) * unit


def pruned(model: nn.Module, inputs: dict[str, Any], config: PruneConfig, keep: str, name: str = "") -> Line:
    """The model with a method on it.

    Parameters
    ----------
    model
        A stock transformers model of a supported family.
    inputs
        Of `make_inputs`.
    config
        Method and budget.
    keep, name
        What the row calls the budget and the method; `name` is by default the method's own.
    """
    tokens = visual_tokens(model, inputs)

    @contextmanager
    def enter() -> Iterator[Running]:
        with vtprune.apply(model, config) as handle:
            yield replace(_stock(model, inputs), report=handle.report)

    count = kept_tokens(config.budget(), tokens)
    return Line(name or config.label, keep, count, tokens, enter, config.compile or "")


def ideal(model: nn.Module, inputs: dict[str, Any], keep: float | int, label: str, compile: str | None = None) -> Line:
    """What no method can beat: pixels through the vision tower, and `keep` of the tokens straight into the language
    model, without being looked at.

    Parameters
    ----------
    model
        A stock transformers model of a supported family.
    inputs
        Of `make_inputs`.
    keep
        As in `vtprune.apply`.
    label
        What the row calls it.
    compile
        ``"graph"``: both as the graphs that a method would run.
    """
    family = find_family(model)
    total = visual_tokens(model, inputs)
    kept = kept_tokens(Budget(keep), total)
    ids = inputs["input_ids"]
    others = ids[ids != family.placeholders["image"]].view(len(ids), -1)
    separators = int((ids[0] == family.placeholders["image"]).sum()) - total  # newlines count as text
    words = torch.cat([others, others[:, :1].expand(-1, separators)], 1)
    pixels = {k: v for k, v in inputs.items() if k.startswith(("pixel_values", "image_"))}
    lm, head = family.lm, family.model.lm_head

    @contextmanager
    def enter() -> Iterator[Running]:
        with _graphs(model, compile):
            graphs = engine_of(family).graphs if compile else None  # type: ignore[union-attr]

            def prefill() -> Any:
                encoded = family.inner.get_image_features(**pixels)
                rows = getattr(encoded, "pooler_output", encoded)
                flat = torch.cat([r.reshape(-1, r.shape[-1]) for r in rows]) if not isinstance(rows, Tensor) else rows
                flat = flat.reshape(-1, flat.shape[-1])[: len(ids) * kept]
                rows = torch.cat([flat.view(len(ids), kept, -1), family.inner.get_input_embeddings()(words)], 1)
                hidden = None
                if graphs is not None:
                    places = torch.arange(rows.shape[1], device=rows.device).expand(len(ids), -1)
                    places = places.expand(3, -1, -1) if family.mrope else places
                    with suppress(Unfit):
                        hidden, cache = graphs.prefill(rows, places, partial(empty_cache_for, lm))
                if hidden is None:
                    mask = torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device)
                    out = lm(inputs_embeds=rows, attention_mask=mask, use_cache=True)
                    hidden, cache = out.last_hidden_state, out.past_key_values
                return head(hidden[:, -1:]).argmax(-1), cache

            def step(state: Any) -> Any:
                token, cache = state
                embeds = family.inner.get_input_embeddings()(token)
                return head(lm(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state)

            yield Running(prefill, step, lambda state: state[1])

    return Line("ideal", label, kept, total, enter, compile or "")


@contextmanager
def _graphs(model: nn.Module, compile: str | None) -> Iterator[None]:
    if compile is None:
        yield
        return
    handle = vtprune.apply(model, "grid", keep=1.0, compile=compile)
    engine = engine_of(find_family(model))
    assert engine is not None
    engine.fired = True  # it is here for its graphs alone, and need not warn that it never pruned
    with handle:
        yield


def _stock(model: nn.Module, inputs: dict[str, Any]) -> Running:
    def prefill() -> Any:
        return model(**inputs, use_cache=True, logits_to_keep=1)

    def step(out: Any) -> Any:
        return model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)

    return Running(prefill, step, lambda out: out.past_key_values)


def visual_tokens(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Visual tokens of each sample's picture.

    Parameters
    ----------
    model
        A stock transformers model of a supported family.
    inputs
        Of `make_inputs`.
    """
    family = find_family(model)
    return len(family.layouts("image", inputs)[0].rank)


def kept_tokens(budget: Budget, total: int) -> int:
    """Tokens that a budget leaves of `total`."""
    keep = budget.keep
    return min(total, keep) if isinstance(keep, int) else max(1, math.floor(total * keep + 1e-6))


# -- running them -----------------------------------------------------------------------------------------------------


def measure(
    model: nn.Module,
    name: str,
    case: Case,
    lines: Sequence[Line],
    *,
    seconds: float = 60.0,
    new_tokens: int = 8,
    concurrency: Sequence[int] = (1,),
    flops: bool = True,
    min_runs: int = MIN_RUNS,
    warm_up: int = WARM_UP,
) -> Iterator[Row]:
    """Measure `lines` and yield their rows, one as soon as it is there.

    Lines take turns, so that whatever else the machine does falls on all of them; their rows come at the end. Those
    that run as graphs take turns among themselves, after the others.

    Parameters
    ----------
    model, name, case
        What runs, what rows call it, and on which prompt.
    lines
        Of `dense`, `ideal` and `pruned`.
    seconds
        Time for the timed runs of all lines together; each has `min_runs` of them, whatever they take, and at most
        `MAX_RUNS`.
    new_tokens
        Decoding steps that are timed; 0: none.
    concurrency
        Beside one request at a time: numbers of threads that send requests to the one model at once.
    flops
        Also count the FLOPs of a prefill.
    min_runs, warm_up
        Fewest timed runs of a line, and runs before the first of them; one more warms up every later turn, but where a
        run takes long.
    """
    share, at_once = seconds / max(1, len(lines)), [n for n in concurrency if n > 1]
    eager, graphs = ([line for line in lines if bool(line.compile) == how] for how in (False, True))
    with ExitStack() as stack:
        for together in (eager, graphs):
            if together and together is graphs:  # what was captured stays as long as the engine stays on the model
                stack.enter_context(attached(find_family(model)))
            found = _in_turns(model, together, share * len(together), min_runs, warm_up)
            for line, times in zip(together, found, strict=True):
                with line.enter() as running:
                    yield _measured(model, name, case, line, running, times, new_tokens, flops)
                    if line.compile:
                        for threads in at_once:
                            yield _at_once(model, name, case, line, running, threads, share)
    for line in eager if at_once else ():
        with line.enter() as running:
            for threads in at_once:
                yield _at_once(model, name, case, line, running, threads, share)


def _in_turns(model: nn.Module, lines: Sequence[Line], seconds: float, min_runs: int, warm_up: int) -> list[Times]:
    """Timed runs of lines that take turns: in bursts, or one by one where a run takes so long that what else the
    machine does changes from one to the next. Each round begins with another line, so that none always follows the
    same one."""
    found, min_runs, rounds = [Times() for _ in lines], min(min_runs, MAX_RUNS), 0
    begin = time.perf_counter()
    while lines and (
        len(found[0].runs) < min_runs or (len(found[0].runs) < MAX_RUNS and time.perf_counter() < begin + seconds)
    ):
        first = not found[0].runs
        slow = first or any(times.runs[-1]["ttft"] > SLOW_MS for times in found)
        count = 1 if slow else min(BURST, MAX_RUNS - len(found[0].runs))
        for i in range(len(lines)):
            turn = (rounds + i) % len(lines)
            with lines[turn].enter() as running:
                timed_runs(model, running.prefill, found[turn], count, warm_up if first else int(not slow))
        rounds += 1
        if first:
            begin = time.perf_counter()  # kernels were compiled, and graphs captured
    return found


def _measured(
    model: nn.Module,
    name: str,
    case: Case,
    line: Line,
    running: Running,
    times: Times,
    new_tokens: int,
    flops: bool,
) -> Row:
    """The row of a line whose prefills were timed; on a GPU with memory and energy, of a few prefills more."""
    device, joules, peak = find_family(model).model.device, math.nan, None
    if device.type == "cuda":
        with torch.inference_mode():
            running.prefill()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        energy = Energy(device)
        before = energy.read()
        timed_runs(model, running.prefill, Times(), BURST, warm_up=0)
        joules = (energy.read() - before) / BURST
        peak = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    row = _row(model, name, case, line, running, times, new_tokens, flops)
    return replace(row, peak_mib=peak, joules=None if math.isnan(joules) else round(joules, 3))


def _row(
    model: nn.Module,
    name: str,
    case: Case,
    line: Line,
    running: Running,
    times: Times,
    new_tokens: int,
    flops: bool,
) -> Row:
    with torch.inference_mode():
        state = running.prefill()
        held = kv_bytes(running.cache(state))
        del state
    report = running.report() if running.report is not None else None
    device = find_family(model).model.device
    tpot = decode_ms(device, running.prefill, running.step, new_tokens) if new_tokens else None
    lm_name = type(find_family(model).lm).__name__
    counted = counted_flops(running.prefill, lm_name) if flops else None
    config = find_family(model).config.text_config
    rows = line.kept + case.text
    formula = report.flops_after if report else case.batch * config.num_hidden_layers * prefill_flops(rows, config)
    ttft = times.quantile("ttft", 0.5)
    total = (ttft or math.nan) + new_tokens * (tpot or 0)
    base = _base(model, name, case, line)
    return replace(
        base,
        runs=len(times.runs),
        kept=report.tokens_out // case.batch if report else line.kept,
        ttft_ms_p50=ttft,
        ttft_ms_p90=times.quantile("ttft", 0.9),
        vision_ms=times.quantile("vision", 0.5),
        score_ms=times.quantile("score", 0.5) if line.method != "dense" else 0.0,
        pack_ms=times.quantile("pack", 0.5),
        lm_ms_p50=times.quantile("lm", 0.5),
        lm_ms_p90=times.quantile("lm", 0.9),
        tpot_ms=tpot,
        kv_bytes=held,
        lm_gflop=round(formula / 1e9, 4),
        lm_gflop_counted=round(counted[0] / 1e9, 4) if counted and counted[0] else None,
        gflop_counted=round(counted[1] / 1e9, 4) if counted else None,
        samples_per_s=round(1000 * case.batch / total, 3),
        ran_as="; ".join(f"{k}: {v}" for k, v in report.compiled.items()) if report and line.compile else "",
    )


def _base(model: nn.Module, name: str, case: Case, line: Line) -> Row:
    family = find_family(model)
    device = family.model.device
    weights = sum(p.numel() * p.element_size() for p in family.model.parameters())
    empty: dict[str, Any] = {field.name: None for field in fields(Row)}
    return Row(
        **empty
        | {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "model": name,
            "dtype": str(family.model.dtype).removeprefix("torch."),
            "attention": family.lm.config._attn_implementation,
            "compile": line.compile,
            "batch": case.batch,
            "concurrency": 1,
            "visual_tokens": line.visual_tokens,
            "text_tokens": case.text,
            "method": line.method,
            "keep": line.keep,
            "kept": line.kept,
            "runs": 0,
            "weights_mib": round(weights / 2**20, 1),
            "ran_as": "",
        }
    )


def _at_once(
    model: nn.Module, name: str, case: Case, line: Line, running: Running, threads: int, seconds: float
) -> Row:
    """Prefills from several threads at once: time of each by the wall clock, and how many samples a second."""
    device = find_family(model).model.device
    start_line = threading.Barrier(threads + 1)
    each = max(2, MIN_RUNS // threads)
    deadline = seconds

    def client() -> list[float]:
        took: list[float] = []
        with torch.inference_mode():
            running.prefill()
            start_line.wait()
            begin = time.perf_counter()
            while len(took) < each or (len(took) < MAX_RUNS and time.perf_counter() - begin < deadline):
                start = time.perf_counter()
                running.prefill()
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()
                took.append(1000 * (time.perf_counter() - start))
        return took

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(client) for _ in range(threads)]
        start_line.wait()
        begin = time.perf_counter()
        results = [future.result() for future in futures]
        wall = time.perf_counter() - begin
    times = Times([{"ttft": ms} for result in results for ms in result])
    return replace(
        _base(model, name, case, line),
        concurrency=threads,
        runs=len(times.runs),
        ttft_ms_p50=times.quantile("ttft", 0.5),
        ttft_ms_p90=times.quantile("ttft", 0.9),
        samples_per_s=round(len(times.runs) * case.batch / wall, 3),
    )


# -- what follows from the rows ---------------------------------------------------------------------------------------


def amdahl(rows: Sequence[Row]) -> str:
    """How much there is to gain: the share of the time that pruning can touch."""
    base = next((r for r in rows if r.method == "dense" and r.concurrency == 1 and r.lm_ms_p50 and r.ttft_ms_p50), None)
    if base is None or not base.lm_ms_p50 or not base.ttft_ms_p50:
        return ""
    share = base.lm_ms_p50 / base.ttft_ms_p50
    vision = (base.vision_ms or 0) / base.ttft_ms_p50
    bound = f"{1 / (1 - share):.2f}x" if share < 1 else "any factor"
    return (
        f"{base.model}, {base.batch} x ({base.visual_tokens} + {base.text_tokens}): of "
        f"{base.ttft_ms_p50:.1f} ms to the first token the vision tower takes {vision:.0%} and the "
        f"language model {share:.0%}; "
        f"no pruning before the language model can be faster than {bound} (Amdahl)"
    )


def break_even(rows: Sequence[Row]) -> list[str]:
    """For each method, how many dropped tokens pay for choosing them, at the measured price of a token."""
    lines = []
    plain = [r for r in rows if r.concurrency == 1]
    for row in plain:
        # Each beside the dense model, and the ideal, that run as it does.
        same = [
            r
            for r in plain
            if (r.batch, r.visual_tokens, r.text_tokens) == (row.batch, row.visual_tokens, row.text_tokens)
        ]
        base = next((r for r in same if r.method == "dense" and r.compile == row.compile), None)
        best = next((r for r in same if r.method == "ideal" and (r.keep, r.compile) == (row.keep, row.compile)), None)
        if (
            row.method in ("dense", "ideal", "downsampled picture")
            or base is None
            or best is None
            or row.kept >= base.kept
        ):
            continue
        if None in (row.score_ms, row.pack_ms, base.pack_ms, base.lm_ms_p50, best.lm_ms_p50):
            continue
        price = row.score_ms + row.pack_ms - base.pack_ms  # type: ignore[operator]
        per_token = (base.lm_ms_p50 - best.lm_ms_p50) / (base.kept - row.kept)  # type: ignore[operator]
        dropped = base.kept - row.kept
        label = f"{row.method} keep {row.keep}{f' ({row.compile})' if row.compile else ''}"
        if per_token <= 0:
            lines.append(f"{label}: never pays, fewer tokens take no less time here")
        elif price <= 0:
            lines.append(f"{label}: choosing costs nothing that could be measured")
        else:
            verdict = "pays" if price / per_token < dropped else "does not pay"
            lines.append(
                f"{label}: choosing costs {price:.2f} ms, as much as {math.ceil(price / per_token)} tokens a sample "
                f"take; it drops {dropped}, so it {verdict}"
            )
    return lines


def keep_for(
    model: nn.Module, case: Case, config: PruneConfig, target_ms: float, say: Callable[[str], object] = lambda _: None
) -> tuple[int, int, float]:
    """The most tokens a picture may keep so that the first token comes within `target_ms` on this machine.

    By bisection over the count; each try is the median of a few prefills.

    Parameters
    ----------
    model, case, config
        What runs, on which prompt, under which method; the budget of `config` does not count.
    target_ms
        Milliseconds.
    say
        Called with a line of progress for each try.

    Returns
    -------
    kept, total, milliseconds

    Raises
    ------
    ConfigError
        Not even a single token per picture meets the target.
    """
    inputs = make_inputs(model, case.batch, case.size, case.text)
    total = visual_tokens(model, inputs)

    def median(kept: int) -> float:
        line = pruned(model, inputs, replace(config, keep=kept), str(kept)) if kept < total else dense(model, inputs)
        times = Times()
        with line.enter() as running:
            timed_runs(model, running.prefill, times, MIN_RUNS, WARM_UP)
        found = times.quantile("ttft", 0.5)
        assert found is not None
        say(f"{kept} tokens: {found:.1f} ms")
        return found

    least = median(1)
    if least > target_ms:
        raise ConfigError(
            f"not even one visual token per picture meets {target_ms:g} ms: it takes {least:.1f} ms, which the vision "
            "tower and the text need; choose a later target, a smaller picture or a smaller batch"
        )
    whole = median(total)
    if whole <= target_ms:
        return total, total, whole
    low, high, found = 1, total, least  # low meets the target, high does not
    while high - low > max(1, total // 64):
        middle = (low + high) // 2
        took = median(middle)
        if took <= target_ms:
            low, found = middle, took
        else:
            high = middle
    return low, total, found
