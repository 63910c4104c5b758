// Means of groups of tokens; the reference is token_pool_ref.
//
// The tokens of an image are first sorted by group, which touches their numbers alone. Then every
// group sums its rows where they are, and the bytes of the tokens bound the time.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/members.h"

namespace expedite_d2 {
namespace {

using namespace cpu;

constexpr const char* kName = "token_pool";

template <typename T>
void pool(const at::Tensor& tokens, const at::Tensor& groups, const at::Tensor& out) {
  const auto from = read_map<T>(tokens);
  const int64_t size = groups.size(1), count = out.size(1), channels = from.channels;
  const int32_t* group = groups.const_data_ptr<int32_t>();
  T* to = out.mutable_data_ptr<T>();
  for_each_index(out.size(0), [&](int64_t b) {
    const Members members(group + b * size, size, count);
    at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      Buffer sum(padded(channels));
      Terms<T> terms;
      for (int64_t g = begin; g < end; ++g) {
        terms.clear();
        for (int64_t i = members.first[g]; i < members.first[g + 1]; ++i) {
          terms.add(from.at(b, 0, members.tokens[i]), 1.0f);
        }
        const auto number = static_cast<float>(std::max<size_t>(terms.rows.size(), 1));
        store_mean(terms, number, channels, sum.get(), to + (b * count + g) * channels);
      }
    });
  });
}

at::Tensor token_pool_cpu(const at::Tensor& tokens, const at::Tensor& groups, int64_t count) {
  check_pool(kName, tokens, groups, count);
  at::Tensor out = at::empty({tokens.size(0), count, tokens.size(2)}, tokens.options());
  if (out.numel() == 0) {
    return out;
  }
  const at::Tensor tokens_ = with_dense_channels(tokens.unsqueeze(1));  // a map of one row
  with_type(tokens.scalar_type(),
            [&](auto type) { pool<decltype(type)>(tokens_, groups.contiguous(), out); });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(expedite_d2, CPU, m) {
  m.impl("token_pool", &token_pool_cpu);
}

}  // namespace expedite_d2
