// token_reconstruct: the high-resolution map from refined centres. One warp per 32 V channels of a
// token reads the rows of its topk centres, and nothing twice; bound by memory.
#include "cuda/utils.cuh"

namespace expedite_d2::cuda {
namespace {

// Centres whose rows are in flight together.
constexpr int kInFlight = 4;

// out_p = sum_k w_pk y_i, or z_p + sum_k w_pk (y_i - s_i) with tokens z and centres s. A block
// takes the same channels of neighbouring tokens, which share centres; `tiles` blocks have all
// tokens of an image.
template <typename T, int V, bool kResidual>
__global__ void __launch_bounds__(kThreads, 3)
    reconstruct_kernel(const T* __restrict__ refined,        // (B, K, C)
                       const int32_t* __restrict__ indices,  // (B, N, topk)
                       const float* __restrict__ weights,    // (B, N, topk)
                       const T* __restrict__ tokens,         // (B, N, C) or null
                       const T* __restrict__ centres,        // (B, K, C) or null
                       T* __restrict__ out,                  // (B, N, C)
                       int64_t tokens_per_image, uint32_t tiles, int64_t cells, int64_t topk,
                       int channels) {
  // 32-bit divisions: there are fewer than 2**31 blocks.
  const auto parts = static_cast<uint32_t>(ceil_div(channels, kWarp * V));
  const uint32_t part = blockIdx.x % parts, tile = blockIdx.x / parts;
  const int64_t image = tile / tiles;
  const int64_t place = int64_t{tile % tiles} * kWarps + threadIdx.x / kWarp;
  if (place >= tokens_per_image) {
    return;
  }
  const int64_t token = image * tokens_per_image + place;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int own_channel = (static_cast<int>(part) * kWarp + lane) * V;
  // Lanes beyond the last channel read what another lane reads, and write nothing.
  const int c = min(own_channel, channels - V);
  const int64_t first_row = image * cells * channels + c;
  const uint32_t row_bytes = channels * sizeof(T);
  // Unpacked at the end, so that nothing waits for it.
  Raw<T, V> own;
  if constexpr (kResidual) {
    own = load_once<V>(tokens + token * channels + c);
  }
  float sum[V] = {};
  for (int64_t start = 0; start < topk; start += kWarp) {
    // Each lane holds one of the token's centres for all lanes: its row and its weight. Past the
    // last centre the row is -1.
    int own_row = -1;
    float own_weight = 0.f;
    if (start + lane < topk) {
      const int64_t at = token * topk + start + lane;
      // token_match gives no index out of range; indices from elsewhere must not read out of
      // bounds.
      own_row = static_cast<int>(min(max(int64_t{indices[at]}, int64_t{0}), cells - 1));
      own_weight = weights[at];
    }
    const int filled = static_cast<int>(min(topk - start, int64_t{kWarp}));
    for (int first = 0; first < filled; first += kInFlight) {
      Raw<T, V> y[kInFlight], s[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const int row = __shfl_sync(kAllLanes, own_row, first + k);
        y[k] = load_if<V>(row >= 0, refined + first_row, row, row_bytes);
        if constexpr (kResidual) {
          s[k] = load_if<V>(row >= 0, centres + first_row, row, row_bytes);
        }
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const float weight = __shfl_sync(kAllLanes, own_weight, first + k);
        float change[V];
        unpack<T>(y[k], change);
        if constexpr (kResidual) {
          float centre[V];
          unpack<T>(s[k], centre);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            change[v] -= centre[v];
          }
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
          sum[v] = fmaf(weight, change[v], sum[v]);
        }
      }
    }
  }
  if (own_channel < channels) {
    if constexpr (kResidual) {
      float z[V];
      unpack<T>(own, z);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sum[v] += z[v];
      }
    }
    store<V>(out + token * channels + c, sum);
  }
}

// Tokens and centres are given together.
template <typename T, int V>
auto choose_kernel(bool residual) {
  return residual ? reconstruct_kernel<T, V, true> : reconstruct_kernel<T, V, false>;
}

}  // namespace

cudaError_t launch_token_reconstruct(const ReconstructParams& params, const void* refined,
                                     const int32_t* indices, const float* weights,
                                     const void* tokens, const void* centres, void* out) {
  Launcher launch{params.stream};
  const bool residual = tokens != nullptr;
  with_type(params.type, [&](auto type) {
    using T = decltype(type);
    const auto* y = static_cast<const T*>(refined);
    const auto* z = static_cast<const T*>(tokens);
    const auto* s = static_cast<const T*>(centres);
    auto* to = static_cast<T*>(out);
    const bool vectorised = can_vectorise<T>(params.channels, y, z, s, to);
    const int parts = ceil_div(params.channels, kWarp * (vectorised ? kVectorSize<T> : 1));
    const int64_t tiles = ceil_div<int64_t>(params.tokens, kWarps);
    launch.blocks(
        vectorised ? choose_kernel<T, kVectorSize<T>>(residual) : choose_kernel<T, 1>(residual),
        params.batch * tiles * parts, kThreads, 0, y, indices, weights, z, s, to, params.tokens,
        static_cast<uint32_t>(tiles), params.cells, params.topk, params.channels);
  });
  return launch.error;
}

}  // namespace expedite_d2::cuda
