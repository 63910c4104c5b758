#!/usr/bin/env bash
# What a machine with a GPU has to show, in sections of less than nine minutes each:
#
#     benchmarks/gpu.sh tests               build, and all tests that run on the GPU
#     benchmarks/gpu.sh sanitizers          the operators' tests under compute-sanitizer
#     benchmarks/gpu.sh operators           kernels against reference, torch.compile, dense formulation
#     benchmarks/gpu.sh backbones           every backbone, baseline against expedited, the paper's settings
#     benchmarks/gpu.sh backbones-compiled  the same under torch.compile, Swin-L at 1152x1152 first
#     benchmarks/gpu.sh models              whole models up to their logits, and transformers' own
#     benchmarks/gpu.sh models-compiled     the same under torch.compile
#     benchmarks/gpu.sh half                backbones at half of the blocks' multiply-adds
#     benchmarks/gpu.sh half-models         whole models at that setting, and transformers' own
#     benchmarks/gpu.sh maps                Swin-L with detail maps, at both settings
#     benchmarks/gpu.sh competitors         other ways to half of the multiply-adds
#     benchmarks/gpu.sh others              transformers' own models, plain and expedited
#
# Further arguments go to the section's benchmark: `gpu.sh backbones --systems dpt --batch 32`, and
# `gpu.sh sanitizers racecheck` runs that tool alone. What there was no time for is listed in the
# results under "skipped": name it in a second run.
#
# Results go to $OUT (default output/gpu) as JSON, with device, versions and commit; copied to
# benchmarks/results they become docs/performance.md by `python -m benchmarks.report`. The active
# environment is used; only this GPU's architecture is compiled, unless TORCH_CUDA_ARCH_LIST is set.
set -euo pipefail
cd "$(dirname "$0")/.."

SECTIONS="tests sanitizers operators backbones backbones-compiled models models-compiled half"
SECTIONS+=" half-models maps competitors others"
PAPER="panoptic semantic instance segmenter dpt"  # systems at the paper's settings
HALF="panoptic_half segmenter_half dpt_half"
section=${1:-}
case " $SECTIONS " in
  *" ${section:-none} "*) shift ;;
  *)
    echo "usage: benchmarks/gpu.sh ${SECTIONS// /|} [arguments]" >&2
    exit 2
    ;;
esac
OUT=${OUT:-output/gpu}
PYTHON=${PYTHON:-python3}
LIMIT=530  # seconds for all, the build included
START=$SECONDS
"$PYTHON" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "error: torch sees no GPU here")'
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1

left() { echo $((LIMIT - (SECONDS - START))); }

build() {
  local arch
  arch=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch} \
    "$PYTHON" setup.py build_ext --inplace >"$OUT/build.log" 2>&1 ||
    { tail -n 40 "$OUT/build.log" >&2; exit 1; }
}

describe() {
  "$PYTHON" - "$OUT/machine.json" <<'PY'
import json, subprocess, sys
import torch
from benchmarks.common import environment

def output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        return None

query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
facts = {
    "gpu": output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
    "capability": torch.cuda.get_device_capability(),
    **environment("cuda"),
}
json.dump(facts, open(sys.argv[1], "w"), indent=2)
PY
  cat "$OUT/machine.json"
  echo
}

# Begins nothing new in the last minute; what is under way then may still be killed, and what was
# measured before stays.
benchmark() {
  local file=$1 name=$2
  shift 2
  timeout "$(left)" "$PYTHON" -m "benchmarks.$name" --device cuda \
    --seconds $(($(left) - 60)) --output "$OUT/$file.json" "$@"
}

sanitize() {
  local tool=$1 seconds=$2 sanitizer
  sanitizer=$(command -v compute-sanitizer || true)
  if [ -z "$sanitizer" ]; then
    echo "error: compute-sanitizer is not on the PATH; it comes with the CUDA toolkit" >&2
    exit 1
  fi
  # PyTorch's caching allocator would hide reads beyond a tensor's end.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$seconds" \
    "$sanitizer" --tool "$tool" --error-exitcode 9 --log-file "$OUT/$tool.log" \
    "$PYTHON" -m pytest -q -x tests/ops -m cuda -k "(kernel or reduce) and float32" -p no:cacheprovider ||
    { echo "error: $tool failed" >&2; tail -n 40 "$OUT/$tool.log" >&2; exit 1; }
}

build
describe
case "$section" in
  tests)
    timeout "$(left)" "$PYTHON" -m pytest -q -rs tests/test_build.py tests/ops tests/reducers \
      --junit-xml="$OUT/tests.xml"
    timeout "$(left)" "$PYTHON" -m pytest -q -rs -m cuda tests --ignore=tests/ops \
      --junit-xml="$OUT/tests_cuda.xml" || [ $? -eq 5 ]  # 5: no further test is marked
    ;;
  sanitizers)
    tools=("$@")
    [ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck initcheck synccheck)
    share=$(($(left) / ${#tools[@]}))
    for tool in "${tools[@]}"; do
      sanitize "$tool" "$share"
    done
    ;;
  operators)
    benchmark operators operators --modes reference released "$@"
    # Compiling takes longest, so it comes last.
    benchmark operators-compiled operators --modes compiled \
      --cases swin_l_1152 vit_l_640 swin_l_1152_batch8 dpt_352x1216 "$@"
    ;;
  backbones)
    benchmark "$section" models --part backbone --systems $PAPER --batch 1 8 "$@"
    ;;
  backbones-compiled)
    benchmark "$section" models --part backbone --systems $PAPER --batch 1 8 --modes compiled "$@"
    ;;
  models)
    benchmark "$section" models --part model --systems panoptic segmenter dpt --batch 1 8 "$@"
    ;;
  models-compiled)
    benchmark "$section" models --part model --systems panoptic segmenter dpt --modes compiled "$@"
    ;;
  half)
    benchmark "$section" models --part backbone --systems $HALF --batch 1 8 "$@"
    ;;
  half-models)
    benchmark "$section" models --part model --systems $HALF --batch 1 8 "$@"
    ;;
  maps)
    benchmark "$section" models --part backbone --systems panoptic panoptic_half --batch 1 8 \
      --maps "$@"
    ;;
  competitors)
    benchmark "$section" competitors --batch 1 8 "$@"
    ;;
  others)
    benchmark "$section" others --batch 1 8 "$@"
    ;;
esac
