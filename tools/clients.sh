#!/usr/bin/env bash
# Runs real clients, unmodified, against a server of the quickstart model.
#
#   bash tools/clients.sh             openai, LangChain, LiteLLM, lm-eval
#   bash tools/clients.sh --all       guidellm and evalscope as well (2.5 GB)
#   bash tools/clients.sh --prepare   only makes their environment, .clients
#
# PYTHON        interpreter that has moespan with its extra `serve` (default: .venv of test.sh)
set -euo pipefail
cd "$(dirname "$0")/.."

folder=.clients lists=(tests/clients/requirements.txt) prepare_only=""
for argument; do
    case "$argument" in
        --all) lists+=(tests/clients/requirements_load.txt) ;;
        --prepare) prepare_only=1 ;;
        *)
            sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
            exit 2
            ;;
    esac
done

source scripts/setup.sh
setup "[dev]"

stamp="$(cat "${lists[@]}" | cksum)"
if [ "$(cat "$folder/made-of" 2>/dev/null)" != "$stamp" ]; then
    "$PYTHON" -m venv --clear "$folder"
    # guidellm wants some torch; a build for CPUs is enough.
    [ ${#lists[@]} = 1 ] || install_torch "$folder/bin/python" constraints.txt
    for list in "${lists[@]}"; do
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r "$list"
    done
    echo "$stamp" >"$folder/made-of"
fi
[ -z "$prepare_only" ] || exit 0
exec "$PYTHON" -m pytest tests/clients -rs --override-ini addopts= -s
