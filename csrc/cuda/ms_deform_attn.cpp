// ms_deform_attn and its gradients on CUDA: the host entries.
#include <ATen/Context.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cuda/entry.h"

namespace expedite_d2::cuda {
namespace {

// Dense tensors on the current device and stream, already checked.
DeformAttnParams make_params(const char* op, const at::Tensor& value,
                             at::IntArrayRef spatial_shapes, at::IntArrayRef level_start,
                             const at::Tensor& locations) {
  const auto levels = static_cast<int64_t>(level_start.size());
  TORCH_CHECK_VALUE(levels <= kMaxLevels, op, ": expected spatial_shapes of at most ", kMaxLevels,
                    " levels, got ", levels);
  TORCH_CHECK_VALUE(locations.size(4) <= (1 << 30), op,
                    ": expected sampling_locations of at most 2**30 points, got ",
                    locations.size(4));
  TORCH_CHECK_VALUE(value.size(2) <= ((1 << 30) - 1) / value.size(3), op,
                    ": expected value of fewer than 2**30 channels in all heads, got ",
                    value.size(2), " heads of ", value.size(3));
  DeformAttnParams params{kernel_type(value),
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
    params.height[level] = static_cast<int32_t>(spatial_shapes[2 * level]);
    params.width[level] = static_cast<int32_t>(spatial_shapes[2 * level + 1]);
    params.start[level] = static_cast<int32_t>(level_start[level]);
  }
  return params;
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
  const DeformAttnParams params =
      make_params(op, value, spatial_shapes, level_start, sampling_locations);
  C10_CUDA_CHECK(launch_ms_deform_attn(params, value_.const_data_ptr(),
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
    const DeformAttnParams params =
        make_params(op, value, spatial_shapes, level_start, sampling_locations);
    C10_CUDA_CHECK(launch_ms_deform_attn_backward(
        params, grad_.const_data_ptr(), value_.const_data_ptr(), locations_.const_data_ptr<float>(),
        weights_.const_data_ptr<float>(), grad_value.mutable_data_ptr<float>(),
        grad_locations.mutable_data_ptr<float>(), grad_weights.mutable_data_ptr<float>()));
  }
  return {grad_value.to(value.scalar_type()), grad_locations.to(sampling_locations.scalar_type()),
          grad_weights.to(attention_weights.scalar_type())};
}

}  // namespace
}  // namespace expedite_d2::cuda

TORCH_LIBRARY_IMPL(expedite_d2, CUDA, m) {
  m.impl("ms_deform_attn", &expedite_d2::cuda::ms_deform_attn_cuda);
  m.impl("_ms_deform_attn_backward", &expedite_d2::cuda::ms_deform_attn_backward_cuda);
}
