#!/usr/bin/env bash
# Runs moespan where --device npu exists, without an NPU and without CANN.
#
#   bash tools/ascend_sim/run.sh VERB ARGS...             moespan VERB ARGS...
#   bash tools/ascend_sim/run.sh --python ARGS...         python ARGS...
#   bash tools/ascend_sim/run.sh --run COMMAND...         any command, such as bash run.sh
#
# ASCEND_SIM_DEVICES   pretend NPUs of this machine (8)
# ASCEND_SIM_HBM_GIB   memory of each (64); what is written takes as much of the host's
# ASCEND_SIM_FOLDER    where the stand-in is built on first use (.ascend_sim)
# PYTHON               interpreter with moespan's dependencies, instead of .venv
#
# Paths in ARGS are relative to the current folder. The other variables: tools/ascend_sim/README.md
set -euo pipefail
here="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/setup.sh
setup ""

folder="${ASCEND_SIM_FOLDER:-$PWD/.ascend_sim}"
wanted="$("$PYTHON" --version) $(cat constraints.txt tools/ascend_sim/{build.py,fake_cann.c} | cksum)"
if [ "$(cat "$folder/stamp" 2>/dev/null)" != "$wanted" ]; then
    mkdir -p "$folder"
    exec 9>"$folder/lock"
    flock 9 # whoever comes second finds it built
    if [ "$(cat "$folder/stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "building the stand-in for CANN in $folder (only the first time)" >&2
        "$PYTHON" tools/ascend_sim/build.py "$folder/site" >&2
        echo "$wanted" > "$folder/stamp"
    fi
    exec 9>&-
fi

# moespan reads the version of CANN here. Not ASCEND_HOME_PATH, which torch_npu takes for a real CANN.
ASCEND_SIM_CANN="${ASCEND_SIM_CANN:-$(PYTHONPATH=src "$PYTHON" -c \
    "from moespan.machine.cann import RECOMMENDED_CANN; print(RECOMMENDED_CANN)")}"
export ASCEND_SIM_CANN ASCEND_TOOLKIT_HOME="$folder/cann-$ASCEND_SIM_CANN"
if [ ! -e "$ASCEND_TOOLKIT_HOME/version.cfg" ]; then
    mkdir -p "$ASCEND_TOOLKIT_HOME"
    echo "toolkit_running_version=[$ASCEND_SIM_CANN]" > "$ASCEND_TOOLKIT_HOME/draft.$$"
    mv "$ASCEND_TOOLKIT_HOME/draft.$$" "$ASCEND_TOOLKIT_HOME/version.cfg" # never seen half written
fi

export PYTHONPATH="$folder/site:$PWD/tools:$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
export CUDA_VISIBLE_DEVICES= # torch_npu refuses to load beside a usable GPU
cd "$here"
mode="${1:-}"
case "$mode" in
    --python) shift; exec "$PYTHON" "$@" ;;
    --run) shift; export PYTHON; exec "$@" ;;
esac
exec "$PYTHON" -m moespan "$@"
