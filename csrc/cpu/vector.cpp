// The inner loops that take the time, in two widths: the one that the whole extension is compiled
// for, and AVX-512, chosen when torch itself uses AVX-512 (ATEN_CPU_CAPABILITY overrides it). Sums
// run in a fixed order, so that the same input gives the same bits on the same machine.
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
  typedef float floats __attribute__((vector_size(Bytes), aligned(4), may_alias));
  typedef uint32_t bits __attribute__((vector_size(Bytes), aligned(4), may_alias));
};

template <int Bytes>
using Floats = typename Vector<Bytes>::floats;
template <int Bytes>
using Bits = typename Vector<Bytes>::bits;

template <int Bytes>
EXPEDITE_INLINE void load(const float* p, Floats<Bytes>& out) {
  out = *reinterpret_cast<const Floats<Bytes>*>(p);
}

// Two registers of values from p on. Of 16-bit types the first holds those at even places and the
// second those at odd ones, because that takes no shuffle; `store_pair` puts them into order.
template <int Bytes>
EXPEDITE_INLINE void load_pair(const float* p, Floats<Bytes>& first, Floats<Bytes>& second) {
  load<Bytes>(p, first);
  load<Bytes>(p + Bytes / 4, second);
}

template <int Bytes>
EXPEDITE_INLINE void load_pair(const at::BFloat16* p, Floats<Bytes>& even, Floats<Bytes>& odd) {
  Bits<Bytes> bits;
  std::memcpy(&bits, p, Bytes);
  const Bits<Bytes> low = bits << 16, high = bits & 0xffff0000u;
  std::memcpy(&even, &low, Bytes);
  std::memcpy(&odd, &high, Bytes);
}

// Widens the lower half of every lane. The machines' own conversions want their values side by side
// and have another name for every width.
template <int Bytes>
EXPEDITE_INLINE void widen(const Bits<Bytes>& halves, Floats<Bytes>& out) {
  const Bits<Bytes> magnitude = (halves & 0x7fffu) << 13;
  std::memcpy(&out, &magnitude, Bytes);
  // The exponents' biases differ by 112; a product gets subnormals right, too.
  out *= 0x1p112f;
  Bits<Bytes> bits;
  std::memcpy(&bits, &out, Bytes);
  // Infinity and NaN: all ones in the exponent.
  bits |= (magnitude >= 0x0f800000u) & 0x7f800000u;
  bits |= (halves & 0x8000u) << 16;
  std::memcpy(&out, &bits, Bytes);
}

template <int Bytes>
EXPEDITE_INLINE void load_pair(const at::Half* p, Floats<Bytes>& even, Floats<Bytes>& odd) {
  Bits<Bytes> bits;
  std::memcpy(&bits, p, Bytes);
  widen<Bytes>(bits, even);
  widen<Bytes>(bits >> 16, odd);
}

template <int Bytes, typename T>
EXPEDITE_INLINE void store_pair(const Floats<Bytes>& first, const Floats<Bytes>& second,
                                float* out) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(out, &first, Bytes);
    std::memcpy(out + Bytes / 4, &second, Bytes);
  } else {
    for (int lane = 0; lane < Bytes / 4; ++lane) {
      out[2 * lane] = first[lane];
      out[2 * lane + 1] = second[lane];
    }
  }
}

// Adds the halves until one number is left.
template <int Bytes>
EXPEDITE_INLINE float sum(const Floats<Bytes>& v) {
  if constexpr (Bytes == 8) {
    return v[0] + v[1];
  } else {
    Floats<Bytes / 2> half[2];
    std::memcpy(half, &v, Bytes);
    return sum<Bytes / 2>(half[0] + half[1]);
  }
}

// A x B dot products or squared distances, all in registers.
template <int Bytes, int A, int B, bool Distances>
EXPEDITE_INLINE void tile(const float* const* a, const float* const* b, int64_t ld,
                          Floats<Bytes> (&sums)[A][B]) {
  for (int64_t c = 0; c < ld; c += Bytes / 4) {
    Floats<Bytes> va[A];
#pragma GCC unroll 8
    for (int s = 0; s < A; ++s) {
      load<Bytes>(a[s] + c, va[s]);
    }
#pragma GCC unroll 8
    for (int t = 0; t < B; ++t) {
      Floats<Bytes> vb;
      load<Bytes>(b[t] + c, vb);
#pragma GCC unroll 8
      for (int s = 0; s < A; ++s) {
        if constexpr (Distances) {
          const Floats<Bytes> difference = va[s] - vb;
          sums[s][t] += difference * difference;
        } else {
          sums[s][t] += va[s] * vb;
        }
      }
    }
  }
}

// Tiles hide the latency of multiply-add and reuse every load; 4 x 4 is the fastest that fits the
// 32 registers of AVX-512, 4 x 3 the 16 of AVX2. 12 rows of b stay in the first caches.
constexpr int64_t kBlockB = 12;

template <int Bytes>
EXPEDITE_INLINE void dots_body(const float* a, int64_t na, const float* b, int64_t nb, int64_t ld,
                               float* out, int64_t ldo) {
  constexpr int A = 4, B = Bytes == 64 ? 4 : 3;
  for (int64_t block = 0; block < nb; block += kBlockB) {
    const int64_t block_end = std::min(block + kBlockB, nb);
    for (int64_t i = 0; i < na; i += A) {
      const float* pa[A];
      for (int s = 0; s < A; ++s) {
        pa[s] = a + std::min(i + s, na - 1) * ld;
      }
      for (int64_t j = block; j < block_end; j += B) {
        const float* pb[B];
        for (int t = 0; t < B; ++t) {
          pb[t] = b + std::min(j + t, nb - 1) * ld;
        }
        Floats<Bytes> sums[A][B] = {};
        tile<Bytes, A, B, false>(pa, pb, ld, sums);
#pragma GCC unroll 8
        for (int s = 0; s < A; ++s) {
#pragma GCC unroll 8
          for (int t = 0; t < B; ++t) {
            if (i + s < na && j + t < block_end) {
              out[(i + s) * ldo + j + t] = sum<Bytes>(sums[s][t]);
            }
          }
        }
      }
    }
  }
}

template <int Bytes, int A, int B>
EXPEDITE_INLINE void distances_tile(const float* a, const float* b, int64_t ld, float* out,
                                    int64_t ldo) {
  const float *pa[A], *pb[B];
  for (int s = 0; s < A; ++s) {
    pa[s] = a + s * ld;
  }
  for (int t = 0; t < B; ++t) {
    pb[t] = b + t * ld;
  }
  Floats<Bytes> sums[A][B] = {};
  tile<Bytes, A, B, true>(pa, pb, ld, sums);
#pragma GCC unroll 8
  for (int s = 0; s < A; ++s) {
#pragma GCC unroll 8
    for (int t = 0; t < B; ++t) {
      out[s * ldo + t] = sum<Bytes>(sums[s][t]);
    }
  }
}

template <int Bytes, int A>
EXPEDITE_INLINE void distances_rows(const float* a, const float* b, int64_t nb, int64_t ld,
                                    float* out, int64_t ldo) {
  int64_t j = 0;
  // 5 and 3 in one go: the cells of a row in the usual neighbourhoods.
  for (; j + 5 <= nb; j += 5) {
    distances_tile<Bytes, A, 5>(a, b + j * ld, ld, out + j, ldo);
  }
  for (; j + 3 <= nb; j += 3) {
    distances_tile<Bytes, A, 3>(a, b + j * ld, ld, out + j, ldo);
  }
  for (; j < nb; ++j) {
    distances_tile<Bytes, A, 1>(a, b + j * ld, ld, out + j, ldo);
  }
}

template <int Bytes>
EXPEDITE_INLINE void squared_distances_body(const float* a, int64_t na, const float* b, int64_t nb,
                                            int64_t ld, float* out, int64_t ldo) {
  int64_t i = 0;
  for (; i + 4 <= na; i += 4) {
    distances_rows<Bytes, 4>(a + i * ld, b, nb, ld, out + i * ldo, ldo);
  }
  for (; i + 2 <= na; i += 2) {
    distances_rows<Bytes, 2>(a + i * ld, b, nb, ld, out + i * ldo, ldo);
  }
  for (; i < na; ++i) {
    distances_rows<Bytes, 1>(a + i * ld, b, nb, ld, out + i * ldo, ldo);
  }
}

// Where the rows of a weighted sum are.
template <typename T>
struct Pointers {
  using Value = T;
  const T* const* rows;
  EXPEDITE_INLINE const T* operator()(int64_t r) const { return rows[r]; }
};

struct Table {
  using Value = float;
  const int32_t* rows;
  const float* base;
  int64_t ld;
  EXPEDITE_INLINE const float* operator()(int64_t r) const { return base + rows[r] * ld; }
};

// A sum of plain rows starts from nothing, and nothing is subtracted from them.
struct Nothing {};

template <typename Operand>
constexpr bool kHas = !std::is_same_v<Operand, Nothing>;

template <int Bytes, int Pairs, typename Start, typename Rows, typename Subtracted>
EXPEDITE_INLINE int64_t weighted_part(const Start& start, const Rows& rows,
                                      const Subtracted& subtracted, const float* weights,
                                      int64_t count, int64_t c, int64_t columns, float* out) {
  constexpr int64_t kPair = Bytes / 2;
  for (; c + Pairs * kPair <= columns; c += Pairs * kPair) {
    Floats<Bytes> sums[2 * Pairs] = {};
    if constexpr (kHas<Start>) {
#pragma GCC unroll 4
      for (int t = 0; t < Pairs; ++t) {
        load_pair<Bytes>(start + c + t * kPair, sums[2 * t], sums[2 * t + 1]);
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      const float weight = weights[r];
#pragma GCC unroll 4
      for (int t = 0; t < Pairs; ++t) {
        Floats<Bytes> first, second;
        load_pair<Bytes>(rows(r) + c + t * kPair, first, second);
        if constexpr (kHas<Subtracted>) {
          Floats<Bytes> minus_first, minus_second;
          load_pair<Bytes>(subtracted(r) + c + t * kPair, minus_first, minus_second);
          first -= minus_first;
          second -= minus_second;
        }
        sums[2 * t] += weight * first;
        sums[2 * t + 1] += weight * second;
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < Pairs; ++t) {
      store_pair<Bytes, typename Rows::Value>(sums[2 * t], sums[2 * t + 1], out + c + t * kPair);
    }
  }
  return c;
}

// The columns that fill no pair of registers, one by one: nothing is read beyond the end of a row.
template <typename Start, typename Rows, typename Subtracted>
EXPEDITE_INLINE void weighted_rest(const Start& start, const Rows& rows,
                                   const Subtracted& subtracted, const float* weights,
                                   int64_t count, int64_t c, int64_t columns, float* out) {
  for (; c < columns; ++c) {
    float sum = 0.0f;
    if constexpr (kHas<Start>) {
      sum = static_cast<float>(start[c]);
    }
    for (int64_t r = 0; r < count; ++r) {
      auto term = static_cast<float>(rows(r)[c]);
      if constexpr (kHas<Subtracted>) {
        term -= static_cast<float>(subtracted(r)[c]);
      }
      sum += weights[r] * term;
    }
    out[c] = sum;
  }
}

// 8 independent chains hide the latency of multiply-add; what is left over takes fewer.
template <int Bytes, typename Start, typename Rows, typename Subtracted>
EXPEDITE_INLINE void weighted_body(const Start& start, const Rows& rows,
                                   const Subtracted& subtracted, const float* weights,
                                   int64_t count, int64_t columns, float* out) {
  int64_t c = 0;
  c = weighted_part<Bytes, 4>(start, rows, subtracted, weights, count, c, columns, out);
  c = weighted_part<Bytes, 2>(start, rows, subtracted, weights, count, c, columns, out);
  c = weighted_part<Bytes, 1>(start, rows, subtracted, weights, count, c, columns, out);
  weighted_rest(start, rows, subtracted, weights, count, c, columns, out);
}

constexpr int kVectorBytes = 32;

#if defined(__x86_64__)
constexpr int kAvx512Bytes = 64;
#define EXPEDITE_AVX512 [[gnu::target("avx512f")]]

bool use_avx512() {
  static const bool answer = at::get_cpu_capability() == "AVX512";
  return answer;
}

EXPEDITE_AVX512 void dots_avx512(const float* a, int64_t na, const float* b, int64_t nb, int64_t ld,
                                 float* out, int64_t ldo) {
  dots_body<kAvx512Bytes>(a, na, b, nb, ld, out, ldo);
}

EXPEDITE_AVX512 void squared_distances_avx512(const float* a, int64_t na, const float* b,
                                              int64_t nb, int64_t ld, float* out, int64_t ldo) {
  squared_distances_body<kAvx512Bytes>(a, na, b, nb, ld, out, ldo);
}

template <typename Start, typename Rows, typename Subtracted>
EXPEDITE_AVX512 void weighted_avx512(const Start& start, const Rows& rows,
                                     const Subtracted& subtracted, const float* weights,
                                     int64_t count, int64_t columns, float* out) {
  weighted_body<kAvx512Bytes>(start, rows, subtracted, weights, count, columns, out);
}
#endif

template <typename Start, typename Rows, typename Subtracted>
void weighted(const Start& start, const Rows& rows, const Subtracted& subtracted,
              const float* weights, int64_t count, int64_t columns, float* out) {
#if defined(__x86_64__)
  if (use_avx512()) {
    return weighted_avx512(start, rows, subtracted, weights, count, columns, out);
  }
#endif
  weighted_body<kVectorBytes>(start, rows, subtracted, weights, count, columns, out);
}

}  // namespace

void dots(const float* a, int64_t na, const float* b, int64_t nb, int64_t ld, float* out,
          int64_t ldo) {
#if defined(__x86_64__)
  if (use_avx512()) {
    return dots_avx512(a, na, b, nb, ld, out, ldo);
  }
#endif
  dots_body<kVectorBytes>(a, na, b, nb, ld, out, ldo);
}

void squared_distances(const float* a, int64_t na, const float* b, int64_t nb, int64_t ld,
                       float* out, int64_t ldo) {
#if defined(__x86_64__)
  if (use_avx512()) {
    return squared_distances_avx512(a, na, b, nb, ld, out, ldo);
  }
#endif
  squared_distances_body<kVectorBytes>(a, na, b, nb, ld, out, ldo);
}

template <typename T>
void weighted_rows(const T* const* rows, const float* weights, int64_t count, int64_t columns,
                   float* out) {
  weighted(Nothing{}, Pointers<T>{rows}, Nothing{}, weights, count, columns, out);
}

void weighted_rows(const int32_t* rows, const float* weights, int64_t count, const float* base,
                   int64_t ld, int64_t columns, float* out) {
  weighted(Nothing{}, Table{rows, base, ld}, Nothing{}, weights, count, columns, out);
}

template <typename T>
void add_weighted_differences(const T* start, const T* const* rows, const T* const* subtracted,
                              const float* weights, int64_t count, int64_t columns, float* out) {
  weighted(start, Pointers<T>{rows}, Pointers<T>{subtracted}, weights, count, columns, out);
}

#define EXPEDITE_INSTANTIATE(T)                                                                    \
  template void weighted_rows(const T* const*, const float*, int64_t, int64_t, float*);            \
  template void add_weighted_differences(const T*, const T* const*, const T* const*, const float*, \
                                         int64_t, int64_t, float*);
EXPEDITE_INSTANTIATE(float)
EXPEDITE_INSTANTIATE(at::BFloat16)
EXPEDITE_INSTANTIATE(at::Half)

}  // namespace expedite_d2::cpu
