# SPDX-License-Identifier: Apache-2.0
"""What `import vtprune` costs, beyond torch and transformers: processor time in fresh processes, the best of several.

    python -m benchmarks.import_time          # about a minute

``import vtprune`` alone imports neither. *every public name* resolves all of ``vtprune.__all__`` in a process that has
torch and a model class of transformers, as every user of a model has; *every method* is `vtprune.methods()` after that.
``--modules`` lists the slowest modules of ours, by ``-X importtime``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys

#: What a process that prunes has imported anyway.
BASE = "import torch; from transformers import LlavaForConditionalGeneration, AutoProcessor"
NAMES = "import vtprune; [getattr(vtprune, name) for name in vtprune.__all__]"
STEPS = {
    "import vtprune": ("", "import vtprune"),
    "every public name": (BASE, NAMES),
    "every method": (f"{BASE}; {NAMES}", "vtprune.methods()"),
    "vtprune --help": ("", "from vtprune.cli import main; main(['--help'])"),
}


def seconds(before: str, code: str) -> float:
    """Processor time of `code` in a new process that has run `before`."""
    program = f"import json, sys, time\n{before}\nstart = time.process_time()\n{code}\n"
    program += "print(json.dumps(time.process_time() - start), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(json.loads(done.stderr.splitlines()[-1]))


def slowest(count: int) -> list[tuple[int, str]]:
    """Our slowest modules and their own microseconds, by ``-X importtime``."""
    program = f"{BASE}; {NAMES}; vtprune.methods()"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", program], capture_output=True, text=True)
    found = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(vtprune\S*)", done.stderr)
    return sorted(((int(us), name) for us, name in found), reverse=True)[:count]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--modules", type=int, default=0, metavar="N", help="list the N slowest modules as well")
    given = parser.parse_args(arguments)
    for name, (before, code) in STEPS.items():
        print(f"{name:20} {min(seconds(before, code) for _ in range(given.runs)):.3f} s", flush=True)
    for us, name in slowest(given.modules) if given.modules else ():
        print(f"{us / 1000:8.1f} ms  {name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
