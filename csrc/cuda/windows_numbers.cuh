// What the iterations of a window work on: G, A and A G in shared memory. For windows_iterate.cu.
#pragma once

#include "cuda/windows_gram.cuh"

namespace expedite_d2::cuda {

// Of G, A and A G in shared memory: rows are aligned to 16 bytes, and eight neighbouring ones lie
// in different banks.
EXPEDITE_HOST_DEVICE int64_t gram_stride(int64_t padded) {
  return padded + 4;
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
  Span* spans;      // (K,): cell_span
  HomeCell* homes;  // (N,)
  float* norms;     // (K,): diagonal of A G A^T
  float* shares;    // (N,): what normalises a token's falloff
  float* sums;      // (kWarps,): for block_sum

  static EXPEDITE_HOST_DEVICE int64_t floats(int64_t padded, int64_t cells) {
    return (padded + 2 * cells) * gram_stride(padded) + 3 * cells + 3 * padded + kWarps;
  }

  __device__ GramNumbers(float* shared, const GramWindow& window)
      : stride(static_cast<int>(gram_stride(window.padded))) {
    gram = shared;
    rows = gram + window.padded * stride;
    next = rows + window.cells * stride;
    spans = reinterpret_cast<Span*>(next + window.cells * stride);
    homes = reinterpret_cast<HomeCell*>(spans + window.cells);
    norms = reinterpret_cast<float*>(homes + window.padded);
    shares = norms + window.cells;
    sums = shares + window.padded;
  }

  // Squared distance of token p to centre i, from A G and the norms. NaN stays.
  __device__ __forceinline__ float distance(int32_t i, int32_t p) const {
    const float d = fmaf(-2.f, next[i * stride + p], gram[p * stride + p]) + norms[i];
    return d < 0.f ? 0.f : d;
  }
};

// The cells that a token may belong to: rows top ... bottom, columns left ... right.
struct Candidates {
  int32_t top;
  int32_t bottom;
  int32_t left;
  int32_t right;

  __device__ Candidates(const GramNumbers& numbers, const GramWindow& window, int radius,
                        int32_t p) {
    const HomeCell home = numbers.homes[p];
    top = max(home.row - radius, 0);
    bottom = min(home.row + radius, window.cells / window.cell_columns - 1);
    left = max(home.column - radius, 0);
    right = min(home.column + radius, window.cell_columns - 1);
  }
};

// G as the sum of its parts, the tables of the window, and the rows of A for the initial centres:
// the average of each cell's real tokens. By all threads of a block.
__device__ __forceinline__ void load_numbers(const GramNumbers& numbers, const GramWindow& window,
                                             int radius,
                                             const float* parts,  // (splits, squares, 16, 16)
                                             int splits) {
  constexpr int kPacks = kSquare / 4;
  const int stride = numbers.stride;
  const int tiles = window.padded / kSquare;
  const int columns = tiles / 2 + 1;
  const int squares = tiles * columns;
  for (int n = threadIdx.x; n < window.cells * (stride / 4); n += kThreads) {
    store<4>(numbers.rows + 4 * n, {0.f, 0.f, 0.f, 0.f});
  }
  for (int i = threadIdx.x; i < window.cells; i += kThreads) {
    numbers.spans[i] = cell_span(window, i, radius);
  }
  for (int p = threadIdx.x; p < window.count; p += kThreads) {
    numbers.homes[p] = {window.grid.rows.home(p / window.width),
                        window.grid.columns.home(p % window.width)};
  }
  for (int n = threadIdx.x; n < squares * kSquare * kPacks; n += kThreads) {
    const int square = n / (kSquare * kPacks);
    const int row = n / kPacks % kSquare;
    const int column = n % kPacks * 4;
    float sum[4] = {};
    for (int split = 0; split < splits; ++split) {
      float part[4];
      load<4>(parts + (static_cast<int64_t>(split) * squares * kSquare * kPacks + n) * 4, part);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        sum[v] += part[v];
      }
    }
    const int strip = square / columns;
    const int ahead = square % columns;
    const int p = strip * kSquare + row;
    const int r = (strip + ahead) % tiles * kSquare + column;
    store<4>(numbers.gram + p * stride + r, sum);
    // With an even number of tiles both squares that are half of them apart were computed.
    if (ahead > 0 && 2 * ahead != tiles) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        numbers.gram[(r + v) * stride + p] = sum[v];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < window.cells; i += kThreads) {
    const int32_t cell_row = i / window.cell_columns;
    const int32_t cell_column = i % window.cell_columns;
    const int32_t bottom = window.grid.rows.end(cell_row, window.row);
    const int32_t right = window.grid.columns.end(cell_column, window.column);
    const int32_t top = window.grid.rows.begin(cell_row);
    const int32_t left = window.grid.columns.begin(cell_column);
    const float weight = 1.f / static_cast<float>((bottom - top) * (right - left));
    for (int32_t y = top; y < bottom; ++y) {
      for (int32_t x = left; x < right; ++x) {
        numbers.rows[i * stride + y * window.width + x] = weight;
      }
    }
  }
  __syncthreads();
}

// Centres whose products a warp computes together, so that an entry of G read once serves them all,
// and tokens of each lane, for which a number of A serves.
constexpr int kGramCentres = 8;
constexpr int kGramTokens = 3;

// A G and the norms, by all threads of a block: for all tokens, or for those that can be in one of
// the centres that a warp computes together.
__device__ __forceinline__ void multiply(const GramNumbers& numbers, const GramWindow& window,
                                         bool all) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int stride = numbers.stride;
  for (int i = static_cast<int>(threadIdx.x) / kWarp * kGramCentres; i < window.cells;
       i += kWarps * kGramCentres) {
    const int last = min(i + kGramCentres, window.cells) - 1;
    // A is zero outside of the spans, which ascend. Fours of tokens are read at once; beyond the
    // last token there are zeros.
    const int begin = numbers.spans[i].begin / 4 * 4;
    const int end = numbers.spans[last].end;
    const int from = all ? 0 : begin;
    const int to = all ? window.count : end;
    const float* rows[kGramCentres];
    float norms[kGramCentres] = {};
#pragma unroll
    for (int v = 0; v < kGramCentres; ++v) {
      rows[v] = numbers.rows + min(i + v, last) * stride;
    }
    for (int start = from; start < to; start += kWarp * kGramTokens) {
      const float* columns[kGramTokens];
      float sums[kGramCentres][kGramTokens] = {};
#pragma unroll
      for (int t = 0; t < kGramTokens; ++t) {
        columns[t] = numbers.gram + min(start + lane + t * kWarp, to - 1);
      }
      for (int r = begin; r < end; r += 4) {
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
#pragma unroll
      for (int t = 0; t < kGramTokens; ++t) {
        const int p = start + lane + t * kWarp;
        if (p < to) {
#pragma unroll
          for (int v = 0; v < kGramCentres; ++v) {
            norms[v] = fmaf(rows[v][p], sums[v][t], norms[v]);
            if (i + v <= last) {
              numbers.next[(i + v) * stride + p] = sums[v][t];
            }
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
