// What the files of kernels offer to the host entries: plain pointers to dense data on the current
// device, a stream, and the error of the first launch that failed. No torch, no device code.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "geometry.h"

namespace expedite_d2::cuda {

enum class Type { kFloat, kBFloat16, kHalf };

// The tokens of one call and what all operators on them need.
struct Tokens {
  const void* data;  // (B, H, W, C)
  Type type;
  Grid grid;
  int64_t batch;
  int channels;
  cudaStream_t stream;
};

// The factor of squared distances.
struct Temperature {
  float value;
  const float* spread;  // (B,) or null
};

cudaError_t launch_token_spread(const Tokens& tokens, int radius,
                                float* spread,      // (B,)
                                float* mean,        // scratch (B, C)
                                float* centres,     // scratch (B, h', w', C)
                                float* nearest,     // scratch (B, H, W)
                                float* deviation);  // scratch (B, H, W)

// The most candidates that a token has along rows and columns of cells: the shape of its
// responsibilities.
struct CandidateShape {
  int32_t rows;
  int32_t columns;
};
CandidateShape candidate_shape(const Grid& grid, int radius);

// Any size. `iterations` 0 needs no scratch.
cudaError_t launch_token_cluster(const Tokens& tokens, int64_t iterations, int radius,
                                 bool has_window, Temperature temperature,
                                 float* centres,            // (B, h', w', C)
                                 float* responsibilities);  // scratch (B, H, W, shape) or null

// token_cluster or token_reduce for small windows, whose Gram matrices fit into shared memory.
struct ReduceParams {
  int64_t iterations;
  int radius;
  Temperature temperature;
  bool automatic;  // measures the spread, and divides the temperature by it
  float* spread;   // (B,), written if automatic
  void* centres;   // (B, h', w', C)
  int topk;
  int32_t* indices;  // (B, H, W, topk), or null: no match
  float* weights;    // (B, H, W, topk)
};

// How the work is divided, from sizes alone. `splits` is 0 where windows do not fit the device or
// would need too much scratch.
struct GramPlan {
  int splits;                 // blocks for the Gram matrix of a window
  int channels_per_split;     // channels of each
  int64_t floats_per_window;  // floats of scratch of each window, besides its mean
  int64_t scratch;            // floats of scratch in all
};
// `shared_memory`: bytes that a block may have.
GramPlan gram_plan(const Tokens& tokens, size_t shared_memory, int multiprocessors);
// `scratch` is aligned to 32 bytes.
cudaError_t launch_token_reduce(const Tokens& tokens, const GramPlan& plan,
                                const ReduceParams& params, float* scratch);

// Parts that the centres are divided into, each with a list of topk for every token. A single part
// needs no scratch.
int match_parts(const Tokens& tokens, int topk, int multiprocessors);
cudaError_t launch_token_match(const Tokens& tokens, int topk, int multiprocessors,
                               Temperature temperature,
                               const float* centres,  // (B, h', w', C)
                               float* distances,      // scratch (B, H, W, parts, topk) or null
                               int32_t* neighbours,   // scratch (B, H, W, parts, topk) or null
                               int32_t* indices,      // (B, H, W, topk)
                               float* weights);       // (B, H, W, topk)

// Sizes for all of token_reconstruct's tensors; N tokens and K centres per image.
struct ReconstructParams {
  Type type;
  int64_t batch;
  int64_t tokens;
  int64_t cells;
  int64_t topk;
  int channels;
  cudaStream_t stream;
};
cudaError_t launch_token_reconstruct(const ReconstructParams& params,
                                     const void* refined,     // (B, K, C)
                                     const int32_t* indices,  // (B, N, topk)
                                     const float* weights,    // (B, N, topk)
                                     const void* tokens,      // (B, N, C) or null
                                     const void* centres,     // (B, K, C) or null
                                     void* out);              // (B, N, C)

// Sizes for all of token_merge's tensors; E = N - N / 2 even tokens per image.
struct MergeParams {
  Type type;
  int64_t batch;
  int32_t tokens;
  int32_t merged;
  int channels;
  cudaStream_t stream;
};
// Length of the scratch that the launch needs.
int64_t merge_scratch(const MergeParams& params, int multiprocessors);
cudaError_t launch_token_merge(const MergeParams& params, int multiprocessors,
                               const void* tokens,  // (B, N, C)
                               const float* sizes,  // (B, N)
                               int32_t* scratch,
                               void* out,         // (B, N - merged, C)
                               float* out_sizes,  // (B, N - merged)
                               int32_t* places);  // (B, N)

// Sizes for all of token_pool's tensors.
struct PoolParams {
  Type type;
  int64_t batch;
  int32_t tokens;
  int32_t groups;
  int channels;
  cudaStream_t stream;
};
cudaError_t launch_token_pool(const PoolParams& params,
                              const void* tokens,     // (B, N, C)
                              const int32_t* groups,  // (B, N)
                              void* out);             // (B, groups, C)

// Sizes for all of ms_deform_attn's tensors. Those of the levels go to the kernel by value: nothing
// is copied to the device.
constexpr int kMaxLevels = 16;
struct DeformAttnParams {
  Type type;
  int64_t batch;
  int64_t rows;  // S, of all maps
  int64_t queries;
  int64_t heads;
  int channels;  // D, of one head
  int stride;    // heads * D, of one row
  int levels;
  int points;
  int32_t height[kMaxLevels];
  int32_t width[kMaxLevels];
  int32_t start[kMaxLevels];  // first row of the level's map
  cudaStream_t stream;
};
// `locations` and their gradient are aligned to 8 bytes.
cudaError_t launch_ms_deform_attn(const DeformAttnParams& params,
                                  const void* value,       // (B, S, heads, D)
                                  const float* locations,  // (B, Q, heads, levels, points, 2)
                                  const float* weights,    // (B, Q, heads, levels, points)
                                  void* out);              // (B, Q, heads, D)
cudaError_t launch_ms_deform_attn_backward(
    const DeformAttnParams& params,
    const void* grad,        // (B, Q, heads, D)
    const void* value,       // (B, S, heads, D)
    const float* locations,  // (B, Q, heads, levels, points, 2)
    const float* weights,    // (B, Q, heads, levels, points)
    float* grad_value,       // (B, S, heads, D), zero at first
    float* grad_locations,   // (B, Q, heads, levels, points, 2)
    float* grad_weights);    // (B, Q, heads, levels, points)

}  // namespace expedite_d2::cuda
