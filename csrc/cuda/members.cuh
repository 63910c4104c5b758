// The members of a group of tokens, for token_merge and token_pool.
#pragma once

#include "cuda/utils.cuh"

namespace expedite_d2::cuda {

// Calls f(i) for every i with groups[i] == group, in ascending order. By a full warp, whose reads
// of `groups` the other warps of its block share through the L1 cache.
template <typename F>
__device__ __forceinline__ void for_each_member(const int32_t* groups, int32_t count, int32_t group,
                                                F f) {
  // Reads that are in flight together.
  constexpr int kReads = 4;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int32_t start = 0; start < count; start += kReads * kWarp) {
    bool belongs[kReads];
#pragma unroll
    for (int n = 0; n < kReads; ++n) {
      const int32_t i = start + n * kWarp + lane;
      belongs[n] = i < count && groups[i] == group;
    }
#pragma unroll
    for (int n = 0; n < kReads; ++n) {
      unsigned members = __ballot_sync(kAllLanes, belongs[n]);
      while (members != 0) {
        f(start + n * kWarp + __ffs(static_cast<int>(members)) - 1);
        members &= members - 1;
      }
    }
  }
}

}  // namespace expedite_d2::cuda
