"""Rules that rank tokens: FASA's own and those it is compared with, one module each.

To add a selector, add a module with a subclass of ``Selector``; the setting ``selector``, the
documentation and the tests read the registry.
"""

from __future__ import annotations

import importlib
import pkgutil

from fasa_sglang.selectors.base import REGISTRY, DecodeView, Selector

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

SELECTORS: dict[str, Selector] = dict(sorted(REGISTRY.items()))
"""Every selector by name."""

__all__ = ["SELECTORS", "DecodeView", "Selector"]
