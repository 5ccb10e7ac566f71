// Active positions of masks, and the windows of convolutions around them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

using Floats = xla::ffi::Buffer<xla::ffi::F32>;
using FloatsOut = xla::ffi::ResultBuffer<xla::ffi::F32>;

struct Place {
  int64_t image, row, column;
};

// Positions are numbered (image * height + row) * width + column.
struct Map {
  int64_t height, width;
  int64_t area() const { return height * width; }

  // Divides in 32 bits, which is several times faster on many processors. Maps
  // with more positions would not fit into memory.
  Place place(int64_t position) const {
    const uint32_t at = position, columns = width, rows = height;
    const uint32_t line = at / columns;
    return {line / rows, line % rows, at % columns};
  }
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
    numbers.resize((end - start) * map.area() + 1);
    active = List(true, 0);
    numbers.resize(others ? List(false, active) : active);
  }

  // The number of listed positions.
  int64_t size() const { return numbers.size(); }

 private:
  // Lists positions from the given entry on, and returns the entry after them,
  // which may be overwritten. There is no branch, because scattered masks would
  // make it unpredictable.
  int64_t List(bool whether, int64_t entry) {
    for (int64_t i = start * map.area(); i < end * map.area(); ++i) {
      numbers[entry] = i;
      entry += (mask[i] != 0) == whether;
    }
    return entry;
  }
};

// The windows of a size x size convolution; `top` and `left` are its padding.
struct Window {
  int64_t size, strides, top, left;

  // Calls read(inside, y, x) for each position of the map `in` that the output
  // at `place` reads; `inside` is false in the padding.
  template <typename Read>
  void ForEach(Map in, const Place& place, const Read& read) const {
    const int64_t first_y = place.row * strides - top;
    const int64_t first_x = place.column * strides - left;
    const int64_t end_y = first_y + size, end_x = first_x + size;
    if (0 <= first_y && end_y <= in.height && 0 <= first_x &&
        end_x <= in.width) {  // Most windows need no check of each position.
      for (int64_t y = first_y; y < end_y; ++y)
        for (int64_t x = first_x; x < end_x; ++x) read(true, y, x);
      return;
    }
    for (int64_t y = first_y; y < end_y; ++y)
      for (int64_t x = first_x; x < end_x; ++x)
        read(0 <= y && y < in.height && 0 <= x && x < in.width, y, x);
  }
};

// Returns the `reads` function of a convolution at output positions, see
// Multiply. row(j) points to position j of the map `in`.
template <typename Row>
auto Windows(const Window& window, Map in, const Positions& positions,
             const float* zeros, const Row& row) {
  const Map out = positions.map;
  const bool pointwise = window.size == 1 && window.strides == 1;
  return [=, &positions](int64_t i, const float** rows, int64_t step) {
    const int64_t position = positions.numbers[i];
    if (pointwise) {
      *rows = row(position);
      return;
    }
    const Place place = out.place(position);
    const int64_t first = place.image * in.area();
    window.ForEach(in, place, [&](bool inside, int64_t y, int64_t x) {
      *rows = inside ? row(first + y * in.width + x) : zeros;
      rows += step;
    });
  };
}

}  // namespace
