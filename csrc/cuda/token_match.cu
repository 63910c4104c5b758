// token_match: the topk nearest centres of every token, among all centres of its window or image.
//
// A block takes a few tokens of a window, computes their distances to all of its centres into
// shared memory, in tiles, and picks the nearest one topk times. So tokens x centres never exists
// in device memory. Where even a row of distances does not fit, the centres are gone through in
// segments, again for each pick: slow, but no size is refused.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cuda/utils.cuh"

namespace expedite_d2::cuda {
namespace {

// Tokens of a block: many share the reads of the centres, few leave room for long rows of
// distances. 16 rows of 1300 centres or 4 rows of 5000 fit into 99 KiB.
constexpr int kManyTokens = 16;
constexpr int kFewTokens = 4;
// Centres of a tile, and channels of both tokens and centres that are staged at a time.
constexpr int kTile = 64;
constexpr int kChannels = kWarp;
// A staged row is one float longer, so that a column of them lies in all banks.
constexpr int kStride = kChannels + 1;

// Floats of shared memory for one block.
constexpr int64_t match_floats(int tokens, int64_t segment) {
  return tokens * segment + (tokens + kTile) * kStride;
}

template <typename T, int kTokens>
__global__ void __launch_bounds__(kThreads, 1)
    match_kernel(const T* __restrict__ tokens,   // (B, H, W, C)
                 const T* __restrict__ centres,  // (B, h', w', C)
                 int32_t* __restrict__ indices,  // (B, H, W, topk)
                 float* __restrict__ weights,    // (B, H, W, topk)
                 Temperature temperature, Grid grid, int topk, int channels,
                 int segment,  // centres whose distances are kept
                 int blocks)   // for a window
{
  // Each thread computes the distances of one token to kEach centres of a tile, kGroup apart.
  constexpr int kGroup = kThreads / kTokens;
  constexpr int kEach = kTile / kGroup;
  // Tokens that a warp picks for.
  constexpr int kOwn = (kTokens + kWarps - 1) / kWarps;
  static_assert(kTile % kGroup == 0 && kEach > 0);

  extern __shared__ float shared[];
  float* distances = shared;                      // (kTokens, segment)
  float* staged = distances + kTokens * segment;  // (kTokens, kStride)
  float* tile = staged + kTokens * kStride;       // (kTile, kStride)

  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t linear = blockIdx.x / blocks;
  const int32_t window_column = static_cast<int32_t>(linear % grid.columns.windows());
  const int32_t window_row =
      static_cast<int32_t>(linear / grid.columns.windows() % grid.rows.windows());
  const int64_t image = linear / grid.columns.windows() / grid.rows.windows();
  const int32_t width = grid.columns.real(window_column);
  const int32_t cell_columns = grid.columns.existing(window_column);
  const int32_t count = grid.rows.real(window_row) * width;
  const int32_t cells = grid.rows.existing(window_row) * cell_columns;
  const int32_t first_token = static_cast<int32_t>(blockIdx.x % blocks) * kTokens;
  if (first_token >= count) {
    return;
  }

  // Token p of the window in (B, H, W).
  const auto token_at = [&](int32_t p) {
    const int64_t y = window_row * grid.rows.window + p / width;
    return (image * grid.rows.size + y) * grid.columns.size + window_column * grid.columns.window +
           p % width;
  };
  // Centre i of the window in (h', w'): what `indices` hold.
  const auto cell_at = [&](int32_t i) {
    return (window_row * grid.rows.clusters + i / cell_columns) * grid.columns.cells() +
           window_column * grid.columns.clusters + i % cell_columns;
  };
  const T* image_centres =
      centres + image * grid.rows.cells() * grid.columns.cells() * static_cast<int64_t>(channels);

  // Squared distances of the block's tokens to centres first ... first + length - 1. Differences
  // are squared, so a large common offset of all tokens cancels before it can cost precision.
  const auto compute_distances = [&](int32_t first, int32_t length) {
    const int own_token = threadIdx.x / kGroup;
    const int own_centre = threadIdx.x % kGroup;
    for (int32_t start = 0; start < length; start += kTile) {
      float sums[kEach] = {};
      for (int begin = 0; begin < channels; begin += kChannels) {
        // The channels staged before have been read.
        __syncthreads();
        const int c = begin + lane;
        for (int t = warp; t < kTokens + kTile; t += kWarps) {
          float value = 0.f;
          if (c < channels) {
            if (t < kTokens && first_token + t < count) {
              value = static_cast<float>(tokens[token_at(first_token + t) * channels + c]);
            } else if (t >= kTokens && start + t - kTokens < length) {
              const int64_t cell = cell_at(first + start + t - kTokens);
              value = static_cast<float>(image_centres[cell * channels + c]);
            }
          }
          // `tile` follows `staged`.
          staged[t * kStride + lane] = value;
        }
        __syncthreads();
#pragma unroll 8
        for (int k = 0; k < kChannels; ++k) {
          const float z = staged[own_token * kStride + k];
#pragma unroll
          for (int e = 0; e < kEach; ++e) {
            const float difference = z - tile[(own_centre + e * kGroup) * kStride + k];
            sums[e] = fmaf(difference, difference, sums[e]);
          }
        }
      }
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const int32_t i = start + own_centre + e * kGroup;
        if (i < length) {
          distances[own_token * segment + i] = sums[e];
        }
      }
    }
    __syncthreads();
  };

  const int32_t found = topk < cells ? topk : cells;
  const float tau = image_temperature(temperature, image);
  // Of the warp's own tokens: what was picked last, the distance of the first pick, the sum of the
  // softmax. Picks ascend in (key, centre), so the next one is the least that is greater.
  float last_key[kOwn], least[kOwn], sum[kOwn];
  int32_t last_centre[kOwn];
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    last_key[own] = -1.f;
    last_centre[own] = -1;
    least[own] = 0.f;
    sum[own] = 0.f;
  }
  for (int32_t rank = 0; rank < found; ++rank) {
    float best_key[kOwn], best_distance[kOwn];
    int32_t best_centre[kOwn];
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      best_key[own] = INFINITY;
      best_distance[own] = 0.f;
      best_centre[own] = 0;
    }
    for (int32_t first = 0; first < cells; first += segment) {
      const int32_t length = segment < cells - first ? segment : cells - first;
      if (rank == 0 || segment < cells) {
        if (segment < cells) {
          // Other warps may still look for their pick in the segment before.
          __syncthreads();
        }
        compute_distances(first, length);
      }
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        const int t = warp + own * kWarps;
        if (t >= kTokens) {
          continue;
        }
        for (int32_t i = lane; i < length; i += kWarp) {
          const float distance = distances[t * segment + i];
          // NaN and infinity come last, in the order of their indices.
          const float key = distance < FLT_MAX ? distance : FLT_MAX;
          const int32_t centre = first + i;
          const bool is_left =
              key > last_key[own] || (key == last_key[own] && centre > last_centre[own]);
          // A lane meets its centres in ascending order: of equal ones it keeps the lower.
          if (is_left && key < best_key[own]) {
            best_key[own] = key;
            best_distance[own] = distance;
            best_centre[own] = centre;
          }
        }
      }
    }
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      const int t = warp + own * kWarps;
      if (t >= kTokens) {
        continue;
      }
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const float key = __shfl_xor_sync(kAllLanes, best_key[own], offset);
        const float distance = __shfl_xor_sync(kAllLanes, best_distance[own], offset);
        const int32_t centre = __shfl_xor_sync(kAllLanes, best_centre[own], offset);
        if (key < best_key[own] || (key == best_key[own] && centre < best_centre[own])) {
          best_key[own] = key;
          best_distance[own] = distance;
          best_centre[own] = centre;
        }
      }
      last_key[own] = best_key[own];
      last_centre[own] = best_centre[own];
      if (rank == 0) {
        least[own] = best_distance[own];
      }
      // The first pick is the nearest, so no exponent is positive; NaN stays NaN.
      const float weight = falloff(tau, best_distance[own] - least[own]);
      sum[own] += weight;
      if (lane == 0 && first_token + t < count) {
        const int64_t slot = token_at(first_token + t) * topk + rank;
        indices[slot] = cell_at(best_centre[own]);
        weights[slot] = weight;
      }
    }
  }

  __syncwarp();
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    const int t = warp + own * kWarps;
    if (t >= kTokens || first_token + t >= count) {
      continue;
    }
    const int64_t row = token_at(first_token + t) * topk;
    const int32_t nearest = indices[row];
    for (int rank = lane; rank < topk; rank += kWarp) {
      if (rank >= found) {
        indices[row + rank] = nearest;
      }
      // Times the sum's inverse, so that what repeats the nearest is NaN where the others are.
      weights[row + rank] = rank < found ? weights[row + rank] / sum[own] : 0.f / sum[own];
    }
  }
}

}  // namespace

cudaError_t launch_token_match(const Tokens& tokens, int topk, Temperature temperature,
                               size_t shared_memory, const void* centres, int32_t* indices,
                               float* weights) {
  const Grid& grid = tokens.grid;
  const auto floats = static_cast<int64_t>(shared_memory / sizeof(float));
  const int64_t cells = int64_t{std::min(grid.rows.cells(), grid.rows.clusters)} *
                        std::min(grid.columns.cells(), grid.columns.clusters);
  const int64_t count = int64_t{std::min(grid.rows.size, grid.rows.window)} *
                        std::min(grid.columns.size, grid.columns.window);
  const bool many = match_floats(kManyTokens, cells) <= floats;
  const int held = many ? kManyTokens : kFewTokens;
  const int64_t room = (floats - match_floats(held, 0)) / held;
  const auto segment = static_cast<int>(std::min(cells, room));
  const int64_t blocks = ceil_div<int64_t>(count, held);
  const int64_t windows = tokens.batch * grid.rows.windows() * grid.columns.windows();
  Launcher launch{tokens.stream};
  with_type(tokens.type, [&](auto type) {
    using T = decltype(type);
    launch.blocks(many ? match_kernel<T, kManyTokens> : match_kernel<T, kFewTokens>,
                  windows * blocks, kThreads, sizeof(float) * match_floats(held, segment),
                  static_cast<const T*>(tokens.data), static_cast<const T*>(centres), indices,
                  weights, temperature, grid, topk, tokens.channels, segment,
                  static_cast<int>(blocks));
  });
  return launch.error;
}

}  // namespace expedite_d2::cuda
