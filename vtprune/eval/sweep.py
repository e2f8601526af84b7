# SPDX-License-Identifier: Apache-2.0
"""The sweep: models x tasks x methods x budgets into a folder, by one process or by many, on one host or several.

A board folder holds ``plan.json`` (what is asked, and how many questions at a time), ``answers/<model>/<task>.<i>-<n>
.jsonl`` (a row per answer; process i of n appends to its own file, and reads all), and ``costs/<model>.jsonl`` (time
and memory). Everything is appended and nothing rewritten, so a run that was killed goes on where it was, with as many
processes as the next run happens to have. `board` makes tables of it.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, VTPruneError, VTPruneWarning
from ..models import find_family
from ..models.base import PIXEL_KEYS
from ..models.llava_next import LlavaNext
from ..models.loading import EMBEDDED
from ..registry import methods as known_methods
from . import cost, runner
from .controls import CONTROLS, prepare
from .runner import Method, Say
from .table import Row, read
from .tasks import Task, get

#: On every board, whatever else is asked for. (``prior`` is added when tables are made; it needs no model.)
ALWAYS = ("dense", "blank", "question-only", "downsample", "random", "grid", "pool")
#: What the pocket models have learnt.
EXAMS = {
    "pocket-llava": ("basic", "extended", "clutter", "pair", "easy-vqa"),
    "pocket-llava-next": ("basic", "extended", "hires"),
    "pocket-qwen2.5-vl": ("basic", "extended", "clutter", "hires", "pair", "icl", "video", "easy-vqa"),
}
#: Questions that are answered together, at most (a step of a small model takes a GPU as long for a hundred as for one),
#: and visual tokens of them on a CPU.
MOST, CPU_TOKENS = 100, 12_000


@dataclass(frozen=True)
class Request:
    """What a sweep is asked to do.

    Parameters
    ----------
    models
        As for `vtprune.load`.
    tasks
        Names; ``all`` stands for those that a pocket model was trained for.
    methods
        With their options; ``all`` stands for every method that the model can serve. Controls come by themselves.
    keeps
        Budgets.
    split, seed
        Which questions.
    count
        How many of each task; or
    per_kind
        how many of each kind of question.
    batch
        Questions that are answered together; None finds it by itself.
    dtype
        As for `vtprune.load`; fp32 everywhere by default: bf16 flips answers.
    device
        As for `vtprune.load`; ``auto`` spreads a model over all GPUs.
    costs
        Whether to measure time and memory.
    """

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    keeps: tuple[str, ...]
    split: str = "val"
    count: int = 300
    per_kind: int | None = None
    seed: int = 0
    batch: int | None = None
    dtype: str = "float32"
    device: str | None = None
    costs: bool = True

    def tasks_of(self, model: str) -> list[Task]:
        """The tasks of one model.

        Raises
        ------
        ConfigError
            An unknown task, or ``all`` for a model that nobody trained on PocketVQA.
        """
        found: list[Task] = []
        for name in self.tasks:
            if name != "all":
                found.append(get(name))
            elif model not in EXAMS:
                raise ConfigError(f"--task all means the tasks of a pocket model ({', '.join(EXAMS)}); name yours")
            else:
                found += [get(w if w == "easy-vqa" else f"pocketvqa/{w}") for w in EXAMS[model]]
        return list(dict.fromkeys(found))

    def split_of(self, task: Task) -> str:
        """The split asked for; a task's only one where it has but one; and among all tasks, for one that has no
        validation split, its test split."""
        if self.split in task.splits:
            return self.split
        if len(task.splits) == 1:
            return task.splits[0]
        return "test" if "all" in self.tasks and "test" in task.splits else self.split

    def count_of(self, task: Task) -> int:
        """Questions of one task."""
        return self.per_kind * max(1, len(task.kinds)) if self.per_kind else self.count

    def check(self) -> None:
        """Everything that can be wrong without a model.

        Raises
        ------
        ConfigError
            Something is.
        """
        if not self.models or not self.tasks or not self.keeps:
            raise ConfigError("a sweep needs at least one model, one task and one budget")
        for model in self.models:
            for task in self.tasks_of(model):
                if self.split_of(task) not in task.splits:
                    raise ConfigError(
                        f"{task.name} has no split {self.split!r}; choose one of {', '.join(task.splits)}"
                    )
        named = [name for name in self.methods if name != "all"]
        runner.combinations(list(dict.fromkeys([*ALWAYS, *named])), self.keeps)
        if self.count < 1 or (self.per_kind or 1) < 1 or (self.batch or 1) < 1:
            raise ConfigError(f"count={self.count}, per_kind={self.per_kind} and batch={self.batch} must be at least 1")


def slug(name: str) -> str:
    """A model or task as the name of a file."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-")


def answers_files(folder: Path, model: str | None = None, task: str | None = None) -> list[Path]:
    """Files with answers on a board, sorted."""
    return sorted(folder.glob(f"answers/{slug(model) if model else '*'}/{slug(task) if task else '*'}.*-*.jsonl"))


# -- the plan ----------------------------------------------------------------------------------------------------------


def load_model(name: str, request: Request) -> tuple[Any, Any]:
    """Model and processor, on the device of this process."""
    import transformers

    from ..models.loading import load

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = request.device
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return load(name, device=device, dtype=request.dtype)


def methods_of(request: Request, model: Any) -> tuple[list[str], dict[str, str]]:
    """Methods to run on a loaded model, controls first, and why others are left out."""
    family = find_family(model)
    wanted = [*ALWAYS[:4], *(["thumbnail"] if isinstance(family, LlavaNext) else []), *ALWAYS[4:]]
    for name in request.methods:
        wanted += [method for method in known_methods() if method != "worst"] if name == "all" else [name]
    left_out: dict[str, str] = {}
    found = []
    for label in dict.fromkeys(Method.parse(name).label for name in wanted):
        if label == "downsample" and isinstance(family, LlavaNext) and any(k.endswith("t") for k in request.keeps):
            left_out[label] = "LLaVA-NeXT's views have no counts of tokens to shrink to; give fractions"
            continue
        reason = refused(model, label, request.keeps[0])
        if reason:
            left_out[label] = reason
        else:
            found.append(label)
    return found, left_out


def refused(model: Any, label: str, keep: str) -> str:
    """Why a model cannot be run under a method; an empty string if it can."""
    from ..api import using

    method = Method.parse(label)
    if method.name in CONTROLS:
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VTPruneWarning)
            with using(model, method.config(keep)):
                return ""
    except VTPruneError as error:
        return _without_paths(error)


def _without_paths(error: object) -> str:
    """What an error says, without where this package lies."""
    return " ".join(str(error).split()).replace(f"{EMBEDDED}{os.sep}", "")


def _serves(model: Any, processor: Any, task: Task, example: Any, methods: Sequence[str], keep: str) -> dict[str, str]:
    """Methods that cannot answer one question of a task, and why."""
    family = find_family(model)
    inputs = prepare(family, processor, [example])
    failed = {}
    for label in methods:
        method = Method.parse(label)
        own = runner.UNPRUNED.get(method.name, keep)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", VTPruneWarning)
                with runner.presented(family, processor, [example], inputs, method, own) as (given, _):
                    runner.generate(model, processor, given, 1)
        except VTPruneError as error:
            failed[label] = _without_paths(error)
    return failed


def find_batch(model: Any, processor: Any, example: Any, workers: int) -> int:
    """Questions like this one that fit together: by memory on a GPU, by visual tokens on a CPU."""
    from ..api import encode

    family = find_family(model)
    inputs = prepare(family, processor, [example])
    visual = any(key in inputs for key in PIXEL_KEYS)
    tokens = sum(encode(model, inputs).seqlens) if visual else 0
    if model.device.type != "cuda":
        return max(1, min(24, CPU_TOKENS // max(tokens, 1)))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    with runner.encode_once(model):
        if visual:
            encode(model, inputs)
        runner.generate(model, processor, inputs, 8)
    each = max(1, torch.cuda.max_memory_allocated(model.device) - before)
    free, _ = torch.cuda.mem_get_info(model.device)
    # Another process holds its own context, and caching allocators keep more than they use.
    share = free / workers - 2**30
    return max(1, min(MOST, int(0.5 * share / each)))


def make_plan(request: Request, folder: Path, workers: int, say: Say) -> Row:
    """Decide what is run, measure what it costs, and write ``plan.json``; what an earlier run decided stays."""
    file = folder / "plan.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    for key in ("split", "seed", "count", "per_kind", "dtype"):
        if old and old["request"][key] != getattr(request, key):
            raise ConfigError(
                f"{folder} was begun with {key}={old['request'][key]!r}, this run has {getattr(request, key)!r}; "
                "choose another folder"
            )
    plan: Row = {"request": asdict(request), "models": old.get("models", {}), "left_out": old.get("left_out", {})}
    for name in request.models:
        say(f"loading {name}")
        model, processor = load_model(name, request)
        methods, left_out = methods_of(request, model)
        plan["left_out"].setdefault(name, {}).update(left_out)
        tasks = plan["models"].setdefault(name, {})
        about = runner.provenance(model, name)
        timed: dict[tuple[int, ...], str] = {}
        for task in request.tasks_of(name):
            say(f"planning {name}: {task.name}")
            draft = partial(task.drafts or task.examples, request.split_of(task), request.count_of(task), request.seed)
            ready = (example.ready() for example in draft())
            whole = (example for example in ready if not example.broken)
            try:
                first = list(itertools.islice(whole, cost.PROMPTS))
            except (ConfigError, ImportError) as error:
                if "all" not in request.tasks:
                    raise
                plan["left_out"][name][task.name] = _without_paths(error)  # its package is not installed
                continue
            if not first:
                raise ConfigError(f"{task.name} has no question that can be asked: every picture is broken")
            entry = tasks.setdefault(task.name, {"methods": [], "keeps": []})
            new = [label for label in methods if label not in entry["methods"]]
            failed = _serves(model, processor, task, first[0], new, request.keeps[0])
            for label, reason in failed.items():
                plan["left_out"][name][f"{label} on {task.name}"] = reason
            entry["methods"] += [label for label in new if label not in failed]
            entry["keeps"] += [keep for keep in request.keeps if keep not in entry["keeps"]]
            if "batch" not in entry:
                entry["batch"] = request.batch or find_batch(model, processor, first[0], workers)
            # A set may have fewer questions than were asked for; tables are of all that it has.
            entry.update(split=request.split_of(task), count=request.count_of(task), questions=sum(1 for _ in draft()))
            if request.costs:
                _measure(model, processor, task, first, entry, folder, name, about, timed, say)
        del model, processor
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    temporary = folder / f".plan-{os.getpid()}.json"
    temporary.write_text(json.dumps(plan, indent=1) + "\n")
    temporary.replace(file)
    return plan


def _measure(
    model: Any,
    processor: Any,
    task: Task,
    examples: Sequence[Any],
    entry: Row,
    folder: Path,
    name: str,
    about: Row,
    timed: dict[tuple[int, ...], str],
    say: Say,
) -> None:
    """Append the costs of a task, if some are not on the board yet: all of them, since times of two runs say nothing
    beside each other. Tasks whose prompts have as many visual tokens, and whose answers may be as long, share them."""
    from ..api import encode

    file = folder / "costs" / f"{slug(name)}.jsonl"
    file.parent.mkdir(exist_ok=True)
    headers, rows = runner.resume(file, {**about, "batch": 1, "split": entry["split"], "seed": 0}, fixed=("model",))
    there = {(row["task"], row["method"], row["keep"]): row for row in rows}
    plans = runner.combinations(entry["methods"], entry["keeps"])
    inputs = [prepare(find_family(model), processor, [example]) for example in examples]
    visual = any(key in inputs[0] for key in PIXEL_KEYS)
    shape = (task.max_new_tokens, *(sum(encode(model, one).seqlens) if visual else 0 for one in inputs))
    like = timed.setdefault(shape, task.name)
    columns = [(method.label, keep) for method, keep in plans]
    shared = [{**there[(like, *c)], "task": task.name, "measured_on": like} for c in columns if (like, *c) in there]
    if like != task.name and len(shared) == len(columns):
        fresh: Iterable[Row] = [row for row in shared if there.get((task.name, row["method"], row["keep"])) != row]
    elif all((task.name, *column) in there for column in columns):
        return
    else:
        fresh = cost.measure(model, processor, task, examples, plans, say=say)
    with file.open("a", encoding="utf-8") as out:
        if not headers:
            runner.write(out, [about])
        for row in fresh:
            runner.write(out, [row])


# -- the answers -------------------------------------------------------------------------------------------------------


def answer(
    request: Request,
    plan: Row,
    folder: Path,
    shard: tuple[int, int],
    until: float,
    say: Say,
    tick: Callable[[int], None],
) -> None:
    """Answer this process's share of the questions of every model and task."""
    batches = 0  # of the tasks before: the first batches of all tasks are not for one process
    for name in request.models:
        model, processor = load_model(name, request)
        about = runner.provenance(model, name)
        for task in request.tasks_of(name):
            entry = plan["models"][name].get(task.name)
            if entry is None:
                continue
            own = folder / "answers" / slug(name) / f"{slug(task.name)}.{shard[0]}-{shard[1]}.jsonl"
            own.parent.mkdir(parents=True, exist_ok=True)
            beside = [row for file in answers_files(folder, name, task.name) if file != own for row in read(file)[1]]
            settings: dict[str, Any] = {key: entry[key] for key in ("split", "count", "batch")}
            settings |= {"seed": request.seed, "about": about, "elsewhere": beside, "until": until}
            settings |= {"shard": ((shard[0] - batches) % shard[1], shard[1]), "say": partial(_named, say, name)}
            runner.run(model, processor, [task], entry["methods"], entry["keeps"], own, tick=tick, **settings)
            batches += -(-entry["questions"] // entry["batch"])
        del model, processor
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _named(say: Say, name: str, text: str) -> None:
    say(f"{name}, {text}")


def total(request: Request, plan: Row) -> int:
    """Answers on the whole board."""
    return sum(
        entry["questions"] * len(runner.combinations(entry["methods"], entry["keeps"]))
        for name in request.models
        for task, entry in plan["models"][name].items()
        if task in {t.name for t in request.tasks_of(name)}
    )


def processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launched() -> tuple[int, int]:
    """``(i, n)`` as `accelerate launch` or `torchrun` tell each of their processes; ``(0, 1)`` without them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def sweep(
    request: Request,
    folder: str | Path,
    *,
    workers: int = 1,
    minutes: float = float("inf"),
    say: Say = lambda _: None,
    begin: Callable[[int], None] = lambda _: None,
    tick: Callable[[int], None] = lambda _: None,
    wait: float = 3600.0,
) -> Path:
    """Run what is missing on a board. Call it again after a kill, and it goes on.

    Under `accelerate launch` every process calls this, and each takes its share of the batches. They meet only in the
    folder, so it must be one that all of them see.

    Parameters
    ----------
    request
        What to run.
    folder
        The board; made if it is not there.
    workers
        Processes beside each other on one device; small models leave a GPU idle alone.
    minutes
        Begin no batch of questions after this time; the next call goes on.
    say, begin, tick
        Are told what is going on, how many answers there will be, and how many came.
    wait
        Seconds that other processes give the first to make the plan.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ConfigError
        Something cannot be used, or the board was begun with other questions.
    VTPruneError
        A worker failed; what the others answered is on the board.
    """
    folder, until = Path(folder), time.time() + 60 * minutes
    request.check()
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; a board is a folder")
    (folder / "answers").mkdir(parents=True, exist_ok=True)
    rank, world = launched()
    if rank == 0:
        plan = make_plan(request, folder, workers, say)
    else:
        say("waiting for the plan")
        plan = _wait_for_plan(request, folder, wait)
    begin(total(request, plan) // world)
    if workers == 1:
        answer(request, plan, folder, (rank, world), until, say, tick)
        return folder
    context = multiprocessing.get_context("spawn")
    counts = context.Queue()
    shards = [(rank * workers + i, world * workers) for i in range(workers)]
    threads = max(1, processors() // workers)
    started = [
        context.Process(target=_work, args=(request, plan, folder, shard, until, counts, threads), daemon=True)
        for shard in shards
    ]
    for process in started:
        process.start()
    reasons: list[str] = []
    try:
        while any(process.is_alive() for process in started) or not counts.empty():
            try:
                told = counts.get(timeout=0.5)
            except Exception:  # queue.Empty
                continue
            if isinstance(told, int):
                tick(told)
            elif isinstance(told, str):
                say(told)
            else:
                reasons += told
    except BaseException:
        for process in started:
            process.terminate()
        raise
    failed = [shard for shard, process in zip(shards, started, strict=True) if process.exitcode != 0]
    if failed:
        raise VTPruneError(
            f"{len(failed)} of {workers} processes failed (number {', '.join(str(i) for i, _ in failed)}): "
            f"{'; '.join(dict.fromkeys(reasons)) or 'they were killed'}; what is answered is kept, run the same "
            "command again"
        )
    return folder


def _work(
    request: Request, plan: Row, folder: Path, shard: tuple[int, int], until: float, counts: Any, threads: int
) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer(request, plan, folder, shard, until, partial(_tell, counts), counts.put)
    except Exception as error:
        if not isinstance(error, VTPruneError):
            traceback.print_exc()
        counts.put([f"{type(error).__name__}: {error}" if not isinstance(error, VTPruneError) else str(error)])
        counts.close()
        counts.join_thread()
        os._exit(1)


def _end_with_parent() -> None:
    """A killed parent ends no children; they would go on beside the run that takes up what it left."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _tell(counts: Any, text: str) -> None:
    counts.put(text)


def _wait_for_plan(request: Request, folder: Path, seconds: float) -> Row:
    begun = time.monotonic()
    wanted = json.loads(json.dumps(asdict(request)))
    while time.monotonic() - begun < seconds:
        try:
            plan: Row = json.loads((folder / "plan.json").read_text())
            if plan["request"] == wanted:
                return plan
        except (OSError, ValueError):
            pass
        time.sleep(0.5)
    raise ConfigError(f"no plan for this run came into {folder} in {seconds:.0f} s; all processes must see one folder")
