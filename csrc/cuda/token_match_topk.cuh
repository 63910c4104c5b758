// Sorted lists of the nearest centres, for token_match.
#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/utils.cuh"

namespace expedite_d2::cuda {

// A centre of the window and its squared distance. `centre` is -1 where there is none.
struct Neighbour {
  float distance;
  int32_t centre;
};

// The key that neighbours are sorted by: the bits of the distance, which is never negative, so they
// order as the distance does. NaN and infinity come last, ties in the order of their centres, and
// behind them empty entries.
__device__ __forceinline__ unsigned sort_key(const Neighbour& neighbour) {
  const float key = neighbour.distance < FLT_MAX ? neighbour.distance : FLT_MAX;
  return __float_as_uint(neighbour.centre < 0 ? INFINITY : key);
}

__device__ __forceinline__ bool precedes(const Neighbour& a, const Neighbour& b) {
  const unsigned first = sort_key(a), second = sort_key(b);
  return first < second || (first == second && a.centre < b.centre);
}

__device__ __forceinline__ Neighbour neighbour_of_lane(const Neighbour& neighbour, int lane) {
  return {__shfl_sync(kAllLanes, neighbour.distance, lane),
          __shfl_sync(kAllLanes, neighbour.centre, lane)};
}

// A sorted list of `length` neighbours of one token.
struct TopkList {
  float* distances;
  int32_t* centres;
  int length;
};

// Inserts the two neighbours of each lane into a list, by a full warp. An empty list is not read.
// The list is updated 32 entries at a time; evicted entries move to the next 32.
__device__ __forceinline__ void insert(const TopkList& list, bool is_empty, Neighbour nearer,
                                       Neighbour farther) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int start = 0; start < list.length; start += kWarp) {
    const int place = start + lane;
    const bool exists = place < list.length;
    const int last = min(list.length - start, kWarp) - 1;
    Neighbour own{INFINITY, -1};
    if (!is_empty && exists) {
      own = {list.distances[place], list.centres[place]};
    }
    while (true) {
      if (precedes(farther, nearer)) {
        const Neighbour swapped = nearer;
        nearer = farther;
        farther = swapped;
      }
      const unsigned smallest = __reduce_min_sync(kAllLanes, sort_key(nearer));
      const bool is_smallest = sort_key(nearer) == smallest;
      const auto centre = static_cast<unsigned>(nearer.centre);
      const unsigned lowest = __reduce_min_sync(kAllLanes, is_smallest ? centre : ~0u);
      const unsigned owners = __ballot_sync(kAllLanes, is_smallest && centre == lowest);
      const int owner = __ffs(static_cast<int>(owners)) - 1;
      const Neighbour next = neighbour_of_lane(nearer, owner);
      const Neighbour evicted = neighbour_of_lane(own, last);
      if (!precedes(next, evicted)) {
        break;
      }
      const int at = __popc(__ballot_sync(kAllLanes, precedes(own, next)));
      const Neighbour before{__shfl_up_sync(kAllLanes, own.distance, 1),
                             __shfl_up_sync(kAllLanes, own.centre, 1)};
      if (lane >= at) {
        own = lane == at ? next : before;
      }
      if (lane == owner) {
        nearer = evicted;
      }
    }
    if (exists) {
      list.distances[place] = own.distance;
      list.centres[place] = own.centre;
    }
  }
}

}  // namespace expedite_d2::cuda
