#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A software bill of materials of vtprune as it is installed here: CycloneDX 1.6, JSON.

    python .ci/sbom.py --out build/vtprune.cdx.json

Lists vtprune and whatever it needs (extras: ``--extra video``), with the versions of this environment, and which needs
which. It reads the metadata of installed packages and nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needs(name: str, extras: set[str]) -> list[tuple[str, set[str]]]:
    """What a distribution needs here, and with which extras."""
    found = []
    for text in metadata.requires(name) or []:
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in (*extras, "")):
            found.append((canonical(requirement.name), set(requirement.extras)))
    return found


def licence(about: Any) -> list[dict[str, Any]]:
    if about.get("License-Expression"):
        return [{"expression": about["License-Expression"]}]
    named = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or [] if c.startswith("License :: ")]
    short = (about.get("License") or "").strip()
    names = named or ([short] if 0 < len(short) < 60 and "\n" not in short else [])
    return [{"license": {"name": name}} for name in names]


def component(name: str, kind: str) -> dict[str, Any]:
    about = metadata.metadata(name)
    version = metadata.version(name)
    purl = f"pkg:pypi/{canonical(name)}@{version}"
    made: dict[str, Any] = {"type": kind, "bom-ref": purl, "name": about["Name"], "version": version, "purl": purl}
    if about.get("Summary"):
        made["description"] = about["Summary"]
    if licences := licence(about):
        made["licenses"] = licences
    return made


def bill(root: str, extras: set[str]) -> dict[str, Any]:
    """The whole document.

    Raises
    ------
    importlib.metadata.PackageNotFoundError
        `root` is not installed.
    """
    parts, links = {canonical(root): component(root, "library")}, {}
    waiting = [(canonical(root), extras)]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, wanted = waiting.pop()
        if (name, frozenset(wanted)) in seen:
            continue
        seen.add((name, frozenset(wanted)))
        links.setdefault(name, set())
        for other, more in needs(name, wanted):
            try:
                parts.setdefault(other, component(other, "library"))
            except metadata.PackageNotFoundError:
                continue  # needed elsewhere, or left out on purpose
            links[name].add(other)
            waiting.append((other, more))
    own = parts.pop(canonical(root))
    refs = {canonical(root): own["bom-ref"], **{name: part["bom-ref"] for name, part in parts.items()}}
    moment = int(os.environ.get("SOURCE_DATE_EPOCH", datetime.datetime.now(datetime.timezone.utc).timestamp()))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        # The same contents, the same number.
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, ' '.join(sorted(refs.values())))}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.datetime.fromtimestamp(moment, datetime.timezone.utc).isoformat(),
            "tools": {"components": [{"type": "application", "name": "vtprune .ci/sbom.py"}]},
            "component": own,
        },
        "components": [parts[name] for name in sorted(parts)],
        "dependencies": [
            {"ref": refs[name], "dependsOn": sorted(refs[other] for other in others)}
            for name, others in sorted(links.items())
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/vtprune.cdx.json"))
    parser.add_argument("--extra", action="append", default=[])
    given = parser.parse_args()
    try:
        made = bill("vtprune", set(given.extra))
    except metadata.PackageNotFoundError:
        print("error: vtprune is not installed in this environment; pip install -e . first", file=sys.stderr)
        return 2
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    print(f"{given.out}: {len(made['components'])} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
