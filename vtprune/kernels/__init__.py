# SPDX-License-Identifier: Apache-2.0
"""Selection and scoring ops over flat ragged rows: Triton kernels, and the same in plain PyTorch for any device.

Pruners call the ops of this package; each has ``backend="auto"``, which `dispatch.resolve` turns into what can run.
"""
