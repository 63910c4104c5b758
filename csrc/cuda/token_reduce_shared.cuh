// What the iterations of a window work on: G, A and A G in shared memory. For
// token_reduce_iterate.cu.
#pragma once

#include "cuda/token_reduce.cuh"

namespace expedite_d2::cuda {

// The shared memory of one block fills a multiprocessor: it has as many threads as registers allow.
constexpr int kNumberThreads = 512;
constexpr int kNumberWarps = kNumberThreads / kWarp;

// Of G, A and A G in shared memory: an odd number of half rows of banks, so that sixteen tokens of
// a row and sixteen of the next one lie in different banks. `padded` is a multiple of sixteen.
EXPEDITE_HOST_DEVICE int64_t gram_stride(int64_t padded) {
  return padded | kSquare;
}

// Row and column of a token's home cell.
struct HomeCell {
  int32_t row;
  int32_t column;
};

// What the iterations of one window need, in shared memory.
struct GramNumbers {
  int stride;
  float* gram;      // (padded, stride): G
  float* rows;      // (K, stride): A
  float* next;      // (K, stride): A G, then the falloff of tokens to their candidates
  Range* spans;     // (K,): cell_tokens
  HomeCell* homes;  // (N,)
  float* norms;     // (K,): diagonal of A G A^T
  float* shares;    // (N,): what normalises a token's falloff
  float* sums;      // (kNumberWarps,): for block_sum

  static EXPEDITE_HOST_DEVICE int64_t floats(int64_t padded, int64_t cells) {
    return (padded + 2 * cells) * gram_stride(padded) + 3 * cells + 3 * padded + kNumberWarps;
  }

  __device__ GramNumbers(float* shared, const WindowView& window) {
    const int padded = padded_tokens(window);
    const int cells = window.cells();
    stride = static_cast<int>(gram_stride(padded));
    gram = shared;
    rows = gram + padded * stride;
    next = rows + cells * stride;
    spans = reinterpret_cast<Range*>(next + cells * stride);
    homes = reinterpret_cast<HomeCell*>(spans + cells);
    norms = reinterpret_cast<float*>(homes + padded);
    shares = norms + cells;
    sums = shares + padded;
  }

  // G_pp, which all distances of token p begin with. Stores to shared memory would make the
  // compiler read it again for each of them.
  __device__ __forceinline__ float square(int32_t p) const { return gram[p * stride + p]; }

  // Squared distance of token p, whose G_pp is `square`, to centre i, from A G and the norms. NaN
  // stays.
  __device__ __forceinline__ float distance(int32_t i, int32_t p, float square) const {
    const float d = fmaf(-2.f, next[i * stride + p], square) + norms[i];
    return d < 0.f ? 0.f : d;
  }
};

// Neighbouring lanes that share the centres of a token. They read from neighbouring rows of A G.
constexpr int kTokenLanes = 2;
// Candidates whose distances a lane reads before it writes: a column of the default neighbourhood.
constexpr int kColumn = 5;

// The cells that a token may belong to. None where the token does not exist: its lanes must not
// read what those of token p, which stands in for it, are about to overwrite.
struct Candidates {
  Range rows;
  Range columns;

  __device__ Candidates(const GramNumbers& numbers, const WindowView& window, int radius, int32_t p,
                        bool exists) {
    const HomeCell home = numbers.homes[p];
    rows = {max(home.row - radius, 0), min(home.row + radius + 1, window.cell_rows)};
    columns = {max(home.column - radius, 0),
               exists ? min(home.column + radius + 1, window.cell_columns) : 0};
  }

  // Calls f(first cell, count, distances) for this lane's share of them: every kTokenLanes-th
  // column of cells, in groups of at most kColumn. Beyond `count` the last distance is repeated.
  template <typename F>
  __device__ __forceinline__ void each(const GramNumbers& numbers, int32_t cell_columns, int32_t p,
                                       const F& f) const {
    const float square = numbers.square(p);
    for (int32_t j = columns.begin + static_cast<int32_t>(threadIdx.x) % kTokenLanes;
         j < columns.end; j += kTokenLanes) {
      for (int32_t i = rows.begin; i < rows.end; i += kColumn) {
        const int32_t first = i * cell_columns + j;
        const int32_t count = min(rows.end - i, kColumn);
        float distances[kColumn];
#pragma unroll
        for (int e = 0; e < kColumn; ++e) {
          distances[e] = numbers.distance(first + min(e, count - 1) * cell_columns, p, square);
        }
        f(first, count, distances);
      }
    }
  }
};

// Calls f(token, whether it exists) by kTokenLanes lanes for each token, with all lanes of a warp:
// those beyond the last token get the last one once more.
template <typename F>
__device__ __forceinline__ void each_token(const WindowView& window, const F& f) {
  for (int first = 0; first < window.tokens(); first += kNumberThreads / kTokenLanes) {
    const int p = first + static_cast<int>(threadIdx.x) / kTokenLanes;
    f(min(p, window.tokens() - 1), p < window.tokens());
  }
}

// Packs of G that a thread reads together: those of 144 tokens at once.
constexpr int kPacksAtOnce = 6;

// G as the sum of its parts (with `keep`, written in place of the first one), the tables of the
// window, and the rows of A for the initial centres: the average of each cell's real tokens. By all
// threads of a block.
__device__ __forceinline__ void load_numbers(const GramNumbers& numbers, const WindowView& window,
                                             int radius,
                                             float* parts,  // (splits, squares, 16, 16)
                                             int splits, bool keep) {
  constexpr int kPacks = kSquare / 4;
  const int stride = numbers.stride;
  const int tiles = padded_tokens(window) / kSquare;
  const int columns = tiles / 2 + 1;
  const int squares = tiles * columns;
  for (int n = threadIdx.x; n < window.cells() * (stride / 4); n += kNumberThreads) {
    store<4>(numbers.rows + 4 * n, {0.f, 0.f, 0.f, 0.f});
  }
  for (int i = threadIdx.x; i < window.cells(); i += kNumberThreads) {
    numbers.spans[i] = cell_tokens(window, i, radius);
  }
  for (int p = threadIdx.x; p < window.tokens(); p += kNumberThreads) {
    numbers.homes[p] = {window.grid.rows.home(p / window.width),
                        window.grid.columns.home(p % window.width)};
  }
  const int packs = squares * kSquare * kPacks;
  for (int first = threadIdx.x; first < packs; first += kPacksAtOnce * kNumberThreads) {
    float sums[kPacksAtOnce][4] = {};
#pragma unroll 2
    for (int split = 0; split < splits; ++split) {
      const float* part = parts + static_cast<int64_t>(split) * packs * 4;
#pragma unroll
      for (int e = 0; e < kPacksAtOnce; ++e) {
        const int n = first + e * kNumberThreads;
        float values[4] = {};
        if (n < packs) {
          load<4>(part + 4 * n, values);
        }
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          sums[e][v] += values[v];
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kPacksAtOnce; ++e) {
      const int n = first + e * kNumberThreads;
      if (n >= packs) {
        break;
      }
      const float (&sum)[4] = sums[e];
      if (keep) {
        store<4>(parts + 4 * n, sum);
      }
      const int square = n / (kSquare * kPacks);
      const int strip = square / columns;
      const int ahead = square % columns;
      const int p = strip * kSquare + n / kPacks % kSquare;
      const int r = (strip + ahead) % tiles * kSquare + n % kPacks * 4;
      store<4>(numbers.gram + p * stride + r, sum);
      // With an even number of tiles both squares that are half of them apart were computed.
      if (ahead > 0 && 2 * ahead != tiles) {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          numbers.gram[(r + v) * stride + p] = sum[v];
        }
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < window.cells(); i += kNumberThreads) {
    const Range rows = window.grid.rows.pooled(i / window.cell_columns, window.row);
    const Range columns = window.grid.columns.pooled(i % window.cell_columns, window.column);
    const float weight = 1.f / static_cast<float>(rows.size() * columns.size());
    for (int32_t y = rows.begin; y < rows.end; ++y) {
      for (int32_t x = columns.begin; x < columns.end; ++x) {
        numbers.rows[i * stride + y * window.width + x] = weight;
      }
    }
  }
  __syncthreads();
}

// Centres whose products a warp computes together, and tokens of each lane: every number of A and G
// that is read serves several products. Both halves of a warp have the same tokens, but sum over
// different rows of G.
constexpr int kGramCentres = 4;
constexpr int kGramTokens = 6;
constexpr int kGramLanes = kWarp / 2;

// A G and the norms, by all threads of a block: for all tokens, or for those that can be in one of
// the centres that a warp computes together.
__device__ __forceinline__ void multiply(const GramNumbers& numbers, const WindowView& window,
                                         bool all) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int half = lane / kGramLanes;
  const int stride = numbers.stride;
  for (int i = static_cast<int>(threadIdx.x) / kWarp * kGramCentres; i < window.cells();
       i += kNumberWarps * kGramCentres) {
    const int last = min(i + kGramCentres, window.cells()) - 1;
    // A is zero outside of the spans, which ascend. Fours of tokens are read at once; beyond the
    // last token there are zeros.
    const int begin = numbers.spans[i].begin / 4 * 4;
    const int end = numbers.spans[last].end;
    const int from = all ? 0 : begin;
    const int to = all ? window.tokens() : end;
    const float* rows[kGramCentres];
    float norms[kGramCentres] = {};
#pragma unroll
    for (int v = 0; v < kGramCentres; ++v) {
      rows[v] = numbers.rows + min(i + v, last) * stride;
    }
    for (int start = from; start < to; start += kGramLanes * kGramTokens) {
      const float* columns[kGramTokens];
      float sums[kGramCentres][kGramTokens] = {};
#pragma unroll
      for (int t = 0; t < kGramTokens; ++t) {
        columns[t] =
            numbers.gram + min(start + lane % kGramLanes + (t ^ half) * kGramLanes, to - 1);
      }
      // The halves read from the same banks in different rows, so they take turns with the tokens.
      for (int r = begin + 4 * half; r < end; r += 8) {
        float a[kGramCentres][4];
#pragma unroll
        for (int v = 0; v < kGramCentres; ++v) {
          load<4>(rows[v] + r, a[v]);
        }
#pragma unroll
        for (int u = 0; u < 4; ++u) {
#pragma unroll
          for (int t = 0; t < kGramTokens; ++t) {
            const float g = columns[t][(r + u) * stride];
#pragma unroll
            for (int v = 0; v < kGramCentres; ++v) {
              sums[v][t] = fmaf(a[v][u], g, sums[v][t]);
            }
          }
        }
      }
      // What one half keeps the other gives away.
#pragma unroll
      for (int t = 0; t < kGramTokens; t += 2) {
        const int p = start + lane % kGramLanes + (t + half) * kGramLanes;
        float products[kGramCentres];
        float a[kGramCentres];
#pragma unroll
        for (int v = 0; v < kGramCentres; ++v) {
          products[v] = sums[v][t] + __shfl_xor_sync(kAllLanes, sums[v][t + 1], kGramLanes);
          a[v] = p < to ? rows[v][p] : 0.f;
        }
#pragma unroll
        for (int v = 0; v < kGramCentres; ++v) {
          norms[v] = fmaf(a[v], products[v], norms[v]);
          if (p < to && i + v <= last) {
            numbers.next[(i + v) * stride + p] = products[v];
          }
        }
      }
    }
#pragma unroll
    for (int v = 0; v < kGramCentres; ++v) {
      const float norm = warp_sum(norms[v]);
      if (lane == 0 && i + v <= last) {
        numbers.norms[i + v] = norm;
      }
    }
  }
  __syncthreads();
}

}  // namespace expedite_d2::cuda
