// Window and cell geometry, shared by the CPU and the CUDA kernels. Plain integers, no ATen.
//
// One WindowAxis describes rows, another columns. Windows of `window` tokens tile the axis from its
// start; the last one may be ragged (fewer real tokens than `window`). Every window is divided into
// `clusters` cells; of a ragged window only the cells that hold a real token exist, so the cells of
// all windows laid side by side are a map of ceil(size * clusters / window) cells.
#pragma once

#include <cfloat>
#include <cstdint>

#if defined(__CUDACC__)
#define EXPEDITE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define EXPEDITE_HOST_DEVICE inline
#endif

namespace expedite_d2 {

// begin ... end - 1; empty if end <= begin.
struct Range {
  int32_t begin;
  int32_t end;

  EXPEDITE_HOST_DEVICE int32_t size() const { return end > begin ? end - begin : 0; }
  EXPEDITE_HOST_DEVICE bool contains(int32_t at) const { return begin <= at && at < end; }
};

struct WindowAxis {
  // 32-bit arithmetic: the public functions admit only sizes whose products with `clusters` fit.
  int32_t size;      // tokens along the axis (H or W)
  int32_t window;    // tokens of a window along the axis (M); `size` when there are no windows
  int32_t clusters;  // cells of a window along the axis (m); may exceed `window`

  EXPEDITE_HOST_DEVICE int32_t windows() const { return (size + window - 1) / window; }

  // Cells along the whole axis (h' or w').
  EXPEDITE_HOST_DEVICE int32_t cells() const { return (size * clusters + window - 1) / window; }

  // Real tokens of window `w`.
  EXPEDITE_HOST_DEVICE int32_t real(int32_t w) const {
    const int32_t left = size - w * window;
    return left < window ? left : window;
  }

  // Existing cells of window `w`: always a prefix 0 ... n-1 of its `clusters` cells.
  EXPEDITE_HOST_DEVICE int32_t existing(int32_t w) const {
    return (real(w) * clusters + window - 1) / window;
  }

  // The most real tokens and existing cells that a window has.
  EXPEDITE_HOST_DEVICE int32_t max_real() const { return size < window ? size : window; }
  EXPEDITE_HOST_DEVICE int32_t max_existing() const {
    const int32_t all = cells();
    return all < clusters ? all : clusters;
  }

  // Home cell of local token `y` (0 <= y < real).
  EXPEDITE_HOST_DEVICE int32_t home(int32_t y) const { return y * clusters / window; }

  // Local tokens that are averaged into cell `i` at first: at least one for an existing cell.
  EXPEDITE_HOST_DEVICE Range pooled(int32_t i, int32_t w) const {
    const int32_t stop = ((i + 1) * window + clusters - 1) / clusters;
    const int32_t limit = real(w);
    return {i * window / clusters, stop < limit ? stop : limit};
  }

  // Cells that are candidates of local token `y` in window `w`. The first is the same in all
  // windows.
  EXPEDITE_HOST_DEVICE int32_t first_candidate(int32_t y, int32_t radius) const {
    const int32_t i = home(y) - radius;
    return i > 0 ? i : 0;
  }
  EXPEDITE_HOST_DEVICE Range candidates(int32_t y, int32_t radius, int32_t w) const {
    const int32_t last = home(y) + radius;
    const int32_t limit = existing(w) - 1;
    return {first_candidate(y, radius), (last < limit ? last : limit) + 1};
  }

  // The reverse: local tokens of which cell `i` is a candidate; possibly none, where there are more
  // cells than tokens.
  EXPEDITE_HOST_DEVICE Range reach(int32_t i, int32_t radius, int32_t w) const {
    const int32_t start = i > radius ? ((i - radius) * window + clusters - 1) / clusters : 0;
    const int32_t limit = real(w);
    if (radius >= clusters - 1 - i) {
      return {start, limit};
    }
    const int32_t stop = ((i + radius + 1) * window + clusters - 1) / clusters;
    return {start, stop < limit ? stop : limit};
  }
};

// The windows and cells of a token grid.
struct Grid {
  WindowAxis rows;
  WindowAxis columns;

  // Of one image.
  EXPEDITE_HOST_DEVICE int64_t windows() const {
    return int64_t{rows.windows()} * columns.windows();
  }
};

// One window of one image: its real tokens and its existing cells, both in row-major order. To be
// made by window_at.
struct WindowView {
  Grid grid;
  int64_t image;
  int32_t row, column;              // among the image's windows
  int32_t height, width;            // of the real tokens
  int32_t cell_rows, cell_columns;  // that exist
  int32_t map_columns;              // cells in a row of the map of all windows (w')
  int32_t first_cell;               // in (h', w')
  int64_t first_token;              // in (B, H, W)
  int64_t first_of_map;             // first cell of the image in (B, h', w')

  EXPEDITE_HOST_DEVICE int32_t tokens() const { return height * width; }
  EXPEDITE_HOST_DEVICE int32_t cells() const { return cell_rows * cell_columns; }

  // The window's first token in its image, and its first cell in the map of all windows.
  EXPEDITE_HOST_DEVICE int32_t top() const { return row * grid.rows.window; }
  EXPEDITE_HOST_DEVICE int32_t left() const { return column * grid.columns.window; }
  EXPEDITE_HOST_DEVICE int32_t cell_top() const { return row * grid.rows.clusters; }
  EXPEDITE_HOST_DEVICE int32_t cell_left() const { return column * grid.columns.clusters; }

  // A token of the window in (B, H, W).
  EXPEDITE_HOST_DEVICE int64_t token(int32_t y, int32_t x) const {
    return first_token + int64_t{y} * grid.columns.size + x;
  }
  EXPEDITE_HOST_DEVICE int64_t token(int32_t p) const { return token(p / width, p % width); }

  // A cell of the window in (h', w').
  EXPEDITE_HOST_DEVICE int32_t cell(int32_t i, int32_t j) const {
    return first_cell + i * map_columns + j;
  }
  EXPEDITE_HOST_DEVICE int32_t cell(int32_t i) const {
    return cell(i / cell_columns, i % cell_columns);
  }

  // And in (B, h', w').
  EXPEDITE_HOST_DEVICE int64_t centre(int32_t i, int32_t j) const {
    return first_of_map + cell(i, j);
  }
  EXPEDITE_HOST_DEVICE int64_t centre(int32_t i) const { return first_of_map + cell(i); }

  // Home cell of token p.
  EXPEDITE_HOST_DEVICE int32_t home(int32_t p) const {
    return grid.rows.home(p / width) * cell_columns + grid.columns.home(p % width);
  }
};

EXPEDITE_HOST_DEVICE WindowView window_at(const Grid& grid, int64_t image, int32_t row,
                                          int32_t column) {
  WindowView view;
  view.grid = grid;
  view.image = image;
  view.row = row;
  view.column = column;
  view.height = grid.rows.real(row);
  view.width = grid.columns.real(column);
  view.cell_rows = grid.rows.existing(row);
  view.cell_columns = grid.columns.existing(column);
  view.map_columns = grid.columns.cells();
  view.first_cell = view.cell_top() * view.map_columns + view.cell_left();
  view.first_of_map = image * grid.rows.cells() * view.map_columns;
  view.first_token = (image * grid.rows.size + view.top()) * grid.columns.size + view.left();
  return view;
}

// Window number `linear` of (B, rows of windows, columns of windows).
EXPEDITE_HOST_DEVICE WindowView window_at(const Grid& grid, int64_t linear) {
  const int32_t rows = grid.rows.windows(), columns = grid.columns.windows();
  const int64_t line = linear / columns;
  return window_at(grid, line / rows, static_cast<int32_t>(line % rows),
                   static_cast<int32_t>(linear % columns));
}

// The factor of squared distances for one image. A constant image has the smallest possible spread,
// and temperature / spread may exceed the largest float: infinity times a distance of 0 would be
// NaN, as 0 times an infinite distance would be. NaN itself is passed on. For the same reason a
// softmax must subtract the smallest distance *before* it multiplies: exp(-tau * (d - d_min)).
EXPEDITE_HOST_DEVICE float effective_temperature(float temperature, float spread) {
  const float tau = temperature / spread;
  return tau > FLT_MAX ? FLT_MAX : tau < FLT_MIN ? FLT_MIN : tau;
}

// exp(x) counts as 0 below this: exp(-87) is about the smallest normal float; what lies below is
// flushed to zero on some hardware and not on others, and whether a centre keeps its value depends
// on whether its responsibilities are exactly zero. (For float64, too: the reference is the
// oracle.)
constexpr float kMinExponent = -87.0f;

// token_spread never falls below this fraction of the mean squared distance to the image's mean
// token (plus the smallest normal float), so that images of few distinct tokens keep a finite
// temperature.
constexpr float kSpreadFloor = 1e-6f;

}  // namespace expedite_d2
