# SPDX-License-Identifier: Apache-2.0
"""The decoder of the language model as one function of a whole prompt, for a graph to capture.

RMSNorm, RoPE, SwiGLU and residual sums are fused by inductor; attention is PyTorch's own causal kernel. Projections
that read the same input are one matrix product each: their weights are put side by side in memory, and the parameters
of the model become views of that.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .replay import Unfit
from .rotary import depends_on_length

#: Decoder layers of transformers that compute what `decoder_layer` does.
DECODERS = (
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen2VLDecoderLayer",
    "Qwen2_5_VLDecoderLayer",
)
#: Up to so many rows reading the weights bounds the layer, and tuning the matrix products is worth the wait.
TUNED_ROWS = 512


class Weights(NamedTuple):
    """What one decoder layer is made of; ``qkv`` and ``gate_up`` lie side by side in memory."""

    norm_in: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    norm_mlp: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True)
class Shape:
    """Numbers of a decoder that its code depends on."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def decoder_layer(
    hidden: Tensor, update: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, w: Weights, shape: Shape
) -> tuple[Tensor, Tensor]:
    """One pre-norm decoder layer over a whole prompt without past.

    Parameters
    ----------
    hidden, update : Tensor
        ``[B, C, D]``: the residual stream, and what the layer before adds to it. The sum is taken here, so that it is
        fused with the norm that reads it.
    cos, sin : Tensor
        ``[B, 1, C, d]``.
    cache : Tensor
        ``[2, B, Hkv, C, d]``, filled with rotated keys, and values.

    Returns
    -------
    hidden, update
        For the next layer.
    """
    batch, length, _ = hidden.shape
    hidden = hidden + update
    rows = nn.functional.linear(rms_norm(hidden, w.norm_in, shape.eps), w.qkv, w.qkv_bias)
    rows = rows.view(batch, length, shape.heads + 2 * shape.kv_heads, shape.head_dim).transpose(1, 2)
    query, key, value = rows.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    cache[0].copy_(key)
    cache[1].copy_(value)
    mixed = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=shape.heads != shape.kv_heads
    )
    hidden = hidden + nn.functional.linear(mixed.transpose(1, 2).flatten(2), w.out, w.out_bias)
    rows = nn.functional.linear(rms_norm(hidden, w.norm_mlp, shape.eps), w.gate_up, w.gate_up_bias)
    gate, up = rows.chunk(2, dim=-1)
    return hidden, nn.functional.linear(nn.functional.silu(gate) * up, w.down, w.down_bias)


def last_norm(hidden: Tensor, update: Tensor, weight: Tensor, shape: Shape) -> Tensor:
    return rms_norm(hidden + update, weight, shape.eps)


def fused(function: Callable[..., Any], rows: int) -> Callable[..., Any]:
    """`function` compiled by inductor for one shape.

    From a copy of its code, since PyTorch counts recompilations per code object and gives up after a few.
    """
    from torch._inductor import config as inductor

    name = f"{function.__name__}_{rows}"
    copy = types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    options: dict[str, Any] = {"triton.cudagraphs": False}
    if rows <= TUNED_ROWS:
        options["max_autotune_gemm"] = True
        if hasattr(inductor, "autotune_num_choices_displayed"):  # else trials are printed
            options["autotune_num_choices_displayed"] = 0
    return torch.compile(copy, fullgraph=True, dynamic=False, options=options)


def groups(layer: Any) -> tuple[tuple[Any, ...], ...]:
    """Linear layers of a decoder layer that read the same input."""
    attention, mlp = layer.self_attn, layer.mlp
    return (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)


def unknown(lm: Any) -> str:
    """Why the decoder is not one that `decoder_layer` computes; empty if it is."""
    if "forward" in lm.__dict__ or hasattr(lm, "_hf_hook"):
        return "something else (accelerate, for example) has replaced the language model's forward"
    if rope := depends_on_length(lm.rotary_emb):
        return f"the rotary embedding ({rope}) depends on the longest position"
    if not hasattr(getattr(lm, "norm", None), "variance_epsilon"):
        return f"the last norm of {type(lm).__name__} is not an RMSNorm"
    first = next(lm.layers[0].parameters())
    for layer in lm.layers:
        name = type(layer).__name__
        if name not in DECODERS or not type(layer).__module__.startswith("transformers."):
            return f"its decoder layers are {name}, which the graph does not know"
        if getattr(layer.self_attn, "sliding_window", None):
            return "it has sliding-window layers"
        if type(layer.mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
            return f"its activation is {type(layer.mlp.act_fn).__name__}, not SiLU"
        linears = [*(m for group in groups(layer) for m in group), layer.self_attn.o_proj, layer.mlp.down_proj]
        if any(type(m) is not nn.Linear for m in linears):
            return "linear layers are wrapped or quantised (LoRA adapters, for example: merge them)"
        if any(p.dtype != first.dtype or p.device != first.device for p in layer.parameters()):
            return "its weights are on several devices or of several dtypes"
        for group in groups(layer):
            if len({m.bias is None for m in group}) > 1:
                return "some of its projections that belong together have a bias and some have none"
    return ""


@torch.inference_mode(False)  # or these would be parameters that cannot be trained
def side_by_side(layer: Any) -> Weights:
    """Put weights of a layer that read the same input side by side; its parameters become views of that."""

    def join(parameters: list[Any]) -> Tensor | None:
        if parameters[0] is None:
            return None
        whole = torch.cat([p.data for p in parameters])
        first = 0
        for parameter in parameters:
            size = parameter.shape[0]
            parameter.data = whole[first : first + size]
            first += size
        return whole

    joined = [(join([m.weight for m in group]), join([m.bias for m in group])) for group in groups(layer)]
    (qkv, qkv_bias), (gate_up, gate_up_bias) = joined
    if qkv is not None and qkv.is_cuda:
        torch.cuda.empty_cache()  # or what was freed would stay reserved in pieces that nothing fits into
    out, down = layer.self_attn.o_proj, layer.mlp.down_proj
    assert qkv is not None and gate_up is not None
    return Weights(
        layer.input_layernorm.weight.data,
        qkv,
        qkv_bias,
        out.weight.data,
        None if out.bias is None else out.bias.data,
        layer.post_attention_layernorm.weight.data,
        gate_up,
        gate_up_bias,
        down.weight.data,
        None if down.bias is None else down.bias.data,
    )


def empty_cache_for(lm: Any) -> Any:
    """The cache that a text model makes for itself."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=lm.config)


def cache_for(lm: Any, kw: dict[str, Any]) -> Callable[[], Any] | None:
    """Hands out the empty dynamic cache that a prefill fills; None if it is to fill none."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    use, cache = kw.get("use_cache"), kw.get("past_key_values")
    if cache is None:
        if not (getattr(lm.config, "use_cache", True) if use is None else use):
            return None
        return functools.partial(empty_cache_for, lm)
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        raise Unfit(f"the cache is a {type(cache).__name__}, not a plain dynamic one")
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise Unfit("the cache has layers that are not plain dynamic ones")
    return lambda: cache


def fill_cache(cache: Any, kv: Tensor) -> None:
    """Hand keys and values ``[layers, 2, B, Hkv, P, d]`` to an empty cache, as views: no copy, no launch."""
    from transformers.cache_utils import DynamicLayer

    for i, (keys, values) in enumerate(pair.unbind() for pair in kv.unbind()):
        if i == len(cache.layers):
            cache.layers.append(DynamicLayer())
        layer = cache.layers[i]
        wanted = layer.lazy_initialization.__code__.co_argcount - 1  # (4.57: keys alone)
        layer.lazy_initialization(*(keys, values)[:wanted])
        layer.keys, layer.values = keys, values
