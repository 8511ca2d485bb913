"""Base of FASA's attention backends: the label cache and the plan of each lane of a batch."""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel

from fasa_sglang.backend.attention.label_cache import LabelCache
from fasa_sglang.backend.attention.query_samples import QuerySamples
from fasa_sglang.backend.attention.variant import Variant
from fasa_sglang.backend.host import (
    full_attention_backend,
    full_attention_pool,
    heads_of_rank,
)
from fasa_sglang.backend.metrics import Usage, counts_requests
from fasa_sglang.backend.pruner import Pruner
from fasa_sglang.backend.served_model import served_model
from fasa_sglang.backend.step import LaneStep, launch_step
from fasa_sglang.config import FasaConfig
from fasa_sglang.dominant_fcs import DominantFCs
from fasa_sglang.errors import UnsupportedHostError
from fasa_sglang.names import POOL_ATTRIBUTE, RUNNER_ATTRIBUTE
from fasa_sglang.ops.label_format import LABEL_FORMATS

logger = logging.getLogger(__name__)


class FasaBackend:
    """Mixin for an SGLang attention backend; comes before it in the list of base classes.

    Attributes:
        config: The server's settings.
        plan: Which layers of this pipeline stage select tokens and which are dense.
        lanes: One entry per row of the coming decode batch, set before each forward pass; empty
            for any other batch.
        label_cache: Labels of this rank's layers and KV heads.
        calibrated: Whether the label cache has its calibration.
        sampling: Takes the queries of a calibration's text; None at all other times.
        usage: Step and request counters.
        pruner: Frees KV slots of requests that prune.
        has_variants: Whether the backend captures one CUDA graph per batch size and ``Variant``.
        variant: Variant of the coming batch.
        capturing: Variant whose graphs are being captured; None outside capture.
    """

    has_variants = False
    variant = Variant.DENSE
    capturing: Variant | None = None

    def start_fasa(self, runner: Any, config: FasaConfig) -> None:
        """Allocate the label cache, and use the calibration if there is one.

        Args:
            runner: SGLang's ``ModelRunner``, its KV pool allocated.
            config: The server's settings.
        """
        self.config = config
        self.lanes: list[LaneStep] = []
        self.sampling: QuerySamples | None = None
        model = served_model(runner.model_config)
        self.plan = model.plan
        pool = full_attention_pool(runner.token_to_kv_pool)
        num_qo_heads, num_kv_heads = heads_of_rank(runner.model_config)
        self.label_cache = LabelCache(
            {layer: runner.token_to_kv_pool.get_key_buffer(layer) for layer in self.plan.selecting},
            pool.size + pool.page_size,
            num_kv_heads,
            num_qo_heads,
            model.shape.rotation.head_dim,
            model.num_fcs,
            LABEL_FORMATS[config.label_dtype],
            runner.device,
        )
        labels = self.label_cache.labels
        self.usage = Usage(runner.server_args, labels.nbytes, counts_requests(get_parallel()))
        self.pruner = Pruner(config, self.plan, labels.shape[1], labels.device, self.usage)
        setattr(runner.req_to_token_pool, POOL_ATTRIBUTE, self.pruner)
        setattr(runner, RUNNER_ATTRIBUTE, self)
        kv_bytes = sum(buffer.nbytes for buffer in (*pool.k_buffer, *pool.v_buffer))
        logger.info(
            "FASA: %s, %s, selector %s, budget %d (at most %d), sink %d, recent %d, %d of %d "
            "frequency chunks, combine %s, %d dense layers, sparse from %d tokens, default %s, "
            "calibration %s",
            model.shape.architecture,
            type(self).__name__,
            config.selector,
            config.budget,
            config.max_budget,
            config.sink,
            config.recent,
            model.num_fcs,
            model.shape.rotation.num_chunks,
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
        self.calibrated = False
        if model.calibration is not None:
            self.use_calibration(model.calibration)

    def use_calibration(self, dominant: DominantFCs) -> None:
        """Select by a calibration from now on; layers that it leaves out stay dense.

        Args:
            dominant: The calibration of the whole model.
        """
        parallel = get_parallel()
        self.label_cache.use(dominant.for_rank(parallel.attn_tp_rank, parallel.attn_tp_size))
        self.plan = self.plan.only(dominant.model.layers)
        self.calibrated = True

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
        """SGLang's dense prefill; shows its queries while the model is calibrated.

        Arguments and result are those of SGLang's ``AttentionBackend.forward_extend``.
        """
        if self.sampling is not None:
            self.sampling.take(layer, q, forward_batch)
        return super().forward_extend(  # type: ignore[misc]
            q, k, v, layer, forward_batch, *args, **kwargs
        )

    def write_labels(self, layer: Any, forward_batch: Any) -> None:
        """Label a decode step's keys of all layers, once the last layer has stored its keys.

        One write per step is enough: a step never needs the label of the current token, which is
        always selected.
        """
        if layer.layer_id == self.plan.last:
            self.label_cache.write(forward_batch.out_cache_loc)

    @property
    def num_selecting(self) -> int:
        """Number of (layer, KV head) pairs of this rank that select tokens."""
        return len(self.plan.selecting) * self.label_cache.labels.shape[2]


def plan_step(result: Any, cls: Any, batch: Any, model_runner: Any, **kwargs: Any) -> None:
    """Set the lanes of the coming forward pass; a hook on ``ForwardBatch.init_new``.

    Raises:
        UnsupportedHostError: SGLang wrapped or replaced the backend, so no lane could be sparse.
    """
    backend = full_attention_backend(model_runner)
    if isinstance(backend, FasaBackend):
        backend.lanes = launch_step(batch, backend.config, backend.plan, backend.usage)
        backend.pruner.start_averages(batch, backend.lanes)
    elif hasattr(model_runner, RUNNER_ATTRIBUTE):
        raise UnsupportedHostError(
            f"SGLang runs {type(backend).__name__} in place of FASA's attention backend; FASA "
            "does not work with this model or these flags; use another --attention-backend"
        )
