// Groups of tokens and their means, for token_merge and token_pool.
#pragma once

#include <vector>

#include "cpu/windows.h"

namespace expedite_d2::cpu {

// The members of group g are tokens[first[g]] ... tokens[first[g + 1] - 1], in ascending order.
struct Members {
  std::vector<int64_t> first;
  std::vector<int32_t> tokens;

  // `groups[i]` is the group of token i; a token whose group is not one of 0 ... count - 1 is left
  // out.
  Members(const int32_t* groups, int64_t size, int64_t count) : first(count + 2) {
    const auto belongs = [&](int64_t i) { return groups[i] >= 0 && groups[i] < count; };
    for (int64_t i = 0; i < size; ++i) {
      if (belongs(i)) {
        ++first[groups[i] + 2];
      }
    }
    for (int64_t g = 1; g <= count; ++g) {
      first[g + 1] += first[g];
    }
    // Until the tokens are placed, first[g + 1] is where the next one of group g goes.
    tokens.resize(first.back());
    for (int64_t i = 0; i < size; ++i) {
      if (belongs(i)) {
        tokens[first[groups[i] + 1]++] = static_cast<int32_t>(i);
      }
    }
  }
};

// out[c] = sum of the terms / divisor. `sum` is scratch of padded columns.
template <typename T>
void store_mean(const Terms<T>& terms, float divisor, int64_t columns, float* sum, T* out) {
  terms.sum(columns, sum);
  for (int64_t c = 0; c < columns; ++c) {
    sum[c] /= divisor;
  }
  store_row(sum, columns, out);
}

}  // namespace expedite_d2::cpu
