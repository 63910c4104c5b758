// Soft k-means of tokens around the cells of a grid; the reference is token_cluster_ref.
//
// Two forms of the same arithmetic. In windows, centres are convex combinations of tokens, S = A Z,
// so all distances follow from the Gram matrix G = Z Z^T:  |z_p - s_i|^2 = G_pp - 2 (A G)_ip + (A G
// A^T)_ii. Z is read once for G and once for S; the iterations touch n x n numbers, whatever the
// number of channels. Where G would cost more than the distances themselves (large windows, whole
// images), these are computed directly, only those to the candidates of each token.
#include <limits>
#include <memory>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/candidates.h"
#include "cpu/entry.h"

namespace expedite_d2 {
namespace {

using namespace cpu;

constexpr const char* kName = "token_cluster";
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct ClusterParams {
  Grid grid;
  bool has_window;
  int64_t iterations;
  int32_t radius;
  float temperature;
  const float* spread;  // one per image, or null

  float tau(int64_t batch) const {
    return effective_temperature(temperature, spread ? spread[batch] : 1.0f);
  }
};

// Adds `mean` to all rows, if there is one.
void store_centres(const float* rows, const WindowView& window, int64_t stride, const float* mean,
                   const Map<float>& centres) {
  at::parallel_for(0, window.cells(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t cell = begin; cell < end; ++cell) {
      const float* row = rows + cell * stride;
      float* to = centres.at(window.image, window.cell_top() + cell / window.cell_columns,
                             window.cell_left() + cell % window.cell_columns);
      for (int64_t c = 0; c < centres.channels; ++c) {
        to[c] = mean ? row[c] + mean[c] : row[c];
      }
    }
  });
}

// Working memory of one thread in the Gram form, for windows of up to n tokens and k cells.
struct GramMemory {
  GramMemory(int64_t n, int64_t k, int64_t channels)
      : tokens(n * channels),
        centres(k * channels),
        mean(channels),
        // Beyond the end: sums over a range of columns are rounded up to full registers.
        gram(n * padded(n) + kLanes),
        rows(k * padded(n)),
        distances(k * padded(n)),
        norms(n),
        line(padded(n)),
        smallest(padded(n)),
        total(padded(n)),
        indices(std::make_unique<int32_t[]>(n)),
        weights(n) {}

  Buffer tokens, centres, mean, gram, rows, distances, norms, line, smallest, total;
  std::unique_ptr<int32_t[]> indices;
  Buffer weights;
};

void gram_matrix(const float* tokens, int64_t n, int64_t stride, float* gram, float* norms) {
  const int64_t ld = padded(n);
  // Blocks of 12 columns, from the diagonal down; the rest is mirrored.
  for (int64_t j = 0; j < n; j += 12) {
    dots(tokens + j * stride, n - j, tokens + j * stride, std::min<int64_t>(12, n - j), stride,
         gram + j * ld + j, ld);
  }
  for (int64_t i = 0; i < n; ++i) {
    norms[i] = gram[i * ld + i];
    for (int64_t j = i + 1; j < n; ++j) {
      gram[i * ld + j] = gram[j * ld + i];
    }
  }
}

// Tokens with a weight in one row of A; `hull` holds both the cell's pool and its reach, because a
// centre without mass keeps its first average.
int64_t listed(const TokenRect& hull, int32_t width, const float* row, int32_t* indices,
               float* weights) {
  int64_t count = 0;
  for (int32_t y = hull.rows.begin; y < hull.rows.end; ++y) {
    for (int32_t x = hull.columns.begin; x < hull.columns.end; ++x) {
      const int32_t p = y * width + x;
      if (row[p] != 0.0f) {
        indices[count] = p;
        weights[count++] = row[p];
      }
    }
  }
  return count;
}

// Distances of the tokens in reach of one cell, infinity for others in the same token rows. The
// cell's weights are listed in `memory`.
void gram_distances(const TokenRect& hull, const TokenRect& reached, int32_t width, int64_t count,
                    const GramMemory& memory, int64_t n, float* distances) {
  const int64_t ld = padded(n);
  const int64_t first = static_cast<int64_t>(hull.rows.begin) * width;
  const int64_t columns = padded(static_cast<int64_t>(hull.rows.size()) * width);
  const float* gram = memory.gram.get();
  const float* weights = memory.weights.get();
  // (A G) at the token rows of the hull: everything that this cell is made of or measured against.
  float* line = memory.line.get() - first;
  weighted_rows(memory.indices.get(), weights, count, gram + first, ld, columns, line + first);
  float norm = 0.0f;
  for (int64_t r = 0; r < count; ++r) {
    norm += weights[r] * line[memory.indices[r]];
  }
  const int64_t end = static_cast<int64_t>(reached.rows.end) * width;
  for (int64_t p = static_cast<int64_t>(reached.rows.begin) * width; p < end; ++p) {
    const float distance = memory.norms.get()[p] - 2.0f * line[p] + norm;
    distances[p] = distance < 0.0f ? 0.0f : distance;
  }
  const Range across = reached.columns;
  for (int32_t y = reached.rows.begin; y < reached.rows.end; ++y) {
    std::fill_n(distances + y * width, across.begin, kInfinity);
    std::fill_n(distances + y * width + across.end, width - across.end, kInfinity);
  }
}

// One softmax over the cells for every token, in place: distances become responsibilities.
void gram_softmax(const std::vector<TokenRect>& reached, int32_t width, float tau,
                  const GramMemory& memory, int64_t n) {
  const int64_t ld = padded(n);
  float* smallest = memory.smallest.get();
  float* total = memory.total.get();
  std::fill_n(smallest, n, kInfinity);
  std::fill_n(total, n, 0.0f);
  const auto each = [&](const auto& f) {
    for (size_t cell = 0; cell < reached.size(); ++cell) {
      if (!reached[cell].empty()) {
        f(memory.distances.get() + cell * ld,
          static_cast<int64_t>(reached[cell].rows.begin) * width,
          static_cast<int64_t>(reached[cell].rows.end) * width);
      }
    }
  };
  each([&](float* distances, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      smallest[p] = distances[p] < smallest[p] ? distances[p] : smallest[p];
    }
  });
  each([&](float* distances, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      distances[p] = exp_nonpositive(-tau * (distances[p] - smallest[p]));
      total[p] += distances[p];
    }
  });
  each([&](float* distances, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      distances[p] /= total[p];
    }
  });
}

template <typename T>
void cluster_by_gram(const Map<const T>& tokens, const Map<float>& centres,
                     const WindowView& window, const ClusterParams& params, GramMemory& memory) {
  const int64_t n = window.tokens(), k = window.cells();
  const int64_t stride = padded(tokens.channels), ld = padded(n);
  const int32_t width = window.width;
  const float tau = params.tau(window.image);
  float* rows = memory.rows.get();

  load_tokens(tokens, window, 0, n, memory.tokens.get());
  centre_rows(memory.tokens.get(), n, stride, memory.mean.get());

  std::vector<TokenRect> hull(k), reached(k);
  std::fill_n(rows, k * ld, 0.0f);
  for (int64_t cell = 0; cell < k; ++cell) {
    const auto i = static_cast<int32_t>(cell / window.cell_columns);
    const auto j = static_cast<int32_t>(cell % window.cell_columns);
    const TokenRect pooled = pooled_rect(window, i, j);
    reached[cell] = reached_rect(window, i, j, params.radius);
    hull[cell] = hull_of(pooled, reached[cell]);
    for (int32_t y = pooled.rows.begin; y < pooled.rows.end; ++y) {
      std::fill_n(rows + cell * ld + y * width + pooled.columns.begin, pooled.columns.size(),
                  1.0f / static_cast<float>(pooled.size()));
    }
  }
  if (params.iterations > 0) {
    gram_matrix(memory.tokens.get(), n, stride, memory.gram.get(), memory.norms.get());
  }

  const auto list = [&](int64_t cell) {
    return listed(hull[cell], width, rows + cell * ld, memory.indices.get(), memory.weights.get());
  };
  for (int64_t iteration = 0; iteration < params.iterations; ++iteration) {
    for (int64_t cell = 0; cell < k; ++cell) {
      if (!reached[cell].empty()) {
        gram_distances(hull[cell], reached[cell], width, list(cell), memory, n,
                       memory.distances.get() + cell * ld);
      }
    }
    gram_softmax(reached, width, tau, memory, n);
    for (int64_t cell = 0; cell < k; ++cell) {
      const TokenRect& rect = reached[cell];
      const float* responsibilities = memory.distances.get() + cell * ld;
      float mass = 0.0f;
      for (int32_t y = rect.rows.begin; y < rect.rows.end; ++y) {
        for (int32_t x = rect.columns.begin; x < rect.columns.end; ++x) {
          mass += responsibilities[y * width + x];
        }
      }
      if (mass == 0.0f) {
        continue;
      }
      float* row = rows + cell * ld;
      std::fill_n(row, n, 0.0f);
      for (int32_t y = rect.rows.begin; y < rect.rows.end; ++y) {
        for (int32_t x = rect.columns.begin; x < rect.columns.end; ++x) {
          row[y * width + x] = responsibilities[y * width + x] / mass;
        }
      }
    }
  }
  for (int64_t cell = 0; cell < k; ++cell) {
    const int64_t count = list(cell);
    weighted_rows(memory.indices.get(), memory.weights.get(), count, memory.tokens.get(), stride,
                  stride, memory.centres.get() + cell * stride);
  }
  propagate_nan(memory.centres.get(), k, stride, 1);
  store_centres(memory.centres.get(), window, stride, memory.mean.get(), centres);
}

// The softmax over one token's distances.
void responsibilities(const float* distances, int64_t count, float tau, float* q) {
  float smallest = kInfinity, total = 0.0f;
  for (int64_t slot = 0; slot < count; ++slot) {
    smallest = distances[slot] < smallest ? distances[slot] : smallest;
  }
  for (int64_t slot = 0; slot < count; ++slot) {
    q[slot] = exp_nonpositive(-tau * (distances[slot] - smallest));
    total += q[slot];
  }
  for (int64_t slot = 0; slot < count; ++slot) {
    q[slot] /= total;
  }
}

// The tokens with a responsibility for a cell, and their weights in its mean; none where the cell
// has no mass.
template <typename T>
void list_members(const Map<const T>& tokens, const WindowView& window, int32_t radius,
                  const Candidates& candidates, int64_t cell, const float* q, Terms<T>& terms) {
  const auto i = static_cast<int32_t>(cell / window.cell_columns);
  const auto j = static_cast<int32_t>(cell % window.cell_columns);
  const TokenRect rect = reached_rect(window, i, j, radius);
  float mass = 0.0f;
  terms.clear();
  for (int32_t y = rect.rows.begin; y < rect.rows.end; ++y) {
    const int64_t row = i - candidates.rows[y].begin;
    const float* line = q + static_cast<int64_t>(y) * window.width * candidates.slots;
    for (int32_t x = rect.columns.begin; x < rect.columns.end; ++x) {
      const Range& across = candidates.columns[x];
      const float responsibility =
          line[x * candidates.slots + row * across.size() + j - across.begin];
      if (responsibility != 0.0f) {
        mass += responsibility;
        terms.add(token_at(tokens, window, y, x), responsibility);
      }
    }
  }
  for (float& weight : terms.weights) {
    weight /= mass;
  }
}

template <typename T>
void cluster_directly(const Map<const T>& tokens, const Map<float>& centres,
                      const WindowView& window, const ClusterParams& params) {
  const int64_t n = window.tokens(), k = window.cells(), stride = padded(tokens.channels);
  const float tau = params.tau(window.image);
  const Candidates candidates(window, params.radius);
  const int64_t slots = candidates.slots;
  Buffer s(k * stride), q(n * slots);

  initial_centres(tokens, window, s.get());
  for (int64_t iteration = 0; iteration < params.iterations; ++iteration) {
    for_each_token(tokens, window, candidates, s.get(),
                   [&](int32_t y, int32_t x, const float*, const float* distances) {
                     const int64_t p = static_cast<int64_t>(y) * window.width + x;
                     responsibilities(distances, candidates.count(y, x), tau, q.get() + p * slots);
                   });
    at::parallel_for(0, k, 4, [&](int64_t begin, int64_t end) {
      Terms<T> terms;
      for (int64_t cell = begin; cell < end; ++cell) {
        list_members(tokens, window, params.radius, candidates, cell, q.get(), terms);
        if (!terms.rows.empty()) {
          terms.sum(tokens.channels, s.get() + cell * stride);
        }
      }
    });
  }
  if (params.has_window) {
    propagate_nan(s.get(), k, stride, params.iterations > 0 ? 1 : tokens.channels);
  }
  store_centres(s.get(), window, stride, nullptr, centres);
}

// Decided by sizes alone, never by the number of threads: the two forms differ in the last bits.
bool gram_is_cheaper(const ClusterParams& params) {
  const int64_t n = static_cast<int64_t>(params.grid.rows.window) * params.grid.columns.window;
  const int64_t side = 2 * static_cast<int64_t>(params.radius) + 1;
  const int64_t slots = std::min<int64_t>(side, params.grid.rows.clusters) *
                        std::min<int64_t>(side, params.grid.columns.clusters);
  // Multiply-adds per token and channel: half a row of G, against a subtraction, a multiply-add and
  // the weighted sum for every candidate and iteration. Above 1024 tokens, G leaves the cache. A
  // whole image is best shared among the threads, which the Gram form does not do.
  return params.has_window && n <= 1024 && n / 2 < 3 * params.iterations * slots;
}

template <typename T>
void cluster(const at::Tensor& tokens, const at::Tensor& centres, const ClusterParams& params) {
  const auto from = read_map<T>(tokens);
  const auto to = write_map<float>(centres);
  const Grid& grid = params.grid;
  if (!gram_is_cheaper(params)) {
    for_each_window(grid, tokens.size(0),
                    [&](const WindowView& window) { cluster_directly(from, to, window, params); });
    return;
  }
  const int64_t n = static_cast<int64_t>(grid.rows.max_real()) * grid.columns.max_real();
  const int64_t k = static_cast<int64_t>(grid.rows.max_existing()) * grid.columns.max_existing();
  at::parallel_for(0, tokens.size(0) * grid.windows(), 1, [&](int64_t begin, int64_t end) {
    GramMemory memory(n, k, padded(from.channels));
    for (int64_t index = begin; index < end; ++index) {
      cluster_by_gram(from, to, window_at(grid, index), params, memory);
    }
  });
}

at::Tensor token_cluster_cpu(const at::Tensor& tokens, at::IntArrayRef clusters,
                             at::OptionalIntArrayRef window, int64_t iterations,
                             int64_t neighbourhood, double temperature,
                             const std::optional<at::Tensor>& spread) {
  check_tokens(kName, "tokens", tokens);
  const Grid grid = make_grid(kName, tokens, clusters, window);
  check_iterations(kName, iterations);
  check_neighbourhood(kName, neighbourhood);
  check_spread(kName, spread, tokens);
  return find_centres(tokens, grid, window.has_value(), iterations, neighbourhood, temperature,
                      spread)
      .to(tokens.scalar_type());
}

}  // namespace

at::Tensor cpu::find_centres(const at::Tensor& tokens, const Grid& grid, bool has_window,
                             int64_t iterations, int64_t neighbourhood, double temperature,
                             const std::optional<at::Tensor>& spread) {
  at::Tensor centres =
      at::empty({tokens.size(0), grid.rows.cells(), grid.columns.cells(), tokens.size(3)},
                tokens.options().dtype(at::kFloat));
  if (centres.numel() == 0) {
    return centres;
  }
  const at::Tensor tokens_ = with_dense_channels(tokens);
  const at::Tensor spread_ = spread.has_value() ? spread->contiguous() : at::Tensor();
  const ClusterParams params{grid,
                             has_window,
                             iterations,
                             static_cast<int32_t>(neighbourhood / 2),
                             static_cast<float>(temperature),
                             spread_.defined() ? spread_.const_data_ptr<float>() : nullptr};
  with_type(tokens.scalar_type(),
            [&](auto type) { cluster<decltype(type)>(tokens_, centres, params); });
  return centres;
}

TORCH_LIBRARY_IMPL(expedite_d2, CPU, m) {
  m.impl("token_cluster", &token_cluster_cpu);
}

}  // namespace expedite_d2
