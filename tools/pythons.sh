#!/usr/bin/env bash
# Runs the fast tier of the tests under every Python that is promised, before a release.
#
#   tools/pythons.sh                      3.10, 3.13, and 3.10 with the lower bounds of pyproject.toml
#   tools/pythons.sh 3.12 lowest          these alone
#   tools/pythons.sh 3.10 -- tests/front  arguments after -- go to test.sh in place of --fast
#
# Interpreters are looked for on the PATH, and among those of pyenv and uv. Each has an environment
# of its own in .pythons/, made the first time by what run.sh uses: on x86-64 without an index of CPU
# builds, each takes 5 GB. Exit code 1: a run failed, or there was no such interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

main() {
    local wanted=() which python failed=()
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        wanted+=("$1")
        shift
    done
    [ $# -eq 0 ] || shift
    [ ${#wanted[@]} -gt 0 ] || wanted=(3.10 3.13 lowest)
    for which in "${wanted[@]}"; do
        python="$(find_version "${which/lowest/3.10}")" || {
            say "Python ${which/lowest/3.10} is not on this machine"
            failed+=("$which")
            continue
        }
        say "$which: $python, $("$python" --version)"
        if [ "$which" = lowest ]; then
            mkdir -p .pythons
            lower_bounds >.pythons/lowest.txt
            # No Triton: torch's own pin of it is older than what the kernels for CUDA need.
            (make_environment .pythons/lowest "[serve,grammar]" .pythons/lowest.txt "$python" &&
                pip_install .pythons/lowest/bin/python --constraint .pythons/lowest.txt \
                    "${TEST_PACKAGES[@]}") || exit 1
        else
            (make_environment ".pythons/$which" "[dev]" constraints.txt "$python") || exit 1
        fi
        PYTHON="$PWD/.pythons/$which/bin/python" bash test.sh "${@:---fast}" || failed+=("$which")
    done
    [ ${#failed[@]} -eq 0 ] || fail "failed: ${failed[*]}"
}

TEST_PACKAGES=(pytest pytest-xdist hypothesis matplotlib ruff mypy httpx pyyaml playwright)

find_version() {
    local candidate
    for candidate in "$(command -v "python$1")" ~/.pyenv/versions/"$1".*/bin/python \
        ~/.local/share/uv/python/cpython-"$1".*/bin/python; do
        "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" \
            2>/dev/null && echo "$candidate" && return
    done
    return 1
}

# The lower bounds of what moespan needs, and the pins of what only the tests need.
lower_bounds() {
    sed -nE '/^dependencies = \[/,/^\]/p; /^(serve|grammar) = /p' pyproject.toml |
        grep -oE '"[^"]+>=[^"]+"' | tr -d '"' | sed 's/>=/==/'
    grep -E '^(pytest|hypothesis|matplotlib|ruff|mypy|httpx|pyyaml|playwright)' constraints.txt
}

main "$@"
