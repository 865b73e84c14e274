#!/usr/bin/env bash
# bash benchmarks/device.sh FOLDER [DEVICE] [--quick]: all that is measured on an accelerator, in less than ten minutes.
#
# Writes device.json (for benchmarks/results) and a log a stage into FOLDER. Every stage has its own limit in seconds;
# where one fails or is cut off, what it has measured by then stays, and the next goes on.
set -u
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?the folder of the results is missing}")
device=${2:-cuda}
quick=${3:-}
mkdir -p "$out"
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_PROGRESS_BARS=1
began=$SECONDS

stage() {
    local name=$1 limit=$2 start=$SECONDS
    timeout -k 5 "$limit" python3 -m benchmarks.speed.device "$name" --device "$device" --out "$out" $quick \
        >"$out/$name.log" 2>&1
    local status=$?
    echo "$name: $((SECONDS - start)) s of at most $limit, status $status"
    [ $status -eq 0 ] || tail -n 15 "$out/$name.log" | cut -c1-300
}

python3 - <<'END'
import torch, transformers, epmq
print("python and its packages:", torch.__version__, transformers.__version__, epmq.__file__)
print("accelerator:", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
END
stage rates 45
stage tests 110
stage equality 60
stage solver 75
stage llama-1b 100
stage llama-8b 170
# Few files come back from a machine that is lent: all logs in one.
tail -n +1 "$out"/*.log >"$out/all.txt" && rm -f "$out"/*.log
python3 -m benchmarks.speed.device summary --out "$out"
echo "$((SECONDS - began)) s in all"
