# SPDX-License-Identifier: Apache-2.0
"""What is installed: the wheel and its contents, what an import costs, and what is said where an extra is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import vtprune
from vtprune.errors import VTPruneError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_the_package_once_and_works_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,), (source,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")

    names = zipfile.ZipFile(wheel).namelist()
    inside = [str(path.relative_to(ROOT)) for path in (ROOT / "vtprune").rglob("*") if path.is_file()]
    inside = [name for name in inside if "__pycache__" not in name]
    assert sorted(n for n in names if ".dist-info/" not in n) == sorted(
        inside
    )  # all of it, nothing else, nothing twice
    models = [n for n in names if n.endswith("/model.safetensors")]
    assert len(models) == len({Path(n).parent.name for n in models}) >= 3
    assert wheel.stat().st_size < 60e6

    with tarfile.open(source) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"vtprune", "tests", "docs", "benchmarks", "examples", "Makefile", "constraints.txt", "mkdocs.yml"} <= tops

    smoke = subprocess.run(
        [ROOT / ".ci/smoke", wheel, sys.executable],
        env={**os.environ, "VTPRUNE_SMOKE_BASE": "1"},
        **{"capture_output": True, "text": True, "timeout": 600},
    )
    assert smoke.returncode == 0, smoke.stdout + smoke.stderr
    assert f"vtprune {vtprune.__version__}" in smoke.stdout and "the wheel works" in smoke.stdout


def test_the_core_needs_few_packages() -> None:
    names = {re.match(r"[\w-]+", line)[0] for line in PROJECT["dependencies"]}
    torch = {"torch", "torchvision", "transformers", "accelerate", "numpy", "pillow", "safetensors", "jinja2"}
    assert names == torch | {"rich", "typer"}


def test_an_import_brings_in_nothing_that_it_does_not_need() -> None:
    code = """
import sys
import vtprune
heavy = {"torch", "transformers", "numpy", "PIL", "typer", "rich"}
print(sorted(heavy & set(sys.modules)))
for name in vtprune.__all__:
    getattr(vtprune, name)
vtprune.methods()
optional = {"gradio", "matplotlib", "pandas", "av", "decord", "datasets", "timm", "open_clip", "lmms_eval", "easy_vqa"}
print(sorted((optional | {"typer", "accelerate", "torchvision", "peft"}) & set(sys.modules)))
"""
    assert _python(code).splitlines() == ["[]", "[]"]


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = "import sys\nfrom vtprune.cli import main\nmain(['--help'])\nprint({'torch', 'PIL'} & set(sys.modules))"
    assert _python(code).splitlines()[-1] == "set()"


# What uses each extra, without it. `dev`, `docs` and `lmms` are for those who work on vtprune.


def _plots() -> None:
    from vtprune.bench import plot

    plot.check()


def _demo() -> None:
    from vtprune.demo.serve import running

    with running(types.SimpleNamespace(start=lambda: None, stop=lambda: None)):
        pass


def _video() -> None:
    from vtprune import video

    video.read("clip.mp4")


def _pocket() -> None:
    from vtprune.models.pocket import easyvqa

    easyvqa.load("test")


def _lens() -> None:
    from vtprune.lens.probe import Lens

    Lens.to_pandas(object.__new__(Lens))


def _encoders() -> None:
    from vtprune.pruners.clip_text import ClipText

    ClipText.load("somewhere", None)


def _eval() -> None:
    from vtprune.eval import lmms

    lmms.export("pocketvqa/basic", "folder")


GUARDS: dict[str, tuple[tuple[str, ...], Callable[[], None]]] = {
    "demo": (("gradio",), _demo),
    "encoders": (("open_clip",), _encoders),
    "eval": (("datasets",), _eval),
    "lens": (("pandas",), _lens),
    "plots": (("matplotlib",), _plots),
    "pocket": (("easy_vqa",), _pocket),
    "video": (("av", "decord"), _video),
}


@pytest.mark.parametrize("extra", GUARDS)
def test_without_an_extra_one_line_names_it(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    missing, use = GUARDS[extra]
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails, as if it were not installed
    with pytest.raises(VTPruneError) as caught:
        use()
    assert re.search(rf"pip install 'vtprune\[{extra}\]'", str(caught.value)) and "\n" not in str(caught.value)


def test_every_extra_has_a_guard() -> None:
    extras = set(PROJECT["optional-dependencies"]) - {"dev", "docs", "lmms"}
    assert extras == {*GUARDS}
