#!/usr/bin/env bash
# Sixteen agents over one long system prompt, dense and then with FASA, on a server that runs:
#   fasa serve MODEL --enable-cache-report &
#   bash examples/agent_loop.sh http://127.0.0.1:30000
# Further arguments go to fasa bench agent.
exec fasa bench agent --base-url "$1" --branches 16 --turns 4 --prefix-tokens 16384 "${@:2}"
