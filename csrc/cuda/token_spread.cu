// token_spread: mean squared distance of an image's tokens to their nearest initial centre.
//
// Four launches: centres by pooling, the image's mean token, two distances per token, one sum per
// image. Every sum has a fixed order, so the same input gives the same bits.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cuda/candidates.cuh"
#include "cuda/utils.cuh"
#include "cuda/windows.cuh"

namespace expedite_d2::cuda {
namespace {

// Threads of a block of mean_kernel that read neighbouring channels: 64 bytes of a token if each
// reads
// 16. Few, so that a single image still has blocks for most of a GPU.
constexpr int kMeanAcross = 4;
constexpr int kMeanThreads = 1024;

// Mean token of each image. One block per kMeanAcross V channels of an image; each thread takes V
// channels of every kDown-th token.
template <typename T, int V>
__global__ void __launch_bounds__(kMeanThreads)
    mean_kernel(const T* __restrict__ tokens,  // (B, N, C)
                float* __restrict__ mean,      // (B, C)
                int64_t count, int channels) {
  __shared__ float sums[kMeanThreads / kWarp][kMeanAcross * V];
  constexpr int kDown = kMeanThreads / kMeanAcross;
  const int parts = ceil_div(channels, kMeanAcross * V);
  const int64_t image = blockIdx.x / parts;
  const int across = static_cast<int>(threadIdx.x) % kMeanAcross * V;
  const int first = static_cast<int>(blockIdx.x % parts) * kMeanAcross * V;
  float sum[V] = {};
  if (first + across < channels) {
    const T* from = tokens + image * count * channels + first + across;
#pragma unroll 4
    for (int64_t n = threadIdx.x / kMeanAcross; n < count; n += kDown) {
      float z[V];
      load<V>(from + n * channels, z);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sum[v] += z[v];
      }
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int offset = kMeanAcross; offset < kWarp; offset *= 2) {
      sum[v] += __shfl_xor_sync(kAllLanes, sum[v], offset);
    }
    if (threadIdx.x % kWarp < kMeanAcross) {
      sums[threadIdx.x / kWarp][across + v] = sum[v];
    }
  }
  __syncthreads();
  const int c = static_cast<int>(threadIdx.x);
  if (c < kMeanAcross * V && first + c < channels) {
    float total = 0.f;
    for (int w = 0; w < kMeanThreads / kWarp; ++w) {
      total += sums[w][c];
    }
    mean[image * channels + first + c] = total / static_cast<float>(count);
  }
}

// The smaller number, or NaN if either is.
__device__ __forceinline__ float min_or_nan(float a, float b) {
  return a < b || a != a ? a : b;
}

// Squared distance of two rows. By a full warp.
template <int V, typename T>
__device__ __forceinline__ float row_distance(const T* a, const float* b, int channels) {
  float sum = 0.f;
  for (int c = static_cast<int>(threadIdx.x) % kWarp * V; c < channels; c += kWarp * V) {
    float x[V], y[V];
    load<V>(a + c, x);
    load<V>(b + c, y);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      sum = fmaf(x[v] - y[v], x[v] - y[v], sum);
    }
  }
  return warp_sum(sum);
}

// Distance of each token to its nearest candidate and to its image's mean.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    distance_kernel(const T* __restrict__ tokens,       // (B, H, W, C)
                    const float* __restrict__ centres,  // (B, h', w', C)
                    const float* __restrict__ mean,     // (B, C)
                    float* __restrict__ nearest,        // (B, H, W)
                    float* __restrict__ deviation,      // (B, H, W)
                    Grid grid, PairTiles tiles, int radius, CandidateShape shape, int channels) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const TokenPair& pair = token_pair(grid, radius, tiles);
  float distances[kPair] = {};
  float min_distance[kPair] = {INFINITY, INFINITY};
  for (int32_t first = 0; first < tiles.candidates; first += kWarp) {
    pair_distances<V>(tokens, centres, pair, first, channels, distances);
#pragma unroll
    for (int t = 0; t < kPair; ++t) {
      if (pair.slot(t, first + lane, shape.columns) >= 0) {
        min_distance[t] = min_or_nan(distances[t], min_distance[t]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kPair; ++t) {
    if (!pair.owns(t)) {
      continue;
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      min_distance[t] =
          min_or_nan(__shfl_xor_sync(kAllLanes, min_distance[t], offset), min_distance[t]);
    }
    const int64_t token = pair.first_token + t;
    const float own_deviation =
        row_distance<V>(tokens + token * channels, mean + pair.image * channels, channels);
    if (lane == 0) {
      nearest[token] = min_distance[t];
      deviation[token] = own_deviation;
    }
  }
}

// Means over the tokens of an image, and the floor. One block per image.
__global__ void __launch_bounds__(kThreads, 1)
    spread_kernel(const float* __restrict__ nearest,    // (B, N)
                  const float* __restrict__ deviation,  // (B, N)
                  float* __restrict__ spread,           // (B,)
                  int64_t count) {
  __shared__ float sums[kWarps];
  const int64_t image = blockIdx.x;
  float nearest_sum = 0.f;
  float deviation_sum = 0.f;
  for (int64_t n = threadIdx.x; n < count; n += kThreads) {
    nearest_sum += nearest[image * count + n];
    deviation_sum += deviation[image * count + n];
  }
  nearest_sum = block_sum(nearest_sum, sums) / static_cast<float>(count);
  deviation_sum = block_sum(deviation_sum, sums) / static_cast<float>(count);
  if (threadIdx.x == 0) {
    const float floor = fmaf(kSpreadFloor, deviation_sum, FLT_MIN);
    // NaN fails the comparison and is passed on.
    spread[image] = nearest_sum < floor ? floor : nearest_sum;
  }
}

template <typename T, int V>
void launch_distances(Launcher& launch, const Tokens& tokens, int radius, float* mean,
                      float* centres, float* nearest, float* deviation) {
  const auto* data = static_cast<const T*>(tokens.data);
  launch.blocks(mean_kernel<T, V>, tokens.batch * ceil_div(tokens.channels, kMeanAcross * V),
                kMeanThreads, 0, data, mean, token_count(tokens.grid, 1), tokens.channels);
  launch_pool<T, V>(launch, tokens, centres);
  const CandidateShape shape = candidate_shape(tokens.grid, radius);
  const PairTiles tiles(tokens.grid, shape, tokens.batch);
  launch.blocks(distance_kernel<T, std::min(V, kVectorSize<float>)>, tiles.blocks, kThreads, 0,
                data, centres, mean, nearest, deviation, tokens.grid, tiles, radius, shape,
                tokens.channels);
}

}  // namespace

cudaError_t launch_token_spread(const Tokens& tokens, int radius, float* spread, float* mean,
                                float* centres, float* nearest, float* deviation) {
  Launcher launch{tokens.stream};
  with_type(tokens.type, [&](auto type) {
    using T = decltype(type);
    const auto run = can_vectorise<T>(tokens.channels, tokens.data, mean, centres)
                         ? launch_distances<T, kVectorSize<T>>
                         : launch_distances<T, 1>;
    run(launch, tokens, radius, mean, centres, nearest, deviation);
  });
  launch.blocks(spread_kernel, tokens.batch, kThreads, 0, nearest, deviation, spread,
                token_count(tokens.grid, 1));
  return launch.error;
}

}  // namespace expedite_d2::cuda
