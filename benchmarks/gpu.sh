#!/bin/sh
# Everything that can be asked of bmx on one NVIDIA card, in less than nine minutes: see benchmarks/gpu.py.
#
#   benchmarks/gpu.sh OUT.json                              # all of it
#   benchmarks/gpu.sh OUT.json --decisive                   # what decides, in less than four minutes
#   benchmarks/gpu.sh OUT.json --part kernels,throughput    # some parts
#
# Nothing is installed. Small modules take the place of jsonlines and platformdirs, where there are none.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
if [ $# -eq 0 ]; then
    echo "usage: benchmarks/gpu.sh OUT.json [--decisive] [--part P,...]" >&2
    exit 2
fi
python=${PYTHON:-$(command -v python3 || command -v python)}
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: $python sees no torch, or torch no CUDA GPU: nothing was measured" >&2
    exit 2
fi
stubs=$(mktemp -d) || exit 2
trap 'rm -rf "$stubs"' EXIT
"$python" -c 'import jsonlines' 2>/dev/null || : >"$stubs/jsonlines.py"
"$python" -c 'import platformdirs' 2>/dev/null || cat >"$stubs/platformdirs.py" <<'STUB'
from pathlib import Path


def user_cache_path(name):
    return Path.home() / ".cache" / name
STUB
PYTHONPATH=$PYTHONPATH:$stubs "$python" "$root/benchmarks/gpu.py" "$@"
