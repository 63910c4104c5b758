// What the host entries of the CUDA kernels share: from checked tensors to what cuda/launch.h
// takes.
//
// Entries are compiled apart from the kernels, because nvcc would parse torch's headers once more
// for each architecture. Only the c10/cuda headers are included: ATen/cuda/CUDAContext.h needs
// those of cuBLAS and cuSPARSE, which a bare CUDA toolkit lacks. No entry waits for the device or
// copies from it.
#pragma once

#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "checks.h"
#include "cuda/launch.h"

namespace expedite_d2::cuda {

inline Type kernel_type(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Type::kFloat;
    case at::kBFloat16:
      return Type::kBFloat16;
    default:
      return Type::kHalf;  // check_tokens admits no other
  }
}

// The kernels count channels in 32 bits, with room to step past the end, and the bytes of a row.
inline int checked_channels(const char* op, const at::Tensor& tokens) {
  TORCH_CHECK_VALUE(tokens.size(-1) < (1 << 30), op, ": expected fewer than 2**30 channels, got ",
                    tokens.size(-1));
  return static_cast<int>(tokens.size(-1));
}

inline std::optional<at::Tensor> dense(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? std::make_optional(tensor->contiguous()) : std::nullopt;
}

inline const void* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

inline Temperature make_temperature(double value, const std::optional<at::Tensor>& spread) {
  return {static_cast<float>(value), static_cast<const float*>(data_or_null(spread))};
}

// Dense `tokens` on the current device and stream.
inline Tokens make_tokens(const char* op, const at::Tensor& tokens, const Grid& grid) {
  return {tokens.const_data_ptr(),
          kernel_type(tokens),
          grid,
          tokens.size(0),
          checked_channels(op, tokens),
          c10::cuda::getCurrentCUDAStream().stream()};
}

inline at::Tensor empty_map(const at::Tensor& tokens, const Grid& grid, at::ScalarType type) {
  return at::empty({tokens.size(0), grid.rows.cells(), grid.columns.cells(), tokens.size(3)},
                   tokens.options().dtype(type));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, c10::cuda::current_device()));
  return value;
}

// Bytes of shared memory that one block may have on the current device: 99 KiB on some cards, 227
// on others.
inline size_t shared_memory_limit() {
  return static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// Gram matrices are for windows alone: with them, a token that is not finite spoils all centres,
// which is what it means in a window, but not in a whole image.
inline GramPlan make_gram_plan(const Tokens& tokens, bool has_window) {
  return !has_window ? GramPlan{}
                     : gram_plan(tokens, shared_memory_limit(),
                                 device_attribute(cudaDevAttrMultiProcessorCount));
}

inline void run_gram(const Tokens& tokens, const GramPlan& plan, const ReduceParams& params,
                     const at::TensorOptions& options) {
  const at::Tensor scratch = at::empty({plan.scratch}, options.dtype(at::kFloat));
  C10_CUDA_CHECK(launch_token_reduce(tokens, plan, params, scratch.mutable_data_ptr<float>()));
}

// What token_reduce calls of the other operators where it has no kernels of its own. `tokens` are
// dense and checked, and `input` describes them.

// The spread of each image, (B,).
at::Tensor measure_spread(const at::Tensor& tokens,  // (B, H, W, C)
                          const Tokens& input, int64_t neighbourhood);

// Centres (B, h', w', C) in float32, before token_cluster rounds them to the type of the tokens.
at::Tensor find_centres(const at::Tensor& tokens,  // (B, H, W, C)
                        const Tokens& input, bool has_window, int64_t iterations,
                        int64_t neighbourhood, Temperature temperature);

// Indices and weights, (B, H, W, topk).
std::tuple<at::Tensor, at::Tensor> find_matches(
    const at::Tensor& tokens,   // (B, H, W, C)
    const at::Tensor& centres,  // float32 (B, h', w', C)
    const Tokens& input, int64_t topk, Temperature temperature);

}  // namespace expedite_d2::cuda
