# SPDX-License-Identifier: Apache-2.0
"""``python -m vtprune`` is the ``vtprune`` command."""

import sys

from .cli import main

sys.exit(main())
