// Checks of the operators' arguments, the same for the CPU and the CUDA entries. The public Python
// functions have already checked what a user can get wrong; these hold for direct calls of
// torch.ops.expedite_d2, too, so that no kernel ever reads out of bounds.
//
// Every message names the operator, the argument, what was expected and what came.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>
#include <c10/util/OptionalArrayRef.h>

#include "geometry.h"

namespace expedite_d2 {

// The floating types that the kernels are compiled for.
inline void check_floating(const char* op, const char* name, const at::Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, op,
                   ": expected ", name, " of float32, bfloat16 or float16, got ", type);
}

// (B, H, W, C) of a floating type.
inline void check_tokens(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.dim() == 4, op, ": expected ", name, " of shape (B, H, W, C), got ",
                    tensor.sizes());
  check_floating(op, name, tensor);
}

inline void check_same_device(const char* op, const char* name, const at::Tensor& tensor,
                              const char* like_name, const at::Tensor& like) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), op, ": expected ", name, " on the device of ",
                    like_name, ", ", like.device(), ", got ", tensor.device());
}

inline void check_same_type(const char* op, const char* name, const at::Tensor& tensor,
                            const char* like_name, const at::Tensor& like) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), op, ": expected ", name,
                   " of the type of ", like_name, ", ", like.scalar_type(), ", got ",
                   tensor.scalar_type());
}

inline void check_shape(const char* op, const char* name, const at::Tensor& tensor,
                        at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, op, ": expected ", name, " of shape ", shape, ", got ",
                    tensor.sizes());
}

// (B, N, C) of a floating type, where only the batch may be empty.
inline void check_sequence(const char* op, const at::Tensor& tokens) {
  TORCH_CHECK_VALUE(
      tokens.dim() == 3 && tokens.size(1) > 0 && tokens.size(2) > 0, op,
      ": expected tokens of shape (B, N, C) with at least one token and channel, got ",
      tokens.sizes());
  check_floating(op, "tokens", tokens);
  TORCH_CHECK_VALUE(tokens.size(1) < (1 << 30), op, ": expected fewer than 2**30 tokens, got ",
                    tokens.size(1));
}

// (B, N) of the given type, beside a sequence of tokens.
inline void check_per_token(const char* op, const char* name, const at::Tensor& tensor,
                            at::ScalarType type, const at::Tensor& tokens) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, op, ": expected ", name, " of type ", type,
                   ", got ", tensor.scalar_type());
  check_same_device(op, name, tensor, "tokens", tokens);
  check_shape(op, name, tensor, tokens.sizes().slice(0, 2));
}

inline void check_neighbourhood(const char* op, int64_t neighbourhood) {
  TORCH_CHECK_VALUE(neighbourhood >= 1 && neighbourhood % 2 == 1 &&
                        neighbourhood <= std::numeric_limits<int32_t>::max() / 2,
                    op, ": expected neighbourhood to be odd and at least 1, got ", neighbourhood);
}

inline void check_iterations(const char* op, int64_t iterations) {
  TORCH_CHECK_VALUE(iterations >= 0, op, ": expected iterations of at least 0, got ", iterations);
}

inline void check_topk(const char* op, int64_t topk) {
  TORCH_CHECK_VALUE(topk >= 1 && topk <= std::numeric_limits<int32_t>::max() / 2, op,
                    ": expected topk of at least 1 and less than 2**30, got ", topk);
}

// (B,) of float32, beside the tokens.
inline void check_spread(const char* op, const std::optional<at::Tensor>& spread,
                         const at::Tensor& tokens) {
  if (!spread.has_value()) {
    return;
  }
  check_same_device(op, "spread", *spread, "tokens", tokens);
  TORCH_CHECK_TYPE(spread->scalar_type() == at::kFloat, op, ": expected spread of float32, got ",
                   spread->scalar_type());
  check_shape(op, "spread", *spread, {tokens.size(0)});
}

// Checks `clusters` (h, w) and `window` (M_h, M_w) against checked tokens (B, H, W, C).
inline Grid make_grid(const char* op, const at::Tensor& tokens, at::IntArrayRef clusters,
                      at::OptionalIntArrayRef window) {
  TORCH_CHECK_VALUE(clusters.size() == 2 && clusters[0] >= 1 && clusters[1] >= 1, op,
                    ": expected clusters to be two positive integers, got ", clusters);
  TORCH_CHECK_VALUE(
      !window.has_value() || (window->size() == 2 && (*window)[0] >= 1 && (*window)[1] >= 1), op,
      ": expected window to be two positive integers, got ", window.value_or(at::IntArrayRef()));
  WindowAxis axes[2];
  for (const int axis : {0, 1}) {
    const int64_t size = tokens.size(1 + axis);
    // An empty grid has no window to divide by; its single window has no token either.
    const int64_t side = window.has_value() ? (*window)[axis] : std::max<int64_t>(size, 1);
    // geometry.h multiplies sizes by cells in 32 bits.
    const int64_t limit = std::numeric_limits<int32_t>::max() / 2;
    TORCH_CHECK_VALUE(side <= limit && clusters[axis] <= limit &&
                          std::max(size, side) + 1 <= limit / (clusters[axis] + 1),
                      op, ": expected fewer tokens and clusters along a side, got ", size,
                      " tokens, windows of ", side, " and ", clusters[axis], " clusters");
    axes[axis] = {static_cast<int32_t>(size), static_cast<int32_t>(side),
                  static_cast<int32_t>(clusters[axis])};
  }
  TORCH_CHECK_VALUE(tokens.size(1) * tokens.size(2) <= std::numeric_limits<int32_t>::max(), op,
                    ": expected a map of fewer than 2**31 tokens, got ", tokens.size(1), " x ",
                    tokens.size(2));
  const Grid grid{axes[0], axes[1]};
  TORCH_CHECK_VALUE(
      int64_t{grid.rows.cells()} * grid.columns.cells() <= std::numeric_limits<int32_t>::max(), op,
      ": expected a map of fewer than 2**31 centres, got ", grid.rows.cells(), " x ",
      grid.columns.cells());
  return grid;
}

// Checks all tensors of token_reconstruct: refined (B, h', w', C), indices and weights
// (B, H, W, topk), and with both or none: tokens (B, H, W, C), centres (B, h', w', C).
inline void check_reconstruct(const char* op, const at::Tensor& refined, const at::Tensor& indices,
                              const at::Tensor& weights, const std::optional<at::Tensor>& tokens,
                              const std::optional<at::Tensor>& centres) {
  check_tokens(op, "refined", refined);
  TORCH_CHECK_VALUE(indices.dim() == 4 && indices.size(0) == refined.size(0), op,
                    ": expected indices of shape (B, H, W, topk) with B = ", refined.size(0),
                    ", got ", indices.sizes());
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kInt, op, ": expected indices of int32, got ",
                   indices.scalar_type());
  check_same_device(op, "indices", indices, "refined", refined);
  TORCH_CHECK_TYPE(weights.scalar_type() == at::kFloat, op, ": expected weights of float32, got ",
                   weights.scalar_type());
  check_same_device(op, "weights", weights, "refined", refined);
  check_shape(op, "weights", weights, indices.sizes());
  TORCH_CHECK_VALUE(refined.size(1) * refined.size(2) > 0 || indices.numel() == 0, op,
                    ": expected refined to hold at least one centre, got ", refined.sizes());
  TORCH_CHECK_VALUE(tokens.has_value() == centres.has_value(), op,
                    ": expected tokens and centres together, got no ",
                    tokens.has_value() ? "centres" : "tokens");
  if (tokens.has_value()) {
    check_same_device(op, "tokens", *tokens, "refined", refined);
    check_same_type(op, "tokens", *tokens, "refined", refined);
    check_shape(op, "tokens", *tokens,
                {indices.size(0), indices.size(1), indices.size(2), refined.size(3)});
    check_same_device(op, "centres", *centres, "refined", refined);
    check_same_type(op, "centres", *centres, "refined", refined);
    check_shape(op, "centres", *centres, refined.sizes());
  }
}

inline void check_merge(const char* op, const at::Tensor& tokens, const at::Tensor& sizes,
                        int64_t merged) {
  check_sequence(op, tokens);
  check_per_token(op, "sizes", sizes, at::kFloat, tokens);
  TORCH_CHECK_VALUE(merged >= 0 && merged <= tokens.size(1) / 2, op, ": expected merged from 0 to ",
                    tokens.size(1) / 2, ", got ", merged);
}

inline void check_pool(const char* op, const at::Tensor& tokens, const at::Tensor& groups,
                       int64_t count) {
  check_sequence(op, tokens);
  check_per_token(op, "groups", groups, at::kInt, tokens);
  TORCH_CHECK_VALUE(count >= 1 && count <= std::numeric_limits<int32_t>::max(), op,
                    ": expected count of at least 1 and less than 2**31, got ", count);
}

// Checks all tensors of ms_deform_attn: value (B, S, heads, D), sampling_locations (B, Q, heads,
// levels, points, 2), attention_weights (B, Q, heads, levels, points), and that every level, with
// sizes h0, w0, h1, w1 ... and its first row, lies within S.
inline void check_deform(const char* op, const at::Tensor& value, at::IntArrayRef spatial_shapes,
                         at::IntArrayRef level_start, const at::Tensor& locations,
                         const at::Tensor& weights) {
  check_tokens(op, "value", value);
  const auto type = locations.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == value.scalar_type(), op,
                   ": expected sampling_locations of float32 or the type of value, got ", type);
  check_same_device(op, "sampling_locations", locations, "value", value);
  const auto levels = static_cast<int64_t>(level_start.size());
  TORCH_CHECK_VALUE(locations.dim() == 6 && locations.size(0) == value.size(0) &&
                        locations.size(2) == value.size(2) && locations.size(3) == levels &&
                        locations.size(5) == 2,
                    op,
                    ": expected sampling_locations of shape (B, Q, heads, levels, points, 2) "
                    "with B = ",
                    value.size(0), ", ", value.size(2), " heads and ", levels, " levels, got ",
                    locations.sizes());
  check_same_device(op, "attention_weights", weights, "value", value);
  check_same_type(op, "attention_weights", weights, "sampling_locations", locations);
  check_shape(op, "attention_weights", weights, locations.sizes().slice(0, 5));
  // Rows of maps, and the two rows and columns that the kernels step outside, are 32-bit numbers.
  TORCH_CHECK_VALUE(value.size(1) < (1 << 29), op, ": expected value of less than 2**29 rows, got ",
                    value.size(1));
  TORCH_CHECK_VALUE(static_cast<int64_t>(spatial_shapes.size()) == 2 * levels, op,
                    ": expected spatial_shapes to be two sizes for each of ", levels,
                    " levels, got ", spatial_shapes);
  for (int64_t level = 0; level < levels; ++level) {
    const int64_t height = spatial_shapes[2 * level], width = spatial_shapes[2 * level + 1];
    const int64_t start = level_start[level];
    TORCH_CHECK_VALUE(height >= 1 && width >= 1 && start >= 0 && start < value.size(1) &&
                          height <= (value.size(1) - start) / width,
                      op, ": expected level_start and spatial_shapes within the ", value.size(1),
                      " rows of value, got ", height, " x ", width, " rows from ", start);
  }
}

// (B, Q, heads * D), of the type of value.
inline void check_deform_gradient(const char* op, const at::Tensor& grad, const at::Tensor& value,
                                  const at::Tensor& locations) {
  check_same_device(op, "grad", grad, "value", value);
  check_same_type(op, "grad", grad, "value", value);
  check_shape(op, "grad", grad, {value.size(0), locations.size(1), value.size(2) * value.size(3)});
}

}  // namespace expedite_d2
