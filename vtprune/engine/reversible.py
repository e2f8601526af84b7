# SPDX-License-Identifier: Apache-2.0
"""Reversible selection: per layer, some visual tokens sit out the attention, and are there again after it.

Hidden states stay as long as they are. Of the rows that enter a layer's attention module only those that take part are
gathered (text and separators always do); what it puts out goes back to their places, and rows that sat out get zeros,
so that the residual stream passes them by. The FFN sees every row. The layer caches the keys and values of those that
took part, and no others; its mask says so, and decoding goes on from there like on any cache with layers of several
lengths (`layers`). `lens.skip` silences sublayers too, but keeps all keys: nothing gets shorter there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.dispatch import resolve
from ..kernels.pack import gather_rows
from .prefill import gather

if TYPE_CHECKING:
    from .call import Call


@dataclass
class Attending:
    """Who takes part in the attention of one layer, of a packed batch ``[B, P]``.

    Parameters
    ----------
    into : Tensor
        ``[B, Q]`` int64, the slot of each row that takes part; -1 at padding.
    back : Tensor
        ``[B, P]`` int64, where each row is among these; -1 where it sits out.
    inputs
        What the layer's attention gets in place of what the text model passes.
    rotary
        Cosine and sine of all P rows.
    hidden : Tensor or None
        ``[B, P, D]``, what the attention module would have got, for probes; until the next layer begins.
    """

    into: Tensor
    back: Tensor
    inputs: dict[str, Any]
    rotary: tuple[Tensor, ...]
    hidden: Tensor | None = field(default=None, repr=False)


def hook(attention: Any, layer: int, active: Callable[[], Call | None]) -> list[Any]:
    """Hook the attention module of `layer`; `active` says what the current thread is running."""

    def here() -> Attending | None:
        call = active()
        return None if call is None else call.attending.get(layer)

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        part = here()
        if part is None:
            return None
        part.hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        rows = moved(part.hidden, part.into)
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": rows}
        return (rows, *args[1:]), kwargs

    def after(_: Any, args: tuple[Any, ...], out: Any) -> Any:
        part = here()
        if part is None:
            return None
        return (moved(out[0], part.back), *out[1:]) if isinstance(out, tuple) else moved(out, part.back)

    # Whoever else looks at what the module puts out sees it at full length.
    return [
        attention.register_forward_pre_hook(before, with_kwargs=True),
        attention.register_forward_hook(after, prepend=True),
    ]


def moved(rows: Tensor, index: Tensor) -> Tensor:
    """Rows of ``[B, P, D]`` by ``index [B, Q]``, zeros where it is -1. One kernel on a GPU, where no gradient flows."""
    index = index.to(rows.device)
    if (torch.is_grad_enabled() and rows.requires_grad) or resolve("auto", rows) != "triton":
        return gather(rows, index.clamp_min(0), 1).masked_fill((index < 0)[..., None], 0)
    return gather_rows(index, rows).hidden
