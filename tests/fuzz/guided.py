# SPDX-License-Identifier: Apache-2.0
"""The cases of `readers` under a coverage-guided fuzzer (atheris), which looks for inputs that reach new lines.

``PYTHONPATH=.:tests python -m fuzz.guided TARGET [options of libFuzzer, such as -max_total_time=60 corpus/]``. It needs
``pip install atheris`` (no part of the dev extra: there are no wheels for every Python). The fuzzer writes what failed
to ``crash-*``; giving it that file as an argument repeats it.
"""

from __future__ import annotations

import sys
from typing import Any

import atheris
import torch

with atheris.instrument_imports(include=["vtprune"]):
    from . import readers

from hypothesis import HealthCheck, given, settings


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in readers.TARGETS:
        sys.exit(f"name a target: {', '.join(sorted(readers.TARGETS))}")
    target = sys.argv.pop(1)
    torch.set_num_threads(1)

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(readers.TARGETS[target][1]())
    def one(payload: Any) -> None:
        readers.run(readers.Case(target, payload))

    atheris.Setup([sys.argv[0], f"-timeout={readers.SECONDS}", *sys.argv[1:]], one.hypothesis.fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
