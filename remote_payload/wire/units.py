"""Quantities in words."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """`1.4 GB`, with decimal units as disks and links have them."""
    units = ["TB", "GB", "MB", "kB", "B"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop()
    return f"{count:.0f} {units[-1]}" if units[-1] == "B" or count >= 100 else f"{count:.1f} {units[-1]}"
