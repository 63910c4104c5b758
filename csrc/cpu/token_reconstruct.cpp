// The high-resolution map from refined centres; the reference is token_reconstruct_ref.
//
// Every token sums topk rows of what is added to it, y - s (or y), read where they are: the bytes
// of the maps bound the time, and tokens beside each other mostly look at the same rows.
#include <vector>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/windows.h"

namespace expedite_d2 {
namespace {

using namespace cpu;

constexpr const char* kName = "token_reconstruct";

template <typename T>
void reconstruct(const at::Tensor& refined, const at::Tensor& indices, const at::Tensor& weights,
                 const at::Tensor* tokens, const at::Tensor* centres, const at::Tensor& out) {
  const int64_t height = indices.size(1), width = indices.size(2), topk = indices.size(3);
  const int64_t map_width = refined.size(2), cells = refined.size(1) * map_width;
  const int64_t channels = refined.size(3);
  const auto from = read_map<T>(refined);
  Map<const T> subtracted{}, kept{};
  if (tokens) {
    subtracted = read_map<T>(*centres);
    kept = read_map<T>(*tokens);
  }
  const auto to = write_map<T>(out);
  const int32_t* index = indices.const_data_ptr<int32_t>();
  const float* weight = weights.const_data_ptr<float>();
  at::parallel_for(0, out.size(0) * height * width, 64, [&](int64_t begin, int64_t end) {
    Buffer sum(channels);
    std::vector<const T*> added(topk), minus(topk);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t b = p / (height * width), y = p / width % height, x = p % width;
      for (int64_t t = 0; t < topk; ++t) {
        const int32_t cell = index[p * topk + t];
        TORCH_CHECK_INDEX(cell >= 0 && cell < cells, kName, ": expected indices from 0 to ",
                          cells - 1, ", got ", cell);
        added[t] = from.at(b, cell / map_width, cell % map_width);
        if (tokens) {
          minus[t] = subtracted.at(b, cell / map_width, cell % map_width);
        }
      }
      T* const row = to.at(b, y, x);
      float* total = sum.get();
      if constexpr (std::is_same_v<T, float>) {
        total = row;
      }
      if (tokens) {
        add_weighted_differences(kept.at(b, y, x), added.data(), minus.data(), weight + p * topk,
                                 topk, channels, total);
      } else {
        weighted_rows(added.data(), weight + p * topk, topk, channels, total);
      }
      if constexpr (!std::is_same_v<T, float>) {
        store_row(total, channels, row);
      }
    }
  });
}

at::Tensor token_reconstruct_cpu(const at::Tensor& refined, const at::Tensor& indices,
                                 const at::Tensor& weights, const std::optional<at::Tensor>& tokens,
                                 const std::optional<at::Tensor>& centres) {
  check_reconstruct(kName, refined, indices, weights, tokens, centres);
  const int64_t shape[] = {indices.size(0), indices.size(1), indices.size(2), refined.size(3)};
  at::Tensor tokens_, centres_;
  if (tokens.has_value()) {
    tokens_ = with_dense_channels(*tokens);
    centres_ = with_dense_channels(*centres);
  }
  at::Tensor out = at::empty(shape, refined.options());
  if (out.numel() == 0) {
    return out;
  }
  const at::Tensor refined_ = with_dense_channels(refined);
  with_type(refined.scalar_type(), [&](auto type) {
    reconstruct<decltype(type)>(refined_, indices.contiguous(), weights.contiguous(),
                                tokens.has_value() ? &tokens_ : nullptr, &centres_, out);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(expedite_d2, CPU, m) {
  m.impl("token_reconstruct", &token_reconstruct_cpu);
}

}  // namespace expedite_d2
