# SPDX-License-Identifier: Apache-2.0
"""What the engine must know of a model family: one subclass of `Family` per family, in a file of its own."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import compat
from ..kernels._jit import Constants, remember
from ..kernels.attention_rows import attention_rows
from ..tokens import CLS_ROW, PRE_PROJECTOR, Probe

#: Arguments of the inner model that carry pixels.
PIXEL_KEYS = ("pixel_values", "pixel_values_videos")


#: Layouts that a family remembers; the oldest go first.
_MOST_LAYOUTS = 64

#: How a hook hands over what it captured: the probe, and a function that makes its value.
Put = Callable[[Probe, Callable[[], Tensor]], None]


@dataclass(frozen=True, eq=False)
class ImageLayout:
    """How the placeholders of one image (or video) map to visual tokens; host arrays.

    Parameters
    ----------
    length
        Number of placeholders, separators included.
    rank : np.ndarray
        ``[n]`` int64, placeholder of each visual token, counted within the image; tokens in segment and raster order.
    raw : np.ndarray
        ``[n]`` int64, row of each visual token in the encoder's output for this image (views one after the other).
    raw_length
        Rows that the encoder puts out for this image.
    coords : np.ndarray
        ``[n, 3]`` float32 time, row, column inside the segment.
    seg_lens, seg_kind, seg_grid, seg_box
        Per segment, as in `VisualTokens`.
    grid, size
        As ``image_grid`` and ``image_size`` in `VisualTokens`.
    made
        What was made of it on a device.
    """

    length: int
    rank: np.ndarray
    raw: np.ndarray
    raw_length: int
    coords: np.ndarray
    seg_lens: tuple[int, ...]
    seg_kind: tuple[str, ...]
    seg_grid: tuple[tuple[int, int], ...]
    seg_box: tuple[tuple[float, float, float, float], ...]
    grid: tuple[int, int, int]
    size: tuple[int, int] | None = None
    made: Constants = field(default_factory=dict, repr=False)


class PlainTower(NamedTuple):
    """A vision transformer without windows or merging.

    Parameters
    ----------
    module
        Its output has the hidden states that the projector reads.
    blocks
        In the order in which they run.
    has_cls
        Whether a CLS token stands before the patches.
    """

    module: Any
    blocks: Sequence[Any]
    has_cls: bool


def raster(frames: int, rows: int, cols: int) -> np.ndarray:
    """Coordinates ``[frames * rows * cols, 3]`` float32 of a grid in raster order."""
    return np.stack(np.meshgrid(range(frames), range(rows), range(cols), indexing="ij"), -1).reshape(-1, 3).astype("f4")


@dataclass
class Encoding:
    """What one call of ``get_image_features`` or ``get_video_features`` taught us.

    Parameters
    ----------
    layouts
        One per image or video.
    probes
        Captured tensors over the encoder's output rows of all its images, ``[sum(raw_length), ...]``.
    features
        The projected rows per image as the model returned them, where it returns a list: generate() repeats these
        very objects for beams, and their identity says which image a repeated entry is.
    inputs
        Grids and sizes that generate() takes away before the forward.
    """

    layouts: list[ImageLayout]
    probes: dict[Probe, Tensor] = field(default_factory=dict)
    features: list[Tensor] = field(default_factory=list)
    inputs: dict[str, Any] = field(default_factory=dict)


class Family(ABC):
    """One family of models. Instances are bound to one model.

    Parameters
    ----------
    model : nn.Module
        The stock transformers model (``...ForConditionalGeneration`` or its inner ``...Model``).
    """

    #: ``config.model_type`` values that this class serves.
    model_types: ClassVar[tuple[str, ...]] = ()
    #: Name for messages and documentation.
    label: ClassVar[str] = ""
    #: True where positions are (time, height, width) triples.
    mrope: ClassVar[bool] = False
    #: Encoder rows per visual token.
    raw_per_token: ClassVar[int] = 1
    #: Names of the probes that a usual checkpoint of the family offers; `has_probe` tells of the one at hand.
    probes: ClassVar[frozenset[str]] = frozenset({PRE_PROJECTOR.name})
    #: Name of the text model inside the multimodal one.
    text_model: ClassVar[str] = "language_model"
    #: Usual number of decoder layers, and the first after which a usual checkpoint lets rows be dropped.
    usual_layers: ClassVar[tuple[int, int]] = (32, 0)
    #: Arguments of ``get_*_features`` that the model itself brings to the host, element by element, while it encodes:
    #: they are brought there before, because then nothing is waited for.
    host_inputs: ClassVar[tuple[str, ...]] = ()
    #: Whether `arrange` looks at token ids.
    reads_ids: ClassVar[bool] = False

    # Modules are typed Any: torch types every attribute of a module as Tensor | Module.
    model: Any
    inner: Any
    lm: Any
    config: Any

    def __init__(self, model: Any) -> None:
        self.model = model
        self.inner = model.model if hasattr(model, "lm_head") else model
        self.lm = getattr(self.inner, self.text_model)
        self.config = model.config
        #: Layouts made so far, by what they depend on; see `unique_layouts`.
        self.known_layouts: dict[Any, ImageLayout] = {}

    @property
    def checkpoint(self) -> str:
        """Where the model was loaded from: a folder, a hub name, or empty."""
        return str(getattr(self.config, "_name_or_path", "") or "")

    @property
    def vocabulary(self) -> Tensor:
        """Input embeddings of the language model, ``[V, D]``; not a copy."""
        return self.lm.get_input_embeddings().weight.detach()

    # -- the prompt ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def placeholders(self) -> dict[str, int]:
        """Token id of each modality's placeholder."""
        ids = {}
        for modality in ("image", "video"):
            for name in (f"{modality}_token_id", f"{modality}_token_index"):
                value = getattr(self.config, name, None)
                if isinstance(value, int) and f"get_{modality}_features" in self.feature_methods:
                    ids[modality] = value
                    break
        return ids

    @property
    def feature_methods(self) -> tuple[str, ...]:
        """Methods of the inner model that turn pixels into projected rows."""
        return tuple(m for m in ("get_image_features", "get_video_features") if hasattr(type(self.inner), m))

    @property
    def special_ids(self) -> set[int]:
        """Ids that are neither question nor picture: padding, begin, end, vision_start and the like."""
        names = ("pad", "bos", "eos", "vision_start", "vision_end", "vision", "image", "video")
        ids: set[int] = set()
        for config in (self.config, self.config.text_config):
            for name in names:
                value = getattr(config, f"{name}_token_id", None)
                ids.update(v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int))
        return ids

    # -- the encoder --------------------------------------------------------------------------------------------------

    @abstractmethod
    def layouts(self, modality: str, inputs: dict[str, Any]) -> list[ImageLayout]:
        """Layout of each image or video in a call of ``get_<modality>_features(**inputs)``."""

    @abstractmethod
    def layout_inputs(self, modality: str) -> tuple[str, ...]:
        """Names of the arguments (grids, sizes) that `layouts` reads beside the pixels."""

    def arrange(
        self, modality: str, layouts: list[ImageLayout], starts: list[int], mask: np.ndarray, ids: np.ndarray | None
    ) -> tuple[list[ImageLayout], list[int]]:
        """Put views that belong to one picture together, where only the prompt tells which do.

        Parameters
        ----------
        layouts, starts
            One per view, in encoder order, and the first encoder row of each.
        mask : np.ndarray
            ``[B, L]`` bool, True at the placeholders of this modality.
        ids : np.ndarray or None
            ``[B, L]``, equal where tokens are equal; given to families that say ``reads_ids``.
        """
        return layouts, starts

    @property
    def plain_tower(self) -> PlainTower | None:
        """The vision tower, if its patches become tokens one by one, so that some can go between two blocks (see
        `engine.early`); None where windows, merging or interpolation need them all."""
        return None

    @property
    @abstractmethod
    def projector(self) -> Any:
        """The module that maps encoder rows to rows of the language model."""

    def probe_hooks(self, probe: Probe, put: Put) -> list[Any] | None:
        """Register hooks that call ``put(probe, make_value)`` while the encoder runs; None if it lacks the probe.

        The value is made by calling ``make_value()``, and only where the current call wants the probe.
        """
        if probe.name == "pre_projector":

            def capture(_module: Any, args: tuple[Any, ...]) -> None:
                put(probe, lambda: args[0].detach().reshape(-1, args[0].shape[-1]))

            return [self.projector.register_forward_pre_hook(capture)]
        return None

    def has_probe(self, probe: Probe) -> bool:
        hooks = self.probe_hooks(probe, lambda _p, _v: None)
        for hook in hooks or []:
            hook.remove()
        return hooks is not None

    def order_raw(self, probe: Probe, value: Tensor, modality: str, inputs: dict[str, Any]) -> Tensor:
        """Bring a captured tensor into the row order of `ImageLayout.raw` (window attention permutes rows)."""
        return value

    # -- the language model --------------------------------------------------------------------------------------------

    def has_layer_probe(self, probe: Probe) -> bool:
        """Whether a probe inside the language model can be captured in a layer that exists."""
        if not 0 <= probe.layer < len(self.lm.layers):
            return False
        layer = self.lm.layers[probe.layer]
        if probe.name == "ffn_act":
            return hasattr(getattr(layer, "mlp", None), "down_proj")
        if probe.name == "hidden":
            return True
        parts = all(hasattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "scaling"))
        # Phi and StableLM can normalise heads in modules of other names.
        return parts and turns_halves(layer.self_attn) and not getattr(layer.self_attn, "qk_layernorm", False)

    def query_heads(self, attention: Any, hidden: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
        """Rotated queries ``[B, H, n, d_h]`` of these rows (``[B, n, D]``, the input of the attention module).

        Parameters
        ----------
        rotary
            Cosine and sine of the rows' positions, ``[B or 1, n, d_h]``, or ``[3, B or 1, n, d_h]`` where M-RoPE is not
            put together yet (older transformers).
        """
        return self._heads(attention, "q", hidden, rotary)

    def key_heads(self, attention: Any, hidden: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
        """Rotated keys ``[B, Hkv, n, d_h]``, as the layer would cache them."""
        return self._heads(attention, "k", hidden, rotary)

    def _heads(self, attention: Any, kind: str, hidden: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
        rows = getattr(attention, f"{kind}_proj")(hidden)
        rows = rows.view(*hidden.shape[:-1], -1, attention.head_dim)
        norm = getattr(attention, f"{kind}_norm", None)  # Qwen3
        rows = (rows if norm is None else norm(rows)).transpose(1, 2)
        cos, sin = (e.unsqueeze(1) for e in self.plain_rotary(*rotary))
        # Partial rotary: the first dimensions of a head turn, the others pass (Phi, StableLM).
        rows, rest = rows.split([cos.shape[-1], rows.shape[-1] - cos.shape[-1]], -1)
        half = rows.shape[-1] // 2
        turned = torch.cat([-rows[..., half:], rows[..., :half]], -1)
        return torch.cat([rows * cos + turned * sin, rest], -1)

    def plain_rotary(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[B or 1, n, d_h]`` from what the rotary embedding returned, M-RoPE put together."""
        if cos.ndim == 3:
            return cos, sin
        sections = [*self._mrope_section(), *self._mrope_section()]
        cos, sin = (
            torch.cat([part[i % 3] for i, part in enumerate(e.split(sections, dim=-1))], -1) for e in (cos, sin)
        )
        return cos, sin

    def _mrope_section(self) -> list[int]:
        config = self.config.text_config
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        return list(rope["mrope_section"])

    # -- positions ----------------------------------------------------------------------------------------------------

    @property
    def needs_token_types(self) -> bool:
        """Whether M-RoPE positions depend on ``mm_token_type_ids`` in this transformers version."""
        return self.mrope and "mm_token_type_ids" in inspect.signature(self.inner.forward).parameters

    def rope_index(self, input_ids: Tensor, types: Tensor, valid: Tensor, inputs: dict[str, Any]) -> Tensor:
        """M-RoPE positions ``[3, B, L]`` int64 of a prompt that starts at 0; only families with `mrope` are asked."""
        given = {**inputs, "input_ids": input_ids, "mm_token_type_ids": types, "attention_mask": valid.long()}
        known = inspect.signature(self.inner.get_rope_index).parameters
        positions, _ = self.inner.get_rope_index(**{k: v for k, v in given.items() if k in known})
        return positions


def turns_halves(attention: Any) -> bool:
    """Whether rotary embeddings turn the first half of a head against the second, as `Family.query_heads` does: other
    models (GLM, Cohere) turn neighbours. Asked of the function that the attention module's own file has for it."""
    turn = getattr(sys.modules.get(type(attention).__module__), "rotate_half", None)
    return turn is None or turn(torch.arange(4.0)).tolist() == [-2, -3, 0, 1]


def unique_layouts(
    items: Iterable[Any], make: Callable[[Any], ImageLayout], known: dict[Any, ImageLayout], *beside: Any
) -> list[ImageLayout]:
    """Make each distinct layout once: pictures of one size share theirs, in every call.

    Parameters
    ----------
    known
        Those made so far: `Family.known_layouts`.
    beside
        What `make` depends on beside the item.
    """
    out = []
    for item in items:
        key = (item, *beside)
        layout = known.get(key)
        if layout is None:
            layout = make(item)
            remember(known, key, layout, _MOST_LAYOUTS)
        out.append(layout)
    return out


def joined(views: Sequence[ImageLayout], grid: tuple[int, int], thumbnail: int | None = None) -> ImageLayout:
    """One picture of several views, each of one segment, which follow each other in the prompt and the encoder.

    Parameters
    ----------
    grid
        Rows and columns of crops; they tile the picture without padding.
    thumbnail
        Which view shows the whole picture; it becomes the first segment.
    """
    if len(views) == 1:
        return views[0]
    lengths, raws = [v.length for v in views], [v.raw_length for v in views]
    first, first_raw = np.cumsum([0, *lengths]), np.cumsum([0, *raws])
    order = list(range(len(views)))
    if thumbnail is not None:
        order.insert(0, order.pop(thumbnail))
    rows, cols = grid
    boxes = [(r / rows, c / cols, (r + 1) / rows, (c + 1) / cols) for r in range(rows) for c in range(cols)]
    whole = [] if thumbnail is None else [(0.0, 0.0, 1.0, 1.0)]
    return ImageLayout(
        length=int(first[-1]),
        rank=np.concatenate([views[i].rank + first[i] for i in order]),
        raw=np.concatenate([views[i].raw + first_raw[i] for i in order]),
        raw_length=int(first_raw[-1]),
        coords=np.concatenate([views[i].coords for i in order]),
        seg_lens=tuple(n for i in order for n in views[i].seg_lens),
        seg_kind=("thumbnail",) * len(whole) + ("crop",) * (len(views) - len(whole)),
        seg_grid=tuple(g for i in order for g in views[i].seg_grid),
        seg_box=(*whole, *boxes),
        grid=(1, rows, cols),
    )


@functools.lru_cache(maxsize=256)  # nobody writes to a layout
def single_view(rows: int, cols: int, extra: int = 0) -> ImageLayout:
    """Layout of one picture in one view; `extra` leading rows (a CLS token that is passed on) are separators."""
    n = rows * cols
    index = np.arange(extra, extra + n, dtype=np.int64)
    return ImageLayout(
        length=n + extra,
        rank=index,
        raw=np.arange(n, dtype=np.int64),
        raw_length=n,
        coords=raster(1, rows, cols),
        seg_lens=(n,),
        seg_kind=("image",),
        seg_grid=((rows, cols),),
        seg_box=((0.0, 0.0, 1.0, 1.0),),
        grid=(1, 1, 1),
    )


@torch.no_grad()
def cls_row(attention: Any, hidden: Tensor, softmax: bool) -> Tensor:
    """How much the CLS token attends to each patch, recomputed from one query row: no attention map is needed.

    Parameters
    ----------
    attention
        A CLIP-type attention module (``q_proj``, ``k_proj``, ``num_heads``, ``scale``).
    hidden : Tensor
        ``[N, 1 + P, d]`` input of that module, CLS first.
    softmax
        After (True) or before (False) the softmax over all ``1 + P`` keys.

    Returns
    -------
    Tensor
        ``[N, P]`` fp32, mean over heads.
    """
    return _cls_row(attention, attention.q_proj(hidden[:, :1]), attention.k_proj(hidden), softmax)


def _cls_row(attention: Any, queries: Tensor, keys: Tensor, softmax: bool) -> Tensor:
    """`cls_row` from what its projections put out, ``[N, 1 or 1 + P, d]`` and ``[N, 1 + P, d]``."""
    (n, length, _), heads = keys.shape, attention.num_heads
    query = queries[:, :1].view(n, 1, heads, -1).transpose(1, 2)
    key = keys.view(n, length, heads, -1).transpose(1, 2)
    return attention_rows(query, key, scale=attention.scale, softmax=softmax)[:, 0, 1:]


def _keep(heard: threading.local, name: str, module: Any, args: tuple[Any, ...], out: Tensor) -> None:
    """A hook: note what a projection puts out. Dynamo does not trace such notes right."""
    if not torch.compiler.is_compiling():
        heard.__dict__[name] = out.detach()


def _keeps_last(projection: Any) -> bool:
    """Whether no hook changes what the projection puts out after `_keep` noted it."""
    last = next(reversed(projection._forward_hooks.values()), None)
    return isinstance(last, functools.partial) and last.func is _keep


class ClipTowerMixin:
    """The encoder half that LLaVA and LLaVA-NeXT share: a CLIP-type tower with a CLS token, or SigLIP without."""

    probes = frozenset({CLS_ROW.name, PRE_PROJECTOR.name})
    inner: Any

    @property
    def projector(self) -> Any:
        """The module that makes projected rows."""
        return self.inner.multi_modal_projector

    @property
    def tower(self) -> Any:
        """The vision transformer."""
        return compat.clip_tower(self.inner.vision_tower)

    @property
    def plain_tower(self) -> PlainTower | None:
        """The same for `engine.early`: a patch is a token."""
        return PlainTower(self.inner.vision_tower, self.tower.encoder.layers, self.has_cls)

    @property
    def has_cls(self) -> bool:
        """Whether it has a CLS token."""
        return hasattr(self.tower.embeddings, "class_embedding")

    def cls_hooks(self, probe: Probe, put: Put) -> list[Any] | None:
        """Hooks that capture what the CLS token attends to."""
        layers = self.tower.encoder.layers
        if not self.has_cls or not -len(layers) <= probe.layer < len(layers):
            return None

        attention = layers[probe.layer].self_attn
        projections, heard = {name: getattr(attention, name) for name in ("q_proj", "k_proj")}, threading.local()

        def forget(*_: Any) -> None:
            """What a forward that failed, or a call of a projection by itself, left behind."""
            if not torch.compiler.is_compiling():
                heard.__dict__.clear()

        def capture(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            rows = {} if torch.compiler.is_compiling() else dict(heard.__dict__)
            forget()
            # An adapter that was put on later stands in the place of a projection, a hook changes what it puts out.
            own = all(getattr(module, name) is part and _keeps_last(part) for name, part in projections.items())

            def value() -> Tensor:
                if own and rows.keys() == projections.keys():
                    return _cls_row(module, rows["q_proj"], rows["k_proj"], probe.softmax).flatten()
                hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                row = cls_row(module, hidden.detach(), probe.softmax).flatten()
                forget()  # its projections were heard as well
                return row

            put(probe, value)

        keep = functools.partial(functools.partial, _keep, heard)
        return [
            *(part.register_forward_hook(keep(name)) for name, part in projections.items()),
            attention.register_forward_pre_hook(forget),
            attention.register_forward_hook(capture, with_kwargs=True),
        ]
