// A window whose distances all follow from the Gram matrix of its tokens, and the memory that the
// kernels of token_reduce.cu and token_reduce_iterate.cu share.
#pragma once

#include "cuda/products.cuh"
#include "cuda/windows.cuh"

namespace expedite_d2::cuda {

// Of G, the squares (i, (i + n) % tiles), n = 0 ... tiles / 2, are computed: half of G, the rest is
// its mirror image. Square s is number s % (tiles / 2 + 1) of strip s / (tiles / 2 + 1).
constexpr int kSquareSize = kSquare * kSquare;
EXPEDITE_HOST_DEVICE int64_t gram_squares(int64_t padded) {
  const int64_t tiles = padded / kSquare;
  return tiles * (tiles / 2 + 1);
}

// The real tokens and existing cells of one window.
struct GramWindow {
  Grid grid;
  int64_t image;
  int32_t row;     // of windows
  int32_t column;  // of windows
  int32_t width;   // of the real tokens
  int32_t count;
  int32_t padded;  // to whole squares
  int32_t cell_columns;
  int32_t cells;

  __device__ GramWindow(const Grid& of, int64_t linear) : grid(of) {
    const Position at = position(linear, of.rows.windows(), of.columns.windows());
    image = at.image;
    row = at.row;
    column = at.column;
    width = of.columns.real(column);
    count = of.rows.real(row) * width;
    padded = static_cast<int32_t>(padded_rows(count));
    cell_columns = of.columns.existing(column);
    cells = of.rows.existing(row) * cell_columns;
  }

  // Token p of the window in (B, H, W).
  __device__ int64_t token(int32_t p) const {
    const int64_t y = image * grid.rows.size + row * grid.rows.window + p / width;
    return y * grid.columns.size + column * grid.columns.window + p % width;
  }

  // Cell i of the window in (h', w').
  __device__ int32_t cell(int32_t i) const {
    return (row * grid.rows.clusters + i / cell_columns) * grid.columns.cells() +
           column * grid.columns.clusters + i % cell_columns;
  }
  // And in (B, h', w').
  __device__ int64_t image_cell(int32_t i) const {
    return image * grid.rows.cells() * grid.columns.cells() + cell(i);
  }
};

// A range of a window's tokens.
struct Span {
  int32_t begin;
  int32_t end;
};

// Whole rows of tokens that can be in cell i: pooled into it at first, later within its reach.
__device__ __forceinline__ Span cell_span(const GramWindow& window, int32_t i, int radius) {
  const WindowAxis& rows = window.grid.rows;
  const int32_t cell_row = i / window.cell_columns;
  return {min(rows.begin(cell_row), rows.reach_begin(cell_row, radius)) * window.width,
          max(rows.end(cell_row, window.row), rows.reach_end(cell_row, radius, window.row)) *
              window.width};
}

// In device memory, for B * windows windows (and B images) of `room` floats each.
struct GramScratch {
  // The parts of G that add up to it, (splits, squares, 16, 16); later A, (K, padded).
  float* windows;
  float* means;  // (B * windows, C): the mean token of each window, 0 where it is not finite
  float* near;   // (B, windows): sums of squared distances to the nearest initial candidate
  float* away;   // (B, windows + parts): sums of squared distances to the image's mean token
  int64_t room;
  int splits;
};

// What is summed up over the windows for 32 channels each.
EXPEDITE_HOST_DEVICE int spread_parts(int channels) {
  return ceil_div(channels, kWarp);
}

// Bytes of shared memory for a block of the kernels below. The window has `padded` tokens.
size_t iterate_shared_memory(int64_t padded, int64_t cells);

// The sums for token_spread.
void launch_window_spread(Launcher& launch, const Tokens& tokens, int radius,
                          const GramScratch& scratch, size_t shared_memory);

// From G to A, and the match. With `automatic`, the temperature is divided by the spread, which is
// written, too.
void launch_window_iterate(Launcher& launch, const Tokens& tokens, const GramReduction& reduction,
                           const GramScratch& scratch, size_t shared_memory);

}  // namespace expedite_d2::cuda
