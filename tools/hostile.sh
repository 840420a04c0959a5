#!/usr/bin/env bash
# Lets schemathesis loose on a server of the quickstart model: requests made from its OpenAPI
# document, good and bad ones. No answer may be a 5xx, or differ from the document.
#
#   bash tools/hostile.sh             four minutes
#   bash tools/hostile.sh 600         ten
#
# PYTHON        interpreter that has moespan with its extra `serve` (default: .venv of test.sh)
# SCHEMATHESIS  the program of schemathesis 4 (default: st); without it nothing is done
set -euo pipefail
cd "$(dirname "$0")/.."

seconds="${1:-240}" schemathesis="${SCHEMATHESIS:-st}"
if ! command -v "$schemathesis" >/dev/null; then
    echo "skipped: there is no schemathesis; pip install 'schemathesis>=4' in an environment of its own"
    exit 0
fi
source scripts/setup.sh
setup "[dev]"

folder="$(mktemp -d)"
"$PYTHON" -m moespan serve models/quickstart --port 0 --max-model-len 64 2>"$folder/log" &
server=$!
trap 'kill $server 2>/dev/null; wait $server || true; cat "$folder/log"; rm -r "$folder"' EXIT
"$PYTHON" -m moespan serve --print-openapi >"$folder/openapi.json"
until url="$(grep -o 'ready on http://[^;]*' "$folder/log")"; do
    kill -0 $server
    sleep 0.5
done
"$schemathesis" run "$folder/openapi.json" --url "${url#ready on }" --max-time "$seconds" \
    --checks not_a_server_error,response_schema_conformance,content_type_conformance \
    --mode all --max-examples 300 --request-timeout 30 --continue-on-failure \
    --suppress-health-check filter_too_much
"$PYTHON" - "${url#ready on }" <<'PY'
import sys, time, urllib.request

for _ in range(100):
    load = urllib.request.urlopen(sys.argv[1] + "/load").read()
    if load == b'{"server_load":0}':
        sys.exit()
    time.sleep(0.1)
sys.exit(f"the server still works on requests: {load}")
PY
