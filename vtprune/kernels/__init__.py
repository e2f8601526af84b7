# SPDX-License-Identifier: Apache-2.0
"""Selection and scoring ops over flat ragged rows. `reference` holds each op in plain PyTorch, for any device."""
