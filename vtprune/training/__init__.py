# SPDX-License-Identifier: Apache-2.0
"""Training of the methods that have weights of their own, on any supported checkpoint, which stays as it is."""
