# Sourced by run.sh, test.sh and tools/pythons.sh: makes .venv and installs moespan into it, once.
#
#   setup EXTRAS    EXTRAS as pip takes them: "" or "[dev]"
#
# PYTHON       interpreter whose environment is used as it is (a server where torch and torch_npu
#              are installed already); nothing is installed
# TORCH_INDEX  package index with torch's CPU builds (https://download.pytorch.org/whl/cpu); asked
#              on x86-64 machines without an NVIDIA GPU, for at most 6 s

# The newest torch whose aarch64 wheel on PyPI needs no CUDA; torch-npu 2.10.0.post4 wants it, too.
TORCH_ON_AARCH64=2.10.0

setup() {
    local here; here="$(pwd -P)"
    # The code of this folder runs, whatever the environment was made for.
    export PYTHONPATH="$here/src${PYTHONPATH:+:$PYTHONPATH}"
    if [ -n "${PYTHON:-}" ]; then
        "$PYTHON" -c "" 2>/dev/null || fail "PYTHON=$PYTHON does not run; name a Python 3.10 to 3.13"
        "$PYTHON" -c "$IN_RANGE" || fail "PYTHON=$PYTHON is not a Python 3.10 to 3.13"
        "$PYTHON" scripts/lacks.py "$1" || exit 1
        return
    fi
    make_environment .venv "$1" constraints.txt
    PYTHON="$here/.venv/bin/python"
}

# make_environment FOLDER EXTRAS CONSTRAINTS [PYTHON]: a virtual environment with moespan in it.
make_environment() {
    is_ready "$@" && return
    (
        # Where there are no locks, two first runs at once are the user's to avoid.
        if command -v flock >/dev/null && ! flock --nonblock 9; then
            say "waiting for another run that installs into this folder"
            flock 9
        fi
        is_ready "$@" && exit
        install_into "$@"
    ) 9<. || exit 1
}

is_ready() {
    local folder="$1" extras="$2" stamp
    # One with more in it will do, too.
    for stamp in "$folder/moespan-$extras" "$folder/moespan-${extras:-[serve]}" \
        "$folder/moespan-[dev]"; do
        [ "$(cat "$stamp" 2>/dev/null)" = "$(wanted "$3")" ] && "$folder/bin/python" -c "" \
            2>/dev/null && return
    done
    return 1
}

# What an environment was made from: versions, and the folder that its programs point to.
wanted() {
    printf '%s\n%s' "$(cat pyproject.toml "$1" scripts/setup.sh | cksum)" "$(pwd -P)"
}

install_into() {
    local folder="$1" extras="$2" constraints="$3" base="${4:-}" fault="" python="$1/bin/python"
    if was_moved "$folder" "$extras" "$constraints"; then
        say "$folder was made in another folder; its programs now point to this one"
        "$python" scripts/relocate.py "$folder" || exit 1
        wanted "$constraints" >"$folder/moespan-$extras"
        return
    fi
    [ -n "$base" ] || base="$(find_python)" || exit 1
    if [ -d "$folder" ]; then
        fault="$(fault_of "$folder")"
        [ -z "$fault" ] || say "$folder $fault; it is made anew"
    fi
    if [ ! -d "$folder" ] || [ -n "$fault" ]; then
        mkdir -p "$folder" 2>/dev/null || fail "$PWD cannot be written; copy the folder to a place" \
            "of your own, or name an environment with PYTHON=/path/to/python"
        touch "$folder/moespan-installing"
        "$base" -m venv --clear "$folder" >&2 || fail "$base cannot make a virtual environment" \
            "in $PWD/$folder"
    fi
    # From here on an interruption leaves an environment that the next run makes anew.
    touch "$folder/moespan-installing"
    rm -f "$folder/moespan-" "$folder/moespan-["*
    install_torch "$python" "$constraints"
    pip_install "$python" --constraint "$constraints" --editable ".$extras"
    wanted "$constraints" >"$folder/moespan-$extras"
    rm "$folder/moespan-installing"
}

# Whether the environment only lacks this folder's name: it was copied or moved with the folder.
was_moved() {
    local stamp="$1/moespan-$2"
    [ "$(head -n 1 "$stamp" 2>/dev/null)" = "$(wanted "$3" | head -n 1)" ] &&
        "$1/bin/python" -c "" 2>/dev/null
}

# Why an environment cannot be brought up to date; nothing if it can.
fault_of() {
    if ! "$1/bin/python" -c "" 2>/dev/null; then
        echo "has no Python that runs"
    elif ! "$1/bin/python" -c "$IN_RANGE"; then
        echo "has a Python that is not 3.10 to 3.13"
    elif [ -e "$1/moespan-installing" ]; then
        echo "was left half-made"
    elif ! grep -qsF "$(pwd -P)/$1" "$1/bin/activate"; then
        echo "was made in another folder"
    elif ! "$1/bin/python" -m pip --version >/dev/null 2>&1; then
        echo "has no pip"
    fi
}

IN_RANGE='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))'

find_python() {
    local candidate bare="" PATH="${PATH//"$(pwd -P)/.venv/bin:"/}" # it cannot make itself anew
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        "$candidate" -c "$IN_RANGE" 2>/dev/null || continue
        if "$candidate" -c "import ensurepip, venv" 2>/dev/null; then
            command -v "$candidate"
            return
        fi
        bare="${bare:-$(command -v "$candidate")}"
    done
    if [ -n "$bare" ]; then
        fail "$bare has no module venv; install it (Debian, Ubuntu: apt install python3-venv), or" \
            "name an environment with PYTHON=/path/to/python"
    fi
    fail "Python 3.10 to 3.13 is needed, and none is on the PATH; install one, or name it with" \
        "PYTHON=/path/to/python"
}

# Tells what will be fetched, and fetches torch where the public index would bring a build with
# CUDA, 2.9 GB of it, to a machine without an NVIDIA GPU.
install_torch() {
    local python="$1" version machine index="${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
    version="$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$2")"
    machine="$(uname -m)"
    if [ "$machine" = aarch64 ] && ! has_nvidia && [ "$2" = constraints.txt ]; then
        version="$TORCH_ON_AARCH64"
    fi
    if "$python" -c "$HAS_TORCH" "$version" 2>/dev/null; then
        say "bringing $(dirname "$(dirname "$python")") up to date"
    elif has_nvidia; then
        say "installing torch $version with CUDA, for the NVIDIA GPU that is here: about 2.9 GB" \
            "to fetch, 4.8 GB on disk; other packages: about 60 MB"
        pip_install "$python" --no-deps "torch==$version"
    elif [ "$machine" = aarch64 ]; then
        say "installing torch $version, a CPU build: about 150 MB to fetch; other packages:" \
            "about 60 MB"
        pip_install "$python" --no-deps "torch==$version"
    elif timeout 6 "$python" scripts/index_has.py "$index" "$version+cpu" 2>/dev/null; then
        say "installing torch $version, a CPU build from $index: about 190 MB to fetch; other" \
            "packages: about 60 MB"
        pip_install "$python" --no-deps --index-url "$index" "torch==$version+cpu"
    else
        say "installing torch $version: about 2.9 GB to fetch from the public index, 4.8 GB on" \
            "disk, because that build has CUDA in it; $index, which has CPU builds of 190 MB, does" \
            "not answer with one (TORCH_INDEX names another index). Ctrl-C stops it"
        pip_install "$python" --no-deps "torch==$version"
    fi
}

HAS_TORCH='
import sys
from importlib.metadata import version
sys.exit(version("torch").partition("+")[0] != sys.argv[1])
'

has_nvidia() {
    [ -e /dev/nvidiactl ] || [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1
}

# pip_install PYTHON ARGUMENTS: installs; a terminal sees the progress.
pip_install() {
    local python="$1" quiet=(--quiet)
    shift
    [ -t 2 ] && quiet=()
    "$python" -m pip install ${quiet[@]+"${quiet[@]}"} --disable-pip-version-check "$@" >&2 ||
        fail "pip could not install all packages (its message is above); run it again when the" \
            "package index answers, or name an environment with PYTHON=/path/to/python"
}

say() {
    echo "moespan: $*" >&2
}

fail() {
    say "$*"
    exit 1
}
