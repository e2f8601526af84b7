# SPDX-License-Identifier: Apache-2.0
"""Vision transformers on their own."""
