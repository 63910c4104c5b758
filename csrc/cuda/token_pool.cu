// token_pool: means of groups of tokens. One warp per 32 V channels of a group looks through the
// groups of all tokens, a few bytes each, and reads the rows of its own; every row is read once.
#include "cuda/members.cuh"
#include "cuda/utils.cuh"

namespace expedite_d2::cuda {
namespace {

// A block takes the same channels of neighbouring groups; `tiles` blocks have all groups of an
// image.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 4)
    group_mean_kernel(const T* __restrict__ tokens,        // (B, N, C)
                      const int32_t* __restrict__ groups,  // (B, N)
                      T* __restrict__ out,                 // (B, count, C)
                      int32_t tokens_per_image, int32_t count, uint32_t tiles, int channels) {
  // 32-bit divisions: there are fewer than 2**31 blocks.
  const auto parts = static_cast<uint32_t>(ceil_div(channels, kWarp * V));
  const uint32_t part = blockIdx.x % parts, tile = blockIdx.x / parts;
  const int64_t image = tile / tiles;
  const int64_t group = int64_t{tile % tiles} * kWarps + threadIdx.x / kWarp;
  if (group >= count) {
    return;
  }
  const int own_channel =
      (static_cast<int>(part) * kWarp + static_cast<int>(threadIdx.x) % kWarp) * V;
  // Lanes beyond the last channel read what another lane reads, and write nothing.
  const T* from = tokens + image * tokens_per_image * channels + min(own_channel, channels - V);
  float sum[V] = {};
  int32_t members = 0;
  for_each_member(groups + image * tokens_per_image, tokens_per_image, static_cast<int32_t>(group),
                  [&](int32_t i) {
                    float z[V];
                    load<V>(from + int64_t{i} * channels, z);
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                      sum[v] += z[v];
                    }
                    ++members;
                  });
  if (own_channel < channels) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      sum[v] /= static_cast<float>(max(members, 1));
    }
    store<V>(out + (image * count + group) * channels + own_channel, sum);
  }
}

}  // namespace

cudaError_t launch_token_pool(const PoolParams& params, const void* tokens, const int32_t* groups,
                              void* out) {
  Launcher launch{params.stream};
  with_type(params.type, [&](auto type) {
    using T = decltype(type);
    const auto* z = static_cast<const T*>(tokens);
    auto* to = static_cast<T*>(out);
    const bool vectorised = can_vectorise<T>(params.channels, z, to);
    const int parts = ceil_div(params.channels, kWarp * (vectorised ? kVectorSize<T> : 1));
    const int64_t tiles = ceil_div<int64_t>(params.groups, kWarps);
    launch.blocks(vectorised ? group_mean_kernel<T, kVectorSize<T>> : group_mean_kernel<T, 1>,
                  params.batch * tiles * parts, kThreads, 0, z, groups, to, params.tokens,
                  params.groups, static_cast<uint32_t>(tiles), params.channels);
  });
  return launch.error;
}

}  // namespace expedite_d2::cuda
