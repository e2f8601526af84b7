# SPDX-License-Identifier: Apache-2.0
"""Every public object says what it is, and what users call says what each parameter means."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vtprune

PACKAGE = Path(vtprune.__file__).parent
#: Modules whose ``__all__`` users call.
PUBLIC = ("vtprune", *(f"vtprune.{name}" for name in ("bench", "decoding", "eval", "lens", "viz", "serving", "video")))
#: What nobody imports: inside the engine, the commands and the demo, and the scripts that train the pocket models.
INSIDE = ("cli/", "demo/", "engine/", "models/pocket/")
#: Methods whose name says it.
PLAIN = {"attach", "detach", "name", "to_json"}
#: Objects that users get and do not make.
GIVEN = {"vtprune.Handle"}


def _undocumented(path: Path) -> Iterator[str]:
    """Public functions, classes and methods of a file without a docstring."""

    def visit(body: list[ast.stmt], prefix: str, inherits: bool) -> Iterator[str]:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            name = prefix + node.name
            decorators = {ast.unparse(d) for d in node.decorator_list}
            if (
                ast.get_docstring(node) is None
                and not inherits
                and node.name not in PLAIN
                and "overload" not in decorators
            ):
                yield name
            if isinstance(node, ast.ClassDef):
                # A method of a subclass is told by its base.
                yield from visit(node.body, f"{name}.", bool(node.bases))

    yield from visit(ast.parse(path.read_text(encoding="utf-8")).body, "", False)


def test_every_public_object_has_a_docstring() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if str(path.relative_to(PACKAGE)).startswith(INSIDE):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if ast.get_docstring(tree) is None and path.read_text(encoding="utf-8").strip():
            found.append(str(path.relative_to(PACKAGE)))
        found += [f"{path.relative_to(PACKAGE)}: {name}" for name in _undocumented(path)]
    assert not found, "\n".join(found)


def _called() -> Iterator[tuple[str, Any]]:
    for name in PUBLIC:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")]):
            thing = getattr(module, public)
            kind = inspect.isfunction(thing) or inspect.isclass(thing)
            if kind and thing.__module__.startswith("vtprune") and f"{name}.{public}" not in GIVEN:
                yield f"{name}.{public}", thing


CALLED = dict(_called())


@pytest.mark.parametrize("name", CALLED)
def test_parameters_are_explained(name: str) -> None:
    thing = CALLED[name]
    doc = inspect.getdoc(thing) or ""
    assert doc, f"{name} has no docstring"
    if inspect.isclass(thing) and dataclasses.is_dataclass(thing):
        parameters = [
            field.name for field in dataclasses.fields(thing) if field.init and not field.name.startswith("_")
        ]
    elif inspect.isclass(thing):
        parameters = [] if "__init__" not in vars(thing) else [*inspect.signature(thing).parameters]
    else:
        parameters = [*inspect.signature(thing).parameters]
    section = re.search(r"^(?:Parameters|Attributes)\n-+\n(.*?)(?=^\w[\w ]*\n-+\n|\Z)", doc, re.MULTILINE | re.DOTALL)
    if len(parameters) <= 1 and section is None:
        return  # the first line says it
    assert section is not None, f"{name}({', '.join(parameters)}) has no section Parameters"
    said = set(re.findall(r"\w+", " ".join(re.findall(r"^(\S[^:\n]*)", section[1], re.MULTILINE))))
    assert set(parameters) <= said, f"{name} does not explain {', '.join(sorted(set(parameters) - said))}"


def test_every_option_of_a_method_is_explained() -> None:
    from vtprune.cli.methods import _describe

    for name, cls in vtprune.methods().items():
        options = _describe(cls)["options"]
        assert all(fact["about"] for fact in options.values()), (name, options)
