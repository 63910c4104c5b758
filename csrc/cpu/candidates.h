// Initial centres, and the distances of tokens to their candidates: what token_spread and the
// direct form of token_cluster share. Tokens are read where they are, in their own type.
#pragma once

#include "cpu/windows.h"

namespace expedite_d2::cpu {

inline std::vector<Range> candidates_of(const WindowAxis& axis, int32_t window, int32_t radius) {
  std::vector<Range> ranges(axis.real(window));
  for (int32_t y = 0; y < axis.real(window); ++y) {
    ranges[y] = axis.candidates(y, radius, window);
  }
  return ranges;
}

// The candidates of every token of a window: rows[y] x columns[x], in row-major order.
struct Candidates {
  Candidates(const WindowView& window, int32_t radius)
      : rows(candidates_of(window.grid.rows, window.row, radius)),
        columns(candidates_of(window.grid.columns, window.column, radius)) {
    const auto largest = [](const std::vector<Range>& ranges) {
      int64_t size = 0;
      for (const Range& range : ranges) {
        size = std::max<int64_t>(size, range.size());
      }
      return size;
    };
    slots = largest(rows) * largest(columns);
  }

  int64_t count(int32_t y, int32_t x) const {
    return static_cast<int64_t>(rows[y].size()) * columns[x].size();
  }

  std::vector<Range> rows, columns;
  int64_t slots;  // the most that a token has
};

// The means of the tokens of each cell (cells, padded C).
template <typename T>
void initial_centres(const Map<const T>& tokens, const WindowView& window, float* centres) {
  const int64_t stride = padded(tokens.channels);
  at::parallel_for(0, window.cells(), 4, [&](int64_t begin, int64_t end) {
    Terms<T> terms;
    for (int64_t cell = begin; cell < end; ++cell) {
      const TokenRect pool = pooled_rect(window, static_cast<int32_t>(cell / window.cell_columns),
                                         static_cast<int32_t>(cell % window.cell_columns));
      const float weight = 1.0f / static_cast<float>(pool.size());
      terms.clear();
      for (int32_t y = pool.rows.begin; y < pool.rows.end; ++y) {
        for (int32_t x = pool.columns.begin; x < pool.columns.end; ++x) {
          terms.add(token_at(tokens, window, y, x), weight);
        }
      }
      terms.sum(tokens.channels, centres + cell * stride);
    }
  });
}

// Calls f(y, x, token, distances) for every token: its padded row, and its squared distances to its
// candidates. Tokens that share their home cell share their candidates, too: every centre that is
// loaded then serves several tokens.
template <typename T, typename F>
void for_each_token(const Map<const T>& tokens, const WindowView& window,
                    const Candidates& candidates, const float* centres, const F& f) {
  constexpr int64_t kTokens = 4;
  const int64_t stride = padded(tokens.channels);
  at::parallel_for(0, window.cells(), 4, [&](int64_t begin, int64_t end) {
    Buffer rows(kTokens * stride), distances(kTokens * candidates.slots);
    for (int64_t cell = begin; cell < end; ++cell) {
      const TokenRect home = reached_rect(window, static_cast<int32_t>(cell / window.cell_columns),
                                          static_cast<int32_t>(cell % window.cell_columns), 0);
      if (home.empty()) {
        continue;
      }
      const int32_t top = home.rows.begin, left = home.columns.begin;
      const Range down = candidates.rows[top], across = candidates.columns[left];
      const int64_t count = candidates.count(top, left);
      const int64_t width = home.columns.size(), size = home.size();
      for (int64_t first = 0; first < size; first += kTokens) {
        const int64_t group = std::min(kTokens, size - first);
        for (int64_t t = 0; t < group; ++t) {
          load_row(token_at(tokens, window, top + (first + t) / width, left + (first + t) % width),
                   tokens.channels, rows.get() + t * stride);
        }
        for (int64_t i = 0; i < down.size(); ++i) {
          const int64_t row = (down.begin + i) * window.cell_columns + across.begin;
          squared_distances(rows.get(), group, centres + row * stride, across.size(), stride,
                            distances.get() + i * across.size(), count);
        }
        for (int64_t t = 0; t < group; ++t) {
          f(static_cast<int32_t>(top + (first + t) / width),
            static_cast<int32_t>(left + (first + t) % width), rows.get() + t * stride,
            distances.get() + t * count);
        }
      }
    }
  });
}

}  // namespace expedite_d2::cpu
