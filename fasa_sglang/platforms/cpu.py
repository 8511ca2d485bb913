"""SGLang on a CPU without sgl-kernel: enough platform for the reference backend to serve."""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class FasaCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Out-of-tree CPU platform; SGLang's own needs a build of sgl-kernel for the CPU.

    Triton and graphs stay off, which is SGLang's default answer for every platform.
    """

    _enum = PlatformEnum.OOT
    device_name = "fasa_cpu"
    device_type = "cpu"

    def is_pin_memory_available(self, device: object = None) -> bool:
        """No device to pin host memory for."""
        return False

    def get_default_attention_backend(self) -> str:
        """SGLang's torch backend; FASA stays a choice (``--attention-backend fasa``)."""
        return "torch_native"

    if not hasattr(SRTPlatform, "get_kv_pool_cls"):  # SGLang 0.5.17 has no default of its own

        def get_mha_kv_pool_cls(self) -> type:
            """SGLang's own pool, which stores with plain indexing on a CPU."""
            from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

            return MHATokenToKVPool

        def get_paged_allocator_cls(self) -> type:
            """SGLang's own allocator, for servers with pages of several tokens."""
            from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

            return PagedTokenToKVPoolAllocator
