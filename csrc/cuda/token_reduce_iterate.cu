// The iterations of token_cluster on the Gram matrices of windows, with token_spread before and
// token_match after them: one block per window, in shared memory. See token_reduce.cu.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cuda/token_reduce_shared.cuh"

namespace expedite_d2::cuda {
namespace {

// Neighbouring centres whose new rows of A a warp computes together.
constexpr int kUpdateCentres = 4;
// Values that a lane reads in match before it writes.
constexpr int kMatchValues = 4;

// The sums that token_spread needs. The first blocks, one per window, sum the squared distances of
// its tokens to their nearest initial candidate and to the window's mean. The others, one per 32
// channels of an image, sum those of the windows' means to the image's mean, weighted by the number
// of tokens.
__global__ void __launch_bounds__(kIterateThreads, 1)
    spread_kernel(GramScratch scratch, Grid grid, int radius, int channels, int64_t blocks) {
  extern __shared__ __align__(128) float shared[];
  const int64_t windows = grid.windows();
  const int parts = spread_parts(channels);
  if (blockIdx.x < blocks) {
    const int64_t linear = blockIdx.x;
    const WindowView window = window_at(grid, linear);
    const SharedWindow memory(shared, window);
    // The sum of the parts is kept, so that iterate_kernel reads one part.
    load_shared(memory, window, radius, scratch.windows + linear * scratch.floats_per_window,
                scratch.splits, scratch.splits > 1);
    multiply_gram(memory, window, false);
    float nearest = 0.f;
    float deviation = 0.f;
    each_token(window, [&](int p, bool exists) {
      // The smaller number, or NaN if either is.
      const auto min_or_nan = [](float x, float y) { return x < y || x != x ? x : y; };
      float min_distance = INFINITY;
      Candidates(memory, window, radius, p, exists)
          .each(memory, window.cell_columns, p, [&](int, int, const float (&distances)[kColumn]) {
#pragma unroll
            for (int e = 0; e < kColumn; ++e) {
              min_distance = min_or_nan(distances[e], min_distance);
            }
          });
#pragma unroll
      for (int offset = 1; offset < kTokenLanes; offset *= 2) {
        min_distance = min_or_nan(__shfl_xor_sync(kAllLanes, min_distance, offset), min_distance);
      }
      if (exists && threadIdx.x % kTokenLanes == 0) {
        nearest += min_distance;
        deviation += memory.squared_norm(p);
      }
    });
    nearest = block_sum<kIterateWarps>(nearest, memory.sums);
    deviation = block_sum<kIterateWarps>(deviation, memory.sums);
    if (threadIdx.x == 0) {
      scratch.nearest_sums[linear] = nearest;
      scratch.deviation_sums[linear + window.image * parts] = deviation;
    }
    return;
  }

  const int64_t image = (blockIdx.x - blocks) / parts;
  const int part = static_cast<int>((blockIdx.x - blocks) % parts);
  const int c = part * kWarp + static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const auto tokens_of = [&](int64_t w) { return static_cast<float>(window_at(grid, w).tokens()); };
  // This channel of all means, relative to that of the first window.
  const float* column = scratch.means + image * windows * channels + c;
  const float origin = c < channels ? column[0] : 0.f;
  float mean = 0.f;
  for (int64_t w = warp; w < windows && c < channels; w += kIterateWarps) {
    mean = fmaf(tokens_of(w), column[w * channels] - origin, mean);
  }
  shared[threadIdx.x] = mean;
  __syncthreads();
  mean = 0.f;
  for (int w = 0; w < kIterateWarps; ++w) {
    mean += shared[w * kWarp + threadIdx.x % kWarp];
  }
  mean /= static_cast<float>(grid.rows.size) * static_cast<float>(grid.columns.size);
  float between = 0.f;
  for (int64_t w = warp; w < windows && c < channels; w += kIterateWarps) {
    const float difference = column[w * channels] - origin - mean;
    between = fmaf(tokens_of(w) * difference, difference, between);
  }
  between = block_sum<kIterateWarps>(between, shared + kIterateThreads);
  if (threadIdx.x == 0) {
    scratch.deviation_sums[image * (windows + parts) + windows + part] = between;
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
  for (int64_t w = threadIdx.x; w < windows; w += kIterateThreads) {
    sum += scratch.nearest_sums[image * windows + w];
  }
  for (int64_t w = threadIdx.x; w < terms; w += kIterateThreads) {
    deviation += scratch.deviation_sums[image * terms + w];
  }
  sum = block_sum<kIterateWarps>(sum, sums) / count;
  const float floor =
      fmaf(kSpreadFloor, block_sum<kIterateWarps>(deviation, sums) / count, FLT_MIN);
  // NaN fails the comparison and is passed on.
  return sum < floor ? floor : sum;
}

// Unnormalised weights of the tokens for their candidates, and the inverse of their sums.
__device__ __forceinline__ void assign(const SharedWindow& memory, const WindowView& window,
                                       int radius, float tau) {
  each_token(window, [&](int p, bool exists) {
    const Candidates candidates(memory, window, radius, p, exists);
    // NaN is left to the sum: fminf skips it, but exp(NaN) makes all weights of this token NaN.
    float min_distance = INFINITY;
    candidates.each(memory, window.cell_columns, p,
                    [&](int, int, const float (&distances)[kColumn]) {
#pragma unroll
                      for (int e = 0; e < kColumn; ++e) {
                        min_distance = fminf(min_distance, distances[e]);
                      }
                    });
#pragma unroll
    for (int offset = 1; offset < kTokenLanes; offset *= 2) {
      min_distance = fminf(min_distance, __shfl_xor_sync(kAllLanes, min_distance, offset));
    }
    float sum = 0.f;
    candidates.each(memory, window.cell_columns, p,
                    [&](int first, int count, const float (&distances)[kColumn]) {
                      float weights[kColumn];
#pragma unroll
                      for (int e = 0; e < kColumn; ++e) {
                        weights[e] = unnormalised_weight(tau, distances[e] - min_distance);
                      }
#pragma unroll
                      for (int e = 0; e < kColumn; ++e) {
                        if (exists && e < count) {
                          memory.products[(first + e * window.cell_columns) * memory.stride + p] =
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
      memory.inverse_sums[p] = 1.f / sum;
    }
  });
  __syncthreads();
}

// New rows of A: each centre's responsibilities, divided by their sum.
__device__ __forceinline__ void update(const SharedWindow& memory, const WindowView& window,
                                       int radius) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int stride = memory.stride;
  for (int i = static_cast<int>(threadIdx.x) / kWarp * kUpdateCentres; i < window.cells();
       i += kIterateWarps * kUpdateCentres) {
    const int last = min(i + kUpdateCentres, window.cells()) - 1;
    const int begin = memory.spans[i].begin;
    const int end = memory.spans[last].end;
    HomeCell cells[kUpdateCentres];
#pragma unroll
    for (int v = 0; v < kUpdateCentres; ++v) {
      const int cell = min(i + v, last);
      cells[v] = {cell / window.cell_columns, cell % window.cell_columns};
    }
    // The centres' responsibilities for token p.
    const auto responsibilities = [&](int p, float (&q)[kUpdateCentres]) {
      const HomeCell home = memory.homes[p];
      const float inverse_sum = memory.inverse_sums[p];
#pragma unroll
      for (int v = 0; v < kUpdateCentres; ++v) {
        const bool candidate =
            abs(home.row - cells[v].row) <= radius && abs(home.column - cells[v].column) <= radius;
        const float weight = memory.products[min(i + v, last) * stride + p];
        q[v] = candidate ? weight * inverse_sum : 0.f;
      }
    };
    float mass[kUpdateCentres] = {};
    for (int p = begin + lane; p < end; p += kWarp) {
      float q[kUpdateCentres];
      responsibilities(p, q);
#pragma unroll
      for (int v = 0; v < kUpdateCentres; ++v) {
        mass[v] += q[v];
      }
    }
#pragma unroll
    for (int v = 0; v < kUpdateCentres; ++v) {
      mass[v] = warp_sum(mass[v]);
    }
    for (int p = begin + lane; p < end; p += kWarp) {
      float q[kUpdateCentres];
      responsibilities(p, q);
#pragma unroll
      for (int v = 0; v < kUpdateCentres; ++v) {
        q[v] /= mass[v];
      }
#pragma unroll
      for (int v = 0; v < kUpdateCentres; ++v) {
        // A centre without mass keeps its value. NaN is not zero, so it reaches the output.
        if (mass[v] != 0.f && i + v <= last) {
          memory.rows[(i + v) * stride + p] = q[v];
        }
      }
    }
  }
  __syncthreads();
}

// token_match from A G, for all tokens. Keys overwrite the rows of A, which are no longer needed.
// Each of a token's lanes handles every kTokenLanes-th centre.
__device__ __forceinline__ void match(const SharedWindow& memory, const WindowView& window,
                                      int topk, float tau,
                                      int32_t* indices,  // (B, H, W, topk)
                                      float* weights) {  // (B, H, W, topk)
  const int found = min(topk, window.cells());
  const int lane = static_cast<int>(threadIdx.x) % kTokenLanes;
  each_token(window, [&](int p, bool exists) {
    const int64_t first = window.token(p) * topk;
    const float squared_norm = memory.squared_norm(p);
    // Lanes beyond the last token have no keys.
    const int cells = exists ? window.cells() : 0;
    float* keys = memory.rows + p;
    for (int start = lane; start < cells; start += kTokenLanes * kMatchValues) {
      float distances[kMatchValues];
#pragma unroll
      for (int e = 0; e < kMatchValues; ++e) {
        distances[e] = memory.distance(min(start + e * kTokenLanes, cells - 1), p, squared_norm);
      }
#pragma unroll
      for (int e = 0; e < kMatchValues; ++e) {
        const int i = start + e * kTokenLanes;
        if (i < cells) {
          // NaN and infinity come last, in the order of their indices.
          keys[i * memory.stride] = distances[e] < FLT_MAX ? distances[e] : FLT_MAX;
        }
      }
    }
    float min_distance = 0.f;
    float sum = 0.f;
    for (int rank = 0; rank < found; ++rank) {
      float best = INFINITY;
      int nearest = 0;
#pragma unroll 2
      for (int start = lane; start < cells; start += kTokenLanes * kMatchValues) {
#pragma unroll
        for (int e = 0; e < kMatchValues; ++e) {
          const int i = start + e * kTokenLanes;
          const float key = i < cells ? keys[i * memory.stride] : INFINITY;
          // Ties: the lower index.
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
        keys[nearest * memory.stride] = INFINITY;
      }
      const float d = memory.distance(nearest, p, squared_norm);
      min_distance = rank == 0 ? d : min_distance;
      // The first match is the nearest, so no exponent is positive; NaN stays NaN.
      const float weight = unnormalised_weight(tau, d - min_distance);
      sum += weight;
      if (exists && lane == 0) {
        indices[first + rank] = window.cell(nearest);
        weights[first + rank] = weight;
      }
    }
    if (!exists || lane != 0) {
      return;
    }
    // Divided by the sum, too, the entries that repeat the nearest are NaN where the others are.
    for (int start = 0; start < found; start += kMatchValues) {
      float values[kMatchValues];
#pragma unroll
      for (int e = 0; e < kMatchValues; ++e) {
        values[e] = weights[first + min(start + e, found - 1)] / sum;
      }
#pragma unroll
      for (int e = 0; e < kMatchValues; ++e) {
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

// Makes A NaN, and with it all centres and matches of the window, where a token is not finite.
__device__ __forceinline__ void propagate_nan(const SharedWindow& memory,
                                              const WindowView& window) {
  float norms = 0.f;
  for (int p = threadIdx.x; p < window.tokens(); p += kIterateThreads) {
    norms += memory.squared_norm(p);
  }
  if (isfinite(block_sum<kIterateWarps>(norms, memory.sums))) {
    return;
  }
  for (int n = threadIdx.x; n < window.cells() * (memory.stride / 4); n += kIterateThreads) {
    store<4>(memory.rows + 4 * n, {NAN, NAN, NAN, NAN});
  }
  __syncthreads();
}

// All iterations of a window, the match, and A.
__global__ void __launch_bounds__(kIterateThreads, 1)
    iterate_kernel(GramScratch scratch, ReduceParams params, Grid grid, int channels) {
  extern __shared__ __align__(128) float shared[];
  const int64_t linear = blockIdx.x;
  const WindowView window = window_at(grid, linear);
  const SharedWindow memory(shared, window);
  float* own = scratch.windows + linear * scratch.floats_per_window;
  float tau = 0.f;
  if (params.automatic) {
    const float spread = image_spread(scratch, grid, channels, window.image, memory.sums);
    tau = effective_temperature(params.temperature.value, spread);
    if (threadIdx.x == 0 && window.row == 0 && window.column == 0) {
      params.spread[window.image] = spread;
    }
  } else {
    tau = image_temperature(params.temperature, window.image);
  }
  // With `automatic`, spread_kernel has added up the parts.
  load_shared(memory, window, params.radius, own, params.automatic ? 1 : scratch.splits, false);
  for (int64_t step = 0; step < params.iterations; ++step) {
    multiply_gram(memory, window, false);
    assign(memory, window, params.radius, tau);
    update(memory, window, params.radius);
  }
  propagate_nan(memory, window);
  // All parts of G have been read: A takes their place.
  const int packs = padded_tokens(window) / 4;
  for (int n = threadIdx.x; n < window.cells() * packs; n += kIterateThreads) {
    float a[4];
    load<4>(memory.rows + n / packs * memory.stride + n % packs * 4, a);
    store<4>(own + 4 * n, a);
  }
  if (params.indices != nullptr) {
    multiply_gram(memory, window, true);
    match(memory, window, params.topk, tau, params.indices, params.weights);
  }
}

int64_t window_count(const Tokens& tokens) {
  return tokens.batch * tokens.grid.windows();
}

}  // namespace

size_t iterate_shared_memory(int64_t padded, int64_t cells) {
  // At least what the cross-window sums need.
  return sizeof(float) *
         std::max<int64_t>(SharedWindow::floats(padded, cells), kIterateThreads + kIterateWarps);
}

void launch_window_spread(Launcher& launch, const Tokens& tokens, int radius,
                          const GramScratch& scratch, size_t shared_memory) {
  const int64_t windows = window_count(tokens);
  launch.blocks(spread_kernel, windows + tokens.batch * spread_parts(tokens.channels),
                kIterateThreads, shared_memory, scratch, tokens.grid, radius, tokens.channels,
                windows);
}

void launch_window_iterate(Launcher& launch, const Tokens& tokens, const ReduceParams& params,
                           const GramScratch& scratch, size_t shared_memory) {
  launch.blocks(iterate_kernel, window_count(tokens), kIterateThreads, shared_memory, scratch,
                params, tokens.grid, tokens.channels);
}

}  // namespace expedite_d2::cuda
