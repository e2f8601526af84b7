# SPDX-License-Identifier: Apache-2.0
"""Nothing that is loaded can run code: safetensors, JSON, TOML and pictures, and no way around."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vtprune
from vtprune.errors import ConfigError, VTPruneError
from vtprune.models import loading
from vtprune.pruners import scorer

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vtprune"
#: Modules whose loaders run what they read.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "code", "runpy"}
#: Calls that run text or bytes, or start a shell.
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
UNSAFE_ATTRIBUTES = {
    ("torch", "load"), ("torch", "save"), ("hub", "load"), ("jit", "load"), ("numpy", "load"), ("np", "load"),
    ("os", "system"), ("os", "popen"),
}  # fmt: skip


@functools.cache
def sources() -> list[tuple[str, list[ast.AST]]]:
    """Every file of the package, and the nodes of its syntax tree that matter here."""
    return [
        (str(path.relative_to(ROOT)), relevant(ast.parse(path.read_text(encoding="utf-8"))))
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def relevant(tree: ast.Module) -> list[ast.AST]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom | ast.Call)]


def violations(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = names if isinstance(node, ast.Import) else [node.module or ""]
            for name in modules if not getattr(node, "level", 0) else []:
                if name.partition(".")[0] in UNSAFE_MODULES:
                    yield node.lineno, f"import {name}"
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in UNSAFE_CALLS:
                yield node.lineno, f"{node.func.id}()"
            if isinstance(node.func, ast.Attribute):
                owner = node.func.value
                name = (
                    owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
                )
                if (name, node.func.attr) in UNSAFE_ATTRIBUTES:
                    yield node.lineno, f"{name}.{node.func.attr}()"
            for keyword in node.keywords:
                refused = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and not refused:
                    yield node.lineno, f"{keyword.arg}="


def test_every_checkpoint_is_loaded_without_code_of_its_own() -> None:
    """Left out, transformers asks at the terminal whether to run it. What training wrote itself is of stock classes."""
    for name, nodes in sources():
        for node in nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and "pocket" not in name:
                owner = getattr(node.func.value, "id", "")
                if owner.startswith("Auto") and node.func.attr in ("from_pretrained", "from_config"):
                    assert "trust_remote_code" in [keyword.arg for keyword in node.keywords], f"{name}:{node.lineno}"


def test_no_file_of_the_package_runs_what_it_reads() -> None:
    found = [f"{name}:{line}: {what}" for name, nodes in sources() for line, what in violations(nodes)]
    assert found == []


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from dill import loads", "torch.load(p)", "eval('1')", "f(trust_remote_code=True)",
     "np.load(p)", "subprocess.run(x, shell=True)", "torch.hub.load(a)", "os.system(a)"],
)  # fmt: skip
def test_the_check_above_can_fail(code: str) -> None:
    assert list(violations(relevant(ast.parse(code))))


def test_models_are_loaded_without_remote_code(tmp_path: Path) -> None:
    """A checkpoint that brings code of its own is refused, and its code is not run."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "unheard_of", "auto_map": {"AutoConfig": "own.Config"}, "vision_config": {}})
    )
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(ConfigError) as caught:
        vtprune.load(tmp_path)
    assert not (tmp_path / "ran").exists()
    assert "brings code of its own, which is not run here" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("beside", [False, True])
def test_a_checkpoint_of_pickled_weights_is_refused(tmp_path: Path, beside: bool) -> None:
    source = loading.EMBEDDED / "pocket-llava"
    for file in source.glob("*.json*"):
        shutil.copy(file, tmp_path)
    torch.save(load_file(source / "model.safetensors"), tmp_path / "pytorch_model.bin")
    if beside:  # safetensors that are not the model's
        shutil.copy(source / "scorer.safetensors", tmp_path)
    with pytest.raises(ConfigError) as caught:
        vtprune.load(tmp_path)
    said = str(caught.value)
    assert said.startswith(f"cannot load {tmp_path}: it has no weights as safetensors") and "convert it" in said
    assert "\n" not in said


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "scorer.safetensors"
    save_file(scorer.Scorer(8).state_dict(), path)
    return path


def test_a_pickle_in_place_of_weights_is_refused(weights: Path) -> None:
    torch.save(scorer.Scorer(8).state_dict(), weights)
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        scorer.load(str(weights))


@pytest.mark.parametrize("left", [0, 4, 60, -1])
def test_truncated_weights_are_refused(weights: Path, left: int) -> None:
    weights.write_bytes(weights.read_bytes()[:left])
    with pytest.raises(ConfigError) as caught:
        scorer.load(str(weights))
    assert "not a whole safetensors file" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_numbers_to_compute_with_are_refused(weights: Path, dtype: torch.dtype) -> None:
    save_file({name: value.to(dtype) for name, value in scorer.Scorer(8).state_dict().items()}, weights)
    with pytest.raises(ConfigError, match=r"(query|key)\.(weight|bias) is torch\."):
        scorer.load(str(weights))


def test_weights_with_nan_are_refused(weights: Path) -> None:
    state = scorer.Scorer(8).state_dict()
    state["key.weight"][1, 2] = torch.nan
    save_file(state, weights)
    with pytest.raises(ConfigError, match="NaN or infinite"):
        scorer.load(str(weights))


def test_half_precision_weights_are_read(weights: Path) -> None:
    save_file({name: value.bfloat16() for name, value in scorer.Scorer(8).state_dict().items()}, weights)
    assert scorer.load(str(weights)).query.weight.dtype == torch.float32


def test_a_truncated_embedded_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = loading.EMBEDDED / "pocket-llava"
    place = tmp_path / "pocket-llava"
    place.mkdir()
    for name in ("config.json", "golden.json"):
        (place / name).write_bytes((source / name).read_bytes())
    (place / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:1000])
    monkeypatch.setattr(loading, "EMBEDDED", tmp_path)
    with pytest.raises(ConfigError, match="truncated or changed: SHA-256"):
        vtprune.load("pocket-llava")
    with pytest.raises(VTPruneError) as caught:
        vtprune.load(place)
    assert "cannot load" in str(caught.value) and "\n" not in str(caught.value)


def test_the_bill_of_materials_names_what_is_installed(tmp_path: Path) -> None:
    out = tmp_path / "sbom.json"
    subprocess.run([sys.executable, ROOT / ".ci" / "sbom.py", "--out", out], check=True, cwd=ROOT, timeout=120)
    bill = json.loads(out.read_text())
    assert bill["bomFormat"] == "CycloneDX" and bill["specVersion"] == "1.6"
    assert bill["metadata"]["component"]["name"] == "vtprune"
    parts = {part["name"].lower(): part for part in bill["components"]}
    assert {"torch", "transformers", "safetensors", "numpy"} <= parts.keys() and "pytest" not in parts
    assert parts["torch"]["purl"].startswith(f"pkg:pypi/torch@{torch.__version__.partition('+')[0]}")
    refs = {entry["ref"]: entry["dependsOn"] for entry in bill["dependencies"]}
    own = bill["metadata"]["component"]["bom-ref"]
    assert parts["torch"]["bom-ref"] in refs[own]
    assert all(ref in refs for needs in refs.values() for ref in needs)
    assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", bill["serialNumber"])


@pytest.mark.parametrize(
    "arguments, seconds", [(["no/such/python"], "9"), ([sys.executable, "", "more"], "9"), ([sys.executable], "soon")]
)
def test_a_wrong_call_of_the_audit_leaves_the_last_report(tmp_path: Path, arguments: list[str], seconds: str) -> None:
    report = tmp_path / "audit.json"
    report.write_text("{}")
    call = ["bash", str(ROOT / ".ci" / "audit"), arguments[0], str(report), *arguments[2:]]
    done = subprocess.run(
        call, capture_output=True, text=True, check=False, env={**os.environ, "AUDIT_SECONDS": seconds}
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("audit: no report; usage: ")
    assert report.read_text() == "{}"
