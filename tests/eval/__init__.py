# SPDX-License-Identifier: Apache-2.0
"""Tests of tasks, controls, runner and statistics."""
