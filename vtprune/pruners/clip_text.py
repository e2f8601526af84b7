# SPDX-License-Identifier: Apache-2.0
"""How much each visual token has to do with the question, as an open_clip model with its text tower sees it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, InputError
from ..tokens import PRE_PROJECTOR, VisualTokens

#: Weights that open_clip takes before any others in a folder; other safetensors come behind some pickles.
_FIRST = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")


class ClipText:
    """Cosine between a token's encoder row, in CLIP's joint space, and the question.

    The row is what feeds the projector of the vision-language model; CLIP's last norm and its projection take it to the
    joint space. That means something where the model's encoder *is* this CLIP's (LLaVA: ViT-L/14 at 336 px of OpenAI).
    Such models read the last layer but one, CLIP projects the last: an approximation. CLIP's tokenizer cuts long
    questions off (77 tokens).

    Parameters
    ----------
    clip : nn.Module
        An open_clip model with a plain vision transformer and a text tower.
    tokenizer
        CLIP's own (``open_clip.get_tokenizer``): a list of texts -> ids ``[n, context]``.
    processor
        The vision-language model's processor or tokenizer, which turns the ids of the question into text.
    negative
        Count the negative of the cosine. Patches of some checkpoints are nearest to texts that do *not* describe them;
        the authors of CDPruner (arXiv:2506.10967) use the negative with OpenAI's.

    Raises
    ------
    ConfigError
        The model has no text tower or no such projection, or there is no way to read the question.
    """

    def __init__(self, clip: nn.Module, tokenizer: Callable[..., Any], processor: Any, negative: bool = False) -> None:
        visual: Any = getattr(clip, "visual", None)
        plain = getattr(visual, "attn_pool", 0) is None and isinstance(getattr(visual, "proj", None), Tensor)
        if not plain or not hasattr(visual, "ln_post") or not hasattr(clip, "encode_text"):
            raise ConfigError(
                f"{type(clip).__name__} is no open_clip model with a text tower and a plain vision transformer (a norm "
                "and a projection, no attention pooling); create one such as open_clip's ViT-L-14-336"
            )
        decode = getattr(getattr(processor, "tokenizer", processor), "decode", None)
        if not callable(tokenizer) or not callable(decode):
            raise ConfigError(
                f"tokenizer={type(tokenizer).__name__} and processor={type(processor).__name__} must be CLIP's "
                "tokenizer (open_clip.get_tokenizer) and the processor of the vision-language model"
            )
        self.clip: Any = clip.eval()
        self.tokenizer, self.decode = tokenizer, decode
        self.negative = negative
        self._embed = lru_cache(maxsize=64)(self._text)

    @classmethod
    def load(cls, folder: str | Path, processor: Any, negative: bool = False) -> ClipText:
        """From a folder that open_clip can read (``open_clip_config.json`` and weights as safetensors).

        Raises
        ------
        ConfigError
            open_clip is not installed, there is no such folder, or open_clip would unpickle its weights.
        """
        try:
            import open_clip
        except ModuleNotFoundError:
            raise ConfigError("importance='clip-text' needs open_clip: pip install 'vtprune[encoders]'") from None
        if not (Path(folder) / "open_clip_config.json").is_file():
            raise ConfigError(f"{folder} has no open_clip_config.json; give the folder of an open_clip checkpoint")
        first = any((Path(folder) / file).is_file() for file in _FIRST)
        pickled = any(any(Path(folder).glob(pattern)) for pattern in ("*.bin", "*.pth"))
        if not first and (pickled or not any(Path(folder).glob("*.safetensors"))):
            raise ConfigError(
                f"{folder} has no {_FIRST[0]}, and pickled weights are not read; convert them once: "
                f"safetensors.torch.save_file(clip.state_dict(), {_FIRST[0]!r})"
            )
        name = f"local-dir:{folder}"
        return cls(open_clip.create_model(name), open_clip.get_tokenizer(name), processor, negative)

    @property
    def width(self) -> int:
        """Length of the encoder rows that CLIP's projection takes."""
        return int(self.clip.visual.proj.shape[0])

    def _text(self, text: str, place: torch.device) -> Tensor:
        """``[1, d]`` fp32 of unit length, on the device on which CLIP is by now."""
        return F.normalize(self.clip.encode_text(self.tokenizer([text]).to(place)).float(), dim=-1)

    def check(self, projector: Any) -> None:
        """Refuse a model whose projector takes rows of another width."""
        modules = projector.modules() if isinstance(projector, nn.Module) else ()
        first = next((m.in_features for m in modules if isinstance(m, nn.Linear)), self.width)
        if first % self.width:
            self._refuse(first)

    def _refuse(self, width: int) -> None:
        raise ConfigError(
            f"the encoder's rows have width {width}, but this CLIP projects rows of width {self.width}; give the CLIP "
            "whose vision transformer is this model's encoder"
        )

    @torch.no_grad()
    def score(self, tokens: VisualTokens) -> Tensor:
        """``[T]`` fp32, larger is more to do with the question; 0 in a sample without one. Several rows per token
        count by their mean."""
        scores = torch.zeros(len(tokens.source), device=tokens.device)
        rows = tokens.probes[PRE_PROJECTOR]
        if rows.shape[-1] != self.width:
            self._refuse(rows.shape[-1])
        visual, per_token = self.clip.visual, len(rows) // max(1, len(tokens.source))
        place, dtype = visual.proj.device, visual.proj.dtype
        start = 0
        if tokens.text_ids is None:
            raise InputError(
                "importance='clip-text' reads the question as text, and the prompt came as embeddings; pass input_ids"
            )
        ids = tokens.text_ids
        with torch.autocast(place.type, enabled=False):
            for n, words in zip(tokens.sample_lens(len(ids)), ids, strict=True):  # each alone: the same in any batch
                text = self.decode(list(words)).strip() if n and words else ""
                if text:
                    mine = rows[start * per_token : (start + n) * per_token].detach().to(place, dtype)
                    joint = F.normalize((visual.ln_post(mine) @ visual.proj).float(), dim=-1)
                    cosine = (joint * self._embed(text, place)).sum(-1).view(n, per_token).mean(1)
                    scores[start : start + n] = (-cosine if self.negative else cosine).to(tokens.device)
                start += n
        return scores

    def __deepcopy__(self, memo: Any) -> ClipText:
        return self  # a setting, not a part of the model

    def __repr__(self) -> str:
        return f"ClipText({type(self.clip).__name__}, width={self.width})"
