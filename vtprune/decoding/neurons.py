# SPDX-License-Identifier: Apache-2.0
"""Decoding on core neurons: the half of CoreMatching that makes the FFN of each new token smaller."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedModelError
from ..kernels import neuron_match
from ..models import find_family
from ..models.base import Family

_ATTRIBUTE = "_vtprune_neurons"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass
class Core:
    """One layer's core on one prompt: votes so far ``[1, d_ff]``, and the weights of the neurons that it picked."""

    votes: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass
class Cores:
    """The cores of all layers, on the cache of their prompt: several generations do not mix."""

    layers: dict[int, Core] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Cores:
        return Cores({i: copy.copy(core) for i, core in self.layers.items()})  # tensors are never changed in place


class _Local(threading.local):
    cores: Cores | None = None
    sparse: bool = False
    valid: Tensor | None = None


class CoreNeurons:
    """What `core_neurons` returns: a context manager, and the way to `remove` it."""

    def __init__(self, family: Family, rho: float, beta: float, layers: Sequence[int]) -> None:
        self.family, self.rho, self.beta, self.layers = family, rho, beta, tuple(layers)
        self.local = _Local()
        self.handles: list[Any] = []
        self.before: dict[int, Any] = {}

    def attach(self) -> None:
        """Put the hooks on the model."""
        lm = self.family.lm
        self.handles = [
            lm.register_forward_pre_hook(self._enter, with_kwargs=True),
            lm.register_forward_hook(self._leave_with, with_kwargs=True),
            lm.register_forward_hook(self._leave, always_call=True),
        ]
        for i in self.layers:
            mlp = lm.layers[i].mlp
            self.handles.append(mlp.down_proj.register_forward_pre_hook(functools.partial(self._vote, i)))
            # A hook cannot keep a module from computing, so the method of this one instance is replaced.
            self.before[i] = mlp.__dict__.get("forward")  # accelerate may have put one there
            mlp.forward = functools.partial(self._forward, i, mlp, mlp.forward)
        lm.__dict__[_ATTRIBUTE] = self

    def remove(self) -> None:
        """Decode on all neurons again. Does nothing the second time."""
        for handle in self.handles:
            handle.remove()
        if self.handles:
            for i, before in self.before.items():
                own = self.family.lm.layers[i].mlp.__dict__
                del own["forward"]
                own.update({} if before is None else {"forward": before})
            self.family.lm.__dict__.pop(_ATTRIBUTE, None)
        self.handles = []

    def __enter__(self) -> CoreNeurons:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()

    # -- one forward --------------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        local = self.local
        rows = kwargs.get("inputs_embeds")
        rows = kwargs.get("input_ids", args[0] if args else None) if rows is None else rows
        if rows is None or rows.shape[0] != 1 or kwargs.get("use_cache") is False or module.training:
            local.cores, local.sparse = None, False  # dense
            return
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        filled = cache is not None and bool(cache.get_seq_length())
        # A prompt that ran elsewhere had no vote, and what follows it is no stand-in: dense.
        local.cores = getattr(cache, _ATTRIBUTE, None) if filled else Cores()
        local.sparse = filled and local.cores is not None and rows.shape[1] == 1
        local.valid = mask[0].bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _vote(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        """More rows than one: the layer ran on all neurons, and what fired has its say in the core from now on."""
        local, act = self.local, args[0]
        if local.cores is None or local.sparse or act.shape[0] != 1:
            return
        rows = act[0].detach()
        if local.valid is not None and local.valid.shape[0] >= rows.shape[0]:
            rows = rows * local.valid[-rows.shape[0] :, None].to(rows)  # padding fires nothing
        votes = neuron_match.top_counts(rows, [rows.shape[0]], self.rho)
        known = local.cores.layers.get(layer)
        local.cores.layers[layer] = self._gathered(layer, votes if known is None else known.votes + votes)

    def _gathered(self, layer: int, votes: Tensor) -> Core:
        ids = neuron_match.core(votes, self.beta)[0][0]
        mlp = self.family.lm.layers[layer].mlp
        at = ids.clamp(min=0)
        with torch.no_grad():
            down = mlp.down_proj.weight[:, at] * (ids >= 0).to(mlp.down_proj.weight)  # fewer neurons than the share
            return Core(votes, mlp.gate_proj.weight[at], mlp.up_proj.weight[at], down.contiguous())

    def _forward(self, layer: int, mlp: Any, dense: Any, x: Tensor) -> Tensor:
        local = self.local
        core = local.cores.layers.get(layer) if local.sparse and local.cores is not None else None
        if core is None:
            return dense(x)
        inner = mlp.act_fn(nn.functional.linear(x, core.gate)) * nn.functional.linear(x, core.up)
        return nn.functional.linear(inner, core.down)

    def _leave_with(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        cores = self.local.cores
        if cores is None or self.local.sparse or not cores.layers:
            return
        cache = kwargs.get("past_key_values")
        if cache is None:  # the text model may have made one
            values = out if isinstance(out, tuple) else (getattr(out, "past_key_values", None),)
            cache = next((v for v in values if hasattr(v, "get_seq_length")), None)
        if cache is not None:
            setattr(cache, _ATTRIBUTE, cores)

    def _leave(self, *_: Any) -> None:
        self.local.cores, self.local.sparse, self.local.valid = None, False, None


def core_neurons(
    model: nn.Module, *, rho: float = 0.2, beta: float = 0.4, layers: Sequence[int] | None = None
) -> CoreNeurons:
    """Let `model` decode on its core neurons alone, in place, until ``remove()`` or the end of the ``with`` block.

    The prompt runs on all neurons. In each of `layers` its tokens vote for the `rho` share of their active neurons that
    are most active; the rows and columns of the `beta` share with the most votes are gathered once, and every single
    token that follows on this cache is computed with them. Several tokens at a time (a new turn, candidates of assisted
    generation) run on all neurons, vote, and the core is picked again. Batches of more than one, forwards without a
    cache, caches that were filled outside of the block, and training are dense. It works beside `vtprune.apply`: the
    core is that of the tokens that were left.

    Memory: a copy of ``beta`` of the FFN of those layers, per cache.

    Paper: "CoreMatching", ICML 2025, https://arxiv.org/abs/2505.19235, and CoreInfer, from whose code the layers and
    the shares are. Deviation: the vote takes each token's own number of active neurons, as the formula says, not the
    mean number of the prompt.

    Parameters
    ----------
    model
        A model of a supported family with a gated FFN in floating point.
    rho, beta
        In (0, 1].
    layers
        Decoder layers, from 0; None: 6 to 26 of 32, and the like of another depth. The first and the last layers lose
        most without their neurons.

    Raises
    ------
    ConfigError
        A share outside (0, 1], or a layer that does not exist.
    UnsupportedModelError
        The FFN is not gated, quantised, offloaded or wrapped (merge adapters first).

    Examples
    --------
    >>> import vtprune
    >>> from vtprune.decoding import core_neurons
    >>> model, processor = vtprune.load("pocket-llava")
    >>> with vtprune.apply(model, "corematching"), core_neurons(model):
    ...     pass  # model.generate(**inputs)
    """
    for name, value in (("rho", rho), ("beta", beta)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ConfigError(f"{name}={value!r} is no share; give a number in (0, 1]")
    family = find_family(model)
    depth = len(family.lm.layers)
    if layers is None:
        layers = range(round(6 * depth / 32), max(round(27 * depth / 32), 1))
    layers = list(layers)
    for i in layers:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < depth:
            raise ConfigError(f"layers holds {i!r}, but the model has layers 0 to {depth - 1}; choose among them")
        _check(getattr(family.lm.layers[i], "mlp", None), i)
    if _ATTRIBUTE in family.lm.__dict__:
        raise ConfigError("core_neurons is on this model already; call remove() on what it returned first")
    handle = CoreNeurons(family, rho, beta, layers)
    handle.attach()
    return handle


def _check(mlp: Any, layer: int) -> None:
    """Refuse an FFN whose rows and columns cannot be gathered."""
    parts = [getattr(mlp, name, None) for name in _PROJECTIONS]
    plain = all(type(p) is nn.Linear and p.weight.is_floating_point() and not p.weight.is_meta for p in parts)
    if not plain or any(p.bias is not None for p in parts) or not hasattr(mlp, "act_fn"):  # type: ignore[union-attr]
        raise UnsupportedModelError(
            f"the FFN of layer {layer} is not gated with plain floating-point projections without bias "
            f"({', '.join(type(p).__name__ for p in parts)}), so its core neurons cannot be gathered; merge adapters, "
            "load the model unquantised and on one device, or choose other layers"
        )
