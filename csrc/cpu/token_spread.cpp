// The mean squared distance of tokens to their nearest initial centre; the twin is
// token_spread_ref.
//
// Only the candidates of each token are measured, by differences: nothing cancels, whatever offset
// the tokens share. Partial sums have fixed places and are added in a fixed order.
#include <cfloat>
#include <limits>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/windows.h"

namespace expedite_d2 {
namespace {

using namespace cpu;

constexpr const char* kName = "token_spread";

// What is left of one window.
struct Statistics {
  float* mean;     // (padded C), its mean token
  double scatter;  // sum of squared distances to `mean`
  double nearest;  // sum of squared distances to the nearest candidate
};

// Squared distance of a token to its nearest candidate. NaN wins, so that it is seen.
float nearest_distance(const Grid& grid, const Window& window, int64_t p, int32_t radius,
                       const float* token, const float* centres, int64_t stride,
                       std::vector<float>& distances) {
  const auto y = static_cast<int32_t>(p / window.width), x = static_cast<int32_t>(p % window.width);
  const int32_t bottom = grid.rows.last(y, radius, window.row);
  const int32_t left = grid.columns.first(x, radius);
  const int32_t width = grid.columns.last(x, radius, window.column) - left + 1;
  float least = std::numeric_limits<float>::infinity();
  for (int32_t i = grid.rows.first(y, radius); i <= bottom; ++i) {
    const int64_t first = static_cast<int64_t>(i) * window.cell_columns + left;
    squared_distances(token, centres + first * stride, width, stride, distances.data());
    for (int32_t j = 0; j < width; ++j) {
      least = distances[j] < least || std::isnan(distances[j]) ? distances[j] : least;
      if (std::isnan(least)) {
        return least;
      }
    }
  }
  return least;
}

template <typename T>
void measure(const Map<const T>& tokens, const Grid& grid, const Window& window, int32_t radius,
             Statistics& out) {
  const int64_t n = window.tokens(), k = window.cells(), stride = padded(tokens.channels);
  Buffer z(n * stride), s(k * stride);
  at::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
    load_tokens(tokens, window, begin, end, z.get() + begin * stride);
  });
  at::parallel_for(0, k, 4, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> rows(n);
    Buffer weights(n);
    for (int64_t cell = begin; cell < end; ++cell) {
      const Patch patch =
          pooled_patch(grid, window, static_cast<int32_t>(cell / window.cell_columns),
                       static_cast<int32_t>(cell % window.cell_columns));
      const int64_t count = pool(patch, window.width, rows.data(), weights.get());
      weighted_rows(rows.data(), weights.get(), count, z.get(), stride, stride,
                    s.get() + cell * stride);
    }
  });
  sum_rows(z.get(), n, stride, out.mean);
  for (int64_t c = 0; c < stride; ++c) {
    out.mean[c] /= static_cast<float>(n);
  }
  // One place for every token.
  Buffer nearest(n), scatter(n);
  at::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> distances(window.cell_columns);
    for (int64_t p = begin; p < end; ++p) {
      const float* token = z.get() + p * stride;
      squared_distances(token, out.mean, 1, stride, scatter.get() + p);
      nearest.get()[p] =
          nearest_distance(grid, window, p, radius, token, s.get(), stride, distances);
    }
  });
  out.scatter = out.nearest = 0.0;
  for (int64_t p = 0; p < n; ++p) {
    out.scatter += scatter.get()[p];
    out.nearest += nearest.get()[p];
  }
}

// Joins the windows of an image; the scatter of all is that within plus that between them.
float join(const Grid& grid, const Statistics* windows, int64_t stride) {
  const int64_t count = windows_of_image(grid);
  const double tokens = static_cast<double>(grid.rows.size) * grid.columns.size;
  std::vector<double> mean(stride, 0.0);
  double nearest = 0.0, scatter = 0.0;
  for (int64_t w = 0; w < count; ++w) {
    const auto share = static_cast<double>(window_at(grid, w).tokens()) / tokens;
    for (int64_t c = 0; c < stride; ++c) {
      mean[c] += share * windows[w].mean[c];
    }
    nearest += windows[w].nearest;
    scatter += windows[w].scatter;
  }
  for (int64_t w = 0; w < count; ++w) {
    double between = 0.0;
    for (int64_t c = 0; c < stride; ++c) {
      const double difference = windows[w].mean[c] - mean[c];
      between += difference * difference;
    }
    scatter += between * static_cast<double>(window_at(grid, w).tokens());
  }
  const auto spread = static_cast<float>(nearest / tokens);
  const float least = kSpreadFloor * static_cast<float>(scatter / tokens) + FLT_MIN;
  return spread < least ? least : spread;  // a NaN stays
}

at::Tensor token_spread_cpu(const at::Tensor& tokens, at::IntArrayRef clusters,
                            at::OptionalIntArrayRef window, int64_t neighbourhood) {
  check_tokens(kName, "tokens", tokens);
  const Grid grid = make_grid(kName, tokens, clusters, window);
  check_neighbourhood(kName, neighbourhood);
  at::Tensor spread = at::empty({tokens.size(0)}, tokens.options().dtype(at::kFloat));
  if (tokens.numel() == 0) {
    return spread.zero_();
  }
  const at::Tensor tokens_ = with_dense_channels(tokens);
  const int64_t stride = padded(tokens.size(3)), count = windows_of_image(grid);
  Buffer means(tokens.size(0) * count * stride);
  std::vector<Statistics> statistics(tokens.size(0) * count);
  for (size_t w = 0; w < statistics.size(); ++w) {
    statistics[w].mean = means.get() + w * stride;
  }
  with_type(tokens.scalar_type(), [&](auto type) {
    const auto from = read_map<decltype(type)>(tokens_);
    for_each_window(grid, tokens.size(0), [&](const Window& at) {
      const int64_t index =
          at.batch * count + static_cast<int64_t>(at.row) * grid.columns.windows() + at.column;
      measure(from, grid, at, static_cast<int32_t>(neighbourhood / 2), statistics[index]);
    });
  });
  float* out = spread.mutable_data_ptr<float>();
  for (int64_t b = 0; b < tokens.size(0); ++b) {
    out[b] = join(grid, statistics.data() + b * count, stride);
  }
  return spread;
}

}  // namespace

TORCH_LIBRARY_IMPL(expedite_d2, CPU, m) {
  m.impl("token_spread", &token_spread_cpu);
}

}  // namespace expedite_d2
