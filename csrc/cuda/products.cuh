// Products of rows of channels on the tensor cores, as precise as float32.
//
// A float32 is the sum of three bfloat16 terms of 8 bits each. Of the nine products of two numbers'
// terms the six large ones are added up, in float32; the others are below 2^-24 of the product.
// An origin that the rows share is subtracted before they are split, or the difference of large
// numbers would eat the distances of tokens with a common offset.
#pragma once

#include <mma.h>

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

// Stages channels first ... first + kStaged - 1 of `count` rows, by all threads of a block. `row`
// gives the address of a row's channel 0. Rows up to `rows` (a multiple of kSquare) and channels
// beyond the last one are zeros. Term t of row r begins at staged + (t * rows + r) * kStagedStride.
template <int V, typename Row>
__device__ __forceinline__ void stage_rows(Term* staged, int rows, int count, const Row& row,
                                           const float* origin,  // (channels,) or null
                                           int first, int channels) {
  constexpr int kAcross = kStaged / V;
  for (int n = threadIdx.x; n < rows * kAcross; n += blockDim.x) {
    const int r = n / kAcross;
    const int c = n % kAcross * V;
    float values[V] = {};
    if (r < count && first + c < channels) {
      load<V>(row(r) + first + c, values);
      if (origin != nullptr) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          values[v] -= origin[first + c + v];
        }
      }
    }
    Pack<Term, V> packs[kTerms];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      Term terms[kTerms];
      split(values[v], terms);
#pragma unroll
      for (int t = 0; t < kTerms; ++t) {
        packs[t].values[v] = terms[t];
      }
    }
#pragma unroll
    for (int t = 0; t < kTerms; ++t) {
      *reinterpret_cast<Pack<Term, V>*>(staged + (t * rows + r) * kStagedStride + c) = packs[t];
    }
  }
}

}  // namespace expedite_d2::cuda
