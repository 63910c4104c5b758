// token_cluster on CUDA: the host entry, which chooses between the two forms of its kernels.
#include <torch/library.h>

#include "cuda/entry.h"

namespace expedite_d2::cuda {
namespace {

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
  const at::Tensor tokens_ = tokens.contiguous();
  const std::optional<at::Tensor> spread_ = dense(spread);
  const Tokens input = make_tokens(op, tokens_, grid);
  const Temperature tau = make_temperature(temperature, spread_);
  const GramPlan plan = make_gram_plan(input, window.has_value());
  if (iterations == 0 || plan.splits == 0) {
    return find_centres(tokens_, input, window.has_value(), iterations, neighbourhood, tau)
        .to(tokens.scalar_type());
  }
  const at::Tensor centres = empty_map(tokens, grid, tokens.scalar_type());
  ReduceParams params{};
  params.iterations = iterations;
  params.radius = static_cast<int>(neighbourhood / 2);
  params.temperature = tau;
  params.centres = centres.mutable_data_ptr();
  run_gram(input, plan, params, tokens.options());
  return centres;
}

}  // namespace

at::Tensor find_centres(const at::Tensor& tokens, const Tokens& input, bool has_window,
                        int64_t iterations, int64_t neighbourhood, Temperature temperature) {
  const at::Tensor centres = empty_map(tokens, input.grid, at::kFloat);
  if (centres.numel() == 0) {
    return centres;
  }
  const int radius = static_cast<int>(neighbourhood / 2);
  at::Tensor responsibilities;
  if (iterations > 0) {
    const CandidateShape shape = candidate_shape(input.grid, radius);
    responsibilities =
        at::empty({tokens.size(0), tokens.size(1), tokens.size(2), shape.rows, shape.columns},
                  centres.options());
  }
  C10_CUDA_CHECK(launch_token_cluster(
      input, iterations, radius, has_window, temperature, centres.mutable_data_ptr<float>(),
      iterations > 0 ? responsibilities.mutable_data_ptr<float>() : nullptr));
  return centres;
}

}  // namespace expedite_d2::cuda

TORCH_LIBRARY_IMPL(expedite_d2, CUDA, m) {
  m.impl("token_cluster", &expedite_d2::cuda::token_cluster_cuda);
}
