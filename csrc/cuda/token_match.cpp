// token_match on CUDA: the host entry.
#include <torch/library.h>

#include "cuda/entry.h"

namespace expedite_d2::cuda {
namespace {

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
  const at::Tensor tokens_ = tokens.contiguous();
  const at::Tensor centres_ = centres.to(at::kFloat).contiguous();
  const std::optional<at::Tensor> spread_ = dense(spread);
  return find_matches(tokens_, centres_, make_tokens(op, tokens_, grid), topk,
                      make_temperature(temperature, spread_));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> find_matches(const at::Tensor& tokens, const at::Tensor& centres,
                                                const Tokens& input, int64_t topk,
                                                Temperature temperature) {
  const auto options = tokens.options();
  const at::Tensor indices =
      at::empty({tokens.size(0), tokens.size(1), tokens.size(2), topk}, options.dtype(at::kInt));
  const at::Tensor weights = at::empty(indices.sizes(), options.dtype(at::kFloat));
  if (indices.numel() == 0) {
    return {indices, weights};
  }
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int parts = match_parts(input, static_cast<int>(topk), multiprocessors);
  at::Tensor distances, neighbours;
  if (parts > 1) {
    distances =
        at::empty({tokens.size(0), tokens.size(1), tokens.size(2), parts, topk}, weights.options());
    neighbours = at::empty(distances.sizes(), indices.options());
  }
  C10_CUDA_CHECK(launch_token_match(
      input, static_cast<int>(topk), multiprocessors, temperature, centres.const_data_ptr<float>(),
      parts > 1 ? distances.mutable_data_ptr<float>() : nullptr,
      parts > 1 ? neighbours.mutable_data_ptr<int32_t>() : nullptr,
      indices.mutable_data_ptr<int32_t>(), weights.mutable_data_ptr<float>()));
  return {indices, weights};
}

}  // namespace expedite_d2::cuda

TORCH_LIBRARY_IMPL(expedite_d2, CUDA, m) {
  m.impl("token_match", &expedite_d2::cuda::token_match_cuda);
}
