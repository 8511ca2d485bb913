"""Train an adapter with which a model works programs off."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fasa_sglang.workloads.eval.worksheet.batches import Batch, draw_batch
from fasa_sglang.workloads.eval.worksheet.loss import batch_loss
from fasa_sglang.workloads.models.adapters import load_adapter, restore, save_adapter
from fasa_sglang.workloads.models.lora import LoraLinear, attach

WARM_UP = 0.03
# Until this share of the time has passed, replies grow to their full length.
GROWTH = 0.25
MAX_NORM = 1.0
REPORT_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train.

    Args:
        minutes: When to stop.
        adapter: The file to write; if it exists, training continues with it.
        base: Identity of the base model, which the file names.
        lengths: Lengths of replies in tokens, rising; once all are drawn, each is as often.
        batch_tokens: Tokens of a step.
        learning_rate: The highest; it follows the time that has passed.
        attention_rank: Rank of adapters of attention.
        mlp_rank: Rank of adapters of MLPs.
        save_minutes: How often to write the file.
        max_steps: Stop after so many steps, if the time is not up before.
    """

    minutes: float
    adapter: Path
    base: str
    lengths: Sequence[int] = (512, 1024, 2048, 4096, 8192)
    batch_tokens: int = 32768
    learning_rate: float = 5e-4
    attention_rank: int = 16
    mlp_rank: int = 6
    save_minutes: float = 2.0
    max_steps: int | None = None


def train(model: Any, tokenizer: Any, training: Training) -> dict[str, LoraLinear]:
    """Train until the time is up, printing the loss, and write the adapter.

    Args:
        model: A causal language model of transformers, on its device; its weights stay as they are.
        tokenizer: Its tokenizer.
        training: How to train.

    Returns:
        The adapted layers, which are in the model.

    Raises:
        FasaError: The file to continue with is not an adapter of these layers and ranks.
    """
    torch.manual_seed(0)
    adapters = attach(model, training.attention_rank, training.mlp_rank)
    # A continued training draws other programs than the one before.
    seed = "training"
    if training.adapter.exists():
        restore(adapters, load_adapter(training.adapter))
        seed = f"training-{training.adapter.stat().st_mtime_ns}"
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    device = next(model.parameters()).device
    factors = [factor for layer in adapters.values() for factor in (layer.down, layer.up)]
    optimiser = torch.optim.AdamW(factors, lr=training.learning_rate, weight_decay=0.0)
    clock = _Clock(training.minutes * 60)
    saved, tokens, losses = 0.0, 0, []
    for step, batch in enumerate(_batches(seed, tokenizer, training, clock), start=1):
        for group in optimiser.param_groups:
            group["lr"] = training.learning_rate * learning_rate_factor(clock.share)
        loss = batch_loss(model, Batch(batch.ids.to(device), batch.targets.to(device)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(factors, MAX_NORM)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        tokens += batch.ids.numel()
        if step % REPORT_STEPS == 0:
            mean = sum(losses[-REPORT_STEPS:]) / REPORT_STEPS
            speed = tokens / clock.seconds
            text = f"step {step}, {clock.seconds:.0f} s, loss {mean:.5f}, {speed:.0f} tokens/s"
            print(text, flush=True)
        if clock.seconds - saved > training.save_minutes * 60:
            save_adapter(training.adapter, training.base, adapters)
            saved = clock.seconds
    save_adapter(training.adapter, training.base, adapters)
    return adapters


def learning_rate_factor(share: float) -> float:
    """A linear warm-up, then half a cosine down to 0, by the share of the time that has passed."""
    if share < WARM_UP:
        return (share + 1e-3) / (WARM_UP + 1e-3)
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (share - WARM_UP) / (1 - WARM_UP)))


class _Clock:
    """Time since the first step, which comes after slow preparations."""

    def __init__(self, limit: float) -> None:
        self.limit, self.start = limit, time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    @property
    def share(self) -> float:
        return self.seconds / self.limit


def _batches(seed: str, tokenizer: Any, training: Training, clock: _Clock) -> Iterator[Batch]:
    """Batches until the time is up; the next one is drawn during a step."""
    lengths = training.lengths

    def draw(step: int) -> Batch:
        grown = 1 + int(clock.share / GROWTH * len(lengths))
        reply_len = random.Random(f"{seed}-{step}").choice(lengths[:grown])
        return draw_batch(f"{seed}-{step}", tokenizer, reply_len, training.batch_tokens)

    with ThreadPoolExecutor(1) as pool:
        step = 0
        following = pool.submit(draw, step)
        while clock.share < 1 and (training.max_steps is None or step < training.max_steps):
            batch = following.result()
            step += 1
            following = pool.submit(draw, step)
            yield batch
