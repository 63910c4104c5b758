// Products of a tile of tokens with a tile of centres on the tensor cores, for token_match and
// token_merge.
//
// Numbers are split into terms and multiplied as in products.cuh. Here the tile has a fixed size,
// its rows come from two tensors, and their squared norms are summed on the way.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/products.cuh"
#include "cuda/utils.cuh"

namespace expedite_d2::cuda {

// Tokens and centres of a block's tile. Each of four warps computes a quarter of the products.
constexpr int kTileTokens = 64;
constexpr int kTileCentres = 64;
constexpr int kTileRows = kTileTokens + kTileCentres;
constexpr int kTileWarps = 4;
constexpr int kTileThreads = kTileWarps * kWarp;
// MMA tiles along each axis of a warp's tile.
constexpr int kWarpTileSide = kTileTokens / 2 / kMmaTile;
// A row of products is eight floats longer, so that four rows cover all banks.
constexpr int kProductStride = kTileCentres + 8;
// Bytes of the staged rows; later the products are in their place.
constexpr int kTileBytes = kTileRows * kTerms * kStagedStride * static_cast<int>(sizeof(Term));
static_assert(kTileTokens * kProductStride * static_cast<int>(sizeof(float)) <= kTileBytes);
// Blocks that fit on a multiprocessor.
constexpr int kBlocksAtOnce = 3;
// Fixed cost of a block, in equivalent tiles of centres.
constexpr int64_t kPartOverhead = 1;

// Where there are few tiles of tokens, centres are divided into parts, with a block for each part
// and tile of tokens.
struct CentreParts {
  int32_t count;
  int32_t tiles;  // of centres in a part
};

// The division that takes the least time, of those into at most `max_parts`.
inline CentreParts divide_centres(int64_t token_tiles, int64_t centre_tiles, int64_t max_parts,
                                  int multiprocessors) {
  CentreParts parts{};
  // The last wave of blocks determines the run time.
  const int64_t blocks_at_once = int64_t{kBlocksAtOnce} * multiprocessors;
  int64_t min_cost = std::numeric_limits<int64_t>::max();
  for (int64_t n = 1; n <= std::max<int64_t>(std::min(centre_tiles, max_parts), 1); ++n) {
    const int64_t each = ceil_div(centre_tiles, n);
    const int64_t count = ceil_div(centre_tiles, each);
    const int64_t cost = ceil_div(token_tiles * count, blocks_at_once) * (each + kPartOverhead);
    if (cost < min_cost) {
      min_cost = cost;
      parts = {static_cast<int32_t>(count), static_cast<int32_t>(each)};
    }
  }
  return parts;
}

// kStaged channels of all rows of a tile on their way to shared memory: every thread holds V
// channels of each kDown-th row. Tokens are of type T, centres of type S.
template <typename T, typename S, int V>
struct StagedTile {
  static constexpr int kAcross = kStaged / V;
  static constexpr int kDown = kTileThreads / kAcross;
  static constexpr int kHeldTokens = kTileTokens / kDown;
  static constexpr int kHeldCentres = kTileCentres / kDown;
  static constexpr int kHeld = kHeldTokens + kHeldCentres;

  Raw<T, V> tokens[kHeldTokens];
  Raw<S, V> centres[kHeldCentres];
  Raw<S, V> origin;

  // Reads the channels from `first` on. Rows that do not exist have negative offsets. Without an
  // origin it is zero.
  __device__ __forceinline__ void prefetch(const T* all_tokens, const S* all_centres,
                                           const int64_t* offsets, const S* origin_row, int first,
                                           int channels) {
    const int c = first + static_cast<int>(threadIdx.x) % kAcross * V;
    const int row = static_cast<int>(threadIdx.x) / kAcross;
    const bool has_channels = c < channels;
    origin = {};
    if (has_channels && origin_row != nullptr) {
      origin = load_raw<V>(origin_row + c);
    }
    const auto read = [&](const auto* from, int r, auto& raw) {
      const int64_t offset = offsets[r];
      raw = {};
      if (has_channels && offset >= 0) {
        raw = load_raw<V>(from + offset + c);
      }
    };
#pragma unroll
    for (int n = 0; n < kHeldTokens; ++n) {
      read(all_tokens, row + n * kDown, tokens[n]);
    }
#pragma unroll
    for (int n = 0; n < kHeldCentres; ++n) {
      read(all_centres, kTileTokens + row + n * kDown, centres[n]);
    }
  }

  // Subtracts the origin, stages the channels and adds their squares to the rows' norms. Rows past
  // the end are left undefined.
  __device__ __forceinline__ void to_shared(Term* staged, float (&norms)[kHeld]) const {
    const int c = static_cast<int>(threadIdx.x) % kAcross * V;
    const int row = static_cast<int>(threadIdx.x) / kAcross;
    float zero[V];
    unpack<S>(origin, zero);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      // A non-finite origin would contaminate every token's distances.
      zero[v] = isfinite(zero[v]) ? zero[v] : 0.f;
    }
    const auto stage = [&](int n, float (&values)[V]) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        values[v] -= zero[v];
        norms[n] = fmaf(values[v], values[v], norms[n]);
      }
      store_terms<V>(staged + (row + n * kDown) * kStagedStride + c, kTileRows * kStagedStride,
                     values);
    };
#pragma unroll
    for (int n = 0; n < kHeldTokens; ++n) {
      float values[V];
      unpack<T>(tokens[n], values);
      stage(n, values);
    }
#pragma unroll
    for (int n = 0; n < kHeldCentres; ++n) {
      float values[V];
      unpack<S>(centres[n], values);
      stage(kHeldTokens + n, values);
    }
  }
};

// The products of one warp, in registers.
struct WarpTile {
  Accumulator sums[kWarpTileSide][kWarpTileSide] = {};
  int row, column;  // first ones

  __device__ WarpTile() {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    row = warp / 2 * kWarpTileSide * kMmaTile;
    column = warp % 2 * kWarpTileSide * kMmaTile;
  }

  // Adds the products of the staged channels.
  __device__ __forceinline__ void add(const Term* staged) {
    const auto at = [&](int term, int first_row, int k) {
      return staged + (term * kTileRows + first_row) * kStagedStride + k;
    };
#pragma unroll 1
    for (int k = 0; k < kStaged; k += kMmaTile) {
      SplitFragment y[kWarpTileSide];
#pragma unroll
      for (int j = 0; j < kWarpTileSide; ++j) {
#pragma unroll
        for (int t = 0; t < kTerms; ++t) {
          load_fragment(at(t, kTileTokens + column + j * kMmaTile, k), kStagedStride, y[j][t]);
        }
      }
#pragma unroll
      for (int i = 0; i < kWarpTileSide; ++i) {
        SplitFragment x;
#pragma unroll
        for (int t = 0; t < kTerms; ++t) {
          load_fragment(at(t, row + i * kMmaTile, k), kStagedStride, x[t]);
        }
#pragma unroll
        for (int j = 0; j < kWarpTileSide; ++j) {
          mma_bf16x3(x, y[j], sums[i][j]);
        }
      }
    }
  }

  // Row t of `products` is that of token t, kProductStride long.
  __device__ __forceinline__ void store(float* products) const {
#pragma unroll
    for (int i = 0; i < kWarpTileSide; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpTileSide; ++j) {
        store_accumulator(sums[i][j],
                          products + (row + i * kMmaTile) * kProductStride + column + j * kMmaTile,
                          kProductStride);
      }
    }
  }
};

// The products of all tokens and centres of a tile, and the squared norms of its rows, all less
// `origin` (which may be null). Row r of the tile begins `offsets[r]` after `tokens` or `centres`,
// or is none where that is negative; the first `token_count` and `centre_count` exist. Row t of
// `products`, kTileBytes of shared memory, is that of token t, kProductStride long; `norms` is
// shared memory, too. By all threads of a block, which see all results afterwards.
template <int V, typename T, typename S>
__device__ __forceinline__ void tile_products(const T* tokens, const S* centres,
                                              const int64_t* offsets, const S* origin,
                                              int token_count, int centre_count, int channels,
                                              float* products, float* norms) {
  using Rows = StagedTile<T, S, V>;
  // The staged rows are where the products will be.
  auto* staged = reinterpret_cast<Term*>(products);
  Rows rows;
  float norm[Rows::kHeld] = {};
  WarpTile tile;
  // False where the warp's tile holds no token or no centre.
  const bool is_needed = tile.row < token_count && tile.column < centre_count;
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
      tile.add(staged);
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
  // All warps have read the staged rows.
  __syncthreads();
  if (is_needed) {
    tile.store(products);
  }
  __syncthreads();
}

}  // namespace expedite_d2::cuda
