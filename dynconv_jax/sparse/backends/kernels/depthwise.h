// Depthwise convolutions at listed positions. Each tap multiplies two rows.

#pragma once

#include <algorithm>
#include <cstdint>

#include "product.h"

namespace {

// Computes V vectors of channels, starting at channel c, of P positions.
template <int P, int V, typename T>
void DepthwiseChannels(const Product& product, const float* const* rows,
                       float* const* outputs, int64_t c) {
  constexpr int64_t kApart = sizeof(T) / sizeof(float);
  T sums[P][V], w[V];
  for (int v = 0; v < V; ++v) {
    const T bias = Load<T>(product.panels + c + v * kApart);
    for (int i = 0; i < P; ++i) sums[i][v] = bias;
  }
  const float* weights = product.panels + product.columns + c;
  for (int64_t tap = 0; tap < product.taps;
       ++tap, rows += P, weights += product.columns) {
    for (int v = 0; v < V; ++v) w[v] = Load<T>(weights + v * kApart);
    for (int i = 0; i < P; ++i)
      for (int v = 0; v < V; ++v)
        sums[i][v] += Load<T>(rows[i] + c + v * kApart) * w[v];
  }
  const bool relu = product.relu_from == kAllRows;
  for (int i = 0; i < P; ++i)
    for (int v = 0; v < V; ++v)
      product.Finish(sums[i][v], outputs[i] + c + v * kApart, relu);
}

// Computes P positions; rows[tap * P + i] points to the channels that position
// i reads for a tap. Weights are [1 + taps][channels], with the bias first.
template <int P>
void DepthwiseTile(const Product& product, const float* const* rows,
                   float* const* outputs) {
  // As many vectors as there are registers for their sums and weights.
  constexpr int kVectors = kLanes == 16 ? 4 : 2;
  const int64_t channels = product.columns;
  int64_t c = 0;
  for (; c + kVectors * kLanes <= channels; c += kVectors * kLanes)
    DepthwiseChannels<P, kVectors, Vector>(product, rows, outputs, c);
  for (; c + kLanes <= channels; c += kLanes)
    DepthwiseChannels<P, 1, Vector>(product, rows, outputs, c);
  for (; c < channels; ++c)
    DepthwiseChannels<P, 1, float>(product, rows, outputs, c);
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
