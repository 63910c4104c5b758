// token_match: the topk nearest centres of every token, among all centres of its window or image.
//
// A block takes a tile of tokens and goes through the centres, or a part of them, in tiles:
// products on the tensor cores give the distances in shared memory, and each token's nearest
// centres are inserted into its sorted list in device memory, so that no tokens x centres matrix
// exists. Where one image gives few tiles of tokens, the centres are divided into parts with a list
// each, and a second launch merges the lists.
#include <cfloat>
#include <cmath>

#include "cuda/token_match_tile.cuh"
#include "cuda/token_match_topk.cuh"
#include "cuda/utils.cuh"
#include "cuda/windows.cuh"

namespace expedite_d2::cuda {
namespace {

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
  CentreParts parts;
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
    parts =
        divide_centres(windows * tiles, centre_tiles, token_bytes / list_bytes, multiprocessors);
    token_tiles = static_cast<int32_t>(tiles);
    blocks = windows * tiles * parts.count;
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

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const auto part = static_cast<int32_t>(blockIdx.x % plan.parts.count);
  const int64_t tile = blockIdx.x / plan.parts.count;
  if (threadIdx.x == 0) {
    window = window_at(grid, tile / plan.token_tiles);
  }
  __syncthreads();
  const int32_t first_token = static_cast<int32_t>(tile % plan.token_tiles) * kTileTokens;
  const int count = min(window.tokens() - first_token, kTileTokens);
  const int32_t part_begin = part * plan.parts.tiles * kTileCentres;
  const int32_t part_end = min(window.cells(), part_begin + plan.parts.tiles * kTileCentres);
  if (count <= 0) {
    return;
  }
  // The origin of all distances of these tokens: the centre of the cell where the middle one is.
  const float* origin = centres + window.centre(window.home(first_token + count / 2)) * channels;
  const auto list_of = [&](int t) -> TopkList {
    const int64_t first = (window.token(first_token + t) * plan.parts.count + part) * topk;
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
    tile_products<V>(tokens, centres, offsets, origin, count, part_end - first, channels, shared,
                     norms);
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
  if (plan.parts.count == 1) {
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
  return MatchPlan(tokens, topk, multiprocessors).parts.count;
}

cudaError_t launch_token_match(const Tokens& tokens, int topk, int multiprocessors,
                               Temperature temperature, const float* centres, float* distances,
                               int32_t* neighbours, int32_t* indices, float* weights) {
  const MatchPlan plan(tokens, topk, multiprocessors);
  Launcher launch{tokens.stream};
  if (plan.parts.count == 1) {
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
  if (plan.parts.count > 1) {
    const int64_t count = token_count(tokens.grid, tokens.batch);
    launch.warps(merge_kernel, count, static_cast<const float*>(distances),
                 static_cast<const int32_t*>(neighbours), indices, weights, temperature,
                 tokens.grid, plan.parts.count, topk, count);
  }
  return launch.error;
}

}  // namespace expedite_d2::cuda
