// token_reconstruct: the high-resolution map from refined centres. A warp a token: it reads the
// rows of its topk centres, and nothing twice; bound by memory.
#include "cuda/utils.cuh"

namespace expedite_d2::cuda {
namespace {

// out_p = sum_k w_pk y_i, or z_p + sum_k w_pk (y_i - s_i) with tokens z and centres s.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 1)
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
  const int64_t image = token / tokens_per_image;
  for (int c = static_cast<int>(threadIdx.x) % kWarp * V; c < channels; c += kWarp * V) {
    float sum[V] = {};
    if (tokens != nullptr) {
      load<V>(tokens + token * channels + c, sum);
    }
    for (int64_t k = token * topk; k < (token + 1) * topk; ++k) {
      // token_match gives no index out of range; from elsewhere it must not read foreign memory.
      const int64_t index = min(max(int64_t{indices[k]}, int64_t{0}), cells - 1);
      const int64_t row = (image * cells + index) * channels + c;
      const float weight = weights[k];
      float y[V];
      load<V>(refined + row, y);
      if (centres != nullptr) {
        float s[V];
        load<V>(centres + row, s);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          y[v] -= s[v];
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sum[v] = fmaf(weight, y[v], sum[v]);
      }
    }
    store<V>(out + token * channels + c, sum);
  }
}

}  // namespace

cudaError_t launch_token_reconstruct(const Reconstruction& sizes, const void* refined,
                                     const int32_t* indices, const float* weights,
                                     const void* tokens, const void* centres, void* out) {
  Launcher launch{sizes.stream};
  with_type(sizes.type, [&](auto type) {
    using T = decltype(type);
    const auto* y = static_cast<const T*>(refined);
    const auto* z = static_cast<const T*>(tokens);
    const auto* s = static_cast<const T*>(centres);
    auto* to = static_cast<T*>(out);
    const int64_t count = sizes.batch * sizes.tokens;
    launch.warps(can_vectorise(sizes.channels, y, z, s, to) ? reconstruct_kernel<T, kVector>
                                                            : reconstruct_kernel<T, 1>,
                 count, y, indices, weights, z, s, to, count, sizes.tokens, sizes.cells, sizes.topk,
                 sizes.channels);
  });
  return launch.error;
}

}  // namespace expedite_d2::cuda
