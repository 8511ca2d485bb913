#!/usr/bin/env bash
# Tries every model family on this machine and writes docs/models.md: bash scripts/models.sh
# Names of families as arguments try these alone. Outcomes are kept in docs/models/, one file per
# device, so that runs on a CPU and on a GPU make one table. Requires Python 3.11 or newer.
cd "$(dirname "$0")/.."
. scripts/environment.sh
# On a CPU, SGLang's processes are forked as in the tests, because each spawned one would import
# SGLang anew.
[ -e /dev/nvidiactl ] || export PYTHONPATH="$PWD/tests/forked_processes" OMP_NUM_THREADS=1
exec fasa bench families --out docs/models "$@"
