# SPDX-License-Identifier: Apache-2.0
"""The only place that hooks a model. `vtprune.api` is its front door."""

from .attach import force_pack

__all__ = ["force_pack"]
