// Products of a tile of tokens with a tile of centres on the tensor cores, for token_match.
//
// Numbers are split into terms and multiplied as products.cuh has it. Here the tile has one size,
// sums stay in registers, and each slice of channels is read while the one before is multiplied.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/products.cuh"
#include "cuda/utils.cuh"

namespace expedite_d2::cuda {

// Tokens and centres of a tile. Four warps have a quarter of their products each.
constexpr int kTileTokens = 64;
constexpr int kTileCentres = 64;
constexpr int kTileRows = kTileTokens + kTileCentres;
constexpr int kTileWarps = 4;
constexpr int kTileThreads = kTileWarps * kWarp;
// Squares of a quarter along each axis.
constexpr int kQuarterSide = kTileTokens / 2 / kSquare;
// A row of products is eight floats longer, so that four rows lie in all banks.
constexpr int kProductStride = kTileCentres + 8;
// Bytes of the staged rows; later the products are in their place.
constexpr int kTileBytes = kTileRows * kTerms * kStagedStride * static_cast<int>(sizeof(Term));
static_assert(kTileTokens * kProductStride * static_cast<int>(sizeof(float)) <= kTileBytes);

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

// A square of terms as the tensor cores take it, from shared memory. wmma would load it through
// generic addresses, with more instructions than the products are.
__device__ __forceinline__ void load_square(const Term* square, uint32_t (&registers)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const Term* from = square + lane % kSquare * kStagedStride + lane / kSquare * 8;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
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

// A slice of kStaged channels of a tile's rows on the way to shared memory: every thread holds V
// channels of each kDown-th row.
template <typename T, int V>
struct Slice {
  static constexpr int kAcross = kStaged / V;
  static constexpr int kDown = kTileThreads / kAcross;
  static constexpr int kHeld = kTileRows / kDown;

  // In words where that is possible: halves of registers would each be handled by themselves.
  using Values = Pack<T, V>;
  using Held =
      std::conditional_t<sizeof(Values) % 4 == 0, Pack<uint32_t, sizeof(Values) / 4>, Values>;
  Held rows[kHeld];
  Held origin;

  // Reads the slice that begins at channel `first`. Rows that do not exist have negative offsets.
  __device__ __forceinline__ void fetch(const T* tokens, const T* centres, const int64_t* offsets,
                                        const T* origin_row, int first, int channels) {
    const int c = first + static_cast<int>(threadIdx.x) % kAcross * V;
    const int row = static_cast<int>(threadIdx.x) / kAcross;
    const bool has_channels = c < channels;
    origin = {};
    if (has_channels) {
      origin = *reinterpret_cast<const Held*>(origin_row + c);
    }
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      const int64_t offset = offsets[row + n * kDown];
      const T* from = n * kDown < kTileTokens ? tokens : centres;
      rows[n] = {};
      if (has_channels && offset >= 0) {
        rows[n] = *reinterpret_cast<const Held*>(from + offset + c);
      }
    }
  }

  // Stages the slice about the origin and adds the squares of its numbers to the rows' norms. What
  // becomes of rows that do not exist is nobody's concern.
  __device__ __forceinline__ void put(Term* staged, float (&norms)[kHeld]) const {
    const int c = static_cast<int>(threadIdx.x) % kAcross * V;
    const int row = static_cast<int>(threadIdx.x) / kAcross;
    float zero[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      zero[v] = static_cast<float>(reinterpret_cast<const Values&>(origin).values[v]);
      // Or it would spoil the distances of all tokens, not only those to one centre.
      zero[v] = isfinite(zero[v]) ? zero[v] : 0.f;
    }
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      float values[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        values[v] =
            static_cast<float>(reinterpret_cast<const Values&>(rows[n]).values[v]) - zero[v];
        norms[n] = fmaf(values[v], values[v], norms[n]);
      }
      Term* to = staged + (row + n * kDown) * kStagedStride + c;
      if constexpr (V == 1) {
        Term terms[kTerms];
        split(values[0], terms);
#pragma unroll
        for (int t = 0; t < kTerms; ++t) {
          to[t * kTileRows * kStagedStride] = terms[t];
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
          *reinterpret_cast<Pack<uint32_t, V / 2>*>(to + t * kTileRows * kStagedStride) = packs[t];
        }
      }
    }
  }
};

// A warp's quarter of the products, in registers.
struct Quarter {
  // Of a square, columns 0 ... 7 and 8 ... 15; a lane has two neighbours in rows lane / 4 and
  // lane / 4 + 8 of each.
  float sums[kQuarterSide][kQuarterSide][2][4] = {};
  int row, column;  // first ones

  __device__ Quarter() {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    row = warp / 2 * kQuarterSide * kSquare;
    column = warp % 2 * kQuarterSide * kSquare;
  }

  // Adds the products of the staged channels. The tensor cores cut off what they add, so few
  // numbers are added there before the rest is added with rounding.
  __device__ __forceinline__ void add(const Term* staged) {
    const auto square = [&](int term, int first_row, int k) {
      return staged + (term * kTileRows + first_row) * kStagedStride + k;
    };
#pragma unroll 1
    for (int k = 0; k < kStaged; k += kSquare) {
      uint32_t y[kQuarterSide][kTerms][4];
#pragma unroll
      for (int j = 0; j < kQuarterSide; ++j) {
#pragma unroll
        for (int t = 0; t < kTerms; ++t) {
          load_square(square(t, kTileTokens + column + j * kSquare, k), y[j][t]);
        }
      }
#pragma unroll
      for (int i = 0; i < kQuarterSide; ++i) {
        uint32_t x[kTerms][4];
#pragma unroll
        for (int t = 0; t < kTerms; ++t) {
          load_square(square(t, row + i * kSquare, k), x[t]);
        }
        float added[kQuarterSide][2][4] = {};
        // The small products first.
#pragma unroll
        for (int order = kTerms - 1; order >= 0; --order) {
#pragma unroll
          for (int t = 0; t <= order; ++t) {
#pragma unroll
            for (int j = 0; j < kQuarterSide; ++j) {
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                multiply(x[t], y[j][order - t][half], y[j][order - t][half + 2], added[j][half]);
              }
            }
          }
        }
#pragma unroll
        for (int j = 0; j < kQuarterSide; ++j) {
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            sums[i][j][n / 4][n % 4] += added[j][n / 4][n % 4];
          }
        }
      }
    }
  }

  // Row t of `products` is that of token t, kProductStride long.
  __device__ __forceinline__ void store(float* products) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int i = 0; i < kQuarterSide; ++i) {
#pragma unroll
      for (int n = 0; n < kQuarterSide * 4; ++n) {
        const float (&sum)[4] = sums[i][n / 4][n / 2 % 2];
        const int r = row + i * kSquare + lane / 4 + n % 2 * 8;
        const int c = column + n / 4 * kSquare + n / 2 % 2 * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(products + r * kProductStride + c) =
            make_float2(sum[n % 2 * 2], sum[n % 2 * 2 + 1]);
      }
    }
  }
};

}  // namespace expedite_d2::cuda
