#!/usr/bin/env bash
# A fact hidden in a long prompt, asked of a real model in the real SGLang, with and without FASA.
# Does all the set-up it needs on a machine with Python 3.11 or newer; no GPU needed.
#   bash scripts/demo.sh [arguments of fasa demo]
cd "$(dirname "$0")/.."
. scripts/environment.sh
exec fasa demo "$@"
