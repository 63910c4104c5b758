// What token_reduce.cu and token_reduce_iterate.cu share: the layout of Gram matrices in device
// memory and the launches of the latter.
#pragma once

#include "cuda/products.cuh"
#include "cuda/windows.cuh"

namespace expedite_d2::cuda {

// Of G, the MMA tiles (i, (i + n) % strips), n = 0 ... strips / 2, are computed: half of G, the
// rest is its mirror image. Tile t is number t % (strips / 2 + 1) of strip t / (strips / 2 + 1).
constexpr int kMmaTileSize = kMmaTile * kMmaTile;
EXPEDITE_HOST_DEVICE int64_t gram_tiles(int64_t padded) {
  const int64_t strips = padded / kMmaTile;
  return strips * (strips / 2 + 1);
}

// Tokens of a window, padded to whole tiles.
__device__ __forceinline__ int32_t padded_tokens(const WindowView& window) {
  return static_cast<int32_t>(padded_rows(window.tokens()));
}

// Tokens that can contribute to cell i, as whole rows: those averaged into it at first, and those
// of which it is a candidate.
__device__ __forceinline__ Range cell_tokens(const WindowView& window, int32_t i, int radius) {
  const int32_t cell_row = i / window.cell_columns;
  const Range pool = window.grid.rows.pooled(cell_row, window.row);
  const Range reach = window.grid.rows.reach(cell_row, radius, window.row);
  return {min(pool.begin, reach.begin) * window.width, max(pool.end, reach.end) * window.width};
}

// In device memory, for B * windows windows (and B images) of `floats_per_window` floats each.
struct GramScratch {
  // Partial sums of G, (splits, tiles, 16, 16); later A, (K, padded).
  float* windows;
  float* means;         // (B * windows, C): the mean token of each window, 0 where it is not finite
  float* nearest_sums;  // (B, windows): sums of squared distances to the nearest initial candidate
  float*
      deviation_sums;  // (B, windows + parts): sums of squared distances to the image's mean token
  int64_t floats_per_window;
  int splits;
};

// Parts of the channels, 32 each, whose sums over the windows of an image are computed separately.
EXPEDITE_HOST_DEVICE int spread_parts(int channels) {
  return ceil_div(channels, kWarp);
}

// Bytes of shared memory of a block of the kernels below, for a window of `padded` tokens.
size_t iterate_shared_memory(int64_t padded, int64_t cells);

// The sums for token_spread.
void launch_window_spread(Launcher& launch, const Tokens& tokens, int radius,
                          const GramScratch& scratch, size_t shared_memory);

// From G to A, and the match. With `automatic`, also writes the spread and divides the temperature
// by it.
void launch_window_iterate(Launcher& launch, const Tokens& tokens, const ReduceParams& params,
                           const GramScratch& scratch, size_t shared_memory);

}  // namespace expedite_d2::cuda
