// The iterations of token_cluster on the Gram matrices of windows, with token_spread before and
// token_match after them: a block a window, on numbers in shared memory. See windows_gram.cu.
#include <cfloat>
#include <cmath>

#include "cuda/windows_numbers.cuh"

namespace expedite_d2::cuda {
namespace {

// Threads that sum up what one centre gets.
constexpr int kCentreLanes = 4;

// Sums over the tokens of each window: of their squared distances to the nearest initial candidate,
// and to the window's mean; and, over the windows, those of the means to the image's mean, each
// weighted by its tokens. A block a window, then one for 32 channels of an image.
__global__ void __launch_bounds__(kThreads, 1)
    spread_kernel(GramScratch scratch, Grid grid, int radius, int channels, int64_t blocks) {
  extern __shared__ __align__(128) float shared[];
  const int64_t windows = int64_t{grid.rows.windows()} * grid.columns.windows();
  const int parts = spread_parts(channels);
  if (blockIdx.x < blocks) {
    const int64_t linear = blockIdx.x;
    const GramWindow window(grid, linear);
    const GramNumbers numbers(shared, window);
    load_numbers(numbers, window, radius, scratch.windows + linear * scratch.room, scratch.splits);
    multiply(numbers, window, false);
    float nearest = 0.f;
    float deviation = 0.f;
    for (int p = threadIdx.x; p < window.count; p += kThreads) {
      const Candidates at(numbers, window, radius, p);
      float least = INFINITY;
      for (int i = at.top; i <= at.bottom; ++i) {
        for (int j = at.left; j <= at.right; ++j) {
          const float d = numbers.distance(i * window.cell_columns + j, p);
          // The smaller number, or NaN if either is.
          least = d < least || d != d ? d : least;
        }
      }
      nearest += least;
      deviation += numbers.gram[p * numbers.stride + p];
    }
    nearest = block_sum(nearest, numbers.sums);
    deviation = block_sum(deviation, numbers.sums);
    if (threadIdx.x == 0) {
      scratch.near[linear] = nearest;
      scratch.away[linear + window.image * parts] = deviation;
    }
    return;
  }

  const int64_t image = (blockIdx.x - blocks) / parts;
  const int part = static_cast<int>((blockIdx.x - blocks) % parts);
  const int c = part * kWarp + static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const auto tokens_of = [&](int64_t w) {
    return static_cast<float>(grid.rows.real(static_cast<int32_t>(w / grid.columns.windows())) *
                              grid.columns.real(static_cast<int32_t>(w % grid.columns.windows())));
  };
  // Of this channel; its origin is the first window's mean.
  const float* column = scratch.means + image * windows * channels + c;
  const float origin = c < channels ? column[0] : 0.f;
  float mean = 0.f;
  for (int64_t w = warp; w < windows && c < channels; w += kWarps) {
    mean = fmaf(tokens_of(w), column[w * channels] - origin, mean);
  }
  shared[threadIdx.x] = mean;
  __syncthreads();
  mean = 0.f;
  for (int w = 0; w < kWarps; ++w) {
    mean += shared[w * kWarp + threadIdx.x % kWarp];
  }
  mean /= static_cast<float>(grid.rows.size) * static_cast<float>(grid.columns.size);
  float between = 0.f;
  for (int64_t w = warp; w < windows && c < channels; w += kWarps) {
    const float difference = column[w * channels] - origin - mean;
    between = fmaf(tokens_of(w) * difference, difference, between);
  }
  between = block_sum(between, shared + kThreads);
  if (threadIdx.x == 0) {
    scratch.away[image * (windows + parts) + windows + part] = between;
  }
}

// token_spread of an image from the sums of spread_kernel.
__device__ __forceinline__ float image_spread(const GramScratch& scratch, const Grid& grid,
                                              int channels, int64_t image, float* sums) {
  const int64_t windows = int64_t{grid.rows.windows()} * grid.columns.windows();
  const int64_t terms = windows + spread_parts(channels);
  const float count = static_cast<float>(grid.rows.size) * static_cast<float>(grid.columns.size);
  float sum = 0.f;
  float deviation = 0.f;
  for (int64_t w = threadIdx.x; w < windows; w += kThreads) {
    sum += scratch.near[image * windows + w];
  }
  for (int64_t w = threadIdx.x; w < terms; w += kThreads) {
    deviation += scratch.away[image * terms + w];
  }
  sum = block_sum(sum, sums) / count;
  const float floor = fmaf(kSpreadFloor, block_sum(deviation, sums) / count, FLT_MIN);
  // NaN fails the comparison and is passed on.
  return sum < floor ? floor : sum;
}

// Falloff of the tokens to their candidates, and what normalises it: a thread a token.
__device__ __forceinline__ void assign(const GramNumbers& numbers, const GramWindow& window,
                                       int radius, float tau) {
  for (int p = threadIdx.x; p < window.count; p += kThreads) {
    const Candidates at(numbers, window, radius, p);
    // NaN is left to the sum: fminf skips it, but exp(NaN) makes all of this token's numbers NaN.
    float least = INFINITY;
    for (int i = at.top; i <= at.bottom; ++i) {
      for (int j = at.left; j <= at.right; ++j) {
        least = fminf(least, numbers.distance(i * window.cell_columns + j, p));
      }
    }
    float sum = 0.f;
    for (int i = at.top; i <= at.bottom; ++i) {
      for (int j = at.left; j <= at.right; ++j) {
        const int cell = i * window.cell_columns + j;
        const float weight = falloff(tau, numbers.distance(cell, p) - least);
        numbers.next[cell * numbers.stride + p] = weight;
        sum += weight;
      }
    }
    numbers.shares[p] = 1.f / sum;
  }
  __syncthreads();
}

// New rows of A: what each centre got, divided by the sum of it.
__device__ __forceinline__ void update(const GramNumbers& numbers, const GramWindow& window,
                                       int radius) {
  for (int first = 0; first < window.cells; first += kThreads / kCentreLanes) {
    const int i = first + static_cast<int>(threadIdx.x) / kCentreLanes;
    const bool exists = i < window.cells;
    const Span span = exists ? numbers.spans[i] : Span{0, 0};
    const int begin = span.begin + static_cast<int>(threadIdx.x) % kCentreLanes;
    const int cell_row = i / window.cell_columns;
    const int cell_column = i % window.cell_columns;
    float* row = numbers.rows + i * numbers.stride;
    const float* weights = numbers.next + i * numbers.stride;
    const auto got = [&](int p) {
      const HomeCell home = numbers.homes[p];
      const bool candidate =
          abs(home.row - cell_row) <= radius && abs(home.column - cell_column) <= radius;
      return candidate ? weights[p] * numbers.shares[p] : 0.f;
    };
    float mass = 0.f;
#pragma unroll 4
    for (int p = begin; p < span.end; p += kCentreLanes) {
      mass += got(p);
    }
#pragma unroll
    for (int offset = kCentreLanes / 2; offset > 0; offset /= 2) {
      mass += __shfl_xor_sync(kAllLanes, mass, offset);
    }
    // A centre that nobody wants keeps its value. NaN is not zero, so it goes on to the output.
    if (mass != 0.f) {
#pragma unroll 4
      for (int p = begin; p < span.end; p += kCentreLanes) {
        row[p] = got(p) / mass;
      }
    }
  }
  __syncthreads();
}

// token_match from A G for all tokens: a thread a token. The rows of A are no longer needed.
__device__ __forceinline__ void match(const GramNumbers& numbers, const GramWindow& window,
                                      int topk, float tau,
                                      int32_t* indices,  // (B, H, W, topk)
                                      float* weights) {  // (B, H, W, topk)
  const int found = min(topk, window.cells);
  for (int p = threadIdx.x; p < window.count; p += kThreads) {
    const int64_t first = window.token(p) * topk;
    float* keys = numbers.rows + p;
    for (int i = 0; i < window.cells; ++i) {
      const float d = numbers.distance(i, p);
      // NaN and infinity come last, in the order of their indices.
      keys[i * numbers.stride] = d < FLT_MAX ? d : FLT_MAX;
    }
    float least = 0.f;
    float sum = 0.f;
    for (int rank = 0; rank < found; ++rank) {
      float best = INFINITY;
      int nearest = 0;
#pragma unroll 8
      for (int i = 0; i < window.cells; ++i) {
        const float key = keys[i * numbers.stride];
        // Of equal ones the lower index.
        nearest = key < best ? i : nearest;
        best = key < best ? key : best;
      }
      keys[nearest * numbers.stride] = INFINITY;
      const float d = numbers.distance(nearest, p);
      least = rank == 0 ? d : least;
      // The first pick is the nearest, so no exponent is positive; NaN stays NaN.
      const float weight = falloff(tau, d - least);
      sum += weight;
      indices[first + rank] = window.cell(nearest);
      weights[first + rank] = weight;
    }
    for (int rank = 0; rank < topk; ++rank) {
      // Times the sum's inverse, so that what repeats the nearest is NaN where the others are.
      if (rank < found) {
        weights[first + rank] /= sum;
      } else {
        indices[first + rank] = indices[first];
        weights[first + rank] = 0.f / sum;
      }
    }
  }
}

// All iterations of a window, the match, and A.
__global__ void __launch_bounds__(kThreads, 1)
    iterate_kernel(GramScratch scratch, GramReduction reduction, Grid grid, int channels) {
  extern __shared__ __align__(128) float shared[];
  const int64_t linear = blockIdx.x;
  const GramWindow window(grid, linear);
  const GramNumbers numbers(shared, window);
  float* own = scratch.windows + linear * scratch.room;
  float tau = 0.f;
  if (reduction.automatic) {
    const float spread = image_spread(scratch, grid, channels, window.image, numbers.sums);
    tau = effective_temperature(reduction.temperature.value, spread);
    if (threadIdx.x == 0 && window.row == 0 && window.column == 0) {
      reduction.spread[window.image] = spread;
    }
  } else {
    tau = image_temperature(reduction.temperature, window.image);
  }
  load_numbers(numbers, window, reduction.radius, own, scratch.splits);
  for (int64_t step = 0; step < reduction.iterations; ++step) {
    multiply(numbers, window, false);
    assign(numbers, window, reduction.radius, tau);
    update(numbers, window, reduction.radius);
  }
  // All parts of G have been read.
  const int packs = window.padded / 4;
  for (int n = threadIdx.x; n < window.cells * packs; n += kThreads) {
    float a[4];
    load<4>(numbers.rows + n / packs * numbers.stride + n % packs * 4, a);
    store<4>(own + 4 * n, a);
  }
  if (reduction.indices != nullptr) {
    multiply(numbers, window, true);
    match(numbers, window, reduction.topk, tau, reduction.indices, reduction.weights);
  }
}

int64_t window_count(const Tokens& tokens) {
  return tokens.batch * tokens.grid.rows.windows() * tokens.grid.columns.windows();
}

}  // namespace

size_t iterate_shared_memory(int64_t padded, int64_t cells) {
  return sizeof(float) * GramNumbers::floats(padded, cells);
}

void launch_window_spread(Launcher& launch, const Tokens& tokens, int radius,
                          const GramScratch& scratch, size_t shared_memory) {
  const int64_t windows = window_count(tokens);
  launch.blocks(spread_kernel, windows + tokens.batch * spread_parts(tokens.channels), kThreads,
                shared_memory, scratch, tokens.grid, radius, tokens.channels, windows);
}

void launch_window_iterate(Launcher& launch, const Tokens& tokens, const GramReduction& reduction,
                           const GramScratch& scratch, size_t shared_memory) {
  launch.blocks(iterate_kernel, window_count(tokens), kThreads, shared_memory, scratch, reduction,
                tokens.grid, tokens.channels);
}

}  // namespace expedite_d2::cuda
