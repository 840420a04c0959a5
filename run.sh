#!/usr/bin/env bash
# Generates text with a DeepSeek-MoE model under any layout, or serves it over HTTP.
#
#   bash run.sh                                       the quickstart model, on what is here
#   MODEL=/data/deepseek_16B/ TP=8 bash run.sh        a real checkpoint on 8 ranks
#   TP=2 PP=2 bash run.sh                             another layout
#   EP=8 bash run.sh                                  experts spread over 8 ranks
#   bash run.sh serve                                 an OpenAI-compatible server on port 8000
#   bash run.sh --prompt "sort 40 7 93:" --json       any flag of `moespan generate`
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash run.sh      one of two servers; Slurm, MPI and
#                                                     others say the same: --print-env shows it
#
# MODEL   checkpoint folder (models/quickstart)
# TP, EP, PP, SP, DP   degree of tensor, expert, pipeline, sequence and data parallelism (1). If none
#         but EP is given: TP=8 on a server with 8 NPUs, else TP=EP, or 2; and PP=NNODES
# NPUS    NPUs of this server (those in /dev)
# PYTHON, TORCH_INDEX   what is installed, and from where: see scripts/setup.sh
set -euo pipefail
cd "$(dirname "$0")"
source scripts/setup.sh
VERB=generate EXTRAS=""
if [ "${1:-}" = serve ]; then
    VERB=serve EXTRAS="[serve]"
    shift
fi
case "${1:-}" in
    "" | -*) ;;
    *)
        say "'$1' is no flag; the checkpoint is given before: MODEL=$1 bash run.sh${EXTRAS:+ serve}"
        exit 2
        ;;
esac
setup "$EXTRAS"

MODEL="${MODEL:-models/quickstart}"
if [ -z "${TP:-}${PP:-}${SP:-}${DP:-}" ]; then
    NPUS="${NPUS:-$(find /dev -maxdepth 1 -name 'davinci[0-9]*' | wc -l)}"
    if [ "$NPUS" -ge 8 ]; then TP=8; else TP="${EP:-2}"; fi
    # tp inside a server and pp between servers sends the least over the network.
    PP="$("$PYTHON" -m moespan.machine.cluster "$@")"
fi
case "$VERB $* " in
    "serve "*) ;;
    *" --prompt "* | *" --prompt="* | *" --input "* | *" --input="* | *" --help "* | *" -h "*) ;;
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
exec "$PYTHON" -m moespan "$VERB" "$MODEL" -tp "${TP:-1}" -ep "${EP:-1}" -pp "${PP:-1}" \
    -sp "${SP:-1}" -dp "${DP:-1}" "$@"
