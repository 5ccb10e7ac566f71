// Depthwise convolutions at listed positions. Each tap multiplies two rows.

#pragma once

#include <algorithm>
#include <cstdint>

#include "product.h"

namespace {

// Computes P positions; rows[tap * P + i] points to the channels that position
// i reads for a tap. Weights are [1 + taps][channels], with the bias first.
template <int P>
void DepthwiseTile(const Product& product, const float* const* rows,
                   float* const* outputs) {
  const int64_t channels = product.columns, taps = product.taps;
  const bool relu = product.relu_from == kAllRows;
  const auto compute = [&](auto zero, int64_t c) {
    using T = decltype(zero);
    T sums[P];
    const T bias = Load<T>(product.panels + c);
    for (int i = 0; i < P; ++i) sums[i] = bias;
    const float* weights = product.panels + channels + c;
    for (int64_t tap = 0; tap < taps; ++tap, weights += channels) {
      const T w = Load<T>(weights);
      for (int i = 0; i < P; ++i)
        sums[i] += Load<T>(rows[tap * P + i] + c) * w;
    }
    for (int i = 0; i < P; ++i) product.Finish(sums[i], outputs[i] + c, relu);
  };
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) compute(Vector{}, c);
  for (; c < channels; ++c) compute(0.0f, c);
}

// Positions of a tile, which share loaded weights.
constexpr int kPositions = 6;

template <int P = kPositions>
void DepthwiseTileOf(int64_t count, const Product& product,
                     const float* const* rows, float* const* outputs) {
  if (count == P)
    DepthwiseTile<P>(product, rows, outputs);
  else if constexpr (P > 1)
    DepthwiseTileOf<P - 1>(count, product, rows, outputs);
}

// Computes the positions [begin, end). See Multiply for `reads` and `writes`.
template <typename Reads, typename Writes>
void Depthwise(const Product& product, int64_t begin, int64_t end,
               const Reads& reads, const Writes& writes) {
  Scratch& scratch = Scratch::Of(0, kPositions * product.taps, kPositions);
  for (int64_t start = begin; start < end; start += kPositions) {
    const int64_t count = std::min<int64_t>(kPositions, end - start);
    for (int64_t i = 0; i < count; ++i) {
      reads(start + i, &scratch.rows[i], count);
      scratch.outputs[i] = writes(start + i);
    }
    DepthwiseTileOf(count, product, scratch.rows.data(),
                    scratch.outputs.data());
  }
}

}  // namespace
