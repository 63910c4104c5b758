// The high-resolution map from refined centres; the twin is token_reconstruct_ref.
//
// What is added to the tokens, y - s (or y), is first written as a table of padded float rows,
// smaller than the tokens by the ratio of the grids; every token then sums topk rows of it.
#include <vector>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/windows.h"

namespace expedite_d2 {
namespace {

using namespace cpu;

constexpr const char* kName = "token_reconstruct";

template <typename T>
void fill_table(const Map<const T>& refined, const Map<const T>* centres, int64_t height,
                int64_t width, int64_t cells, float* table) {
  const int64_t stride = padded(refined.channels);
  at::parallel_for(0, cells, 64, [&](int64_t begin, int64_t end) {
    Buffer centre(stride);
    for (int64_t cell = begin; cell < end; ++cell) {
      const int64_t b = cell / (height * width), i = cell / width % height, j = cell % width;
      float* row = table + cell * stride;
      load_row(refined.at(b, i, j), refined.channels, row);
      if (centres) {
        load_row(centres->at(b, i, j), refined.channels, centre.get());
        for (int64_t c = 0; c < stride; ++c) {
          row[c] -= centre.get()[c];
        }
      }
    }
  });
}

template <typename T>
void reconstruct(const at::Tensor& refined, const at::Tensor& indices, const at::Tensor& weights,
                 const at::Tensor* tokens, const at::Tensor* centres, const at::Tensor& out) {
  const int64_t height = indices.size(1), width = indices.size(2), topk = indices.size(3);
  const int64_t cells = refined.size(1) * refined.size(2);
  const int64_t channels = refined.size(3), stride = padded(channels);
  Buffer table(refined.size(0) * cells * stride);
  Map<const T> subtracted{}, kept{};
  if (tokens) {
    subtracted = read_map<T>(*centres);
    kept = read_map<T>(*tokens);
  }
  fill_table(read_map<T>(refined), tokens ? &subtracted : nullptr, refined.size(1), refined.size(2),
             refined.size(0) * cells, table.get());

  const auto to = write_map<T>(out);
  const int32_t* index = indices.const_data_ptr<int32_t>();
  const float* weight = weights.const_data_ptr<float>();
  at::parallel_for(0, out.size(0) * height * width, 64, [&](int64_t begin, int64_t end) {
    Buffer sum(stride), token(stride);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t b = p / (height * width), y = p / width % height, x = p % width;
      for (int64_t t = 0; t < topk; ++t) {
        TORCH_CHECK_INDEX(index[p * topk + t] >= 0 && index[p * topk + t] < cells, kName,
                          ": expected indices from 0 to ", cells - 1, ", got ",
                          index[p * topk + t]);
      }
      weighted_rows(index + p * topk, weight + p * topk, topk, table.get() + b * cells * stride,
                    stride, stride, sum.get());
      if (tokens) {
        load_row(kept.at(b, y, x), channels, token.get());
        for (int64_t c = 0; c < stride; ++c) {
          sum.get()[c] += token.get()[c];
        }
      }
      store_row(sum.get(), channels, to.at(b, y, x));
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
