# SPDX-License-Identifier: Apache-2.0
"""What a model has of what vtprune needs, and what works: a checklist for models of any family, known or not."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import api
from .engine import force_pack
from .errors import ConfigError, UnsupportedModelError, VTPruneError, VTPruneWarning
from .models import find_family, kind_of, served, unwrap
from .registry import methods

#: Where text models and projectors of known families are, and a family of one's own may look first.
TEXT_MODELS = ("language_model", "text_model")
PROJECTORS = ("multi_modal_projector", "visual.merger", "connector", "mm_projector", "projector", "aligner")
PIXELS = ("pixel_values", "pixel_values_videos")


class Check(NamedTuple):
    """One line of the list.

    Attributes
    ----------
    name
        What was looked at.
    state
        ``"ok"``; ``"no"``: vtprune cannot do that with this model; ``"not tried"``.
    note
        What was found, or what is missing.
    """

    name: str
    state: str
    note: str


def examine(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> list[Check]:
    """Go through what vtprune needs of a model.

    Parameters
    ----------
    model
        A transformers vision-language model of any family; on the meta device its parts are looked at, nothing is run.
    inputs
        What its processor made of a picture and a question, for the checks that run it.

    Returns
    -------
    list of Check
        The parts; then, with `inputs`, what happens when it runs; then, of a supported family, what pruning does.
    """
    model = unwrap(model)
    checks = _parts(model)
    supported = checks[-1].state == "ok"
    if inputs is None:
        return [*checks, Check("runs", "not tried", "there are no weights or no processor, so nothing was run")]
    checks += _rows(model, inputs)
    return [*checks, *(_pruning(model, inputs) if supported else ())]


def _parts(model: nn.Module) -> list[Check]:
    config = getattr(model, "config", None)
    checks = []

    def add(name: str, found: Any, note: str, cure: str) -> bool:
        checks.append(Check(name, "ok" if found else "no", note if found else cure))
        return bool(found)

    vision = getattr(config, "vision_config", None)
    add("model type", vision is not None, f"{kind_of(model)}", f"{kind_of(model)!r} has no vision_config: no pictures")
    inner: Any = model.model if hasattr(model, "lm_head") and hasattr(model, "model") else model
    name = next((n for n in TEXT_MODELS if hasattr(inner, n)), None)
    add(
        "text model",
        name,
        f"{name} of {type(inner).__name__}",
        f"{type(inner).__name__} has no {' or '.join(TEXT_MODELS)}",
    )
    lm = getattr(inner, name) if name else None
    add("layers", hasattr(lm, "layers"), f"{len(getattr(lm, 'layers', ()))}", "the text model has no list of layers")
    rotary = getattr(lm, "rotary_emb", None)
    once = rotary is not None and "layer_type" not in inspect.signature(rotary.forward).parameters
    add(
        "positions",
        once,
        "one rotary embedding, asked once",
        "the text model has no rotary_emb"
        if rotary is None
        else "its rotary embedding is asked once per kind of layer",
    )
    features = [m for m in ("get_image_features", "get_video_features") if hasattr(type(inner), m)]
    add("encoder", features, ", ".join(features), f"{type(inner).__name__} has no get_image_features")
    ids = {
        f"{m}_token_{end}": getattr(config, f"{m}_token_{end}", None)
        for m in ("image", "video")
        for end in ("id", "index")
    }
    ids = {k: v for k, v in ids.items() if isinstance(v, int)}
    add("placeholders", ids, ", ".join(f"{k} {v}" for k, v in ids.items()), "the config names no image_token_id")
    projector = next((p for p in PROJECTORS if _has(inner, p)), None)
    add("projector", projector, f"{projector}", f"none of {', '.join(PROJECTORS)}: say in your family where it is")
    blocks = "token_type_ids" in inspect.signature(inner.forward).parameters
    add(
        "causal mask",
        not blocks,
        "the text model makes its own from a 2-D mask",
        "tokens of a picture see each other in both directions (token_type_ids); packing would undo that",
    )
    windows = [i for i, layer in enumerate(getattr(lm, "layers", ())) if _window(layer)]
    add("inside the text model", not windows, "no sliding window", f"layers {windows} have a sliding window")
    if _deepstack(config):
        first = _deepstack(config) - 1
        checks.append(Check("DeepStack", "ok", f"inside the text model, tokens can be dropped from layer {first} on"))
    try:
        family = find_family(model)
        served_as = [served(cls)[kind_of(model) or ""] for cls in methods().values()]
        note = f"{family.label}: {len(served_as) - served_as.count('no')} of {len(served_as)} methods, as they come"
        checks.append(Check("family", "ok", note))
    except UnsupportedModelError as error:
        checks.append(Check("family", "no", f"{str(error).split('; ')[0]}; see docs/add-a-family.md"))
    return checks


def _has(module: Any, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module is not None


def _deepstack(config: Any) -> int:
    """How many decoder layers get features of the encoder added."""
    vision = getattr(config, "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


def _window(layer: Any) -> bool:
    return bool(getattr(getattr(layer, "self_attn", None), "sliding_window", None))


@torch.no_grad()
def _rows(model: Any, inputs: Mapping[str, Any]) -> list[Check]:
    """Run the model once, without vtprune, and see whether projected rows and placeholders are one to one."""
    inner = model.model if hasattr(model, "lm_head") and hasattr(model, "model") else model
    lm = next((getattr(inner, n) for n in TEXT_MODELS if hasattr(inner, n)), None)
    if lm is None or not hasattr(inner, "get_image_features"):
        return [Check("runs", "not tried", "there is no text model or no encoder to look at")]
    seen: dict[str, Any] = {}
    original = inner.get_image_features

    def features(*args: Any, **kwargs: Any) -> Any:
        seen["rows"] = original(*args, **kwargs)
        return seen["rows"]

    own = "get_image_features" in vars(inner)
    inner.get_image_features = features
    handle = lm.register_forward_pre_hook(lambda _m, _a, kwargs: seen.update(kwargs), with_kwargs=True)
    try:
        model(**inputs)
    except Exception as error:  # whatever a model raises is what there is to say about it
        return [Check("runs", "no", f"the model itself fails: {type(error).__name__}: {str(error).splitlines()[0]}")]
    finally:
        handle.remove()
        if own:
            inner.get_image_features = original
        else:
            del inner.get_image_features
    embeds, mask = seen.get("inputs_embeds"), seen.get("attention_mask")
    if embeds is None:
        return [Check("runs", "no", "the text model was not given inputs_embeds by name")]
    checks = [Check("runs", "ok", f"{embeds.shape[1]} rows reach the text model")]
    flat = _flat(seen.get("rows"))
    token = next((getattr(model.config, n, None) for n in ("image_token_id", "image_token_index")), None)
    if flat is None or token is None or inputs.get("input_ids") is None:
        checks.append(Check("one to one", "no", "the encoder was not asked through get_image_features"))
    else:
        placed = embeds[inputs["input_ids"] == token]
        same = placed.shape == flat.shape and torch.equal(placed, flat.to(placed))
        note = f"{len(flat)} rows of the projector are those at {len(placed)} placeholders"
        checks.append(Check("one to one", "ok" if same else "no", note if same else note.replace(" are ", " are not ")))
    plain = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
    checks.append(
        Check("mask", "ok" if plain else "no", "2-D or none" if plain else "the text model is given a ready mask")
    )
    return checks


def _flat(out: Any) -> Tensor | None:
    """Projected rows ``[n, D]`` from whatever ``get_image_features`` returns."""
    out = getattr(out, "pooler_output", out)
    if isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], list):  # older transformers: Qwen3-VL
        out = out[0]
    if isinstance(out, list | tuple):
        return torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in out])
    return out.reshape(-1, out.shape[-1]) if isinstance(out, Tensor) else None


def _pruning(model: Any, inputs: Mapping[str, Any]) -> list[Check]:
    """What pruning does to a supported model, each promise tried by itself."""
    checks = []

    def attempt(name: str, run: Callable[[], str]) -> None:
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("error", VTPruneWarning)
                checks.append(Check(name, "ok", run()))
        except (VTPruneError, VTPruneWarning, AssertionError) as error:
            checks.append(Check(name, "no", str(error)))
        except Exception as error:  # a bug, ours or the model's, is one more line, not the end of the list
            checks.append(Check(name, "no", f"{type(error).__name__}: {str(error).splitlines()[0]}"))

    dense = model(**inputs).logits

    def everything() -> str:
        with api.apply(model, "norm", keep=1.0):
            assert torch.equal(model(**inputs).logits, dense), "logits change although every token is kept"
        return "logits are those of the plain model, bit for bit"

    def packing() -> str:
        with api.apply(model, "norm", keep=1.0), force_pack():
            gap = float((model(**inputs).logits - dense).abs().max() / dense.abs().max())
        bound = 1e-3 if dense.dtype == torch.float32 else 0.05
        assert gap <= bound, f"packing every row changes logits by {gap:.2g} of the largest"
        return f"packed rows give the same logits (within {gap:.1g} of the largest)"

    def pruned() -> str:
        with api.apply(model, "norm", keep=0.25) as handle:
            logits = model(**inputs).logits
            report = handle.report()
        assert bool(logits.isfinite().all()) and logits.shape == dense.shape, (
            "logits are not finite or of another shape"
        )
        assert report.tokens_out < report.tokens_in, "nothing was dropped"
        segments = sum(len(image.segments) for image in report.images)
        return f"{report.tokens_out} of {report.tokens_in} tokens in {segments} segments"

    def generated() -> str:
        options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        with api.apply(model, "norm", keep=0.25):
            cached = torch.stack(model.generate(**inputs, **options).logits)
            again = torch.stack(model.generate(**inputs, **options, use_cache=False).logits)
        steps = min(len(cached), len(again))
        gap = float((cached[:steps] - again[:steps]).abs().max() / again.abs().max())
        bound = 1e-3 if dense.dtype == torch.float32 else 0.1
        assert gap <= bound, f"with a cache, logits differ by {gap:.2g} of the largest"
        return "with and without a cache alike"

    def inside() -> str:
        family = find_family(model)
        layer = max(len(family.lm.layers) // 2 - 1, _deepstack(family.config) - 1, 0)
        with api.apply(model, "fastv", keep=0.25, layer=layer) as handle:
            model(**inputs)
            return f"fastv after layer {layer} leaves {handle.report().tokens_out} tokens"

    def removed() -> str:
        assert torch.equal(model(**inputs).logits, dense), "the model is not what it was"
        return "logits are those of the plain model, bit for bit"

    attempt("keep everything", everything)
    attempt("packing", packing)
    attempt("prune", pruned)
    attempt("generate", generated)
    attempt("prune inside", inside)
    attempt("remove", removed)
    return checks


def bare(folder: str | Path) -> nn.Module:
    """The model that a ``config.json`` describes, without weights (on the meta device).

    Raises
    ------
    ConfigError
        There is no config of a vision-language model.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForImageTextToText.from_config(
                AutoConfig.from_pretrained(folder, trust_remote_code=False), trust_remote_code=False
            )
    except Exception as error:  # transformers and json each raise their own kinds
        raise ConfigError(f"cannot read a vision-language model from {folder}: {str(error).splitlines()[0]}") from error
    return model
