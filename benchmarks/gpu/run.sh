#!/usr/bin/env bash
# Workload W on this machine's GPU, from a folder of wheels to one JSON document on standard output.
# benchmarks/GPU.md says what it measures and how the folder is made.
set -euo pipefail

usage() {
    cat >&2 <<'END'
usage: benchmarks/gpu/run.sh [--wheels DIR] [--work DIR] [--python PYTHON] [--borrow | --ready] [--cpu] [-- OPTION …]

  --wheels DIR     install from this folder and from nowhere else; parts (NAME.whl.part-00 …) are joined first.
                   Without it the registry is used.
  --work DIR       everything is made here.  [default: a fresh folder in TMPDIR, removed at the end]
  --python PYTHON  interpreter of the environment, 3.11 or 3.12.  [default: python3]
  --borrow         what the folder of wheels has not (PyTorch) comes from PYTHON's own packages
  --ready          PYTHON has everything already: make no environment
  --cpu            try the script out without a GPU: fp32, a tiny model, few clients; its figures mean nothing
  OPTION           handed to benchmarks/gpu/measure.py, such as --clients 1,16,64 --rounds 3 --seconds 540
END
}

fail() {
    echo "error: $1" >&2
    exit 1
}

wheels="" work="" python=python3 borrow="" ready="" cpu=""
while [ $# -gt 0 ]; do
    case "$1" in
        --wheels | --work | --python)
            [ $# -ge 2 ] || fail "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --borrow | --ready | --cpu)
            printf -v "${1#--}" %s yes
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        --)
            shift
            break
            ;;
        *)
            usage
            fail "there is no option $1"
            ;;
    esac
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -z "$cpu" ]; then
    command -v nvidia-smi >/dev/null || fail "there is no NVIDIA GPU here (nvidia-smi is not found); --cpu tries the script out"
    timeout 30 nvidia-smi -L >&2 || fail "nvidia-smi fails: the NVIDIA driver does not answer"
fi
command -v "$python" >/dev/null || fail "there is no $python"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' ||
    fail "$python is not Python 3.11 or 3.12: give --python"

if [ -z "$work" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
mkdir -p "$work"

if [ -z "$ready" ]; then
    from=(-r "$root/benchmarks/gpu/requirements.txt")
    if [ -n "$wheels" ]; then
        [ -d "$wheels" ] || fail "there is no folder $wheels"
        mkdir -p "$work/wheels"
        # Whole wheels as they are; parts in the order of their names.
        for first in "$wheels"/*.whl.part-00; do
            [ -e "$first" ] || continue
            whole=${first%.part-00}
            cat "$whole".part-* >"$work/wheels/$(basename "$whole")"
        done
        for wheel in "$wheels"/*.whl; do
            [ -e "$wheel" ] && ln -sf "$(realpath "$wheel")" "$work/wheels/"
        done
        if [ -f "$wheels/SHA256SUMS" ]; then
            (cd "$work/wheels" && sha256sum --quiet -c "$(realpath "$wheels/SHA256SUMS")") >&2 || fail "a wheel is damaged or missing"
        fi
        compgen -G "$work/wheels/*.whl" >/dev/null || fail "$wheels has no wheels"
        # Each wheel of the folder, and no looking for what it would like beside it: the imports below are the check.
        from=(--no-index --no-deps --find-links "$work/wheels" "$work/wheels"/*.whl)
    fi
    base=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -m venv "$work/venv" >&2 || fail "$python makes no environment (python3-venv is missing?)"
    python="$work/venv/bin/python"
    "$python" -m pip install -q --disable-pip-version-check "${from[@]}" >&2 || fail "the packages cannot be installed"
    if [ -n "$borrow" ]; then
        echo "$base" >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
    fi
fi

export PYTHONPATH="$root" PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
"$python" - 2>"$work/import.log" <<'END' || fail "$(tail -n 1 "$work/import.log")"
import importlib
import sys

for name in "numpy onnxruntime tokenizers jinja2 torch transformers onnx onnxscript aiohttp click rich psutil".split():
    try:
        importlib.import_module(name)
    except Exception as error:
        sys.exit(f"{name} cannot be imported: {error}")
END
if [ -z "$cpu" ]; then
    # CUDA and cuDNN as their Python packages carry them, for ONNX Runtime inside Triton.
    libraries=$("$python" -c 'import glob, sys; print(":".join(f for p in sys.path for f in glob.glob(p + "/nvidia/*/lib")))')
    export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
fi
"$python" -m benchmarks.gpu.measure --work "$work" ${cpu:+--cpu} "$@"
