// Vectorised building blocks of the CPU kernels: rows of floats, padded to full registers.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#include <ATen/cpu/vec/vec.h>

#include "geometry.h"

namespace expedite_d2::cpu {

// Rows of floats are padded with zeros to a multiple of two of the widest registers (16 floats of
// AVX-512), so that no loop over their channels needs a remainder.
constexpr int64_t kLanes = 32;

inline int64_t padded(int64_t n) {
  return (n + kLanes - 1) / kLanes * kLanes;
}

// Uninitialised floats, aligned to a cache line: whether a load crosses one must not depend on
// chance.
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<float*>(::operator new(sizeof(float) * size, kAlignment))) {}
  ~Buffer() { ::operator delete(data_, kAlignment); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* get() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  float* data_;
};

// out[i * ldo + j] = sum_c a[i * ld + c] * b[j * ld + c] for i < na, j < nb. `ld` is padded.
void dots(const float* a, int64_t na, const float* b, int64_t nb, int64_t ld, float* out,
          int64_t ldo);

// out[i * ldo + j] = sum_c (a[i * ld + c] - b[j * ld + c])^2 for i < na, j < nb. `ld` is padded.
void squared_distances(const float* a, int64_t na, const float* b, int64_t nb, int64_t ld,
                       float* out, int64_t ldo);

// out[c] = sum_r weights[r] * rows[r][c] for c < columns, in the order of r. T is float,
// at::BFloat16 or at::Half; neither the rows nor `out` need padding.
template <typename T>
void weighted_rows(const T* const* rows, const float* weights, int64_t count, int64_t columns,
                   float* out);

// The same of rows base[rows[r] * ld + c]. `columns` is padded, and readable in every row.
void weighted_rows(const int32_t* rows, const float* weights, int64_t count, const float* base,
                   int64_t ld, int64_t columns, float* out);

// out[c] = start[c] + sum_r weights[r] * (rows[r][c] - subtracted[r][c]), otherwise as the first.
template <typename T>
void add_weighted_differences(const T* start, const T* const* rows, const T* const* subtracted,
                              const float* weights, int64_t count, int64_t columns, float* out);

// exp(x) for x <= 0 to about 1e-7 relative, 0 below kMinExponent, NaN for NaN. Free of branches
// and calls, so that loops over it become vector code.
inline float exp_nonpositive(float x) {
  constexpr float kLog2e = 1.44269504f;
  constexpr float kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;  // their sum is ln 2
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer below
  const float y = x < kMinExponent ? kMinExponent : x;
  const float shifted = y * kLog2e + kRound;
  const float n = shifted - kRound;
  const float r = (y - n * kLn2High) - n * kLn2Low;  // |r| <= ln(2) / 2
  // Taylor's coefficients; the first that is left out adds less than 1e-8.
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float scale = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127u) << 23);
  return x < kMinExponent ? 0.0f : p * scale;
}

// Widens `n` values to floats and pads them.
template <typename T>
inline void load_row(const T* source, int64_t n, float* row) {
  int64_t c = 0;
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(row, source, sizeof(float) * n);
    c = n;
  } else {
    using Narrow = at::vec::Vectorized<T>;
    for (; c + Narrow::size() <= n; c += Narrow::size()) {
      const auto [low, high] = at::vec::convert_to_float<T>(Narrow::loadu(source + c));
      low.store(row + c);
      high.store(row + c + at::vec::Vectorized<float>::size());
    }
    for (; c < n; ++c) {
      row[c] = static_cast<float>(source[c]);
    }
  }
  for (const int64_t end = padded(n); c < end; ++c) {
    row[c] = 0.0f;
  }
}

// Rounds `n` floats to the type of the output.
template <typename T>
inline void store_row(const float* row, int64_t n, T* target) {
  int64_t c = 0;
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(target, row, sizeof(float) * n);
    c = n;
  } else {
    using Narrow = at::vec::Vectorized<T>;
    using Wide = at::vec::Vectorized<float>;
    for (; c + Narrow::size() <= n; c += Narrow::size()) {
      at::vec::convert_from_float<T>(Wide::loadu(row + c), Wide::loadu(row + c + Wide::size()))
          .store(target + c);
    }
    for (; c < n; ++c) {
      target[c] = static_cast<T>(row[c]);
    }
  }
}

}  // namespace expedite_d2::cpu
