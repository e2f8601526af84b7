# SPDX-License-Identifier: Apache-2.0
"""The rotary embedding of a pruned sequence is looked up: nine launches become two, and a short prompt waits for them.

A pruned prompt keeps positions that the host knows to lie below the length of the prompt. The module's own cosines and
sines of all of these are computed once, and every forward takes its rows: the same to the bit.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels._jit import Constants, constant

if TYPE_CHECKING:
    from .call import Call

#: Attribute of a ``forward`` that does the same as the module's own, so that a graph may stand for it.
OURS = "_vtprune_same"
#: Where a function of a number does not depend on where that stands in its tensor, as it may on a CPU.
DEVICES = ("cuda",)
#: Positions beyond which a table would take more memory than it is worth.
MOST_POSITIONS = 1 << 15


def depends_on_length(module: Any) -> str:
    """The kind of a rotary embedding whose value at one position depends on the others; empty for all others."""
    kind = str(getattr(module, "rope_type", "default"))
    return kind if "dynamic" in kind or "longrope" in kind else ""


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
        self.made_of: Any = None

    def attach(self) -> None:
        module = self.module
        takes = list(inspect.signature(type(module).forward).parameters)[1:]
        known = type(module).__module__.startswith("transformers.") and takes == ["x", "position_ids"]
        if not known or depends_on_length(module) or "forward" in module.__dict__ or not hasattr(module, "inv_freq"):
            return
        original = module.forward

        @functools.wraps(original)
        def forward(x: Tensor, position_ids: Tensor) -> Any:
            call = self.current()
            reach = None if call is None or call.reach is None or call.reach[0] is not position_ids else call.reach[1]
            here = x.device.type in DEVICES and x.device == position_ids.device
            if reach is None or reach > MOST_POSITIONS or not here:
                return original(x, position_ids)
            rows, shape = position_ids.reshape(-1), (*position_ids.shape, -1)
            return tuple(table.index_select(0, rows).view(shape) for table in self._table(original, x, reach))

        setattr(forward, OURS, True)
        module.forward = self.wrapper = forward

    def detach(self) -> None:
        if self.wrapper is not None and self.module.__dict__.get("forward") is self.wrapper:
            del self.module.__dict__["forward"]
        self.wrapper = None
        self.tables.clear()

    def _table(self, original: Callable[..., Any], x: Tensor, reach: int) -> tuple[Tensor, ...]:
        """Cosines and sines of at least the first `reach` positions, ``[n, d]`` each."""
        frequencies: Any = self.module.inv_freq
        version = 0 if frequencies.is_inference() else frequencies._version
        made_of = frequencies.data_ptr(), version, getattr(self.module, "attention_scaling", None)
        if made_of != self.made_of:
            self.tables.clear()
            self.made_of = made_of
        n = 1 << max(10, (reach - 1).bit_length())

        def make() -> tuple[Tensor, ...]:
            found = original(x, torch.arange(n, device=x.device)[None])
            return tuple(part[0].contiguous() for part in found)

        return constant(("rotary", n, x.dtype), x.device, make, self.tables)
