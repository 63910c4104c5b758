// Sorted lists of the nearest centres, for token_match.
#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/utils.cuh"

namespace expedite_d2::cuda {

// A centre of the window and its squared distance. `centre` is -1 where there is none.
struct Pick {
  float distance;
  int32_t centre;
};

// Distances in the order of picks: NaN and infinity come last, in the order of their centres, and
// behind them what is no centre. Never negative, so that their bits are ordered as they are.
__device__ __forceinline__ unsigned order(const Pick& pick) {
  const float key = pick.distance < FLT_MAX ? pick.distance : FLT_MAX;
  return __float_as_uint(pick.centre < 0 ? INFINITY : key);
}

__device__ __forceinline__ bool precedes(const Pick& a, const Pick& b) {
  const unsigned first = order(a), second = order(b);
  return first < second || (first == second && a.centre < b.centre);
}

__device__ __forceinline__ Pick pick_of(const Pick& pick, int lane) {
  return {__shfl_sync(kAllLanes, pick.distance, lane), __shfl_sync(kAllLanes, pick.centre, lane)};
}

// A sorted list of `length` picks of one token.
struct List {
  float* distances;
  int32_t* centres;
  int length;
};

// Merges what each lane has found into a list, by a full warp; of an empty list nothing is read.
// Each 32 places of the list keep the nearest; what they give up goes on to those behind them.
__device__ __forceinline__ void merge(const List& list, bool is_empty, Pick nearer, Pick farther) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int start = 0; start < list.length; start += kWarp) {
    const int place = start + lane;
    const bool exists = place < list.length;
    const int last = min(list.length - start, kWarp) - 1;
    Pick own{INFINITY, -1};
    if (!is_empty && exists) {
      own = {list.distances[place], list.centres[place]};
    }
    while (true) {
      if (precedes(farther, nearer)) {
        const Pick swapped = nearer;
        nearer = farther;
        farther = swapped;
      }
      const unsigned least = __reduce_min_sync(kAllLanes, order(nearer));
      const bool is_least = order(nearer) == least;
      const auto centre = static_cast<unsigned>(nearer.centre);
      const unsigned lowest = __reduce_min_sync(kAllLanes, is_least ? centre : ~0u);
      const unsigned owners = __ballot_sync(kAllLanes, is_least && centre == lowest);
      const int owner = __ffs(static_cast<int>(owners)) - 1;
      const Pick next = pick_of(nearer, owner);
      const Pick given_up = pick_of(own, last);
      if (!precedes(next, given_up)) {
        break;
      }
      const int at = __popc(__ballot_sync(kAllLanes, precedes(own, next)));
      const Pick before{__shfl_up_sync(kAllLanes, own.distance, 1),
                        __shfl_up_sync(kAllLanes, own.centre, 1)};
      if (lane >= at) {
        own = lane == at ? next : before;
      }
      if (lane == owner) {
        nearer = given_up;
      }
    }
    if (exists) {
      list.distances[place] = own.distance;
      list.centres[place] = own.centre;
    }
  }
}

}  // namespace expedite_d2::cuda
