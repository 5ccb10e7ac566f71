// Inverted residuals whose expanded map does not fit into a cache. Each thread
// processes bands of lines and keeps only the expanded lines that it still
// needs.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "depthwise.h"
#include "layer.h"
#include "positions.h"
#include "product.h"

namespace {

// Returns the index in a list of positions at which each line begins.
inline std::vector<int64_t> LineStarts(const Positions& positions) {
  const int64_t width = positions.map.width;
  const int64_t first = positions.start * positions.map.height;
  const int64_t lines =
      (positions.end - positions.start) * positions.map.height;
  std::vector<int64_t> starts(lines + 1);
  int64_t next = 0;
  for (int64_t line = 0; line < lines; ++line) {
    starts[line] = next;
    while (next < positions.active &&
           positions.numbers[next] < (first + line + 1) * width)
      ++next;
  }
  starts[lines] = next;
  return starts;
}

// Like Multiply, but on the calling thread only.
template <typename Reads, typename Writes>
void MultiplyHere(const Product& product, int64_t count, const Reads& reads,
                  const Writes& writes) {
  Scratch& scratch = Scratch::Of(count * kWidth, count + kTile, count);
  for (int64_t i = 0; i < count; ++i) {
    scratch.rows[i] = reads(i);
    scratch.outputs[i] = writes(i);
  }
  for (int64_t panel = 0; panel < product.num_panels(); ++panel)
    MultiplyPanel(product, panel, 0, count, scratch.rows.data(),
                  scratch.outputs.data(), scratch.floats.data());
}

// Approximate number of rows per step.
constexpr int64_t kStepRows = 96;

// Computes project(depthwise(expand(x))), plus x if `identity`, at the
// positions of `all`, for its images. `needed` are the positions of the
// expansion. If `expand` is null, the depthwise convolution reads x. The
// buffers of x and out must differ.
inline void RunBands(Team& team, const Layer* expand, const Layer& depthwise,
                     const Layer& project, bool identity, Map in,
                     const Positions& all, const Positions& needed,
                     const float* xs, float* outs, const float* zeros) {
  const Window& window = depthwise.window;
  const Map out = all.map;
  const int64_t images = all.end - all.start;
  const int64_t channels = expand ? expand->depth : depthwise.depth;
  const int64_t inner = depthwise.features, features = project.features;
  const int64_t bands = std::clamp<int64_t>(
      Divide(2 * team.size(), images), 1, Divide(out.height, 8));
  const int64_t step =
      std::clamp<int64_t>(kStepRows / out.width, 1, out.height);
  const int64_t ring_lines = window.size + (step - 1) * window.strides;
  const std::vector<int64_t> out_starts = LineStarts(all);
  const std::vector<int64_t> in_starts = LineStarts(needed);
  const Product expansion = expand ? expand->product(false) : Product{};
  const Product taps = depthwise.product(false);
  const Product projection = project.product(identity);

  const auto run_band = [&](int64_t image, int64_t first, int64_t last) {
    thread_local std::vector<float> memory;
    const int64_t ring_size = expand ? ring_lines * in.width * inner : 0;
    const size_t size = ring_size + step * out.width * inner;
    if (memory.size() < size) memory.resize(size);
    float *const ring = memory.data(), *const rows = ring + ring_size;
    const int64_t in_line = (image - all.start) * in.height;
    const int64_t out_line = (image - all.start) * out.height;
    const auto in_row = [&](int64_t y, int64_t x) -> const float* {
      if (expand) return ring + ((y % ring_lines) * in.width + x) * inner;
      return xs + ((image * in.height + y) * in.width + x) * channels;
    };
    int64_t next = std::max<int64_t>(first * window.strides - window.top, 0);
    for (int64_t line = first; line < last; line += step) {
      const int64_t stop = std::min(line + step, last);
      if (expand) {
        const int64_t until = std::min(
            (stop - 1) * window.strides - window.top + window.size, in.height);
        next = std::max(next, line * window.strides - window.top);
        if (next < until) {
          const int64_t* const numbers =
              needed.numbers.data() + in_starts[in_line + next];
          const int64_t count = in_starts[in_line + until] -
                                in_starts[in_line + next];
          MultiplyHere(
              expansion, count,
              [&](int64_t i) { return xs + numbers[i] * channels; },
              [&](int64_t i) {
                const int64_t at = numbers[i] - image * in.area();
                return ring + ((at / in.width % ring_lines) * in.width +
                               at % in.width) *
                                  inner;
              });
        }
        next = std::max(next, until);
      }
      const int64_t begin = out_starts[out_line + line];
      const int64_t count = out_starts[out_line + stop] - begin;
      const int64_t* const numbers = all.numbers.data() + begin;
      Depthwise(
          taps, 0, count,
          [&](int64_t i, const float** reads, int64_t apart) {
            window.ForEach(in, out.place(numbers[i]),
                           [&](bool inside, int64_t y, int64_t x) {
                             *reads = inside ? in_row(y, x) : zeros;
                             reads += apart;
                           });
          },
          [&](int64_t i) { return rows + i * inner; });
      const int64_t from = (image * out.height + line) * out.width;
      const int64_t floats = (stop - line) * out.width * features;
      if (identity)
        std::copy_n(xs + from * features, floats, outs + from * features);
      else if (count < (stop - line) * out.width)
        std::fill_n(outs + from * features, floats, 0.0f);
      MultiplyHere(
          projection, count, [&](int64_t i) { return rows + i * inner; },
          [&](int64_t i) { return outs + numbers[i] * features; });
    }
  };
  team.Run(images * bands, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t band = unit % bands;
      run_band(all.start + unit / bands, out.height * band / bands,
               out.height * (band + 1) / bands);
    }
  });
}

}  // namespace
