// Products of rows of channels on the tensor cores, as precise as float32.
//
// A float32 is the sum of three bfloat16 terms of 8 bits each. Of the nine products of two numbers'
// terms the six large ones are added up, in float32; the others are below 2^-24 of the product.
// An origin that the rows share is subtracted before they are split, or the difference of large
// numbers would eat the distances of tokens with a common offset.
#pragma once

#include <cuda_bf16.h>

#include "cuda/utils.cuh"

namespace expedite_d2::cuda {

using Term = __nv_bfloat16;
constexpr int kTerms = 3;
// Rows, columns and channels of the squares that the tensor cores multiply.
constexpr int kSquare = 16;
// Channels of all rows that are in shared memory at a time. A staged row is 16 bytes longer, so
// that eight rows lie in all banks.
constexpr int kStaged = 32;
constexpr int kStagedStride = kStaged + 8;

EXPEDITE_HOST_DEVICE int64_t padded_rows(int64_t rows) {
  return (rows + kSquare - 1) / kSquare * kSquare;
}

// Bytes of shared memory for that many staged rows (a multiple of kSquare).
EXPEDITE_HOST_DEVICE int64_t staged_bytes(int64_t rows) {
  return rows * kTerms * kStagedStride * static_cast<int64_t>(sizeof(Term));
}

// value = terms[0] + terms[1] + terms[2], each the nearest to what the ones before leave.
__device__ __forceinline__ void split(float value, Term (&terms)[kTerms]) {
#pragma unroll
  for (int t = 0; t < kTerms; ++t) {
    terms[t] = __float2bfloat16_rn(value);
    value -= __bfloat162float(terms[t]);
  }
}

// Two numbers as pairs of terms, the first number's in the lower half.
__device__ __forceinline__ void split_pair(float a, float b, uint32_t (&pairs)[kTerms]) {
#pragma unroll
  for (int t = 0; t < kTerms; ++t) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    pairs[t] = *reinterpret_cast<const uint32_t*>(&pair);
    a -= __uint_as_float(pairs[t] << 16);
    b -= __uint_as_float(pairs[t] & 0xffff0000u);
  }
}

// Writes the terms of V neighbouring numbers, those of one order `stride` after those of the order
// before.
template <int V>
__device__ __forceinline__ void store_terms(Term* to, int stride, const float (&values)[V]) {
  if constexpr (V == 1) {
    Term terms[kTerms];
    split(values[0], terms);
#pragma unroll
    for (int t = 0; t < kTerms; ++t) {
      to[t * stride] = terms[t];
    }
  } else {
    Pack<uint32_t, V / 2> packs[kTerms];
#pragma unroll
    for (int v = 0; v < V; v += 2) {
      uint32_t pairs[kTerms];
      split_pair(values[v], values[v + 1], pairs);
#pragma unroll
      for (int t = 0; t < kTerms; ++t) {
        packs[t].values[v / 2] = pairs[t];
      }
    }
#pragma unroll
    for (int t = 0; t < kTerms; ++t) {
      *reinterpret_cast<Pack<uint32_t, V / 2>*>(to + t * stride) = packs[t];
    }
  }
}

// A slice of kStaged channels of some rows on the way to shared memory, by kThreads: each of them
// holds V channels of every kDown-th row, so that one slice is read while another is multiplied.
template <typename T, int V>
struct RowSlice {
  static constexpr int kAcross = kStaged / V;
  static constexpr int kDown = kThreads / kAcross;
  // As many as the registers of gram_kernel allow. Of the 144 rows of a window of 12 x 12 tokens
  // these are all in 16-bit types and 128 in float32; others are read when they are staged.
  static constexpr int kHeld = V == 1 ? 8 : V == kWide<float> ? 4 : 3;

  const T* tokens;
  const int64_t* offsets;  // (count,): where the rows begin
  int count;
  const float* origin;  // (end,): subtracted from all rows
  int end;              // of the channels
  Raw<T, V> rows[kHeld];
  float zero[V];  // the origin's channels

  __device__ __forceinline__ Raw<T, V> read(int r, int c) const {
    Raw<T, V> raw = {};
    if (r < count && c < end) {
      raw = load_raw<V>(tokens + offsets[r] + c);
    }
    return raw;
  }

  // Reads the rows of the slice that begins at channel `first`.
  __device__ __forceinline__ void fetch_rows(int first) {
    const int c = first + static_cast<int>(threadIdx.x) % kAcross * V;
    const int row = static_cast<int>(threadIdx.x) / kAcross;
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      rows[n] = read(row + n * kDown, c);
    }
  }

  // And the origin. This is apart so that its registers are free during the products.
  __device__ __forceinline__ void fetch_origin(int first) {
    const int c = first + static_cast<int>(threadIdx.x) % kAcross * V;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      zero[v] = 0.f;
    }
    if (c < end) {
      load<V>(origin + c, zero);
    }
  }

  // Stages the slice, which begins at channel `first`. Term t of row r begins at staged + (t *
  // padded + r) * kStagedStride. Rows from `count` to `padded` and channels from `end` on are
  // zeros.
  __device__ __forceinline__ void put(Term* staged, int padded, int first) const {
    const int c = static_cast<int>(threadIdx.x) % kAcross * V;
    const int row = static_cast<int>(threadIdx.x) / kAcross;
    const auto put_row = [&](const Raw<T, V>& raw, int r) {
      float values[V];
      unpack<T>(raw, values);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        values[v] = r < count ? values[v] - zero[v] : 0.f;
      }
      store_terms<V>(staged + r * kStagedStride + c, padded * kStagedStride, values);
    };
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      if (row + n * kDown < padded) {
        put_row(rows[n], row + n * kDown);
      }
    }
#pragma unroll 1
    for (int r = row + kHeld * kDown; r < padded; r += kDown) {
      put_row(read(r, first + c), r);
    }
  }
};

// A square of terms, as the tensor cores take it, and a square of sums, as they give it: columns
// 0 ... 7 and 8 ... 15, of which a lane has two neighbours in rows lane / 4 and lane / 4 + 8.
using SquareTerms = uint32_t[kTerms][4];
using SquareSums = float[2][4];

// One term of a square of rows, from shared memory. Rows are `stride` terms (a multiple of 8) long.
// wmma would load it through generic addresses, with more instructions than the products are.
__device__ __forceinline__ void load_square(const Term* square, int stride,
                                            uint32_t (&registers)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const Term* from = square + lane % kSquare * stride + lane / kSquare * 8;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from)))
               : "memory");
}

// The same of the transposed square: columns of shared memory become rows.
__device__ __forceinline__ void load_square_transposed(const Term* square, int stride,
                                                       uint32_t (&registers)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const Term* from = square + (lane / kSquare * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from)))
               : "memory");
}

// sums_ij += a_i b_j for 16 rows of a and 8 of b.
__device__ __forceinline__ void multiply(const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high,
                                         float (&sums)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

// sums_ij += a_i b_j for 16 rows of each. The tensor cores cut off what they add, so few numbers
// are added there before they are added to the rest with rounding.
__device__ __forceinline__ void add_products(const SquareTerms& a, const SquareTerms& b,
                                             SquareSums& sums) {
  SquareSums added = {};
  // The small products first.
#pragma unroll
  for (int order = kTerms - 1; order >= 0; --order) {
#pragma unroll
    for (int t = 0; t <= order; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiply(a[t], b[order - t][half], b[order - t][half + 2], added[half]);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    sums[n / 4][n % 4] += added[n / 4][n % 4];
  }
}

// Writes a square whose rows are `stride` (even) apart; `to` is aligned to 8 bytes.
__device__ __forceinline__ void store_square(const SquareSums& sums, float* to, int stride) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const float (&sum)[4] = sums[n / 2];
    *reinterpret_cast<float2*>(to + (lane / 4 + n % 2 * 8) * stride + n / 2 * 8 + lane % 4 * 2) =
        make_float2(sum[n % 2 * 2], sum[n % 2 * 2 + 1]);
  }
}

}  // namespace expedite_d2::cuda
