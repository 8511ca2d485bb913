"""Slots of sliding windows in decode steps."""

from __future__ import annotations

from typing import Any

import torch


class WindowSlots:
    """Translates slots to the pool of sliding windows without waiting for the GPU.

    SGLang's window wrapper gets slots of the full pool, which SGLang then translates. To learn how
    many there are it reads the end of ``kv_indptr`` back from the GPU, twice a step, so the host
    waits for the previous step, and the GPU for the next plan: over a millisecond a step on an
    H200. The lengths on the host say the same.

    Args:
        backend: SGLang's FlashInfer backend. Its decode planner no longer translates.
    """

    def __init__(self, backend: Any) -> None:
        updater = backend.indices_updater_decode
        translator = getattr(backend, "kv_index_translator", None)
        self._pool = None
        self._window: int | None = updater.sliding_window_size
        # SGLang's unified pool translates while it gathers.
        if not getattr(translator, "reads_are_translated", False):
            self._pool, updater._swa_kv_pool = updater._swa_kv_pool, None

    def translate(self, wrapper: Any, forward_batch: Any) -> None:
        """Translate the slots of a planned decode step.

        Args:
            wrapper: SGLang's decode wrapper for windows.
            forward_batch: SGLang's ``ForwardBatch``.
        """
        if self._pool is None:
            return
        assert self._window is not None
        lens = forward_batch.seq_lens_cpu[: forward_batch.batch_size]
        count = int(torch.clamp(lens, max=self._window + 1).sum())
        slots = wrapper._paged_kv_indices_buf[:count]
        slots.copy_(self._pool.translate_loc_from_full_to_swa(slots))
