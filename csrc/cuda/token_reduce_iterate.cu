// The iterations of token_cluster on the Gram matrices of windows, with token_spread before and
// token_match after them: a block a window, on numbers in shared memory. See token_reduce.cu.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cuda/token_reduce_shared.cuh"

namespace expedite_d2::cuda {
namespace {

// Neighbouring centres whose new rows of A a warp computes together.
constexpr int kUpdateCentres = 4;
// Numbers that a lane reads in match before it writes.
constexpr int kMatchNumbers = 4;

// Sums over the tokens of each window: of their squared distances to the nearest initial candidate,
// and to the window's mean; and, over the windows, those of the means to the image's mean, each
// weighted by its tokens. A block a window, then one for 32 channels of an image.
__global__ void __launch_bounds__(kNumberThreads, 1)
    spread_kernel(GramScratch scratch, Grid grid, int radius, int channels, int64_t blocks) {
  extern __shared__ __align__(128) float shared[];
  const int64_t windows = grid.windows();
  const int parts = spread_parts(channels);
  if (blockIdx.x < blocks) {
    const int64_t linear = blockIdx.x;
    const WindowView window = window_at(grid, linear);
    const GramNumbers numbers(shared, window);
    // iterate_kernel reads one part then.
    load_numbers(numbers, window, radius, scratch.windows + linear * scratch.room, scratch.splits,
                 scratch.splits > 1);
    multiply(numbers, window, false);
    float nearest = 0.f;
    float deviation = 0.f;
    each_token(window, [&](int p, bool exists) {
      // The smaller number, or NaN if either is.
      const auto lesser = [](float x, float y) { return x < y || x != x ? x : y; };
      float least = INFINITY;
      Candidates(numbers, window, radius, p, exists)
          .each(numbers, window.cell_columns, p, [&](int, int, const float (&distances)[kColumn]) {
#pragma unroll
            for (int e = 0; e < kColumn; ++e) {
              least = lesser(distances[e], least);
            }
          });
#pragma unroll
      for (int offset = 1; offset < kTokenLanes; offset *= 2) {
        least = lesser(__shfl_xor_sync(kAllLanes, least, offset), least);
      }
      if (exists && threadIdx.x % kTokenLanes == 0) {
        nearest += least;
        deviation += numbers.square(p);
      }
    });
    nearest = block_sum<kNumberWarps>(nearest, numbers.sums);
    deviation = block_sum<kNumberWarps>(deviation, numbers.sums);
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
  const auto tokens_of = [&](int64_t w) { return static_cast<float>(window_at(grid, w).tokens()); };
  // Of this channel; its origin is the first window's mean.
  const float* column = scratch.means + image * windows * channels + c;
  const float origin = c < channels ? column[0] : 0.f;
  float mean = 0.f;
  for (int64_t w = warp; w < windows && c < channels; w += kNumberWarps) {
    mean = fmaf(tokens_of(w), column[w * channels] - origin, mean);
  }
  shared[threadIdx.x] = mean;
  __syncthreads();
  mean = 0.f;
  for (int w = 0; w < kNumberWarps; ++w) {
    mean += shared[w * kWarp + threadIdx.x % kWarp];
  }
  mean /= static_cast<float>(grid.rows.size) * static_cast<float>(grid.columns.size);
  float between = 0.f;
  for (int64_t w = warp; w < windows && c < channels; w += kNumberWarps) {
    const float difference = column[w * channels] - origin - mean;
    between = fmaf(tokens_of(w) * difference, difference, between);
  }
  between = block_sum<kNumberWarps>(between, shared + kNumberThreads);
  if (threadIdx.x == 0) {
    scratch.away[image * (windows + parts) + windows + part] = between;
  }
}

// token_spread of an image from the sums of spread_kernel.
__device__ __forceinline__ float image_spread(const GramScratch& scratch, const Grid& grid,
                                              int channels, int64_t image, float* sums) {
  const int64_t windows = grid.windows();
  const int64_t terms = windows + spread_parts(channels);
  const float count = static_cast<float>(grid.rows.size) * static_cast<float>(grid.columns.size);
  float sum = 0.f;
  float deviation = 0.f;
  for (int64_t w = threadIdx.x; w < windows; w += kNumberThreads) {
    sum += scratch.near[image * windows + w];
  }
  for (int64_t w = threadIdx.x; w < terms; w += kNumberThreads) {
    deviation += scratch.away[image * terms + w];
  }
  sum = block_sum<kNumberWarps>(sum, sums) / count;
  const float floor = fmaf(kSpreadFloor, block_sum<kNumberWarps>(deviation, sums) / count, FLT_MIN);
  // NaN fails the comparison and is passed on.
  return sum < floor ? floor : sum;
}

// Falloff of the tokens to their candidates, and what normalises it.
__device__ __forceinline__ void assign(const GramNumbers& numbers, const WindowView& window,
                                       int radius, float tau) {
  each_token(window, [&](int p, bool exists) {
    const Candidates candidates(numbers, window, radius, p, exists);
    // NaN is left to the sum: fminf skips it, but exp(NaN) makes all of this token's numbers NaN.
    float least = INFINITY;
    candidates.each(numbers, window.cell_columns, p,
                    [&](int, int, const float (&distances)[kColumn]) {
#pragma unroll
                      for (int e = 0; e < kColumn; ++e) {
                        least = fminf(least, distances[e]);
                      }
                    });
#pragma unroll
    for (int offset = 1; offset < kTokenLanes; offset *= 2) {
      least = fminf(least, __shfl_xor_sync(kAllLanes, least, offset));
    }
    float sum = 0.f;
    candidates.each(numbers, window.cell_columns, p,
                    [&](int first, int count, const float (&distances)[kColumn]) {
                      float weights[kColumn];
#pragma unroll
                      for (int e = 0; e < kColumn; ++e) {
                        weights[e] = falloff(tau, distances[e] - least);
                      }
#pragma unroll
                      for (int e = 0; e < kColumn; ++e) {
                        if (exists && e < count) {
                          numbers.next[(first + e * window.cell_columns) * numbers.stride + p] =
                              weights[e];
                          sum += weights[e];
                        }
                      }
                    });
#pragma unroll
    for (int offset = 1; offset < kTokenLanes; offset *= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, offset);
    }
    if (exists && threadIdx.x % kTokenLanes == 0) {
      numbers.shares[p] = 1.f / sum;
    }
  });
  __syncthreads();
}

// New rows of A: what each centre got, divided by the sum of it.
__device__ __forceinline__ void update(const GramNumbers& numbers, const WindowView& window,
                                       int radius) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int stride = numbers.stride;
  for (int i = static_cast<int>(threadIdx.x) / kWarp * kUpdateCentres; i < window.cells();
       i += kNumberWarps * kUpdateCentres) {
    const int last = min(i + kUpdateCentres, window.cells()) - 1;
    const int begin = numbers.spans[i].begin;
    const int end = numbers.spans[last].end;
    HomeCell cells[kUpdateCentres];
#pragma unroll
    for (int v = 0; v < kUpdateCentres; ++v) {
      const int cell = min(i + v, last);
      cells[v] = {cell / window.cell_columns, cell % window.cell_columns};
    }
    // What the centres get from token p.
    const auto get = [&](int p, float (&got)[kUpdateCentres]) {
      const HomeCell home = numbers.homes[p];
      const float share = numbers.shares[p];
#pragma unroll
      for (int v = 0; v < kUpdateCentres; ++v) {
        const bool candidate =
            abs(home.row - cells[v].row) <= radius && abs(home.column - cells[v].column) <= radius;
        const float weight = numbers.next[min(i + v, last) * stride + p];
        got[v] = candidate ? weight * share : 0.f;
      }
    };
    float mass[kUpdateCentres] = {};
    for (int p = begin + lane; p < end; p += kWarp) {
      float got[kUpdateCentres];
      get(p, got);
#pragma unroll
      for (int v = 0; v < kUpdateCentres; ++v) {
        mass[v] += got[v];
      }
    }
#pragma unroll
    for (int v = 0; v < kUpdateCentres; ++v) {
      mass[v] = warp_sum(mass[v]);
    }
    for (int p = begin + lane; p < end; p += kWarp) {
      float got[kUpdateCentres];
      get(p, got);
#pragma unroll
      for (int v = 0; v < kUpdateCentres; ++v) {
        got[v] /= mass[v];
      }
#pragma unroll
      for (int v = 0; v < kUpdateCentres; ++v) {
        // A centre that nobody wants keeps its value. NaN is not zero, so it goes on to the output.
        if (mass[v] != 0.f && i + v <= last) {
          numbers.rows[(i + v) * stride + p] = got[v];
        }
      }
    }
  }
  __syncthreads();
}

// token_match from A G for all tokens. The rows of A are no longer needed. Of a token's lanes, each
// has the keys of every kTokenLanes-th centre.
__device__ __forceinline__ void match(const GramNumbers& numbers, const WindowView& window,
                                      int topk, float tau,
                                      int32_t* indices,  // (B, H, W, topk)
                                      float* weights) {  // (B, H, W, topk)
  const int found = min(topk, window.cells());
  const int lane = static_cast<int>(threadIdx.x) % kTokenLanes;
  each_token(window, [&](int p, bool exists) {
    const int64_t first = window.token(p) * topk;
    const float square = numbers.square(p);
    // Of the last token, lanes beyond it have no keys.
    const int cells = exists ? window.cells() : 0;
    float* keys = numbers.rows + p;
    for (int start = lane; start < cells; start += kTokenLanes * kMatchNumbers) {
      float distances[kMatchNumbers];
#pragma unroll
      for (int e = 0; e < kMatchNumbers; ++e) {
        distances[e] = numbers.distance(min(start + e * kTokenLanes, cells - 1), p, square);
      }
#pragma unroll
      for (int e = 0; e < kMatchNumbers; ++e) {
        const int i = start + e * kTokenLanes;
        if (i < cells) {
          // NaN and infinity come last, in the order of their indices.
          keys[i * numbers.stride] = distances[e] < FLT_MAX ? distances[e] : FLT_MAX;
        }
      }
    }
    float least = 0.f;
    float sum = 0.f;
    for (int rank = 0; rank < found; ++rank) {
      float best = INFINITY;
      int nearest = 0;
#pragma unroll 2
      for (int start = lane; start < cells; start += kTokenLanes * kMatchNumbers) {
#pragma unroll
        for (int e = 0; e < kMatchNumbers; ++e) {
          const int i = start + e * kTokenLanes;
          const float key = i < cells ? keys[i * numbers.stride] : INFINITY;
          // Of equal ones the lower index.
          nearest = key < best ? i : nearest;
          best = key < best ? key : best;
        }
      }
#pragma unroll
      for (int offset = 1; offset < kTokenLanes; offset *= 2) {
        const float key = __shfl_xor_sync(kAllLanes, best, offset);
        const int other = __shfl_xor_sync(kAllLanes, nearest, offset);
        const bool nearer = key < best || (key == best && other < nearest);
        nearest = nearer ? other : nearest;
        best = nearer ? key : best;
      }
      if (exists && nearest % kTokenLanes == lane) {
        keys[nearest * numbers.stride] = INFINITY;
      }
      const float d = numbers.distance(nearest, p, square);
      least = rank == 0 ? d : least;
      // The first pick is the nearest, so no exponent is positive; NaN stays NaN.
      const float weight = falloff(tau, d - least);
      sum += weight;
      if (exists && lane == 0) {
        indices[first + rank] = window.cell(nearest);
        weights[first + rank] = weight;
      }
    }
    if (!exists || lane != 0) {
      return;
    }
    // Times the sum's inverse, so that what repeats the nearest is NaN where the others are.
    for (int start = 0; start < found; start += kMatchNumbers) {
      float values[kMatchNumbers];
#pragma unroll
      for (int e = 0; e < kMatchNumbers; ++e) {
        values[e] = weights[first + min(start + e, found - 1)] / sum;
      }
#pragma unroll
      for (int e = 0; e < kMatchNumbers; ++e) {
        if (start + e < found) {
          weights[first + start + e] = values[e];
        }
      }
    }
    for (int rank = found; rank < topk; ++rank) {
      indices[first + rank] = indices[first];
      weights[first + rank] = 0.f / sum;
    }
  });
}

// All iterations of a window, the match, and A.
__global__ void __launch_bounds__(kNumberThreads, 1)
    iterate_kernel(GramScratch scratch, GramReduction reduction, Grid grid, int channels) {
  extern __shared__ __align__(128) float shared[];
  const int64_t linear = blockIdx.x;
  const WindowView window = window_at(grid, linear);
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
  // spread_kernel has added the parts up.
  load_numbers(numbers, window, reduction.radius, own, reduction.automatic ? 1 : scratch.splits,
               false);
  for (int64_t step = 0; step < reduction.iterations; ++step) {
    multiply(numbers, window, false);
    assign(numbers, window, reduction.radius, tau);
    update(numbers, window, reduction.radius);
  }
  // All parts of G have been read.
  const int packs = padded_tokens(window) / 4;
  for (int n = threadIdx.x; n < window.cells() * packs; n += kNumberThreads) {
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
  return tokens.batch * tokens.grid.windows();
}

}  // namespace

size_t iterate_shared_memory(int64_t padded, int64_t cells) {
  // Or what the sums over the windows need.
  return sizeof(float) *
         std::max<int64_t>(GramNumbers::floats(padded, cells), kNumberThreads + kNumberWarps);
}

void launch_window_spread(Launcher& launch, const Tokens& tokens, int radius,
                          const GramScratch& scratch, size_t shared_memory) {
  const int64_t windows = window_count(tokens);
  launch.blocks(spread_kernel, windows + tokens.batch * spread_parts(tokens.channels),
                kNumberThreads, shared_memory, scratch, tokens.grid, radius, tokens.channels,
                windows);
}

void launch_window_iterate(Launcher& launch, const Tokens& tokens, const GramReduction& reduction,
                           const GramScratch& scratch, size_t shared_memory) {
  launch.blocks(iterate_kernel, window_count(tokens), kNumberThreads, shared_memory, scratch,
                reduction, tokens.grid, tokens.channels);
}

}  // namespace expedite_d2::cuda
