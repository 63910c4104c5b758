// token_cluster and token_reduce for small windows, in three or four launches.
//
// Centres are always convex combinations of tokens, S = A Z with A (K, N). So every distance
// follows from the Gram matrix of the window's tokens, G = Z Z^T (N, N):
//     ||z_p - s_i||^2 = G_pp - 2 (A G)_ip + (A G A^T)_ii.
// The channels are read for G and for S = A Z, both in this file, on tensor cores and with several
// blocks per window. In between, spread, iterations and match work on N x N numbers
// (token_reduce_iterate.cu). The window's mean token is subtracted in G: otherwise the distances of
// tokens with a large common offset would be lost to cancellation.
//
// A token that is not finite spoils the Gram matrix, so that all centres and matches of its window
// are NaN. A window of 144 tokens and 64 cells needs 156 KiB of shared memory; cards with less take
// other paths, with the same results up to rounding.
#include <algorithm>
#include <cmath>

#include "cuda/token_reduce.cuh"

namespace expedite_d2::cuda {
namespace {

// MMA tiles of G that a warp keeps in registers.
constexpr int kWarpTiles = 6;
// Rows that a warp reads together for the mean: half of its rows of a window of 144 tokens.
constexpr int kMeanRows = 9;
// Packs of A that a thread of centres_kernel reads together.
constexpr int kPacksOfA = 3;
// The fewest channels of a block of gram_kernel, and the channels of a block of centres_kernel.
constexpr int kMinChannelsPerSplit = 128;
constexpr int kCentreChannels = 128;
// Fixed cost of a block of gram_kernel, and of adding up its part of G later, in equivalent
// channels.
constexpr int64_t kSplitOverhead = 64;
// Row length of staged centres: 32 channels, and eight more so that four rows cover all banks.
constexpr int kCentreStride = kStaged + 8;
// Every window adds up the sums of all windows of its image, so their number is limited.
constexpr int64_t kMaxWindows = 4096;
// Bytes of scratch that are always allowed; beyond that, no more than the tokens take themselves.
constexpr int64_t kFreeScratch = int64_t{4} << 20;

// Bytes for the sums of the mean, of which every thread has one, and later for the staged rows.
EXPEDITE_HOST_DEVICE int64_t gram_staged_bytes(int64_t padded) {
  const int64_t staged = staged_bytes(padded);
  const int64_t sums = kThreads * kVectorSize<c10::Half> * static_cast<int64_t>(sizeof(float));
  return staged > sums ? staged : sums;
}

// Where a window's tokens begin in the tensor of all tokens.
__device__ __forceinline__ void find_rows(const WindowView& window, int channels, int64_t* places) {
  for (int p = threadIdx.x; p < window.tokens(); p += kThreads) {
    places[p] = window.token(p) * channels;
  }
  __syncthreads();
}

// The window's mean token, of channels begin ... end - 1.
template <typename T, int V>
__device__ __forceinline__ void compute_mean(const T* tokens, const int64_t* places, int count,
                                             int begin, int end, float* sums, float* mean) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  for (int first = begin; first < end; first += kWarp * V) {
    const int c = first + lane * V;
    float sum[V] = {};
    if (c < end) {
      for (int p = warp; p < count; p += kMeanRows * kWarps) {
        float z[kMeanRows][V];
#pragma unroll
        for (int n = 0; n < kMeanRows; ++n) {
          load<V>(tokens + places[min(p + n * kWarps, count - 1)] + c, z[n]);
        }
#pragma unroll
        for (int n = 0; n < kMeanRows; ++n) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            sum[v] += p + n * kWarps < count ? z[n][v] : 0.f;
          }
        }
      }
    }
    store<V>(sums + (warp * kWarp + lane) * V, sum);
    __syncthreads();
    const int n = static_cast<int>(threadIdx.x);
    if (n < kWarp * V && first + n < end) {
      float total = 0.f;
      for (int w = 0; w < kWarps; ++w) {
        total += sums[w * kWarp * V + n];
      }
      total /= static_cast<float>(count);
      // A non-finite mean would contaminate the distances of all tokens, not only of the bad one.
      mean[first + n] = isfinite(total) ? total : 0.f;
    }
    __syncthreads();
  }
}

// Mean and G of a window for some of its channels.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    gram_kernel(const T* __restrict__ tokens,  // (B, H, W, C)
                GramScratch scratch, Grid grid, int channels, int channels_per_split) {
  static_assert(kWarp * V <= kThreads);
  extern __shared__ __align__(128) float shared[];
  const int64_t linear = blockIdx.x / scratch.splits;
  const int split = static_cast<int>(blockIdx.x % scratch.splits);
  const WindowView window = window_at(grid, linear);
  const int padded = padded_tokens(window);
  const int begin = split * channels_per_split;
  const int end = min(begin + channels_per_split, channels);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int strips = padded / kMmaTile;
  const int columns = strips / 2 + 1;
  const int tiles = strips * columns;
  auto* staged = reinterpret_cast<Term*>(shared);
  auto* places =
      reinterpret_cast<int64_t*>(reinterpret_cast<char*>(shared) + gram_staged_bytes(padded));
  float* mean = scratch.means + linear * channels;
  float* gram = scratch.windows + linear * scratch.floats_per_window +
                static_cast<int64_t>(split) * tiles * kMmaTileSize;

  find_rows(window, channels, places);
  compute_mean<T, V>(tokens, places, window.tokens(), begin, end, shared, mean);
  StagedRows<T, V> slice{tokens, places, window.tokens(), mean, end};

  for (int base = 0; base < tiles; base += kWarps * kWarpTiles) {
    const int left = min(tiles - base, kWarps * kWarpTiles);
    const int first_tile = base + left * warp / kWarps;
    const int own = base + left * (warp + 1) / kWarps - first_tile;
    Accumulator sums[kWarpTiles] = {};
    slice.prefetch_rows(begin);
    for (int first = begin; first < end; first += kStaged) {
      slice.prefetch_origin(first);
      // All warps have read the channels staged before.
      __syncthreads();
      slice.to_shared(staged, padded, first);
      __syncthreads();
      slice.prefetch_rows(first + kStaged);
#pragma unroll 1
      for (int k = 0; k < kStaged; k += kMmaTile) {
        int strip = first_tile / columns;
        int ahead = first_tile % columns;
        SplitFragment x;
#pragma unroll
        for (int o = 0; o < kWarpTiles; ++o) {
          if (o < own) {
            if (o == 0 || ahead == 0) {
#pragma unroll
              for (int t = 0; t < kTerms; ++t) {
                const int at = (t * padded + strip * kMmaTile) * kStagedStride + k;
                load_fragment(staged + at, kStagedStride, x[t]);
              }
            }
            const int beside = strip + ahead - (strip + ahead < strips ? 0 : strips);
            SplitFragment y;
#pragma unroll
            for (int t = 0; t < kTerms; ++t) {
              const int at = (t * padded + beside * kMmaTile) * kStagedStride + k;
              load_fragment(staged + at, kStagedStride, y[t]);
            }
            mma_bf16x3(x, y, sums[o]);
            if (++ahead == columns) {
              ahead = 0;
              ++strip;
            }
          }
        }
      }
    }
#pragma unroll
    for (int o = 0; o < kWarpTiles; ++o) {
      if (o < own) {
        store_accumulator(sums[o], gram + static_cast<int64_t>(first_tile + o) * kMmaTileSize,
                          kMmaTile);
      }
    }
  }
}

// S = A Z for some channels of a window. Z is taken relative to the window's mean, which is added
// again at the end, because every row of A sums to 1.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    centres_kernel(const T* __restrict__ tokens,  // (B, H, W, C)
                   GramScratch scratch,
                   T* __restrict__ centres,  // (B, h', w', C)
                   Grid grid, int radius, int channels) {
  extern __shared__ __align__(128) float shared[];
  const int parts = ceil_div(channels, kCentreChannels);
  const int64_t linear = blockIdx.x / parts;
  const WindowView window = window_at(grid, linear);
  const int padded = padded_tokens(window);
  const int begin = static_cast<int>(blockIdx.x % parts) * kCentreChannels;
  const int end = min(begin + kCentreChannels, channels);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int padded_cells = static_cast<int>(padded_rows(window.cells()));
  const int stride = padded + 8;
  auto* rows = reinterpret_cast<Term*>(shared);  // (terms, padded_cells, stride)
  Term* staged = rows + kTerms * padded_cells * stride;
  auto* sums = reinterpret_cast<float*>(staged + kTerms * padded * kStagedStride);
  auto* places = reinterpret_cast<int64_t*>(sums + padded_cells * kCentreStride);
  const float* mean = scratch.means + linear * channels;

  find_rows(window, channels, places);
  StagedRows<T, V> slice{tokens, places, window.tokens(), mean, end};
  slice.prefetch_rows(begin);
  slice.prefetch_origin(begin);

  const float* a = scratch.windows + linear * scratch.floats_per_window;
  const int packs = padded / 4;
  for (int base = threadIdx.x; base < padded_cells * packs; base += kPacksOfA * kThreads) {
    float values[kPacksOfA][4] = {};
#pragma unroll
    for (int e = 0; e < kPacksOfA; ++e) {
      const int n = base + e * kThreads;
      if (n / packs < window.cells()) {
        load<4>(a + 4 * n, values[e]);
      }
    }
#pragma unroll
    for (int e = 0; e < kPacksOfA; ++e) {
      const int n = base + e * kThreads;
      if (n / packs < padded_cells) {
        store_terms<4>(rows + n / packs * stride + n % packs * 4, padded_cells * stride, values[e]);
      }
    }
  }

  for (int first = begin; first < end; first += kStaged) {
    slice.to_shared(staged, padded, first);
    __syncthreads();
    slice.prefetch_rows(first + kStaged);
    // A warp computes a tile of 16 centres and 16 channels.
    constexpr int kAcross = kStaged / kMmaTile;
    for (int tile = warp; tile < padded_cells / kMmaTile * kAcross; tile += kWarps) {
      const int strip = tile / kAcross * kMmaTile;
      const int column = tile % kAcross * kMmaTile;
      // Outside of this range these rows of A are zero.
      const int from = cell_tokens(window, strip, radius).begin / kMmaTile * kMmaTile;
      const int to = cell_tokens(window, min(strip + kMmaTile, window.cells()) - 1, radius).end;
      Accumulator sum = {};
      // Unrolled, this would need the registers that hold the prefetched channels.
#pragma unroll 1
      for (int p = from; p < to; p += kMmaTile) {
        SplitFragment x;
        SplitFragment y;
#pragma unroll
        for (int t = 0; t < kTerms; ++t) {
          load_fragment(rows + (t * padded_cells + strip) * stride + p, stride, x[t]);
          load_fragment_transposed(staged + (t * padded + p) * kStagedStride + column,
                                   kStagedStride, y[t]);
        }
        mma_bf16x3(x, y, sum);
      }
      store_accumulator(sum, sums + strip * kCentreStride + column, kCentreStride);
    }
    slice.prefetch_origin(first + kStaged);
    __syncthreads();
    constexpr int kPacks = kStaged / V;
    for (int n = threadIdx.x; n < window.cells() * kPacks; n += kThreads) {
      const int i = n / kPacks;
      const int c = n % kPacks * V;
      if (first + c < end) {
        float values[V];
        load<V>(mean + first + c, values);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          values[v] += sums[i * kCentreStride + c + v];
        }
        store<V>(centres + window.centre(i) * channels + first + c, values);
      }
    }
  }
}

// Tokens and cells of a full window; `tokens` 0 where a window has none, or more than any card can
// take.
struct WindowSizes {
  int64_t tokens;
  int64_t padded;
  int64_t cells;

  explicit WindowSizes(const Grid& grid) {
    tokens = int64_t{grid.rows.max_real()} * grid.columns.max_real();
    cells = int64_t{grid.rows.max_existing()} * grid.columns.max_existing();
    // The products below could overflow.
    tokens = tokens > 1024 || cells > 1 << 15 ? 0 : tokens;
    padded = padded_rows(tokens);
  }

  // Bytes of shared memory.
  size_t gram() const { return gram_staged_bytes(padded) + sizeof(int64_t) * padded; }
  size_t iterate() const { return iterate_shared_memory(padded, cells); }
  size_t centres() const {
    const int64_t rows = padded_rows(cells);
    return rows * (kTerms * (padded + 8) * sizeof(Term) + kCentreStride * sizeof(float)) +
           staged_bytes(padded) + sizeof(int64_t) * padded;
  }
};

}  // namespace

GramPlan gram_plan(const Tokens& tokens, size_t shared_memory, int multiprocessors) {
  const Grid& grid = tokens.grid;
  const WindowSizes sizes(grid);
  const int64_t windows = grid.windows();
  if (sizes.tokens == 0 || tokens.batch == 0 || tokens.channels == 0 || windows > kMaxWindows ||
      std::max({sizes.gram(), sizes.iterate(), sizes.centres()}) > shared_memory) {
    return {};
  }
  const int64_t count = tokens.batch * windows;
  const int64_t bytes =
      token_count(grid, tokens.batch) * tokens.channels * (tokens.type == Type::kFloat ? 4 : 2);
  const int64_t overhead = tokens.channels + 2 + spread_parts(tokens.channels);
  const int64_t max_floats = std::max(bytes, kFreeScratch) / 4 / count - overhead;
  const int64_t gram = gram_tiles(sizes.padded) * kMmaTileSize;
  const int64_t rows = sizes.cells * sizes.padded;
  if (std::max(gram, rows) > max_floats) {
    return {};
  }
  // Two blocks fit on a multiprocessor; the last wave determines the run time.
  const int64_t blocks_at_once = int64_t{2} * multiprocessors;
  const int64_t max_splits =
      std::min(int64_t{tokens.channels / kMinChannelsPerSplit}, max_floats / gram);
  GramPlan plan{};
  int64_t min_cost = std::numeric_limits<int64_t>::max();
  for (int64_t splits = 1; splits <= std::max<int64_t>(max_splits, 1); ++splits) {
    const int64_t slices = ceil_div<int64_t>(tokens.channels, splits * kStaged);
    const int channels_per_split = static_cast<int>(slices) * kStaged;
    const int parts = ceil_div(tokens.channels, channels_per_split);
    const int64_t cost =
        ceil_div(count * parts, blocks_at_once) * (channels_per_split + kSplitOverhead);
    if (cost < min_cost) {
      min_cost = cost;
      plan.splits = parts;
      plan.channels_per_split = channels_per_split;
    }
  }
  plan.floats_per_window = std::max(plan.splits * gram, rows);
  plan.scratch = count * (plan.floats_per_window + tokens.channels + 2) +
                 tokens.batch * spread_parts(tokens.channels);
  return plan;
}

cudaError_t launch_token_reduce(const Tokens& tokens, const GramPlan& plan,
                                const ReduceParams& params, float* scratch) {
  Launcher launch{tokens.stream};
  const Grid& grid = tokens.grid;
  const WindowSizes sizes(grid);
  const int64_t count = tokens.batch * grid.windows();
  GramScratch parts{};
  parts.windows = scratch;
  parts.means = parts.windows + count * plan.floats_per_window;
  parts.nearest_sums = parts.means + count * tokens.channels;
  parts.deviation_sums = parts.nearest_sums + count;
  parts.floats_per_window = plan.floats_per_window;
  parts.splits = plan.splits;
  with_type(tokens.type, [&](auto type) {
    using T = decltype(type);
    constexpr int V = kVectorSize<T>;
    const auto* data = static_cast<const T*>(tokens.data);
    auto* centres = static_cast<T*>(params.centres);
    const bool vectorised = can_vectorise<T>(tokens.channels, data, centres);
    launch.blocks(vectorised ? gram_kernel<T, V> : gram_kernel<T, 1>, count * plan.splits, kThreads,
                  sizes.gram(), data, parts, grid, tokens.channels, plan.channels_per_split);
    if (params.automatic) {
      launch_window_spread(launch, tokens, params.radius, parts, sizes.iterate());
    }
    launch_window_iterate(launch, tokens, params, parts, sizes.iterate());
    launch.blocks(vectorised ? centres_kernel<T, V> : centres_kernel<T, 1>,
                  count * ceil_div(tokens.channels, kCentreChannels), kThreads, sizes.centres(),
                  data, parts, centres, grid, params.radius, tokens.channels);
  });
  return launch.error;
}

}  // namespace expedite_d2::cuda
