# SPDX-License-Identifier: Apache-2.0
"""The picture that the model saw, which may be a crop of the one that was given."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image


def seen_image(processor: Any, inputs: Any, image: Image.Image, index: int = 0) -> Image.Image:
    """The part of `image` that the visual tokens cover, so that patches drawn on it line up.

    CLIP-type processors cut the centre out of a picture that is not square. There the pixels that went into the model
    are turned back into a picture. Processors that tile a picture (AnyRes) or keep its shape (Qwen) show all of it,
    and report their boxes in fractions of it; there `image` itself is returned.

    Parameters
    ----------
    processor
        The model's processor, or its image processor.
    inputs
        What the processor made of the picture: a mapping with ``pixel_values``.
    image
        The picture that was given to the processor.
    index
        Which picture of `inputs`, where there are several.

    Returns
    -------
    PIL.Image.Image
        An RGB picture.
    """
    image_processor = getattr(processor, "image_processor", processor)
    pixels = inputs.get("pixel_values")
    # [N, 3, H, W] is one view per picture; AnyRes has five dimensions, Qwen's flattened patches two.
    if pixels is None or pixels.ndim != 4:
        return image.convert("RGB")
    values = pixels[index].detach().float().cpu().numpy().transpose(1, 2, 0)
    if getattr(image_processor, "do_normalize", False):
        values = values * np.asarray(image_processor.image_std) + np.asarray(image_processor.image_mean)
    if getattr(image_processor, "do_rescale", True):
        values = values / image_processor.rescale_factor
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8), "RGB")
