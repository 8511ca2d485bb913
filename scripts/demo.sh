#!/usr/bin/env bash
# Hide a fact in a long prompt and ask a real model for it, on SGLang with and without FASA. Does all
# the set-up it needs. Requires Python 3.11 or newer, but no GPU.
#   bash scripts/demo.sh [arguments of fasa demo]
cd "$(dirname "$0")/.."
. scripts/environment.sh
exec fasa demo "$@"
