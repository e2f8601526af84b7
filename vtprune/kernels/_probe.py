# SPDX-License-Identifier: Apache-2.0
"""The smallest kernel: if it runs, others do."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(out):  # type: ignore[no-untyped-def]
    tl.store(out, 1)


def run(device: torch.device) -> None:
    """Compile and run the smallest kernel on a device."""
    with torch.cuda.device(device):
        _kernel[(1,)](torch.empty(1, dtype=torch.int32, device=device))
