"""What FASA's backends share: the label cache and what each lane of a batch is to do."""

from __future__ import annotations

import enum
import logging
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel

from fasa_sglang.backend.host import load_dominant_fcs
from fasa_sglang.backend.label_cache import LabelCache
from fasa_sglang.backend.memory import POOL_ATTRIBUTE, Memory
from fasa_sglang.backend.metrics import Usage
from fasa_sglang.backend.step import LaneStep
from fasa_sglang.config import FasaConfig

logger = logging.getLogger(__name__)


class Variant(enum.Enum):
    """What the lanes of a decode batch do."""

    DENSE = "dense"
    """All attend to everything."""
    SPARSE = "sparse"
    """All select."""
    MIXED = "mixed"
    """Some select, or attend to their whole prompt and select the rest."""


class FasaBackend:
    """Mixed into an attention backend of SGLang.

    Attributes:
        config: The server's settings.
        lanes: One entry per request of the coming decode batch, set before each forward pass;
            empty for every other batch.
        num_layers: Layers of the whole model.
        label_cache: Labels of this rank's layers and heads.
        usage: Counts what requests do.
        memory: Prunes requests that ask for it.
        variants: Kinds of decode batches that get CUDA graphs of their own; none without graphs.
        variant: Kind of the coming batch.
        capturing: The kind that graphs are being captured for, else None.
    """

    variants: tuple[Variant, ...] = ()
    variant = Variant.DENSE
    capturing: Variant | None = None

    def start_fasa(self, runner: Any, config: FasaConfig) -> None:
        """Load the calibration and make room for labels.

        Raises:
            FasaError: The calibration is missing, broken or of another model.
        """
        self.config = config
        self.lanes: list[LaneStep] = []
        dominant, num_fcs = load_dominant_fcs(runner.model_config)
        self.num_layers = dominant.model.num_layers
        parallel = get_parallel()
        pool = runner.token_to_kv_pool
        self.first_layer = pool.start_layer
        self.last_layer = pool.start_layer + pool.layer_num - 1
        self.label_cache = LabelCache(
            pool.k_buffer,
            dominant.for_rank(parallel.attn_tp_rank, parallel.attn_tp_size),
            self.first_layer,
            num_fcs,
            config.label_dtype,
        )
        labels = self.label_cache.labels
        self.usage = Usage(runner.server_args, labels.nbytes, parallel.attn_tp_rank == 0)
        self.memory = Memory(config, labels.shape[1], labels.device, self.usage)
        setattr(runner.req_to_token_pool, POOL_ATTRIBUTE, self.memory)
        kv_bytes = sum(buffer.nbytes for buffer in (*pool.k_buffer, *pool.v_buffer))
        logger.info(
            "FASA: %s, %s, selector %s, budget %d of at most %d, sink %d, recent %d, %d of %d "
            "frequency chunks, combine %s, %d dense layers, sparse from %d tokens, default %s, "
            "calibration %s",
            dominant.model.architecture,
            type(self).__name__,
            config.selector,
            config.budget,
            config.max_budget,
            config.sink,
            config.recent,
            num_fcs,
            dominant.model.rope.num_chunks,
            config.combine,
            config.num_dense_layers,
            config.min_seq_len,
            config.default,
            config.calibration,
        )
        logger.info(
            "FASA: the pool holds %d tokens; without FASA its memory would hold %d (%s labels: "
            "%.0f MiB beside %.0f MiB of keys and values)",
            pool.size,
            int(pool.size * (1 + labels.nbytes / kv_bytes)),
            config.label_dtype,
            labels.nbytes / 2**20,
            kv_bytes / 2**20,
        )

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """SGLang's dense prefill; the last layer labels the new keys of all layers."""
        out = super().forward_extend(  # type: ignore[misc]
            q, k, v, layer, forward_batch, *args, **kwargs
        )
        self.write_labels(layer, forward_batch)
        return out

    def write_labels(self, layer: Any, forward_batch: Any) -> None:
        """Label the new keys of all layers once the last one has stored its own.

        Until then a step reads no label of its own token, which is always selected.
        """
        if layer.layer_id == self.last_layer:
            self.label_cache.write(forward_batch.out_cache_loc)

    @property
    def num_selectors(self) -> int:
        """(layer, KV head) pairs of this rank that select."""
        layers = range(self.first_layer, self.last_layer + 1)
        selecting = sum(layer >= self.config.num_dense_layers for layer in layers)
        return selecting * self.label_cache.labels.shape[2]

    def is_dense(self, layer: Any) -> bool:
        """Whether a layer attends to everything in every lane."""
        return layer.layer_id < self.config.num_dense_layers
