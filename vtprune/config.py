# SPDX-License-Identifier: Apache-2.0
"""`PruneConfig`: everything that `apply` can be told, as a validated dataclass that goes to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from .budget import Budget
from .compose import check_keeps, compose
from .errors import ConfigError
from .plain import parse_json
from .registry import Pruner, build, nearest

CONFIG_NAME = "vtprune.json"
POSITIONS = ("original", "compact")
COMPILE = (None, "graph")


@dataclass(frozen=True)
class PruneConfig:
    """What to prune, with which method, down to how much.

    Parameters
    ----------
    method
        Name of a method, see `vtprune.methods()`; or two and more, which then run one after the other, each on what the
        one before it left.
    keep
        A float in (0, 1] is the fraction of visual tokens kept, an int a count per image (see `Budget`). Of several
        methods, one number is what the last one leaves, and the others take equal steps towards it. A number for each
        says what each keeps of what it sees: fractions multiply, and only the last may have a count.
    positions
        ``"original"``: kept tokens keep the position ids of the full prompt, and decoding goes on from the full
        length. ``"compact"``: the pruned prompt is renumbered 0, 1, 2, ...; M-RoPE models lose the picture's layout.
    scope, allocation
        See `Budget`. ``allocation="auto"`` is the method's own, of several the last one's: ``"equal"`` unless its
        description says otherwise.
    restore
        True: hidden states, and so logits, come back at the length of the input, so that labels fit; a dropped token's
        slot carries the row of the last kept token before it. False: they come back at the pruned length, left-padded.
    options
        The method's own options. Of several methods, every one that has an option of this name gets it.
    compile
        None, or ``"graph"``: on a CUDA device, the vision tower and the prefill of the language model run as CUDA
        graphs, captured once for each of a few prompt lengths, and so does the choice of tokens of some methods once
        pictures of the same shapes have come three times. What cannot run so runs as ever, and `Report.compiled` says
        why. Results then differ by rounding from those without, at ``keep=1.0`` too.
    layer
        Of a vision transformer on its own (timm, open_clip): the block, counted from 0, after which patches go; of
        several, each takes an equal step towards `keep`. None is a third of the way through. Methods that act inside a
        language model have an option of this name instead.
    tower_keep, tower_layer
        Below 1.0, of the patches of every view only this share goes on through the vision tower after its block
        `tower_layer`, counted from 0: those to which its CLS token attends most there, or without one those least like
        the mean of their view. The method then chooses among what is left; `keep` still counts from all tokens, and is
        limited by what is left. None is a third of the way through. For towers that make one token of each patch
        (LLaVA, LLaVA-NeXT). What the model answers changes beyond what `keep` does: measure it.

    Raises
    ------
    ConfigError
        At construction, for any value that cannot be used.
    """

    method: str | Sequence[str] = "idpruner"
    keep: float | int | Sequence[float | int] = 0.25
    positions: str = "original"
    scope: str = "per_image"
    allocation: str = "auto"
    restore: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    compile: str | None = None
    layer: int | Sequence[int] | None = None
    tower_keep: float = 1.0
    tower_layer: int | None = None

    #: The allocation that the method takes where nobody asks for another. Not a field: `replace` works it out again.
    _own: ClassVar[str] = "equal"

    def __post_init__(self) -> None:
        if isinstance(self.method, list | tuple):
            if not self.method or not all(isinstance(name, str) for name in self.method):
                raise ConfigError(f"method={self.method!r} is no list of names; give a method's name, or several")
            object.__setattr__(self, "method", self.method[0] if len(self.method) == 1 else tuple(self.method))
        elif not isinstance(self.method, str):
            raise ConfigError(f"method={self.method!r} is a {type(self.method).__name__}; give a method's name")
        if self.positions not in POSITIONS:
            raise ConfigError(f"positions={self.positions!r} is unknown; choose one of {', '.join(POSITIONS)}")
        if not isinstance(self.restore, bool):
            raise ConfigError(f"restore={self.restore!r} must be True or False")
        if self.compile not in COMPILE:
            raise ConfigError(f"compile={self.compile!r} is unknown; choose None or 'graph'")
        if self.layer is not None:
            object.__setattr__(self, "layer", _check_layer(self.layer))
        object.__setattr__(self, "tower_keep", _check_share(self.tower_keep))
        if self.tower_layer is not None and not _is_block(self.tower_layer):
            raise ConfigError(f"tower_layer={self.tower_layer!r} names no block; give its number, such as 7")
        if not isinstance(self.options, dict):
            raise ConfigError(f"options={self.options!r} must be a dict of the method's options")
        if isinstance(self.keep, list | tuple) and not isinstance(self.method, str):
            object.__setattr__(self, "keep", check_keeps(self.keep, len(self.method)))
        elif isinstance(self.keep, list | tuple) and len(self.keep) != 1:
            raise ConfigError(f"keep={self.keep!r} has {len(self.keep)} numbers for one method; give a single one")
        else:
            object.__setattr__(self, "keep", Budget(self.keep).keep)  # type: ignore[arg-type]
        pruner = self.pruner()
        object.__setattr__(self, "_own", pruner.allocation)
        self.budget()

    def budget(self) -> Budget:
        """What the last method leaves."""
        keep = self.keep
        if isinstance(keep, Sequence):
            keep = keep[-1] if isinstance(keep[-1], int) else float(math.prod(keep))
        return Budget(keep, self.scope, self._own if self.allocation == "auto" else self.allocation)

    def pruner(self) -> Pruner:
        """A new pruner with these options."""
        if isinstance(self.method, str):
            return build(self.method, self.options)
        return compose(self.method, tuple(self.keep) if isinstance(self.keep, Sequence) else (), self.options)

    @property
    def label(self) -> str:
        """The method's name, or those of several methods."""
        return self.method if isinstance(self.method, str) else " + ".join(self.method)

    def to_json(self) -> str:
        try:
            json.dumps(self.options)
        except TypeError:
            raise ConfigError(
                f"options={self.options!r} hold an object that is no JSON; write the config without it"
            ) from None
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PruneConfig:
        """Read what `to_json` wrote; unknown keys are errors, because a typo must not silently become a default."""
        try:
            data = parse_json(text)
        except ValueError as error:
            raise ConfigError(f"the config is not valid JSON ({error}); write one with PruneConfig.save") from None
        if not isinstance(data, dict):
            raise ConfigError(f"the config holds a JSON {type(data).__name__}; expected one like {{'keep': 0.25}}")
        known = [f.name for f in dataclasses.fields(cls)]
        for key in data:
            if key not in known:
                hint = nearest(key, known)
                raise ConfigError(f"the config has an unknown key {key!r}{hint}; known: {', '.join(known)}")
        return cls(**data)

    def save(self, path: str | Path) -> Path:
        """Write JSON to `path`; a folder (for example a checkpoint) gets a file ``vtprune.json``."""
        path = Path(path)
        path = path / CONFIG_NAME if path.is_dir() else path
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> PruneConfig:
        """Read a file that `save` wrote, or ``vtprune.json`` in a folder."""
        path = Path(path)
        path = path / CONFIG_NAME if path.is_dir() else path
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the config {path} ({error}); write one with PruneConfig.save") from None
        return cls.from_json(text)


def _is_block(layer: Any) -> bool:
    return isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0


def _check_share(share: Any) -> float:
    number = isinstance(share, numbers.Real) and not isinstance(share, bool)
    if not number or not 0 < share <= 1:
        raise ConfigError(f"tower_keep={share!r} is no share of the patches; give a number in (0, 1], such as 0.5")
    return float(share)


def _check_layer(layer: Any) -> int | tuple[int, ...]:
    """A block, or several in ascending order."""
    layers = (layer,) if isinstance(layer, int) else tuple(layer) if isinstance(layer, Sequence | range) else ()
    if not layers or not all(map(_is_block, layers)) or list(layers) != sorted(set(layers)):
        raise ConfigError(f"layer={layer!r} names no block; give its number, such as 3, or several that ascend")
    return layers[0] if len(layers) == 1 else layers
