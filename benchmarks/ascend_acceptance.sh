#!/usr/bin/env bash
# Verifies and measures moespan on this machine, and packs all of it into one file to send.
#
#   bash benchmarks/ascend_acceptance.sh OUT                every NPU of this server
#   NPUS=4 bash benchmarks/ascend_acceptance.sh OUT         some of them
#   MODEL=/data/deepseek_16B bash benchmarks/ascend_acceptance.sh OUT   also the real checkpoint
#   STEPS='^option-aiv' bash benchmarks/ascend_acceptance.sh OUT   only steps with such a name
#   DEVICE=cpu bash benchmarks/ascend_acceptance.sh OUT     the script itself, small, without an NPU
#
# OUT     a folder that does not exist yet; OUT.tar.gz will hold the same
# DEVICE  npu (default), cuda or cpu
# NPUS    ranks to use (all that are there; on CPUs 2)
# MODEL   folder of the 16B checkpoint, for a run with real weights
# PRESET  geometry of the random weights that are timed: 16b, or tiny (on CPUs), timed briefly
# STEPS   regular expression: the steps to run, such as those of one option, or one that failed
# PYTHON  interpreter of an environment with moespan's dependencies
#
# Steps that fail are noted, and the others run all the same: a report with failures is the most
# useful one. The last lines say which options to switch on for this machine. The exit code is 1 if a
# step failed. The report holds versions, device names, addresses
# of network cards, and of the environment only the variables that `--print-env` shows.
set -uo pipefail

[ $# -eq 1 ] || { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
mkdir -p "$(dirname "$1")"
OUT="$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"
[ ! -e "$OUT" ] || { echo "$OUT exists; give a new folder" >&2; exit 2; }
cd "$(dirname "$0")/.."
mkdir -p "$OUT"

DEVICE="${DEVICE:-npu}"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x .venv/bin/python ] || PYTHON="$PWD/.venv/bin/python"
fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
count() { ls -d "$@" 2>/dev/null | wc -l; }
case "$DEVICE" in
    npu) NPUS="${NPUS:-$(count /dev/davinci[0-9]*)}" ;;
    cuda) NPUS="${NPUS:-$(count /dev/nvidia[0-9]*)}" ;;
    *) NPUS="${NPUS:-2}" ;;
esac
[ "$NPUS" -ge 1 ] || { echo "no $DEVICE device is here; NPUS=N says how many" >&2; exit 2; }

failed=0
wanted() { [ "$1" = make-checkpoint ] || [[ "$1" =~ ${STEPS:-.} ]]; }
step() { # NAME COMMAND...: run it, keep what it says, note how it ended
    local name="$1" started seconds code verdict
    shift
    wanted "$name" || return 0
    started=$SECONDS
    printf '%s\n' "$*" > "$OUT/$name.command"
    timeout "${STEP_S:-3600}" "$@" > "$OUT/$name.log" 2>&1 < /dev/null
    code=$?
    seconds=$((SECONDS - started))
    verdict=passed
    [ $code -eq 0 ] || { verdict=FAILED; failed=$((failed + 1)); }
    printf '%-34s %-8s exit %-4s %5d s\n' "$name" "$verdict" "$code" "$seconds" \
        | tee -a "$OUT/summary.txt"
    printf '{"step": "%s", "exit_code": %d, "seconds": %d}\n' "$name" "$code" "$seconds" \
        >> "$OUT/summary.jsonl"
}
moespan() { step "$1" "$PYTHON" -m moespan "${@:2}" --device "$DEVICE"; }

date -u +"%Y-%m-%dT%H:%M:%SZ  $DEVICE × $NPUS" | tee "$OUT/summary.txt"
git rev-parse HEAD > "$OUT/commit.txt" 2>/dev/null || echo "no git" > "$OUT/commit.txt"
git diff HEAD --stat >> "$OUT/commit.txt" 2>/dev/null || true

# What is here.
step software "$PYTHON" -c 'import platform, torch; print(platform.platform(), torch.__version__)
from importlib.metadata import distributions
for name in sorted({f"{d.name}=={d.version}" for d in distributions()}): print(name)'
moespan doctor doctor models/quickstart -tp "$NPUS" --json
! wanted doctor || cp "$OUT/doctor.log" "$OUT/doctor.json"
if [ "$DEVICE" = npu ]; then
    step npu-smi npu-smi info
    step npu-smi-topology npu-smi info -t topo
fi
moespan environment generate models/quickstart -tp "$NPUS" --print-env
[ "$NPUS" -eq 1 ] || moespan collectives doctor models/quickstart -tp "$NPUS" --collectives

# Is it right? Against logits of the published model, alone and under the layouts that fit.
references() { # NAME FLAGS...: all three small checkpoints
    local name="$1" oracle
    shift
    for oracle in tiny tiny_gqa sixteen; do
        moespan "verify-$oracle-$name" verify "tests/data/oracle/$oracle" \
            --reference "tests/data/oracle/$oracle/ref/ref_logits.safetensors" "$@"
    done
}
layout() { # NAME RANKS FLAGS...: the largest of them, which has 16 heads and 64 experts
    local name="$1" ranks="$2" dtype
    shift 2
    [ "$ranks" -le "$NPUS" ] || return 0
    for dtype in float32 bfloat16; do
        moespan "verify-$name-$dtype" verify tests/data/oracle/sixteen --dtype "$dtype" \
            --reference tests/data/oracle/sixteen/ref/ref_logits.safetensors "$@"
    done
}
references one-rank-float32 --dtype float32
references one-rank-bfloat16 --dtype bfloat16
layout tp2 2 -tp 2
layout pp2 2 -pp 2
layout dp2-ep2 2 -dp 2 -ep 2
layout sp2 2 -sp 2
layout dp2-tp2-ep4 4 -dp 2 -tp 2 -ep 4
layout sp2-tp2 4 -sp 2 -tp 2
layout tp8 8 -tp 8
layout tp8-ep8 8 -tp 8 -ep 8
layout tp4-pp2-ep4 8 -tp 4 -pp 2 -ep 4
layout dp4-tp2-ep8 8 -dp 4 -tp 2 -ep 8
moespan verify-quickstart verify models/quickstart --dtype float32 \
    --reference models/quickstart/reference.safetensors
# With weights and cache as 8-bit integers: the largest of the small checkpoints, and random weights
# with heads of 128 and experts of 64, which the operators for them take.
made="$(mktemp -d)"
trap 'rm -rf "$made"' EXIT
step make-checkpoint "$PYTHON" -m moespan make-checkpoint "$made/random" --preset tiny \
    --set hidden_size=1024 --set moe_intermediate_size=128
integers() { # NAME RANKS FLAGS...
    local name="$1" ranks="$2" scheme
    shift 2
    [ "$ranks" -le "$NPUS" ] || return 0
    for scheme in int8 w8a8; do
        moespan "verify-$name-$scheme" verify tests/data/oracle/sixteen --dtype bfloat16 \
            --quantization "$scheme" --kv-cache-dtype int8 \
            --reference tests/data/oracle/sixteen/ref/ref_logits.safetensors "$@"
        moespan "verify-random-$name-$scheme" verify "$made/random" --dtype bfloat16 \
            --quantization "$scheme" --kv-cache-dtype int8 "$@"
    done
}
integers one-rank 1
integers tp2 2 -tp 2
integers dp2-ep2 2 -dp 2 -ep 2
integers tp8-ep8 8 -tp 8 -ep 8
moespan generate-quickstart generate models/quickstart --prompt "681+734=" "sort c y r a f w:"

# How fast is it? Random weights of the 16B geometry need no file.
[ "$DEVICE" != cpu ] || PRESET="${PRESET:-tiny}"
PRESET="${PRESET:-16b}"
small=() short=(--prefill 2048 --decode-batch 1,32 --repeats 3)
if [ "$PRESET" = tiny ]; then
    small=(--prefill 32 --decode-batch 1,4 --context 8 --decode-tokens 4 --repeats 1)
    short=("${small[@]}")
fi
bench() { # NAME FLAGS...
    wanted "bench-$PRESET-$1" || return 0
    moespan "bench-$PRESET-$1" bench --preset "$PRESET" "${@:2}" --json "${small[@]}"
    grep '^{' "$OUT/bench-$PRESET-$1.log" > "$OUT/bench-$1.json"
}
for ranks in 1 2 4 8 16; do
    [ "$ranks" -le "$NPUS" ] || break
    bench "tp$ranks" -tp "$ranks"
done
bench tp1-int8 --quantization int8
bench tp1-w8a8 --quantization w8a8
bench tp1-int8-cache --kv-cache-dtype int8
if [ -n "${MODEL:-}" ]; then
    moespan generate-model generate "$MODEL" -tp "$NPUS" --max-tokens 64 \
        --prompt "An attention function can be described as mapping a query" "人工智能的发展"
    moespan bench-model bench "$MODEL" -tp "$NPUS" --json
    ! wanted bench-model || grep '^{' "$OUT/bench-model.log" > "$OUT/bench-model.json"
fi

# Which options are worth switching on? Each is verified, then timed without and with it, in turns.
help="$("$PYTHON" -m moespan bench --help 2>/dev/null)"
option() { # NAME RANKS "LAYOUT" "VARIABLE=VALUE... FLAGS"
    local name="$1" ranks="$2" word variables=() flags=() layout
    [ "$ranks" -le "$NPUS" ] || return 0
    read -ra layout <<< "$3"
    for word in $4; do
        case "$word" in
            [A-Z]*=*) variables+=("$word") ;;
            *) flags+=("$word") ;;
        esac
        # A version of moespan without this flag has nothing to try.
        case "$word" in --*) grep -qe "$word" <<< "$help" || return 0 ;; esac
    done
    printf '{"option": "%s", "layout": "%s", "how": "%s"}\n' "$name" "$3" "$4" \
        >> "$OUT/options.jsonl"
    step "option-$name-verify" env "${variables[@]}" "$PYTHON" -m moespan verify "$made/random" \
        --dtype bfloat16 "${layout[@]}" "${flags[@]}" --device "$DEVICE"
    moespan "option-$name-without" bench --preset "$PRESET" "${layout[@]}" --json "${short[@]}"
    step "option-$name-with" env "${variables[@]}" "$PYTHON" -m moespan bench --preset "$PRESET" \
        "${layout[@]}" "${flags[@]}" --json "${short[@]}" --device "$DEVICE"
}
tp=$((NPUS < 8 ? NPUS : 8)) # heads of the random checkpoint
many="-tp $tp"
spread="-dp $NPUS -ep $NPUS"
option enforce-eager 1 "-tp 1" "--enforce-eager"
option no-async-scheduling 1 "-tp 1" "--no-async-scheduling"
option int8 1 "-tp 1" "--quantization int8"
if [ "$DEVICE" = npu ]; then
    option w8a8 1 "-tp 1" "--quantization w8a8"
    option int8-cache 1 "-tp 1" "--kv-cache-dtype int8"
    option task-queue-2 1 "-tp 1" "TASK_QUEUE_ENABLE=2"
    option nz 1 "-tp 1" "--npu-weight-format nz"
    option maskless-decode 1 "-tp 1" "--npu-maskless-decode"
    option update-first 1 "-tp 1" "--npu-update-first"
    option scatter-prefill 1 "-tp 1" "--npu-scatter-prefill"
    option overlap-shared-one 1 "-tp 1" "--npu-overlap-shared"
    option aiv 2 "$many" "--npu-aiv"
    option fused-all-reduce 2 "$many" "--npu-fused-all-reduce"
    option overlap-shared 2 "$many -ep $tp" "--npu-overlap-shared"
    option fused-dispatch 2 "$spread" "--moe-dispatch fused"
    option hierarchical-dispatch 16 "$spread" "--moe-dispatch fused --npu-hierarchical-dispatch"
fi

printf '%d failed\n' "$failed" | tee -a "$OUT/summary.txt"
"$PYTHON" benchmarks/acceptance_options.py "$OUT" 2>&1 | tee "$OUT/options.txt"
tar -czf "$OUT.tar.gz" -C "$(dirname "$OUT")" "$(basename "$OUT")"
echo "the report: $OUT.tar.gz"
[ "$failed" -eq 0 ]
