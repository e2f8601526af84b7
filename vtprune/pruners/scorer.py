# SPDX-License-Identifier: Apache-2.0
"""A small trained network that tells how important each visual token is, and the soft top-k that it is trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels import reference

FILE = "scorer.safetensors"
#: Where a model that ships with the package has its scorer.
SHIPPED = Path(__file__).parents[1] / "models" / "pocket"
SHARE = 0.2  # of the tokens that the soft top-k keeps, as in training
_STEPS = 64


class Scorer(nn.Module):
    """Score of a token: the mean of its query's products with the keys of all tokens.

    ``s_i = mean_j(q_i . k_j) / sqrt(hidden)`` as in VisionSelector (arXiv:2510.16598), which IDPruner uses. The mean
    goes into the product (``q_i . mean_j k_j``), so that no N x N matrix is made: O(N D) in all.

    Parameters
    ----------
    width
        D, of the projected tokens.
    hidden
        Of queries and keys; default D / 2.
    """

    def __init__(self, width: int, hidden: int | None = None):
        super().__init__()
        self.query = nn.Linear(width, hidden or width // 2)
        self.key = nn.Linear(width, hidden or width // 2)

    def forward(self, features: Tensor, lens: Sequence[int]) -> Tensor:
        """Score tokens.

        Parameters
        ----------
        features
            ``[T, D]``.
        lens
            Tokens of each pool; each token is compared with those of its pool. Broken rows (NaN, infinite) are not.

        Returns
        -------
        Tensor
            ``[T]``, in the dtype of the weights.
        """
        weight = self.query.weight
        scores = []
        start = 0
        for n in lens:
            # Rows of its own for each pool: products then round the same alone and in a batch.
            rows = features[start : start + n].to(weight.dtype, copy=True)
            start += n
            sound = rows.isfinite().all(1)
            mean = rows.masked_fill(~sound[:, None], 0.0).sum(0) / sound.sum().clamp(min=1)
            key = self.key(mean)
            scores.append((rows @ (weight.T @ key) + self.query.bias @ key) / weight.shape[0] ** 0.5)
        return torch.cat(scores) if scores else features.new_empty(0, dtype=weight.dtype)


def load(path: str) -> Scorer:
    """Read a scorer's weights, in fp32 on the CPU.

    Parameters
    ----------
    path
        A folder with a file ``scorer.safetensors``, the name of a model that ships with one (``"pocket-llava"``), or
        a safetensors file: with ``query.weight`` and ``key.weight`` ``[hidden, D]`` and ``query.bias`` and ``key.bias``
        ``[hidden]``, and nothing else.

    Raises
    ------
    ConfigError
        There is no such file, or it holds something else.
    """
    file = next((f for f in (Path(path), Path(path) / FILE, SHIPPED / path / FILE) if f.is_file()), None)
    if file is None:
        shipped = [folder.parent.name for folder in sorted(SHIPPED.glob(f"*/{FILE}"))]
        raise ConfigError(
            f"there is no scorer {path}; give the path of a safetensors file"
            + (f", or the name of a model that ships with one: {', '.join(shipped)}" if shipped else "")
        )
    state = weights_of(file, "scorer")
    first = state.get("query.weight", torch.empty(0, 0))
    hidden, width = first.shape if first.ndim == 2 else (0, 0)
    scorer = Scorer(width, hidden or 1)
    wanted = {name: tuple(p.shape) for name, p in scorer.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wanted != found:
        odd = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        raise ConfigError(f"{path} holds no scorer: {', '.join(odd[:4])} are missing, unknown or of another shape")
    scorer.load_state_dict(state)
    return scorer.requires_grad_(False).eval()


def weights_of(file: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises
    ------
    ConfigError
        It is no such file, or holds what is no weight, or NaN.
    """
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ConfigError(
            f"{file} is not a whole safetensors file ({error}); fetch or train the {what} again"
        ) from None
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ConfigError(f"{file} holds no {what}: {name} is {tensor.dtype}; weights are floating point")
        if not bool(tensor.float().isfinite().all()):
            raise ConfigError(f"{file} is spoilt: {name} has NaN or infinite values; train the {what} again")
    return state


def soft_topk(scores: Tensor, count: float | Tensor) -> Tensor:
    """Soft membership in the top `count`: ``sigmoid(s_i + t)`` with the t for which it sums to `count`.

    Parameters
    ----------
    scores
        ``[..., N]``; -inf stands for a token that is not there. Differentiable, through t as well.
    count
        Between 0 and N; one number, or one for each row.

    Returns
    -------
    Tensor
        ``[..., N]`` in [0, 1], in the dtype of the scores.
    """
    wide = scores.to(reference.wide(scores))
    there = wide.isfinite()
    total = there.sum(-1, keepdim=True)
    goal = torch.as_tensor(count, dtype=wide.dtype, device=scores.device)
    goal = goal[..., None] if goal.ndim else goal
    goal = goal.expand(total.shape).clamp(min=1e-4).minimum(total - 1e-4)
    with torch.no_grad():
        low = -wide.amax(-1, keepdim=True) - 10
        high = -wide.masked_fill(~there, torch.inf).amin(-1, keepdim=True) + 10
        # sigmoid(+-10) may not reach far enough where the goal is next to 0 or N: then the end of the bracket stands.
        for _ in range(_STEPS):
            middle = (low + high) / 2
            enough = torch.sigmoid(wide + middle).sum(-1, keepdim=True) > goal
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        shift = (low + high) / 2
        member = torch.sigmoid(wide + shift)
        slope = (member * (1 - member)).sum(-1, keepdim=True)
    if torch.is_grad_enabled() and scores.requires_grad:
        # One Newton step, which changes nothing but carries the gradient of t with respect to the scores.
        shift = shift - (torch.sigmoid(wide + shift).sum(-1, keepdim=True) - goal) / slope.clamp(min=1e-12)
        member = torch.sigmoid(wide + shift)
    return member.to(scores.dtype)


def soften(scores: Tensor, lens: Sequence[int]) -> Tensor:
    """`soft_topk` of a fifth of each pool, ``[T]`` fp32: what IDPruner's paper calls the importance. NaN stays NaN."""
    parts = scores.detach().float().split(list(lens))
    return torch.cat([
        soft_topk(part.nan_to_num(-torch.inf, posinf=-torch.inf), SHARE * len(part)).where(part.isfinite(), part)
        for part in parts
        if len(part)
    ] or [scores.new_empty(0, dtype=torch.float32)])  # fmt: skip
