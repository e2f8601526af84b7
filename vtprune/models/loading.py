# SPDX-License-Identifier: Apache-2.0
"""Load a model with its processor: an embedded one by name, a checkpoint folder, or a hub name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, UnsupportedModelError
from ..registry import nearest

if TYPE_CHECKING:
    from PIL import Image

EMBEDDED = Path(__file__).parent / "pocket"


def embedded_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(p.parent.name for p in EMBEDDED.glob("*/config.json"))


def _check_weights(folder: Path) -> None:
    """Refuse an embedded model whose weights are not those that its ``golden.json`` was written with."""
    file = folder / "model.safetensors"
    try:
        expected = json.loads((folder / "golden.json").read_text())["sha256"]
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except FileNotFoundError as error:
        raise ConfigError(f"the embedded model {folder.name} has no file {error.filename}; reinstall vtprune") from None
    if found != expected:
        raise ConfigError(
            f"{file} is truncated or changed: SHA-256 {found}, expected {expected}; reinstall vtprune, or give the "
            "folder's path to load it all the same"
        )


def load(
    name: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | str | None = None
) -> tuple[Any, Any]:
    """Load a vision-language model and its processor.

    Parameters
    ----------
    name
        An embedded model (``"pocket-llava"``), whose weights are checked against their SHA-256; a folder with a
        transformers checkpoint, which is not checked; or a hub name. Weights are read from safetensors only.
    device
        Where to put the model; default the GPU if there is one, else the CPU. ``"auto"`` spreads it over all GPUs, as
        ``device_map="auto"`` of transformers does.
    dtype
        Default fp32 on the CPU, bf16 on a GPU.

    Returns
    -------
    model, processor
        The stock transformers classes, the model in evaluation mode.

    Raises
    ------
    ConfigError
        Nothing loadable under that name; the message says why.
    UnsupportedModelError
        The checkpoint is not a vision-language model.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    spread = {"device_map": "auto"} if device == "auto" else {}
    if spread or device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    if isinstance(dtype, str):
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype):
            raise ConfigError(f"dtype={dtype!r} is unknown; use float32, bfloat16 or float16")
        dtype = named
    path = name
    if str(name) in embedded_models():
        path = EMBEDDED / str(name)
        _check_weights(path)
    local = Path(path).exists()
    if local and not (Path(path) / "config.json").is_file():
        raise ConfigError(f"{name} has no config.json, so it is no checkpoint; give a folder of save_pretrained")
    if not local and "/" not in str(name):
        raise ConfigError(
            f"there is no embedded model or folder named {str(name)!r}{nearest(str(name), embedded_models())}; "
            f"embedded: {', '.join(embedded_models())}; hub names have the form owner/name"
        )
    if not local and (str(name).startswith((".", "~", "/")) or str(name).count("/") > 1):
        raise ConfigError(f"there is no folder {name}; give a checkpoint folder, a hub name, or 'pocket-llava'")
    try:
        # Not left to transformers, which asks at the terminal whether to run a checkpoint's own code.
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if not hasattr(config, "vision_config"):
            raise UnsupportedModelError(
                f"{name} is a {config.model_type!r} model without vision; give a vision-language checkpoint"
            )
        model, info = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, **spread, output_loading_info=True, use_safetensors=True, trust_remote_code=False
        )
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except UnsupportedModelError:
        raise
    except Exception as error:
        # transformers, safetensors, the hub client and json each raise their own kinds for a bad checkpoint.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "" if local else nearest(str(name), embedded_models()) or f"; embedded: {', '.join(embedded_models())}"
        if "use_safetensors" in str(error) or "no file named model.safetensors" in str(error):
            reason = "it has no weights as safetensors, and pickled ones (*.bin) are not read"
            hint = "; convert it to safetensors: load it with transformers where you trust it, and use save_pretrained"
        if "custom code" in reason:
            reason = "it brings code of its own, which is not run here"
            hint = "; if you trust it, load it with transformers, and give the model to vtprune.apply"
        raise ConfigError(f"cannot load {name!s}: {reason}{hint}") from error
    missing = [k for k in info["missing_keys"] if "position_ids" not in k]
    if missing or info.get("mismatched_keys"):
        bad = [*missing, *(str(k) for k in info.get("mismatched_keys", []))]
        raise ConfigError(
            f"cannot load {name!s}: {len(bad)} weights are missing or of another shape (first: {bad[0]}); the folder "
            "was saved by another transformers version or is incomplete"
        )
    return (model if spread else model.to(device)).eval(), processor


def build_inputs(model: Any, processor: Any, picture: Image.Image, question: str) -> Any:
    """What the model is given for one picture and one question, on its device and in its dtype.

    The processor's chat template words the prompt; a processor without one gets the format of LLaVA-1.5.
    """
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        token = getattr(processor, "image_token", "<image>")
        inputs = processor(images=picture, text=f"USER: {token}\n{question} ASSISTANT:", return_tensors="pt")
    return inputs.to(model.device, dtype=model.dtype)
