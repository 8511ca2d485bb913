"""Check on real keys that a layer rotates its heads as its rotary module was measured to.

A model may have a rotary module that a layer does not use, as SmolLM3 has in every fourth layer.
Attention depends on the distance of positions alone. So where a text is prefilled again one
position further, every key must be the earlier one, rotated by one position more.
"""

from __future__ import annotations

import torch

from fasa_sglang.rope import Rotation

MIN_ANGLE = 0.1
"""Pairs that turn by less than this per position, in radians, tell little about one position."""

MAX_ERROR = 0.25
"""Largest distance from the expected keys, as a share of the distance of unrotated keys.

Rounding in bfloat16 adds up over layers; keys that rotate otherwise are off by about 1.
"""


def rotates(before: torch.Tensor, after: torch.Tensor, rotation: Rotation) -> bool:
    """Whether keys turn as expected when their text moves by one position.

    Args:
        before: Keys of a text, ``[tokens, heads, head_dim]``.
        after: Keys of the same text one position further.
        rotation: How the layer should rotate its heads.
    """
    fast = [
        pair
        for pair, angle in zip(rotation.pairs, rotation.angles, strict=True)
        if abs(angle) > MIN_ANGLE
    ]
    dims = torch.tensor(fast or rotation.pairs).flatten()
    step = (rotation.matrix(1) / rotation.scale).float()
    before, after = (keys.float().cpu() for keys in (before, after))
    expected = before @ step
    error = (after - expected)[..., dims].norm(dim=-1).median()
    moved = (before - expected)[..., dims].norm(dim=-1).median()
    return bool(error <= MAX_ERROR * moved)
