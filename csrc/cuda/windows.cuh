// Where tokens and cells lie in their windows, and the initial centres, for token_spread and
// token_cluster. The geometry itself stands in geometry.h.
#pragma once

#include "cuda/utils.cuh"

namespace expedite_d2::cuda {

// A token or a cell along one axis: its window, and its place in that window.
struct WindowPosition {
  int32_t window;
  int32_t local;
};

EXPEDITE_HOST_DEVICE WindowPosition token_position(const WindowAxis& axis, int32_t at) {
  return {at / axis.window, at % axis.window};
}

EXPEDITE_HOST_DEVICE WindowPosition cell_position(const WindowAxis& axis, int32_t at) {
  return {at / axis.clusters, at % axis.clusters};
}

// A token or a cell of all images: image, row and column.
struct Position {
  int64_t image;
  int32_t row;
  int32_t column;
};

EXPEDITE_HOST_DEVICE Position position(int64_t linear, int32_t height, int32_t width) {
  const int64_t row = linear / width;
  return {row / height, static_cast<int32_t>(row % height), static_cast<int32_t>(linear % width)};
}

// Initial centres: the average of each cell's real tokens. One warp per 32 V channels of a cell.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 1)
    pool_kernel(const T* __restrict__ tokens,  // (B, H, W, C)
                float* __restrict__ centres,   // (B, h', w', C)
                Grid grid, int channels, int64_t cells) {
  const int parts = ceil_div(channels, kWarp * V);
  const int64_t warp = global_warp();
  const int64_t cell = warp / parts;
  const int c =
      (static_cast<int>(warp % parts) * kWarp + static_cast<int>(threadIdx.x) % kWarp) * V;
  if (cell >= cells || c >= channels) {
    return;
  }
  const Position at = position(cell, grid.rows.cells(), grid.columns.cells());
  const WindowPosition row = cell_position(grid.rows, at.row);
  const WindowPosition column = cell_position(grid.columns, at.column);
  const WindowView window = window_at(grid, at.image, row.window, column.window);
  const Range rows = grid.rows.pooled(row.local, row.window);
  const Range columns = grid.columns.pooled(column.local, column.window);

  float sum[V] = {};
  for (int32_t y = rows.begin; y < rows.end; ++y) {
    for (int32_t x = columns.begin; x < columns.end; ++x) {
      float z[V];
      load<V>(tokens + window.token(y, x) * channels + c, z);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sum[v] += z[v];
      }
    }
  }
  // An existing cell holds a token, so this does not divide by zero.
  const float count = static_cast<float>(rows.size() * columns.size());
#pragma unroll
  for (int v = 0; v < V; ++v) {
    sum[v] /= count;
  }
  store<V>(centres + cell * channels + c, sum);
}

template <typename T, int V>
void launch_pool(Launcher& launch, const Tokens& tokens, float* centres) {
  const int64_t cells = cell_count(tokens.grid, tokens.batch);
  launch.warps(pool_kernel<T, V>, cells * ceil_div(tokens.channels, kWarp * V),
               static_cast<const T*>(tokens.data), centres, tokens.grid, tokens.channels, cells);
}

}  // namespace expedite_d2::cuda
