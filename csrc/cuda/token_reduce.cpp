// token_reduce on CUDA: the host entry, which composes the three operators for whole images and
// where windows do not fit.
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include "cuda/entry.h"

namespace expedite_d2::cuda {
namespace {

// Where windows are small, tokens are read once for their Gram matrices and once more for the
// centres.
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
  const bool has_window = window.has_value();
  const GramPlan plan = make_gram_plan(input, has_window);
  if (plan.splits == 0) {
    const at::Tensor spread = automatic ? measure_spread(tokens_, input, neighbourhood)
                                        : at::ones({tokens.size(0)}, options.dtype(at::kFloat));
    const Temperature tau = make_temperature(temperature, spread);
    const at::Tensor centres =
        find_centres(tokens_, input, has_window, iterations, neighbourhood, tau);
    const auto [indices, weights] = find_matches(tokens_, centres, input, topk, tau);
    return {spread, centres.to(tokens.scalar_type()), indices, weights};
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

}  // namespace
}  // namespace expedite_d2::cuda

TORCH_LIBRARY_IMPL(expedite_d2, CUDA, m) {
  m.impl("token_reduce", &expedite_d2::cuda::token_reduce_cuda);
}
