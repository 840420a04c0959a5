#!/usr/bin/env bash
# Generates text with a DeepSeek-MoE model under any layout.
#
#   bash run.sh                                       the quickstart model, on what is here
#   MODEL=/data/deepseek_16B/ TP=8 bash run.sh        a real checkpoint on 8 ranks
#   TP=2 PP=2 bash run.sh                             another layout
#   bash run.sh --prompt "sort 40 7 93:" --json       any flag of `moespan generate`
#
# MODEL   checkpoint folder (models/quickstart)
# TP, EP, PP, SP, DP   degree of tensor (2 if none is given), expert, pipeline, sequence and data
#         parallelism (1)
# PYTHON, TORCH_INDEX   what is installed, and from where: see scripts/setup.sh
set -euo pipefail
cd "$(dirname "$0")"
source scripts/setup.sh
setup ""

MODEL="${MODEL:-models/quickstart}"
[ -n "${TP:-}${EP:-}${PP:-}${SP:-}${DP:-}" ] || TP=2
case " $* " in
    *" --prompt "* | *" --input "* | *" --help "* | *" -h "*) ;;
    *)
        if [ "$MODEL" = models/quickstart ]; then
            # What it was trained to do, with items that were kept out of its training.
            set -- "$@" --prompt "681+734=" "sort 30 70 7 89 97:" "sort c y r a f w:" \
                "Story: Mia, mouse, forest." "故事：小雨，鸟，花园。"
        else
            set -- --max-tokens 64 "$@" --prompt "人工智能的发展" \
                "An attention function can be described as mapping a query"
        fi
        ;;
esac
exec "$PYTHON" -m moespan generate "$MODEL" -tp "${TP:-1}" -ep "${EP:-1}" -pp "${PP:-1}" \
    -sp "${SP:-1}" -dp "${DP:-1}" "$@"
