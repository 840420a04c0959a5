#!/usr/bin/env bash
# Runs the project on a bare Debian: a user who is not root, no compiler, and a folder whose name has
# a space and Chinese characters.
#
#   tools/bare.sh bookworm                       `bash run.sh` with Debian's Python 3.11
#   tools/bare.sh trixie                         the same with Python 3.13
#   tools/bare.sh bookworm --python FOLDER       with the Python in FOLDER/bin, such as pyenv's 3.10
#   tools/bare.sh bookworm -- bash test.sh ...   another command, in the project's folder
#
# The first run of each makes a root by debootstrap: 0.5 GB, about two minutes. The project's folder
# is copied anew each time, as git has it, so that `.venv` is made anew, too. pip fetches what it
# fetches for any newcomer. Needs root and Debian's debootstrap. Exit code 77: one is missing, and
# nothing was run.
#
# ROOTS    folder of the roots (~/.cache/moespan/bare)
# MIRROR   Debian's packages (http://deb.debian.org/debian)
# BINDS    files and folders of this machine that the root sees, as "/etc/pip.conf /opt/wheels"
set -euo pipefail
cd "$(dirname "$0")/.."

main() {
    local release="${1:-}" python=""
    case "$release" in
        bookworm | trixie) shift ;;
        *)
            sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '$d' >&2
            exit 2
            ;;
    esac
    if [ "${1:-}" = --python ]; then
        python="$(realpath "${2:?a folder}")"
        [ -x "$python/bin/python3" ] || fail "$python/bin/python3 does not run"
        shift 2
    fi
    [ "${1:-}" != -- ] || shift
    [ $# -gt 0 ] || set -- bash run.sh
    [ "$(id -u)" = 0 ] || skip "only root can enter another root"
    command -v debootstrap unshare >/dev/null || skip "apt install debootstrap"
    root="${ROOTS:-$HOME/.cache/moespan/bare}/$release"
    [ -e "$root/made" ] || make_root "$release"
    inside "$python" "$@"
}

make_root() {
    mkdir -p "$root"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates,procps \
        "$1" "$root" "${MIRROR:-http://deb.debian.org/debian}" >&2 || fail "debootstrap failed"
    chroot "$root" useradd --create-home newcomer
    touch "$root/made"
}

# Runs a command as the user, in a copy of the project; the mounts end with the command.
inside() {
    local place="/home/newcomer/我的 文件夹/moespan" python="$1"
    shift
    rm -rf "$root$place"
    mkdir -p "$root$place"
    git ls-files -z | xargs -0 cp --parents -t "$root$place"
    chroot "$root" chown -R newcomer: "/home/newcomer/我的 文件夹"
    cp -L /etc/resolv.conf "$root/etc/"
    ! chroot "$root" sh -c 'command -v c++ g++ clang' || fail "$root has a compiler"
    export INSIDE_PATH="${python:+$python/bin:}/usr/bin:/bin" INSIDE_PLACE="$place"
    unshare --mount bash -euc '
        root="$1" binds="$2"
        shift 2
        mount -t proc proc "$root/proc"
        mount --rbind /dev "$root/dev"
        for bind in $binds; do
            if [ -d "$bind" ]; then mkdir -p "$root$bind"; else
                mkdir -p "$root$(dirname "$bind")" && touch "$root$bind"
            fi
            mount --bind "$bind" "$root$bind"
        done
        exec chroot "$root" runuser -u newcomer -- env -i HOME=/home/newcomer LANG=C.UTF-8 \
            PATH="$INSIDE_PATH" sh -c '"'"'cd "$0" && exec "$@"'"'"' "$INSIDE_PLACE" "$@"
    ' bash "$root" "${BINDS:-} $python" "$@"
}

skip() {
    echo "skipped: $*" >&2
    exit 77
}

fail() {
    echo "tools/bare.sh: $*" >&2
    exit 1
}

main "$@"
