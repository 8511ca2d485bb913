"""Words that name the objects of made-up facts: "the amber door", "the coral vault"."""

from __future__ import annotations

COLOURS = ["amber", "azure", "black", "coral", "green", "ivory", "khaki", "lilac", "olive", "white"]
THINGS = [
    "anchor",
    "basket",
    "cabinet",
    "door",
    "engine",
    "folder",
    "garage",
    "locker",
    "safe",
    "vault",
]
PLACES = [
    "attic",
    "barn",
    "cabin",
    "depot",
    "garage",
    "harbour",
    "kiosk",
    "library",
    "mill",
    "vault",
]
