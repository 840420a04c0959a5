#!/usr/bin/env bash
# Generates text with a DeepSeek-MoE model under tensor parallelism.
#
#   bash run.sh                                       the quickstart model, on what is here
#   MODEL=/data/deepseek_16B/ TP=8 bash run.sh        a real checkpoint on 8 ranks
#   bash run.sh --prompt "sort 40 7 93:" --json       any flag of `moespan generate`
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
        # What it was trained to do, with items that were kept out of its training.
        set -- --prompt "681+734=" "sort 30 70 7 89 97:" "sort c y r a f w:" \
            "Story: Mia, mouse, forest." "故事：小雨，鸟，花园。"
    else
        set -- --prompt "An attention function can be described as mapping a query" \
            "人工智能的发展" --max-tokens 64
    fi
fi
exec "$PYTHON" -m moespan generate "$MODEL" -tp "${TP:-2}" "$@"
