// The convolutions that a block is a chain of.

#pragma once

#include <cstdint>

#include "positions.h"
#include "product.h"

namespace {

// How a convolution of a chain is followed: by nothing, a ReLU, or one that is
// capped at 6.
enum Activation { kNone, kRelu, kRelu6 };

// A convolution of a chain. `panels` are its weights: as Product has them, of a
// depthwise one as DepthwiseTile; `squares` those for MultiplySquares, if any:
// faster where positions are neighbors.
struct Layer {
  Window window;
  int64_t level, depth, features;
  bool depthwise;
  Activation activation;
  const float *panels, *squares;

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
