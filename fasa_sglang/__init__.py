"""FASA for SGLang: decode long contexts by reading only the tokens that matter to the query.

With ``import fasa_sglang`` before or after ``import sglang``, SGLang programs can call
``sgl.gen("answer", fasa=True)``; see :mod:`fasa_sglang.frontend`.
"""

from fasa_sglang.after_import import after_import

__version__ = "0.1.0"


def _extend_frontend() -> None:
    from fasa_sglang.frontend import extend

    extend()


after_import("sglang", _extend_frontend)
