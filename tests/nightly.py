"""What only ``make nightly`` does: the same tests over more cases, and random ones that are new each time."""

from __future__ import annotations

import os

NIGHTLY = os.environ.get("LOOKSAM_NIGHTLY", "") not in ("", "0")
