// token_cluster: soft k-means of tokens around the cells of a grid.
//
// Two paths with the same result up to rounding. Windows whose Gram matrix fits into shared memory
// run in one launch (token_cluster_gram.cu). Everything else runs here, a few launches an
// iteration: only the candidates of a token are looked at, so the work grows with tokens x
// neighbourhood^2 and no tokens x centres matrix exists. In device memory this path keeps the
// centres in float32 (for 16-bit tokens) and one responsibility for each token and candidate.
#include <cmath>
#include <type_traits>

#include "cuda/utils.cuh"
#include "cuda/windows.cuh"

namespace expedite_d2::cuda {
namespace {

// Softmax of -tau * squared distance over each token's candidates. A warp a token.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 1)
    responsibility_kernel(const T* __restrict__ tokens,       // (B, H, W, C)
                          const float* __restrict__ centres,  // (B, h', w', C)
                          Temperature temperature,
                          float* __restrict__ responsibilities,  // (B, H, W, slots)
                          Grid grid, int radius, Slots slots, int channels, int64_t count) {
  const int64_t token = global_warp();
  if (token >= count) {
    return;
  }
  const int lane = threadIdx.x % kWarp;
  const Position at = position(token, grid.rows.size, grid.columns.size);
  const Spot row = token_spot(grid.rows, at.row);
  const Spot column = token_spot(grid.columns, at.column);
  const int32_t top = grid.rows.first(row.local, radius);
  const int32_t left = grid.columns.first(column.local, radius);
  const int32_t height = grid.rows.last(row.local, radius, row.window) - top + 1;
  const int32_t width = grid.columns.last(column.local, radius, column.window) - left + 1;
  const float tau = image_temperature(temperature, at.image);
  const T* z = tokens + token * channels;
  float* q = responsibilities + token * slots.rows * slots.columns;

  // NaN is left to the sum: fminf skips it, but exp(NaN) makes all of this token's numbers NaN.
  float least = INFINITY;
  for (int32_t i = 0; i < height; ++i) {
    const int64_t line =
        (at.image * grid.rows.cells() + row.window * grid.rows.clusters + top + i) *
            grid.columns.cells() +
        column.window * grid.columns.clusters + left;
    for (int32_t j = 0; j < width; ++j) {
      const float d = squared_distance<V>(z, centres + (line + j) * channels, channels);
      least = fminf(least, d);
      if (lane == 0) {
        q[i * slots.columns + j] = d;
      }
    }
  }
  __syncwarp();
  // From here on every lane reads and writes the same slots of its own.
  float sum = 0.f;
  for (int32_t n = lane; n < height * width; n += kWarp) {
    float& slot = q[n / width * slots.columns + n % width];
    slot = falloff(tau, slot - least);
    sum += slot;
  }
  sum = warp_sum(sum);
  for (int32_t n = lane; n < height * width; n += kWarp) {
    q[n / width * slots.columns + n % width] /= sum;
  }
}

// New centres: the mean of the tokens that have the cell as a candidate, weighted by their
// responsibilities. A warp for 32 V channels of a cell; every thread adds up the mass by itself.
// `previous` and `centres` may be one tensor: a thread reads only what it writes.
template <typename T, typename Out, int V>
__global__ void __launch_bounds__(kThreads, 1)
    update_kernel(const T* __restrict__ tokens,                // (B, H, W, C)
                  const float* __restrict__ responsibilities,  // (B, H, W, slots)
                  const float* previous,                       // (B, h', w', C)
                  Out* centres,                                // (B, h', w', C)
                  Grid grid, int radius, Slots slots, int channels, int64_t cells) {
  const int parts = ceil_div(channels, kWarp * V);
  const int64_t warp = global_warp();
  const int64_t cell = warp / parts;
  const int c =
      (static_cast<int>(warp % parts) * kWarp + static_cast<int>(threadIdx.x) % kWarp) * V;
  if (cell >= cells || c >= channels) {
    return;
  }
  const Position at = position(cell, grid.rows.cells(), grid.columns.cells());
  const Spot row = cell_spot(grid.rows, at.row);
  const Spot column = cell_spot(grid.columns, at.column);
  const int32_t bottom = grid.rows.reach_end(row.local, radius, row.window);
  const int32_t left = grid.columns.reach_begin(column.local, radius);
  const int32_t right = grid.columns.reach_end(column.local, radius, column.window);

  float mass = 0.f;
  float sum[V] = {};
  for (int32_t y = grid.rows.reach_begin(row.local, radius); y < bottom; ++y) {
    const int64_t line =
        (at.image * grid.rows.size + row.window * grid.rows.window + y) * grid.columns.size +
        column.window * grid.columns.window;
    const int32_t i = row.local - grid.rows.first(y, radius);
    for (int32_t x = left; x < right; ++x) {
      const int32_t j = column.local - grid.columns.first(x, radius);
      const float q = responsibilities[((line + x) * slots.rows + i) * slots.columns + j];
      float z[V];
      load<V>(tokens + (line + x) * channels + c, z);
      mass += q;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sum[v] = fmaf(q, z[v], sum[v]);
      }
    }
  }
  if (mass == 0.f) {
    load<V>(previous + cell * channels + c, sum);
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      sum[v] /= mass;
    }
  }
  store<V>(centres + cell * channels + c, sum);
}

template <typename T, int V, typename Out>
void launch_update(Launcher& launch, const Tokens& tokens, int radius,
                   const float* responsibilities, const float* previous, Out* centres) {
  const int64_t cells = cell_count(tokens.grid, tokens.batch);
  launch.warps(update_kernel<T, Out, V>, cells * ceil_div(tokens.channels, kWarp * V),
               static_cast<const T*>(tokens.data), responsibilities, previous, centres, tokens.grid,
               radius, candidate_slots(tokens.grid, radius), tokens.channels, cells);
}

template <typename T, int V>
void launch_iterations(Launcher& launch, const Tokens& tokens, int64_t iterations, int radius,
                       Temperature temperature, T* out, float* centres, float* responsibilities) {
  if (iterations == 0) {
    launch_pool<T, V, T>(launch, tokens, out);
    return;
  }
  const int64_t count = token_count(tokens.grid, tokens.batch);
  launch_pool<T, V, float>(launch, tokens, centres);
  for (int64_t step = 1; step <= iterations; ++step) {
    launch.warps(responsibility_kernel<T, V>, count, static_cast<const T*>(tokens.data), centres,
                 temperature, responsibilities, tokens.grid, radius,
                 candidate_slots(tokens.grid, radius), tokens.channels, count);
    if (step < iterations) {
      launch_update<T, V, float>(launch, tokens, radius, responsibilities, centres, centres);
    } else {
      launch_update<T, V, T>(launch, tokens, radius, responsibilities, centres, out);
    }
  }
}

}  // namespace

Slots candidate_slots(const Grid& grid, int radius) {
  const auto side = [radius](const WindowAxis& axis) {
    return radius < axis.clusters / 2 ? 2 * radius + 1 : axis.clusters;
  };
  return {side(grid.rows), side(grid.columns)};
}

cudaError_t launch_token_cluster(const Tokens& tokens, int64_t iterations, int radius,
                                 Temperature temperature, void* centres, float* scratch_centres,
                                 float* responsibilities) {
  Launcher launch{tokens.stream};
  with_type(tokens.type, [&](auto type) {
    using T = decltype(type);
    auto* out = static_cast<T*>(centres);
    float* precise = scratch_centres;
    if constexpr (std::is_same_v<T, float>) {
      precise = out;
    }
    const auto run =
        can_vectorise(tokens.channels, static_cast<const T*>(tokens.data), out, precise)
            ? launch_iterations<T, kVector>
            : launch_iterations<T, 1>;
    run(launch, tokens, iterations, radius, temperature, out, precise, responsibilities);
  });
  return launch.error;
}

}  // namespace expedite_d2::cuda
