#!/usr/bin/env bash
# Sixteen agents share one long system prompt; they run without and then with FASA on a server that
# is already running:
#   fasa serve MODEL --enable-cache-report &
#   bash examples/agent_loop.sh http://127.0.0.1:30000
# Further arguments go to fasa bench agent.
exec fasa bench agent --base-url "$1" --branches 16 --turns 4 --prefix-tokens 16384 "${@:2}"
