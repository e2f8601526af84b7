# SPDX-License-Identifier: Apache-2.0
"""Parameters that a docstring explains together (``scope, allocation``) have a default each, not that of the first."""

from __future__ import annotations

from typing import Any

import griffe


class Defaults(griffe.Extension):
    """Gives each documented parameter the default of its own in the signature."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called once everything is loaded."""
        _mend(pkg)


def _mend(thing: Any) -> None:
    for member in thing.members.values():
        if member.is_alias:
            continue
        if member.is_function and member.docstring is not None:
            own = {parameter.name: parameter for parameter in member.parameters}
            member.docstring.parser = "numpy"
            for section in member.docstring.parsed:
                for said in section.value if section.kind is griffe.DocstringSectionKind.parameters else ():
                    if said.name in own:
                        said.value = own[said.name].default
                        said.annotation = own[said.name].annotation or said.annotation
        if member.is_module or member.is_class:
            _mend(member)
