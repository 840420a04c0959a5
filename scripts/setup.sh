# Sourced by run.sh and test.sh: makes .venv and installs moespan into it, once.
#
#   setup EXTRAS    EXTRAS as pip takes them: "" or "[dev]"
#
# PYTHON=/path/to/python uses that interpreter's environment as it is (a server where torch and
# torch_npu are installed already) and installs nothing.

setup() {
    if [ -n "${PYTHON:-}" ]; then
        export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
        return
    fi
    PYTHON="$PWD/.venv/bin/python"
    local stamp=".venv/moespan-$1" wanted
    wanted="$(cat pyproject.toml constraints.txt | cksum)"
    [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
    if [ ! -x "$PYTHON" ]; then
        "$(find_python)" -m venv .venv
    fi
    echo "installing into .venv (only the first time)" >&2
    "$PYTHON" -m pip install --quiet --disable-pip-version-check \
        --constraint constraints.txt --editable ".$1"
    echo "$wanted" > "$stamp"
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' \
            2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "moespan needs Python 3.10 to 3.13, and none is on the PATH; install one, or name it" \
        "with PYTHON=/path/to/python" >&2
    return 1
}
