// The most similar tokens merged into their partners; the reference is token_merge_ref.
//
// Cosines come from products of even with odd tokens, tile by tile; each tile is reduced at once to
// the best partner of every even token, so that the matrix of all cosines never exists.
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/members.h"

namespace expedite_d2 {
namespace {

using namespace cpu;

constexpr const char* kName = "token_merge";
// Tiles as those of token_match.
constexpr int64_t kEvens = 96;
constexpr int64_t kOdds = 48;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kLeastLength = 1e-12f;

// A token as a padded row of length 1, or of NaN where its length is not finite.
template <typename T>
void load_unit_row(const T* token, int64_t channels, float* row) {
  load_row(token, channels, row);
  float square;
  dots(row, 1, row, 1, padded(channels), &square, 1);
  const float length = std::isfinite(square) ? std::max(std::sqrt(square), kLeastLength) : kNan;
  for (int64_t c = 0; c < channels; ++c) {
    row[c] /= length;
  }
}

// The best partner of each even token among the odd ones, and their cosine.
struct Pairing {
  std::vector<int32_t> partners;
  std::vector<float> scores;
};

template <typename T>
Pairing find_partners(const Map<const T>& tokens, int64_t image, int64_t count) {
  const int64_t channels = tokens.channels, stride = padded(channels);
  const int64_t odds = count / 2, evens = count - odds;
  Buffer odd(odds * stride);
  at::parallel_for(0, odds, 16, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      load_unit_row(tokens.at(image, 0, 2 * j + 1), channels, odd.get() + j * stride);
    }
  });
  Pairing pairing{std::vector<int32_t>(evens), std::vector<float>(evens, -kInfinity)};
  at::parallel_for(0, (evens + kEvens - 1) / kEvens, 1, [&](int64_t first, int64_t last) {
    Buffer even(kEvens * stride), cosines(kEvens * kOdds);
    for (int64_t begin = first * kEvens; begin < std::min(last * kEvens, evens); begin += kEvens) {
      const int64_t rows = std::min(kEvens, evens - begin);
      for (int64_t p = 0; p < rows; ++p) {
        load_unit_row(tokens.at(image, 0, 2 * (begin + p)), channels, even.get() + p * stride);
      }
      for (int64_t start = 0; start < odds; start += kOdds) {
        const int64_t columns = std::min(kOdds, odds - start);
        dots(even.get(), rows, odd.get() + start * stride, columns, stride, cosines.get(), kOdds);
        for (int64_t p = 0; p < rows; ++p) {
          float& score = pairing.scores[begin + p];
          for (int64_t j = 0; j < columns; ++j) {
            // NaN is larger than nothing; of equals the first stays.
            const float cosine = cosines.get()[p * kOdds + j];
            if (cosine > score) {
              score = cosine;
              pairing.partners[begin + p] = static_cast<int32_t>(start + j);
            }
          }
        }
      }
    }
  });
  return pairing;
}

// For each even token the odd one that it becomes part of, or -1: those of the `merged` highest
// scores, of equal ones the first. `dots` sums every pair in the same order wherever it is in a
// tile, so the products that found the partners are fit to be compared with each other.
std::vector<int32_t> choose(const Pairing& pairing, int64_t merged) {
  std::vector<int32_t> order(pairing.scores.size());
  std::iota(order.begin(), order.end(), 0);
  const auto precedes = [&](int32_t a, int32_t b) {
    const float first = pairing.scores[a], second = pairing.scores[b];
    return first > second || (first == second && a < b);
  };
  std::nth_element(order.begin(), order.begin() + merged, order.end(), precedes);
  std::vector<int32_t> targets(order.size(), -1);
  for (int64_t n = 0; n < merged; ++n) {
    targets[order[n]] = pairing.partners[order[n]];
  }
  return targets;
}

// The results of all images.
template <typename T>
struct Outputs {
  T* tokens;        // (B, N - merged, C)
  float* sizes;     // (B, N - merged)
  int32_t* places;  // (B, N)
};

template <typename T>
void merge(const Map<const T>& tokens, const float* sizes, int64_t image, int64_t count,
           int64_t merged, const Outputs<T>& out) {
  const int64_t channels = tokens.channels, odds = count / 2, evens = count - odds;
  // There may be no odd token.
  const std::vector<int32_t> targets = merged > 0
                                           ? choose(find_partners(tokens, image, count), merged)
                                           : std::vector<int32_t>(evens, -1);
  const Members members(targets.data(), evens, odds);
  const auto staying = static_cast<int32_t>(evens - merged);
  const float* size = sizes + image * count;
  int32_t* places = out.places + image * count;
  int32_t place = 0;
  for (int64_t i = 0; i < evens; ++i) {
    places[2 * i] = targets[i] >= 0 ? staying + targets[i] : place++;
  }
  for (int64_t j = 0; j < odds; ++j) {
    places[2 * j + 1] = staying + static_cast<int32_t>(j);
  }
  const auto write = [&](int64_t i) {
    const int64_t at = image * (count - merged) + places[i];
    out.sizes[at] = size[i];
    std::memcpy(out.tokens + at * channels, tokens.at(image, 0, i), sizeof(T) * channels);
  };
  at::parallel_for(0, evens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (targets[i] < 0) {
        write(2 * i);
      }
    }
  });
  at::parallel_for(0, odds, 64, [&](int64_t begin, int64_t end) {
    Buffer sum(padded(channels));
    Terms<T> terms;
    for (int64_t j = begin; j < end; ++j) {
      const int64_t odd = 2 * j + 1;
      if (members.first[j] == members.first[j + 1]) {
        write(odd);
        continue;
      }
      float total = size[odd];
      terms.clear();
      terms.add(tokens.at(image, 0, odd), total);
      for (int64_t m = members.first[j]; m < members.first[j + 1]; ++m) {
        const int64_t even = 2 * int64_t{members.tokens[m]};
        terms.add(tokens.at(image, 0, even), size[even]);
        total += size[even];
      }
      const int64_t at = image * (count - merged) + places[odd];
      out.sizes[at] = total;
      store_mean(terms, total, channels, sum.get(), out.tokens + at * channels);
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> token_merge_cpu(const at::Tensor& tokens,
                                                               const at::Tensor& sizes,
                                                               int64_t merged) {
  check_merge(kName, tokens, sizes, merged);
  const int64_t batch = tokens.size(0), count = tokens.size(1);
  at::Tensor out = at::empty({batch, count - merged, tokens.size(2)}, tokens.options());
  at::Tensor out_sizes = at::empty({batch, count - merged}, sizes.options());
  at::Tensor places = at::empty({batch, count}, tokens.options().dtype(at::kInt));
  if (out.numel() == 0) {
    return {out, out_sizes, places};
  }
  const at::Tensor tokens_ = with_dense_channels(tokens.unsqueeze(1));  // a map of one row
  const at::Tensor sizes_ = sizes.contiguous();
  with_type(tokens.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto from = read_map<T>(tokens_);
    const Outputs<T> to{out.mutable_data_ptr<T>(), out_sizes.mutable_data_ptr<float>(),
                        places.mutable_data_ptr<int32_t>()};
    for_each_index(batch, [&](int64_t image) {
      merge(from, sizes_.const_data_ptr<float>(), image, count, merged, to);
    });
  });
  return {out, out_sizes, places};
}

}  // namespace

TORCH_LIBRARY_IMPL(expedite_d2, CPU, m) {
  m.impl("token_merge", &token_merge_cpu);
}

}  // namespace expedite_d2
