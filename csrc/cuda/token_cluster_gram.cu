// token_cluster for small windows: one block a window, one launch for all of them.
//
// Centres are always convex combinations of tokens, S = A Z with A (K, N). So every distance
// follows from the Gram matrix of the window's tokens, G = Z Z^T (N, N):
//     ||z_p - s_i||^2 = G_pp - 2 (A G)_ip + (A G A^T)_ii.
// The channels are read once for G and once for S = A Z; the iterations run on N x N numbers in
// shared memory. The window's mean token is subtracted in G, or the difference of large numbers
// would eat the distances of tokens with a common offset.
//
// For windows of 144 tokens and 64 cells that is 153 KiB, so cards with less take the other path.
#include <algorithm>
#include <cmath>

#include "cuda/utils.cuh"
#include "cuda/windows.cuh"

namespace expedite_d2::cuda {
namespace {

// Channels of the window that are in shared memory at a time: one a lane.
constexpr int kGramChannels = kWarp;
// Rows of the staged tokens are one float longer, so that a column of them lies in all banks.
constexpr int kGramStride = kGramChannels + 1;
// A thread computes squares of kGramTile x kGramTile entries of G from 2 kGramTile loads a channel.
constexpr int kGramTile = 4;
// Centres that a warp writes together, so that a token read once serves all of them.
constexpr int kGramCentres = 8;

// Odd, so that both rows and columns of a matrix lie in all banks.
EXPEDITE_HOST_DEVICE int64_t gram_stride(int64_t tokens) {
  return tokens | 1;
}

// The real tokens and existing cells of one window.
struct GramWindow {
  Grid grid;
  int64_t image;
  int32_t row;     // of windows
  int32_t column;  // of windows
  int32_t height;  // real tokens
  int32_t width;
  int32_t cell_rows;  // existing cells
  int32_t cell_columns;

  __device__ GramWindow(const Grid& of, int64_t linear) : grid(of) {
    const Position at = position(linear, of.rows.windows(), of.columns.windows());
    image = at.image;
    row = at.row;
    column = at.column;
    height = of.rows.real(row);
    width = of.columns.real(column);
    cell_rows = of.rows.existing(row);
    cell_columns = of.columns.existing(column);
  }

  // Token (y, x) of the window in (B, H, W).
  __device__ int64_t token(int32_t y, int32_t x) const {
    return (image * grid.rows.size + row * grid.rows.window + y) * grid.columns.size +
           column * grid.columns.window + x;
  }

  // Cell i of the window in (B, h', w').
  __device__ int64_t cell(int32_t i) const {
    return (image * grid.rows.cells() + row * grid.rows.clusters + i / cell_columns) *
               grid.columns.cells() +
           column * grid.columns.clusters + i % cell_columns;
  }

  // Rows of tokens that can be in cell i: pooled into it at first, later within its reach.
  __device__ int32_t top(int32_t i, int radius) const {
    const int32_t cell_row = i / cell_columns;
    return min(grid.rows.begin(cell_row), grid.rows.reach_begin(cell_row, radius));
  }
  __device__ int32_t bottom(int32_t i, int radius) const {
    const int32_t cell_row = i / cell_columns;
    return max(grid.rows.end(cell_row, row), grid.rows.reach_end(cell_row, radius, row));
  }

  // Whether the window's token p has cell i as a candidate.
  __device__ bool candidate(int32_t p, int32_t i, int radius) const {
    const int32_t y = p / width;
    const int32_t x = p % width;
    const int32_t cell_row = i / cell_columns;
    const int32_t cell_column = i % cell_columns;
    return abs(grid.rows.home(y) - cell_row) <= radius &&
           abs(grid.columns.home(x) - cell_column) <= radius;
  }
};

// G of a window's tokens about their mean, by all threads of a block. `staged` is scratch.
//
// G is divided into squares of kGramTile rows by kGramTile columns that are `across` apart, square
// (i, j) of rows i, i + across, ... Squares j = i ... i + across / 2 (around the end) are computed,
// each always by the same thread; these are half of G, the rest is its mirror image.
template <typename T>
__device__ void compute_gram(const T* tokens, const GramWindow& window, int channels, float* gram,
                             float* staged) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int count = window.height * window.width;
  const int stride = static_cast<int>(gram_stride(count));
  const int across = ceil_div(count, kGramTile);
  const int squares = across * (across / 2 + 1);
  float* sums = staged + count * kGramStride;  // (kWarps, kWarp)

  for (int n = threadIdx.x; n < count * stride; n += kThreads) {
    gram[n] = 0.f;
  }
  for (int first = 0; first < channels; first += kGramChannels) {
    // The squares of the previous channels have been added up.
    __syncthreads();
    const bool exists = first + lane < channels;
    float sum = 0.f;
    for (int p = warp; p < count; p += kWarps) {
      float z = 0.f;
      if (exists) {
        const int64_t token = window.token(p / window.width, p % window.width);
        z = static_cast<float>(tokens[token * channels + first + lane]);
      }
      staged[p * kGramStride + lane] = z;
      sum += z;
    }
    sums[warp * kWarp + lane] = sum;
    __syncthreads();
    float mean = 0.f;
    for (int w = 0; w < kWarps; ++w) {
      mean += sums[w * kWarp + lane];
    }
    mean /= static_cast<float>(count);
    // A mean that is not finite would spoil the distances of all tokens, not only of the bad one.
    mean = isfinite(mean) ? mean : 0.f;
    for (int p = warp; p < count; p += kWarps) {
      staged[p * kGramStride + lane] -= exists ? mean : 0.f;
    }
    __syncthreads();
    for (int square = threadIdx.x; square < squares; square += kThreads) {
      const int i = square % across;
      const int j = (i + square / across) % across;
      // Rows beyond the last token repeat it; what they give is not written.
      const float* rows[kGramTile];
      const float* columns[kGramTile];
#pragma unroll
      for (int v = 0; v < kGramTile; ++v) {
        rows[v] = staged + min(i + v * across, count - 1) * kGramStride;
        columns[v] = staged + min(j + v * across, count - 1) * kGramStride;
      }
      float products[kGramTile][kGramTile] = {};
#pragma unroll 4
      for (int c = 0; c < kGramChannels; ++c) {
        float x[kGramTile], y[kGramTile];
#pragma unroll
        for (int v = 0; v < kGramTile; ++v) {
          x[v] = rows[v][c];
          y[v] = columns[v][c];
        }
#pragma unroll
        for (int a = 0; a < kGramTile; ++a) {
#pragma unroll
          for (int b = 0; b < kGramTile; ++b) {
            products[a][b] = fmaf(x[a], y[b], products[a][b]);
          }
        }
      }
#pragma unroll
      for (int a = 0; a < kGramTile; ++a) {
#pragma unroll
        for (int b = 0; b < kGramTile; ++b) {
          const int p = i + a * across;
          const int r = j + b * across;
          if (p < count && r < count) {
            gram[p * stride + r] += products[a][b];
          }
        }
      }
    }
  }
  __syncthreads();
  for (int n = threadIdx.x; n < count * count; n += kThreads) {
    const int p = n / count;
    const int r = n % count;
    const int ahead = (r % across - p % across + across) % across;
    if (ahead > across / 2) {
      gram[p * stride + r] = gram[r * stride + p];
    }
  }
}

// Rows of A for the initial centres: the average of each cell's real tokens.
__device__ __forceinline__ void pool_rows(const GramWindow& window, float* rows) {
  const int count = window.height * window.width;
  const int stride = static_cast<int>(gram_stride(count));
  const int cells = window.cell_rows * window.cell_columns;
  for (int n = threadIdx.x; n < cells * count; n += kThreads) {
    const int i = n / count;
    const int p = n % count;
    const int y = p / window.width;
    const int x = p % window.width;
    const int top = window.grid.rows.begin(i / window.cell_columns);
    const int bottom = window.grid.rows.end(i / window.cell_columns, window.row);
    const int left = window.grid.columns.begin(i % window.cell_columns);
    const int right = window.grid.columns.end(i % window.cell_columns, window.column);
    const bool member = top <= y && y < bottom && left <= x && x < right;
    rows[i * stride + p] = member ? 1.f / static_cast<float>((bottom - top) * (right - left)) : 0.f;
  }
}

// One iteration: from the rows of A for the centres to those for the next ones.
__device__ __forceinline__ void iterate(const GramWindow& window, int radius, float tau,
                                        const float* gram,  // (N, stride): G
                                        float* rows,        // (K, stride): A
                                        float* next,        // (K, stride): A G, then distances, q
                                        float* norms) {     // (K,): diagonal of A G A^T
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int count = window.height * window.width;
  const int stride = static_cast<int>(gram_stride(count));
  const int cells = window.cell_rows * window.cell_columns;
  const WindowAxis& down = window.grid.rows;
  const WindowAxis& across = window.grid.columns;

  // A row of A is zero outside of [begin, end), and so are its uses of A G.
  for (int i = warp; i < cells; i += kWarps) {
    const int begin = window.top(i, radius) * window.width;
    const int end = window.bottom(i, radius) * window.width;
    float norm = 0.f;
    for (int p = begin + lane; p < end; p += kWarp) {
      float product = 0.f;
      for (int r = begin; r < end; ++r) {
        product = fmaf(rows[i * stride + r], gram[r * stride + p], product);
      }
      next[i * stride + p] = product;
      norm = fmaf(rows[i * stride + p], product, norm);
    }
    norm = warp_sum(norm);
    if (lane == 0) {
      norms[i] = norm;
    }
  }
  __syncthreads();

  // Softmax over the candidates of a token, by one thread.
  for (int p = threadIdx.x; p < count; p += kThreads) {
    const int y = p / window.width;
    const int x = p % window.width;
    const int top = down.first(y, radius);
    const int bottom = down.last(y, radius, window.row);
    const int left = across.first(x, radius);
    const int right = across.last(x, radius, window.column);
    const float square = gram[p * stride + p];
    // NaN is left to the sum: fminf skips it, but exp(NaN) makes all of this token's numbers NaN.
    float least = INFINITY;
    for (int i = top; i <= bottom; ++i) {
      for (int j = left; j <= right; ++j) {
        const int cell = i * window.cell_columns + j;
        float& slot = next[cell * stride + p];
        const float d = square - 2.f * slot + norms[cell];
        slot = d < 0.f ? 0.f : d;
        least = fminf(least, slot);
      }
    }
    float sum = 0.f;
    for (int i = top; i <= bottom; ++i) {
      for (int j = left; j <= right; ++j) {
        float& slot = next[(i * window.cell_columns + j) * stride + p];
        slot = falloff(tau, slot - least);
        sum += slot;
      }
    }
    for (int i = top; i <= bottom; ++i) {
      for (int j = left; j <= right; ++j) {
        next[(i * window.cell_columns + j) * stride + p] /= sum;
      }
    }
  }
  __syncthreads();

  for (int i = warp; i < cells; i += kWarps) {
    const int begin = window.top(i, radius) * window.width;
    const int end = window.bottom(i, radius) * window.width;
    float mass = 0.f;
    for (int p = begin + lane; p < end; p += kWarp) {
      mass += window.candidate(p, i, radius) ? next[i * stride + p] : 0.f;
    }
    mass = warp_sum(mass);
    // A centre that nobody wants keeps its value. NaN is not zero, so it goes on to the output.
    if (mass != 0.f) {
      for (int p = begin + lane; p < end; p += kWarp) {
        rows[i * stride + p] = window.candidate(p, i, radius) ? next[i * stride + p] / mass : 0.f;
      }
    }
  }
  __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    gram_kernel(const T* __restrict__ tokens,  // (B, H, W, C)
                T* __restrict__ centres,       // (B, h', w', C)
                Temperature temperature, Grid grid, int radius, int64_t iterations, int channels) {
  extern __shared__ float shared[];
  const GramWindow window(grid, blockIdx.x);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int count = window.height * window.width;
  const int stride = static_cast<int>(gram_stride(count));
  const int cells = window.cell_rows * window.cell_columns;
  float* gram = shared;
  float* rows = gram + count * stride;
  float* next = rows + cells * stride;
  float* norms = next + cells * stride;

  compute_gram(tokens, window, channels, gram, rows);
  // The staged tokens have been read by all before the last synchronisation, so A can replace them.
  pool_rows(window, rows);
  __syncthreads();
  const float tau = image_temperature(temperature, window.image);
  for (int64_t step = 0; step < iterations; ++step) {
    iterate(window, radius, tau, gram, rows, next, norms);
  }

  // S = A Z. A warp for a few neighbouring centres and 32 channels.
  const int groups = ceil_div(cells, kGramCentres);
  const int parts = ceil_div(channels, kWarp);
  for (int64_t item = warp; item < int64_t{groups} * parts; item += kWarps) {
    const int i = static_cast<int>(item % groups) * kGramCentres;
    const int c = static_cast<int>(item / groups) * kWarp + lane;
    if (c >= channels) {
      continue;
    }
    const int last = min(i + kGramCentres, cells) - 1;
    const int bottom = window.bottom(last, radius);
    float sum[kGramCentres] = {};
    for (int y = window.top(i, radius); y < bottom; ++y) {
      for (int x = 0; x < window.width; ++x) {
        const float z = static_cast<float>(tokens[window.token(y, x) * channels + c]);
        const int p = y * window.width + x;
#pragma unroll
        for (int v = 0; v < kGramCentres; ++v) {
          sum[v] = fmaf(rows[min(i + v, last) * stride + p], z, sum[v]);
        }
      }
    }
#pragma unroll
    for (int v = 0; v < kGramCentres; ++v) {
      if (i + v <= last) {
        centres[window.cell(i + v) * channels + c] = static_cast<T>(sum[v]);
      }
    }
  }
}

}  // namespace

// Bytes for G, A and A G of a full window, and the norms of its centres. The staged tokens lie
// where A and A G are later, with the sums of their channels.
size_t gram_shared_memory(const Grid& grid) {
  const auto side = [](const WindowAxis& axis) { return std::min(axis.size, axis.window); };
  const auto cells = [](const WindowAxis& axis) { return std::min(axis.cells(), axis.clusters); };
  const int64_t tokens = int64_t{side(grid.rows)} * side(grid.columns);
  const int64_t centres = int64_t{cells(grid.rows)} * cells(grid.columns);
  // Beyond this no card has room for G, and the products below could overflow.
  if (tokens > 1024 || centres > 1 << 20) {
    return std::numeric_limits<size_t>::max();
  }
  const int64_t staged = tokens * kGramStride + kWarps * kWarp;
  const int64_t matrices = 2 * centres * gram_stride(tokens) + centres;
  return sizeof(float) * (tokens * gram_stride(tokens) + std::max(staged, matrices));
}

cudaError_t launch_token_cluster_gram(const Tokens& tokens, int64_t iterations, int radius,
                                      Temperature temperature, void* centres) {
  Launcher launch{tokens.stream};
  const Grid& grid = tokens.grid;
  with_type(tokens.type, [&](auto type) {
    using T = decltype(type);
    launch.blocks(gram_kernel<T>, tokens.batch * grid.rows.windows() * grid.columns.windows(),
                  kThreads, gram_shared_memory(grid), static_cast<const T*>(tokens.data),
                  static_cast<T*>(centres), temperature, grid, radius, iterations, tokens.channels);
  });
  return launch.error;
}

}  // namespace expedite_d2::cuda
