#!/bin/sh
# Everything that can be asked of bmx on one NVIDIA card, in less than ten minutes: see benchmarks/gpu.py.
#
#   benchmarks/gpu.sh [out.json] [--only kernels,throughput] [--jobs prefill,decode]
#   FULL=1 benchmarks/gpu.sh out.json --only throughput --jobs prefill,decode,20000/2000      # as long as it takes
#
# Nothing is installed: where there is no jsonlines, which only files need, an empty module takes its place.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root" || exit 2
python=${PYTHON:-$(command -v python || command -v python3)}
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu.sh: torch sees no CUDA GPU here, and nothing was measured" >&2
    exit 2
fi
if ! "$python" -c 'import jsonlines' 2>/dev/null; then
    stub=$(mktemp -d) || exit 2
    trap 'rm -rf "$stub"' EXIT
    : >"$stub/jsonlines.py"
    PYTHONPATH=$PYTHONPATH:$stub
fi
"$python" benchmarks/gpu.py "$@"
