// ms_deform_attn: samples of feature maps, weighted, for every query and head; and its gradients.
//
// A few lanes, a power of two, share one query and head and read its channels 16 bytes at a time.
// They fetch their samples' locations side by side, one a lane, and pass them round. A block takes
// neighbouring queries of one head, whose samples overlap in the cache, and blocks that follow one
// another take the other heads, whose locations lie in between.
#include "cuda/utils.cuh"

namespace expedite_d2::cuda {
namespace {

constexpr int kCorners = 4;

// The query and head of a thread, and its place among the lanes that share them.
struct Item {
  int64_t index;   // of query and head: (b * Q + q) * heads + h
  int64_t origin;  // first channel of head h in row 0 of image b
  bool exists;     // false beyond the last query
  int lane, lanes, first_lane;

  __device__ Item(const Deformation& sizes, int lanes_log2) {
    lanes = 1 << lanes_log2;
    lane = static_cast<int>(threadIdx.x) & (lanes - 1);
    first_lane = static_cast<int>(threadIdx.x) % kWarp - lane;
    const int64_t tiles = ceil_div<int64_t>(sizes.queries, kThreads >> lanes_log2);
    const int64_t head = blockIdx.x % sizes.heads, tile = blockIdx.x / sizes.heads;
    const int64_t image = tile / tiles;
    const int64_t query = tile % tiles * (kThreads >> lanes_log2) + (threadIdx.x >> lanes_log2);
    exists = query < sizes.queries;
    index = (image * sizes.queries + query) * sizes.heads + head;
    origin = (image * sizes.rows * sizes.heads + head) * sizes.channels;
  }
};

// A sample in pixels of its map. Outside of it x and y are -2, so that no corner is inside.
struct Sample {
  float x, y, weight;
};

// Sample `point` of `item`, as the lane finds it that fetches it.
__device__ __forceinline__ Sample fetch(const Deformation& sizes, const Item& item, int level,
                                        int point, const float* locations, const float* weights) {
  if (!item.exists || point >= sizes.points) {
    return {-2.f, -2.f, 0.f};
  }
  const int64_t at = (item.index * sizes.levels + level) * sizes.points + point;
  float location[2];
  load<2>(locations + 2 * at, location);
  const float width = static_cast<float>(sizes.width[level]);
  const float height = static_cast<float>(sizes.height[level]);
  const float x = fmaf(location[0], width, -0.5f), y = fmaf(location[1], height, -0.5f);
  // False for NaN and infinity.
  const bool inside = x > -1.f && x < width && y > -1.f && y < height;
  const bool nan = x != x || y != y;
  return {inside ? x : -2.f, inside ? y : -2.f, nan ? nanf("") : weights[at]};
}

// The sample that lane `from` of the item has fetched.
__device__ __forceinline__ Sample pass(const Item& item, const Sample& sample, int from) {
  const int source = item.first_lane + from;
  return {__shfl_sync(kAllLanes, sample.x, source), __shfl_sync(kAllLanes, sample.y, source),
          __shfl_sync(kAllLanes, sample.weight, source)};
}

// The four pixels around a sample: top left, top right, bottom left, bottom right.
struct Corners {
  float right, bottom;  // how far the sample is from the left and the top ones, from 0 to 1
  bool exist[kCorners];
  int rows[kCorners];  // of value; only those that exist may be read

  __device__ Corners(const Deformation& sizes, int level, const Sample& sample) {
    const int width = sizes.width[level];
    const float left = floorf(sample.x), top = floorf(sample.y);
    right = sample.x - left;
    bottom = sample.y - top;
    const int column = static_cast<int>(left), row = static_cast<int>(top);
    const bool has_left = column >= 0, has_right = column >= -1 && column + 1 < width;
    const bool has_top = row >= 0, has_bottom = row >= -1 && row + 1 < sizes.height[level];
    exist[0] = has_top && has_left;
    exist[1] = has_top && has_right;
    exist[2] = has_bottom && has_left;
    exist[3] = has_bottom && has_right;
    rows[0] = sizes.start[level] + row * width + column;
    rows[1] = rows[0] + 1;
    rows[2] = rows[0] + width;
    rows[3] = rows[2] + 1;
  }

  // Shares of the sample's weight.
  __device__ void weigh(float weight, float (&weights)[kCorners]) const {
    weights[0] = weight * ((1.f - bottom) * (1.f - right));
    weights[1] = weight * ((1.f - bottom) * right);
    weights[2] = weight * (bottom * (1.f - right));
    weights[3] = weight * (bottom * right);
  }
};

// Channels, or zeros where there is no pixel.
template <int V, typename T>
__device__ __forceinline__ void load_if(bool exists, const T* from, float (&values)[V]) {
  if (exists) {
    load<V>(from, values);
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      values[v] = 0.f;
    }
  }
}

// out_qh = sum over levels and points of weight * value at the location.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 1)
    attend_kernel(const Deformation sizes, int lanes_log2,
                  const T* __restrict__ value,          // (B, S, heads, D)
                  const float* __restrict__ locations,  // (B, Q, heads, levels, points, 2)
                  const float* __restrict__ weights,    // (B, Q, heads, levels, points)
                  T* __restrict__ out) {                // (B, Q, heads, D)
  const Item item(sizes, lanes_log2);
  for (int block = 0; block < sizes.channels; block += item.lanes * V) {
    const int c = block + item.lane * V;
    const bool has_channels = c < sizes.channels;
    const T* from = value + item.origin + c;
    float sum[V] = {};
    for (int level = 0; level < sizes.levels; ++level) {
      for (int point = 0; point < sizes.points; point += item.lanes) {
        const Sample own = fetch(sizes, item, level, point + item.lane, locations, weights);
        const int count = min(item.lanes, sizes.points - point);
#pragma unroll 2
        for (int j = 0; j < count; ++j) {
          const Sample sample = pass(item, own, j);
          const Corners corners(sizes, level, sample);
          float shares[kCorners];
          corners.weigh(sample.weight, shares);
#pragma unroll
          for (int t = 0; t < kCorners; ++t) {
            float pixel[V];
            load_if<V>(corners.exist[t] && has_channels,
                       from + int64_t{corners.rows[t]} * sizes.stride, pixel);
#pragma unroll
            for (int v = 0; v < V; ++v) {
              sum[v] = fmaf(shares[t], pixel[v], sum[v]);
            }
          }
        }
      }
    }
    if (item.exists && has_channels) {
      store<V>(out + item.index * sizes.channels + c, sum);
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
    differentiate_kernel(const Deformation sizes, int lanes_log2,
                         const T* __restrict__ grad,           // (B, Q, heads, D)
                         const T* __restrict__ value,          // (B, S, heads, D)
                         const float* __restrict__ locations,  // (B, Q, heads, levels, points, 2)
                         const float* __restrict__ weights,    // (B, Q, heads, levels, points)
                         float* __restrict__ grad_value,       // (B, S, heads, D), zero at first
                         float* __restrict__ grad_locations,   // (B, Q, heads, levels, points, 2)
                         float* __restrict__ grad_weights) {   // (B, Q, heads, levels, points)
  const Item item(sizes, lanes_log2);
  for (int level = 0; level < sizes.levels; ++level) {
    for (int point = 0; point < sizes.points; point += item.lanes) {
      const Sample own = fetch(sizes, item, level, point + item.lane, locations, weights);
      const int count = min(item.lanes, sizes.points - point);
      float along_x = 0.f, along_y = 0.f, sampled = 0.f;  // of the lane's own sample
      for (int block = 0; block < sizes.channels; block += item.lanes * V) {
        const int c = block + item.lane * V;
        const bool has_channels = item.exists && c < sizes.channels;
        float g[V];
        load_if<V>(has_channels, grad + item.index * sizes.channels + c, g);
        for (int j = 0; j < count; ++j) {
          const Sample sample = pass(item, own, j);
          const Corners corners(sizes, level, sample);
          float shares[kCorners];
          corners.weigh(sample.weight, shares);
          float products[kCorners] = {};  // of grad and each pixel
#pragma unroll
          for (int t = 0; t < kCorners; ++t) {
            const int64_t at = item.origin + int64_t{corners.rows[t]} * sizes.stride + c;
            const bool exists = corners.exist[t] && has_channels;
            float pixel[V];
            load_if<V>(exists, value + at, pixel);
#pragma unroll
            for (int v = 0; v < V; ++v) {
              products[t] = fmaf(g[v], pixel[v], products[t]);
            }
            if (exists) {
              atomic_add<V>(grad_value + at, shares[t], g);
            }
          }
          const float top_slope = products[1] - products[0];
          const float bottom_slope = products[3] - products[2];
          const float top = fmaf(corners.right, top_slope, products[0]);
          const float bottom = fmaf(corners.right, bottom_slope, products[2]);
          const float x =
              item_sum(item, (1.f - corners.bottom) * top_slope + corners.bottom * bottom_slope);
          const float y = item_sum(item, bottom - top);
          const float s = item_sum(item, fmaf(corners.bottom, bottom - top, top));
          if (item.lane == j) {
            along_x += x;
            along_y += y;
            sampled += s;
          }
        }
      }
      if (item.exists && item.lane < count) {
        const int64_t at = (item.index * sizes.levels + level) * sizes.points + point + item.lane;
        const float location[2] = {own.weight * static_cast<float>(sizes.width[level]) * along_x,
                                   own.weight * static_cast<float>(sizes.height[level]) * along_y};
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

int64_t block_count(const Deformation& sizes, int log2) {
  return sizes.batch * ceil_div<int64_t>(sizes.queries, kThreads >> log2) * sizes.heads;
}

}  // namespace

cudaError_t launch_ms_deform_attn(const Deformation& sizes, const void* value,
                                  const float* locations, const float* weights, void* out) {
  Launcher launch{sizes.stream};
  with_type(sizes.type, [&](auto type) {
    using T = decltype(type);
    const auto* from = static_cast<const T*>(value);
    auto* to = static_cast<T*>(out);
    const bool wide = can_read_wide<T>(sizes.channels, from, to);
    const int log2 = lanes_log2(sizes.channels, wide ? kWide<T> : 1);
    launch.blocks(wide ? attend_kernel<T, kWide<T>> : attend_kernel<T, 1>, block_count(sizes, log2),
                  kThreads, 0, sizes, log2, from, locations, weights, to);
  });
  return launch.error;
}

cudaError_t launch_ms_deform_attn_backward(const Deformation& sizes, const void* grad,
                                           const void* value, const float* locations,
                                           const float* weights, float* grad_value,
                                           float* grad_locations, float* grad_weights) {
  Launcher launch{sizes.stream};
  with_type(sizes.type, [&](auto type) {
    using T = decltype(type);
    const auto* of = static_cast<const T*>(grad);
    const auto* from = static_cast<const T*>(value);
    const bool wide = can_read_wide<T>(sizes.channels, of, from, grad_value);
    const int log2 = lanes_log2(sizes.channels, wide ? kWide<T> : 1);
    launch.blocks(wide ? differentiate_kernel<T, kWide<T>> : differentiate_kernel<T, 1>,
                  block_count(sizes, log2), kThreads, 0, sizes, log2, of, from, locations, weights,
                  grad_value, grad_locations, grad_weights);
  });
  return launch.error;
}

}  // namespace expedite_d2::cuda
