// token_cluster: soft k-means of tokens around the cells of a grid.
//
// Two paths with the same result up to rounding. Windows whose Gram matrix fits into shared memory
// take that of token_reduce.cu and token_reduce_iterate.cu. Everything else runs here, with two
// launches per iteration: only the candidates of a token are considered, so the work grows with
// tokens x neighbourhood^2 and no tokens x centres matrix exists. In device memory this path keeps
// the centres in float32 and one responsibility for each token and candidate.
#include <algorithm>
#include <cmath>

#include "cuda/candidates.cuh"
#include "cuda/utils.cuh"
#include "cuda/windows.cuh"

namespace expedite_d2::cuda {
namespace {

// Softmax of -tau * squared distance over each token's candidates.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    responsibility_kernel(const T* __restrict__ tokens,       // (B, H, W, C)
                          const float* __restrict__ centres,  // (B, h', w', C)
                          Temperature temperature,
                          float* __restrict__ responsibilities,  // (B, H, W, slots)
                          Grid grid, PairTiles tiles, int radius, CandidateShape shape,
                          int channels) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const TokenPair& pair = token_pair(grid, radius, tiles);
  const auto responsibilities_of = [&](int t) {
    return responsibilities + (pair.first_token + t) * shape.rows * shape.columns;
  };
  // With one candidate per lane, distances stay in registers.
  const bool is_direct = tiles.candidates <= kWarp;
  float distances[kPair] = {};
  // NaN is left to the sum: fminf skips it, but exp(NaN) makes all of this token's weights NaN.
  float min_distance[kPair] = {INFINITY, INFINITY};
  for (int32_t first = 0; first < tiles.candidates; first += kWarp) {
    pair_distances<V>(tokens, centres, pair, first, channels, distances);
#pragma unroll
    for (int t = 0; t < kPair; ++t) {
      const int32_t slot = pair.slot(t, first + lane, shape.columns);
      if (slot >= 0 && pair.owns(t)) {
        min_distance[t] = fminf(min_distance[t], distances[t]);
        if (!is_direct) {
          responsibilities_of(t)[slot] = distances[t];
        }
      }
    }
  }
  const float tau = image_temperature(temperature, pair.image);
#pragma unroll
  for (int t = 0; t < kPair; ++t) {
    if (!pair.owns(t)) {
      continue;
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      min_distance[t] = fminf(min_distance[t], __shfl_xor_sync(kAllLanes, min_distance[t], offset));
    }
    float* q = responsibilities_of(t);
    if (is_direct) {
      const int32_t slot = pair.slot(t, lane, shape.columns);
      const float weight =
          slot < 0 ? 0.f : unnormalised_weight(tau, distances[t] - min_distance[t]);
      const float sum = warp_sum(weight);
      if (slot >= 0) {
        q[slot] = weight / sum;
      }
      continue;
    }
    // Every lane reads and writes the slots that it has filled.
    float sum = 0.f;
    for (int32_t n = lane; n < pair.candidates; n += kWarp) {
      const int32_t slot = pair.slot(t, n, shape.columns);
      if (slot >= 0) {
        q[slot] = unnormalised_weight(tau, q[slot] - min_distance[t]);
        sum += q[slot];
      }
    }
    sum = warp_sum(sum);
    for (int32_t n = lane; n < pair.candidates; n += kWarp) {
      const int32_t slot = pair.slot(t, n, shape.columns);
      if (slot >= 0) {
        q[slot] /= sum;
      }
    }
  }
}

// Cells along each axis whose new centres a warp adds up together.
constexpr int kSide = 2;
constexpr int kQuad = kSide * kSide;
// Quads of cells along each axis of a block, which read mostly the same tokens from the L1 cache.
constexpr int kQuads = 2;
// Warps that divide the tokens of a quad among them.
constexpr int kHelpers = kWarps / (kQuads * kQuads);
static_assert(kHelpers == 2);
// Tokens whose reads are in flight together.
constexpr int kInFlight = 4;
static_assert(kWarp % kInFlight == 0);

// Tokens along an axis that have a cell as a candidate, counted on the whole map.
struct Reach {
  Range tokens;   // none for a cell that does not exist
  int32_t local;  // the cell in its window

  __device__ void set(const WindowAxis& axis, int32_t cell, int radius) {
    tokens = {std::numeric_limits<int32_t>::max(), 0};
    local = 0;
    if (cell < axis.cells()) {
      const WindowPosition at = cell_position(axis, cell);
      const int32_t first = at.window * axis.window;
      const Range inside = axis.reach(at.local, radius, at.window);
      tokens = {first + inside.begin, first + inside.end};
      local = at.local;
    }
  }
};

// The responsibilities of a quad's cells for one token.
struct QuadWeights {
  float weights[kQuad];
  int32_t cells;  // bit k: cell k is a candidate of the token
};

// A token in shared memory, for all lanes of a warp.
struct __align__(16) StagedToken {
  QuadWeights weights;
  int64_t offset;  // of its first channel
};

// New centres: the mean of the tokens that have the cell as a candidate, weighted by their
// responsibilities. One block per kQuads x kQuads quads of cells and 32 V channels.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    update_kernel(const T* __restrict__ tokens,                // (B, H, W, C)
                  const float* __restrict__ responsibilities,  // (B, H, W, slots)
                  float* __restrict__ centres,                 // (B, h', w', C)
                  Grid grid, int radius, CandidateShape shape, int channels) {
  constexpr int kBlockSide = kSide * kQuads;
  // For the block's rows of cells, and for its columns.
  __shared__ Reach reaches[2][kBlockSide];
  __shared__ StagedToken staged_tokens[kWarps][kWarp];
  __shared__ float partial_sums[kQuads * kQuads][kQuad * (V + 1)][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int quad = warp / kHelpers;
  const int helper = warp % kHelpers;
  const int parts = ceil_div(channels, kWarp * V);
  const int c = (static_cast<int>(blockIdx.x % parts) * kWarp + lane) * V;
  // Lanes beyond the last channel read what another lane reads, and write nothing.
  const T* from = tokens + min(c, channels - V);
  const Position at = position(blockIdx.x / parts, ceil_div(grid.rows.cells(), kBlockSide),
                               ceil_div(grid.columns.cells(), kBlockSide));
  // There are many divisions: each thread does those of one row or column, not every thread all.
  if (threadIdx.x < 2 * kBlockSide) {
    const int axis = static_cast<int>(threadIdx.x) / kBlockSide;
    const int n = static_cast<int>(threadIdx.x) % kBlockSide;
    reaches[axis][n].set(axis == 0 ? grid.rows : grid.columns,
                         (axis == 0 ? at.row : at.column) * kBlockSide + n, radius);
  }
  __syncthreads();
  const int first_row = quad / kQuads * kSide;
  const int first_column = quad % kQuads * kSide;
  const Reach* rows = reaches[0] + first_row;
  const Reach* columns = reaches[1] + first_column;
  const int32_t top = min(rows[0].tokens.begin, rows[1].tokens.begin);
  const int32_t left = min(columns[0].tokens.begin, columns[1].tokens.begin);
  const int32_t height = max(max(rows[0].tokens.end, rows[1].tokens.end) - top, 0);
  const int32_t width = max(max(columns[0].tokens.end, columns[1].tokens.end) - left, 0);
  const int64_t count = int64_t{height} * width;

  float mass[kQuad] = {};
  float sums[kQuad][V] = {};
  for (int64_t start = helper; start < count; start += kHelpers * kWarp) {
    // Each lane finds the weights of one token; then all lanes go through the tokens together.
    const int64_t n = start + lane * kHelpers;
    StagedToken own{};
    if (n < count) {
      const auto y = top + static_cast<int32_t>(n / width);
      const auto x = left + static_cast<int32_t>(n % width);
      const int64_t token = (at.image * grid.rows.size + y) * grid.columns.size + x;
      own.offset = token * channels;
      const float* q = responsibilities + token * shape.rows * shape.columns;
      const int32_t upper = grid.rows.first_candidate(y % grid.rows.window, radius);
      const int32_t leftmost = grid.columns.first_candidate(x % grid.columns.window, radius);
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        const Reach& row = rows[k / kSide];
        const Reach& column = columns[k % kSide];
        if (row.tokens.contains(y) && column.tokens.contains(x)) {
          own.weights.weights[k] = q[(row.local - upper) * shape.columns + column.local - leftmost];
          own.weights.cells |= 1 << k;
        }
      }
    }
    __syncwarp();
    staged_tokens[warp][lane] = own;
    __syncwarp();
    const auto filled = static_cast<int>(
        min((count - start + kHelpers - 1) / kHelpers, static_cast<int64_t>(kWarp)));
    for (int first = 0; first < filled; first += kInFlight) {
      float z[kInFlight][V];
      QuadWeights quad_weights[kInFlight];
#pragma unroll
      for (int m = 0; m < kInFlight; ++m) {
        // Past the last token, the tensor's first one is read and belongs to no cell.
        const StagedToken& token = staged_tokens[warp][first + m];
        load<V>(from + token.offset, z[m]);
        quad_weights[m] = token.weights;
      }
#pragma unroll
      for (int m = 0; m < kInFlight; ++m) {
#pragma unroll
        for (int k = 0; k < kQuad; ++k) {
          // A token out of reach is skipped, not multiplied by 0: it may be NaN.
          if (quad_weights[m].cells >> k & 1) {
            mass[k] += quad_weights[m].weights[k];
#pragma unroll
            for (int v = 0; v < V; ++v) {
              sums[k][v] = fmaf(quad_weights[m].weights[k], z[m][v], sums[k][v]);
            }
          }
        }
      }
    }
  }

  if (helper > 0) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        partial_sums[quad][k * (V + 1) + v][lane] = sums[k][v];
      }
      partial_sums[quad][k * (V + 1) + V][lane] = mass[k];
    }
  }
  __syncthreads();
  if (helper > 0 || c >= channels) {
    return;
  }
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    const int32_t i = at.row * kBlockSide + first_row + k / kSide;
    const int32_t j = at.column * kBlockSide + first_column + k % kSide;
    if (i >= grid.rows.cells() || j >= grid.columns.cells()) {
      continue;
    }
    const int64_t to =
        ((at.image * grid.rows.cells() + i) * grid.columns.cells() + j) * channels + c;
    const float total = mass[k] + partial_sums[quad][k * (V + 1) + V][lane];
    // A centre without mass keeps its value. NaN is not zero, so it reaches the output.
    if (total != 0.f) {
      float centre[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        centre[v] = (sums[k][v] + partial_sums[quad][k * (V + 1) + v][lane]) / total;
      }
      store<V>(centres + to, centre);
    }
  }
}

// Makes all centres of a window NaN if one is not finite in its first `looked_at` channels, because
// one of the tokens is not. One block per window.
__global__ void __launch_bounds__(kThreads, 2)
    propagate_nan_kernel(float* centres,  // (B, h', w', C)
                         Grid grid, int looked_at, int channels) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const WindowView window = window_at(grid, blockIdx.x);
  __shared__ float sums[kWarps];
  float found = 0.f;
  for (int i = warp; i < window.cells(); i += kWarps) {
    const float* centre = centres + window.centre(i) * channels;
    for (int c = lane; c < looked_at; c += kWarp) {
      found += isfinite(centre[c]) ? 0.f : 1.f;
    }
  }
  if (block_sum(found, sums) > 0.f) {
    for (int i = warp; i < window.cells(); i += kWarps) {
      float* centre = centres + window.centre(i) * channels;
      for (int c = lane; c < channels; c += kWarp) {
        centre[c] = NAN;
      }
    }
  }
}

template <typename T, int V>
void launch_iterations(Launcher& launch, const Tokens& tokens, int64_t iterations, int radius,
                       Temperature temperature, float* centres, float* responsibilities) {
  const Grid& grid = tokens.grid;
  const CandidateShape shape = candidate_shape(grid, radius);
  const PairTiles tiles(grid, shape, tokens.batch);
  const int64_t blocks = tokens.batch * ceil_div(grid.rows.cells(), kSide * kQuads) *
                         ceil_div(grid.columns.cells(), kSide * kQuads) *
                         ceil_div(tokens.channels, kWarp * V);
  const auto* data = static_cast<const T*>(tokens.data);
  launch_pool<T, V>(launch, tokens, centres);
  for (int64_t step = 0; step < iterations; ++step) {
    launch.blocks(responsibility_kernel<T, std::min(V, kVectorSize<float>)>, tiles.blocks, kThreads,
                  0, data, centres, temperature, responsibilities, grid, tiles, radius, shape,
                  tokens.channels);
    launch.blocks(update_kernel<T, V>, blocks, kThreads, 0, data, responsibilities, centres, grid,
                  radius, shape, tokens.channels);
  }
}

}  // namespace

CandidateShape candidate_shape(const Grid& grid, int radius) {
  const auto side = [radius](const WindowAxis& axis) {
    const int32_t cells = axis.max_existing();
    return radius < cells / 2 ? 2 * radius + 1 : cells;
  };
  return {side(grid.rows), side(grid.columns)};
}

cudaError_t launch_token_cluster(const Tokens& tokens, int64_t iterations, int radius,
                                 bool has_window, Temperature temperature, float* centres,
                                 float* responsibilities) {
  Launcher launch{tokens.stream};
  with_type(tokens.type, [&](auto type) {
    using T = decltype(type);
    const auto run = can_vectorise<T>(tokens.channels, tokens.data, centres)
                         ? launch_iterations<T, kVectorSize<T>>
                         : launch_iterations<T, 1>;
    run(launch, tokens, iterations, radius, temperature, centres, responsibilities);
  });
  if (has_window) {
    // Where a token is not finite, its home cell is NaN in every channel after an iteration, while
    // an average is so in the token's channels alone.
    const int looked_at = iterations > 0 ? 1 : tokens.channels;
    launch.blocks(propagate_nan_kernel, tokens.batch * tokens.grid.windows(), kThreads, 0, centres,
                  tokens.grid, looked_at, tokens.channels);
  }
  return launch.error;
}

}  // namespace expedite_d2::cuda
