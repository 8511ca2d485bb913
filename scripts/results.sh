#!/usr/bin/env bash
# Reproduces docs/results.md, part by part, on one GPU: bash scripts/results.sh PART...
# Parts: served-8192, served-16384, ruler-8192, ruler-16384, rules, text, write-once, aime,
# ablations, pruning.
# Rows go below results/; a rerun continues where an earlier one stopped.
# Needs the serve and eval extras: pip install ".[serve,eval]"
set -euo pipefail
MODEL=qwen-coder
ALL=fasa,oracle,quest,streaming,random
# Several servers share the GPU, and comparison selectors run without CUDA graphs.
POOL="--max-total-tokens 340000"
EAGER="--cuda-graph-backend-decode disabled --cuda-graph-backend-prefill disabled"

serve() { # NAME PORT SETTINGS [FLAG...]: run a server in the background until this shell ends
  local folder
  # Without -P, the checkout's folders would hide the installed package.
  folder="$(python3 -P -c "from fasa_sglang.workloads.models.packaged import find_model; print(find_model('$MODEL'))")"
  fasa serve "$folder" --port "$2" --settings "$3" --enable-custom-logit-processor \
    --sampling-backend pytorch --grammar-backend none --log-level error $POOL "${@:4}" \
    > "results/server-$1.log" 2>&1 &
  SERVER=$!
  trap 'kill $SERVER 2> /dev/null || true' EXIT
  until curl -s -o /dev/null "http://127.0.0.1:$2/health"; do
    kill -0 $SERVER || exit 1
    sleep 1
  done
}

evaluate() { # PORT FLAG...
  fasa eval --concurrency 300 "${@:2}" --model "$MODEL" --base-url "http://127.0.0.1:$1"
}

ruler() { # LENGTH DOCUMENTS PORT SETTINGS OUT CONCURRENCY FLAG...; the server also gets $FLAGS
  local port=$3 out=$5 more=(--length "$1" --limit "$2" --out "$5")
  local tasks="niah_multikey_2 niah_single_1 ruler_fwe ruler_noise_multikey ruler_noise_multiquery
    ruler_noise_multivalue"
  # Dense decoding scores less than half on these.
  local hard="ruler_vt ruler_cwe niah_multikey_3"
  if [ "$1" = 8192 ]; then tasks="$tasks ruler_cwe niah_multikey_3" hard=ruler_vt; fi
  serve "$(basename "$out")" "$port" "$4" $FLAGS
  evaluate "$port" $tasks "${more[@]}" --concurrency "$6" "${@:7}"
  if [ "$out" = "results/ruler-$1" ]; then
    evaluate "$port" $hard "${more[@]}" --selectors dense
  fi
  fasa eval pool "$out"/niah* "$out"/ruler* --min-dense 0.5 --out "docs/$(basename "$out")"
}

selectors() { # LENGTH PORT
  # Enough for the documents and replies of one task.
  local POOL="--max-total-tokens $((35 * $1))" FLAGS=$EAGER
  ruler "$1" 25 "$2" '{"min_seq_len": 0, "max_budget": 4096, "selector": "any"}' \
    "results/ruler-$1" 300 --selectors $ALL --budgets 512,2048
}

served() { # LENGTH PORT: the served defaults, with four times the documents
  local POOL="--max-total-tokens $((35 * $1))" FLAGS="--max-running-requests 96"
  ruler "$1" 100 "$2" "{}" "results/served-$1" 96 --budgets 512,2048
}

rules() { # CALIBRATIONS: the effect of settings on answers instead of KL
  rule half 31020 '"num_fcs": 16' &
  rule mean 31021 '"num_fcs": 16, "combine": "mean"' &
  rule three-eighths 31022 '"num_fcs": 12' &
  rule separation 31023 "\"num_fcs\": 16, \"calibration\": \"$1/separation.safetensors\"" &
  wait_for_all
}

rule() { # NAME PORT SETTINGS; SETTINGS without its braces
  local FLAGS=$EAGER
  ruler 16384 25 "$2" "{\"min_seq_len\": 0, $3}" "results/ruler-16384-$1" 48 --budgets 512,2048
}

text() {
  # All segments fit together: a retracted request would be prefilled again, densely.
  local POOL="--max-total-tokens 700000"
  serve text 31002 '{"min_seq_len": 0, "max_budget": 4096, "selector": "any"}' $EAGER
  evaluate 31002 perplexity --length 8192 --max-tokens 128 --limit 64 --selectors $ALL \
    --budgets 128,512,2048 --concurrency 64 --out results/text
}

write_once() {
  serve write-once 31005 '{"min_seq_len": 0, "max_budget": 4096, "selector": "any"}' $EAGER
  evaluate 31005 write-once --length 2048 --limit 100 --selectors fasa,oracle,streaming,random \
    --budgets 512 --concurrency 150 --out results/text
}

aime() {
  fasa eval aime24 --model $MODEL --samples 2 --max-tokens 2048 --budgets 256,512 \
    --concurrency 60 --out results/aime --flags "$POOL"
}

ablate() { # NAME CHUNKS SETTINGS [FLAG...]; SETTINGS without its braces
  fasa eval perplexity --model $MODEL --length 8192 --max-tokens 64 --limit 32 --concurrency 64 \
    --budgets 256,512,2048 --settings "{\"num_fcs\": $2${3:+, $3}}" --out "results/ablations/$1" \
    "${@:4}" --flags "--max-total-tokens 200000 $EAGER"
}

# CALIBRATIONS: a folder with one calibration for each ranker, length and text below, made by
# fasa calibrate --model FOLDER --out NAME.safetensors with --ranker, --tokens or --text.
ablations() {
  # Most use half of the chunks, the default of larger heads.
  ablate half 16 '' &
  ablate three-quarters 24 '' &
  ablate three-eighths 12 '' &
  ablate quarter 8 '' &
  ablate quarter-mean 8 '"combine": "mean"' &
  ablate mean 16 '"combine": "mean"' &
  wait_for_all
  ablate bf16 16 '"label_dtype": "bf16"' &
  ablate dense-0 16 '"num_dense_layers": 0' &
  ablate dense-2 16 '"num_dense_layers": 2' &
  ablate no-sink 16 '"sink": 0' &
  ablate no-recent 16 '"recent": 0' &
  ablate selectors 16 '' --selectors fasa,per_head,paged &
  wait_for_all
  for name in separation agreement covariance short readme; do
    ablate "$name" 16 '' --calibration "$1/$name.safetensors" &
  done
  wait_for_all
}

pruning() {
  local rule task port=31010
  # Names recur in source code.
  python3 -P -c 'import importlib, inspect, sys
for name in sys.argv[1:]: sys.stdout.write(inspect.getsource(importlib.import_module(name)))' \
    argparse typing doctest tarfile subprocess inspect pydoc zipfile > results/stdlib.txt
  for rule in fasa random oldest; do
    prune $rule $port &
    port=$((port + 1))
  done
  wait_for_all
  for task in agreement perplexity cloze write-once; do
    for rule in random oldest; do
      fasa eval compare results/pruning-$rule/$task* results/pruning-fasa/$task*
    done
  done
}

prune() { # RULE PORT
  local settings="{\"min_seq_len\": 0, \"prune_rule\": \"$1\", \"prune_interval\": 32,
    \"prune_recent\": 64, \"prune_grace\": 32}"
  local request='{"recent": 8, "prune": "generated", "prune_budget": 256}'
  local more=(--budgets 128 --request "$request" --out "results/pruning-$1")
  serve "pruning-$1" "$2" "$settings" --max-running-requests 128
  # Sampled, because greedy continuations repeat themselves. The default of 32 recent tokens would
  # leave little of a budget of 128 to select.
  evaluate "$2" agreement --length 128 --max-tokens 1024 --limit 128 --temperature 1 \
    --ignore-eos "${more[@]}"
  evaluate "$2" perplexity --length 2048 --max-tokens 1024 --limit 48 "${more[@]}"
  evaluate "$2" cloze --text results/stdlib.txt --length 1152 --max-tokens 1024 --limit 128 "${more[@]}"
  evaluate "$2" write-once --length 2048 --limit 48 "${more[@]}"
}

wait_for_all() {
  local job
  for job in $(jobs -p); do wait "$job"; done
}

mkdir -p results
for part in "$@"; do
  # In a subshell: its servers stop when it ends.
  case $part in
    served-8192) (served 8192 31003) ;;
    served-16384) (served 16384 31004) ;;
    ruler-8192) (selectors 8192 31000) ;;
    ruler-16384) (selectors 16384 31001) ;;
    rules) rules "${CALIBRATIONS:-.}" ;;
    text) (text) ;;
    write-once) (write_once) ;;
    aime) aime ;;
    ablations) (ablations "${CALIBRATIONS:-.}") ;;
    pruning) (pruning) ;;
    *)
      echo "results.sh: unknown part $part; the parts are listed at the top of the script" >&2
      exit 1
      ;;
  esac
done
