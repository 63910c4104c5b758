// Products of a tile of tokens with a tile of centres on the tensor cores, for token_match.
//
// Numbers are split into terms and multiplied as products.cuh has it. Here the tile has one size,
// of rows from two tensors, whose norms are added up on the way.
#pragma once

#include <cmath>

#include "cuda/products.cuh"
#include "cuda/utils.cuh"

namespace expedite_d2::cuda {

// Tokens and centres of a tile. Four warps have a quarter of their products each.
constexpr int kTileTokens = 64;
constexpr int kTileCentres = 64;
constexpr int kTileRows = kTileTokens + kTileCentres;
constexpr int kTileWarps = 4;
constexpr int kTileThreads = kTileWarps * kWarp;
// Squares of a quarter along each axis.
constexpr int kQuarterSide = kTileTokens / 2 / kSquare;
// A row of products is eight floats longer, so that four rows lie in all banks.
constexpr int kProductStride = kTileCentres + 8;
// Bytes of the staged rows; later the products are in their place.
constexpr int kTileBytes = kTileRows * kTerms * kStagedStride * static_cast<int>(sizeof(Term));
static_assert(kTileTokens * kProductStride * static_cast<int>(sizeof(float)) <= kTileBytes);

// A slice of kStaged channels of a tile's rows on the way to shared memory: every thread holds V
// channels of each kDown-th row.
template <typename T, int V>
struct Slice {
  static constexpr int kAcross = kStaged / V;
  static constexpr int kDown = kTileThreads / kAcross;
  static constexpr int kHeld = kTileRows / kDown;

  Raw<T, V> rows[kHeld];
  Raw<T, V> origin;

  // Reads the slice that begins at channel `first`. Rows that do not exist have negative offsets.
  __device__ __forceinline__ void fetch(const T* tokens, const T* centres, const int64_t* offsets,
                                        const T* origin_row, int first, int channels) {
    const int c = first + static_cast<int>(threadIdx.x) % kAcross * V;
    const int row = static_cast<int>(threadIdx.x) / kAcross;
    const bool has_channels = c < channels;
    origin = {};
    if (has_channels) {
      origin = load_raw<V>(origin_row + c);
    }
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      const int64_t offset = offsets[row + n * kDown];
      const T* from = n * kDown < kTileTokens ? tokens : centres;
      rows[n] = {};
      if (has_channels && offset >= 0) {
        rows[n] = load_raw<V>(from + offset + c);
      }
    }
  }

  // Stages the slice about the origin and adds the squares of its numbers to the rows' norms. What
  // becomes of rows that do not exist is nobody's concern.
  __device__ __forceinline__ void put(Term* staged, float (&norms)[kHeld]) const {
    const int c = static_cast<int>(threadIdx.x) % kAcross * V;
    const int row = static_cast<int>(threadIdx.x) / kAcross;
    float zero[V];
    unpack<T>(origin, zero);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      // Or it would spoil the distances of all tokens, not only those to one centre.
      zero[v] = isfinite(zero[v]) ? zero[v] : 0.f;
    }
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      float values[V];
      unpack<T>(rows[n], values);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        values[v] -= zero[v];
        norms[n] = fmaf(values[v], values[v], norms[n]);
      }
      store_terms<V>(staged + (row + n * kDown) * kStagedStride + c, kTileRows * kStagedStride,
                     values);
    }
  }
};

// A warp's quarter of the products, in registers.
struct Quarter {
  SquareSums sums[kQuarterSide][kQuarterSide] = {};
  int row, column;  // first ones

  __device__ Quarter() {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    row = warp / 2 * kQuarterSide * kSquare;
    column = warp % 2 * kQuarterSide * kSquare;
  }

  // Adds the products of the staged channels.
  __device__ __forceinline__ void add(const Term* staged) {
    const auto square = [&](int term, int first_row, int k) {
      return staged + (term * kTileRows + first_row) * kStagedStride + k;
    };
#pragma unroll 1
    for (int k = 0; k < kStaged; k += kSquare) {
      SquareTerms y[kQuarterSide];
#pragma unroll
      for (int j = 0; j < kQuarterSide; ++j) {
#pragma unroll
        for (int t = 0; t < kTerms; ++t) {
          load_square(square(t, kTileTokens + column + j * kSquare, k), kStagedStride, y[j][t]);
        }
      }
#pragma unroll
      for (int i = 0; i < kQuarterSide; ++i) {
        SquareTerms x;
#pragma unroll
        for (int t = 0; t < kTerms; ++t) {
          load_square(square(t, row + i * kSquare, k), kStagedStride, x[t]);
        }
#pragma unroll
        for (int j = 0; j < kQuarterSide; ++j) {
          add_products(x, y[j], sums[i][j]);
        }
      }
    }
  }

  // Row t of `products` is that of token t, kProductStride long.
  __device__ __forceinline__ void store(float* products) const {
#pragma unroll
    for (int i = 0; i < kQuarterSide; ++i) {
#pragma unroll
      for (int j = 0; j < kQuarterSide; ++j) {
        store_square(sums[i][j],
                     products + (row + i * kSquare) * kProductStride + column + j * kSquare,
                     kProductStride);
      }
    }
  }
};

}  // namespace expedite_d2::cuda
