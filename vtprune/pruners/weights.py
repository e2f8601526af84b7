# SPDX-License-Identifier: Apache-2.0
"""Files of small trained networks: read with care, and refused in words where they are something else."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ConfigError

N = TypeVar("N", bound=nn.Module)


def read(file: Path, path: str | Path, what: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Parameters
    ----------
    file
        The file, which is there.
    path, what
        What the user called it, and what it should hold (``"scorer"``), for messages.

    Raises
    ------
    ConfigError
        The file is torn, or holds numbers that are no weights.
    """
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ConfigError(
            f"{path} is not a whole safetensors file ({error}); fetch or train the {what} again"
        ) from None
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ConfigError(f"{path} holds no {what}: {name} is {tensor.dtype}; weights are floating point")
        if not bool(tensor.float().isfinite().all()):
            raise ConfigError(f"{path} is spoilt: {name} has NaN or infinite values; train the {what} again")
    return state


def shape_of(state: dict[str, Tensor], name: str, default: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """Rows and columns of a matrix; `default` where it is missing, or no matrix."""
    shape = tuple(state[name].shape) if name in state else ()
    return (shape[0], shape[1]) if len(shape) == 2 else default


def filled(network: N, state: dict[str, Tensor], path: str | Path, what: str) -> N:
    """The network with these weights, which are not trained any more.

    Raises
    ------
    ConfigError
        They are not those of such a network.
    """
    wanted = {name: tuple(p.shape) for name, p in network.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wanted != found:
        odd = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        raise ConfigError(f"{path} holds no {what}: {', '.join(odd[:4])} are missing, unknown or of another shape")
    network.load_state_dict(state)
    return network.requires_grad_(False).eval()
