// token_merge: the most similar tokens become part of their partners.
//
// Four launches. A block takes a tile of even tokens and goes through the odd ones, or a part of
// them, in tiles: products on the tensor cores, as in token_match, give the cosines in shared
// memory, of which only each token's best is kept. Then one warp per even token sums the product of
// the pair anew, in an order that does not depend on tiles: its score. One warp per even token
// counts the scores that come before its own, and one per 32 V channels of a token writes the
// result.
#include <cmath>

#include "cuda/members.cuh"
#include "cuda/token_match_tile.cuh"
#include "cuda/utils.cuh"

namespace expedite_d2::cuda {
namespace {

constexpr float kLeastLength = 1e-12f;
// The key of NaN, behind all others.
constexpr uint32_t kLastKey = 0xffffffffu;

// Keys order cosines from the largest to the smallest.
__device__ __forceinline__ uint32_t cosine_key(float cosine) {
  if (cosine != cosine) {
    return kLastKey;
  }
  // The sum makes 0 of -0.
  const uint32_t bits = __float_as_uint(cosine + 0.f);
  return bits >> 31 != 0 ? bits : bits ^ 0x7fffffffu;
}

// Of a token, from its square; NaN where that is not finite.
__device__ __forceinline__ float length_of(float square) {
  return isfinite(square) ? fmaxf(sqrtf(square), kLeastLength) : NAN;
}

EXPEDITE_HOST_DEVICE int32_t even_count(int32_t tokens) {
  return tokens - tokens / 2;
}

// How the search for partners is divided: one block per tile of an image's even tokens and part of
// the odd ones, which are token_match's tokens and centres.
struct MergePlan {
  int32_t tiles;
  CentreParts parts;
  int64_t blocks;

  MergePlan(const MergeParams& params, int multiprocessors) {
    tiles = ceil_div(even_count(params.tokens), kTileTokens);
    // The best of all parts together take no more memory than the tokens.
    const int64_t token_bytes = int64_t{params.channels} * (params.type == Type::kFloat ? 4 : 2);
    const int64_t best_bytes = sizeof(uint32_t) + sizeof(int32_t);
    parts = divide_centres(params.batch * tiles, ceil_div(params.tokens / 2, kTileCentres),
                           token_bytes / best_bytes, multiprocessors);
    blocks = params.batch * tiles * parts.count;
  }
};

// The best partner of every even token in a part of the odd ones.
template <typename T, int V>
__global__ void __launch_bounds__(kTileThreads, V == 1 ? 2 : kBlocksAtOnce)
    partner_kernel(const T* __restrict__ tokens,    // (B, N, C)
                   uint32_t* __restrict__ keys,     // (B, E, parts)
                   int32_t* __restrict__ partners,  // (B, E, parts)
                   MergePlan plan, int32_t count, int channels) {
  extern __shared__ __align__(16) float products[];
  __shared__ int64_t offsets[kTileRows];
  __shared__ float lengths[kTileRows];
  constexpr int kWarpRows = kTileTokens / kTileWarps;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const auto part = static_cast<int32_t>(blockIdx.x % plan.parts.count);
  const int64_t tile = blockIdx.x / plan.parts.count;
  const int64_t image = tile / plan.tiles;
  const int32_t odds = count / 2, evens = even_count(count);
  const int32_t first_even = static_cast<int32_t>(tile % plan.tiles) * kTileTokens;
  const int rows = min(evens - first_even, kTileTokens);
  const int32_t part_begin = part * plan.parts.tiles * kTileCentres;
  const int32_t part_end = min(odds, part_begin + plan.parts.tiles * kTileCentres);
  const T* from = tokens + image * count * channels;
  // Lane n has the best one of row warp + n * kTileWarps.
  uint32_t best_key = kLastKey;
  int32_t best = part_begin;

  for (int32_t first = part_begin; first < part_end; first += kTileCentres) {
    for (int r = static_cast<int>(threadIdx.x); r < kTileRows; r += kTileThreads) {
      const int32_t odd = first + r - kTileTokens;
      int64_t row = -1;
      if (r < rows) {
        row = 2 * (first_even + r);
      } else if (r >= kTileTokens && odd < part_end) {
        row = 2 * odd + 1;
      }
      offsets[r] = row * channels;
    }
    __syncthreads();
    tile_products<V>(from, from, offsets, static_cast<const T*>(nullptr), rows, part_end - first,
                     channels, products, lengths);
    for (int r = static_cast<int>(threadIdx.x); r < kTileRows; r += kTileThreads) {
      lengths[r] = length_of(lengths[r]);
    }
    __syncthreads();
    for (int n = 0; n < kWarpRows && warp + n * kTileWarps < rows; ++n) {
      const int t = warp + n * kTileWarps;
      const auto key_of = [&](int i) {
        return first + i < part_end ? cosine_key(products[t * kProductStride + i] /
                                                 (lengths[t] * lengths[kTileTokens + i]))
                                    : kLastKey;
      };
      const uint32_t low = key_of(lane), high = key_of(lane + kWarp);
      const uint32_t key = __reduce_min_sync(kAllLanes, min(low, high));
      const unsigned lows = __ballot_sync(kAllLanes, low == key);
      const unsigned highs = __ballot_sync(kAllLanes, high == key);
      // Of equals the first stays.
      if (lane == n && key < best_key) {
        const int at = __ffs(static_cast<int>(lows != 0 ? lows : highs)) - 1;
        best_key = key;
        best = first + at + (lows != 0 ? 0 : kWarp);
      }
    }
    // All warps have read products, lengths and offsets.
    __syncthreads();
  }
  const int t = warp + lane * kTileWarps;
  if (lane < kWarpRows && t < rows) {
    const int64_t at = (image * evens + first_even + t) * plan.parts.count + part;
    keys[at] = best_key;
    partners[at] = best;
  }
}

// The best partner in all parts, and the score. One warp per even token.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 4)
    score_kernel(const T* __restrict__ tokens,               // (B, N, C)
                 const uint32_t* __restrict__ part_keys,     // (B, E, parts)
                 const int32_t* __restrict__ part_partners,  // (B, E, parts)
                 uint32_t* __restrict__ keys,                // (B, E)
                 int32_t* __restrict__ partners,             // (B, E)
                 int parts, int32_t count, int channels, int64_t all_evens) {
  const int64_t even = global_warp();
  if (even >= all_evens) {
    return;
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int32_t evens = even_count(count);
  int64_t best = even * parts;
  for (int64_t at = best + 1; at < (even + 1) * parts; ++at) {
    // Of equals the first stays.
    if (part_keys[at] < part_keys[best]) {
      best = at;
    }
  }
  const int32_t partner = part_partners[best];
  const T* from = tokens + even / evens * count * channels;
  const T* a = from + 2 * (even % evens) * channels;
  const T* b = from + (2 * int64_t{partner} + 1) * channels;
  float squares[2] = {};
  for (int c = lane * V; c < channels; c += kWarp * V) {
    float x[V], y[V];
    load<V>(a + c, x);
    load<V>(b + c, y);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      squares[0] = fmaf(x[v], x[v], squares[0]);
      squares[1] = fmaf(y[v], y[v], squares[1]);
    }
  }
  const float a_length = length_of(warp_sum(squares[0]));
  const float b_length = length_of(warp_sum(squares[1]));
  float score = 0.f;
  for (int c = lane * V; c < channels; c += kWarp * V) {
    float x[V], y[V];
    load<V>(a + c, x);
    load<V>(b + c, y);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      score = fmaf(x[v] / a_length, y[v] / b_length, score);
    }
  }
  score = warp_sum(score);
  if (lane == 0) {
    keys[even] = cosine_key(score);
    partners[even] = partner;
  }
}

// Keeps the partners of the `merged` best scores in each image, and makes the others -1. One warp
// per even token.
__global__ void __launch_bounds__(kThreads, 4)
    rank_kernel(const uint32_t* __restrict__ keys,  // (B, E)
                int32_t* __restrict__ partners,     // (B, E)
                int32_t evens, int32_t merged, int64_t all_evens) {
  const int64_t even = global_warp();
  if (even >= all_evens) {
    return;
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const auto own_place = static_cast<int32_t>(even % evens);
  const uint32_t* image_keys = keys + (even - own_place);
  const uint32_t own = keys[even];
  int32_t rank = 0;
  for (int32_t start = 0; start < evens; start += kWarp) {
    const int32_t i = start + lane;
    const uint32_t key = i < evens ? image_keys[i] : kLastKey;
    // Of equals the first; what does not exist has no lower index.
    const bool precedes = key < own || (key == own && i < own_place);
    rank += __popc(__ballot_sync(kAllLanes, precedes));
  }
  if (lane == 0 && rank >= merged) {
    partners[even] = -1;
  }
}

// Tokens, sizes and places in the new order. One warp per 32 V channels of a token; a block takes
// the same channels of neighbouring tokens, and `tiles` blocks have all tokens of an image.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 4)
    write_kernel(const T* __restrict__ tokens,         // (B, N, C)
                 const float* __restrict__ sizes,      // (B, N)
                 const int32_t* __restrict__ targets,  // (B, E): partner, or -1; not read if
                                                       // nothing merges
                 T* __restrict__ out,                  // (B, N - merged, C)
                 float* __restrict__ out_sizes,        // (B, N - merged)
                 int32_t* __restrict__ places,         // (B, N)
                 int32_t count, int32_t merged, uint32_t tiles, int channels) {
  // 32-bit divisions: there are fewer than 2**31 blocks.
  const auto parts = static_cast<uint32_t>(ceil_div(channels, kWarp * V));
  const uint32_t part = blockIdx.x % parts, tile = blockIdx.x / parts;
  const int64_t image = tile / tiles;
  const auto token = static_cast<int32_t>(tile % tiles * kWarps + threadIdx.x / kWarp);
  if (token >= count) {
    return;
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int own_channel = (static_cast<int>(part) * kWarp + lane) * V;
  const int32_t evens = even_count(count), staying = evens - merged;
  const int32_t half = token / 2;
  const bool is_odd = token % 2 == 1;
  const int32_t* image_targets = merged > 0 ? targets + image * evens : nullptr;
  const float* image_sizes = sizes + image * count;
  const bool is_writer = part == 0 && lane == 0;
  int32_t place = is_odd ? staying + half : half;
  if (!is_odd && merged > 0) {
    const int32_t target = image_targets[half];
    if (target >= 0) {
      if (is_writer) {
        places[image * count + token] = staying + target;
      }
      return;
    }
    // Those before it that are gone.
    for (int32_t start = 0; start < half; start += kWarp) {
      const int32_t i = start + lane;
      place -= __popc(__ballot_sync(kAllLanes, i < half && image_targets[i] >= 0));
    }
  }

  // Lanes beyond the last channel read what another lane reads, and write nothing.
  const T* from = tokens + image * count * channels + min(own_channel, channels - V);
  const Raw<T, V> own = load_raw<V>(from + int64_t{token} * channels);
  float total = image_sizes[token];
  float sum[V];
  unpack<T>(own, sum);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    sum[v] *= total;
  }
  bool is_joined = false;
  if (is_odd && merged > 0) {
    for_each_member(image_targets, evens, half, [&](int32_t i) {
      const float size = image_sizes[2 * i];
      float z[V];
      load<V>(from + 2 * int64_t{i} * channels, z);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sum[v] = fmaf(size, z[v], sum[v]);
      }
      total += size;
      is_joined = true;
    });
  }
  const int64_t row = image * (count - merged) + place;
  if (is_writer) {
    out_sizes[row] = total;
    places[image * count + token] = place;
  }
  if (own_channel < channels) {
    T* to = out + row * channels + own_channel;
    if (is_joined) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sum[v] /= total;
      }
      store<V>(to, sum);
    } else {
      *reinterpret_cast<Raw<T, V>*>(to) = own;
    }
  }
}

}  // namespace

int64_t merge_scratch(const MergeParams& params, int multiprocessors) {
  if (params.merged == 0) {
    return 0;
  }
  const MergePlan plan(params, multiprocessors);
  // A key and a partner for each even token, and for each of its parts.
  return 2 * params.batch * even_count(params.tokens) * (int64_t{plan.parts.count} + 1);
}

cudaError_t launch_token_merge(const MergeParams& params, int multiprocessors, const void* tokens,
                               const float* sizes, int32_t* scratch, void* out, float* out_sizes,
                               int32_t* places) {
  Launcher launch{params.stream};
  const int32_t evens = even_count(params.tokens);
  const int64_t all_evens = params.batch * evens;
  int32_t* partners = scratch;  // (B, E)
  with_type(params.type, [&](auto type) {
    using T = decltype(type);
    const auto* z = static_cast<const T*>(tokens);
    auto* to = static_cast<T*>(out);
    const bool vectorised = can_vectorise<T>(params.channels, z, to);
    if (params.merged > 0) {
      const MergePlan plan(params, multiprocessors);
      auto* keys = reinterpret_cast<uint32_t*>(partners + all_evens);  // (B, E)
      int32_t* part_partners = partners + 2 * all_evens;               // (B, E, parts)
      auto* part_keys =
          reinterpret_cast<uint32_t*>(part_partners + all_evens * plan.parts.count);  // likewise
      launch.blocks(vectorised ? partner_kernel<T, kVectorSize<T>> : partner_kernel<T, 1>,
                    plan.blocks, kTileThreads, kTileBytes, z, part_keys, part_partners, plan,
                    params.tokens, params.channels);
      launch.warps(vectorised ? score_kernel<T, kVectorSize<T>> : score_kernel<T, 1>, all_evens, z,
                   static_cast<const uint32_t*>(part_keys),
                   static_cast<const int32_t*>(part_partners), keys, partners, plan.parts.count,
                   params.tokens, params.channels, all_evens);
      launch.warps(rank_kernel, all_evens, static_cast<const uint32_t*>(keys), partners, evens,
                   params.merged, all_evens);
    }
    const int parts = ceil_div(params.channels, kWarp * (vectorised ? kVectorSize<T> : 1));
    const int64_t tiles = ceil_div<int64_t>(params.tokens, kWarps);
    launch.blocks(vectorised ? write_kernel<T, kVectorSize<T>> : write_kernel<T, 1>,
                  params.batch * tiles * parts, kThreads, 0, z, sizes,
                  static_cast<const int32_t*>(partners), to, out_sizes, places, params.tokens,
                  params.merged, static_cast<uint32_t>(tiles), params.channels);
  });
  return launch.error;
}

}  // namespace expedite_d2::cuda
