// Products of rows of channels on the tensor cores, as precise as float32.
//
// A float32 is the sum of three bfloat16 terms of 8 bits each. Of the nine products of two numbers'
// terms the six large ones are added up, in float32; the others are below 2^-24 of the product.
// A common origin is subtracted before the rows are split: otherwise the distances of tokens with a
// large common offset would be lost to cancellation.
#pragma once

#include <cuda_bf16.h>

#include "cuda/utils.cuh"

namespace expedite_d2::cuda {

using Term = __nv_bfloat16;
constexpr int kTerms = 3;
// Rows, columns and channels of an MMA tile: two m16n8k16 products side by side.
constexpr int kMmaTile = 16;
// Channels that are in shared memory at a time. A staged row is 16 bytes longer, so that eight rows
// cover all banks.
constexpr int kStaged = 32;
constexpr int kStagedStride = kStaged + 8;

EXPEDITE_HOST_DEVICE int64_t padded_rows(int64_t rows) {
  return (rows + kMmaTile - 1) / kMmaTile * kMmaTile;
}

// Bytes of shared memory for that many staged rows (a multiple of kMmaTile).
EXPEDITE_HOST_DEVICE int64_t staged_bytes(int64_t rows) {
  return rows * kTerms * kStagedStride * static_cast<int64_t>(sizeof(Term));
}

// value = terms[0] + terms[1] + terms[2], each the remainder so far, rounded to nearest.
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

// Writes the terms of V neighbouring numbers; the terms of the next order follow `stride` later.
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

// kStaged channels of some rows on their way to shared memory. Each of kThreads threads holds V
// channels of every kDown-th row, so that the next channels are read while others are multiplied.
template <typename T, int V>
struct StagedRows {
  static constexpr int kAcross = kStaged / V;
  static constexpr int kDown = kThreads / kAcross;
  // As many rows as the registers of gram_kernel allow: of the 144 rows of a window of 12 x 12
  // tokens all in 16-bit types and 128 in float32. The others are read when they are staged.
  static constexpr int kHeld = V == 1 ? 8 : V == kVectorSize<float> ? 4 : 3;

  const T* tokens;
  const int64_t* offsets;  // (count,): where the rows begin
  int count;
  const float* origin;  // (end,): subtracted from all rows
  int end;              // one past the last channel
  Raw<T, V> rows[kHeld];
  float zero[V];  // the origin's channels

  __device__ __forceinline__ Raw<T, V> read(int r, int c) const {
    Raw<T, V> raw = {};
    if (r < count && c < end) {
      raw = load_raw<V>(tokens + offsets[r] + c);
    }
    return raw;
  }

  // Reads the rows' channels from `first` on.
  __device__ __forceinline__ void prefetch_rows(int first) {
    const int c = first + static_cast<int>(threadIdx.x) % kAcross * V;
    const int row = static_cast<int>(threadIdx.x) / kAcross;
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      rows[n] = read(row + n * kDown, c);
    }
  }

  // Reads the origin's channels: separately, so that its registers are free during the products.
  __device__ __forceinline__ void prefetch_origin(int first) {
    const int c = first + static_cast<int>(threadIdx.x) % kAcross * V;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      zero[v] = 0.f;
    }
    if (c < end) {
      load<V>(origin + c, zero);
    }
  }

  // Stages the channels from `first` on. Term t of row r begins at staged + (t * padded + r) *
  // kStagedStride. Rows from `count` to `padded` and channels from `end` on are zeros.
  __device__ __forceinline__ void to_shared(Term* staged, int padded, int first) const {
    const int c = static_cast<int>(threadIdx.x) % kAcross * V;
    const int row = static_cast<int>(threadIdx.x) / kAcross;
    const auto stage_row = [&](const Raw<T, V>& raw, int r) {
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
        stage_row(rows[n], row + n * kDown);
      }
    }
#pragma unroll 1
    for (int r = row + kHeld * kDown; r < padded; r += kDown) {
      stage_row(read(r, first + c), r);
    }
  }
};

// A lane's part of an MMA tile of operands, all terms, and of an MMA tile of sums: columns 0 ... 7
// and 8 ... 15, of which a lane has two neighbours in rows lane / 4 and lane / 4 + 8.
using SplitFragment = uint32_t[kTerms][4];
using Accumulator = float[2][4];

// One term of an MMA tile, from shared memory. Rows are `stride` terms (a multiple of 8) long. wmma
// would load it through generic addresses, with more instructions than the products have.
__device__ __forceinline__ void load_fragment(const Term* tile, int stride,
                                              uint32_t (&registers)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const Term* from = tile + lane % kMmaTile * stride + lane / kMmaTile * 8;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from)))
               : "memory");
}

// The same of the transposed tile: columns of shared memory become rows.
__device__ __forceinline__ void load_fragment_transposed(const Term* tile, int stride,
                                                         uint32_t (&registers)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const Term* from = tile + (lane / kMmaTile * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from)))
               : "memory");
}

// sums_ij += a_i b_j for 16 rows of a and 8 of b.
__device__ __forceinline__ void mma_m16n8k16(const uint32_t (&a)[4], uint32_t b_low,
                                             uint32_t b_high, float (&sums)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

// sums_ij += a_i b_j for 16 rows of each. The tensor cores truncate their sums, so only few
// products are added up there before they are added to the rest with rounding.
__device__ __forceinline__ void mma_bf16x3(const SplitFragment& a, const SplitFragment& b,
                                           Accumulator& sums) {
  Accumulator added = {};
  // The small products first.
#pragma unroll
  for (int order = kTerms - 1; order >= 0; --order) {
#pragma unroll
    for (int t = 0; t <= order; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        mma_m16n8k16(a[t], b[order - t][half], b[order - t][half + 2], added[half]);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    sums[n / 4][n % 4] += added[n / 4][n % 4];
  }
}

// Writes an MMA tile whose rows are `stride` (even) apart; `to` is aligned to 8 bytes.
__device__ __forceinline__ void store_accumulator(const Accumulator& sums, float* to, int stride) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const float (&sum)[4] = sums[n / 2];
    *reinterpret_cast<float2*>(to + (lane / 4 + n % 2 * 8) * stride + n / 2 * 8 + lane % 4 * 2) =
        make_float2(sum[n % 2 * 2], sum[n % 2 * 2 + 1]);
  }
}

}  // namespace expedite_d2::cuda
