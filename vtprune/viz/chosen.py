# SPDX-License-Identifier: Apache-2.0
"""From a selection to what the pictures are drawn from."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engine.report import ImageReport
    from ..tokens import Selection, VisualTokens


def chosen(tokens: VisualTokens, selection: Selection, image: int = 0) -> ImageReport:
    """What `vtprune.select` chose of one image or video, as `vtprune.report` would tell it after a forward.

    Parameters
    ----------
    tokens
        What `vtprune.encode` returned.
    selection
        What `vtprune.select` made of it.
    image
        Which image of the batch.
    """
    from ..engine.report import selection_reports

    return selection_reports(tokens, selection)[image]
