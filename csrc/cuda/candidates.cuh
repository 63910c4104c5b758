// Squared distances of tokens to the centres that are their candidates, for token_spread and the
// direct form of token_cluster.
//
// Tokens that share their home cell share their candidates: a warp takes two of them, so that a
// centre serves both when it is read. A block takes neighbouring cells, whose candidates are mostly
// the same and come from the first-level cache. Differences are squared, so a large common offset
// of all tokens cancels before it can cost precision.
#pragma once

#include <algorithm>

#include "cuda/utils.cuh"
#include "cuda/windows.cuh"

namespace expedite_d2::cuda {

// Home cells of a block along rows and along columns.
constexpr int kHomes = 2;
// Tokens of one home cell that a warp looks at together.
constexpr int kPair = 2;
// Warps that share the channels of a pair. Each of them then has one of the tokens to itself.
constexpr int kShares = kWarps / (kHomes * kHomes);
static_assert(kShares == kPair);
// Candidates whose reads are in flight together.
constexpr int kAtOnce = 4;
// So many blocks fill any GPU; beyond that a block takes several pairs of a cell.
constexpr int64_t kEnoughBlocks = 512;

// How the work is divided: a block for a tile of kHomes x kHomes cells of the map and every
// `splits`-th pair of their tokens.
struct HomeTiles {
  int32_t rows, columns;  // of tiles
  int32_t pairs;          // of tokens in a cell, at most
  int32_t splits;
  int64_t blocks;

  HomeTiles(const Grid& grid, int64_t batch)
      : rows(ceil_div(grid.rows.cells(), kHomes)), columns(ceil_div(grid.columns.cells(), kHomes)) {
    const int64_t tokens = int64_t{ceil_div(grid.rows.window, grid.rows.clusters)} *
                           ceil_div(grid.columns.window, grid.columns.clusters);
    const int64_t tiles = batch * rows * columns;
    pairs = static_cast<int32_t>(ceil_div<int64_t>(tokens, kPair));
    splits = static_cast<int32_t>(
        std::clamp<int64_t>(kEnoughBlocks / tiles, 1, static_cast<int64_t>(pairs)));
    blocks = tiles * splits;
  }
};

// The tokens whose home is this warp's cell, and their candidates.
struct Home {
  int64_t image;
  int64_t first_token;   // in (B, H, W)
  int64_t first_centre;  // in (B, h', w')
  int32_t stride, centre_stride;
  int32_t tokens = 0, width = 1;       // lie in rows of `width`, `stride` apart
  int32_t candidates = 0, across = 1;  // lie in rows of `across`, `centre_stride` apart
  int32_t first_pair;

  __device__ Home(const Grid& grid, int radius, const HomeTiles& tiles) {
    const int cell = static_cast<int>(threadIdx.x) / kWarp / kShares;
    const Position at = position(blockIdx.x / tiles.splits, tiles.rows, tiles.columns);
    const int32_t cell_row = at.row * kHomes + cell / kHomes;
    const int32_t cell_column = at.column * kHomes + cell % kHomes;
    image = at.image;
    first_pair = static_cast<int32_t>(blockIdx.x % tiles.splits);
    stride = grid.columns.size;
    centre_stride = grid.columns.cells();
    if (cell_row >= grid.rows.cells() || cell_column >= grid.columns.cells()) {
      return;
    }
    const Spot row = cell_spot(grid.rows, cell_row);
    const Spot column = cell_spot(grid.columns, cell_column);
    const int32_t top = grid.rows.reach_begin(row.local, 0);
    const int32_t left = grid.columns.reach_begin(column.local, 0);
    const int32_t height = grid.rows.reach_end(row.local, 0, row.window) - top;
    const int32_t wide = grid.columns.reach_end(column.local, 0, column.window) - left;
    // Where there are more cells than tokens, some are nobody's home.
    if (height <= 0 || wide <= 0) {
      return;
    }
    width = wide;
    tokens = height * wide;
    first_token =
        (image * grid.rows.size + row.window * grid.rows.window + top) * grid.columns.size +
        column.window * grid.columns.window + left;
    const int32_t upper = grid.rows.first(top, radius);
    const int32_t leftmost = grid.columns.first(left, radius);
    across = grid.columns.last(left, radius, column.window) - leftmost + 1;
    candidates = (grid.rows.last(top, radius, row.window) - upper + 1) * across;
    first_centre = (image * grid.rows.cells() + row.window * grid.rows.clusters + upper) *
                       grid.columns.cells() +
                   column.window * grid.columns.clusters + leftmost;
  }

  // Token t of the cell in (B, H, W).
  __device__ int64_t token(int32_t t) const {
    return first_token + int64_t{t / width} * stride + t % width;
  }

  // Candidate n in (B, h', w').
  __device__ int64_t centre(int32_t n) const {
    return first_centre + int64_t{n / across} * centre_stride + n % across;
  }

  // The token of a pair that is this warp's own; it may not exist.
  __device__ int32_t own(int32_t pair) const {
    return pair * kPair + static_cast<int>(threadIdx.x) / kWarp % kPair;
  }
};

// Squared distance of home.own(pair) to row(first + lane), which is one of `count`. By all threads
// of a block; what is returned where there is no such token or row has no meaning.
// Most of what is read is float32, of which 16 bytes are few channels: V is not more, for any type.
template <int V, typename T, typename Row>
__device__ __forceinline__ float pair_distances(const T* tokens, const Home& home, int32_t pair,
                                                int32_t first, int32_t count, const Row& row,
                                                int channels) {
  static_assert(V <= kWide<float>);
  __shared__ float sums[kWarps][kPair][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  // Sums of before have been read.
  __syncthreads();
  if (pair * kPair < home.tokens) {
    const int32_t end = min(count, first + kWarp);
    const T* z[kPair];
#pragma unroll
    for (int t = 0; t < kPair; ++t) {
      z[t] = tokens + home.token(min(pair * kPair + t, home.tokens - 1)) * channels;
    }
    for (int32_t n = first; n < end; n += kAtOnce) {
      const float* s[kAtOnce];
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        s[e] = row(min(n + e, end - 1));
      }
      float partial[kAtOnce * kPair] = {};
#pragma unroll 2
      for (int c = (warp % kShares * kWarp + lane) * V; c < channels; c += kShares * kWarp * V) {
        float x[kPair][V], y[kAtOnce][V];
#pragma unroll
        for (int t = 0; t < kPair; ++t) {
          load<V>(z[t] + c, x[t]);
        }
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
          load<V>(s[e] + c, y[e]);
        }
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
#pragma unroll
          for (int t = 0; t < kPair; ++t) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
              const float difference = x[t][v] - y[e][v];
              partial[e * kPair + t] = fmaf(difference, difference, partial[e * kPair + t]);
            }
          }
        }
      }
      const float sum = warp_sums(partial);
      if (lane < kAtOnce * kPair) {
        sums[warp][lane % kPair][n - first + lane / kPair] = sum;
      }
    }
  }
  __syncthreads();
  float distance = 0.f;
#pragma unroll
  for (int share = 0; share < kShares; ++share) {
    distance += sums[warp / kShares * kShares + share][warp % kPair][lane];
  }
  return distance;
}

}  // namespace expedite_d2::cuda
