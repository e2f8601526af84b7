# SPDX-License-Identifier: Apache-2.0
"""What every family and every method must pass, against an independent reference."""
