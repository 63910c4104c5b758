// token_spread: mean squared distance of an image's tokens to their nearest initial centre.
//
// Four launches: centres by pooling, the image's mean token, two distances a token, one sum an
// image. Every sum has a fixed order, so the same input gives the same bits.
#include <cfloat>
#include <cmath>

#include "cuda/utils.cuh"
#include "cuda/windows.cuh"

namespace expedite_d2::cuda {
namespace {

// Rows of tokens that a block of mean_kernel adds up in parallel.
constexpr int kMeanRows = 32;

// Mean token of each image. A block for 32 channels of an image: a thread adds every 32nd token.
template <typename T>
__global__ void __launch_bounds__(kWarp* kMeanRows)
    mean_kernel(const T* __restrict__ tokens,  // (B, N, C)
                float* __restrict__ mean,      // (B, C)
                int64_t count, int channels) {
  __shared__ float sums[kMeanRows][kWarp];
  const int parts = ceil_div(channels, kWarp);
  const int64_t image = blockIdx.x / parts;
  const int lane = threadIdx.x % kWarp;
  const int row = threadIdx.x / kWarp;
  const int c = static_cast<int>(blockIdx.x % parts) * kWarp + lane;
  float sum = 0.f;
  if (c < channels) {
    for (int64_t n = row; n < count; n += kMeanRows) {
      sum += static_cast<float>(tokens[(image * count + n) * channels + c]);
    }
  }
  sums[row][lane] = sum;
  __syncthreads();
  if (row == 0 && c < channels) {
    float total = 0.f;
    for (int r = 0; r < kMeanRows; ++r) {
      total += sums[r][lane];
    }
    mean[image * channels + c] = total / static_cast<float>(count);
  }
}

// The smaller number, or NaN if either is.
__device__ __forceinline__ float least_or_nan(float a, float b) {
  return a < b || a != a ? a : b;
}

// Distance of each token to its nearest candidate and to its image's mean. A warp a token.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 1)
    distance_kernel(const T* __restrict__ tokens,       // (B, H, W, C)
                    const float* __restrict__ centres,  // (B, h', w', C)
                    const float* __restrict__ mean,     // (B, C)
                    float* __restrict__ nearest,        // (B, H, W)
                    float* __restrict__ deviation,      // (B, H, W)
                    Grid grid, int radius, int channels, int64_t count) {
  const int64_t token = global_warp();
  if (token >= count) {
    return;
  }
  const Position at = position(token, grid.rows.size, grid.columns.size);
  const Spot row = token_spot(grid.rows, at.row);
  const Spot column = token_spot(grid.columns, at.column);
  const int32_t bottom = grid.rows.last(row.local, radius, row.window);
  const int32_t right = grid.columns.last(column.local, radius, column.window);
  const T* z = tokens + token * channels;
  float least = INFINITY;
  for (int32_t i = grid.rows.first(row.local, radius); i <= bottom; ++i) {
    const int64_t line = (at.image * grid.rows.cells() + row.window * grid.rows.clusters + i) *
                             grid.columns.cells() +
                         column.window * grid.columns.clusters;
    for (int32_t j = grid.columns.first(column.local, radius); j <= right; ++j) {
      least =
          least_or_nan(squared_distance<V>(z, centres + (line + j) * channels, channels), least);
    }
  }
  const float away = squared_distance<V>(z, mean + at.image * channels, channels);
  if (threadIdx.x % kWarp == 0) {
    nearest[token] = least;
    deviation[token] = away;
  }
}

// Sum over a block of kThreads, in thread 0.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float sums[kWarps];
  value = warp_sum(value);
  // Another sum may still be read.
  __syncthreads();
  if (threadIdx.x % kWarp == 0) {
    sums[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  float total = 0.f;
  for (int w = 0; w < kWarps; ++w) {
    total += sums[w];
  }
  return total;
}

// Means over the tokens of an image, and the floor. A block an image.
__global__ void __launch_bounds__(kThreads, 1)
    spread_kernel(const float* __restrict__ nearest,    // (B, N)
                  const float* __restrict__ deviation,  // (B, N)
                  float* __restrict__ spread,           // (B,)
                  int64_t count) {
  const int64_t image = blockIdx.x;
  float near = 0.f;
  float away = 0.f;
  for (int64_t n = threadIdx.x; n < count; n += kThreads) {
    near += nearest[image * count + n];
    away += deviation[image * count + n];
  }
  near = block_sum(near) / static_cast<float>(count);
  away = block_sum(away) / static_cast<float>(count);
  if (threadIdx.x == 0) {
    const float floor = fmaf(kSpreadFloor, away, FLT_MIN);
    // NaN fails the comparison and is passed on.
    spread[image] = near < floor ? floor : near;
  }
}

template <typename T, int V>
void launch_distance(Launcher& launch, const Tokens& tokens, int radius, const float* mean,
                     float* centres, float* nearest, float* deviation) {
  launch_pool<T, V, float>(launch, tokens, centres);
  const int64_t count = token_count(tokens.grid, tokens.batch);
  launch.warps(distance_kernel<T, V>, count, static_cast<const T*>(tokens.data), centres, mean,
               nearest, deviation, tokens.grid, radius, tokens.channels, count);
}

}  // namespace

cudaError_t launch_token_spread(const Tokens& tokens, int radius, float* spread, float* mean,
                                float* centres, float* nearest, float* deviation) {
  Launcher launch{tokens.stream};
  const int64_t count = token_count(tokens.grid, 1);
  with_type(tokens.type, [&](auto type) {
    using T = decltype(type);
    const auto* data = static_cast<const T*>(tokens.data);
    launch.blocks(mean_kernel<T>, tokens.batch * ceil_div(tokens.channels, kWarp),
                  kWarp * kMeanRows, 0, data, mean, count, tokens.channels);
    const auto run = can_vectorise(tokens.channels, data, mean, centres)
                         ? launch_distance<T, kVector>
                         : launch_distance<T, 1>;
    run(launch, tokens, radius, mean, centres, nearest, deviation);
  });
  launch.blocks(spread_kernel, tokens.batch, kThreads, 0, nearest, deviation, spread, count);
  return launch.error;
}

}  // namespace expedite_d2::cuda
