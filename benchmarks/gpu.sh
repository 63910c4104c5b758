#!/usr/bin/env bash
# What a machine with a GPU has to show, in sections of less than nine minutes each:
#
#     benchmarks/gpu.sh tests        build, and all tests that run on the GPU
#     benchmarks/gpu.sh sanitizers   the operators' tests under compute-sanitizer
#     benchmarks/gpu.sh operators    kernels against twin, torch.compile and the dense formulation
#     benchmarks/gpu.sh backbones    Swin-L, baseline against expedited
#     benchmarks/gpu.sh models       Mask2Former up to its logits, baseline against expedited
#
# Results go to $OUT (default output/gpu) as JSON, with device, versions and commit. The active
# environment is used; only this GPU's architecture is compiled, unless TORCH_CUDA_ARCH_LIST is set.
set -euo pipefail
cd "$(dirname "$0")/.."

section=${1:-}
OUT=${OUT:-output/gpu}
PYTHON=${PYTHON:-python3}
LIMIT=530  # seconds

case "$section" in
  tests | sanitizers | operators | backbones | models) ;;
  *)
    echo "usage: benchmarks/gpu.sh tests|sanitizers|operators|backbones|models" >&2
    exit 2
    ;;
esac
"$PYTHON" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "error: torch sees no GPU here")'
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

build() {
  local arch
  arch=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch} \
    "$PYTHON" setup.py build_ext --inplace >"$OUT/build.log" 2>&1 ||
    { tail -n 40 "$OUT/build.log" >&2; exit 1; }
}

describe() {
  "$PYTHON" - "$OUT/machine.json" <<'PY'
import json, platform, subprocess, sys
import torch
from expedite_d2 import _ext

def output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        return None

query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
json.dump(
    {
        "gpu": output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "extension": _ext.build_info(),
        "commit": output("git", "describe", "--always", "--dirty"),
    },
    open(sys.argv[1], "w"),
    indent=2,
)
PY
  cat "$OUT/machine.json"
}

build
describe
case "$section" in
  tests)
    timeout "$LIMIT" "$PYTHON" -m pytest -q -rs tests/test_build.py tests/ops tests/test_hourglass.py \
      --junit-xml="$OUT/tests.xml"
    timeout "$LIMIT" "$PYTHON" -m pytest -q -rs -m cuda tests --ignore=tests/ops \
      --junit-xml="$OUT/tests_cuda.xml" || [ $? -eq 5 ]  # 5: no further test is marked
    ;;
  sanitizers)
    sanitizer=$(command -v compute-sanitizer || true)
    if [ -z "$sanitizer" ]; then
      echo "error: compute-sanitizer is not on the PATH; it comes with the CUDA toolkit" >&2
      exit 1
    fi
    # PyTorch's caching allocator would hide reads beyond a tensor's end.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck synccheck; do
      timeout $((LIMIT / 3)) "$sanitizer" --tool "$tool" --error-exitcode 9 --log-file "$OUT/$tool.log" \
        "$PYTHON" -m pytest -q -x tests/ops -m cuda -k "kernel and float32" -p no:cacheprovider ||
        { tail -n 40 "$OUT/$tool.log" >&2; exit 1; }
    done
    ;;
  operators)
    timeout "$LIMIT" "$PYTHON" benchmarks/operators.py --device cuda --output "$OUT/operators.json"
    ;;
  backbones)
    timeout "$LIMIT" "$PYTHON" benchmarks/models.py --part backbone --device cuda --output "$OUT/backbones.json"
    ;;
  models)
    timeout "$LIMIT" "$PYTHON" benchmarks/models.py --part model --device cuda --output "$OUT/models.json"
    ;;
esac
