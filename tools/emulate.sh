#!/usr/bin/env bash
# Runs the project on a processor that this machine does not have, emulated by QEMU.
#
#   tools/emulate.sh aarch64               the quickstart at tp=2 in bfloat16 and float32, `verify`,
#                                          and the parts of the fast tier that depend on the
#                                          processor, one after the other (PARTS, TOO_SLOW)
#   tools/emulate.sh aarch64 COMMAND...    a command, in the project's folder inside that machine
#
# The first run makes a Debian root with a compiler and the packages of constraints.txt: 2 GB, about
# 15 minutes. Emulated programs are 20 to 50 times slower: all parts take some hours of one core.
# Needs root, and Debian's debootstrap, qemu-user-static and binfmt-support. Exit code 77: something
# of these is missing, and nothing was run. Exit code 1: a command or a part failed.
#
# ROOT       folder of the root (~/.cache/moespan/emulate-aarch64)
# QEMU_CPU   processor, by QEMU's name (neoverse-n1: Armv8.2 as in a Kunpeng 920, without SVE)
set -euo pipefail
cd "$(dirname "$0")/.."

[ "${1:-}" = aarch64 ] || {
    echo "usage: tools/emulate.sh aarch64 [COMMAND...]" >&2
    exit 2
}
shift
ROOT="${ROOT:-$HOME/.cache/moespan/emulate-aarch64}"
export QEMU_CPU="${QEMU_CPU:-neoverse-n1}"

main() {
    [ "$(id -u)" = 0 ] || skip "only root can enter another root"
    command -v debootstrap unshare >/dev/null || skip "apt install debootstrap"
    [ -e /proc/sys/fs/binfmt_misc/register ] || mount -t binfmt_misc none /proc/sys/fs/binfmt_misc ||
        skip "the kernel has no binfmt_misc"
    [ -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ] ||
        skip "apt install qemu-user-static binfmt-support; update-binfmts --enable qemu-aarch64"
    [ -e "$ROOT/made" ] || make_root
    if [ $# -gt 0 ]; then
        inside "$@"
        return
    fi
    inside python3 -m moespan generate models/quickstart -tp 2 --device cpu \
        --prompt "681+734=" "sort 30 70 7 89 97:"
    inside python3 -m moespan generate models/quickstart -tp 2 --device cpu --dtype float32 \
        --quiet --prompt "681+734=" "sort 30 70 7 89 97:"
    inside python3 -m moespan verify models/quickstart -tp 2 --device cpu --dtype float32
    inside python3 -m moespan verify models/quickstart -tp 2 --device cpu --dtype bfloat16
    fast_tier
}

# What is left out: planner, search, doctor and pages compute no tensors, and their files are the same
# on every processor.
PARTS=(tests/model tests/checkpoint tests/serve tests/engine tests/text tests/front tests/config
    tests/parallel tests/launch tests/machine tests/ops)
# Hundreds of random schedules, drafts in all layouts, and every operation a second time through plain
# torch: nobody has waited for their ends. The pages need a browser.
TOO_SLOW=(tests/engine/test_drafts.py tests/engine/test_scheduler.py tests/ops/test_cpu_plain.py
    tests/serve/test_page.py)
# QEMU's own memory counts, and limits of memory do not bind what it emulates.
BY_MEMORY=(
    tests/text/test_chat_template.py::test_hostile_templates_cost_some_tens_of_megabytes_at_most
    tests/text/test_chat_template.py::test_after_a_broken_limit_the_next_conversation_is_served)

# Runs each part by itself, so that all are seen and one that fails can be run again alone.
fast_tier() {
    local part failed=()
    for part in "${PARTS[@]}"; do
        inside python3 -m pytest -q -p no:cacheprovider -m "not slow" \
            "${TOO_SLOW[@]/#/--ignore=}" "${BY_MEMORY[@]/#/--deselect=}" "$part" || failed+=("$part")
    done
    [ ${#failed[@]} -eq 0 ] || {
        echo "failed: ${failed[*]}" >&2
        return 1
    }
}

make_root() {
    debootstrap --arch=arm64 --variant=minbase --include=python3,python3-pip,g++,git,procps \
        bookworm "$ROOT" "${MIRROR:-http://deb.debian.org/debian}"
    # This machine's pip is faster than an emulated one. It takes the conditions of packages for this
    # machine, under which torch asks for CUDA: what torch imports is therefore named here.
    local flags=(--quiet --disable-pip-version-check --no-compile --upgrade --only-binary ":all:"
        --implementation cp --python-version 3.11 --abi cp311 --abi abi3 --abi none
        --platform manylinux2014_aarch64 --target "$ROOT/opt/packages") glibc
    for glibc in 17 24 26 27 28 31 34; do
        flags+=(--platform "manylinux_2_${glibc}_aarch64")
    done
    python3 -m pip install "${flags[@]}" --no-deps "torch==2.10.0"
    python3 -m pip install "${flags[@]}" --constraint <(grep -v '^torch' constraints.txt) \
        filelock typing-extensions sympy networkx fsspec setuptools \
        numpy safetensors tokenizers jinja2 msgspec tqdm pytest hypothesis \
        starlette uvicorn h11 prometheus-client httpx llguidance
    # Not by PYTHONPATH, which some tests set anew.
    echo /opt/packages >"$ROOT/usr/lib/python3/dist-packages/packages.pth"
    cpuinfo >"$ROOT/cpuinfo"
    touch "$ROOT/made"
}

# What `-march=native` looks at; QEMU shows the machine's own processor.
cpuinfo() {
    cat <<'END'
processor	: 0
BogoMIPS	: 50.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x3
CPU part	: 0xd0c
CPU revision	: 1

END
}

# Runs a command in the root, with the project's folder at /project; mounts end with the command.
inside() {
    echo "emulated: $*" >&2
    mkdir -p "$ROOT/project" "$ROOT/proc" "$ROOT/dev" "$ROOT/sys"
    unshare --mount bash -euc '
        mount --bind "$PWD" "$1/project"
        mount -t proc proc "$1/proc"
        mount --bind "$1/cpuinfo" "$1/proc/cpuinfo"
        mount --rbind /dev "$1/dev"
        mount --rbind /sys "$1/sys"
        root="$1"
        shift
        exec chroot "$root" /usr/bin/env -i HOME=/root PATH=/usr/bin:/bin TERM="${TERM:-dumb}" \
            QEMU_CPU="$QEMU_CPU" LC_ALL=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 \
            PYTHONPATH=/project/src OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" \
            MOESPAN_BUILD_TIMEOUT="${MOESPAN_BUILD_TIMEOUT:-3600}" MOESPAN_TEST_PATIENCE=20 \
            sh -c '"'"'cd /project && exec "$@"'"'"' sh "$@"
    ' bash "$ROOT" "$@"
}

skip() {
    echo "skipped: $*" >&2
    exit 77
}

main "$@"
