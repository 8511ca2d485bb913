"""Times of GPU work, as medians of CUDA graph replays."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

REPEATS = 30


def replay_us(work: Callable[[], object], copies: int) -> float:
    """Median time of ``work`` in microseconds.

    Args:
        work: Launches the kernels; must be capturable in a CUDA graph.
        copies: How often to repeat it inside the graph, so that the cost of a replay is hidden.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(copies):
            work()
    graph.replay()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / copies)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written by a large copy, in TB/s: the memory bandwidth to expect."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / replay_us(lambda: target.copy_(source), 4) / 1e6
