# SPDX-License-Identifier: Apache-2.0
"""The lens: probe, calibration, interventions, patch compression."""
