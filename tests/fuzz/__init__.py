# SPDX-License-Identifier: Apache-2.0
"""Random cases against the invariants: `choices` (tensors alone), `prompts` (whole models), `readers` (bytes, text)."""
