#!/usr/bin/env bash
# What to run first where a GPU is lent for ten minutes: questions in order of worth.
#
#     bash benchmarks/gpu_day.sh [FOLDER]       # FOLDER: where results go (default: $OUT, or gpu_day)
#
# Each part is a process with its own time limit, and writes FOLDER/PART.jsonl row by row: what a part
# has found stays, whatever ends it. On a machine without a GPU all parts run on tiny stand-ins.
# The limits add up to nine minutes and a half. Set PYTHON to choose the interpreter.
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
    timeout --kill-after=5 "$limit" "$python" benchmarks/gpu_day.py "$part" --out "$out" "$@" \
        2>"$out/$part.err" || status=$?
    echo "{\"part\": \"$part\", \"status\": $status, \"seconds\": $((SECONDS - start))}" |
        tee -a "$out/parts.jsonl"
    [ "$status" -eq 0 ] || tail -n 3 "$out/$part.err"
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv >"$out/machine.txt" 2>/dev/null
run 30 roof "${@:2}"
run 240 train "${@:2}"
run 80 loss "${@:2}"
run 130 zero "${@:2}"
run 90 search "${@:2}"
