"""What FASA reads from SGLang is what SGLang decided, not what the operator typed."""

from __future__ import annotations

import pytest
from sglang.srt.server_args import ServerArgs

from fasa_sglang.backend.host import attention_backends
from fasa_sglang.backend.served import uses_fasa


@pytest.mark.parametrize(
    ("flags", "pair"),
    [
        ({"attention_backend": "fasa"}, ("fasa", "fasa")),
        ({"decode_attention_backend": "fasa"}, (None, "fasa")),
        ({"prefill_attention_backend": "fasa"}, ("fasa", None)),
        (
            {"attention_backend": "fasa", "decode_attention_backend": "torch_native"},
            ("fasa", "torch_native"),
        ),
        (
            {"prefill_attention_backend": "fasa", "decode_attention_backend": "fasa"},
            ("fasa", "fasa"),
        ),
    ],
)
def test_attention_backends_split_flags_fall_back_to_the_common_one(
    flags: dict[str, str], pair: tuple[str | None, str | None]
) -> None:
    args = ServerArgs(model_path="dummy", **flags)
    assert attention_backends(args) == pair
    assert uses_fasa(args) == (pair[1] == "fasa")


def test_attention_backends_backend_that_sglang_replaces_is_not_fasa() -> None:
    """SGLang may choose another backend for a model; requests with fasa are then refused."""
    overrides = pytest.importorskip("sglang.srt.arg_groups.overrides")
    if not hasattr(overrides, "declare_resolution"):
        pytest.skip("this release writes its decisions into ServerArgs")
    args = ServerArgs(model_path="dummy", attention_backend="fasa")
    overrides.declare_resolution(args, "a model's override", attention_backend="flashinfer")
    assert args.attention_backend == "fasa"
    assert attention_backends(args) == ("flashinfer", "flashinfer")
    assert not uses_fasa(args)
