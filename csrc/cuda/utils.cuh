// What every CUDA kernel here uses: loads, warp sums, launches.
//
// No file of kernels includes a header of torch, apart from its 16-bit types: nvcc would parse
// those headers again for each architecture, which takes longer than everything else. Tensors are
// checked, allocated and unpacked in entries.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_runtime.h>

#include "cuda/launch.h"

namespace expedite_d2::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// Eight warps a block: enough of them to hide latency, few enough registers left to each.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Channels that a thread reads at once where alignment allows: 16 bytes.
template <typename T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

template <typename T>
EXPEDITE_HOST_DEVICE T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// No more than 16 bytes are read at once: eight float32 beside eight of a 16-bit type are two
// reads.
template <typename T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Pack {
  T values[V];
};

// Reads V neighbouring channels as float32.
template <int V, typename T>
__device__ __forceinline__ void load(const T* from, float (&values)[V]) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    values[v] = static_cast<float>(pack.values[v]);
  }
}

template <int V, typename T>
__device__ __forceinline__ void store(T* to, const float (&values)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    pack.values[v] = static_cast<T>(values[v]);
  }
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// Sum over the lanes of a full warp, the same bits in each of them: every step adds the same two
// numbers in both lanes of a pair.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

// Sums over the lanes of a full warp of as many values: lane l gets that of values[l]. Lanes hand
// each other half of what is left to add up, so all the sums take little more than one.
// Recursive, because loops of that shape are not always unrolled.
template <int N>
__device__ __forceinline__ float warp_sums(const float (&values)[N]) {
  static_assert(N <= kWarp && (N & (N - 1)) == 0);
  if constexpr (N == 1) {
    return values[0];
  } else {
    constexpr int kHalf = N / 2;
    const bool upper = (static_cast<int>(threadIdx.x) & kHalf) != 0;
    float left[kHalf];
#pragma unroll
    for (int n = 0; n < kHalf; ++n) {
      const float given = upper ? values[n] : values[n + kHalf];
      const float kept = upper ? values[n + kHalf] : values[n];
      left[n] = kept + __shfl_xor_sync(kAllLanes, given, kHalf);
    }
    return warp_sums(left);
  }
}

// Sum over a block of kThreads, the same bits in each thread. `sums` is shared memory for kWarps.
__device__ __forceinline__ float block_sum(float value, float* sums) {
  value = warp_sum(value);
  // Another sum may still be read.
  __syncthreads();
  if (threadIdx.x % kWarp == 0) {
    sums[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  float total = 0.f;
  for (int w = 0; w < kWarps; ++w) {
    total += sums[w];
  }
  return total;
}

// Weight, before normalisation, of a squared distance that exceeds the least one by `excess`. NaN
// fails the comparison and stays.
__device__ __forceinline__ float falloff(float tau, float excess) {
  const float exponent = -tau * excess;
  return exponent < kLeastExponent ? 0.f : expf(exponent);
}

// The running number of this thread's warp in the whole grid.
__device__ __forceinline__ int64_t global_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
}

// The factor of squared distances for image b.
__device__ __forceinline__ float image_temperature(const Temperature& temperature, int64_t b) {
  return effective_temperature(temperature.value,
                               temperature.spread == nullptr ? 1.f : temperature.spread[b]);
}

// Launches kernels one after the other on a stream. After the first error nothing more is launched;
// `error` is that of the first launch that failed, as the launch itself reports it.
struct Launcher {
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;

  // Blocks are numbered along x alone, the only axis of a CUDA grid that goes beyond 65535.
  template <typename... Parameters, typename... Arguments>
  void blocks(void (*kernel)(Parameters...), int64_t count, int threads, size_t shared,
              Arguments... arguments) {
    if (error != cudaSuccess) {
      return;
    }
    if (count > std::numeric_limits<int32_t>::max()) {
      error = cudaErrorInvalidConfiguration;
      return;
    }
    // More than 48 KiB must be asked for; the caller has seen that the device has as much.
    if (shared > 48 * 1024) {
      error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared));
      if (error != cudaSuccess) {
        return;
      }
    }
    kernel<<<static_cast<unsigned>(count), threads, shared, stream>>>(arguments...);
    error = cudaGetLastError();
  }

  // Blocks of kThreads, with a warp for each of `items`.
  template <typename... Parameters, typename... Arguments>
  void warps(void (*kernel)(Parameters...), int64_t items, Arguments... arguments) {
    blocks(kernel, ceil_div<int64_t>(items, kWarps), kThreads, 0, arguments...);
  }
};

// Calls f with a value of the type that the tokens have.
template <typename F>
void with_type(Type type, F f) {
  switch (type) {
    case Type::kFloat:
      return f(float{});
    case Type::kBFloat16:
      return f(c10::BFloat16{});
    case Type::kHalf:
      return f(c10::Half{});
  }
}

// Whether rows of `channels` T that start at these addresses, or of float32 beside them, can be
// read kWide<T> channels at once. Null is aligned.
template <typename T, typename... Pointers>
bool can_read_wide(int channels, const Pointers*... addresses) {
  return channels % kWide<T> == 0 && ((reinterpret_cast<uintptr_t>(addresses) % 16 == 0) && ...);
}

// Tokens or centres of all images.
inline int64_t token_count(const Grid& grid, int64_t batch) {
  return batch * grid.rows.size * grid.columns.size;
}
inline int64_t cell_count(const Grid& grid, int64_t batch) {
  return batch * grid.rows.cells() * grid.columns.cells();
}

}  // namespace expedite_d2::cuda
