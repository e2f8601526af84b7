# SPDX-License-Identifier: Apache-2.0
"""What a configuration is called in a server; docs/serving.md says what cannot go there, and why."""

from __future__ import annotations

from .config import PruneConfig
from .errors import ConfigError

#: The methods that vLLM has too.
VLLM_METHODS = ("evs", "vidcom2")


def vllm_flags(config: PruneConfig) -> list[str]:
    """The arguments of ``vllm serve`` that prune clips as `config` does.

    Counts are the same for clips longer than ``1 / keep`` frames; which tokens stay may differ (docs/serving.md).

    Parameters
    ----------
    config
        With one of `VLLM_METHODS` and a fraction to keep.

    Returns
    -------
    list of str
        ``--video-pruning-rate``, the fraction removed, and ``--video-pruning-method``; empty where nothing is pruned.

    Raises
    ------
    ConfigError
        vLLM has no such method, or no such budget.

    Examples
    --------
    >>> vllm_flags(PruneConfig(method="evs", keep=0.25))
    ['--video-pruning-rate', '0.75', '--video-pruning-method', 'evs']
    """
    if config.keep == 1.0 and isinstance(config.keep, float) and config.tower_keep == 1.0:
        return []
    if config.method not in VLLM_METHODS:
        raise ConfigError(
            f"vLLM has no method {config.method!r}; export {' or '.join(VLLM_METHODS)}, or serve the model with "
            "transformers and vtprune.apply"
        )
    if not isinstance(config.keep, float):
        raise ConfigError(f"keep={config.keep!r} is not a fraction, and vLLM takes nothing else; give keep=0.25, say")
    usual = PruneConfig(method=config.method, keep=config.keep)
    changed = [name for name in ("scope", "allocation", "tower_keep") if getattr(config, name) != getattr(usual, name)]
    if changed:
        raise ConfigError(
            f"vLLM cannot change {' and '.join(changed)} of {config.method!r}; leave out what you changed"
        )
    rate = f"{1 - config.keep:.6g}"
    if 1 - float(rate) < config.keep:  # vLLM rounds down what is left: 1/9 of 576 tokens would be 63
        rate = f"{1 - config.keep - 1e-6:.6f}"
    return ["--video-pruning-rate", rate, "--video-pruning-method", str(config.method)]
