"""The bound by which admission reserves slots for a request that prunes."""

from __future__ import annotations

from array import array

import pytest
import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from fasa_sglang.backend.admission import max_growth
from fasa_sglang.backend.pruner import Pruner
from fasa_sglang.config import FasaConfig
from fasa_sglang.layer_plan import LayerKind, LayerPlan
from fasa_sglang.pruning.policy import num_victims, prunable_range
from fasa_sglang.requests import parse_request


def peak_live_tokens(config: FasaConfig, fasa: dict[str, object], prompt_len: int) -> int:
    """Most generated tokens with a slot in a reply of 6,000, by the rules of pruning."""
    request = parse_request({"fasa": fasa}, config, prompt_len)
    assert request is not None
    scored_from = max(config.min_seq_len, prompt_len + 1) - 1
    pruned = peak = 0
    for seq_len in range(prompt_len + 1, prompt_len + 6000):
        peak = max(peak, seq_len - prompt_len - pruned)
        if seq_len <= scored_from:
            continue
        lengths = {"seq_len": seq_len, "think_end": None}
        start, end = prunable_range(
            request,
            config,
            prompt_len=prompt_len,
            protected_len=prompt_len,
            scored_from=scored_from,
            **lengths,
        )
        pruned += num_victims(request, config, pruned=pruned, start=start, end=end, **lengths)
    return peak


@pytest.mark.parametrize("prompt_len", [10, 1000, 5000])
@pytest.mark.parametrize("prune_budget", [512, 4096])
def test_max_growth_of_a_new_request_bounds_its_live_tokens(
    prompt_len: int, prune_budget: int
) -> None:
    """With default settings: a dense phase and the grace precede the first pruning."""
    config = FasaConfig(prune_admission=True)
    fasa = {"prune": "generated", "prune_budget": prune_budget}
    params = SamplingParams(max_new_tokens=6000, custom_params={"fasa": fasa})
    req = Req("rid", "", array("q", [5] * prompt_len), params)
    plan = LayerPlan.of_model([LayerKind.SELECTS] * 2, 1)
    pruner = Pruner(config, plan, 8, torch.device("cpu"), usage=None)
    bound = max_growth(pruner, req)
    peak = peak_live_tokens(config, fasa, prompt_len)
    assert bound is not None and peak <= bound <= peak + config.prune_interval + 2
    req.sampling_params.custom_params = {"fasa": True}
    assert max_growth(pruner, req) is None, "a request that does not prune has no bound"
