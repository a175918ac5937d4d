#!/usr/bin/env bash
# What to run first where a GPU is lent for ten minutes: questions in order of worth.
#
#     bash benchmarks/gpu_day.sh [FOLDER]       # FOLDER: where results go (default: $OUT, or gpu_day)
#
# Each part is a process with its own time limit, and writes FOLDER/PART.jsonl row by row: what a part
# has found stays, whatever ends it. On a machine without a GPU all parts run on tiny stand-ins.
# The limits add up to eight minutes and forty seconds. Set PYTHON to choose the interpreter,
# PATIENCE=4 to allow each part four times as long.
#
# Python 3.11 or newer, torch >= 2.11 and transformers >= 5.17 must be there, and what pyproject.toml
# lists as dependencies; deepspeed for `zero`; sentence-transformers and colpali-engine for the peers
# (without them their rows say so). Where the machine has no network, fetch what it lacks elsewhere,
# for its Python and processor, and take the folder along (6 MB):
#
#     pip download --no-deps --only-binary :all: --python-version 3.12 --dest wheels \
#         --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
#         jsonargparse typeshed-client docstring-parser omegaconf webdataset braceexpand \
#         pydantic pydantic-core annotated-types typing-inspection hjson colpali-engine \
#         --constraint constraints.txt
#     pip wheel --no-deps --wheel-dir wheels --constraint constraints.txt deepspeed
#
# and there:
#
#     python3 -m pip install --no-index --no-deps --no-compile --target site wheels/*.whl
#     PYTHONPATH=site bash benchmarks/gpu_day.sh
set -u
cd "$(dirname "$0")/.."
out="${1:-${OUT:-gpu_day}}"
python="${PYTHON:-python3}"
export PYTHONUNBUFFERED=1 PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
mkdir -p "$out"

run() { # SECONDS PART [FLAGS...]
    local limit="$1" part="$2" start="$SECONDS" status=0
    shift 2
    echo "== $part (at most $limit s)"
    timeout --kill-after=5 "$((limit * ${PATIENCE:-1}))" "$python" benchmarks/gpu.py "$part" --out "$out" "$@" \
        2>"$out/$part.err" || status=$?
    echo "{\"part\": \"$part\", \"status\": $status, \"seconds\": $((SECONDS - start))}" |
        tee -a "$out/parts.jsonl"
    [ "$status" -eq 0 ] || tail -n 3 "$out/$part.err"
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv >"$out/machine.txt" 2>/dev/null
run 30 roof "${@:2}"
run 120 train "${@:2}"
run 120 peers "${@:2}"
run 70 loss "${@:2}"
run 120 zero "${@:2}"
run 60 search "${@:2}"
