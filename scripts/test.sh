#!/usr/bin/env bash
# ruff, mypy and pytest. Does all the set-up it needs on a machine with Python 3.11 or newer.
#   bash scripts/test.sh          slow tests run a small draw
#   bash scripts/test.sh --all    slow tests run in full (about 45 minutes on two cores)
# Other arguments go to pytest.
cd "$(dirname "$0")/.."
. scripts/environment.sh
ruff check .
ruff format --check .
# From elsewhere, so that mypy sees the installed package and not half of it in the checkout.
(cd "$FASA_VENV" && mypy --config-file "$OLDPWD/pyproject.toml" -p fasa_sglang)
# Triton chooses its interpreter when it is imported, so the kernels have a process of their own.
TRITON_INTERPRET=1 pytest -q tests/ops/test_*kernels.py
# Two files at a time, for most of it waits for servers to start. With more threads those of one
# would spin while the other computes. A worker that dies (an engine kills its parent when its
# scheduler fails) ends the run: its replacement would only start the same test again.
export OMP_NUM_THREADS=1
exec pytest -n 2 --dist loadfile --max-worker-restart 0 "$@"
