// One window in shared memory, for token_reduce_iterate.cu: G, A and A G.
#pragma once

#include "cuda/token_reduce.cuh"

namespace expedite_d2::cuda {

// One block's shared memory fills a multiprocessor, so it has as many threads as registers allow.
constexpr int kIterateThreads = 512;
constexpr int kIterateWarps = kIterateThreads / kWarp;

// Row length of G, A and A G in shared memory: an odd multiple of half the banks, so that sixteen
// tokens of a row and sixteen of the next one lie in different banks. `padded` is a multiple of
// sixteen.
EXPEDITE_HOST_DEVICE int64_t gram_stride(int64_t padded) {
  return padded | kMmaTile;
}

// Row and column of a token's home cell.
struct HomeCell {
  int32_t row;
  int32_t column;
};

// The shared memory of a block.
struct SharedWindow {
  int stride;
  float* gram;      // (padded, stride): G
  float* rows;      // (K, stride): A
  float* products;  // (K, stride): A G, then unnormalised weights of tokens for their candidates
  Range* spans;     // (K,): cell_tokens
  HomeCell* homes;  // (N,)
  float* norms;     // (K,): diagonal of A G A^T
  float* inverse_sums;  // (N,): of a token's unnormalised weights
  float* sums;          // (kIterateWarps,): for block_sum

  static EXPEDITE_HOST_DEVICE int64_t floats(int64_t padded, int64_t cells) {
    return (padded + 2 * cells) * gram_stride(padded) + 3 * cells + 3 * padded + kIterateWarps;
  }

  __device__ SharedWindow(float* shared, const WindowView& window) {
    const int padded = padded_tokens(window);
    const int cells = window.cells();
    stride = static_cast<int>(gram_stride(padded));
    gram = shared;
    rows = gram + padded * stride;
    products = rows + cells * stride;
    spans = reinterpret_cast<Range*>(products + cells * stride);
    homes = reinterpret_cast<HomeCell*>(spans + cells);
    norms = reinterpret_cast<float*>(homes + padded);
    inverse_sums = norms + cells;
    sums = inverse_sums + padded;
  }

  // G_pp, a term of all distances of token p. Callers keep it: after a store to shared memory the
  // compiler would read it again.
  __device__ __forceinline__ float squared_norm(int32_t p) const { return gram[p * stride + p]; }

  // Squared distance of token p, whose G_pp is `squared_norm`, to centre i, from A G and the norms.
  // NaN stays.
  __device__ __forceinline__ float distance(int32_t i, int32_t p, float squared_norm) const {
    const float d = fmaf(-2.f, products[i * stride + p], squared_norm) + norms[i];
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

  __device__ Candidates(const SharedWindow& memory, const WindowView& window, int radius, int32_t p,
                        bool exists) {
    const HomeCell home = memory.homes[p];
    rows = {max(home.row - radius, 0), min(home.row + radius + 1, window.cell_rows)};
    columns = {max(home.column - radius, 0),
               exists ? min(home.column + radius + 1, window.cell_columns) : 0};
  }

  // Calls f(first cell, count, distances) for this lane's part of them: every kTokenLanes-th column
  // of cells, in groups of at most kColumn. Beyond `count` the last distance is repeated.
  template <typename F>
  __device__ __forceinline__ void each(const SharedWindow& memory, int32_t cell_columns, int32_t p,
                                       const F& f) const {
    const float squared_norm = memory.squared_norm(p);
    for (int32_t j = columns.begin + static_cast<int32_t>(threadIdx.x) % kTokenLanes;
         j < columns.end; j += kTokenLanes) {
      for (int32_t i = rows.begin; i < rows.end; i += kColumn) {
        const int32_t first = i * cell_columns + j;
        const int32_t count = min(rows.end - i, kColumn);
        float distances[kColumn];
#pragma unroll
        for (int e = 0; e < kColumn; ++e) {
          distances[e] = memory.distance(first + min(e, count - 1) * cell_columns, p, squared_norm);
        }
        f(first, count, distances);
      }
    }
  }
};

// Calls f(token, whether it exists) with kTokenLanes lanes per token. All lanes of a warp take
// part: those beyond the last token are given the last one, as one that does not exist.
template <typename F>
__device__ __forceinline__ void each_token(const WindowView& window, const F& f) {
  for (int first = 0; first < window.tokens(); first += kIterateThreads / kTokenLanes) {
    const int p = first + static_cast<int>(threadIdx.x) / kTokenLanes;
    f(min(p, window.tokens() - 1), p < window.tokens());
  }
}

// Packs of G that a thread reads together: those of 144 tokens at once.
constexpr int kPacksAtOnce = 6;

// Fills the shared memory: G as the sum of its parts (with `keep`, also written over the first
// one), the tables of cells and tokens, and the rows of A for the initial centres, the average of
// each cell's real tokens. By all threads of a block.
__device__ __forceinline__ void load_shared(const SharedWindow& memory, const WindowView& window,
                                            int radius,
                                            float* parts,  // (splits, tiles, 16, 16)
                                            int splits, bool keep) {
  constexpr int kPacks = kMmaTile / 4;
  const int stride = memory.stride;
  const int strips = padded_tokens(window) / kMmaTile;
  const int columns = strips / 2 + 1;
  const int tiles = strips * columns;
  for (int n = threadIdx.x; n < window.cells() * (stride / 4); n += kIterateThreads) {
    store<4>(memory.rows + 4 * n, {0.f, 0.f, 0.f, 0.f});
  }
  for (int i = threadIdx.x; i < window.cells(); i += kIterateThreads) {
    memory.spans[i] = cell_tokens(window, i, radius);
  }
  for (int p = threadIdx.x; p < window.tokens(); p += kIterateThreads) {
    memory.homes[p] = {window.grid.rows.home(p / window.width),
                       window.grid.columns.home(p % window.width)};
  }
  const int packs = tiles * kMmaTile * kPacks;
  for (int first = threadIdx.x; first < packs; first += kPacksAtOnce * kIterateThreads) {
    float sums[kPacksAtOnce][4] = {};
#pragma unroll 2
    for (int split = 0; split < splits; ++split) {
      const float* part = parts + static_cast<int64_t>(split) * packs * 4;
#pragma unroll
      for (int e = 0; e < kPacksAtOnce; ++e) {
        const int n = first + e * kIterateThreads;
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
      const int n = first + e * kIterateThreads;
      if (n >= packs) {
        break;
      }
      const float (&sum)[4] = sums[e];
      if (keep) {
        store<4>(parts + 4 * n, sum);
      }
      const int tile = n / (kMmaTile * kPacks);
      const int strip = tile / columns;
      const int ahead = tile % columns;
      const int p = strip * kMmaTile + n / kPacks % kMmaTile;
      const int r = (strip + ahead) % strips * kMmaTile + n % kPacks * 4;
      store<4>(memory.gram + p * stride + r, sum);
      // With an even number of strips, tiles half of them apart were computed in both orders.
      if (ahead > 0 && 2 * ahead != strips) {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          memory.gram[(r + v) * stride + p] = sum[v];
        }
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < window.cells(); i += kIterateThreads) {
    const Range rows = window.grid.rows.pooled(i / window.cell_columns, window.row);
    const Range columns = window.grid.columns.pooled(i % window.cell_columns, window.column);
    const float weight = 1.f / static_cast<float>(rows.size() * columns.size());
    for (int32_t y = rows.begin; y < rows.end; ++y) {
      for (int32_t x = columns.begin; x < columns.end; ++x) {
        memory.rows[i * stride + y * window.width + x] = weight;
      }
    }
  }
  __syncthreads();
}

// Centres whose products a warp computes together, and tokens of each lane, so that every value of
// A and G that is read serves several products. Both halves of a warp have the same tokens, but sum
// over different rows of G.
constexpr int kGramCentres = 4;
constexpr int kGramTokens = 6;
constexpr int kGramLanes = kWarp / 2;

// A G and the norms, by all threads of a block: for all tokens, or for those that can be in one of
// the centres that a warp computes together.
__device__ __forceinline__ void multiply_gram(const SharedWindow& memory, const WindowView& window,
                                              bool all) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int half = lane / kGramLanes;
  const int stride = memory.stride;
  for (int i = static_cast<int>(threadIdx.x) / kWarp * kGramCentres; i < window.cells();
       i += kIterateWarps * kGramCentres) {
    const int last = min(i + kGramCentres, window.cells()) - 1;
    // A is zero outside of the spans, which ascend. Four tokens are read at once; beyond the last
    // token there are zeros.
    const int begin = memory.spans[i].begin / 4 * 4;
    const int end = memory.spans[last].end;
    const int from = all ? 0 : begin;
    const int to = all ? window.tokens() : end;
    const float* rows[kGramCentres];
    float norms[kGramCentres] = {};
#pragma unroll
    for (int v = 0; v < kGramCentres; ++v) {
      rows[v] = memory.rows + min(i + v, last) * stride;
    }
    for (int start = from; start < to; start += kGramLanes * kGramTokens) {
      const float* columns[kGramTokens];
      float sums[kGramCentres][kGramTokens] = {};
#pragma unroll
      for (int t = 0; t < kGramTokens; ++t) {
        columns[t] = memory.gram + min(start + lane % kGramLanes + (t ^ half) * kGramLanes, to - 1);
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
      // Each half of the warp keeps the tokens whose sums it is given by the other.
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
            memory.products[(i + v) * stride + p] = products[v];
          }
        }
      }
    }
#pragma unroll
    for (int v = 0; v < kGramCentres; ++v) {
      const float norm = warp_sum(norms[v]);
      if (lane == 0 && i + v <= last) {
        memory.norms[i + v] = norm;
      }
    }
  }
  __syncthreads();
}

}  // namespace expedite_d2::cuda
