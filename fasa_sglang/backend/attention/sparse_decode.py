"""A stand-in for FlashInfer's decode wrapper inside SGLang's FlashInfer backend.

The contract, since SGLang 0.5.17: ``FlashInferAttnBackend.forward_decode`` writes the new keys and
values to the pool, takes ``forward_metadata.decode_wrappers[i]`` and calls its ``forward(q,
kv_cache, sm_scale=, logits_soft_cap=, k_scale=, v_scale=)``. In a sparse step our backend replaces
the list by one ``SparseDecode``, so everything around the attention stays SGLang's own code.
"""

from __future__ import annotations

import torch

from fasa_sglang.backend.attention.compared_lanes import ComparedLanes, compared_lanes
from fasa_sglang.backend.attention.label_cache import LabelCache
from fasa_sglang.backend.step import LaneStep
from fasa_sglang.errors import UnsupportedHostError
from fasa_sglang.flashinfer_ext.planner import SparseIndexPlanner
from fasa_sglang.layer_plan import LayerPlan
from fasa_sglang.pruning.importance import DECAY, Importance


class SparseDecode:
    """The sparse steps of one batch size.

    Args:
        planner: Selects and attends.
        slots: Slot of every token, lane after lane, int32; the planner's index buffer.
        labels: Label cache of this rank.
        plan: Kind of every layer.
        importance: Selection averages, for lanes that prune.
        num_selecting: (layer, KV head) pairs of this rank that select.
        combine: How a group's query heads are combined; for comparison selectors.

    Attributes:
        layer: Layer of the model that ``forward`` is called for; the backend sets it before each
            call.
        sink_logits: The layer's attention sinks, ``[num_qo_heads]``; None if it has none. Set like
            ``layer``.
    """

    def __init__(
        self,
        planner: SparseIndexPlanner,
        slots: torch.Tensor,
        labels: LabelCache,
        plan: LayerPlan,
        importance: Importance,
        num_selecting: int,
        combine: str,
    ) -> None:
        self.planner, self.slots = planner, slots
        self._labels, self._plan, self._importance = labels, plan, importance
        self._num_selecting, self._combine = num_selecting, combine
        self._compared: list[ComparedLanes] = []
        self.layer = 0
        self.sink_logits: torch.Tensor | None = None

    def start(self, lanes: list[LaneStep], kv_lens: list[int], mixed: bool) -> None:
        """Plan the coming step.

        Args:
            lanes: The lanes of the batch; missing ones at the end are padding.
            kv_lens: Tokens of every lane, padding included.
            mixed: See ``SparseIndexPlanner.plan``.
        """
        self.planner.plan([lane.planner_lane for lane in lanes], kv_lens, mixed=mixed)
        self._compared = compared_lanes(lanes, self.slots)

    def forward(
        self,
        q: torch.Tensor,
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        sm_scale: float,
        logits_soft_cap: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
    ) -> torch.Tensor:
        """One layer's decode attention, called like FlashInfer's wrapper.

        Args:
            q: ``[batch_size, num_qo_heads, head_dim]``, contiguous.
            kv_cache: Keys and values, ``[num_slots, num_kv_heads, head_dim]`` each.
            sm_scale: Multiplies ``q @ k``.
            logits_soft_cap: Must be 0 or None.
            k_scale: Ignored: pools of scaled keys are refused at start.
            v_scale: Ignored, like ``k_scale``.

        Raises:
            UnsupportedHostError: The layer caps its logits.
        """
        if logits_soft_cap:
            raise UnsupportedHostError(
                f"FASA ranks tokens by plain logits, but layer {self.layer} caps them at "
                f"{logits_soft_cap}; serve this model with another attention backend"
            )
        stage = "dense attention"
        try:
            if not self._plan.selects(self.layer):
                return self.planner.run_dense(
                    q, kv_cache, sm_scale=sm_scale, sink_logits=self.sink_logits
                )
            stage = "token selection"
            self.planner.select(
                q,
                self._labels.layer(self.layer),
                sm_scale=sm_scale,
                selection_counts=self._importance.counts,
            )
            for group in self._compared:
                group.select_into(
                    self.planner.indices,
                    q,
                    kv_cache[0],
                    self._labels,
                    self.layer,
                    sm_scale=sm_scale,
                    combine=self._combine,
                )
            stage = "focused attention"
            return self.planner.attend(q, kv_cache, sm_scale=sm_scale, sink_logits=self.sink_logits)
        except Exception as error:
            error.add_note(
                f"FASA: {stage} in layer {self.layer}, queries {tuple(q.shape)} of {q.dtype}, "
                f"labels {tuple(self._labels.labels.shape)} of {self._labels.labels.dtype}"
            )
            raise

    def end_step(self) -> None:
        """Fold the step's selections into the averages of the lanes that prune."""
        if self._num_selecting:
            self.planner.update_averages(
                self._importance.counts, self._importance.average, self._num_selecting, DECAY
            )
