// token_match: the topk nearest centres of every token, among all centres of its window or image.
//
// A block takes a tile of tokens and goes through the centres, or a part of them, in tiles:
// products on the tensor cores give the distances in shared memory, and each token's nearest
// centres are inserted into its sorted list in device memory, so that no tokens x centres matrix
// exists. Where one image gives few tiles of tokens, the centres are divided into parts with a list
// each, and a second launch merges the lists.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "cuda/token_match_tile.cuh"
#include "cuda/token_match_topk.cuh"
#include "cuda/utils.cuh"
#include "cuda/windows.cuh"

namespace expedite_d2::cuda {
namespace {

// Blocks that fit on a multiprocessor.
constexpr int kBlocksAtOnce = 3;
// Fixed cost of a block, in equivalent tiles of centres.
constexpr int64_t kPartOverhead = 1;

// Writes a token's list as indices and weights, which may be in the same memory. By a full warp.
__device__ __forceinline__ void write_matches(const TopkList& list, const WindowView& window,
                                              float tau, int32_t* indices, float* weights) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int found = min(list.length, window.cells());
  // Other lanes have written the list.
  __syncwarp();
  const Neighbour nearest{list.distances[0], list.centres[0]};
  // The first neighbour is the nearest, so no exponent is positive; NaN stays NaN.
  float sum = 0.f;
  for (int rank = lane; rank < found; rank += kWarp) {
    sum += unnormalised_weight(tau, list.distances[rank] - nearest.distance);
  }
  sum = warp_sum(sum);
  // Before the first neighbour is overwritten every lane has read it.
  __syncwarp();
  for (int rank = lane; rank < list.length; rank += kWarp) {
    // What repeats the nearest has weight 0, or NaN where the others are.
    const bool is_found = rank < found;
    const int32_t centre = is_found ? list.centres[rank] : nearest.centre;
    const float weight =
        is_found ? unnormalised_weight(tau, list.distances[rank] - nearest.distance) : 0.f;
    indices[rank] = window.cell(centre);
    weights[rank] = weight / sum;
  }
}

// How the work is divided: one block per tile of a window's tokens and part of its centres.
struct MatchPlan {
  int32_t token_tiles;  // of a window
  int32_t parts;        // of its centres
  int32_t part_tiles;   // of centres in a part
  int64_t blocks;

  MatchPlan(const Tokens& tokens, int topk, int multiprocessors) {
    const WindowAxis &rows = tokens.grid.rows, &columns = tokens.grid.columns;
    const int64_t windows = tokens.batch * tokens.grid.windows();
    const int64_t tiles =
        ceil_div<int64_t>(int64_t{rows.max_real()} * columns.max_real(), kTileTokens);
    const int64_t centre_tiles =
        ceil_div<int64_t>(int64_t{rows.max_existing()} * columns.max_existing(), kTileCentres);
    // All lists together take no more memory than the tokens.
    const int64_t token_bytes = int64_t{tokens.channels} * (tokens.type == Type::kFloat ? 4 : 2);
    const int64_t list_bytes = static_cast<int64_t>(sizeof(Neighbour)) * topk;
    const int64_t max_parts = std::min(centre_tiles, token_bytes / list_bytes);
    // The last wave of blocks determines the run time.
    const int64_t blocks_at_once = int64_t{kBlocksAtOnce} * multiprocessors;
    int64_t min_cost = std::numeric_limits<int64_t>::max();
    for (int64_t n = 1; n <= std::max<int64_t>(max_parts, 1); ++n) {
      const int64_t each = ceil_div(centre_tiles, n);
      const int64_t count = ceil_div(centre_tiles, each);
      const int64_t cost =
          ceil_div(windows * tiles * count, blocks_at_once) * (each + kPartOverhead);
      if (cost < min_cost) {
        min_cost = cost;
        part_tiles = static_cast<int32_t>(each);
        parts = static_cast<int32_t>(count);
      }
    }
    token_tiles = static_cast<int32_t>(tiles);
    blocks = windows * tiles * parts;
  }
};

template <typename T, int V>
__global__ void __launch_bounds__(kTileThreads, V == 1 ? 2 : kBlocksAtOnce)
    match_kernel(const T* __restrict__ tokens,       // (B, H, W, C)
                 const float* __restrict__ centres,  // (B, h', w', C)
                 float* distances,                   // (B, H, W, parts, topk)
                 int32_t* neighbours,                // (B, H, W, parts, topk)
                 int32_t* indices,  // (B, H, W, topk); neighbours if there is one part
                 float* weights,    // (B, H, W, topk); distances likewise
                 Temperature temperature, Grid grid, MatchPlan plan, int topk, int channels) {
  extern __shared__ __align__(16) float shared[];
  __shared__ int64_t offsets[kTileRows];
  __shared__ float norms[kTileRows];
  // Not in the registers of each thread, which the products need.
  __shared__ WindowView window;
  auto* staged = reinterpret_cast<Term*>(shared);

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const auto part = static_cast<int32_t>(blockIdx.x % plan.parts);
  const int64_t tile = blockIdx.x / plan.parts;
  if (threadIdx.x == 0) {
    window = window_at(grid, tile / plan.token_tiles);
  }
  __syncthreads();
  const int32_t first_token = static_cast<int32_t>(tile % plan.token_tiles) * kTileTokens;
  const int count = min(window.tokens() - first_token, kTileTokens);
  const int32_t part_begin = part * plan.part_tiles * kTileCentres;
  const int32_t part_end = min(window.cells(), part_begin + plan.part_tiles * kTileCentres);
  if (count <= 0) {
    return;
  }
  // The origin of all distances of these tokens: the centre of the cell where the middle one is.
  const float* origin = centres + window.centre(window.home(first_token + count / 2)) * channels;
  const auto list_of = [&](int t) -> TopkList {
    const int64_t first = (window.token(first_token + t) * plan.parts + part) * topk;
    return {distances + first, neighbours + first, topk};
  };

  for (int32_t first = part_begin; first == part_begin || first < part_end; first += kTileCentres) {
    for (int r = static_cast<int>(threadIdx.x); r < kTileRows; r += kTileThreads) {
      const int i = first + r - kTileTokens;
      int64_t row = -1;
      if (r < count) {
        row = window.token(first_token + r);
      } else if (r >= kTileTokens && i < part_end) {
        row = window.centre(i);
      }
      offsets[r] = row * channels;
    }
    __syncthreads();
    using Rows = StagedTile<T, V>;
    Rows rows;
    float norm[Rows::kHeld] = {};
    WarpTile products;
    // False where the warp's tile holds no token or no centre.
    const bool is_needed = products.row < count && first + products.column < part_end;
    rows.prefetch(tokens, centres, offsets, origin, 0, channels);
    for (int c = 0; c < channels; c += kStaged) {
      // All warps have read the channels staged before.
      __syncthreads();
      rows.to_shared(staged, norm);
      __syncthreads();
      if (c + kStaged < channels) {
        // In flight while products are computed.
        rows.prefetch(tokens, centres, offsets, origin, c + kStaged, channels);
      }
      if (is_needed) {
        products.add(staged);
      }
    }
#pragma unroll
    for (int n = 0; n < Rows::kHeld; ++n) {
#pragma unroll
      for (int offset = 1; offset < Rows::kAcross; offset *= 2) {
        norm[n] += __shfl_xor_sync(kAllLanes, norm[n], offset);
      }
      if (threadIdx.x % Rows::kAcross == 0) {
        norms[threadIdx.x / Rows::kAcross + n * Rows::kDown] = norm[n];
      }
    }
    // All warps have read the staged rows: the products take their place.
    __syncthreads();
    if (is_needed) {
      products.store(shared);
    }
    __syncthreads();
    for (int t = warp; t < count; t += kTileWarps) {
      const auto found = [&](int i) -> Neighbour {
        if (first + i >= part_end) {
          return {INFINITY, -1};
        }
        const float sum = norms[t] + norms[kTileTokens + i];
        // An infinite row is infinitely far, though its product may be NaN.
        const float d = sum == INFINITY ? sum : fmaf(-2.f, shared[t * kProductStride + i], sum);
        // Rounding can make it negative; NaN stays.
        return {d <= 0.f ? 0.f : d, first + i};
      };
      insert(list_of(t), first == part_begin, found(lane), found(lane + kWarp));
    }
    // All warps have read products and offsets.
    __syncthreads();
  }
  if (plan.parts == 1) {
    const float tau = image_temperature(temperature, window.image);
    for (int t = warp; t < count; t += kTileWarps) {
      const int64_t first = window.token(first_token + t) * topk;
      write_matches(list_of(t), window, tau, indices + first, weights + first);
    }
  }
}

// Merges the lists of a token's parts. One warp per token.
__global__ void __launch_bounds__(kThreads, 2)
    merge_kernel(const float* __restrict__ distances,     // (B, H, W, parts, topk)
                 const int32_t* __restrict__ neighbours,  // (B, H, W, parts, topk)
                 int32_t* indices,                        // (B, H, W, topk)
                 float* weights,                          // (B, H, W, topk)
                 Temperature temperature, Grid grid, int parts, int topk, int64_t count) {
  const int64_t token = global_warp();
  if (token >= count) {
    return;
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const Position at = position(token, grid.rows.size, grid.columns.size);
  const WindowView window = window_at(grid, at.image, token_position(grid.rows, at.row).window,
                                      token_position(grid.columns, at.column).window);
  const TopkList list{weights + token * topk, indices + token * topk, topk};
  const int64_t all = int64_t{parts} * topk;
  for (int64_t first = 0; first < all; first += 2 * kWarp) {
    const auto found = [&](int64_t n) -> Neighbour {
      if (n >= all) {
        return {INFINITY, -1};
      }
      return {distances[token * all + n], neighbours[token * all + n]};
    };
    insert(list, first == 0, found(first + lane), found(first + lane + kWarp));
  }
  write_matches(list, window, image_temperature(temperature, at.image), list.centres,
                list.distances);
}

}  // namespace

int match_parts(const Tokens& tokens, int topk, int multiprocessors) {
  return MatchPlan(tokens, topk, multiprocessors).parts;
}

cudaError_t launch_token_match(const Tokens& tokens, int topk, int multiprocessors,
                               Temperature temperature, const float* centres, float* distances,
                               int32_t* neighbours, int32_t* indices, float* weights) {
  const MatchPlan plan(tokens, topk, multiprocessors);
  Launcher launch{tokens.stream};
  if (plan.parts == 1) {
    distances = weights;
    neighbours = indices;
  }
  with_type(tokens.type, [&](auto type) {
    using T = decltype(type);
    const auto* z = static_cast<const T*>(tokens.data);
    launch.blocks(can_vectorise<T>(tokens.channels, z, centres) ? match_kernel<T, kVectorSize<T>>
                                                                : match_kernel<T, 1>,
                  plan.blocks, kTileThreads, kTileBytes, z, centres, distances, neighbours, indices,
                  weights, temperature, tokens.grid, plan, topk, tokens.channels);
  });
  if (plan.parts > 1) {
    const int64_t count = token_count(tokens.grid, tokens.batch);
    launch.warps(merge_kernel, count, static_cast<const float*>(distances),
                 static_cast<const int32_t*>(neighbours), indices, weights, temperature,
                 tokens.grid, plan.parts, topk, count);
  }
  return launch.error;
}

}  // namespace expedite_d2::cuda
