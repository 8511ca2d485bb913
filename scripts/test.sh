#!/usr/bin/env bash
# Run ruff, mypy and pytest, with all the set-up that they need. Requires Python 3.11 or newer.
#   bash scripts/test.sh          slow tests run a small sample
#   bash scripts/test.sh --all    all tests, slow ones in full (more than an hour on two cores)
# Other arguments go to pytest.
cd "$(dirname "$0")/.."
. scripts/environment.sh
ruff check .
ruff format --check .
# From another folder, so that mypy sees the installed package instead of a part of it here.
(cd "$FASA_VENV" && mypy --config-file "$OLDPWD/pyproject.toml" -p fasa_sglang)
# Triton chooses its interpreter when it is imported, so the kernels run in a process of their own.
TRITON_INTERPRET=1 pytest -q tests/ops/test_*kernels.py
# Two files at a time, because tests mostly wait for servers to start. One thread each: the threads of
# one would spin while the other computes. If a worker dies (an engine kills its parent when its
# scheduler fails), the run ends, because a new worker would only start the same test again.
export OMP_NUM_THREADS=1
exec pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 "$@"
