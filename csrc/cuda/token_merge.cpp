// token_merge on CUDA: the host entry.
#include <torch/library.h>

#include "cuda/entry.h"

namespace expedite_d2::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> token_merge_cuda(
    const at::Tensor& tokens,  // (B, N, C)
    const at::Tensor& sizes,   // (B, N)
    int64_t merged) {
  constexpr const char* op = "token_merge";
  check_merge(op, tokens, sizes, merged);
  const c10::cuda::CUDAGuard guard(tokens.device());
  const int64_t batch = tokens.size(0), count = tokens.size(1);
  const at::Tensor out = at::empty({batch, count - merged, tokens.size(2)}, tokens.options());
  const at::Tensor out_sizes = at::empty({batch, count - merged}, sizes.options());
  const at::Tensor places = at::empty({batch, count}, tokens.options().dtype(at::kInt));
  if (out.numel() == 0) {
    return {out, out_sizes, places};
  }
  const at::Tensor tokens_ = tokens.contiguous();
  const at::Tensor sizes_ = sizes.contiguous();
  const MergeParams params{
      kernel_type(tokens),          batch,
      static_cast<int32_t>(count),  static_cast<int32_t>(merged),
      checked_channels(op, tokens), c10::cuda::getCurrentCUDAStream().stream()};
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  const at::Tensor scratch = at::empty({merge_scratch(params, multiprocessors)}, places.options());
  C10_CUDA_CHECK(launch_token_merge(
      params, multiprocessors, tokens_.const_data_ptr(), sizes_.const_data_ptr<float>(),
      scratch.mutable_data_ptr<int32_t>(), out.mutable_data_ptr(),
      out_sizes.mutable_data_ptr<float>(), places.mutable_data_ptr<int32_t>()));
  return {out, out_sizes, places};
}

}  // namespace
}  // namespace expedite_d2::cuda

TORCH_LIBRARY_IMPL(expedite_d2, CUDA, m) {
  m.impl("token_merge", &expedite_d2::cuda::token_merge_cuda);
}
