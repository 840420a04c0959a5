#!/usr/bin/env bash
# Generates text with a DeepSeek-MoE model under tensor parallelism.
#
#   bash run.sh                                       the quickstart model, on what is here
#   MODEL=/data/deepseek_16B/ TP=8 bash run.sh        a real checkpoint on 8 ranks
#   bash run.sh --prompt "sort: 4 1 3 =" --json       any flag of `moespan generate`
#
# MODEL   checkpoint folder (models/quickstart)
# TP      ranks of tensor parallelism (2)
# PYTHON  interpreter whose environment is used as it is, instead of .venv
set -euo pipefail
cd "$(dirname "$0")"
source scripts/setup.sh
setup ""

MODEL="${MODEL:-models/quickstart}"
if [ $# -eq 0 ]; then
    if [ "$MODEL" = models/quickstart ]; then
        set -- --prompt "QS1" "QS2" "QS3"
    else
        set -- --prompt "An attention function can be described as mapping a query" \
            "人工智能的发展" --max-tokens 64
    fi
fi
exec "$PYTHON" -m moespan generate "$MODEL" -tp "${TP:-2}" "$@"
