# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a pruner kept and dropped, and of what visual tokens say. NumPy and Pillow only.

>>> from vtprune import viz
>>> tokens = vtprune.encode(model, inputs)
>>> chosen = viz.chosen(tokens, vtprune.select(tokens, "idpruner", keep=0.25))
>>> viz.overlay(viz.seen_image(processor, inputs, image), chosen, "idpruner").save("kept.png")
"""

from .chosen import chosen
from .compare import compare
from .draw import overlay
from .order import order
from .seen import seen_image
from .strip import video_strip
from .words import lens, lens_page

__all__ = ["chosen", "compare", "lens", "lens_page", "order", "overlay", "seen_image", "video_strip"]
