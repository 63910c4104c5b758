// The windows of a batch, and their tokens as rows of floats.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "checks.h"
#include "cpu/vector.h"

namespace expedite_d2::cpu {

// Calls f(index) for every image or window. Many are divided among the threads; few, which would
// divide unevenly, are processed one after the other, and `f` uses all threads by at::parallel_for
// (which runs serially within a parallel region). Results must not depend on which of the two it
// is.
template <typename F>
void for_each_index(int64_t count, const F& f) {
  if (count >= 8 * at::get_num_threads()) {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        f(index);
      }
    });
    return;
  }
  for (int64_t index = 0; index < count; ++index) {
    f(index);
  }
}

// Calls f(window) for every window of the batch.
template <typename F>
void for_each_window(const Grid& grid, int64_t batch, const F& f) {
  for_each_index(batch * grid.windows(), [&](int64_t index) { f(window_at(grid, index)); });
}

// Calls f with a value of the C++ type; check_tokens has admitted only these three.
template <typename F>
void with_type(at::ScalarType type, const F& f) {
  if (type == at::kFloat) {
    f(float{});
  } else if (type == at::kHalf) {
    f(at::Half{});
  } else {
    f(at::BFloat16{});
  }
}

// Tokens or cells (B, height, width, C) whose channels lie side by side; other strides are free.
template <typename T>
struct Map {
  T* data;
  int64_t batch_stride, row_stride, column_stride, channels;

  T* at(int64_t batch, int64_t row, int64_t column) const {
    return data + batch * batch_stride + row * row_stride + column * column_stride;
  }
};

template <typename T>
const T* token_at(const Map<const T>& tokens, const WindowView& window, int64_t y, int64_t x) {
  return tokens.at(window.image, window.top() + y, window.left() + x);
}

// Keeps any strides but those of the channels, for which it copies.
inline at::Tensor with_dense_channels(const at::Tensor& map) {
  return map.size(3) == 1 || map.stride(3) == 1 ? map : map.contiguous();
}

template <typename T>
Map<const T> read_map(const at::Tensor& map) {
  return {map.const_data_ptr<T>(), map.stride(0), map.stride(1), map.stride(2), map.size(3)};
}

template <typename T>
Map<T> write_map(const at::Tensor& map) {
  return {map.mutable_data_ptr<T>(), map.stride(0), map.stride(1), map.stride(2), map.size(3)};
}

// Tokens begin ... end - 1 of a window as padded rows.
template <typename T>
void load_tokens(const Map<const T>& tokens, const WindowView& window, int64_t begin, int64_t end,
                 float* rows) {
  const int64_t stride = padded(tokens.channels);
  for (int64_t p = begin; p < end; ++p) {
    load_row(token_at(tokens, window, p / window.width, p % window.width), tokens.channels,
             rows + (p - begin) * stride);
  }
}

// All cells of a window as padded rows.
template <typename T>
void load_cells(const Map<const T>& cells, const WindowView& window, float* rows) {
  const int64_t stride = padded(cells.channels);
  for (int32_t i = 0; i < window.cell_rows; ++i) {
    for (int32_t j = 0; j < window.cell_columns; ++j, rows += stride) {
      load_row(cells.at(window.image, window.cell_top() + i, window.cell_left() + j),
               cells.channels, rows);
    }
  }
}

inline void sum_rows(const float* rows, int64_t count, int64_t stride, float* sum) {
  std::fill_n(sum, stride, 0.0f);
  for (int64_t r = 0; r < count; ++r) {
    const float* row = rows + r * stride;
    for (int64_t c = 0; c < stride; ++c) {
      sum[c] += row[c];
    }
  }
}

inline void subtract_row(float* rows, int64_t count, int64_t stride, const float* subtracted) {
  for (int64_t r = 0; r < count; ++r) {
    float* row = rows + r * stride;
    for (int64_t c = 0; c < stride; ++c) {
      row[c] -= subtracted[c];
    }
  }
}

// Subtracts the rows' mean, the origin that keeps expanded squared distances accurate when all
// tokens share a large offset, and leaves it in `mean`. A component that is not finite is not
// subtracted: one bad token must not spoil distances that do not involve it.
inline void centre_rows(float* rows, int64_t count, int64_t stride, float* mean) {
  sum_rows(rows, count, stride, mean);
  for (int64_t c = 0; c < stride; ++c) {
    mean[c] = std::isfinite(mean[c]) ? mean[c] / static_cast<float>(count) : 0.0f;
  }
  subtract_row(rows, count, stride, mean);
}

// Makes all centres of a window NaN if one is not finite, because one of the tokens is not. The
// first `channels` are looked at: one after an iteration, which leaves the token's home cell NaN in
// every channel, but all of an average.
inline void propagate_nan(float* rows, int64_t cells, int64_t stride, int64_t channels) {
  for (int64_t cell = 0; cell < cells; ++cell) {
    const float* row = rows + cell * stride;
    if (!std::all_of(row, row + channels, [](float x) { return std::isfinite(x); })) {
      std::fill_n(rows, cells * stride, std::numeric_limits<float>::quiet_NaN());
      return;
    }
  }
}

// Tokens of a window: some of its rows and some of its columns.
struct TokenRect {
  Range rows, columns;

  bool empty() const { return rows.size() == 0 || columns.size() == 0; }
  int64_t size() const { return static_cast<int64_t>(rows.size()) * columns.size(); }
};

// The tokens that are averaged into a cell at first.
inline TokenRect pooled_rect(const WindowView& window, int32_t i, int32_t j) {
  return {window.grid.rows.pooled(i, window.row), window.grid.columns.pooled(j, window.column)};
}

// The tokens of which a cell is a candidate.
inline TokenRect reached_rect(const WindowView& window, int32_t i, int32_t j, int32_t radius) {
  return {window.grid.rows.reach(i, radius, window.row),
          window.grid.columns.reach(j, radius, window.column)};
}

inline Range hull_of(const Range& a, const Range& b) {
  return {std::min(a.begin, b.begin), std::max(a.end, b.end)};
}

// The smallest rectangle that holds both.
inline TokenRect hull_of(const TokenRect& a, const TokenRect& b) {
  if (a.empty() || b.empty()) {
    return a.empty() ? b : a;
  }
  return {hull_of(a.rows, b.rows), hull_of(a.columns, b.columns)};
}

// Rows and their weights in a sum.
template <typename T>
struct Terms {
  std::vector<const T*> rows;
  std::vector<float> weights;

  void clear() {
    rows.clear();
    weights.clear();
  }
  void add(const T* row, float weight) {
    rows.push_back(row);
    weights.push_back(weight);
  }
  // out (padded columns)
  void sum(int64_t columns, float* out) const {
    weighted_rows(rows.data(), weights.data(), static_cast<int64_t>(rows.size()), columns, out);
    std::fill(out + columns, out + padded(columns), 0.0f);
  }
};

}  // namespace expedite_d2::cpu
