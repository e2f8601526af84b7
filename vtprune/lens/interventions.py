# SPDX-License-Identifier: Apache-2.0
"""Acting on what the lens shows: sublayers skipped for some visual tokens, and visual tokens injected at a later layer.

Both last as long as their ``with`` block, in its thread, and hold for forwards and for ``generate()``. To remove tokens
of a class, apply the method ``embedlens``; to remove all of them after a layer, ``visual-exit``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.attach import Engine, watching
from ..engine.call import Call
from ..errors import ConfigError, InputError, VTPruneWarning
from ..models import find_family
from ..tokens import VisualTokens
from .calibration import ALIVE, Calibration, class_names

#: Which visual tokens: "all", classes, or a function that says so, ``[T]`` bool.
Which = str | Sequence[str] | Callable[[VisualTokens], Tensor]


@contextmanager
def skip(
    model: nn.Module, sublayers: Sequence[float], tokens: Which = "all", calibration: Any = None
) -> Iterator[None]:
    """Within this block, chosen sublayers add nothing to chosen visual tokens.

    Their output is put to zero for these tokens, so the residual stream passes them by. Everything else stays: the
    tokens' keys and values are made from what they are then, cached and attended to. Nothing gets faster. Tokens are
    sorted into classes by their projected rows, whatever the layer. Works under pruning, too.

    EmbedLens (arXiv 2603.00510), mode ``skip``. Deviation: the paper's code also changes the attention mask where
    layer 0 is skipped; here it stays.

    Parameters
    ----------
    model
        A stock transformers model of a supported family.
    sublayers
        In the paper's notation: n is the attention of decoder layer n (from 0), n + 0.5 its MLP. Empty: nothing
        changes.
    tokens
        ``"all"``, a class or several (``"dead"``, ``"vit_sink"``, ``"llm_sink"``, ``"sink"``, ``"alive"``), or a
        function from `VisualTokens` to ``[T]`` bool.
    calibration
        Where classes are named: a `Calibration`, the path of one, or None for that of the checkpoint.

    Raises
    ------
    ConfigError
        A sublayer that the model does not have, an unknown class, or no calibration.

    Warns
    -----
    VTPruneWarning
        At the end of the block, if it saw no prompt with pictures.
    """
    family = find_family(model)
    plan = _sublayers(sublayers, len(family.lm.layers))
    choose = _chooser(tokens, calibration, family.checkpoint, family.vocabulary)
    key = object()
    fired = False

    def mark(call: Call) -> None:
        nonlocal fired
        fired = True
        assert call.tokens is not None
        chosen = choose(call.tokens)
        if chosen.dtype != torch.bool or chosen.shape != call.tokens.source.shape:
            raise InputError(
                f"tokens= gave {chosen.dtype} of shape {tuple(chosen.shape)}; expected bool, one per visual token, "
                f"{tuple(call.tokens.source.shape)}"
            )
        call.marks[key] = chosen

    with watching(family, mark if plan else None) as engine, ExitStack() as stack:
        hook = functools.partial(_silence, engine, key)
        for layer, name in plan:
            stack.callback(getattr(family.lm.layers[layer], name).register_forward_hook(hook).remove)
        yield
        if plan and not fired:
            _warn("skip", engine)


def _sublayers(given: Sequence[float], depth: int) -> list[tuple[int, str]]:
    plan = []
    for number in given:
        whole = isinstance(number, int | float) and not isinstance(number, bool) and float(number * 2).is_integer()
        if not whole or not 0 <= number < depth:
            raise ConfigError(
                f"sublayer {number!r} is not there: n is the attention of layer n, n + 0.5 its MLP, up to {depth - 0.5}"
            )
        plan.append((int(number), "self_attn" if float(number).is_integer() else "mlp"))
    return list(dict.fromkeys(plan))


def _chooser(which: Which, calibration: Any, checkpoint: str, table: Tensor) -> Callable[[VisualTokens], Tensor]:
    if callable(which):
        return which
    names = class_names(which, alive=True)
    if set(names) == set(class_names("all", alive=True)):
        return lambda tokens: torch.ones_like(tokens.source, dtype=torch.bool)
    own = Calibration.of(calibration, checkpoint)
    inverse = own.inverse(table)

    def choose(tokens: VisualTokens) -> Tensor:
        assert tokens.vocabulary is not None
        member = own.classify(tokens.features, tokens.vocabulary, inverse)
        columns = [i for i, name in enumerate(own.classes) if name in names]
        chosen = member[:, columns].any(1)
        return chosen | ~member.any(1) if ALIVE in names else chosen

    return choose


def _silence(engine: Engine, key: object, _module: nn.Module, _args: tuple[Any, ...], out: Any) -> Any:
    """Zero what a sublayer puts out for the rows that were marked."""
    call = engine.local.call
    if call is None or key not in call.marks or call.slots is None:
        return None
    hidden = out[0] if isinstance(out, tuple) else out
    chosen = call.marks[key]
    if call.alive is not None:  # under pruning: of those that are left
        chosen = chosen[call.alive]
    mask = torch.zeros(hidden.shape[0] * hidden.shape[1], dtype=torch.bool, device=hidden.device)
    mask = mask.index_copy(0, call.slots.to(hidden.device), chosen.to(hidden.device))
    hidden = hidden.masked_fill(mask.view(*hidden.shape[:2], 1), 0)
    return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


@contextmanager
def inject(model: nn.Module, layer: int) -> Iterator[None]:
    """Within this block, visual tokens are injected before decoder layer `layer`, and do not come with the prompt.

    Layers below run on the text alone, whose positions keep the gaps where pictures stand; at `layer` the projected
    rows are put in as they are. Layers below cache text alone, layers from there on everything, and decoding goes on
    with both. ``layer=0`` is the model as it is, to the bit.

    EmbedLens (arXiv 2603.00510), mid-layer injection. Deviation: newlines among the views of an AnyRes picture come out
    of the projector too, and enter together with the tokens.

    Parameters
    ----------
    model
        A stock transformers model of a supported family.
    layer
        From 0 to the number of layers less one.

    Raises
    ------
    ConfigError
        There is no such layer, or pruning is applied to the model: the two cannot be combined.

    Warns
    -----
    VTPruneWarning
        At the end of the block, if it saw no prompt with pictures.
    """
    family = find_family(model)
    last = len(family.lm.layers) - 1
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= last:
        raise ConfigError(f"layer={layer!r} is not there; visual tokens can enter before layers 0 to {last}")
    fired = False

    def note(_call: Call) -> None:
        nonlocal fired
        fired = True

    with watching(family, note if layer else None, entry=layer) as engine:
        if layer and engine.active_job() is not None:
            raise ConfigError(
                "visual tokens cannot be injected while they are pruned; call vtprune.remove(model) first"
            )
        yield
        if layer and not fired:
            _warn("inject", engine)


def _warn(name: str, engine: Engine) -> None:
    """A block that saw no prompt with pictures; the frames above are those of `contextlib`, then the caller's."""
    warnings.warn(f"lens.{name} changed nothing: {engine.silence}", VTPruneWarning, stacklevel=4)
