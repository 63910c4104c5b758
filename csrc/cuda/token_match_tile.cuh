// Products of a tile of tokens with a tile of centres on the tensor cores, for token_match.
//
// Numbers are split into terms and multiplied as in products.cuh. Here the tile has a fixed size,
// its rows come from two tensors, and their squared norms are summed on the way.
#pragma once

#include <cmath>

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

// kStaged channels of all rows of a tile on their way to shared memory: every thread holds V
// channels of each kDown-th row.
template <typename T, int V>
struct StagedTile {
  static constexpr int kAcross = kStaged / V;
  static constexpr int kDown = kTileThreads / kAcross;
  static constexpr int kHeldTokens = kTileTokens / kDown;
  static constexpr int kHeldCentres = kTileCentres / kDown;
  static constexpr int kHeld = kHeldTokens + kHeldCentres;

  Raw<T, V> tokens[kHeldTokens];
  Raw<float, V> centres[kHeldCentres];
  Raw<float, V> origin;

  // Reads the channels from `first` on. Rows that do not exist have negative offsets.
  __device__ __forceinline__ void prefetch(const T* all_tokens, const float* all_centres,
                                           const int64_t* offsets, const float* origin_row,
                                           int first, int channels) {
    const int c = first + static_cast<int>(threadIdx.x) % kAcross * V;
    const int row = static_cast<int>(threadIdx.x) / kAcross;
    const bool has_channels = c < channels;
    origin = {};
    if (has_channels) {
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
    unpack<float>(origin, zero);
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
      unpack<float>(centres[n], values);
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

}  // namespace expedite_d2::cuda
