// What token_reduce calls of the other operators on the CPU: their kernels behind the checks.
#pragma once

#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>

#include "geometry.h"

namespace expedite_d2::cpu {

// The spread of each image, (B,).
at::Tensor measure_spread(const at::Tensor& tokens,  // (B, H, W, C)
                          const Grid& grid, int64_t neighbourhood);

// Centres (B, h', w', C) in float32, before token_cluster rounds them to the type of the tokens.
at::Tensor find_centres(const at::Tensor& tokens,  // (B, H, W, C)
                        const Grid& grid, bool has_window, int64_t iterations,
                        int64_t neighbourhood, double temperature,
                        const std::optional<at::Tensor>& spread);  // (B,)

// Indices and weights, (B, H, W, topk).
std::tuple<at::Tensor, at::Tensor> find_matches(
    const at::Tensor& tokens,   // (B, H, W, C)
    const at::Tensor& centres,  // float32 (B, h', w', C)
    const Grid& grid, int64_t topk, double temperature,
    const std::optional<at::Tensor>& spread);  // (B,)

}  // namespace expedite_d2::cpu
