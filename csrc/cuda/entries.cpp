// The CUDA kernels as operators: checks, memory, the choice of a path, registration. In one file,
// because torch's headers take longer to compile than all that stands here.
//
// Only the c10/cuda headers are included: ATen/cuda/CUDAContext.h needs those of cuBLAS and
// cuSPARSE, which a bare CUDA toolkit lacks. Nothing here waits for the device or copies from it.
#include <limits>
#include <optional>
#include <tuple>

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "checks.h"
#include "cuda/launch.h"

namespace expedite_d2::cuda {
namespace {

Type kernel_type(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Type::kFloat;
    case at::kBFloat16:
      return Type::kBFloat16;
    default:
      return Type::kHalf;  // check_tokens admits no other
  }
}

// The kernels count channels in 32 bits, with room to step over the end, and the bytes of a row.
int checked_channels(const char* op, const at::Tensor& map) {
  TORCH_CHECK_VALUE(map.size(3) < (1 << 30), op, ": expected fewer than 2**30 channels, got ",
                    map.size(3));
  return static_cast<int>(map.size(3));
}

void check_iterations(const char* op, int64_t iterations) {
  TORCH_CHECK_VALUE(iterations >= 0, op, ": expected iterations of at least 0, got ", iterations);
}

void check_topk(const char* op, int64_t topk) {
  TORCH_CHECK_VALUE(topk >= 1 && topk <= std::numeric_limits<int32_t>::max() / 2, op,
                    ": expected topk of at least 1 and less than 2**30, got ", topk);
}

std::optional<at::Tensor> dense(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? std::make_optional(tensor->contiguous()) : std::nullopt;
}

const void* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

Temperature make_temperature(double value, const std::optional<at::Tensor>& spread) {
  return {static_cast<float>(value), static_cast<const float*>(data_or_null(spread))};
}

// Dense `tokens` on the current device and stream.
Tokens make_tokens(const char* op, const at::Tensor& tokens, const Grid& grid) {
  return {tokens.const_data_ptr(),
          kernel_type(tokens),
          grid,
          tokens.size(0),
          checked_channels(op, tokens),
          c10::cuda::getCurrentCUDAStream().stream()};
}

at::Tensor empty_map(const at::Tensor& tokens, const Grid& grid, at::ScalarType type) {
  return at::empty({tokens.size(0), grid.rows.cells(), grid.columns.cells(), tokens.size(3)},
                   tokens.options().dtype(type));
}

int device_attribute(cudaDeviceAttr attribute) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, c10::cuda::current_device()));
  return value;
}

// Bytes of shared memory that one block may have on the current device: 99 KiB on some cards, 227
// on others.
size_t shared_memory_limit() {
  return static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

GramPlan make_gram_plan(const Tokens& tokens) {
  return gram_plan(tokens, shared_memory_limit(), device_attribute(cudaDevAttrMultiProcessorCount));
}

void run_gram(const Tokens& tokens, const GramPlan& plan, const GramReduction& reduction,
              const at::TensorOptions& options) {
  const at::Tensor scratch = at::empty({plan.scratch}, options.dtype(at::kFloat));
  C10_CUDA_CHECK(launch_windows_gram(tokens, plan, reduction, scratch.mutable_data_ptr<float>()));
}

at::Tensor token_spread_cuda(const at::Tensor& tokens,        // (B, H, W, C)
                             at::IntArrayRef clusters,        // (h, w)
                             at::OptionalIntArrayRef window,  // (M_h, M_w)
                             int64_t neighbourhood) {
  constexpr const char* op = "token_spread";
  check_tokens(op, "tokens", tokens);
  check_neighbourhood(op, neighbourhood);
  const Grid grid = make_grid(op, tokens, clusters, window);
  const c10::cuda::CUDAGuard guard(tokens.device());
  const auto options = tokens.options().dtype(at::kFloat);
  if (tokens.numel() == 0) {
    return at::zeros({tokens.size(0)}, options);
  }
  const at::Tensor tokens_ = tokens.contiguous();
  const at::Tensor spread = at::empty({tokens.size(0)}, options);
  const at::Tensor mean = at::empty({tokens.size(0), tokens.size(3)}, options);
  const at::Tensor centres = empty_map(tokens, grid, at::kFloat);
  const at::Tensor nearest = at::empty(tokens.sizes().slice(0, 3), options);
  const at::Tensor deviation = at::empty(tokens.sizes().slice(0, 3), options);
  C10_CUDA_CHECK(
      launch_token_spread(make_tokens(op, tokens_, grid), static_cast<int>(neighbourhood / 2),
                          spread.mutable_data_ptr<float>(), mean.mutable_data_ptr<float>(),
                          centres.mutable_data_ptr<float>(), nearest.mutable_data_ptr<float>(),
                          deviation.mutable_data_ptr<float>()));
  return spread;
}

at::Tensor token_cluster_cuda(const at::Tensor& tokens,        // (B, H, W, C)
                              at::IntArrayRef clusters,        // (h, w)
                              at::OptionalIntArrayRef window,  // (M_h, M_w)
                              int64_t iterations, int64_t neighbourhood, double temperature,
                              const std::optional<at::Tensor>& spread) {  // (B,)
  constexpr const char* op = "token_cluster";
  check_tokens(op, "tokens", tokens);
  check_neighbourhood(op, neighbourhood);
  check_spread(op, spread, tokens);
  check_iterations(op, iterations);
  const Grid grid = make_grid(op, tokens, clusters, window);
  const c10::cuda::CUDAGuard guard(tokens.device());
  const at::Tensor centres = empty_map(tokens, grid, tokens.scalar_type());
  if (centres.numel() == 0) {
    return centres;
  }
  const at::Tensor tokens_ = tokens.contiguous();
  const std::optional<at::Tensor> spread_ = dense(spread);
  const int radius = static_cast<int>(neighbourhood / 2);
  const Tokens input = make_tokens(op, tokens_, grid);
  const Temperature tau = make_temperature(temperature, spread_);
  const GramPlan plan = make_gram_plan(input);
  if (iterations > 0 && plan.splits > 0) {
    GramReduction reduction{};
    reduction.iterations = iterations;
    reduction.radius = radius;
    reduction.temperature = tau;
    reduction.centres = centres.mutable_data_ptr();
    run_gram(input, plan, reduction, tokens.options());
    return centres;
  }
  at::Tensor scratch, responsibilities;
  if (iterations > 0) {
    const Slots slots = candidate_slots(grid, radius);
    scratch = input.type == Type::kFloat ? centres : empty_map(tokens, grid, at::kFloat);
    responsibilities =
        at::empty({tokens.size(0), tokens.size(1), tokens.size(2), slots.rows, slots.columns},
                  scratch.options());
  }
  C10_CUDA_CHECK(
      launch_token_cluster(input, iterations, radius, tau, centres.mutable_data_ptr(),
                           iterations > 0 ? scratch.mutable_data_ptr<float>() : nullptr,
                           iterations > 0 ? responsibilities.mutable_data_ptr<float>() : nullptr));
  return centres;
}

std::tuple<at::Tensor, at::Tensor> token_match_cuda(
    const at::Tensor& tokens,        // (B, H, W, C)
    const at::Tensor& centres,       // (B, h', w', C)
    at::IntArrayRef clusters,        // (h, w)
    at::OptionalIntArrayRef window,  // (M_h, M_w)
    int64_t topk, double temperature,
    const std::optional<at::Tensor>& spread) {  // (B,)
  constexpr const char* op = "token_match";
  check_tokens(op, "tokens", tokens);
  check_tokens(op, "centres", centres);
  check_same_device(op, "centres", centres, "tokens", tokens);
  check_same_type(op, "centres", centres, "tokens", tokens);
  check_spread(op, spread, tokens);
  check_topk(op, topk);
  const Grid grid = make_grid(op, tokens, clusters, window);
  check_shape(op, "centres", centres,
              {tokens.size(0), grid.rows.cells(), grid.columns.cells(), tokens.size(3)});
  const c10::cuda::CUDAGuard guard(tokens.device());
  const auto options = tokens.options();
  const at::Tensor indices =
      at::empty({tokens.size(0), tokens.size(1), tokens.size(2), topk}, options.dtype(at::kInt));
  const at::Tensor weights = at::empty(indices.sizes(), options.dtype(at::kFloat));
  if (indices.numel() == 0) {
    return {indices, weights};
  }
  const at::Tensor tokens_ = tokens.contiguous();
  const at::Tensor centres_ = centres.contiguous();
  const std::optional<at::Tensor> spread_ = dense(spread);
  const Tokens input = make_tokens(op, tokens_, grid);
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int parts = match_parts(input, static_cast<int>(topk), multiprocessors);
  at::Tensor distances, picks;
  if (parts > 1) {
    distances =
        at::empty({tokens.size(0), tokens.size(1), tokens.size(2), parts, topk}, weights.options());
    picks = at::empty(distances.sizes(), indices.options());
  }
  C10_CUDA_CHECK(launch_token_match(
      input, static_cast<int>(topk), multiprocessors, make_temperature(temperature, spread_),
      centres_.const_data_ptr(), parts > 1 ? distances.mutable_data_ptr<float>() : nullptr,
      parts > 1 ? picks.mutable_data_ptr<int32_t>() : nullptr, indices.mutable_data_ptr<int32_t>(),
      weights.mutable_data_ptr<float>()));
  return {indices, weights};
}

// All three, in one path where windows are small: the tokens are read for their Gram matrices and
// once more for the centres.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> token_reduce_cuda(
    const at::Tensor& tokens,        // (B, H, W, C)
    at::IntArrayRef clusters,        // (h, w)
    at::OptionalIntArrayRef window,  // (M_h, M_w)
    int64_t iterations, int64_t neighbourhood, int64_t topk, double temperature, bool automatic) {
  constexpr const char* op = "token_reduce";
  check_tokens(op, "tokens", tokens);
  check_neighbourhood(op, neighbourhood);
  check_iterations(op, iterations);
  check_topk(op, topk);
  const Grid grid = make_grid(op, tokens, clusters, window);
  const c10::cuda::CUDAGuard guard(tokens.device());
  const at::Tensor tokens_ = tokens.contiguous();
  const Tokens input = make_tokens(op, tokens_, grid);
  const auto options = tokens.options();
  const GramPlan plan = tokens.numel() > 0 ? make_gram_plan(input) : GramPlan{};
  if (plan.splits == 0) {
    const auto spread = automatic ? token_spread_cuda(tokens_, clusters, window, neighbourhood)
                                  : at::ones({tokens.size(0)}, options.dtype(at::kFloat));
    const auto centres = token_cluster_cuda(tokens_, clusters, window, iterations, neighbourhood,
                                            temperature, spread);
    const auto [indices, weights] =
        token_match_cuda(tokens_, centres, clusters, window, topk, temperature, spread);
    return {spread, centres, indices, weights};
  }
  const int64_t images = tokens.size(0);
  const at::Tensor spread = automatic ? at::empty({images}, options.dtype(at::kFloat))
                                      : at::ones({images}, options.dtype(at::kFloat));
  const at::Tensor centres = empty_map(tokens, grid, tokens.scalar_type());
  const at::Tensor indices =
      at::empty({images, tokens.size(1), tokens.size(2), topk}, options.dtype(at::kInt));
  const at::Tensor weights = at::empty(indices.sizes(), options.dtype(at::kFloat));
  run_gram(input, plan,
           {iterations, static_cast<int>(neighbourhood / 2), make_temperature(temperature, {}),
            automatic, spread.mutable_data_ptr<float>(), centres.mutable_data_ptr(),
            static_cast<int>(topk), indices.mutable_data_ptr<int32_t>(),
            weights.mutable_data_ptr<float>()},
           options);
  return {spread, centres, indices, weights};
}

at::Tensor token_reconstruct_cuda(const at::Tensor& refined,                   // (B, h', w', C)
                                  const at::Tensor& indices,                   // (B, H, W, topk)
                                  const at::Tensor& weights,                   // (B, H, W, topk)
                                  const std::optional<at::Tensor>& tokens,     // (B, H, W, C)
                                  const std::optional<at::Tensor>& centres) {  // (B, h', w', C)
  constexpr const char* op = "token_reconstruct";
  check_reconstruct(op, refined, indices, weights, tokens, centres);
  const c10::cuda::CUDAGuard guard(refined.device());
  const at::Tensor out = at::empty(
      {indices.size(0), indices.size(1), indices.size(2), refined.size(3)}, refined.options());
  if (out.numel() == 0) {
    return out;
  }
  const at::Tensor refined_ = refined.contiguous();
  const at::Tensor indices_ = indices.contiguous();
  const at::Tensor weights_ = weights.contiguous();
  const std::optional<at::Tensor> tokens_ = dense(tokens);
  const std::optional<at::Tensor> centres_ = dense(centres);
  const Reconstruction sizes{kernel_type(refined),
                             indices.size(0),
                             indices.size(1) * indices.size(2),
                             refined.size(1) * refined.size(2),
                             indices.size(3),
                             checked_channels(op, refined),
                             c10::cuda::getCurrentCUDAStream().stream()};
  C10_CUDA_CHECK(launch_token_reconstruct(sizes, refined_.const_data_ptr(),
                                          indices_.const_data_ptr<int32_t>(),
                                          weights_.const_data_ptr<float>(), data_or_null(tokens_),
                                          data_or_null(centres_), out.mutable_data_ptr()));
  return out;
}

// Dense tensors on the current device and stream, already checked.
Deformation make_deformation(const char* op, const at::Tensor& value,
                             at::IntArrayRef spatial_shapes, at::IntArrayRef level_start,
                             const at::Tensor& locations) {
  const auto levels = static_cast<int64_t>(level_start.size());
  TORCH_CHECK_VALUE(levels <= kMostLevels, op, ": expected spatial_shapes of at most ", kMostLevels,
                    " levels, got ", levels);
  TORCH_CHECK_VALUE(locations.size(4) <= (1 << 30), op,
                    ": expected sampling_locations of at most 2**30 points, got ",
                    locations.size(4));
  TORCH_CHECK_VALUE(value.size(2) <= ((1 << 30) - 1) / value.size(3), op,
                    ": expected value of fewer than 2**30 channels in all heads, got ",
                    value.size(2), " heads of ", value.size(3));
  Deformation sizes{kernel_type(value),
                    value.size(0),
                    value.size(1),
                    locations.size(1),
                    value.size(2),
                    checked_channels(op, value),
                    static_cast<int>(value.size(2) * value.size(3)),
                    static_cast<int>(levels),
                    static_cast<int>(locations.size(4)),
                    {},
                    {},
                    {},
                    c10::cuda::getCurrentCUDAStream().stream()};
  for (int64_t level = 0; level < levels; ++level) {
    sizes.height[level] = static_cast<int32_t>(spatial_shapes[2 * level]);
    sizes.width[level] = static_cast<int32_t>(spatial_shapes[2 * level + 1]);
    sizes.start[level] = static_cast<int32_t>(level_start[level]);
  }
  return sizes;
}

// Dense float32, aligned so that both coordinates are read at once.
at::Tensor dense_locations(const at::Tensor& locations) {
  const at::Tensor dense = locations.to(at::kFloat).contiguous();
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 8 == 0 ? dense : dense.clone();
}

at::Tensor ms_deform_attn_cuda(const at::Tensor& value,                // (B, S, heads, D)
                               at::IntArrayRef spatial_shapes,         // h0, w0, h1, w1 ...
                               at::IntArrayRef level_start,            // (levels,)
                               const at::Tensor& sampling_locations,   // (B, Q, heads, levels,
                                                                       //  points, 2)
                               const at::Tensor& attention_weights) {  // (B, Q, heads, levels,
                                                                       //  points)
  constexpr const char* op = "ms_deform_attn";
  check_deform(op, value, spatial_shapes, level_start, sampling_locations, attention_weights);
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor out = at::empty(
      {value.size(0), sampling_locations.size(1), value.size(2) * value.size(3)}, value.options());
  if (out.numel() == 0) {
    return out;
  }
  const at::Tensor value_ = value.contiguous();
  const at::Tensor locations_ = dense_locations(sampling_locations);
  const at::Tensor weights_ = attention_weights.to(at::kFloat).contiguous();
  const Deformation sizes =
      make_deformation(op, value, spatial_shapes, level_start, sampling_locations);
  C10_CUDA_CHECK(launch_ms_deform_attn(sizes, value_.const_data_ptr(),
                                       locations_.const_data_ptr<float>(),
                                       weights_.const_data_ptr<float>(), out.mutable_data_ptr()));
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward_cuda(
    const at::Tensor& grad,                 // (B, Q, heads * D)
    const at::Tensor& value,                // (B, S, heads, D)
    at::IntArrayRef spatial_shapes,         // h0, w0, h1, w1 ...
    at::IntArrayRef level_start,            // (levels,)
    const at::Tensor& sampling_locations,   // (B, Q, heads, levels, points, 2)
    const at::Tensor& attention_weights) {  // (B, Q, heads, levels, points)
  constexpr const char* op = "ms_deform_attn";
  check_deform(op, value, spatial_shapes, level_start, sampling_locations, attention_weights);
  check_deform_gradient(op, grad, value, sampling_locations);
  // Rows that several queries read are added to in any order.
  at::globalContext().alertNotDeterministic("ms_deform_attn_backward_cuda");
  const c10::cuda::CUDAGuard guard(value.device());
  const auto options = value.options().dtype(at::kFloat);
  const at::Tensor grad_value = at::zeros(value.sizes(), options);
  const at::Tensor grad_locations = at::zeros(sampling_locations.sizes(), options);
  const at::Tensor grad_weights = at::zeros(attention_weights.sizes(), options);
  if (grad.numel() > 0) {
    const at::Tensor grad_ = grad.contiguous();
    const at::Tensor value_ = value.contiguous();
    const at::Tensor locations_ = dense_locations(sampling_locations);
    const at::Tensor weights_ = attention_weights.to(at::kFloat).contiguous();
    const Deformation sizes =
        make_deformation(op, value, spatial_shapes, level_start, sampling_locations);
    C10_CUDA_CHECK(launch_ms_deform_attn_backward(
        sizes, grad_.const_data_ptr(), value_.const_data_ptr(), locations_.const_data_ptr<float>(),
        weights_.const_data_ptr<float>(), grad_value.mutable_data_ptr<float>(),
        grad_locations.mutable_data_ptr<float>(), grad_weights.mutable_data_ptr<float>()));
  }
  return {grad_value.to(value.scalar_type()), grad_locations.to(sampling_locations.scalar_type()),
          grad_weights.to(attention_weights.scalar_type())};
}

}  // namespace
}  // namespace expedite_d2::cuda

TORCH_LIBRARY_IMPL(expedite_d2, CUDA, m) {
  m.impl("token_spread", &expedite_d2::cuda::token_spread_cuda);
  m.impl("token_cluster", &expedite_d2::cuda::token_cluster_cuda);
  m.impl("token_match", &expedite_d2::cuda::token_match_cuda);
  m.impl("token_reduce", &expedite_d2::cuda::token_reduce_cuda);
  m.impl("token_reconstruct", &expedite_d2::cuda::token_reconstruct_cuda);
  m.impl("ms_deform_attn", &expedite_d2::cuda::ms_deform_attn_cuda);
  m.impl("_ms_deform_attn_backward", &expedite_d2::cuda::ms_deform_attn_backward_cuda);
}
