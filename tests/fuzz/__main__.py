# SPDX-License-Identifier: Apache-2.0
"""Many random cases, in chunks, each with a seed of its own that repeats it; what was run goes to a log.

``make fuzz CASES=20000``, or ``PYTHONPATH=.:tests python -m fuzz --cases 20000 --log fuzz.jsonl``. Of 100 cases 70 are
of `choices` (tensors alone), 10 of `prompts` (whole tiny models), 20 of `readers` (files and text). A chunk that failed
is repeated with ``--only KIND --seed SEED --cases CHUNK``. The log grows by a line per chunk, so that a run may be done
in pieces: each begins with the seed after the last one in the log.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, settings

from vtprune.errors import VTPruneWarning

from . import choices, prompts, readers

#: Strategy, check, cases per chunk, share of all cases.
KINDS: dict[str, tuple[Any, Callable[[Any], str | None], int, float]] = {
    "choices": (choices.cases, choices.check, 500, 0.7),
    "prompts": (prompts.cases, prompts.check, 100, 0.1),
    "readers": (readers.cases, readers.check, 500, 0.2),
}
#: Of the commit that is tested, as far as there is one.
VERSION = ["git", "describe", "--always", "--dirty=+"]


def chunk(kind: str, seed: int, count: int) -> dict[str, Any]:
    """Run so many cases; the first that fails is made small, and is the last that counts."""
    strategy, check, _, _ = KINDS[kind]
    outcomes: Counter[str] = Counter()

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        print_blob=False,
    )
    @given(strategy())
    def run(case: Any) -> None:
        outcome = "failed"
        try:
            outcome = check(case) or "ran"
        finally:
            if "failed" not in outcomes:  # what hypothesis runs after the first failure makes that one small
                outcomes[outcome] += 1

    begin, failure = time.perf_counter(), None
    try:
        run()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and "told to fail" not in str(error):
            raise
        text = "".join(traceback.format_exception(error, limit=-2))
        failure = text if len(text) < 5000 else f"{text[:2500]} ... {text[-2500:]}"
    return {
        "kind": kind,
        "seed": seed,
        "cases": sum(outcomes.values()),
        **({"outcomes": dict(outcomes)} if set(outcomes) != {"ran"} else {}),
        "seconds": round(time.perf_counter() - begin, 1),
        "failure": failure,
    }


def about() -> dict[str, Any]:
    git = subprocess.run(VERSION, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return {
        "commit": git.stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hypothesis": hypothesis.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--only", choices=[*KINDS])
    parser.add_argument("--seed", type=int, help="of the first chunk; default: the one after the last in the log")
    parser.add_argument("--log", type=Path, help="JSON lines, added to")
    given_ = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", VTPruneWarning)
    transformers.logging.set_verbosity_error()
    before = (
        [json.loads(line) for line in given_.log.read_text().splitlines()]
        if given_.log and given_.log.is_file()
        else []
    )
    used = [row["seed"] for row in before if "seed" in row]
    seed = given_.seed if given_.seed is not None else max(used, default=0) + 1
    rows = [about()]
    say: Callable[[dict[str, Any]], None] = lambda row: print(json.dumps(row), flush=True)  # noqa: E731
    say(rows[0])
    if given_.log:
        with given_.log.open("a") as log:
            log.write(json.dumps(rows[0]) + "\n")
    for kind, (_, _, size, share) in KINDS.items():
        left = 0 if given_.only not in (None, kind) else round(given_.cases * (1 if given_.only else share))
        while left > 0:
            row = chunk(kind, seed, min(size, left))
            seed, left = seed + 1, left - min(size, left)
            rows.append(row)
            say(row)
            if given_.log:
                with given_.log.open("a") as log:
                    log.write(json.dumps(row) + "\n")
    failed = [row for row in rows if row.get("failure")]
    total = sum(row.get("cases", 0) for row in rows)
    print(f"{total} cases, {len(failed)} chunks failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
