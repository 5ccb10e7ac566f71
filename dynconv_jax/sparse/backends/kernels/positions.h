// Active positions of masks, and the windows of convolutions around them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

using Floats = xla::ffi::Buffer<xla::ffi::F32>;
using FloatsOut = xla::ffi::ResultBuffer<xla::ffi::F32>;

// Positions are numbered (image * height + row) * width + column.
struct Map {
  int64_t height, width;
  int64_t area() const { return height * width; }
};

template <typename Buffer>
Map MapOf(const Buffer& buffer) {
  return {buffer.dimensions()[1], buffer.dimensions()[2]};
}

// The active positions of a mask in images [start, end), followed by the
// inactive ones if `others` is set.
struct Positions {
  const float* mask;
  Map map;
  int64_t start, end, active;
  std::vector<int64_t> numbers;

  Positions(const Floats& mask, int64_t start, int64_t end, bool others = false)
      : mask(mask.typed_data()), map(MapOf(mask)), start(start), end(end) {
    numbers.reserve((end - start) * map.area());
    List(true);
    active = numbers.size();
    if (others) List(false);
  }

  // The number of listed positions.
  int64_t size() const { return numbers.size(); }

 private:
  void List(bool whether) {
    for (int64_t i = start * map.area(); i < end * map.area(); ++i)
      if ((mask[i] != 0) == whether) numbers.push_back(i);
  }
};

// The windows of a size x size convolution; `top` and `left` are its padding.
struct Window {
  int64_t size, strides, top, left;
};

// Returns the `reads` function of a convolution at output positions, see
// Multiply. row(j) points to position j of the map `in`.
template <typename Row>
auto Windows(const Window& window, Map in, const Positions& positions,
             const float* zeros, const Row& row) {
  const Map out = positions.map;
  return [=, &positions](int64_t i, const float** rows, int64_t step) {
    const int64_t position = positions.numbers[i], size = window.size;
    const int64_t image = position / out.area();
    const int64_t top =
        position / out.width % out.height * window.strides - window.top;
    const int64_t left = position % out.width * window.strides - window.left;
    for (int64_t y = top; y < top + size; ++y)
      for (int64_t x = left; x < left + size; ++x, rows += step) {
        const bool inside = 0 <= y && y < in.height && 0 <= x && x < in.width;
        *rows = inside ? row(image * in.area() + y * in.width + x) : zeros;
      }
  };
}

}  // namespace
