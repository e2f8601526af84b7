# SPDX-License-Identifier: Apache-2.0
"""The probe: which words a visual token is nearest to, at any layer of the language model.

``EmbedLens(h) = TopK_v cos(h, E_v)`` with the *input* embeddings E (EmbedLens, arXiv 2603.00510). Not the LogitLens: no
final norm, no head. A cosine does not ask how long a row is, and projected rows are many times longer than words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..api import using
from ..engine.attach import watching
from ..engine.call import Call
from ..errors import ConfigError, InputError, VTPruneError
from ..kernels.lens_topk import inverse_norms, lens_topk
from ..models import find_family
from ..models.base import Family
from ..plain import parse_json
from ..tokens import VisualTokens
from .calibration import Calibration, Categories, short_name

FORMAT = 1


@dataclass(frozen=True)
class View:
    """One image, AnyRes view or video frame: consecutive tokens of a `Lens`.

    Parameters
    ----------
    sample, image
        Where it belongs, counted over the batch.
    kind, grid, box
        As ``seg_kind``, ``seg_grid`` and ``seg_box`` in `VisualTokens`.
    count
        Its tokens.
    """

    sample: int
    image: int
    kind: str
    grid: tuple[int, int]
    box: tuple[float, float, float, float]
    count: int


@dataclass(frozen=True)
class Lens:
    """What `lens` saw: the nearest words of T visual tokens at each of L layers.

    Parameters
    ----------
    layers
        0: the projected rows. l: what the l-th decoder layer puts out, that is, after l layers.
    ids : np.ndarray
        ``[L, T, k]`` int64 vocabulary ids by descending cosine; -1 where there is none.
    cosines : np.ndarray
        ``[L, T, k]`` float32.
    coords : np.ndarray
        ``[T, 3]`` float32 time, row, column of each token inside its view.
    views
        One per image, AnyRes view or video frame, in the order of the tokens.
    words
        The word of every id that occurs; empty without a processor.
    checkpoint
        Name of the checkpoint: of a folder, the last part of its path.
    classes, why
        What `categories` returns; where that is nothing, the reason.
    """

    layers: tuple[int, ...]
    ids: np.ndarray
    cosines: np.ndarray
    coords: np.ndarray
    views: tuple[View, ...]
    words: dict[int, str] = field(default_factory=dict)
    checkpoint: str = ""
    classes: Categories | None = None
    why: str = ""

    def __len__(self) -> int:
        return len(self.coords)

    def at(self, layer: int) -> int:
        """Index of a layer in `layers`.

        Raises
        ------
        InputError
            It was not looked at.
        """
        if layer not in self.layers:
            raise InputError(f"layer {layer} was not looked at, only {', '.join(map(str, self.layers))}")
        return self.layers.index(layer)

    def word(self, number: int) -> str:
        """The word of an id, or the id where no word is known."""
        return self.words.get(number, f"#{number}")

    def categories(self) -> Categories:
        """Sink, dead or alive: the classes of each token, told by its projected row whatever the layers.

        Raises
        ------
        ConfigError
            There was no calibration: what words mean differs from checkpoint to checkpoint.
        """
        if self.classes is None:
            raise ConfigError(self.why or "these tokens were not classified; look again with a calibration")
        return self.classes

    def records(self) -> Iterator[dict[str, Any]]:
        """One row per layer, token and rank."""
        view = np.repeat(np.arange(len(self.views)), [v.count for v in self.views])
        for at, layer in enumerate(self.layers):
            for token in range(len(self)):
                own = self.views[view[token]]
                time, row, column = (int(x) for x in self.coords[token].round())
                place = {"sample": own.sample, "image": own.image, "view": int(view[token]), "kind": own.kind}
                place |= {"token": token, "time": time, "row": row, "column": column}
                for rank, (number, cosine) in enumerate(
                    zip(self.ids[at, token].tolist(), self.cosines[at, token].tolist(), strict=True)
                ):
                    if number >= 0:
                        said = {"rank": rank, "id": number, "word": self.word(number), "cosine": cosine}
                        yield {"layer": layer, **place, **said}

    def to_pandas(self) -> Any:
        """`records` as a ``pandas.DataFrame``; needs the package pandas (``pip install vtprune[lens]``)."""
        try:
            import pandas
        except ImportError as error:
            raise VTPruneError(
                f"to_pandas() needs pandas ({error}); pip install 'vtprune[lens]', or use records()"
            ) from None
        return pandas.DataFrame(list(self.records()))

    def to_json(self) -> str:
        """Everything, as one JSON object; `from_json` reads it. Cosines keep four decimals."""
        rounded = np.round(self.cosines.astype(float), 4).astype(object)
        rounded[~np.isfinite(self.cosines)] = None  # JSON knows no infinity
        return json.dumps(
            {
                "format": FORMAT,
                "checkpoint": self.checkpoint,
                "layers": self.layers,
                "views": [asdict(view) for view in self.views],
                "coords": self.coords.tolist(),
                "words": self.words,
                "classes": None if self.classes is None else list(self.classes.names),
                "members": None if self.classes is None else self.classes.members.astype(int).tolist(),
                "why": self.why,
                "ids": self.ids.tolist(),
                "cosines": rounded.tolist(),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Lens:
        """Read what `to_json` wrote.

        Raises
        ------
        ConfigError
            It is something else, or of another format.
        """
        try:
            data = parse_json(text)
            if data["format"] != FORMAT:
                raise ConfigError(f"this is format {data['format']} of a lens, and only {FORMAT} is known")
            views = tuple(View(**{**v, "grid": tuple(v["grid"]), "box": tuple(v["box"])}) for v in data["views"])
            shape = (len(data["layers"]), sum(v.count for v in views), -1)
            cosines = np.array(data["cosines"], np.float32).reshape(shape)  # None becomes NaN
            classes = None
            if data["classes"] is not None:
                members = np.array(data["members"], bool).reshape(shape[1], len(data["classes"]))
                classes = Categories(tuple(data["classes"]), members)
            ids = np.array(data["ids"], np.int64).reshape(shape)
            coords = np.array(data["coords"], np.float32).reshape(shape[1], 3)
            if ids.shape != cosines.shape or not np.isfinite(coords).all():
                raise ValueError(f"{ids.shape} ids, {cosines.shape} cosines, or coordinates that are no numbers")
            return cls(
                tuple(data["layers"]),
                ids,
                np.where(np.isnan(cosines), -np.inf, cosines).astype(np.float32),
                coords,
                views,
                {int(number): word for number, word in data["words"].items()},
                data["checkpoint"],
                classes,
                data["why"],
            )
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"this is not a lens that to_json() wrote ({error})") from None


@torch.no_grad()
def lens(
    model: nn.Module,
    inputs: Mapping[str, Any],
    layers: int | Sequence[int] | None = None,
    topk: int = 10,
    processor: Any = None,
    calibration: Any = None,
) -> Lens:
    """Look at what the visual tokens of a prompt say.

    The model runs once, without pruning or injection (whatever is applied), as far as the last layer that is asked for.
    Memory beyond the forward's own is bounded: scores are made block by block over the vocabulary, and of each token
    and layer only the `topk` best are kept.

    Parameters
    ----------
    model
        A stock transformers model of a supported family.
    inputs
        What its processor returned: ids, mask, pixels, grids. Batches are fine.
    layers
        0: the projected rows. l: after l decoder layers. Default: all of them.
    topk
        Words per token and layer.
    processor
        The model's processor, or its tokenizer: names the words, and ids that it does not know are left out. Left out
        always: placeholders, padding, and embeddings that were never trained.
    calibration
        For `Lens.categories`: a `Calibration`, the path of one, or None for that of the checkpoint, if it has one.

    Returns
    -------
    Lens

    Raises
    ------
    InputError
        A layer that the model does not have, or inputs without pictures.

    Examples
    --------
    >>> import vtprune
    >>> seen = vtprune.lens(model, inputs, layers=[0, 3], topk=5, processor=processor)
    >>> seen.to_pandas().query("rank == 0").groupby("layer").word.value_counts()
    """
    if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
        raise InputError(f"topk={topk!r} counts no words; give a whole number from 1 on")
    family = find_family(model)
    wanted = check_layers(family, layers)
    table = family.vocabulary
    tokenizer = getattr(processor, "tokenizer", processor)
    inverse = inverse_norms(table, word_mask(family, len(table), tokenizer))
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    rule, classes, why = None, None, ""
    try:
        rule = Calibration.of(calibration, family.checkpoint)
    except ConfigError as error:
        if calibration is not None:
            raise
        why = str(error)

    def see(layer: int, rows: Tensor, _hidden: Tensor) -> None:
        nonlocal classes
        rows = rows.to(table.device)  # of a model on several devices: some rows are moved, never the table
        if layer == 0 and rule is not None:
            classes = Categories(rule.classes, rule.classify(rows, table).cpu().numpy())
        if layer not in wanted:
            return
        values, ids = lens_topk(rows, table, topk, inverse=inverse)
        found[layer] = ids.cpu().numpy(), values.cpu().numpy()

    tokens = watch_layers(family, inputs, wanted if rule is None else sorted({0, *wanted}), see)
    ids, cosines = (np.stack([found[layer][i] for layer in wanted]) for i in range(2))
    words: dict[int, str] = {}
    if tokenizer is not None:
        words = {int(i): spell(tokenizer, int(i)) for i in np.unique(ids) if i >= 0}
    coords, views = tokens.coords.cpu().numpy(), views_of(tokens)
    return Lens(wanted, ids, cosines, coords, views, words, short_name(family.checkpoint), classes, why)


def check_layers(family: Family, layers: int | Sequence[int] | None) -> tuple[int, ...]:
    """Layers in ascending order, each once."""
    last = len(family.lm.layers)
    if layers is None:
        return tuple(range(last + 1))
    wanted = [layers] if isinstance(layers, int) else list(layers)
    for layer in wanted:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= last:
            raise InputError(
                f"layer {layer!r} is not there; this model has 0 (projected rows) to {last} (its last one)"
            )
    if not wanted:
        raise InputError("layers is empty; name at least one, or leave it out for all of them")
    return tuple(sorted(set(wanted)))


def word_mask(family: Family, size: int, tokenizer: Any) -> Tensor:
    """Rows of the embedding table that are words, ``[size]`` bool: neither placeholders nor padding, nor ids beyond
    those of the tokenizer, which pad the table to a round number."""
    mask = torch.ones(size, dtype=torch.bool)
    for number in excluded_ids(family):
        if number < size:
            mask[number] = False
    if tokenizer is not None:
        mask[len(tokenizer) :] = False
    return mask


def excluded_ids(family: Family) -> list[int]:
    """Ids whose embeddings never reach the language model, and so are never trained as inputs."""
    pads = [getattr(config, "pad_token_id", None) for config in (family.config, family.config.text_config)]
    return sorted({*family.placeholders.values(), *(pad for pad in pads if isinstance(pad, int))})


def spell(tokenizer: Any, number: int) -> str:
    """A word as a person reads it: without the marks of its tokenizer, and never empty."""
    word = str(tokenizer.decode([number])).strip()
    return word if word and "\ufffd" not in word else str(tokenizer.convert_ids_to_tokens(number))


def views_of(tokens: VisualTokens) -> tuple[View, ...]:
    """A `View` for each segment."""
    parts = zip(tokens.seg_image, tokens.seg_kind, tokens.seg_grid, tokens.seg_box, tokens.seqlens, strict=True)
    return tuple(View(tokens.image_sample[image], image, *rest) for image, *rest in parts)  # type: ignore[arg-type]


class _Seen(Exception):
    """Raised by the probe itself to stop a forward after the last layer that it looks at."""


#: Is given the layer, its visual rows ``[T, D]`` and all of its rows ``[B, L, D]``.
See = Callable[[int, Tensor, Tensor], None]


def watch_layers(family: Family, inputs: Mapping[str, Any], layers: Sequence[int], see: See) -> VisualTokens:
    """Run the model without pruning, and show `see` the rows at each of `layers` (ascending) as they come by."""
    last = len(family.lm.layers)
    notes: list[VisualTokens] = []
    with using(family.model, None), watching(family, lambda call: notes.append(_of(call)), entry=0) as engine:

        def look(layer: int, hidden: Tensor) -> None:
            call = engine.local.call
            if call is None or call.slots is None:
                return  # nothing visual
            see(layer, hidden.detach().reshape(-1, hidden.shape[-1])[call.slots.to(hidden.device)], hidden.detach())
            if layer == layers[-1]:
                raise _Seen

        with _hooks(family, layers, last, look):
            try:
                given = {k: v for k, v in inputs.items() if k in engine.signature and k != "past_key_values"}
                family.inner(**given, use_cache=False)
            except _Seen:
                return notes[0]
            finally:
                engine._leave()
    raise InputError(
        "the inputs have no pictures, so there is nothing to see; pass what the model's processor returned"
    )


def _of(call: Call) -> VisualTokens:
    assert call.tokens is not None
    return call.tokens


@contextmanager
def _hooks(family: Family, layers: Sequence[int], last: int, look: Callable[[int, Tensor], None]) -> Iterator[None]:
    def before(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            look(layer, args[0] if args else kwargs["hidden_states"])

        return hook

    def after(_module: nn.Module, _args: tuple[Any, ...], out: Any) -> None:
        look(last, out[0] if isinstance(out, tuple) else out)

    handles = [
        family.lm.layers[last - 1].register_forward_hook(after)
        if layer == last
        else family.lm.layers[layer].register_forward_pre_hook(before(layer), with_kwargs=True)
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
