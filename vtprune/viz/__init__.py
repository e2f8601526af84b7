# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a pruner kept and dropped, and of what visual tokens say. NumPy and Pillow only."""

from .draw import overlay
from .lens import lens_page, lens_picture
from .seen import seen_image

__all__ = ["lens_page", "lens_picture", "overlay", "seen_image"]
