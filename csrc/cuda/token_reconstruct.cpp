// token_reconstruct on CUDA: the host entry.
#include <torch/library.h>

#include "cuda/entry.h"

namespace expedite_d2::cuda {
namespace {

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
  const ReconstructParams params{kernel_type(refined),
                                 indices.size(0),
                                 indices.size(1) * indices.size(2),
                                 refined.size(1) * refined.size(2),
                                 indices.size(3),
                                 checked_channels(op, refined),
                                 c10::cuda::getCurrentCUDAStream().stream()};
  C10_CUDA_CHECK(launch_token_reconstruct(params, refined_.const_data_ptr(),
                                          indices_.const_data_ptr<int32_t>(),
                                          weights_.const_data_ptr<float>(), data_or_null(tokens_),
                                          data_or_null(centres_), out.mutable_data_ptr()));
  return out;
}

}  // namespace
}  // namespace expedite_d2::cuda

TORCH_LIBRARY_IMPL(expedite_d2, CUDA, m) {
  m.impl("token_reconstruct", &expedite_d2::cuda::token_reconstruct_cuda);
}
