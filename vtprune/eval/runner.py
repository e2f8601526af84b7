# SPDX-License-Identifier: Apache-2.0
"""The runner: every question once through the encoder, then through every method and budget, to rows of JSON."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import operator
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..api import encode, make_config, report, using
from ..budget import Budget, parse_keep
from ..compose import parse_keeps, parse_names
from ..config import PruneConfig
from ..engine.attach import engine_of
from ..errors import ConfigError, InputError, VTPruneError
from ..models import find_family
from ..models.base import PIXEL_KEYS, Family
from ..plain import parse_json
from ..tokens import PROJECTOR, Selection, Stage, VisualTokens
from . import metrics
from .controls import CONTROLS, Inputs, blank, downsampled, prepare, thumbnails
from .table import Row, read, summarise
from .tasks import Example, Task, get

#: What must not change while a file is being written: numbers from both sides would stand in one table.
FIXED = ("model", "weights_sha256", "dtype", "device", "torch", "transformers", "batch", "split", "seed")
#: Budget on the rows of controls that have none.
UNPRUNED = {"dense": "1", "blank": "1", "question-only": "0", "thumbnail": "1"}
#: Controls that have no use for the encoding of the pictures as they are.
OWN_PIXELS = ("blank", "question-only", "downsample", "thumbnail")


@dataclass(frozen=True)
class Method:
    """A control, or a pruning method with its options, as written: ``"idpruner importance=norm"``.

    Parameters
    ----------
    label
        As written, single spaces.
    name
        The first word; several methods that run one after the other are joined by a plus: ``"norm+idpruner"``.
    options
        The rest: ``key=value``, where the value is JSON or a bare word; also ``scope``, ``allocation``, ``positions``.
    """

    label: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read a label.

        Raises
        ------
        ConfigError
            It is empty, an option has no value, or a control has options.
        """
        name, *pairs = text.split() or [""]
        options: dict[str, Any] = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if name not in CONTROLS and key in ("keep", "method", "restore"):
                raise ConfigError(f"{pair!r} in {text!r} is not an option of a method; budgets are given apart")
            if not key or not equals:
                raise ConfigError(f"{pair!r} in {text!r} is not of the form key=value, for example importance=norm")
            try:
                options[key] = parse_json(value)
            except ValueError:
                options[key] = value
        if not name or (name in CONTROLS and options):
            raise ConfigError(
                f"{text!r} is not a control without options ({', '.join(CONTROLS)}) or a method with some"
            )
        return cls(" ".join([name, *pairs]), name, options)

    def config(self, keep: str) -> PruneConfig:
        """What `vtprune.apply` would be told."""
        return make_config(parse_names(self.name), **{"keep": parse_keeps(keep), **self.options})


Combination = tuple[Method, str]
Say = Callable[[str], None]


def combinations(methods: Sequence[str], keeps: Sequence[str]) -> list[Combination]:
    """Every method with every budget, controls without a budget once; all checked.

    Raises
    ------
    ConfigError
        A method, option or budget cannot be used.
    """
    found = []
    for method in map(Method.parse, methods):
        for keep in (UNPRUNED[method.name],) if method.name in UNPRUNED else keeps:
            if method.name not in CONTROLS:
                method.config(keep)
            elif method.name not in UNPRUNED:
                parse_keep(keep)
            found.append((method, keep))
    labels = [(method.label, keep) for method, keep in found]
    if len(set(labels)) != len(labels):
        raise ConfigError(f"a method or budget is named twice: {', '.join(methods)}; {', '.join(keeps)}")
    return found


@contextmanager
def encode_once(model: Any) -> Iterator[None]:
    """Within this block and thread, pictures are encoded once, whatever is generated from them.

    The first call of the encoder is kept and serves every later forward or ``generate()`` that is given the very same
    pixel tensor, under `vtprune.using` or dense; outputs are bit-equal to encoding again. Begin with `vtprune.encode`,
    which captures every probe; a method whose probe is missing encodes again. Nothing but the pixel tensor is compared,
    so grids, sizes and encoder arguments must stay the same with it.
    """
    with using(model, None):
        engine = engine_of(find_family(model))
        assert engine is not None
        with engine.tap.remembering():
            yield


class Remembered:
    """A pruner whose order of choice is kept: a smaller budget takes the beginning of it, and nothing is chosen again.

    For methods that order all tokens (`Pruner.ordered`): their K-selection is a prefix of the (K+1)-selection, pool by
    pool. Only for one batch of tokens, and one method with its options.

    Parameters
    ----------
    pruner
        The method.
    memory
        Pools and picks of the largest budget so far; empty at first, and shared between budgets.
    """

    def __init__(self, pruner: Any, memory: dict[str, Any]) -> None:
        self.pruner, self.memory = pruner, memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pruner, name)

    def select(self, tokens: VisualTokens, budget: Budget, stage: Stage) -> Selection:
        """As the pruner itself would."""
        pools, old = budget.pools(tokens), self.memory.get("pools")
        if old is None or old.lens != pools.lens or any(map(operator.gt, pools.counts, old.counts)):
            chosen: Selection = self.pruner.select(tokens, budget, stage)
            if chosen.order is not None and chosen.features is None:
                self.memory.update(pools=pools, chosen=chosen)
            return chosen
        starts = itertools.accumulate([0, *old.counts[:-1]])
        rows = [torch.arange(start, start + count) for start, count in zip(starts, pools.counts, strict=True)]
        chosen = self.memory["chosen"]
        assert chosen.order is not None
        order = chosen.order[torch.cat(rows).to(chosen.order.device)]
        return Selection.from_order(order, tokens, None, **chosen.info)


def _remember(family: Family, memory: dict[str, Any]) -> None:
    """Let the method that is on the model go on from what it chose before, if it can."""
    engine = engine_of(family)
    job = engine.active_job() if engine is not None else None
    if job is not None and job.stages == (PROJECTOR,) and job.pruner.ordered and not job.pruner.adaptive:
        job.pruner = Remembered(job.pruner, memory)  # type: ignore[assignment]


def generate(model: Any, processor: Any, inputs: Inputs, max_new_tokens: int) -> list[str]:
    """Greedy answers, decoded and stripped."""
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


@torch.no_grad()
def second_turn(model: Any, processor: Any, inputs: Inputs, example: Example, max_new_tokens: int) -> str:
    """The answer to the second question of a conversation: on the cache that the first one has left, picture and all.

    Parameters
    ----------
    model, processor
        The model, with whatever prunes it.
    inputs
        Of the first question, one example.
    example
        It has a question in `Example.then`.
    max_new_tokens
        Longest answer of each turn.
    """
    from .tasks import assistant, user

    out = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, return_dict_in_generate=True
    )
    said = out.sequences[0, inputs["input_ids"].shape[1] :]
    first = processor.batch_decode(said[None], skip_special_tokens=True)[0].strip()
    chat = [*example.messages]
    before = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    chat += [assistant(first), user({"type": "text", "text": example.then})]
    rest = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)[len(before) :]
    rest = rest[rest.index(first) + len(first) :]
    new = processor.tokenizer(rest, add_special_tokens=False)["input_ids"]
    last = int(said[-1])  # generated, but not in the cache yet
    tokens = torch.tensor([[last, *(new[1:] if new[:1] == [last] else new)]], device=model.device)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    cache, answer = out.past_key_values, []
    for _ in range(max_new_tokens):
        step = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        token = int(step.logits[0, -1].argmax())
        if token in ends:
            break
        answer.append(token)
        cache, tokens = step.past_key_values, torch.tensor([[token]], device=model.device)
    text: str = processor.batch_decode([answer], skip_special_tokens=True)[0]
    return text.strip()


@contextmanager
def presented(
    family: Family,
    processor: Any,
    examples: Sequence[Example],
    inputs: Inputs,
    method: Method,
    keep: str,
    memory: dict[str, Any] | None = None,
) -> Iterator[tuple[Inputs, list[int] | None]]:
    """Within this block, what the model makes of the yielded inputs is its answer under a method or a control.

    Parameters
    ----------
    family, processor, examples
        As in `controls.prepare`.
    inputs
        What `controls.prepare` made of them.
    method, keep
        One of `combinations`.
    memory
        What the method chose from these very inputs at other budgets (see `Remembered`).

    Yields
    ------
    inputs, tokens
        Visual tokens per example where a control says how many they are; else they follow from the forward.
    """
    if method.name == "dense":
        yield inputs, None
    elif method.name == "blank":
        yield prepare(family, processor, [blank(example) for example in examples]), None
    elif method.name == "question-only":
        yield prepare(family, processor, [example.without_pictures() for example in examples]), [0] * len(examples)
    elif method.name == "downsample":
        with downsampled(family, processor, examples, inputs, parse_keep(keep)) as small:
            yield small
    elif method.name == "thumbnail":
        with thumbnails(family, processor, examples, inputs) as small:
            yield small
    else:
        with using(family.model, method.config(keep)):
            if memory is not None:
                _remember(family, memory)
            yield inputs, None


def _answers(
    family: Family,
    processor: Any,
    task: Task,
    examples: Sequence[Example],
    wanted: Sequence[Combination],
    inputs: Inputs | None = None,
) -> Iterator[tuple[Combination, list[str], list[int], list[int]]]:
    """Per combination the answers to one batch, and visual tokens per example before and after pruning."""
    if len(examples) > 1 and any(example.then for example in examples):
        yield from _one_by_one(family, processor, task, examples, wanted)
        return
    inputs = prepare(family, processor, examples) if inputs is None else inputs
    visual = any(key in inputs for key in PIXEL_KEYS)
    full = [0] * len(examples)
    memories: dict[str, dict[str, Any]] = {}

    def one(method: Method, keep: str) -> tuple[Combination, list[str], list[int], list[int]]:
        memory = memories.setdefault(method.label, {})
        with presented(family, processor, examples, inputs, method, keep, memory) as (given, tokens):
            if examples[0].then:
                texts = [second_turn(family.model, processor, given, examples[0], task.max_new_tokens)]
            else:
                texts = generate(family.model, processor, given, task.max_new_tokens)
            if tokens is None and visual and method.name not in CONTROLS:
                tokens = [0] * len(examples)
                for image in report(family.model).images:
                    tokens[image.sample] += image.tokens_out
        return (method, keep), texts, full, full if tokens is None else tokens

    with encode_once(family.model):
        if visual:
            full = list(encode(family.model, inputs).sample_lens(len(examples)))
        yield from (one(*plan) for plan in wanted if plan[0].name not in OWN_PIXELS)
    yield from (one(*plan) for plan in wanted if plan[0].name in OWN_PIXELS)


def _one_by_one(
    family: Family, processor: Any, task: Task, examples: Sequence[Example], wanted: Sequence[Combination]
) -> Iterator[tuple[Combination, list[str], list[int], list[int]]]:
    """As `_answers`, of conversations: each goes on with a cache of its own."""
    found: dict[tuple[str, str], list[tuple[str, int, int]]] = {}
    for example in examples:
        for (method, keep), texts, full, kept in _answers(family, processor, task, [example], wanted):
            found.setdefault((method.label, keep), []).append((texts[0], full[0], kept[0]))
    for method, keep in wanted:
        own = found[method.label, keep]
        yield (method, keep), [text for text, _, _ in own], [n for _, n, _ in own], [n for _, _, n in own]


#: A combination, the examples that were answered under it, the answers, visual tokens before and after pruning.
Answered = tuple[Combination, list[Example], list[str], list[int], list[int]]


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what went wrong, on a GPU or a CPU."""
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _in_parts(
    family: Family,
    processor: Any,
    task: Task,
    examples: list[Example],
    wanted: Sequence[Combination],
    say: Say,
    inputs: Inputs | None = None,
) -> Iterator[Answered]:
    """As `_answers`; what does not fit into memory is answered in halves, those that were answered already are not."""
    done: set[tuple[str, str]] = set()
    try:
        for (method, keep), *found in _answers(family, processor, task, examples, wanted, inputs):
            done.add((method.label, keep))
            yield ((method, keep), examples, *found)  # type: ignore[misc]
        return
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if len(examples) == 1:
            raise ConfigError(
                f"{task.name}: one question ({examples[0].id}) does not fit into memory; use a larger device, a "
                "smaller model, or a half-precision dtype"
            ) from error
    # Out of the handler: its traceback keeps the tensors alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    left = [(method, keep) for method, keep in wanted if (method.label, keep) not in done]
    middle = (len(examples) + 1) // 2
    say(f"{task.name}: out of memory with {len(examples)} questions, going on with {middle}")
    for half in (examples[:middle], examples[middle:]):
        yield from _in_parts(family, processor, task, half, left, say)


def _prepared(
    family: Family, processor: Any, examples: list[Example]
) -> tuple[list[Example], list[Example], Inputs | None]:
    """Examples that can be asked, those that cannot (marked so), and the inputs of the first where they are at hand."""
    broken = [example for example in examples if example.broken]
    whole = [example for example in examples if not example.broken]
    try:
        return whole, broken, prepare(family, processor, whole) if whole else None
    except VTPruneError:
        raise
    except Exception as error:
        if out_of_memory(error):
            return whole, broken, None
        refused = []
        for example in whole:
            try:
                prepare(family, processor, [example])
            except Exception as own:
                reason = f"the processor refuses it ({type(own).__name__}: {own})"
                refused.append(replace(example, broken=reason))
        if len(refused) == len(whole) > 1:
            raise error  # this is no matter of one sample
        names = {example.id for example in refused}
        return [example for example in whole if example.id not in names], broken + refused, None


def run(
    model: Any,
    processor: Any,
    tasks: Sequence[str | Task],
    methods: Sequence[str],
    keeps: Sequence[str],
    out: str | Path,
    *,
    split: str = "val",
    count: int = 300,
    seed: int = 0,
    batch: int = 25,
    name: str | None = None,
    commit: str | None = None,
    say: Say = lambda _: None,
    shard: tuple[int, int] = (0, 1),
    elsewhere: Sequence[Row] = (),
    about: Row | None = None,
    until: float = float("inf"),
    tick: Callable[[int], None] = lambda _: None,
) -> list[Row]:
    """Answer every question of every task under every method and budget, and write one row of JSON for each.

    Parameters
    ----------
    model, processor
        A model of a supported family and its processor, as `vtprune.load` returns them.
    tasks
        Names of tasks (see `tasks.names`), or tasks.
    methods
        Controls (``dense``, ``blank``, ``question-only``, ``downsample``, ``thumbnail``) and methods
        with their options, such as
        ``"idpruner importance=norm"``.
    keeps
        Budgets as on the command line: ``"1/4"``, ``"0.25"``, ``"128t"``; ``"1/2+64t"`` for two methods in a row.
        They are the labels of the rows, too.
    out
        JSONL file. What it holds already is not run again, so an interrupted run goes on where it was.
    split, count, seed
        Which questions, and how many of each task. The test split is for final tables, not for choices.
    batch
        Questions that are encoded and answered together; halved where memory runs out.
    name
        Name of the model in the file; default where it was loaded from.
    commit
        Commit of the code; default asks git.
    say
        Is told of progress, one line at a time.
    shard
        ``(i, n)``: answer only the batches number i, i + n, i + 2n, ...; other processes answer the rest.
    elsewhere
        Answers in other files, which are not asked for again.
    about
        What `provenance` returns, where it is known already.
    until
        Begin no batch after this time (of `time.time`).
    tick
        Is told how many answers are there, as they come; those of earlier runs included.

    Returns
    -------
    list of dict
        All rows of the file, those of earlier runs included.

    Raises
    ------
    ConfigError
        Something cannot be used, `out` was written with another model, device or version, or is being written to.
    InputError
        Two questions of a task have the same id, or one has no answer.
    """
    out = Path(out)
    family = find_family(model)
    chosen = [get(task) if isinstance(task, str) else task for task in tasks]
    wanted = combinations(methods, keeps)
    _check_splits(chosen, split)
    if count < 1 or batch < 1:
        raise ConfigError(f"count={count} and batch={batch} must be at least 1")
    asked = [{"task": task.name, "split": split, "count": count, "seed": seed} for task in chosen]
    header = {
        **(about or provenance(model, name, commit)),
        "batch": batch,
        "split": split,
        "seed": seed,
        "tasks": asked,
        "methods": [*methods],
        "keeps": [*keeps],
    }
    check_place(out)
    with out.open("a", encoding="utf-8") as file:
        lock(file, out)
        headers, rows = resume(out, header)
        done = {(row["task"], row["method"], row["keep"], row["id"]) for row in [*rows, *elsewhere]}
        if header not in headers:
            write(file, [header])
        for task in chosen:
            asked_so_far = 0
            drafts = unique((task.drafts or task.examples)(split, count, seed), task.name)
            for number, examples in enumerate(_batches(drafts, batch)):
                asked_so_far += len(examples)
                if number % shard[1] != shard[0]:
                    continue
                missing = {
                    (method.label, keep): {e.id for e in examples if (task.name, method.label, keep, e.id) not in done}
                    for method, keep in wanted
                }
                tick(len(wanted) * len(examples) - sum(map(len, missing.values())))
                # A batch that lacks a row is run as a whole: its padding, and so its numbers, stay the same. (The last
                # batch of a run is an exception when the next run asks more questions.)
                todo = [(method, keep) for method, keep in wanted if missing[method.label, keep]]
                if not todo or time.time() > until:
                    continue
                say(f"{task.name}: {asked_so_far} of {count}")
                whole, broken, inputs = _prepared(family, processor, [example.ready() for example in examples])
                nothing = [0] * len(broken), [0] * len(broken)
                found: Iterator[Answered] = ((plan, broken, [""] * len(broken), *nothing) for plan in todo if broken)
                if whole:
                    found = itertools.chain(found, _in_parts(family, processor, task, whole, todo, say, inputs))
                for (method, keep), those, given, full, kept in found:
                    new = [
                        _row(example, method, keep, text, before, after)
                        for example, text, before, after in zip(those, given, full, kept, strict=True)
                        if example.id in missing[method.label, keep]
                    ]
                    write(file, new)
                    rows += new
                    tick(len(new))
    return rows


def unique(examples: Iterator[Example], task: str) -> Iterator[Example]:
    """The same examples.

    Raises
    ------
    InputError
        Two have one id, so that their answers could not be told apart; or one has no answer.
    """
    seen = set()
    for example in examples:
        if example.id in seen:
            raise InputError(f"{task} has two questions with the id {example.id!r}; ids must be unique")
        if not any(answer.strip() for answer in metrics.all_answers(example)):
            raise InputError(f"{task}: question {example.id!r} has an empty answer; leave it out, or give the answer")
        seen.add(example.id)
        yield example


def _check_splits(chosen: Sequence[Task], split: str) -> None:
    for task in chosen:
        if split not in task.splits:
            raise ConfigError(f"{task.name} has no split {split!r}; choose one of {', '.join(task.splits)}")


def _batches(examples: Iterator[Example], size: int) -> Iterator[list[Example]]:
    while part := list(itertools.islice(examples, size)):
        yield part


def _row(example: Example, method: Method, keep: str, given: str, before: int, after: int) -> Row:
    value = metrics.score(given, example)
    beside = {"answers": list(example.answers), "group": example.group, "error": example.broken}
    return {
        "type": "answer",
        "task": example.task,
        "method": method.label,
        "options": method.options,
        "keep": keep,
        "id": example.id,
        "kind": example.kind,
        "answer": example.answer,
        "prediction": given,
        "correct": value >= 1,
        "score": value,
        "metric": example.metric,
        "tokens_in": before,
        "tokens_out": after,
        **{key: text for key, text in beside.items() if text},
    }


def write(file: Any, rows: Sequence[Row]) -> None:
    """Append rows to an open file, one JSON object a line."""
    file.writelines(json.dumps(row) + "\n" for row in rows)
    file.flush()


def check_place(out: Path) -> None:
    """Refuse a file that cannot be made."""
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; give a file for the results")
    if not out.parent.is_dir():
        raise ConfigError(f"the folder {out.parent} does not exist; create it first")


def lock(file: Any, out: Path) -> None:
    """Be the only one who appends to an open file, until it is closed: two would answer every question twice."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"another process is writing to {out}; wait for its end, or end it") from None
    except OSError:  # a file system without locks
        return


def resume(out: Path, header: Row, fixed: Sequence[str] = FIXED) -> tuple[list[Row], list[Row]]:
    """What the file holds. A last line that was cut off is taken away."""
    if not out.exists():
        return [], []
    whole = out.read_bytes()
    if b"\n" not in whole and b'{"type": "run"'.startswith(whole[:14]):
        out.write_bytes(b"")  # killed before its first line was whole
        return [], []
    if whole and not whole.startswith(b'{"type": "run"'):
        raise ConfigError(f"{out} is not a file of results, and is left as it is; choose another file")
    headers, rows = read(out)
    end = whole.rfind(b"\n") + 1
    if end < len(whole):
        with out.open("r+b") as file:
            file.truncate(end)
    for old in headers:
        for key in fixed:
            if old.get(key) != header[key]:
                raise ConfigError(
                    f"{out} was written with {key}={old.get(key)!r}, this run has {header[key]!r}; choose another file"
                )
    return headers, rows


def provenance(model: Any, name: str | None = None, commit: str | None = None) -> Row:
    """The first line of a file: what answered, with which weights, code and machine."""
    device = torch.device(model.device)
    return {
        "type": "run",
        "model": name or model.config._name_or_path or type(model).__name__,
        "weights_sha256": weights_sha256(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "vtprune": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit or current_commit(),
    }


def weights_sha256(model: Any) -> str:
    """Hexadecimal SHA-256 of all weights as they are in memory, in the order of their names."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        if value.device.type == "meta":  # offloaded by accelerate: its bytes are not at hand
            return "offloaded"
        digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def current_commit() -> str:
    """The commit of this code, with a + when files were changed since; ``"unknown"`` outside its repository."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True)
        return done.stdout.decode().strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed copy may lie in somebody's repository
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def evaluate(
    model: str,
    tasks: Sequence[str],
    methods: Sequence[str],
    keeps: Sequence[str],
    out: str | Path,
    *,
    split: str = "val",
    count: int = 300,
    seed: int = 0,
    batch: int = 25,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    commit: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Load a model, `run`, and `summarise`: the whole of ``vtprune eval``.

    Parameters
    ----------
    model
        As for `vtprune.load`.
    tasks, methods, keeps, out, split, count, seed, batch, commit, say
        As for `run`. All that can be checked is checked before the model is loaded.
    device, dtype
        As for `vtprune.load`, but fp32 everywhere by default: bf16 flips answers.

    Returns
    -------
    list of dict
        One row per task, method and budget of the file.
    """
    from ..models.loading import load

    _check_splits([get(task) for task in tasks], split)
    combinations(methods, keeps)
    net, processor = load(model, device=device, dtype=dtype or torch.float32)
    rows = run(
        net,
        processor,
        tasks,
        methods,
        keeps,
        out,
        split=split,
        count=count,
        seed=seed,
        batch=batch,
        name=model,
        commit=commit,
        say=say,
    )
    return summarise(rows)
