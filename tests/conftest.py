# SPDX-License-Identifier: Apache-2.0
"""What all tests share: no network, fixed seeds and threads, GPU tests deselected without a GPU, no silent skips."""

from __future__ import annotations

import os
import random
import re
import tempfile
from typing import Any

# Before transformers is imported: a test that reaches for the network must fail at once, not depend on it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import numpy as np
import pytest
import torch
from PIL import ImageFile

# Before torch compiles: workers that share a GPU tune matrix products at the same time, to different kernels; one that
# compiles the same graph again must not find what another left.
if torch.cuda.is_available() and "PYTEST_XDIST_WORKER" in os.environ:
    worker = f"vtprune-inductor-{os.getpid()}-{os.environ['PYTEST_XDIST_WORKER']}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), worker))

# Before any kernel is defined: without a GPU, Triton kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

#: The only reasons for which a test may be skipped in CI (regular expressions, matched against the whole reason).
ALLOWED_SKIPS = (
    r"could not import 'easy_vqa'.*",
    r"could not import 'flash_attn'.*",
    r"could not import 'triton'.*",
)

# Two cores: one thread per xdist worker, so that workers do not fight; all of two when running alone.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

# The same examples on every run, and no deadline: a busy machine is slow, not wrong.
hypothesis.settings.register_profile("vtprune", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("vtprune")

_skips = pytest.StashKey[list[tuple[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips",
        action="store_true",
        help="fail when a test was skipped for a reason that tests/conftest.py does not allow",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_skips] = []
    config.pluginmanager.register(_SkipLog(config), "vtprune-skip-log")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a CUDA device, tests marked ``gpu`` are no part of the suite."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


class _SkipLog:
    """Collects skipped tests; with xdist the reports of all workers come to the main process."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def _log(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        # An expected failure is reported as skipped as well, but it did run.
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.config.stash[_skips].append((report.nodeid, reason.removeprefix("Skipped: ")))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._log(report)
        crash = getattr(report.longrepr, "reprcrash", None)
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and crash is not None and terminal is not None and not hasattr(self.config, "workerinput"):
            # At once: a run that is cut off (a lent GPU) still says why.
            first = crash.message.strip().partition("\n")[0]
            terminal.write_line(f"\n{report.nodeid}: {crash.path}:{crash.lineno}: {first}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._log(report)


def _refused(config: pytest.Config) -> list[tuple[str, str]]:
    if not config.getoption("--strict-skips"):
        return []
    seen = dict.fromkeys(config.stash[_skips])  # with xdist every worker collects, and reports, the same module
    return [skip for skip in seen if not any(re.fullmatch(allowed, skip[1], re.DOTALL) for allowed in ALLOWED_SKIPS)]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    is_worker = hasattr(session.config, "workerinput")
    if not is_worker and _refused(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    refused = _refused(config)
    if refused:
        terminalreporter.section("skips that are not allowed", red=True)
        for nodeid, reason in refused:
            terminalreporter.line(f"{nodeid}: {reason}")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same state of every global generator."""
    random.seed(0)
    np.random.seed(0)  # some libraries still draw from the global generator
    torch.manual_seed(0)
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval turns it on for the whole process


@pytest.fixture
def invented() -> Any:
    """Anchors at random for the tiny models: about half of their tokens are in some class."""
    import tiny

    from vtprune.lens import Calibration

    anchors = {"vit_sink": (7, 8), "llm_sink": (30,), "dead": tuple(range(40, 60))}
    return Calibration("tiny", tiny.VOCABULARY, 32, anchors, excluded=(tiny.PAD, tiny.IMAGE, tiny.VIDEO))
