# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a pruner kept and dropped. NumPy and Pillow only."""

from .draw import overlay
from .seen import seen_image

__all__ = ["overlay", "seen_image"]
