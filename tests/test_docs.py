# SPDX-License-Identifier: Apache-2.0
"""What the documents show works, and what they list is complete."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest
import torch

import vtprune
from vtprune import registry
from vtprune.budget import Budget
from vtprune.models import FAMILIES

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_every_method_and_family_is_in_the_tables() -> None:
    for name in ("README.md", "docs/methods.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for method in vtprune.methods():
            assert f"| `{method}` |" in text, f"{method} is missing in {name}"
    for name in ("README.md", "docs/families.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for kind in (kind for family in FAMILIES for kind in family.model_types):
            assert f"`{kind}`" in text, f"{kind} is missing in {name}"


def test_options_in_the_table_are_those_of_the_classes() -> None:
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    for name, cls in vtprune.methods().items():
        line = re.search(rf"^\| `{name}` \|.*$", text, re.MULTILINE)[0]
        shown = dict(re.findall(r"`(\w+)` \(`?([^`)]+)`?\)", line))
        fields = cls.__dataclass_fields__.values()
        assert shown == {field.name: repr(field.default).replace("'", '"') for field in fields}, name


def test_the_method_in_the_contributing_guide_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    source = re.search(r"```python\n(# SPDX.*?)```", text, re.DOTALL)[1]
    module = types.ModuleType("vtprune.pruners.outlier")
    module.__package__ = "vtprune.pruners"
    monkeypatch.setitem(__import__("sys").modules, module.__name__, module)  # dataclasses look their module up
    exec(compile(source, "outlier.py", "exec"), module.__dict__)

    features = torch.tensor([[0.0], [0.0], [9.0], [5.0], [5.0], [5.0], [1.0]])
    tokens = vtprune.VisualTokens(
        features=features,
        seqlens=(3, 4),
        source=torch.arange(7),
        coords=torch.zeros(7, 3),
        seg_image=(0, 1),
        image_sample=(0, 1),
        seg_kind=("image", "image"),
        seg_grid=((1, 3), (1, 4)),
        seg_box=((0.0, 0.0, 1.0, 1.0),) * 2,
        image_grid=((1, 1, 1),) * 2,
        image_size=(None, None),
    )
    selection = registry.build("outlier", {}).select(tokens, Budget(1))
    assert selection.index.tolist() == [2, 6]
