# SPDX-License-Identifier: Apache-2.0
"""Keys and values of a pruned prompt go into an empty cache as attention made them, without a copy.

A dynamic cache of transformers joins what it is given to what it holds, an empty tensor at first: four launches in each
layer, for which a short prompt waits. The numbers are the same to the bit; they lie in memory token by token, not head
by head, until the first step of decoding joins the next ones to them.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .decoder import empty_cache_for

if TYPE_CHECKING:
    from torch import nn

#: Where attention does not depend on how keys and values lie in memory, as matrix products on a CPU may.
DEVICES = ("cuda",)
ATTENTION = ("sdpa", "flash_attention_2", "flash_attention_3")


@functools.cache
def _plain() -> tuple[Any, Any]:
    """The cache, and the layer of it, that are known here; those of `vasparse`, say, do more when they are updated."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return DynamicCache, DynamicLayer


def take_first_rows(lm: Any, kw: dict[str, Any]) -> list[Any]:
    """Let the layers of an empty cache keep the first keys and values that they get.

    Parameters
    ----------
    lm
        The text model.
    kw
        Its arguments for a prompt on an empty cache; if it would make a cache, that is made here.

    Returns
    -------
    list
        Layers of the cache that will do so once; see `release`. Empty where it could be told from a copy, or where the
        model is compiled, which would have to be done again without this.
    """
    embeds, cache = kw["inputs_embeds"], kw.get("past_key_values")
    if cache is None and not kw.get("use_cache"):
        return []
    if embeds.device.type not in DEVICES or lm.config._attn_implementation not in ATTENTION:
        return []
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(map(_compiled, (lm, *lm.layers))):
        return []
    if cache is None:
        cache = kw["past_key_values"] = empty_cache_for(lm)
    plain_cache, plain_layer = _plain()
    if type(cache) is not plain_cache or getattr(cache, "offloading", False):
        return []
    layers = [x for x in cache.layers if type(x) is plain_layer and not x.is_initialized and "update" not in vars(x)]
    for layer in layers:
        layer.update = types.MethodType(_keep, layer)
    return layers


def release(layers: Iterable[Any]) -> None:
    """Make sure that layers do as ever from now on, also if the forward ended before it came to them."""
    for layer in layers:
        # Somebody may have put an update of his own around ours.
        if getattr(vars(layer).get("update"), "__func__", None) is _keep:
            del layer.update


def _keep(layer: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    compiling = torch.compiler.is_compiling()  # a part of the model by itself
    if not compiling:
        release([layer])
    if compiling or type(layer) is not _plain()[1] or layer.is_initialized or not (_whole(keys) and _whole(values)):
        joined: tuple[Tensor, Tensor] = type(layer).update(layer, keys, values, *args, **kwargs)
        return joined
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    return keys, values


def _whole(x: Tensor) -> bool:
    """Whether `x` is all of its memory: a part (of one product for query, key and value) would hold on to the rest."""
    return x.untyped_storage().nbytes() == x.nbytes


def _compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or type(module).__module__.startswith("torch._dynamo")
