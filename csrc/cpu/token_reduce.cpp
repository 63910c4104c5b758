// token_spread, token_cluster and token_match in one; the reference is token_reduce_ref. Between
// the last two, centres stay float32.
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include "checks.h"
#include "cpu/entry.h"

namespace expedite_d2 {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> token_reduce_cpu(
    const at::Tensor& tokens, at::IntArrayRef clusters, at::OptionalIntArrayRef window,
    int64_t iterations, int64_t neighbourhood, int64_t topk, double temperature, bool automatic) {
  constexpr const char* op = "token_reduce";
  check_tokens(op, "tokens", tokens);
  check_neighbourhood(op, neighbourhood);
  check_iterations(op, iterations);
  check_topk(op, topk);
  const Grid grid = make_grid(op, tokens, clusters, window);
  const at::Tensor spread = automatic
                                ? cpu::measure_spread(tokens, grid, neighbourhood)
                                : at::ones({tokens.size(0)}, tokens.options().dtype(at::kFloat));
  const at::Tensor centres = cpu::find_centres(tokens, grid, window.has_value(), iterations,
                                               neighbourhood, temperature, spread);
  const auto [indices, weights] =
      cpu::find_matches(tokens, centres, grid, topk, temperature, spread);
  return {spread, centres.to(tokens.scalar_type()), indices, weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(expedite_d2, CPU, m) {
  m.impl("token_reduce", &token_reduce_cpu);
}

}  // namespace expedite_d2
