// token_match: the topk nearest centres of every token, among all centres of its window or image.
//
// A block takes a tile of tokens and goes through the centres, or a part of them, in tiles:
// distances come from products on the tensor cores into shared memory, and each token's nearest
// ones into its list, which is sorted and lies in device memory. So tokens x centres never exists
// there. Where one image alone gives few tiles of tokens, the centres are divided into parts with a
// list each, and a second launch merges the lists.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "cuda/match_tile.cuh"
#include "cuda/picks.cuh"
#include "cuda/utils.cuh"
#include "cuda/windows.cuh"

namespace expedite_d2::cuda {
namespace {

// Blocks that a multiprocessor has room for.
constexpr int kBlocksAtOnce = 3;
// What a block does besides its products takes about as long as so many tiles of centres more.
constexpr int64_t kPartCost = 1;

// The list of a token, which may lie where they go, as indices and weights. By a full warp.
__device__ __forceinline__ void write_matches(const List& list, const WindowView& window, float tau,
                                              int32_t* indices, float* weights) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int found = min(list.length, window.cells());
  // The list has been written by other lanes.
  __syncwarp();
  const Pick nearest{list.distances[0], list.centres[0]};
  // The first pick is the nearest, so no exponent is positive; NaN stays NaN.
  float sum = 0.f;
  for (int rank = lane; rank < found; rank += kWarp) {
    sum += falloff(tau, list.distances[rank] - nearest.distance);
  }
  sum = warp_sum(sum);
  // Before the first pick is overwritten every lane has read it.
  __syncwarp();
  for (int rank = lane; rank < list.length; rank += kWarp) {
    // What repeats the nearest has weight 0, or NaN where the others are.
    const bool is_found = rank < found;
    const int32_t centre = is_found ? list.centres[rank] : nearest.centre;
    const float weight = is_found ? falloff(tau, list.distances[rank] - nearest.distance) : 0.f;
    indices[rank] = window.cell(centre);
    weights[rank] = weight / sum;
  }
}

// How the work is divided: a block for a tile of a window's tokens and a part of its centres.
struct Division {
  int32_t token_tiles;  // of a window
  int32_t parts;        // of its centres
  int32_t part_tiles;   // of centres in a part
  int64_t blocks;

  Division(const Tokens& tokens, int topk, int multiprocessors) {
    const WindowAxis &rows = tokens.grid.rows, &columns = tokens.grid.columns;
    const int64_t windows = tokens.batch * tokens.grid.windows();
    const int64_t tiles =
        ceil_div<int64_t>(int64_t{rows.max_real()} * columns.max_real(), kTileTokens);
    const int64_t centre_tiles =
        ceil_div<int64_t>(int64_t{rows.max_existing()} * columns.max_existing(), kTileCentres);
    // All lists together take no more memory than the tokens.
    const int64_t token_bytes = int64_t{tokens.channels} * (tokens.type == Type::kFloat ? 4 : 2);
    const int64_t list_bytes = static_cast<int64_t>(sizeof(Pick)) * topk;
    const int64_t most = std::min(centre_tiles, token_bytes / list_bytes);
    // The last blocks to begin decide.
    const int64_t slots = int64_t{kBlocksAtOnce} * multiprocessors;
    int64_t least = std::numeric_limits<int64_t>::max();
    for (int64_t n = 1; n <= std::max<int64_t>(most, 1); ++n) {
      const int64_t each = ceil_div(centre_tiles, n);
      const int64_t count = ceil_div(centre_tiles, each);
      const int64_t cost = ceil_div(windows * tiles * count, slots) * (each + kPartCost);
      if (cost < least) {
        least = cost;
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
    match_kernel(const T* __restrict__ tokens,   // (B, H, W, C)
                 const T* __restrict__ centres,  // (B, h', w', C)
                 float* distances,               // (B, H, W, parts, topk)
                 int32_t* picks,                 // (B, H, W, parts, topk)
                 int32_t* indices,               // (B, H, W, topk); picks if there is one part
                 float* weights,                 // (B, H, W, topk); distances likewise
                 Temperature temperature, Grid grid, Division division, int topk, int channels) {
  extern __shared__ __align__(16) float shared[];
  __shared__ int64_t offsets[kTileRows];
  __shared__ float norms[kTileRows];
  // Not in the registers of each thread, which the products need.
  __shared__ WindowView window;
  auto* staged = reinterpret_cast<Term*>(shared);

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const auto part = static_cast<int32_t>(blockIdx.x % division.parts);
  const int64_t tile = blockIdx.x / division.parts;
  if (threadIdx.x == 0) {
    window = window_at(grid, tile / division.token_tiles);
  }
  __syncthreads();
  const int32_t first_token = static_cast<int32_t>(tile % division.token_tiles) * kTileTokens;
  const int count = min(window.tokens() - first_token, kTileTokens);
  const int32_t part_begin = part * division.part_tiles * kTileCentres;
  const int32_t part_end = min(window.cells(), part_begin + division.part_tiles * kTileCentres);
  if (count <= 0) {
    return;
  }
  // The origin of all distances of these tokens: the centre of the cell where the middle one is.
  const T* origin = centres + window.centre(window.home(first_token + count / 2)) * channels;
  const auto list_of = [&](int t) -> List {
    const int64_t first = (window.token(first_token + t) * division.parts + part) * topk;
    return {distances + first, picks + first, topk};
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
    using Rows = Slice<T, V>;
    Rows slice;
    float norm[Rows::kHeld] = {};
    Quarter products;
    // A quarter of neither tokens nor centres is left out.
    const bool is_needed = products.row < count && first + products.column < part_end;
    slice.fetch(tokens, centres, offsets, origin, 0, channels);
    for (int c = 0; c < channels; c += kStaged) {
      // The products of the previous slice have been added.
      __syncthreads();
      slice.put(staged, norm);
      __syncthreads();
      if (c + kStaged < channels) {
        // In flight while products are added.
        slice.fetch(tokens, centres, offsets, origin, c + kStaged, channels);
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
    // The staged rows have been read, and the products may take their place.
    __syncthreads();
    if (is_needed) {
      products.store(shared);
    }
    __syncthreads();
    for (int t = warp; t < count; t += kTileWarps) {
      const auto found = [&](int i) -> Pick {
        if (first + i >= part_end) {
          return {INFINITY, -1};
        }
        const float sum = norms[t] + norms[kTileTokens + i];
        // What is infinite is infinitely far: its product may be NaN.
        const float d = sum == INFINITY ? sum : fmaf(-2.f, shared[t * kProductStride + i], sum);
        // Rounding can make less than nothing of it; NaN stays.
        return {d <= 0.f ? 0.f : d, first + i};
      };
      merge(list_of(t), first == part_begin, found(lane), found(lane + kWarp));
    }
    // Products and offsets have been read.
    __syncthreads();
  }
  if (division.parts == 1) {
    const float tau = image_temperature(temperature, window.image);
    for (int t = warp; t < count; t += kTileWarps) {
      const int64_t first = window.token(first_token + t) * topk;
      write_matches(list_of(t), window, tau, indices + first, weights + first);
    }
  }
}

// Merges the lists of a token's parts. A warp a token.
__global__ void __launch_bounds__(kThreads, 2)
    merge_kernel(const float* __restrict__ distances,  // (B, H, W, parts, topk)
                 const int32_t* __restrict__ picks,    // (B, H, W, parts, topk)
                 int32_t* indices,                     // (B, H, W, topk)
                 float* weights,                       // (B, H, W, topk)
                 Temperature temperature, Grid grid, int parts, int topk, int64_t count) {
  const int64_t token = global_warp();
  if (token >= count) {
    return;
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const Position at = position(token, grid.rows.size, grid.columns.size);
  const WindowView window = window_at(grid, at.image, token_position(grid.rows, at.row).window,
                                      token_position(grid.columns, at.column).window);
  const List list{weights + token * topk, indices + token * topk, topk};
  const int64_t all = int64_t{parts} * topk;
  for (int64_t first = 0; first < all; first += 2 * kWarp) {
    const auto found = [&](int64_t n) -> Pick {
      if (n >= all) {
        return {INFINITY, -1};
      }
      return {distances[token * all + n], picks[token * all + n]};
    };
    merge(list, first == 0, found(first + lane), found(first + lane + kWarp));
  }
  write_matches(list, window, image_temperature(temperature, at.image), list.centres,
                list.distances);
}

}  // namespace

int match_parts(const Tokens& tokens, int topk, int multiprocessors) {
  return Division(tokens, topk, multiprocessors).parts;
}

cudaError_t launch_token_match(const Tokens& tokens, int topk, int multiprocessors,
                               Temperature temperature, const void* centres, float* distances,
                               int32_t* picks, int32_t* indices, float* weights) {
  const Division division(tokens, topk, multiprocessors);
  Launcher launch{tokens.stream};
  if (division.parts == 1) {
    distances = weights;
    picks = indices;
  }
  with_type(tokens.type, [&](auto type) {
    using T = decltype(type);
    const auto* z = static_cast<const T*>(tokens.data);
    const auto* s = static_cast<const T*>(centres);
    launch.blocks(
        can_read_wide<T>(tokens.channels, z, s) ? match_kernel<T, kWide<T>> : match_kernel<T, 1>,
        division.blocks, kTileThreads, kTileBytes, z, s, distances, picks, indices, weights,
        temperature, tokens.grid, division, topk, tokens.channels);
  });
  if (division.parts > 1) {
    const int64_t count = token_count(tokens.grid, tokens.batch);
    launch.warps(merge_kernel, count, static_cast<const float*>(distances),
                 static_cast<const int32_t*>(picks), indices, weights, temperature, tokens.grid,
                 division.parts, topk, count);
  }
  return launch.error;
}

}  // namespace expedite_d2::cuda
