# SPDX-License-Identifier: Apache-2.0
"""Sink, dead or alive: the rule by which a visual token is sorted, and what it must know of a checkpoint.

EmbedLens (arXiv 2603.00510): a token belongs to a class if any of its three nearest words, by cosine to the input
embeddings before the first layer, is one of the class's *anchors*. There is no threshold, and a token may belong to
several classes. Anchors are words of one checkpoint, and mean nothing to another: without a calibration nothing is
classified. Where no words give a class away (a vocabulary may be too small for that), its *mean* does instead: a token
belongs to it if its cosine to the mean is large enough. That is ours, not the paper's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, InputError
from ..kernels import reference
from ..kernels.lens_topk import inverse_norms, lens_rank
from ..plain import parse_json

#: Classes by precedence, where one must be shown of several. What is in none of them is alive.
CLASSES = ("vit_sink", "llm_sink", "dead")
ALIVE = "alive"
#: Words that name several classes at once.
GROUPS = {"sink": ("vit_sink", "llm_sink"), "all": (*CLASSES, ALIVE)}
FILE = "embedlens.json"
VERSION = 1
#: Names of checkpoints for which a calibration ships with the package.
BUILT_IN = {"llava-1.5-7b-hf": "llava-1.5-7b.json", "llava-v1.5-7b": "llava-1.5-7b.json"}


def class_names(given: str | Sequence[str], alive: bool = False) -> tuple[str, ...]:
    """Names of classes (a list, or with commas), groups spelled out, in the order of `CLASSES`.

    Raises
    ------
    ConfigError
        A name that is no class.
    """
    names = given.replace(" ", "").split(",") if isinstance(given, str) else list(given)
    known = (*CLASSES, *((ALIVE,) if alive else ()))
    groups = {name: part for name, part in GROUPS.items() if alive or name != "all"}
    for name in names:
        if name not in known and name not in groups:
            raise ConfigError(f"{name!r} is no class of visual tokens; choose of {', '.join((*known, *groups))}")
    chosen = {part for name in names for part in groups.get(name, (name,))}
    if not chosen:
        raise ConfigError(f"no class of visual tokens is named; choose of {', '.join((*known, *groups))}")
    return tuple(name for name in known if name in chosen)


def short_name(checkpoint: str) -> str:
    """The last part of a path or hub name: results that are passed on say nothing about a disk."""
    return checkpoint.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _check_version(version: Any) -> None:
    if version != VERSION:
        raise ConfigError(f"this calibration is of version {version}, and only {VERSION} is known; make it anew")


@dataclass(frozen=True)
class Categories:
    """Which classes each of T tokens belongs to.

    Parameters
    ----------
    names
        The classes that the calibration tells apart, C of them.
    members : np.ndarray
        ``[T, C]`` bool; classes may overlap, and a token in none of them is alive.
    """

    names: tuple[str, ...]
    members: np.ndarray

    @property
    def alive(self) -> np.ndarray:
        """``[T]`` bool."""
        return np.logical_not(self.members.any(1))

    @property
    def labels(self) -> list[str]:
        """One class per token, the first of `CLASSES` that holds."""
        order = [name for name in CLASSES if name in self.names]
        columns = self.members[:, [self.names.index(name) for name in order]]
        first = np.where(columns.any(1), columns.argmax(1), len(order)) if order else np.zeros(len(columns), int)
        return [(*order, ALIVE)[i] for i in first]

    def mask(self, name: str) -> np.ndarray:
        """``[T]`` bool: tokens of a class, of a group of classes (``"sink"``), or those ``"alive"``; none of a class
        that the calibration does not know."""
        parts = class_names(name, alive=True)
        out = np.zeros(len(self.members), bool)
        for part in parts:
            if part == ALIVE:
                out |= self.alive
            elif part in self.names:
                out |= self.members[:, self.names.index(part)]
        return out

    def shares(self) -> dict[str, float]:
        """Share of the tokens in each class, and of those alive. May sum to more than 1."""
        return {name: float(self.mask(name).mean()) for name in (*self.names, ALIVE)}


@dataclass(frozen=True)
class Calibration:
    """What sorting the visual tokens of one checkpoint needs.

    Parameters
    ----------
    checkpoint
        Name of the checkpoint.
    vocabulary
        Ids below are words; what lies beyond pads the embedding table.
    width
        D, of the embeddings.
    anchors
        Ids per class, for those classes that words give away.
    means
        ``[D]`` mean of the unit rows per class that was found in pictures. Decides where a class has no anchors.
    radius
        Cosine to its mean from which on a token belongs to a class without anchors.
    excluded
        Ids below `vocabulary` that take no part: placeholders and padding.
    top
        How many nearest words are looked at.
    words
        The anchors as words, for people.
    evidence
        How it was found: images, seeds, shares, cosines. For people, too.
    version
        Of this format.
    """

    checkpoint: str
    vocabulary: int
    width: int
    anchors: dict[str, tuple[int, ...]]
    means: dict[str, tuple[float, ...]] = field(default_factory=dict)
    radius: float = 0.95
    excluded: tuple[int, ...] = ()
    top: int = 3
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def __post_init__(self) -> None:
        _check_version(self.version)
        for name in (*self.anchors, *self.means):
            if name not in CLASSES:
                raise ConfigError(f"the calibration names a class {name!r}; classes are {', '.join(CLASSES)}")
        for name, mean in self.means.items():
            if len(mean) != self.width:
                raise ConfigError(f"the mean of {name!r} has {len(mean)} numbers; expected {self.width}")
        for name, ids in self.anchors.items():
            if not ids or not all(isinstance(i, int) and 0 <= i < self.vocabulary for i in ids):
                raise ConfigError(f"anchors of {name!r} are {ids!r}; expected ids from 0 to {self.vocabulary - 1}")
        if self.top < 1 or self.width < 1:
            raise ConfigError(f"the calibration has top={self.top} and width={self.width}; both are at least 1")
        object.__setattr__(self, "anchors", {c: tuple(self.anchors[c]) for c in CLASSES if c in self.anchors})
        object.__setattr__(self, "means", {c: tuple(self.means[c]) for c in CLASSES if c in self.means})
        object.__setattr__(self, "excluded", tuple(self.excluded))
        object.__setattr__(self, "words", {name: tuple(words) for name, words in self.words.items()})

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes that it tells apart, C of them."""
        return tuple(name for name in CLASSES if name in self.anchors or name in self.means)

    # -- files --------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """All fields as a JSON object; `from_dict` reads it."""
        text = json.dumps(asdict(self), indent=2)
        # Lists of numbers on one line each: a mean has thousands.
        return re.sub(r"\[\s+([-+.\de,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"

    @classmethod
    def from_dict(cls, data: Any) -> Calibration:
        """Make one of what a JSON file holds.

        Raises
        ------
        ConfigError
            Something is missing, unknown or out of range.
        """
        known = [f.name for f in fields(cls)]
        if isinstance(data, dict):
            _check_version(data.get("version", VERSION))  # before its fields, which another version may have more of
        if not isinstance(data, dict) or set(data) - set(known):
            odd = ", ".join(map(repr, sorted(set(data) - set(known)))) if isinstance(data, dict) else repr(data)
            raise ConfigError(f"a calibration has no {odd}; its fields are {', '.join(known)}")
        try:
            return cls(**data)
        except (TypeError, AttributeError) as error:
            raise ConfigError(f"this is not a calibration ({error}); make one with vtprune.lens.calibrate") from None

    def save(self, path: str | Path) -> Path:
        """Write JSON to `path`; a folder (a checkpoint) gets a file ``embedlens.json``, where it is found again."""
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file that `save` wrote, or ``embedlens.json`` in a folder."""
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        try:
            data = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot read the calibration {path} ({error}); make one with vtprune.lens.calibrate"
            ) from None
        return cls.from_dict(data)

    @classmethod
    def find(cls, checkpoint: str) -> Calibration:
        """The calibration that lies beside the config of a checkpoint, or one that ships with the package.

        Parameters
        ----------
        checkpoint
            The folder or hub name that a model was loaded from.

        Raises
        ------
        ConfigError
            There is none.
        """
        if checkpoint and (Path(checkpoint) / FILE).is_file():
            return cls.load(Path(checkpoint) / FILE)
        name = short_name(checkpoint)
        if name.lower() in BUILT_IN:
            return cls.load(Path(__file__).parent / BUILT_IN[name.lower()])
        raise ConfigError(
            f"there is no calibration for {name or 'this model'}, and what a visual token means cannot be told "
            "without: make one with vtprune.lens.calibrate(model, processor, images), and save it beside the config as "
            f"{FILE}, or pass it as calibration="
        )

    @classmethod
    def of(cls, given: Any, checkpoint: str) -> Calibration:
        """What a `calibration` argument means: None (that of the checkpoint), a path, a dict as in JSON, or itself."""
        if given is None:
            return cls.find(checkpoint)
        if isinstance(given, cls):
            return given
        return cls.from_dict(given) if isinstance(given, dict) else cls.load(given)

    # -- the rule -----------------------------------------------------------------------------------------------------

    def check(self, size: int, width: int) -> None:
        """Refuse an embedding table ``[size, width]`` that cannot be that of the checkpoint."""
        if width != self.width or size < self.vocabulary:
            raise ConfigError(
                f"the calibration is of {self.checkpoint}, whose embeddings are {self.vocabulary} x {self.width}; this "
                f"model's are {size} x {width}; make one for it with vtprune.lens.calibrate"
            )

    def inverse(self, table: Tensor) -> Tensor:
        """``1 / norm`` of the rows of the embedding table that are words, ``[V]`` fp32; 0 at the others."""
        self.check(*table.shape)
        mask = torch.arange(len(table)) < self.vocabulary
        mask[list(self.excluded)] = False
        return inverse_norms(table, mask)

    def classify(self, rows: Tensor, table: Tensor, inverse: Tensor | None = None) -> Tensor:
        """Which of `classes` each row belongs to, ``[T, C]`` bool on the device of the rows.

        It counts the words that are nearer than an anchor, and never makes a list of words.

        Parameters
        ----------
        rows : Tensor
            ``[T, D]`` projected rows (layer 0).
        table : Tensor
            ``[V, D]`` input embeddings.
        inverse : Tensor, optional
            What `inverse` made of the table.
        """
        if rows.ndim != 2:
            raise InputError(f"rows have shape {tuple(rows.shape)}; give [tokens, {self.width}]")
        inverse = self.inverse(table) if inverse is None else inverse
        found = {name: self._cosine(rows, name) >= self.radius for name in self.classes if name not in self.anchors}
        if self.anchors:
            ids = reference.ints([i for own in self.anchors.values() for i in own], rows.device)
            near = lens_rank(rows, table, ids, inverse=inverse) < self.top
            parts = near.split([len(own) for own in self.anchors.values()], 1)
            found |= {name: part.any(1) for name, part in zip(self.anchors, parts, strict=True)}
        if not found:
            return torch.zeros(len(rows), 0, dtype=torch.bool, device=rows.device)
        return torch.stack([found[name] for name in self.classes], 1)

    def _cosine(self, rows: Tensor, name: str) -> Tensor:
        """Cosine of each row to the mean of a class, ``[T]`` fp32."""
        return _cosines(rows, torch.tensor(self.means[name], dtype=reference.wide(rows))[None]).squeeze(1)

    def similarity(self, rows: Tensor, table: Tensor, classes: Sequence[str], inverse: Tensor | None = None) -> Tensor:
        """How much like these classes each row is, ``[T]`` fp32: its largest cosine to one of their means, or, of
        classes without, to one of their anchors; NaN for rows with NaN."""
        found = [self._cosine(rows, name) for name in classes if name in self.means]
        ids = [i for name in classes if name not in self.means for i in self.anchors.get(name, ())]
        if ids:
            at = reference.ints(ids, table.device)
            inverse = self.inverse(table) if inverse is None else inverse
            # The reciprocal norm says which rows are words; the cosine is to nothing else.
            found += _cosines(rows, table[at].to(reference.wide(table)) * (inverse[at] > 0)[:, None]).unbind(1)
        return torch.stack(found, 1).amax(1)


def _cosines(rows: Tensor, to: Tensor) -> Tensor:
    """Cosines of rows ``[T, D]`` to a few rows ``[A, D]`` in `reference.wide`, ``[T, A]`` fp32; a few rows at a time:
    near ties do not go by how a device rounds, and memory does not grow with the tokens."""
    to = torch.nn.functional.normalize(to.to(rows.device, non_blocking=True), dim=1)
    found = [(torch.nn.functional.normalize(part.to(to.dtype), dim=1) @ to.T).float() for part in rows.split(256)]
    return torch.cat(found)
