// Multi-scale deformable attention and its gradients; the reference is ms_deform_attn_ref.
//
// One head of one image at a time: its maps are written as a table of padded float rows, about the
// size of an L2 cache, and every query sums a few rows of it. The last row is zero and
// stands for all that is outside of a map, so that no inner loop has a branch.
#include <algorithm>
#include <array>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include <ATen/cpu/vec/functional.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/windows.h"

namespace expedite_d2 {
namespace {

using namespace cpu;

constexpr const char* kName = "ms_deform_attn";
constexpr int kCorners = 4;

// Sizes of one call: B images, S rows of all maps, Q queries, N = levels * points samples of a
// query and head.
struct Sizes {
  int64_t batch, rows, heads, channels, queries, samples;

  int64_t stride() const { return padded(channels); }
  // The rows that stand for the maps of one head, and the row of zeros.
  int64_t table() const { return (rows + 1) * stride(); }
  // The number of a query and head among those of all images.
  int64_t item(int64_t b, int64_t q, int64_t h) const { return (b * queries + q) * heads + h; }
};

Sizes make_sizes(const at::Tensor& value, const at::Tensor& locations) {
  return {value.size(0), value.size(1),     value.size(2),
          value.size(3), locations.size(1), locations.size(3) * locations.size(4)};
}

using Floats = at::vec::Vectorized<float>;
using Integers = at::vec::Vectorized<int32_t>;
constexpr int64_t kWidth = Floats::size();

// The four pixels around each sample of one query and head.
class Samples {
 public:
  Samples(const Sizes& sizes, at::IntArrayRef spatial_shapes, at::IntArrayRef level_start)
      : count_(sizes.samples),
        outside_(static_cast<int32_t>(sizes.rows)),
        // Whole registers are read, of maps that are all outside.
        widths_(padded(count_), 0),
        starts_(padded(count_), 0),
        sizes_(2 * padded(count_), 0.0f),
        places_(2 * padded(count_)),
        attention_(padded(count_)),
        rows_(kCorners * count_),
        weights_(kCorners * count_),
        right_(padded(count_)),
        bottom_(padded(count_)) {
    const auto levels = static_cast<int64_t>(level_start.size());
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t level = i * levels / count_;
      widths_[i] = static_cast<int32_t>(spatial_shapes[2 * level + 1]);
      starts_[i] = static_cast<int32_t>(level_start[level]);
      sizes_[2 * i] = static_cast<float>(spatial_shapes[2 * level + 1]);
      sizes_[2 * i + 1] = static_cast<float>(spatial_shapes[2 * level]);
    }
  }

  // Finds rows and weights for locations (N, 2) and attention weights (N,).
  void locate(const float* locations, const float* attention) {
    load_row(locations, 2 * count_, places_.get());
    load_row(attention, count_, attention_.get());
    for (int64_t i = 0; i < count_; i += kWidth) {
      locate_some(i);
    }
  }

  // Corner c (top left, top right, bottom left, bottom right) of sample i is entry c * N + i.
  const int32_t* rows() const { return rows_.data(); }
  const float* weights() const { return weights_.data(); }
  // Attention weight of sample i for the gradients of its location: 0 outside of its map.
  float attention(int64_t i) const { return attention_.get()[i]; }
  // How far sample i is to the right of its left corners and below its top ones, from 0 to 1; NaN
  // if its location has one.
  float right(int64_t i) const { return right_.get()[i]; }
  float bottom(int64_t i) const { return bottom_.get()[i]; }
  // Size of its map.
  float width(int64_t i) const { return sizes_[2 * i]; }
  float height(int64_t i) const { return sizes_[2 * i + 1]; }

 private:
  void locate_some(int64_t i) {
    const Floats zero(0.0f), one(1.0f), beyond(-2.0f);
    const auto [width, height] = coordinates(sizes_.data() + 2 * i);
    auto [x, y] = coordinates(places_.get() + 2 * i);
    x = at::vec::fmadd(x, width, Floats(-0.5f));
    y = at::vec::fmadd(y, height, Floats(-0.5f));
    // False for NaN and infinity, which no integer stands for.
    const Floats inside = (x > Floats(-1.0f)) & (x < width) & (y > Floats(-1.0f)) & (y < height);
    const Floats unknown = (x != x) | (y != y);
    const Floats otherwise =
        Floats::blendv(zero, Floats(std::numeric_limits<float>::quiet_NaN()), unknown);
    const Floats floor_x = x.floor(), floor_y = y.floor();
    // Beyond the map there is neither a left nor a right corner.
    const Floats left = Floats::blendv(beyond, floor_x, inside);
    const Floats top = Floats::blendv(beyond, floor_y, inside);
    const Floats right = Floats::blendv(otherwise, x - floor_x, inside);
    const Floats bottom = Floats::blendv(otherwise, y - floor_y, inside);
    right.store(right_.get() + i);
    bottom.store(bottom_.get() + i);

    const Floats has_left = left >= zero, has_right = (left > beyond) & (left + one < width);
    const Floats has_top = top >= zero, has_bottom = (top > beyond) & (top + one < height);
    const Integers step = Integers::loadu(widths_.data() + i);
    const Integers first = Integers::loadu(starts_.data() + i) +
                           at::vec::convert_to_int_of_same_size(top) * step +
                           at::vec::convert_to_int_of_same_size(left);
    const Integers next(1);
    const Floats weight = Floats::loadu(attention_.get() + i);
    // Outside of the map there is no gradient, even if the weight is NaN.
    Floats::blendv(zero, weight, inside | unknown).store(attention_.get() + i);
    const Floats above = weight * (one - bottom), below = weight * bottom;
    store_corner(0, i, first, has_top & has_left, above * (one - right));
    store_corner(1, i, first + next, has_top & has_right, above * right);
    store_corner(2, i, first + step, has_bottom & has_left, below * (one - right));
    store_corner(3, i, first + step + next, has_bottom & has_right, below * right);
  }

  // x and y of whole registers of pairs.
  static std::pair<Floats, Floats> coordinates(const float* pairs) {
    return at::vec::deinterleave2(Floats::loadu(pairs), Floats::loadu(pairs + kWidth));
  }

  void store_corner(int64_t corner, int64_t i, const Integers& rows, const Floats& exists,
                    const Floats& weights) {
    const int64_t count = std::min(kWidth, count_ - i), at = corner * count_ + i;
    Integers::blendv(Integers(outside_), rows, at::vec::cast<int32_t>(exists))
        .store(rows_.data() + at, static_cast<int>(count));
    weights.store(weights_.data() + at, static_cast<int>(count));
  }

  int64_t count_;
  int32_t outside_;
  std::vector<int32_t> widths_, starts_;
  std::vector<float> sizes_;   // width and height
  Buffer places_, attention_;  // what locate is given
  std::vector<int32_t> rows_;  // what it finds
  std::vector<float> weights_;
  Buffer right_, bottom_;
};

// Writes the maps of head h of image b, and the row of zeros.
template <typename T>
void fill_table(const Sizes& sizes, const Map<const T>& value, int64_t b, int64_t h, float* table) {
  at::parallel_for(0, sizes.rows, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      load_row(value.at(b, s, h), sizes.channels, table + s * sizes.stride());
    }
  });
  std::fill_n(table + sizes.rows * sizes.stride(), sizes.stride(), 0.0f);
}

// All queries of one head of one image.
template <typename T>
void attend_head(const Sizes& sizes, const Map<const T>& value, int64_t b, int64_t h,
                 at::IntArrayRef spatial_shapes, at::IntArrayRef level_start,
                 const float* locations, const float* weights, float* table, T* out) {
  fill_table(sizes, value, b, h, table);
  at::parallel_for(0, sizes.queries, 64, [&](int64_t begin, int64_t end) {
    Samples samples(sizes, spatial_shapes, level_start);
    const Buffer sum(sizes.stride());
    for (int64_t q = begin; q < end; ++q) {
      const int64_t item = sizes.item(b, q, h);
      samples.locate(locations + item * sizes.samples * 2, weights + item * sizes.samples);
      weighted_rows(samples.rows(), samples.weights(), kCorners * sizes.samples, table,
                    sizes.stride(), sizes.stride(), sum.get());
      store_row(sum.get(), sizes.channels, out + item * sizes.channels);
    }
  });
}

template <typename T>
void attend(const Sizes& sizes, const at::Tensor& value, at::IntArrayRef spatial_shapes,
            at::IntArrayRef level_start, const float* locations, const float* weights, T* out) {
  const auto from = read_map<T>(value);
  const int64_t heads = sizes.batch * sizes.heads, threads = at::get_num_threads();
  const auto run = [&](int64_t begin, int64_t end) {
    const Buffer table(sizes.table());
    for (int64_t i = begin; i < end; ++i) {
      attend_head(sizes, from, i / sizes.heads, i % sizes.heads, spatial_shapes, level_start,
                  locations, weights, table.get(), out);
    }
  };
  // Whole heads for each thread where that keeps all of them busy; otherwise all threads work on
  // one head after the other (a parallel loop within another one runs serially).
  if (heads % threads == 0 || heads >= 4 * threads) {
    at::parallel_for(0, heads, 1, run);
  } else {
    run(0, heads);
  }
}

// Adds weights[t] * grad to row t of the table of gradients, and returns each row's product with
// grad.
std::array<float, kCorners> scatter_gradient(const float* grad, int64_t stride, const float* table,
                                             float* grad_table, const int64_t (&offsets)[kCorners],
                                             const float (&weights)[kCorners]) {
  Floats sums[kCorners];
  for (int64_t c = 0; c < stride; c += kWidth) {
    const auto g = Floats::loadu(grad + c);
    for (int t = 0; t < kCorners; ++t) {
      sums[t] = at::vec::fmadd(g, Floats::loadu(table + offsets[t] + c), sums[t]);
    }
    // One after the other: corners outside share the last row.
    for (int t = 0; t < kCorners; ++t) {
      float* to = grad_table + offsets[t] + c;
      at::vec::fmadd(g, Floats(weights[t]), Floats::loadu(to)).store(to);
    }
  }
  std::array<float, kCorners> products{};
  for (int t = 0; t < kCorners; ++t) {
    products[t] = at::vec::vec_reduce_all<float>(
        [](const Floats& a, const Floats& b) { return a + b; }, sums[t]);
  }
  return products;
}

// A head of an image belongs to one thread, which adds up its gradients in the order of the
// queries.
template <typename T>
void differentiate(const Sizes& sizes, const T* grad, const at::Tensor& value,
                   at::IntArrayRef spatial_shapes, at::IntArrayRef level_start,
                   const float* locations, const float* weights, T* grad_value,
                   float* grad_locations, float* grad_weights) {
  const auto from = read_map<T>(value);
  const int64_t stride = sizes.stride(), n = sizes.samples;
  at::parallel_for(0, sizes.batch * sizes.heads, 1, [&](int64_t begin, int64_t end) {
    Samples samples(sizes, spatial_shapes, level_start);
    const Buffer table(sizes.table()), grad_table(sizes.table()), row(stride);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t b = index / sizes.heads, h = index % sizes.heads;
      fill_table(sizes, from, b, h, table.get());
      std::fill_n(grad_table.get(), sizes.table(), 0.0f);
      for (int64_t q = 0; q < sizes.queries; ++q) {
        const int64_t item = sizes.item(b, q, h);
        load_row(grad + item * sizes.channels, sizes.channels, row.get());
        samples.locate(locations + item * n * 2, weights + item * n);
        for (int64_t i = 0; i < n; ++i) {
          int64_t offsets[kCorners];
          float corner_weights[kCorners];
          for (int t = 0; t < kCorners; ++t) {
            offsets[t] = samples.rows()[t * n + i] * stride;
            corner_weights[t] = samples.weights()[t * n + i];
          }
          auto products = scatter_gradient(row.get(), stride, table.get(), grad_table.get(),
                                           offsets, corner_weights);
          // A pixel that does not exist adds nothing, whatever grad is, which may be NaN.
          for (int t = 0; t < kCorners; ++t) {
            products[t] = samples.rows()[t * n + i] < sizes.rows ? products[t] : 0.0f;
          }
          const float right = samples.right(i), left = 1.0f - right;
          const float bottom = samples.bottom(i), top = 1.0f - bottom;
          const float weight = samples.attention(i);
          grad_weights[item * n + i] = top * (left * products[0] + right * products[1]) +
                                       bottom * (left * products[2] + right * products[3]);
          const float along_x =
              top * (products[1] - products[0]) + bottom * (products[3] - products[2]);
          const float along_y =
              left * (products[2] - products[0]) + right * (products[3] - products[1]);
          float* to = grad_locations + (item * n + i) * 2;
          to[0] = weight * along_x * samples.width(i);
          to[1] = weight * along_y * samples.height(i);
        }
      }
      for (int64_t s = 0; s < sizes.rows; ++s) {
        store_row(grad_table.get() + s * stride, sizes.channels,
                  grad_value + ((b * sizes.rows + s) * sizes.heads + h) * sizes.channels);
      }
    }
  });
}

at::Tensor ms_deform_attn_cpu(const at::Tensor& value, at::IntArrayRef spatial_shapes,
                              at::IntArrayRef level_start, const at::Tensor& sampling_locations,
                              const at::Tensor& attention_weights) {
  check_deform(kName, value, spatial_shapes, level_start, sampling_locations, attention_weights);
  const Sizes sizes = make_sizes(value, sampling_locations);
  const at::Tensor out =
      at::empty({sizes.batch, sizes.queries, sizes.heads * sizes.channels}, value.options());
  if (out.numel() == 0) {
    return out;
  }
  const at::Tensor value_ = with_dense_channels(value);
  const at::Tensor locations_ = sampling_locations.to(at::kFloat).contiguous();
  const at::Tensor weights_ = attention_weights.to(at::kFloat).contiguous();
  with_type(value.scalar_type(), [&](auto type) {
    using T = decltype(type);
    attend<T>(sizes, value_, spatial_shapes, level_start, locations_.const_data_ptr<float>(),
              weights_.const_data_ptr<float>(), out.mutable_data_ptr<T>());
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward_cpu(
    const at::Tensor& grad, const at::Tensor& value, at::IntArrayRef spatial_shapes,
    at::IntArrayRef level_start, const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights) {
  check_deform(kName, value, spatial_shapes, level_start, sampling_locations, attention_weights);
  check_deform_gradient(kName, grad, value, sampling_locations);
  const Sizes sizes = make_sizes(value, sampling_locations);
  const auto options = value.options().dtype(at::kFloat);
  const at::Tensor grad_value = at::empty(value.sizes(), value.options());
  const at::Tensor grad_locations = at::zeros(sampling_locations.sizes(), options);
  const at::Tensor grad_weights = at::zeros(attention_weights.sizes(), options);
  if (value.numel() > 0) {
    const at::Tensor grad_ = grad.contiguous();
    const at::Tensor value_ = with_dense_channels(value);
    const at::Tensor locations_ = sampling_locations.to(at::kFloat).contiguous();
    const at::Tensor weights_ = attention_weights.to(at::kFloat).contiguous();
    with_type(value.scalar_type(), [&](auto type) {
      using T = decltype(type);
      differentiate<T>(sizes, grad_.const_data_ptr<T>(), value_, spatial_shapes, level_start,
                       locations_.const_data_ptr<float>(), weights_.const_data_ptr<float>(),
                       grad_value.mutable_data_ptr<T>(), grad_locations.mutable_data_ptr<float>(),
                       grad_weights.mutable_data_ptr<float>());
    });
  }
  return {grad_value, grad_locations.to(sampling_locations.scalar_type()),
          grad_weights.to(attention_weights.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(expedite_d2, CPU, m) {
  m.impl("ms_deform_attn", &ms_deform_attn_cpu);
  m.impl("_ms_deform_attn_backward", &ms_deform_attn_backward_cpu);
}

}  // namespace expedite_d2
