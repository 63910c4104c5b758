// The mean squared distance of tokens to their nearest initial centre; the reference is
// token_spread_ref.
//
// Only the candidates of each token are measured, by differences: nothing cancels, whatever offset
// the tokens share. Partial sums have fixed places and are added in a fixed order.
#include <cfloat>
#include <limits>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/candidates.h"
#include "cpu/entry.h"

namespace expedite_d2 {
namespace {

using namespace cpu;

constexpr const char* kName = "token_spread";

// The sums of one window.
struct Statistics {
  float* mean;     // (padded C), its mean token
  double scatter;  // sum of squared distances to `mean`
  double nearest;  // sum of squared distances to the nearest candidate
};

// The smallest of a token's distances, or NaN if there is one.
float min_or_nan(const float* distances, int64_t count) {
  float smallest = std::numeric_limits<float>::infinity();
  for (int64_t slot = 0; slot < count && !std::isnan(smallest); ++slot) {
    smallest =
        distances[slot] < smallest || std::isnan(distances[slot]) ? distances[slot] : smallest;
  }
  return smallest;
}

// The mean of a window's tokens: of every row of tokens first, then of these.
template <typename T>
void mean_token(const Map<const T>& tokens, const WindowView& window, float* mean) {
  const int64_t stride = padded(tokens.channels);
  Buffer rows(window.height * stride);
  at::parallel_for(0, window.height, 1, [&](int64_t begin, int64_t end) {
    Terms<T> terms;
    for (int64_t y = begin; y < end; ++y) {
      terms.clear();
      for (int64_t x = 0; x < window.width; ++x) {
        terms.add(token_at(tokens, window, y, x), 1.0f);
      }
      terms.sum(tokens.channels, rows.get() + y * stride);
    }
  });
  sum_rows(rows.get(), window.height, stride, mean);
  for (int64_t c = 0; c < stride; ++c) {
    mean[c] /= static_cast<float>(window.tokens());
  }
}

template <typename T>
void measure(const Map<const T>& tokens, const WindowView& window, int32_t radius,
             Statistics& out) {
  const int64_t n = window.tokens(), stride = padded(tokens.channels);
  const Candidates candidates(window, radius);
  Buffer s(window.cells() * stride);
  initial_centres(tokens, window, s.get());
  mean_token(tokens, window, out.mean);
  // One place for every token.
  Buffer nearest(n), scatter(n);
  for_each_token(tokens, window, candidates, s.get(),
                 [&](int32_t y, int32_t x, const float* token, const float* distances) {
                   const int64_t p = static_cast<int64_t>(y) * window.width + x;
                   squared_distances(token, 1, out.mean, 1, stride, scatter.get() + p, 1);
                   nearest.get()[p] = min_or_nan(distances, candidates.count(y, x));
                 });
  out.scatter = out.nearest = 0.0;
  for (int64_t p = 0; p < n; ++p) {
    out.scatter += scatter.get()[p];
    out.nearest += nearest.get()[p];
  }
}

// Joins the windows of an image: the total scatter is that within the windows plus that between
// them.
float join(const Grid& grid, const Statistics* windows, int64_t stride) {
  const int64_t count = grid.windows();
  const double tokens = static_cast<double>(grid.rows.size) * grid.columns.size;
  std::vector<double> mean(stride, 0.0);
  double nearest = 0.0, scatter = 0.0;
  for (int64_t w = 0; w < count; ++w) {
    const auto fraction = static_cast<double>(window_at(grid, w).tokens()) / tokens;
    for (int64_t c = 0; c < stride; ++c) {
      mean[c] += fraction * windows[w].mean[c];
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
  const float floor = kSpreadFloor * static_cast<float>(scatter / tokens) + FLT_MIN;
  return spread < floor ? floor : spread;  // a NaN stays
}

at::Tensor token_spread_cpu(const at::Tensor& tokens, at::IntArrayRef clusters,
                            at::OptionalIntArrayRef window, int64_t neighbourhood) {
  check_tokens(kName, "tokens", tokens);
  const Grid grid = make_grid(kName, tokens, clusters, window);
  check_neighbourhood(kName, neighbourhood);
  return measure_spread(tokens, grid, neighbourhood);
}

}  // namespace

at::Tensor cpu::measure_spread(const at::Tensor& tokens, const Grid& grid, int64_t neighbourhood) {
  at::Tensor spread = at::empty({tokens.size(0)}, tokens.options().dtype(at::kFloat));
  if (tokens.numel() == 0) {
    return spread.zero_();
  }
  const at::Tensor tokens_ = with_dense_channels(tokens);
  const int64_t stride = padded(tokens.size(3)), count = grid.windows();
  Buffer means(tokens.size(0) * count * stride);
  std::vector<Statistics> statistics(tokens.size(0) * count);
  for (size_t w = 0; w < statistics.size(); ++w) {
    statistics[w].mean = means.get() + w * stride;
  }
  with_type(tokens.scalar_type(), [&](auto type) {
    const auto from = read_map<decltype(type)>(tokens_);
    for_each_window(grid, tokens.size(0), [&](const WindowView& at) {
      const int64_t index =
          at.image * count + static_cast<int64_t>(at.row) * grid.columns.windows() + at.column;
      measure(from, at, static_cast<int32_t>(neighbourhood / 2), statistics[index]);
    });
  });
  float* out = spread.mutable_data_ptr<float>();
  for (int64_t b = 0; b < tokens.size(0); ++b) {
    out[b] = join(grid, statistics.data() + b * count, stride);
  }
  return spread;
}

TORCH_LIBRARY_IMPL(expedite_d2, CPU, m) {
  m.impl("token_spread", &token_spread_cpu);
}

}  // namespace expedite_d2
