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

  // Home cell of local token `y` (0 <= y < real).
  EXPEDITE_HOST_DEVICE int32_t home(int32_t y) const { return y * clusters / window; }

  // Local tokens of cell `i` are begin(i) ... end(i, w) - 1; never empty for an existing cell.
  EXPEDITE_HOST_DEVICE int32_t begin(int32_t i) const { return i * window / clusters; }
  EXPEDITE_HOST_DEVICE int32_t end(int32_t i, int32_t w) const {
    const int32_t stop = ((i + 1) * window + clusters - 1) / clusters;
    const int32_t limit = real(w);
    return stop < limit ? stop : limit;
  }

  // Candidates of local token `y` in window `w` are the cells first(y) ... last(y, w).
  EXPEDITE_HOST_DEVICE int32_t first(int32_t y, int32_t radius) const {
    const int32_t i = home(y) - radius;
    return i > 0 ? i : 0;
  }
  EXPEDITE_HOST_DEVICE int32_t last(int32_t y, int32_t radius, int32_t w) const {
    const int32_t i = home(y) + radius;
    const int32_t limit = existing(w) - 1;
    return i < limit ? i : limit;
  }

  // The reverse: tokens of which cell `i` is a candidate are reach_begin ... reach_end - 1;
  // possibly none, where there are more cells than tokens.
  EXPEDITE_HOST_DEVICE int32_t reach_begin(int32_t i, int32_t radius) const {
    return i > radius ? ((i - radius) * window + clusters - 1) / clusters : 0;
  }
  EXPEDITE_HOST_DEVICE int32_t reach_end(int32_t i, int32_t radius, int32_t w) const {
    const int32_t limit = real(w);
    if (radius >= clusters - 1 - i) {
      return limit;
    }
    const int32_t stop = ((i + radius + 1) * window + clusters - 1) / clusters;
    return stop < limit ? stop : limit;
  }
};

// The factor of squared distances for one image. A constant image has the smallest spread there is,
// and temperature / spread may exceed the largest float: infinity times a distance of 0 would be
// NaN, as 0 times an infinite distance would be. NaN itself is passed on. For the same reason a
// softmax must subtract the smallest distance *before* it multiplies: exp(-tau * (d - d_min)).
EXPEDITE_HOST_DEVICE float effective_temperature(float temperature, float spread) {
  const float tau = temperature / spread;
  return tau > FLT_MAX ? FLT_MAX : tau < FLT_MIN ? FLT_MIN : tau;
}

// exp(x) counts as 0 below this: exp(-87) is about the smallest normal float, what lies below is
// flushed to zero on some hardware and not on other, and whether a centre keeps its value depends
// on whether its responsibilities are exactly zero. (For float64, too: the twin is the oracle.)
constexpr float kLeastExponent = -87.0f;

// token_spread never falls below this share of the mean squared distance to the image's mean token
// (plus the smallest normal float), so that images of few distinct tokens keep a finite
// temperature.
constexpr float kSpreadFloor = 1e-6f;

}  // namespace expedite_d2
