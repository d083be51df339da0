#!/bin/sh
# The long gates behind `make check`. Each step prints its seconds; what is skipped is printed again at the end.
set -eu
cd "$(dirname "$0")/.."
venv=${PGOLF_VENV:-.venv}
python="$venv/bin/python"
work=build/check
mkdir -p "$work"
skipped="$work/skipped"
: >"$skipped"

step() { # step NAME COMMAND...
    printf '\n== %s\n' "$1"
    start=$(date +%s)
    shift
    "$@"
    printf '== %s s\n' "$(($(date +%s) - start))"
}
skip() { printf '== skipped: %s (%s)\n' "$1" "$2" | tee -a "$skipped"; }

# The native tests in a build with AddressSanitizer and UndefinedBehaviorSanitizer. Python itself leaks by design, so
# leaks are not looked for; the sanitizers' runtimes must come first in an uninstrumented Python. Their reports go to the
# process's own stderr, which pytest must not capture.
sanitizers() {
    flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1"
    rm -rf "$work/asan"
    PGOLF_CUDA=0 PGOLF_CXXFLAGS="$flags" "$python" setup.py -q build_ext --build-lib "$work/asan" --build-temp "$work/asan-temp"
    cp -r pgolf_kernels/*.py "$work/asan/pgolf_kernels/"
    cp -r model "$work/asan/model"
    cp -r tests "$work/asan/tests"
    cp pyproject.toml "$work/asan/"
    python_path=$(cd "$venv/bin" && pwd)/python
    (
        cd "$work/asan"
        LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so) $(c++ -print-file-name=libstdc++.so)" \
            ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 PYTHONPATH=. \
            "$python_path" -m pytest -q --capture=sys -p no:cacheprovider -m "not long and not gpu" \
            tests/test_softcap_ce.py tests/test_gptq.py tests/test_packing.py tests/test_ngram.py \
            tests/test_adapter_adamw.py
        LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so) $(c++ -print-file-name=libstdc++.so)" \
            ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 PYTHONPATH=. \
            "$python_path" -m pytest -q --capture=sys -p no:cacheprovider tests/fuzz
    )
}

# The wheel in an environment that has nothing else: outside the checkout, so that the wheel itself is imported. The same
# wheel on processors without AVX and without AVX-512, which qemu stands in for.
wheel() {
    rm -rf "$work/wheel" "$work/wheel-venv"
    PGOLF_CUDA=0 "$python" -m pip wheel --quiet --no-deps -w "$work/wheel" .
    "$python" -m venv "$work/wheel-venv"
    clean=$(cd "$work/wheel-venv/bin" && pwd)
    # shellcheck disable=SC2046  # one option and its value, or nothing
    "$clean/python" -m pip install --quiet -c constraints.txt $("$python" scripts/cpu_index.py) "$(ls "$work"/wheel/*.whl)[test]"
    cp -r tests pyproject.toml "$work/wheel"
    (
        cd "$work/wheel"
        "$clean/pgolf" doctor
        "$clean/pgolf" demo --steps 2 --runs "$PWD/runs"
        for processor in Nehalem max,-avx512f; do
            command -v qemu-x86_64 >/dev/null 2>&1 || continue
            printf '== the wheel on qemu -cpu %s\n' "$processor"
            # OpenBLAS would take the kernels of the processor that the environment names, not of the emulated one.
            env -u OPENBLAS_CORETYPE OMP_NUM_THREADS=1 \
                qemu-x86_64 -cpu "$processor" "$clean/python" -m pytest -q -p no:cacheprovider \
                tests/test_softcap_ce.py::test_small_and_large_logits tests/test_gptq.py::test_golden_fp64 \
                tests/test_packing.py::test_byte_shuffle_golden tests/test_packing.py::test_codes_round_trip \
                tests/test_ngram.py::test_golden
        done
    )
}

step "long tests" env OMP_NUM_THREADS=1 "$python" -m pytest -m long
step "address and undefined-behaviour sanitizers" sanitizers
step "wheel in a clean environment" wheel
command -v nvcc >/dev/null 2>&1 || skip "nvcc on all .cu files" "no nvcc"
command -v qemu-x86_64 >/dev/null 2>&1 || skip "the wheel on older processors" "no qemu-x86_64"
command -v chromium >/dev/null 2>&1 || skip "report page in a browser" "no chromium"
printf '\nmake check: all that ran has passed'
if [ -s "$skipped" ]; then printf '; skipped:\n' && cat "$skipped"; else printf ', nothing was skipped\n'; fi
