// Initial centres, and the distances of tokens to their candidates: what token_spread and the
// direct form of token_cluster share. Tokens are read where they are, in their own type.
#pragma once

#include "cpu/windows.h"

namespace expedite_d2::cpu {

// Cells first ... first + count - 1 along an axis.
struct Span {
  int32_t first, count;
};

inline std::vector<Span> candidate_spans(const WindowAxis& axis, int32_t window, int32_t radius) {
  std::vector<Span> spans(axis.real(window));
  for (int32_t y = 0; y < axis.real(window); ++y) {
    const int32_t first = axis.first(y, radius);
    spans[y] = {first, axis.last(y, radius, window) - first + 1};
  }
  return spans;
}

// The candidates of every token of a window: rows[y] x columns[x], in row-major order.
struct Candidates {
  Candidates(const Grid& grid, const Window& window, int32_t radius)
      : rows(candidate_spans(grid.rows, window.row, radius)),
        columns(candidate_spans(grid.columns, window.column, radius)) {
    const auto most = [](const std::vector<Span>& spans) {
      int64_t count = 0;
      for (const Span& span : spans) {
        count = std::max<int64_t>(count, span.count);
      }
      return count;
    };
    slots = most(rows) * most(columns);
  }

  int64_t count(int32_t y, int32_t x) const {
    return static_cast<int64_t>(rows[y].count) * columns[x].count;
  }

  std::vector<Span> rows, columns;
  int64_t slots;  // the most that a token has
};

// The means of the tokens of each cell (cells, padded C).
template <typename T>
void initial_centres(const Map<const T>& tokens, const Grid& grid, const Window& window,
                     float* centres) {
  const int64_t stride = padded(tokens.channels);
  at::parallel_for(0, window.cells(), 4, [&](int64_t begin, int64_t end) {
    Terms<T> terms;
    for (int64_t cell = begin; cell < end; ++cell) {
      const Patch patch =
          pooled_patch(grid, window, static_cast<int32_t>(cell / window.cell_columns),
                       static_cast<int32_t>(cell % window.cell_columns));
      const float weight = 1.0f / static_cast<float>(patch.size());
      terms.clear();
      for (int32_t y = patch.top; y < patch.bottom; ++y) {
        for (int32_t x = patch.left; x < patch.right; ++x) {
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
void for_each_token(const Map<const T>& tokens, const Grid& grid, const Window& window,
                    const Candidates& candidates, const float* centres, const F& f) {
  constexpr int64_t kTokens = 4;
  const int64_t stride = padded(tokens.channels);
  at::parallel_for(0, window.cells(), 4, [&](int64_t begin, int64_t end) {
    Buffer rows(kTokens * stride), distances(kTokens * candidates.slots);
    for (int64_t cell = begin; cell < end; ++cell) {
      const Patch home =
          reached_patch(grid, window, static_cast<int32_t>(cell / window.cell_columns),
                        static_cast<int32_t>(cell % window.cell_columns), 0);
      if (home.empty()) {
        continue;
      }
      const Span down = candidates.rows[home.top], across = candidates.columns[home.left];
      const int64_t count = candidates.count(home.top, home.left);
      const int64_t width = home.right - home.left, size = home.size();
      for (int64_t first = 0; first < size; first += kTokens) {
        const int64_t group = std::min(kTokens, size - first);
        for (int64_t t = 0; t < group; ++t) {
          load_row(token_at(tokens, window, home.top + (first + t) / width,
                            home.left + (first + t) % width),
                   tokens.channels, rows.get() + t * stride);
        }
        for (int64_t i = 0; i < down.count; ++i) {
          const int64_t row = (down.first + i) * window.cell_columns + across.first;
          squared_distances(rows.get(), group, centres + row * stride, across.count, stride,
                            distances.get() + i * across.count, count);
        }
        for (int64_t t = 0; t < group; ++t) {
          f(static_cast<int32_t>(home.top + (first + t) / width),
            static_cast<int32_t>(home.left + (first + t) % width), rows.get() + t * stride,
            distances.get() + t * count);
        }
      }
    }
  });
}

}  // namespace expedite_d2::cpu
