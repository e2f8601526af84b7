# SPDX-License-Identifier: Apache-2.0
"""The rotary embedding of a pruned sequence is looked up: nine launches become two, and a short prompt waits for them.

A pruned prompt keeps positions that the host knows to lie below the length of the prompt. The module's own cosines and
sines of all of these are computed once, and every forward takes its rows: the same to the bit.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels._jit import Constants, constant

if TYPE_CHECKING:
    from .call import Call

#: Attribute of a function that does the same as the ``forward`` of a module: itself, so that no copy of it counts.
_OURS = "_vtprune_same"
#: Where a function of a number does not depend on where that stands in its tensor, as it may on a CPU.
DEVICES = ("cuda",)
#: Positions beyond which a table would take more memory than it is worth.
MOST_POSITIONS = 1 << 15


def depends_on_length(module: Any) -> str:
    """The kind of a rotary embedding whose value at one position depends on the others; empty for all others."""
    kind = str(getattr(module, "rope_type", "default"))
    return kind if "dynamic" in kind or "longrope" in kind else ""


def ours(forward: Any) -> bool:
    """Whether a module's own ``forward`` is one of these, so that a graph may stand for it."""
    function = getattr(forward, "__func__", None)
    return function is not None and getattr(function, _OURS, None) is function


class RotaryTable:
    """Wraps ``forward`` of one rotary embedding of transformers while pruning is on; leaves all others alone.

    Parameters
    ----------
    module
        The rotary embedding of the text model.
    current
        The forward that is running in this thread.
    """

    def __init__(self, module: nn.Module, current: Callable[[], Call | None]) -> None:
        self.module, self.current = module, current
        self.wrapper: Any = None
        self.tables: Constants = {}
        self.made_of: tuple[Any, ...] = ()

    def attach(self) -> None:
        module = self.module
        takes = list(inspect.signature(type(module).forward).parameters)[1:]
        known = type(module).__module__.startswith("transformers.") and takes == ["x", "position_ids"]
        free = "forward" not in module.__dict__ or ours(module.__dict__["forward"])
        if not known or not free or not hasattr(module, "inv_freq"):
            return

        # Bound to its module as the class's own is, so that a copy of the module has one of its own.
        @functools.wraps(type(module).forward)
        def forward(module: Any, x: Tensor, position_ids: Tensor) -> Any:
            if torch.compiler.is_compiling():  # a graph would be bound to the call that it was made of
                return type(module).forward(module, x, position_ids)
            call = self.current() if module is self.module and self.wrapper is not None else None
            reach = None if call is None or call.reach is None or call.reach[0] is not position_ids else call.reach[1]
            if reach is None or not self._can(x, position_ids, reach):
                return type(module).forward(module, x, position_ids)
            rows, shape = position_ids.reshape(-1), (*position_ids.shape, -1)
            return tuple(table.index_select(0, rows).view(shape) for table in self._table(x, reach))

        setattr(forward, _OURS, forward)
        self.wrapper = module.__dict__["forward"] = types.MethodType(forward, module)

    def detach(self) -> None:
        if self.wrapper is not None and self.module.__dict__.get("forward") is self.wrapper:
            del self.module.__dict__["forward"]
        self.wrapper, self.made_of = None, ()
        self.tables.clear()

    def _can(self, x: Tensor, positions: Tensor, reach: int) -> bool:
        module: Any = self.module
        here = x.device.type in DEVICES and x.device == positions.device and reach <= MOST_POSITIONS
        if not here or depends_on_length(module) or module.inv_freq.is_inference():  # whose changes are not counted
            return False
        try:  # older transformers multiply matrices, whose rounding may then depend on their shape
            return torch.get_float32_matmul_precision() == "highest"
        except RuntimeError:  # it was set in two ways
            return False

    def _table(self, x: Tensor, reach: int) -> tuple[Tensor, ...]:
        """Cosines and sines of at least the first `reach` positions, ``[n, d]`` each; of the frequencies as they were
        when it was made, if they are changed through ``.data`` since."""
        module: Any = self.module
        frequencies = module.inv_freq
        made_of = frequencies, frequencies.data_ptr(), frequencies._version, getattr(module, "attention_scaling", None)
        if not self.made_of or made_of[0] is not self.made_of[0] or made_of[1:] != self.made_of[1:]:
            self.tables.clear()
            self.made_of = made_of
        n = 1 << max(10, (reach - 1).bit_length())

        def make() -> tuple[Tensor, ...]:
            found = type(module).forward(module, x, torch.arange(n, device=x.device)[None])
            return tuple(part[0].contiguous() for part in found)

        return constant(("rotary", n, x.dtype), x.device, make, self.tables)
