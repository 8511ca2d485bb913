"""A platform that runs SGLang on a CPU without sgl-kernel, for the torch backend."""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class FasaCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """An out-of-tree CPU platform; SGLang's own needs sgl-kernel built for the CPU.

    Triton and CUDA graphs are off, which is SGLang's default for every platform.
    """

    _enum = PlatformEnum.OOT
    device_name = "fasa_cpu"
    device_type = "cpu"

    def is_pin_memory_available(self, device: object = None) -> bool:
        """Return False: there is no device to pin host memory for."""
        return False

    def get_default_attention_backend(self) -> str:
        """Return SGLang's torch backend, the one used without ``--attention-backend fasa``."""
        return "torch_native"

    if not hasattr(SRTPlatform, "get_kv_pool_cls"):  # SGLang 0.5.17 has no defaults for these.

        def get_mha_kv_pool_cls(self) -> type:
            """Return SGLang's pool, which stores by indexing on a CPU."""
            from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

            return MHATokenToKVPool

        def get_paged_allocator_cls(self) -> type:
            """Return SGLang's allocator for pages of several tokens."""
            from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

            return PagedTokenToKVPoolAllocator
