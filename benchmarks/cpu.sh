#!/usr/bin/env bash
# The benchmarks at sizes for a few quiet CPU cores, about two hours on two:
#
#     benchmarks/cpu.sh [operators|backbones|models|competitors ...]      default: all of them
#
# Results go to $OUT (default benchmarks/results) as cpu-SECTION.json: `python -m benchmarks.report`
# makes docs/performance.md of them.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
# Else glibc returns every large tensor to the system, which zeroes its pages for the next one.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
# Weights and tokens on pages of 2 MiB, where the system gives them on request.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1

sections=("$@")
[ ${#sections[@]} -gt 0 ] || sections=(operators backbones models competitors)

benchmark() {
  local section=$1 name=$2
  shift 2
  "$PYTHON" -m "benchmarks.$name" --device cpu --output "$OUT/cpu-$section.json" "$@"
}

for section in "${sections[@]}"; do
  case "$section" in
    operators)
      benchmark operators operators --rounds 3 --cases swin_l_1152 vit_l_640 dpt_352x1216 \
        mask2former_1024 --modes reference released
      # Compiling takes longest: one case shows what it brings.
      benchmark operators-compiled operators --rounds 3 --cases swin_l_1152 --dtype float32 \
        --modes compiled
      ;;
    backbones)
      benchmark backbones models --part backbone --rounds 15 --systems panoptic semantic instance \
        --sizes 1152x1152 640x640 --dtype float32
      benchmark backbones-1024 models --part backbone --rounds 15 --systems panoptic \
        --sizes 1024x1024 --dtype float32
      benchmark backbones-1024-others models --part backbone --rounds 15 \
        --systems semantic instance --sizes 1024x1024 --dtype float32
      benchmark backbones-batch8 models --part backbone --rounds 2 --systems panoptic \
        --sizes 1152x1152 --dtype float32 --batch 8
      benchmark backbones-batch8-640 models --part backbone --rounds 5 --systems panoptic \
        --sizes 640x640 --dtype float32 --batch 8
      benchmark backbones-compiled models --part backbone --rounds 5 --systems panoptic \
        --sizes 1152x1152 --dtype float32 --modes compiled
      benchmark backbones-compiled-1024 models --part backbone --rounds 5 --systems panoptic \
        --sizes 1024x1024 --dtype float32 --modes compiled
      benchmark backbones-bfloat16 models --part backbone --rounds 11 --dtype bfloat16 \
        --systems panoptic semantic instance --sizes 1152x1152 1024x1024
      benchmark backbones-bfloat16-compiled models --part backbone --rounds 5 --dtype bfloat16 \
        --systems panoptic --sizes 1152x1152 --modes compiled
      benchmark backbones-vit models --part backbone --rounds 3 --systems segmenter dpt
      ;;
    models)
      benchmark models models --part model --rounds 5 --systems panoptic --sizes 1024x1024 \
        --dtype float32 --modes eager compiled
      benchmark models-bfloat16 models --part model --rounds 5 --systems panoptic \
        --sizes 1024x1024 --dtype bfloat16
      ;;
    competitors)
      benchmark competitors competitors --part speed accuracy --systems segmenter --rounds 2 \
        --dtype float32 --images 30
      ;;
    *)
      echo "usage: benchmarks/cpu.sh [operators|backbones|models|competitors ...]" >&2
      exit 2
      ;;
  esac
done
