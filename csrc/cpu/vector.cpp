// The three inner loops that take the time, in two widths: the one that the whole extension is
// compiled for, and AVX-512, chosen when torch itself uses AVX-512 (ATEN_CPU_CAPABILITY overrides
// it). Sums run in a fixed order, so that the same input gives the same bits on the same machine.
#include "cpu/vector.h"

#include <algorithm>

#include <ATen/Version.h>

#define EXPEDITE_INLINE [[gnu::always_inline]] inline

namespace expedite_d2::cpu {
namespace {

// The compilers' own vectors: any alignment, any machine. They are passed by reference: by value,
// the widest would depend on how the caller is compiled.
template <int Bytes>
struct Vector {
  typedef float type __attribute__((vector_size(Bytes), aligned(4), may_alias));
};

template <int Bytes>
EXPEDITE_INLINE const typename Vector<Bytes>::type& load(const float* p) {
  return *reinterpret_cast<const typename Vector<Bytes>::type*>(p);
}

// Adds the halves until one number is left.
template <int Bytes>
EXPEDITE_INLINE float sum(const typename Vector<Bytes>::type& v) {
  if constexpr (Bytes == 8) {
    return v[0] + v[1];
  } else {
    typename Vector<Bytes / 2>::type half[2];
    std::memcpy(half, &v, Bytes);
    return sum<Bytes / 2>(half[0] + half[1]);
  }
}

// 4 x 3 sums in registers: 12 independent chains hide the latency of multiply-add, and with 7
// operands they still fit the 16 registers of AVX2. 12 rows of b stay in the first-level cache.
constexpr int kTileA = 4, kTileB = 3;
constexpr int64_t kBlockB = 12;

template <int Bytes>
EXPEDITE_INLINE void dots_body(const float* a, int64_t na, const float* b, int64_t nb, int64_t ld,
                               float* out, int64_t ldo) {
  using V = typename Vector<Bytes>::type;
  constexpr int64_t kWidth = Bytes / 4;
  for (int64_t block = 0; block < nb; block += kBlockB) {
    const int64_t block_end = std::min(block + kBlockB, nb);
    for (int64_t i = 0; i < na; i += kTileA) {
      const float* pa[kTileA];
      for (int t = 0; t < kTileA; ++t) {
        pa[t] = a + std::min(i + t, na - 1) * ld;
      }
      for (int64_t j = block; j < block_end; j += kTileB) {
        const float* pb[kTileB];
        for (int t = 0; t < kTileB; ++t) {
          pb[t] = b + std::min(j + t, nb - 1) * ld;
        }
        V sums[kTileA][kTileB] = {};
        for (int64_t c = 0; c < ld; c += kWidth) {
          V vb[kTileB];
#pragma GCC unroll 3
          for (int t = 0; t < kTileB; ++t) {
            vb[t] = load<Bytes>(pb[t] + c);
          }
#pragma GCC unroll 4
          for (int s = 0; s < kTileA; ++s) {
            const V va = load<Bytes>(pa[s] + c);
#pragma GCC unroll 3
            for (int t = 0; t < kTileB; ++t) {
              sums[s][t] += va * vb[t];
            }
          }
        }
#pragma GCC unroll 4
        for (int s = 0; s < kTileA; ++s) {
#pragma GCC unroll 3
          for (int t = 0; t < kTileB; ++t) {
            if (i + s < na && j + t < block_end) {
              out[(i + s) * ldo + j + t] = sum<Bytes>(sums[s][t]);
            }
          }
        }
      }
    }
  }
}

template <int Bytes, int Registers>
EXPEDITE_INLINE int64_t weighted_rows_part(const int32_t* rows, const float* weights, int64_t count,
                                           const float* base, int64_t ld, int64_t c,
                                           int64_t columns, float* out) {
  using V = typename Vector<Bytes>::type;
  constexpr int64_t kWidth = Bytes / 4;
  for (; c + Registers * kWidth <= columns; c += Registers * kWidth) {
    V sums[Registers] = {};
    for (int64_t r = 0; r < count; ++r) {
      const float* row = base + rows[r] * ld + c;
      const float weight = weights[r];
#pragma GCC unroll 8
      for (int t = 0; t < Registers; ++t) {
        sums[t] += weight * load<Bytes>(row + t * kWidth);
      }
    }
    std::memcpy(out + c, sums, sizeof(sums));
  }
  return c;
}

// 8 independent chains hide the latency of multiply-add; what is left over takes fewer.
template <int Bytes>
EXPEDITE_INLINE void weighted_rows_body(const int32_t* rows, const float* weights, int64_t count,
                                        const float* base, int64_t ld, int64_t columns,
                                        float* out) {
  int64_t c = 0;
  c = weighted_rows_part<Bytes, 8>(rows, weights, count, base, ld, c, columns, out);
  c = weighted_rows_part<Bytes, 4>(rows, weights, count, base, ld, c, columns, out);
  c = weighted_rows_part<Bytes, 2>(rows, weights, count, base, ld, c, columns, out);
  weighted_rows_part<Bytes, 1>(rows, weights, count, base, ld, c, columns, out);
}

template <int Bytes, int Rows>
EXPEDITE_INLINE void squared_distances_part(const float* a, const float* b, int64_t ld,
                                            float* out) {
  using V = typename Vector<Bytes>::type;
  constexpr int64_t kWidth = Bytes / 4;
  V sums[Rows] = {};
  for (int64_t c = 0; c < ld; c += kWidth) {
    const V va = load<Bytes>(a + c);
#pragma GCC unroll 8
    for (int t = 0; t < Rows; ++t) {
      const V difference = va - load<Bytes>(b + t * ld + c);
      sums[t] += difference * difference;
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < Rows; ++t) {
    out[t] = sum<Bytes>(sums[t]);
  }
}

template <int Bytes>
EXPEDITE_INLINE void squared_distances_body(const float* a, const float* b, int64_t count,
                                            int64_t ld, float* out) {
  int64_t r = 0;
  // 5 in one go: the cells of a row in the usual neighbourhood.
  for (; r + 5 <= count; r += 5) {
    squared_distances_part<Bytes, 5>(a, b + r * ld, ld, out + r);
  }
  for (; r + 2 <= count; r += 2) {
    squared_distances_part<Bytes, 2>(a, b + r * ld, ld, out + r);
  }
  for (; r < count; ++r) {
    squared_distances_part<Bytes, 1>(a, b + r * ld, ld, out + r);
  }
}

constexpr int kNarrow = 32;

#if defined(__x86_64__)
constexpr int kWide = 64;

bool wide() {
  static const bool answer = at::get_cpu_capability() == "AVX512";
  return answer;
}

[[gnu::target("avx512f")]] void dots_wide(const float* a, int64_t na, const float* b, int64_t nb,
                                          int64_t ld, float* out, int64_t ldo) {
  dots_body<kWide>(a, na, b, nb, ld, out, ldo);
}

[[gnu::target("avx512f")]] void weighted_rows_wide(const int32_t* rows, const float* weights,
                                                   int64_t count, const float* base, int64_t ld,
                                                   int64_t columns, float* out) {
  weighted_rows_body<kWide>(rows, weights, count, base, ld, columns, out);
}

[[gnu::target("avx512f")]] void squared_distances_wide(const float* a, const float* b,
                                                       int64_t count, int64_t ld, float* out) {
  squared_distances_body<kWide>(a, b, count, ld, out);
}
#endif

}  // namespace

void dots(const float* a, int64_t na, const float* b, int64_t nb, int64_t ld, float* out,
          int64_t ldo) {
#if defined(__x86_64__)
  if (wide()) {
    return dots_wide(a, na, b, nb, ld, out, ldo);
  }
#endif
  dots_body<kNarrow>(a, na, b, nb, ld, out, ldo);
}

void weighted_rows(const int32_t* rows, const float* weights, int64_t count, const float* base,
                   int64_t ld, int64_t columns, float* out) {
#if defined(__x86_64__)
  if (wide()) {
    return weighted_rows_wide(rows, weights, count, base, ld, columns, out);
  }
#endif
  weighted_rows_body<kNarrow>(rows, weights, count, base, ld, columns, out);
}

void squared_distances(const float* a, const float* b, int64_t count, int64_t ld, float* out) {
#if defined(__x86_64__)
  if (wide()) {
    return squared_distances_wide(a, b, count, ld, out);
  }
#endif
  squared_distances_body<kNarrow>(a, b, count, ld, out);
}

}  // namespace expedite_d2::cpu
