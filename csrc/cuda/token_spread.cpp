// token_spread on CUDA: the host entry.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cuda/entry.h"

namespace expedite_d2::cuda {
namespace {

at::Tensor token_spread_cuda(const at::Tensor& tokens,        // (B, H, W, C)
                             at::IntArrayRef clusters,        // (h, w)
                             at::OptionalIntArrayRef window,  // (M_h, M_w)
                             int64_t neighbourhood) {
  constexpr const char* op = "token_spread";
  check_tokens(op, "tokens", tokens);
  check_neighbourhood(op, neighbourhood);
  const Grid grid = make_grid(op, tokens, clusters, window);
  const c10::cuda::CUDAGuard guard(tokens.device());
  const at::Tensor tokens_ = tokens.contiguous();
  return measure_spread(tokens_, make_tokens(op, tokens_, grid), neighbourhood);
}

}  // namespace

at::Tensor measure_spread(const at::Tensor& tokens, const Tokens& input, int64_t neighbourhood) {
  const auto options = tokens.options().dtype(at::kFloat);
  if (tokens.numel() == 0) {
    return at::zeros({tokens.size(0)}, options);
  }
  const at::Tensor spread = at::empty({tokens.size(0)}, options);
  const at::Tensor mean = at::empty({tokens.size(0), tokens.size(3)}, options);
  const at::Tensor centres = empty_map(tokens, input.grid, at::kFloat);
  const at::Tensor nearest = at::empty(tokens.sizes().slice(0, 3), options);
  const at::Tensor deviation = at::empty(tokens.sizes().slice(0, 3), options);
  C10_CUDA_CHECK(launch_token_spread(
      input, static_cast<int>(neighbourhood / 2), spread.mutable_data_ptr<float>(),
      mean.mutable_data_ptr<float>(), centres.mutable_data_ptr<float>(),
      nearest.mutable_data_ptr<float>(), deviation.mutable_data_ptr<float>()));
  return spread;
}

}  // namespace expedite_d2::cuda

TORCH_LIBRARY_IMPL(expedite_d2, CUDA, m) {
  m.impl("token_spread", &expedite_d2::cuda::token_spread_cuda);
}
