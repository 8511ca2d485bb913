"""Focused attention on FlashInfer: the only place that imports it."""
