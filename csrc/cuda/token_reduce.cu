// token_cluster and token_reduce for small windows, in three or four launches.
//
// Centres are always convex combinations of tokens, S = A Z with A (K, N). So every distance
// follows from the Gram matrix of the window's tokens, G = Z Z^T (N, N):
//     ||z_p - s_i||^2 = G_pp - 2 (A G)_ip + (A G A^T)_ii.
// The channels are read for G and for S = A Z, both here on tensor cores, by several blocks a
// window. In between, spread, iterations and match run on N x N numbers (token_reduce_iterate.cu).
// The window's mean token is subtracted in G, or the difference of large numbers would eat the
// distances of tokens with a common offset.
//
// For windows of 144 tokens and 64 cells a block has 156 KiB, so cards with less take other paths.
#include <algorithm>
#include <cmath>

#include "cuda/token_reduce.cuh"

namespace expedite_d2::cuda {
namespace {

// Squares of G that a warp keeps in registers.
constexpr int kOwnSquares = 6;
// Rows that a warp reads together for the mean: half of its share of 144.
constexpr int kMeanRows = 9;
// Packs of A that a thread of centres_kernel reads together.
constexpr int kPacksOfA = 3;
// The fewest channels of a block of gram_kernel, and those of a block of centres_kernel.
constexpr int kLeastShare = 128;
constexpr int kCentreChannels = 128;
// What a block of gram_kernel does besides its channels, and those who add up its part of G after
// it, takes about as long as so many channels more.
constexpr int64_t kShareCost = 64;
// Staged centres: 32 channels, and eight more so that four rows lie in all banks.
constexpr int kCentreStride = kStaged + 8;
// Every window adds up the sums of all windows of its image.
constexpr int64_t kMostWindows = 4096;
// Bytes of scratch that few tokens may have; many have no more than they take themselves.
constexpr int64_t kFreeScratch = int64_t{4} << 20;

// Bytes for the staged rows and, before them, the sums of the mean; all threads have one.
EXPEDITE_HOST_DEVICE int64_t gram_staged_bytes(int64_t padded) {
  const int64_t staged = staged_bytes(padded);
  const int64_t sums = kThreads * kWide<c10::Half> * static_cast<int64_t>(sizeof(float));
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
      // A mean that is not finite would spoil the distances of all tokens, not only of the bad one.
      mean[first + n] = isfinite(total) ? total : 0.f;
    }
    __syncthreads();
  }
}

// Mean and G of a window for some of its channels.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    gram_kernel(const T* __restrict__ tokens,  // (B, H, W, C)
                GramScratch scratch, Grid grid, int channels, int share) {
  static_assert(kWarp * V <= kThreads);
  extern __shared__ __align__(128) float shared[];
  const int64_t linear = blockIdx.x / scratch.splits;
  const int split = static_cast<int>(blockIdx.x % scratch.splits);
  const WindowView window = window_at(grid, linear);
  const int padded = padded_tokens(window);
  const int begin = split * share;
  const int end = min(begin + share, channels);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int tiles = padded / kSquare;
  const int columns = tiles / 2 + 1;
  const int squares = tiles * columns;
  auto* staged = reinterpret_cast<Term*>(shared);
  auto* places =
      reinterpret_cast<int64_t*>(reinterpret_cast<char*>(shared) + gram_staged_bytes(padded));
  float* mean = scratch.means + linear * channels;
  float* gram =
      scratch.windows + linear * scratch.room + static_cast<int64_t>(split) * squares * kSquareSize;

  find_rows(window, channels, places);
  compute_mean<T, V>(tokens, places, window.tokens(), begin, end, shared, mean);
  RowSlice<T, V> slice{tokens, places, window.tokens(), mean, end};

  for (int base = 0; base < squares; base += kWarps * kOwnSquares) {
    const int left = min(squares - base, kWarps * kOwnSquares);
    const int first_square = base + left * warp / kWarps;
    const int own = base + left * (warp + 1) / kWarps - first_square;
    SquareSums sums[kOwnSquares] = {};
    slice.fetch_rows(begin);
    for (int first = begin; first < end; first += kStaged) {
      slice.fetch_origin(first);
      // The channels staged before have been read.
      __syncthreads();
      slice.put(staged, padded, first);
      __syncthreads();
      slice.fetch_rows(first + kStaged);
#pragma unroll 1
      for (int k = 0; k < kStaged; k += kSquare) {
        int strip = first_square / columns;
        int ahead = first_square % columns;
        SquareTerms x;
#pragma unroll
        for (int o = 0; o < kOwnSquares; ++o) {
          if (o < own) {
            if (o == 0 || ahead == 0) {
#pragma unroll
              for (int t = 0; t < kTerms; ++t) {
                const int at = (t * padded + strip * kSquare) * kStagedStride + k;
                load_square(staged + at, kStagedStride, x[t]);
              }
            }
            const int beside = strip + ahead - (strip + ahead < tiles ? 0 : tiles);
            SquareTerms y;
#pragma unroll
            for (int t = 0; t < kTerms; ++t) {
              const int at = (t * padded + beside * kSquare) * kStagedStride + k;
              load_square(staged + at, kStagedStride, y[t]);
            }
            add_products(x, y, sums[o]);
            if (++ahead == columns) {
              ahead = 0;
              ++strip;
            }
          }
        }
      }
    }
#pragma unroll
    for (int o = 0; o < kOwnSquares; ++o) {
      if (o < own) {
        store_square(sums[o], gram + static_cast<int64_t>(first_square + o) * kSquareSize, kSquare);
      }
    }
  }
}

// S = A Z for some channels of a window. Z is taken about the window's mean, which is added again:
// a row of A sums to 1.
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
  RowSlice<T, V> slice{tokens, places, window.tokens(), mean, end};
  slice.fetch_rows(begin);
  slice.fetch_origin(begin);

  const float* a = scratch.windows + linear * scratch.room;
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
    slice.put(staged, padded, first);
    __syncthreads();
    slice.fetch_rows(first + kStaged);
    // A square of 16 centres and 16 channels is computed by one warp.
    constexpr int kAcross = kStaged / kSquare;
    for (int square = warp; square < padded_cells / kSquare * kAcross; square += kWarps) {
      const int strip = square / kAcross * kSquare;
      const int column = square % kAcross * kSquare;
      // Elsewhere these rows of A are zero.
      const int from = cell_tokens(window, strip, radius).begin / kSquare * kSquare;
      const int to = cell_tokens(window, min(strip + kSquare, window.cells()) - 1, radius).end;
      SquareSums sum = {};
      // More of these would need registers that hold the next slice.
#pragma unroll 1
      for (int p = from; p < to; p += kSquare) {
        SquareTerms x;
        SquareTerms y;
#pragma unroll
        for (int t = 0; t < kTerms; ++t) {
          load_square(rows + (t * padded_cells + strip) * stride + p, stride, x[t]);
          load_square_transposed(staged + (t * padded + p) * kStagedStride + column, kStagedStride,
                                 y[t]);
        }
        add_products(x, y, sum);
      }
      store_square(sum, sums + strip * kCentreStride + column, kCentreStride);
    }
    slice.fetch_origin(first + kStaged);
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

// Tokens and cells of a full window; `tokens` 0 where a window has more than any card can take.
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
  if (sizes.tokens == 0 || windows > kMostWindows ||
      std::max({sizes.gram(), sizes.iterate(), sizes.centres()}) > shared_memory) {
    return {};
  }
  const int64_t count = tokens.batch * windows;
  const int64_t bytes =
      token_count(grid, tokens.batch) * tokens.channels * (tokens.type == Type::kFloat ? 4 : 2);
  const int64_t besides = tokens.channels + 2 + spread_parts(tokens.channels);
  const int64_t most = std::max(bytes, kFreeScratch) / 4 / count - besides;
  const int64_t gram = gram_squares(sizes.padded) * kSquareSize;
  const int64_t rows = sizes.cells * sizes.padded;
  if (std::max(gram, rows) > most) {
    return {};
  }
  // There is room for two blocks a multiprocessor. The last of them to begin decide.
  const int64_t slots = int64_t{2} * multiprocessors;
  const int64_t most_splits = std::min(int64_t{tokens.channels / kLeastShare}, most / gram);
  GramPlan plan{};
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t splits = 1; splits <= std::max<int64_t>(most_splits, 1); ++splits) {
    const int64_t slices = ceil_div<int64_t>(tokens.channels, splits * kStaged);
    const int share = static_cast<int>(slices) * kStaged;
    const int parts = ceil_div(tokens.channels, share);
    const int64_t cost = ceil_div(count * parts, slots) * (share + kShareCost);
    if (cost < least) {
      least = cost;
      plan.splits = parts;
      plan.share = share;
    }
  }
  plan.room = std::max(plan.splits * gram, rows);
  plan.scratch =
      count * (plan.room + tokens.channels + 2) + tokens.batch * spread_parts(tokens.channels);
  return plan;
}

cudaError_t launch_token_reduce(const Tokens& tokens, const GramPlan& plan,
                                const GramReduction& reduction, float* scratch) {
  Launcher launch{tokens.stream};
  const Grid& grid = tokens.grid;
  const WindowSizes sizes(grid);
  const int64_t count = tokens.batch * grid.windows();
  GramScratch parts{};
  parts.windows = scratch;
  parts.means = parts.windows + count * plan.room;
  parts.near = parts.means + count * tokens.channels;
  parts.away = parts.near + count;
  parts.room = plan.room;
  parts.splits = plan.splits;
  with_type(tokens.type, [&](auto type) {
    using T = decltype(type);
    constexpr int V = kWide<T>;
    const auto* data = static_cast<const T*>(tokens.data);
    auto* centres = static_cast<T*>(reduction.centres);
    const bool wide = can_read_wide<T>(tokens.channels, data, centres);
    launch.blocks(wide ? gram_kernel<T, V> : gram_kernel<T, 1>, count * plan.splits, kThreads,
                  sizes.gram(), data, parts, grid, tokens.channels, plan.share);
    if (reduction.automatic) {
      launch_window_spread(launch, tokens, reduction.radius, parts, sizes.iterate());
    }
    launch_window_iterate(launch, tokens, reduction, parts, sizes.iterate());
    launch.blocks(wide ? centres_kernel<T, V> : centres_kernel<T, 1>,
                  count * ceil_div(tokens.channels, kCentreChannels), kThreads, sizes.centres(),
                  data, parts, centres, grid, reduction.radius, tokens.channels);
  });
  return launch.error;
}

}  // namespace expedite_d2::cuda
