// What every CUDA kernel here uses: loads, warp sums, launches.
//
// No file of kernels includes a header of torch, apart from its 16-bit types: nvcc would parse
// those headers again for each architecture, which takes longer than everything else. Tensors are
// checked, allocated and unpacked in the host entries (entry.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_runtime.h>

#include "cuda/launch.h"

namespace expedite_d2::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// Eight warps per block: enough to hide latency, few enough to leave each of them its registers.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Channels that a thread reads at once where alignment allows: 16 bytes.
template <typename T>
constexpr int kVectorSize = 16 / static_cast<int>(sizeof(T));

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

// V neighbouring channels as they lie in memory. 16-bit ones in words, where they fill some: halves
// of registers would each be handled by themselves.
template <typename T, int V>
using Raw = std::conditional_t<sizeof(T) == 2 && V % 2 == 0, Pack<uint32_t, V / 2>, Pack<T, V>>;

template <int V, typename T>
__device__ __forceinline__ Raw<T, V> load_raw(const T* from) {
  return *reinterpret_cast<const Raw<T, V>*>(from);
}

// The channels as float32.
template <typename T, int V>
__device__ __forceinline__ void unpack(const Raw<T, V>& raw, float (&values)[V]) {
  if constexpr (std::is_same_v<T, c10::BFloat16> && V % 2 == 0) {
#pragma unroll
    for (int v = 0; v < V; v += 2) {
      values[v] = __uint_as_float(raw.values[v / 2] << 16);
      values[v + 1] = __uint_as_float(raw.values[v / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      values[v] = static_cast<float>(reinterpret_cast<const Pack<T, V>&>(raw).values[v]);
    }
  }
}

// Reads V neighbouring channels as float32.
template <int V, typename T>
__device__ __forceinline__ void load(const T* from, float (&values)[V]) {
  unpack<T>(load_raw<V>(from), values);
}

// Reads channels that are used only once: caches evict them first.
template <int V, typename T>
__device__ __forceinline__ Raw<T, V> load_once(const T* from) {
  if constexpr (sizeof(Raw<T, V>) == sizeof(uint4)) {
    const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(from));
    return reinterpret_cast<const Raw<T, V>&>(raw);
  } else {
    return load_raw<V>(from);
  }
}

// The address `row` rows of `bytes` after `first`. In plain C++ the compiler would widen `bytes`
// ahead of a loop and multiply 64-bit numbers.
template <typename T>
__device__ __forceinline__ T* row_at(T* first, int row, uint32_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  uint64_t offset;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(offset) : "r"(row), "r"(bytes));
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(first) + offset);
}

// Channels of such a row, or zeros where there is none. To be unpacked once all reads that are to
// be in flight together have been issued.
template <int V, typename T>
__device__ __forceinline__ Raw<T, V> load_if(bool exists, const T* first, int row, uint32_t bytes) {
  Raw<T, V> raw = {};
  if (exists) {
    raw = load_raw<V>(row_at(first, row, bytes));
  }
  return raw;
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

// Sums over the lanes of a full warp, N at once: lane l gets the sum of values[l]. In each step
// lanes exchange half of their remaining values, so all sums together cost little more than one.
// Recursive, because loops of this shape are not always unrolled.
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

// Sum over a block of `Warps`, the same bits in each thread. `sums` is shared memory for as many.
template <int Warps = kWarps>
__device__ __forceinline__ float block_sum(float value, float* sums) {
  value = warp_sum(value);
  // A previous sum may still be read.
  __syncthreads();
  if (threadIdx.x % kWarp == 0) {
    sums[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  float total = 0.f;
  for (int w = 0; w < Warps; ++w) {
    total += sums[w];
  }
  return total;
}

// Weight, before normalisation, of a squared distance that exceeds the smallest one by `excess`.
// NaN fails the comparison and stays.
__device__ __forceinline__ float unnormalised_weight(float tau, float excess) {
  const float exponent = -tau * excess;
  return exponent < kMinExponent ? 0.f : expf(exponent);
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

// Allows a kernel without static shared memory all that a block may have, whatever this launch
// needs: the limit belongs to the kernel, so the smaller one of a launch from another thread would
// forbid this larger one.
inline cudaError_t allow_all_shared_memory(const void* kernel) {
  int device = 0;
  int bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }
  return error;
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
    // More than 48 KiB must be allowed; the caller has seen that the device has as much.
    if (shared > 48 * 1024) {
      error = allow_all_shared_memory(reinterpret_cast<const void*>(kernel));
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
// read kVectorSize<T> channels at once. Null is aligned.
template <typename T, typename... Pointers>
bool can_vectorise(int channels, const Pointers*... addresses) {
  return channels % kVectorSize<T> == 0 &&
         ((reinterpret_cast<uintptr_t>(addresses) % 16 == 0) && ...);
}

// Tokens or centres of all images.
inline int64_t token_count(const Grid& grid, int64_t batch) {
  return batch * grid.rows.size * grid.columns.size;
}
inline int64_t cell_count(const Grid& grid, int64_t batch) {
  return batch * grid.rows.cells() * grid.columns.cells();
}

}  // namespace expedite_d2::cuda
