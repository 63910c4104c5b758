// The nearest centres of every token, and its weights for them; the reference is token_match_ref.
//
// Distances come from products of tokens with centres, tile by tile; each tile is reduced at once
// to the nearest few of every token, so that the matrix of all distances never exists.
#include <cfloat>
#include <limits>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/entry.h"
#include "cpu/windows.h"

namespace expedite_d2 {
namespace {

using namespace cpu;

constexpr const char* kName = "token_match";
// 96 tokens of 1024 channels take 384 KiB, which leaves room in the L2 cache; all of them share one
// pass over the centres, which come from the L3 cache.
constexpr int64_t kTokens = 96;
constexpr int64_t kCentres = 48;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Match {
  float order;  // the distance, the largest float for NaN and infinity
  float distance;
  int32_t cell;  // in its window
};

// Inserts into a list sorted by distance. Cells come in ascending order, and equals stay before the
// new one: the lower index wins.
void insert(Match* best, int64_t topk, float distance, int32_t cell) {
  const float order = distance <= FLT_MAX ? distance : FLT_MAX;  // also of NaN
  if (!(order < best[topk - 1].order)) {
    return;
  }
  int64_t place = topk - 1;
  for (; place > 0 && order < best[place - 1].order; --place) {
    best[place] = best[place - 1];
  }
  best[place] = {order, distance, cell};
}

// Inserts the cells from `first` on. `products` are those of the token with them.
void insert_all(Match* best, int64_t topk, float norm, const float* norms, const float* products,
                int64_t count, int32_t first) {
  float distances[kCentres];
  const float worst = best[topk - 1].order;
  int nearer = 0;
  for (int64_t j = 0; j < count; ++j) {
    const float sum = norm + norms[j];
    // An infinite row is infinitely far, though its product may be NaN.
    const float distance = sum == kInfinity ? sum : sum - 2.0f * products[j];
    distances[j] = distance < 0.0f ? 0.0f : distance;
    nearer |= distances[j] < worst;
  }
  // Most tiles hold nothing nearer than what was found before. The list is not full yet where the
  // worst is infinite.
  if (!nearer && worst <= FLT_MAX) {
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    insert(best, topk, distances[j], first + static_cast<int32_t>(j));
  }
}

struct Outputs {
  int32_t* indices;  // (B, H, W, topk)
  float* weights;
  int64_t topk;
};

void write_matches(const Outputs& out, const WindowView& window, int64_t p, const Match* best,
                   float tau) {
  const int64_t offset = window.token(static_cast<int32_t>(p)) * out.topk;
  const auto found = std::min<int64_t>(out.topk, window.cells());
  float total = 0.0f;
  for (int64_t t = 0; t < out.topk; ++t) {
    const Match& match = best[t < found ? t : 0];
    out.indices[offset + t] = window.cell(match.cell);
    const float weight =
        t < found ? exp_nonpositive(-tau * (match.distance - best[0].distance)) : 0.0f;
    out.weights[offset + t] = weight;
    total += weight;
  }
  // What repeats the nearest has weight 0, or NaN where the others are.
  for (int64_t t = 0; t < out.topk; ++t) {
    out.weights[offset + t] /= total;
  }
}

template <typename T>
void match(const Map<const T>& tokens, const Map<const float>& centres, const WindowView& window,
           float tau, const Outputs& out) {
  const int64_t n = window.tokens(), k = window.cells(), stride = padded(tokens.channels);
  Buffer s(k * stride), norms(k), mean(stride), zero(stride);
  load_cells(centres, window, s.get());
  // Centres are means of tokens, so their mean is as good an origin as the tokens', and cheaper.
  centre_rows(s.get(), k, stride, mean.get());
  std::fill_n(zero.get(), stride, 0.0f);
  squared_distances(zero.get(), 1, s.get(), k, stride, norms.get(), k);

  const int64_t tiles = (n + kTokens - 1) / kTokens;
  at::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    Buffer z(kTokens * stride), cross(kTokens * kCentres);
    std::vector<Match> best(kTokens * out.topk);
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t begin = tile * kTokens, rows = std::min(kTokens, n - begin);
      load_tokens(tokens, window, begin, begin + rows, z.get());
      subtract_row(z.get(), rows, stride, mean.get());
      float norm[kTokens];
      squared_distances(zero.get(), 1, z.get(), rows, stride, norm, rows);
      std::fill(best.begin(), best.end(), Match{kInfinity, kInfinity, 0});
      for (int64_t start = 0; start < k; start += kCentres) {
        const int64_t columns = std::min(kCentres, k - start);
        dots(z.get(), rows, s.get() + start * stride, columns, stride, cross.get(), kCentres);
        for (int64_t p = 0; p < rows; ++p) {
          insert_all(best.data() + p * out.topk, out.topk, norm[p], norms.get() + start,
                     cross.get() + p * kCentres, columns, static_cast<int32_t>(start));
        }
      }
      for (int64_t p = 0; p < rows; ++p) {
        write_matches(out, window, begin + p, best.data() + p * out.topk, tau);
      }
    }
  });
}

std::tuple<at::Tensor, at::Tensor> token_match_cpu(const at::Tensor& tokens,
                                                   const at::Tensor& centres,
                                                   at::IntArrayRef clusters,
                                                   at::OptionalIntArrayRef window, int64_t topk,
                                                   double temperature,
                                                   const std::optional<at::Tensor>& spread) {
  check_tokens(kName, "tokens", tokens);
  const Grid grid = make_grid(kName, tokens, clusters, window);
  check_same_device(kName, "centres", centres, "tokens", tokens);
  check_same_type(kName, "centres", centres, "tokens", tokens);
  check_shape(kName, "centres", centres,
              {tokens.size(0), grid.rows.cells(), grid.columns.cells(), tokens.size(3)});
  check_topk(kName, topk);
  check_spread(kName, spread, tokens);
  return find_matches(tokens, centres.to(at::kFloat), grid, topk, temperature, spread);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> cpu::find_matches(const at::Tensor& tokens,
                                                     const at::Tensor& centres, const Grid& grid,
                                                     int64_t topk, double temperature,
                                                     const std::optional<at::Tensor>& spread) {
  const int64_t batch = tokens.size(0), height = tokens.size(1), width = tokens.size(2);
  at::Tensor indices = at::empty({batch, height, width, topk}, tokens.options().dtype(at::kInt));
  at::Tensor weights = at::empty({batch, height, width, topk}, tokens.options().dtype(at::kFloat));
  if (indices.numel() == 0) {
    return {indices, weights};
  }
  const at::Tensor tokens_ = with_dense_channels(tokens);
  const at::Tensor centres_ = with_dense_channels(centres);
  const at::Tensor spread_ = spread.has_value() ? spread->contiguous() : at::Tensor();
  const float* spreads = spread_.defined() ? spread_.const_data_ptr<float>() : nullptr;
  const Outputs out{indices.mutable_data_ptr<int32_t>(), weights.mutable_data_ptr<float>(), topk};
  with_type(tokens.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto from = read_map<T>(tokens_);
    const auto to = read_map<float>(centres_);
    for_each_window(grid, batch, [&](const WindowView& at) {
      const float tau = effective_temperature(static_cast<float>(temperature),
                                              spreads ? spreads[at.image] : 1.0f);
      match(from, to, at, tau, out);
    });
  });
  return {indices, weights};
}

TORCH_LIBRARY_IMPL(expedite_d2, CPU, m) {
  m.impl("token_match", &token_match_cpu);
}

}  // namespace expedite_d2
