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

// Tokens of a window, padded to whole squares.
__device__ __forceinline__ int32_t padded_tokens(const WindowView& window) {
  return static_cast<int32_t>(padded_rows(window.tokens()));
}

// Whole rows of tokens that can be in cell i: pooled into it at first, later within its reach.
__device__ __forceinline__ Range cell_tokens(const WindowView& window, int32_t i, int radius) {
  const int32_t cell_row = i / window.cell_columns;
  const Range pool = window.grid.rows.pooled(cell_row, window.row);
  const Range reach = window.grid.rows.reach(cell_row, radius, window.row);
  return {min(pool.begin, reach.begin) * window.width, max(pool.end, reach.end) * window.width};
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
