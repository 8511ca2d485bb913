"""Let SGLang fork its processes, where it would spawn them.

Every spawned process imports SGLang anew, which takes 14 seconds of CPU time; a forked one has it
already. Python runs this module at start in every process that has this folder in ``PYTHONPATH``,
which ``conftest.py`` sees to. Not for GPUs: a CUDA context does not survive a fork.
"""

import gc
import multiprocessing
import os

# pytest-xdist's workers run this module twice: at start, and from ``conftest.py``.
set_start_method = getattr(
    multiprocessing.set_start_method, "original", multiprocessing.set_start_method
)


def keep_start_method(*args, **kwargs):
    """What SGLang calls with "spawn"."""


keep_start_method.original = set_start_method
set_start_method("fork", force=True)
multiprocessing.set_start_method = keep_start_method
# A garbage collection in the child would otherwise visit, and so copy, all of the parent's objects.
os.register_at_fork(before=gc.freeze)
