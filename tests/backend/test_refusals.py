"""The tables of what FASA refuses at start; test_startups.py starts servers for every row."""

from __future__ import annotations

from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from fasa_sglang.backend import refusals
from fasa_sglang.backend.refusals import ENVIRONMENT, FLAGS, ONLY_IN_SOME_RELEASES
from fasa_sglang.errors import UnsupportedHostError
from fasa_sglang.ops.label_format import LABEL_FORMATS
from forked_servers import known

# A value that FASA does not work with, for flags that are not switches. SGLang resolves no flags of
# the model path "dummy", so all of them reach the check as they are.
UNSUPPORTED = {
    "speculative_algorithm": "EAGLE",
    "dllm_algorithm": "LowConfidence",
    "hicache_storage_backend": "file",
    "radix_cache_backend": "custom",
    "disaggregation_mode": "decode",
    "dcp_size": 2,
    "attn_cp_size": 2,
    "tokenizer_worker_num": 2,
}


@pytest.mark.parametrize("name", [*FLAGS, *ENVIRONMENT])
def test_table_names_something_that_the_installed_sglang_knows(name: str) -> None:
    if name in ONLY_IN_SOME_RELEASES and not known(name):
        pytest.skip(f"this release has no {name}")
    assert known(name)


@pytest.mark.parametrize("name", FLAGS)
def test_require_flags_unsupported_value_is_refused_with_the_reason(name: str) -> None:
    if not known(name):
        pytest.skip(f"this release has no {name}")
    supported, reason = FLAGS[name]
    value: Any = UNSUPPORTED.get(name, not supported)
    args = ServerArgs(model_path="dummy", **{name: value})
    with pytest.raises(UnsupportedHostError) as refused:
        refusals.require_flags(args)
    assert str(refused.value).startswith(f"FASA does not work with {name}={value!r} ({reason});")


def test_require_flags_default_flags_pass() -> None:
    refusals.require_flags(ServerArgs(model_path="dummy"))


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_require_environment_unsupported_value_is_refused_with_the_reason(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known(name):
        pytest.skip(f"this release has no {name}")
    refusals.require_environment()
    monkeypatch.setenv(name, "1")
    with pytest.raises(UnsupportedHostError, match=f"{name}=True in the environment"):
        refusals.require_environment()


def test_require_flags_name_that_no_release_knows_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A flag that SGLang renames must not switch its refusal off."""
    monkeypatch.setitem(FLAGS, "enable_renamed_cache", (False, "it is gone"))
    with pytest.raises(UnsupportedHostError, match="does not know enable_renamed_cache"):
        refusals.require_flags(ServerArgs(model_path="dummy"))
    monkeypatch.delitem(FLAGS, "enable_renamed_cache")
    monkeypatch.setitem(ENVIRONMENT, "SGLANG_RENAMED", (False, "it is gone"))
    with pytest.raises(UnsupportedHostError, match="does not know SGLANG_RENAMED"):
        refusals.require_environment()


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0)])
@pytest.mark.parametrize("label_dtype", ["fp8", "bf16"])
def test_require_capability_refuses_fp8_labels_below_8_9(
    label_dtype: str, capability: tuple[int, int]
) -> None:
    if label_dtype == "bf16" or capability >= (8, 9):
        refusals.require_capability(label_dtype, capability)
        return
    with pytest.raises(UnsupportedHostError) as refused:
        refusals.require_capability(label_dtype, capability)
    assert str(refused.value) == (
        "fp8 labels need a GPU of compute capability 8.9 or higher, got "
        f"{capability[0]}.{capability[1]}; set label_dtype to 'bf16' in the server's fasa settings"
    )


@pytest.mark.parametrize("label_dtype", LABEL_FORMATS)
def test_require_capability_where_no_format_works_names_another_backend(label_dtype: str) -> None:
    with pytest.raises(UnsupportedHostError, match=r"got 7\.5; use another attention backend"):
        refusals.require_capability(label_dtype, (7, 5))
