// token_pool on CUDA: the host entry.
#include <torch/library.h>

#include "cuda/entry.h"

namespace expedite_d2::cuda {
namespace {

at::Tensor token_pool_cuda(const at::Tensor& tokens,  // (B, N, C)
                           const at::Tensor& groups,  // (B, N)
                           int64_t count) {
  constexpr const char* op = "token_pool";
  check_pool(op, tokens, groups, count);
  const c10::cuda::CUDAGuard guard(tokens.device());
  const at::Tensor out = at::empty({tokens.size(0), count, tokens.size(2)}, tokens.options());
  if (out.numel() == 0) {
    return out;
  }
  const at::Tensor tokens_ = tokens.contiguous();
  const at::Tensor groups_ = groups.contiguous();
  const PoolParams params{kernel_type(tokens),
                          tokens.size(0),
                          static_cast<int32_t>(tokens.size(1)),
                          static_cast<int32_t>(count),
                          checked_channels(op, tokens),
                          c10::cuda::getCurrentCUDAStream().stream()};
  C10_CUDA_CHECK(launch_token_pool(params, tokens_.const_data_ptr(),
                                   groups_.const_data_ptr<int32_t>(), out.mutable_data_ptr()));
  return out;
}

}  // namespace
}  // namespace expedite_d2::cuda

TORCH_LIBRARY_IMPL(expedite_d2, CUDA, m) {
  m.impl("token_pool", &expedite_d2::cuda::token_pool_cuda);
}
