// Convolutions of a block's branch.

#pragma once

#include <cstdint>

#include "positions.h"
#include "product.h"

namespace {

// The activation after a convolution.
enum Activation { kNone, kRelu, kRelu6 };

// A convolution of a branch. `panels` are its weights, in the layout of
// Product, or of DepthwiseTile if depthwise. `winograd` are the weights for
// MultiplyWinograd, or null.
struct Layer {
  Window window;
  int64_t level, depth, features;
  bool depthwise;
  Activation activation;
  const float *panels, *winograd;

  Product product(bool add, int64_t relu_from = kAllRows) const {
    return {panels,
            window.size * window.size,
            depth,
            features,
            add,
            activation == kNone ? kNoRow : relu_from,
            activation == kRelu6 ? 6.0f : kNoCap};
  }
};

}  // namespace
