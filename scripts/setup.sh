#!/bin/sh
# Makes .venv and installs the package into it with everything that the tests need. A second run installs nothing and
# needs no network: stamps in .venv say what was installed and built from which files.
#
#   PYTHON           the interpreter to use (default: the first of python3, python3.11 ... python3.14 that is new enough)
#   PGOLF_VENV       the environment's folder (default: .venv)
#   PGOLF_EXTRAS     extras to install (default: test)
#   PGOLF_CPU_INDEX  where PyTorch's CPU wheels are (default: PyTorch's own index)
#   PGOLF_CUDA, PGOLF_CUDA_ARCHS, PGOLF_CXXFLAGS, CUDA_HOME, CUDA_PATH, CXX   as setup.py reads them
#   PGOLF_SETUP_CHECK=1   only look for what the install needs
set -eu
cd "$(dirname "$0")/.."
venv=${PGOLF_VENV:-.venv}
extras=${PGOLF_EXTRAS:-test}

say() { printf '%s\n' "setup: $*"; }
fail() {
    printf '%s\n' "setup: $*" >&2
    exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }

# 1. What must be there before pip can do anything. Everything missing goes into one line.

find_python() {
    for candidate in "${PYTHON:-python3}" python3.11 python3.12 python3.13 python3.14; do
        if have "$candidate" && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
}

compiles_cxx17() {
    scratch=$(mktemp -d)
    printf '#include <optional>\nint main() { std::optional<int> x{0}; if (int y = *x; y == 0) return y; return 1; }\n' >"$scratch/probe.cpp"
    status=0
    # shellcheck disable=SC2086  # CXX may hold flags
    $1 -std=c++17 "$scratch/probe.cpp" -o "$scratch/probe" >/dev/null 2>&1 || status=1
    rm -rf "$scratch"
    return $status
}

missing=""
packages=""
need() { # need "what it is" "Debian package"
    missing="${missing:+$missing, }$1"
    case " $packages " in *" $2 "*) ;; *) packages="${packages:+$packages }$2" ;; esac
}

python=$(find_python)
if [ -n "$python" ]; then
    # Debian names the packages after the interpreter: python3-dev for python3, python3.12-dev for python3.12.
    name=$(basename "$python")
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        need "Python's headers (Python.h)" "$name-dev"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || need "venv and ensurepip" "$name-venv"
else
    found=$("${PYTHON:-python3}" -V 2>/dev/null || echo none)
    need "Python 3.11 or newer (found: $found)" python3
    need "its headers (Python.h)" python3-dev
    need "venv and ensurepip" python3-venv
fi
for compiler in "${CXX:-c++}" g++ clang++; do
    if compiles_cxx17 "$compiler"; then
        export CXX="$compiler"
        break
    fi
    compiler=""
done
[ -n "$compiler" ] || need "a C++17 compiler" g++
if [ -n "$missing" ]; then
    sudo=""
    [ "$(id -u)" = 0 ] || sudo="sudo "
    printf '%s\n' "setup: missing: $missing. Install with (Debian's and Ubuntu's names):" "    ${sudo}apt-get update && ${sudo}apt-get install -y $packages" >&2
    exit 1
fi
[ "${PGOLF_SETUP_CHECK:-0}" = 0 ] || { say "Python $python, compiler $CXX: all there"; exit 0; }

# 2. CUDA: with a GPU and no nvcc, NVIDIA's compiler comes from PyPI; without either, a CPU build.

has_gpu() { have nvidia-smi && nvidia-smi -L 2>/dev/null | grep -q GPU; }
has_nvcc() { have nvcc || have "${CUDA_HOME:-${CUDA_PATH:-/usr/local/cuda}}/bin/nvcc"; }
gpu=no
has_gpu && gpu=yes
nvidia_packages=""
if [ "${PGOLF_CUDA:-auto}" != 0 ] && ! has_nvcc; then
    if [ $gpu = yes ]; then
        # Their versions, all of CUDA 13.0, are in constraints.txt.
        nvidia_packages="nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl nvidia-nvvm"
    elif [ "${PGOLF_CUDA:-auto}" = auto ]; then
        export PGOLF_CUDA=0
    fi
fi

# 3. The environment. Stamps hold checksums of what decides the result.

if [ -d "$venv" ] && ! "$venv/bin/python" -c 'import pip' >/dev/null 2>&1; then
    say "$venv does not work any more (interrupted, or its Python is gone): making it anew"
    rm -rf "$venv"
fi
wanted_packages=$({ "$python" -V; echo "$gpu $nvidia_packages"; cat pyproject.toml constraints.txt scripts/setup.sh; } | cksum)
wanted_native=$({
    echo "${PGOLF_CUDA:-auto} ${PGOLF_CUDA_ARCHS:-} ${PGOLF_CXXFLAGS:-} ${CUDA_HOME:-} ${CUDA_PATH:-} $CXX"
    cat setup.py
    find csrc -type f | LC_ALL=C sort | while read -r file; do cksum "$file"; done
} | cksum)
stamped() { [ "$(cat "$venv/.pgolf-$1" 2>/dev/null)" = "$2" ]; }
stamp() { echo "$2" >"$venv/.pgolf-$1"; }
installed=yes
for extra in $(echo "$extras" | tr , ' '); do
    stamped "extra-$extra" "$wanted_packages" || installed=no
done

built() { stamped native "$wanted_native" && [ -n "$(find pgolf_kernels -name '_native*.so')" ]; }

if [ $installed = no ]; then
    rm -f "$venv/.pgolf-native"
    [ -d "$venv" ] || "$python" -m venv "$venv"
    index=""
    if [ $gpu = yes ]; then
        say "installing into $venv: downloads about 3 GB, PyTorch with CUDA among it; takes 6 GB of disk and some minutes"
    else
        index=$("$venv/bin/python" scripts/cpu_index.py)
        say "installing into $venv: downloads about 0.6 GB, PyTorch for CPUs among it; takes 2 GB of disk and some minutes" \
            "(3 and 6 GB where only PyTorch with CUDA can be had)"
    fi
    quiet=--quiet
    [ ! -t 1 ] || quiet=""
    export PYTHONWARNINGS=ignore # setuptools' thoughts on editable installs
    # shellcheck disable=SC2086  # $quiet, $index and $nvidia_packages are options or lists, possibly empty
    {
        "$venv/bin/python" -m pip install --quiet --upgrade pip
        [ -z "$nvidia_packages" ] || "$venv/bin/python" -m pip install $quiet -c constraints.txt $nvidia_packages
        "$venv/bin/python" -m pip install $quiet -c constraints.txt $index -e ".[$extras]"
    }
    for extra in $(echo "$extras" | tr , ' '); do stamp "extra-$extra" "$wanted_packages"; done
elif ! built; then
    say "building the native module again: it is gone, or its sources or settings changed"
    rm -f "$venv/.pgolf-native"
    "$venv/bin/python" setup.py -q build_ext --inplace
else
    exit 0
fi
stamp native "$wanted_native"
say "done"
# pip hides what a build prints, so that setup.py's own warning is not seen.
if [ "${PGOLF_CUDA:-auto}" != 0 ] && ! "$venv/bin/python" -c 'import sys, pgolf_kernels._native as n; sys.exit(not n.has_cuda())'; then
    printf '%s\n' "setup: *** built WITHOUT CUDA, because nvcc failed. Its lines:" \
        "    PGOLF_CUDA=1 $venv/bin/python setup.py build_ext --inplace" >&2
fi
