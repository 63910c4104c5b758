// token_reconstruct: the high-resolution map from refined centres. A warp a token: it reads the
// rows of its topk centres, and nothing twice; bound by memory.
#include "cuda/utils.cuh"

namespace expedite_d2::cuda {
namespace {

// Centres whose rows are in flight together.
constexpr int kInFlight = 4;

// out_p = sum_k w_pk y_i, or z_p + sum_k w_pk (y_i - s_i) with tokens z and centres s.
template <typename T, int V, bool kResidual>
__global__ void __launch_bounds__(kThreads, 2)
    reconstruct_kernel(const T* __restrict__ refined,        // (B, K, C)
                       const int32_t* __restrict__ indices,  // (B, N, topk)
                       const float* __restrict__ weights,    // (B, N, topk)
                       const T* __restrict__ tokens,         // (B, N, C) or null
                       const T* __restrict__ centres,        // (B, K, C) or null
                       T* __restrict__ out,                  // (B, N, C)
                       int64_t count, int64_t tokens_per_image, int64_t cells, int64_t topk,
                       int channels) {
  const int64_t token = global_warp();
  if (token >= count) {
    return;
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t first_row = token / tokens_per_image * cells;
  // Every lane keeps one of the token's centres for all of them: its row, and its weight.
  int64_t own_row = 0;
  float own_weight = 0.f;
  for (int block = 0; block < channels; block += kWarp * V) {
    // Lanes beyond the last channel read what another one reads, and write nothing.
    const int c = min(block + lane * V, channels - V);
    float sum[V] = {};
    if constexpr (kResidual) {
      load<V>(tokens + token * channels + c, sum);
    }
    for (int64_t start = 0; start < topk; start += kWarp) {
      if (block == 0 || topk > kWarp) {
        // Behind the last centre it is repeated, and not added.
        const int64_t at = token * topk + min(start + lane, topk - 1);
        // token_match gives no index out of range; from elsewhere it must not read foreign memory.
        own_row = first_row + min(max(int64_t{indices[at]}, int64_t{0}), cells - 1);
        own_weight = weights[at];
      }
      const int filled = static_cast<int>(min(topk - start, int64_t{kWarp}));
      for (int first = 0; first < filled; first += kInFlight) {
        float y[kInFlight][V], s[kInFlight][V], weight[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          const int64_t row = __shfl_sync(kAllLanes, own_row, first + k) * channels + c;
          weight[k] = __shfl_sync(kAllLanes, own_weight, first + k);
          load<V>(refined + row, y[k]);
          if constexpr (kResidual) {
            load<V>(centres + row, s[k]);
          }
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          if (first + k < filled) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
              const float change = kResidual ? y[k][v] - s[k][v] : y[k][v];
              sum[v] = fmaf(weight[k], change, sum[v]);
            }
          }
        }
      }
    }
    if (block + lane * V < channels) {
      store<V>(out + token * channels + c, sum);
    }
  }
}

// Tokens and centres are given together.
template <typename T, int V>
auto choose_kernel(bool residual) {
  return residual ? reconstruct_kernel<T, V, true> : reconstruct_kernel<T, V, false>;
}

}  // namespace

cudaError_t launch_token_reconstruct(const Reconstruction& sizes, const void* refined,
                                     const int32_t* indices, const float* weights,
                                     const void* tokens, const void* centres, void* out) {
  Launcher launch{sizes.stream};
  const bool residual = tokens != nullptr;
  with_type(sizes.type, [&](auto type) {
    using T = decltype(type);
    const auto* y = static_cast<const T*>(refined);
    const auto* z = static_cast<const T*>(tokens);
    const auto* s = static_cast<const T*>(centres);
    auto* to = static_cast<T*>(out);
    const int64_t count = sizes.batch * sizes.tokens;
    launch.warps(can_read_wide<T>(sizes.channels, y, z, s, to)
                     ? choose_kernel<T, kWide<T>>(residual)
                     : choose_kernel<T, 1>(residual),
                 count, y, indices, weights, z, s, to, count, sizes.tokens, sizes.cells, sizes.topk,
                 sizes.channels);
  });
  return launch.error;
}

}  // namespace expedite_d2::cuda
