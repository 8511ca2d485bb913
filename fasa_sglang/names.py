"""Names that several packages share, or under which FASA leaves things in SGLang."""

BACKEND_NAME = "fasa"
"""The attention backend, as ``--attention-backend`` takes it."""

PLATFORM_NAME = "fasa_cpu"
"""The CPU platform, as ``SGLANG_PLATFORM`` takes it."""

META_KEY = "fasa"
"""The switch in a request's parameters and the report in its reply's ``meta_info``."""

REQ_ATTRIBUTE = "fasa"
"""Attribute of SGLang's ``Req`` that holds the request's ``RequestState``."""

POOL_ATTRIBUTE = "fasa_pruner"
"""Attribute of SGLang's ``ReqToTokenPool`` that holds the model runner's ``Pruner``."""

RUNNER_ATTRIBUTE = "fasa_backend"
"""Attribute of SGLang's ``ModelRunner`` that holds the attention backend that FASA built for it."""
