#!/usr/bin/env bash
# The benchmarks at sizes for a few quiet CPU cores, about three hours on two:
#
#     benchmarks/cpu.sh [SECTION ...]      default: all of them
#
#     operators      kernels against reference, torch.compile, dense formulation
#     backbones      every backbone, baseline against expedited, at the paper's settings
#     models         whole Mask2Former up to its logits, and transformers' own
#     half           backbones at half of the blocks' multiply-adds
#     half-models    whole Mask2Former at that setting, and transformers' own
#     maps           Swin-L with detail maps, at both settings
#     competitors    other ways to half of the multiply-adds
#     others         transformers' Mask2Former, Depth Anything, SAM and DINOv3, plain and expedited
#     onnx           these in ONNX Runtime
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

SECTIONS="operators backbones models half half-models maps competitors others onnx"
sections=("$@")
[ ${#sections[@]} -gt 0 ] || read -ra sections <<<"$SECTIONS"

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
    half)
      benchmark half-vit models --part backbone --rounds 5 --systems segmenter_half dpt_half
      benchmark half-swin models --part backbone --rounds 5 --systems panoptic_half
      ;;
    half-models)
      benchmark half-models models --part model --rounds 5 --systems panoptic_half \
        --sizes 1024x1024 --dtype float32
      ;;
    maps)
      benchmark maps models --part backbone --rounds 7 --systems panoptic panoptic_half \
        --sizes 1152x1152 --dtype float32 --maps
      ;;
    competitors)
      benchmark competitors competitors --rounds 5 --dtype float32
      ;;
    others)
      benchmark others others --rounds 2
      ;;
    onnx)
      # ONNX Runtime keeps its memory by itself: PyTorch's, kept too, would be in its way.
      (
        unset MALLOC_MMAP_MAX_ MALLOC_TRIM_THRESHOLD_ MALLOC_TOP_PAD_ GLIBC_TUNABLES
        benchmark onnx onnx_runtime --rounds 3
      )
      ;;
    *)
      echo "usage: benchmarks/cpu.sh [${SECTIONS// /|} ...]" >&2
      exit 2
      ;;
  esac
done
