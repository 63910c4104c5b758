// Squared distances of tokens to the centres that are their candidates, for token_spread and the
// direct form of token_cluster.
//
// A warp takes a pair of neighbours in a row of tokens, whose candidates are mostly the same, so
// that each centre that is read serves both. A block takes neighbouring pairs and goes through the
// channels with all of them, so that most centres come from the L1 cache. Differences are squared,
// so a large common offset of all tokens cancels before it can cost precision.
#pragma once

#include <algorithm>

#include "cuda/utils.cuh"
#include "cuda/windows.cuh"

namespace expedite_d2::cuda {

// Tokens that a warp processes together.
constexpr int kPair = 2;
// Pairs of a block in one row of tokens.
constexpr int kPairsAcross = 2;
// Candidates whose reads are in flight together: a pair often has a multiple of five.
constexpr int kAtOnce = 5;
// This many blocks fill any GPU; with fewer, two warps split the channels of a pair.
constexpr int64_t kEnoughBlocks = 512;

// How the work is divided: one block per tile of pairs.
struct PairTiles {
  int32_t rows, columns;  // of tiles
  int32_t height;         // rows of tokens in a tile
  int32_t window_pairs;   // in a row of a window
  int32_t splits;         // warps that split the channels of a pair, 1 or kPair
  int32_t candidates;     // of a pair, at most
  int64_t blocks;

  PairTiles(const Grid& grid, CandidateShape shape, int64_t batch) {
    const WindowAxis& across = grid.columns;
    window_pairs = ceil_div(across.max_real(), kPair);
    columns = ceil_div(across.windows() * window_pairs, kPairsAcross);
    // Home cells of neighbouring tokens are at most this many cells apart.
    const int32_t step = ceil_div(across.clusters, across.window);
    candidates = shape.rows * std::min(across.clusters, shape.columns + step);
    for (splits = 1;; splits = kPair) {
      height = kWarps / kPairsAcross / splits;
      rows = ceil_div(grid.rows.size, height);
      blocks = batch * rows * columns;
      if (blocks >= kEnoughBlocks || splits == kPair) {
        break;
      }
    }
  }
};

// The tokens of a warp and their candidates.
struct TokenPair {
  int64_t image;
  int64_t first_token;                        // in (B, H, W)
  int64_t first_centre;                       // in (B, h', w')
  int32_t tokens;                             // there may be one or none
  int32_t candidates, across, centre_stride;  // lie in rows of `across`, so far apart
  int32_t skipped[kPair], width[kPair];       // columns that are candidates of each token
  int32_t splits, split;

  __device__ void set(const Grid& grid, int radius, const PairTiles& tiles) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    splits = tiles.splits;
    split = splits == 1 ? 0 : warp % kPair;
    const int n = splits == 1 ? warp : warp / kPair;
    const Position at = position(blockIdx.x, tiles.rows, tiles.columns);
    const int32_t y = at.row * tiles.height + n / kPairsAcross;
    const int32_t pair = at.column * kPairsAcross + n % kPairsAcross;
    const int32_t column = pair / tiles.window_pairs;
    const int32_t x = pair % tiles.window_pairs * kPair;
    const int32_t left = grid.columns.real(column) - x;
    image = at.image;
    tokens = candidates = 0;
    across = 1;
    if (y >= grid.rows.size || left <= 0) {
      return;
    }
    tokens = min(left, kPair);
    const WindowPosition row = token_position(grid.rows, y);
    const WindowView window = window_at(grid, image, row.window, column);
    first_token = window.token(row.local, x);
    const Range rows = grid.rows.candidates(row.local, radius, row.window);
    const int32_t leftmost = grid.columns.first_candidate(x, radius);
#pragma unroll
    for (int t = 0; t < kPair; ++t) {
      const int32_t local = x + min(t, tokens - 1);
      const Range own = grid.columns.candidates(local, radius, column);
      skipped[t] = own.begin - leftmost;
      width[t] = own.size();
    }
    across = skipped[kPair - 1] + width[kPair - 1];
    candidates = rows.size() * across;
    centre_stride = window.map_columns;
    first_centre = window.centre(rows.begin, leftmost);
  }

  // Candidate n in (B, h', w').
  __device__ int64_t centre(int32_t n) const {
    return first_centre + int64_t{n / across} * centre_stride + n % across;
  }

  // The place of candidate n among those of token t, in rows of `columns`; -1 if it is none of
  // them.
  __device__ int32_t slot(int t, int32_t n, int32_t columns) const {
    if (n >= candidates) {
      return -1;  // of a pair without tokens nothing below is set
    }
    const int32_t column = n % across - skipped[t];
    return column >= 0 && column < width[t] ? n / across * columns + column : -1;
  }

  // Whether token t exists and this warp is the one that uses its distances.
  __device__ bool owns(int t) const { return t < tokens && (splits == 1 || t == split); }
};

// This warp's pair, in shared memory, because the sums need the registers.
__device__ __forceinline__ const TokenPair& token_pair(const Grid& grid, int radius,
                                                       const PairTiles& tiles) {
  __shared__ TokenPair pairs[kWarps];
  TokenPair& pair = pairs[threadIdx.x / kWarp];
  if (threadIdx.x % kWarp == 0) {
    pair.set(grid, radius, tiles);
  }
  __syncwarp();
  return pair;
}

// Squared distances of a pair's tokens to candidate first + lane; undefined where there is no such
// token or candidate. By all threads of a block. V is at most a 16-byte read of the centres, which
// are float32 and most of what is read.
template <int V, typename T>
__device__ __forceinline__ void pair_distances(const T* tokens, const float* centres,
                                               const TokenPair& pair, int32_t first, int channels,
                                               float (&distances)[kPair]) {
  static_assert(V <= kVectorSize<float>);
  __shared__ int64_t offsets[kWarps][kWarp];
  __shared__ float sums[kWarps][kPair][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int32_t count = pair.candidates - first;
  if (count > 0) {
    // All lanes have read the previous offsets.
    __syncwarp();
    offsets[warp][lane] = pair.centre(first + min(lane, count - 1)) * channels;
    __syncwarp();
    const T* z = tokens + pair.first_token * channels;
    const int beside = pair.tokens == kPair ? channels : 0;
    float partial[kPair][kWarp] = {};
    const int start = (pair.split * kWarp + lane) * V;
    const int step = pair.splits * kWarp * V;
    // Advanced with the channels, not computed anew for each candidate.
    const float* from = centres + start;
    // Channels outside and candidates inside: the tokens are read once.
#pragma unroll 1
    for (int c = start; c < channels; c += step, from += step) {
      float x[kPair][V];
      load<V>(z + c, x[0]);
      load<V>(z + beside + c, x[1]);
#pragma unroll
      for (int n = 0; n < kWarp; n += kAtOnce) {
        if (n < count) {
          float y[kAtOnce][V];
#pragma unroll
          for (int e = 0; e < kAtOnce; ++e) {
            if (n + e < kWarp) {
              load<V>(from + offsets[warp][n + e], y[e]);
            }
          }
#pragma unroll
          for (int e = 0; e < kAtOnce; ++e) {
#pragma unroll
            for (int t = 0; n + e < kWarp && t < kPair; ++t) {
#pragma unroll
              for (int v = 0; v < V; ++v) {
                const float difference = x[t][v] - y[e][v];
                partial[t][n + e] = fmaf(difference, difference, partial[t][n + e]);
              }
            }
          }
        }
      }
    }
    distances[0] = warp_sums(partial[0]);
    distances[1] = warp_sums(partial[1]);
  }
  if (pair.splits > 1) {
    // All warps have read the previous sums.
    __syncthreads();
#pragma unroll
    for (int t = 0; t < kPair; ++t) {
      sums[warp][t][lane] = distances[t];
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < kPair; ++t) {
      distances[t] = sums[warp - pair.split][t][lane] + sums[warp - pair.split + 1][t][lane];
    }
  }
}

}  // namespace expedite_d2::cuda
