// ms_deform_attn: samples of feature maps, weighted, for every query and head; and its gradients.
//
// A few lanes, a power of two, share one query and head and read its channels 16 bytes at a time.
// Each lane finds the pixels around one sample and their weights, and passes them to the other
// lanes through shared memory. A block takes neighbouring queries of one head, whose samples
// overlap in the cache; consecutive blocks take the other heads, whose locations lie in between.
#include "cuda/utils.cuh"

namespace expedite_d2::cuda {
namespace {

constexpr int kCorners = 4;

// The query and head of a thread, and its place among the lanes that share them. `tiles` blocks
// have all queries of a head of an image.
struct Item {
  int64_t index;   // of query and head: (b * Q + q) * heads + h
  int64_t origin;  // first channel of head h in row 0 of image b
  bool exists;     // false beyond the last query
  int lane, lanes;

  __device__ Item(const DeformAttnParams& params, int lanes_log2, uint32_t tiles) {
    lanes = 1 << lanes_log2;
    lane = static_cast<int>(threadIdx.x) & (lanes - 1);
    // 32-bit divisions: there are fewer than 2**31 blocks, and so heads and tiles.
    const auto heads = static_cast<uint32_t>(params.heads);
    const uint32_t head = blockIdx.x % heads, tile = blockIdx.x / heads;
    const int64_t image = tile / tiles;
    const int64_t query =
        int64_t{tile % tiles} * (kThreads >> lanes_log2) + (threadIdx.x >> lanes_log2);
    exists = query < params.queries;
    index = (image * params.queries + query) * params.heads + head;
    origin = (image * params.rows * params.heads + head) * params.channels;
  }
};

// A sample, held by the lane that found it. Its pixels: top left, top right, bottom left, bottom
// right.
struct Sample {
  float weight;                   // for the gradients of its location: 0 outside of the map
  float right, bottom;            // how far it is from the left and the top pixels, from 0 to 1
  Pack<float, kCorners> weights;  // its weight, divided among the pixels
  Pack<int, kCorners> rows;       // of value; -1 where there is no pixel

  __device__ Sample(const DeformAttnParams& params, const Item& item, int level, int point,
                    const float* locations, const float* attention) {
    // In pixels. Outside of the map x and y are -2, so that no corner is inside.
    float x = -2.f, y = -2.f;
    bool nan = false;
    float full = 0.f;
    weight = 0.f;
    const int width = params.width[level], height = params.height[level];
    if (item.exists && point < params.points) {
      const int64_t at = (item.index * params.levels + level) * params.points + point;
      float location[2];
      load<2>(locations + 2 * at, location);
      const float limits[2] = {static_cast<float>(width), static_cast<float>(height)};
      const float place[2] = {fmaf(location[0], limits[0], -0.5f),
                              fmaf(location[1], limits[1], -0.5f)};
      // False for NaN and infinity.
      const bool inside =
          place[0] > -1.f && place[0] < limits[0] && place[1] > -1.f && place[1] < limits[1];
      nan = place[0] != place[0] || place[1] != place[1];
      x = inside ? place[0] : x;
      y = inside ? place[1] : y;
      full = nan ? nanf("") : attention[at];
      // Outside of the map there is no gradient, even if the weight is NaN.
      weight = inside || nan ? full : 0.f;
    }
    const float left = floorf(x), top = floorf(y);
    right = nan ? nanf("") : x - left;
    bottom = nan ? nanf("") : y - top;
    weights = {full * ((1.f - bottom) * (1.f - right)), full * ((1.f - bottom) * right),
               full * (bottom * (1.f - right)), full * (bottom * right)};
    const int column = static_cast<int>(left), row = static_cast<int>(top);
    const bool has_left = column >= 0, has_right = column >= -1 && column + 1 < width;
    const bool has_top = row >= 0, has_bottom = row >= -1 && row + 1 < height;
    const int first = params.start[level] + row * width + column;
    rows = {has_top && has_left ? first : -1, has_top && has_right ? first + 1 : -1,
            has_bottom && has_left ? first + width : -1,
            has_bottom && has_right ? first + width + 1 : -1};
  }
};

// The samples of all lanes of a block. Pixels and weights are separate arrays, so that neighbouring
// items read different banks.
struct Samples {
  Pack<float, kCorners> weights[kThreads];
  Pack<int, kCorners> rows[kThreads];

  __device__ void to_shared(const Sample& sample) {
    // Other lanes may still read this lane's previous sample.
    __syncwarp();
    weights[threadIdx.x] = sample.weights;
    rows[threadIdx.x] = sample.rows;
    __syncwarp();
  }
};

// out_qh = sum over levels and points of weight * value at the location. The reads of two samples
// are in flight together, within the registers of three blocks per multiprocessor.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 3)
    attend_kernel(const DeformAttnParams params, int lanes_log2, uint32_t tiles,
                  const T* __restrict__ value,          // (B, S, heads, D)
                  const float* __restrict__ locations,  // (B, Q, heads, levels, points, 2)
                  const float* __restrict__ weights,    // (B, Q, heads, levels, points)
                  T* __restrict__ out) {                // (B, Q, heads, D)
  __shared__ Samples samples;
  const Item item(params, lanes_log2, tiles);
  const int first = static_cast<int>(threadIdx.x) - item.lane;
  const uint32_t row_bytes = params.stride * sizeof(T);
  for (int block = 0; block < params.channels; block += item.lanes * V) {
    const int c = block + item.lane * V;
    const bool has_channels = c < params.channels;
    const T* from = value + item.origin + c;
    float sum[V] = {};
    for (int level = 0; level < params.levels; ++level) {
      for (int point = 0; point < params.points; point += item.lanes) {
        samples.to_shared(Sample(params, item, level, point + item.lane, locations, weights));
        const int count = min(item.lanes, params.points - point);
#pragma unroll 2
        for (int j = 0; j < count; ++j) {
          const Pack<float, kCorners> corner_weights = samples.weights[first + j];
          const Pack<int, kCorners> rows = samples.rows[first + j];
          Raw<T, V> raw[kCorners];
#pragma unroll
          for (int t = 0; t < kCorners; ++t) {
            raw[t] =
                load_if<V>(rows.values[t] >= 0 && has_channels, from, rows.values[t], row_bytes);
          }
#pragma unroll
          for (int t = 0; t < kCorners; ++t) {
            float pixel[V];
            unpack<T>(raw[t], pixel);
#pragma unroll
            for (int v = 0; v < V; ++v) {
              sum[v] = fmaf(corner_weights.values[t], pixel[v], sum[v]);
            }
          }
        }
      }
    }
    if (item.exists && has_channels) {
      store<V>(out + item.index * params.channels + c, sum);
    }
  }
}

// Sum over the lanes of an item, in each of them.
__device__ __forceinline__ float item_sum(const Item& item, float value) {
  for (int offset = item.lanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

// Adds to V neighbouring numbers, four at a time where the hardware can.
template <int V>
__device__ __forceinline__ void atomic_add(float* to, float factor, const float (&values)[V]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr bool kByFour = V % 4 == 0;
#else
  constexpr bool kByFour = false;
#endif
  if constexpr (kByFour) {
#pragma unroll
    for (int v = 0; v < V; v += 4) {
      atomicAdd(reinterpret_cast<float4*>(to + v),
                make_float4(factor * values[v], factor * values[v + 1], factor * values[v + 2],
                            factor * values[v + 3]));
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      atomicAdd(to + v, factor * values[v]);
    }
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 1)
    differentiate_kernel(const DeformAttnParams params, int lanes_log2, uint32_t tiles,
                         const T* __restrict__ grad,           // (B, Q, heads, D)
                         const T* __restrict__ value,          // (B, S, heads, D)
                         const float* __restrict__ locations,  // (B, Q, heads, levels, points, 2)
                         const float* __restrict__ weights,    // (B, Q, heads, levels, points)
                         float* __restrict__ grad_value,       // (B, S, heads, D), zero at first
                         float* __restrict__ grad_locations,   // (B, Q, heads, levels, points, 2)
                         float* __restrict__ grad_weights) {   // (B, Q, heads, levels, points)
  __shared__ Samples samples;
  const Item item(params, lanes_log2, tiles);
  const int first = static_cast<int>(threadIdx.x) - item.lane;
  const uint32_t row_bytes = params.stride * sizeof(T);
  const uint32_t grad_row_bytes = params.stride * sizeof(float);
  for (int level = 0; level < params.levels; ++level) {
    for (int point = 0; point < params.points; point += item.lanes) {
      const Sample own(params, item, level, point + item.lane, locations, weights);
      samples.to_shared(own);
      const int count = min(item.lanes, params.points - point);
      float along_x = 0.f, along_y = 0.f, sampled = 0.f;  // of the lane's own sample
      for (int block = 0; block < params.channels; block += item.lanes * V) {
        const int c = block + item.lane * V;
        const bool has_channels = item.exists && c < params.channels;
        float g[V] = {};
        if (has_channels) {
          load<V>(grad + item.index * params.channels + c, g);
        }
        for (int j = 0; j < count; ++j) {
          const Pack<float, kCorners> corner_weights = samples.weights[first + j];
          const Pack<int, kCorners> rows = samples.rows[first + j];
          Raw<T, V> raw[kCorners];
#pragma unroll
          for (int t = 0; t < kCorners; ++t) {
            raw[t] = load_if<V>(rows.values[t] >= 0 && has_channels, value + item.origin + c,
                                rows.values[t], row_bytes);
          }
          float products[kCorners] = {};  // of grad and each pixel
#pragma unroll
          for (int t = 0; t < kCorners; ++t) {
            float pixel[V];
            unpack<T>(raw[t], pixel);
#pragma unroll
            for (int v = 0; v < V; ++v) {
              products[t] = fmaf(g[v], pixel[v], products[t]);
            }
          }
#pragma unroll
          for (int t = 0; t < kCorners; ++t) {
            if (rows.values[t] >= 0 && has_channels) {
              atomic_add<V>(row_at(grad_value + item.origin + c, rows.values[t], grad_row_bytes),
                            corner_weights.values[t], g);
            }
          }
          // A pixel that does not exist adds nothing, whatever grad is, which may be NaN.
#pragma unroll
          for (int t = 0; t < kCorners; ++t) {
            products[t] = rows.values[t] >= 0 ? products[t] : 0.f;
          }
          const int source = first % kWarp + j;
          const float right = __shfl_sync(kAllLanes, own.right, source), left = 1.f - right;
          const float bottom = __shfl_sync(kAllLanes, own.bottom, source), top = 1.f - bottom;
          const float s = item_sum(item, top * fmaf(right, products[1], left * products[0]) +
                                             bottom * fmaf(right, products[3], left * products[2]));
          const float x = item_sum(
              item, fmaf(bottom, products[3] - products[2], top * (products[1] - products[0])));
          const float y = item_sum(
              item, fmaf(right, products[3] - products[1], left * (products[2] - products[0])));
          if (item.lane == j) {
            along_x += x;
            along_y += y;
            sampled += s;
          }
        }
      }
      if (item.exists && item.lane < count) {
        const int64_t at = (item.index * params.levels + level) * params.points + point + item.lane;
        const float location[2] = {own.weight * static_cast<float>(params.width[level]) * along_x,
                                   own.weight * static_cast<float>(params.height[level]) * along_y};
        store<2>(grad_locations + 2 * at, location);
        grad_weights[at] = sampled;
      }
    }
  }
}

// Lanes for one query and head: as many as its channels need, up to a warp.
int lanes_log2(int channels, int vector) {
  int log2 = 0;
  while (log2 < 5 && (vector << log2) < channels) {
    ++log2;
  }
  return log2;
}

// Blocks for all queries of a head of an image.
int64_t tile_count(const DeformAttnParams& params, int log2) {
  return ceil_div<int64_t>(params.queries, kThreads >> log2);
}

}  // namespace

cudaError_t launch_ms_deform_attn(const DeformAttnParams& params, const void* value,
                                  const float* locations, const float* weights, void* out) {
  Launcher launch{params.stream};
  with_type(params.type, [&](auto type) {
    using T = decltype(type);
    const auto* from = static_cast<const T*>(value);
    auto* to = static_cast<T*>(out);
    const bool vectorised = can_vectorise<T>(params.channels, from, to);
    const int log2 = lanes_log2(params.channels, vectorised ? kVectorSize<T> : 1);
    const int64_t tiles = tile_count(params, log2);
    launch.blocks(vectorised ? attend_kernel<T, kVectorSize<T>> : attend_kernel<T, 1>,
                  params.batch * tiles * params.heads, kThreads, 0, params, log2,
                  static_cast<uint32_t>(tiles), from, locations, weights, to);
  });
  return launch.error;
}

cudaError_t launch_ms_deform_attn_backward(const DeformAttnParams& params, const void* grad,
                                           const void* value, const float* locations,
                                           const float* weights, float* grad_value,
                                           float* grad_locations, float* grad_weights) {
  Launcher launch{params.stream};
  with_type(params.type, [&](auto type) {
    using T = decltype(type);
    const auto* of = static_cast<const T*>(grad);
    const auto* from = static_cast<const T*>(value);
    const bool vectorised = can_vectorise<T>(params.channels, of, from, grad_value);
    const int log2 = lanes_log2(params.channels, vectorised ? kVectorSize<T> : 1);
    const int64_t tiles = tile_count(params, log2);
    launch.blocks(vectorised ? differentiate_kernel<T, kVectorSize<T>> : differentiate_kernel<T, 1>,
                  params.batch * tiles * params.heads, kThreads, 0, params, log2,
                  static_cast<uint32_t>(tiles), of, from, locations, weights, grad_value,
                  grad_locations, grad_weights);
  });
  return launch.error;
}

}  // namespace expedite_d2::cuda
