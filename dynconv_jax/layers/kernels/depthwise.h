// Depthwise convolutions and their gradients in training, in float32, for CPUs.
//
// Maps are NHWC, kernels are [k, k, C]. Bands of rows are copied with zero
// padding, so windows never cross a border. The only caller is depthwise.py,
// which checks shapes.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "team.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using FloatsOut = ffi::ResultBuffer<ffi::F32>;

// Positions of a tile, which share loaded weights.
constexpr int kPositions = 8;
// Floats of a band of rows: a part of a second-level cache.
constexpr int64_t kBand = 1 << 16;

struct Map {
  int64_t height, width, channels;
  int64_t row() const { return width * channels; }
  int64_t size() const { return height * row(); }
};

template <typename Buffer>
Map MapOf(const Buffer& buffer) {
  const auto shape = buffer.dimensions();
  return {shape[1], shape[2], shape[3]};
}

// Copies rows [top, top + rows) and columns [-left, -left + width) of an image,
// with zeros outside the image.
void CopyPadded(const float* image, const Map& map, int64_t top, int64_t rows,
                int64_t left, int64_t width, float* to) {
  const int64_t c = map.channels;
  const int64_t inside = std::min(map.width, width - left);
  for (int64_t y = top; y < top + rows; ++y, to += width * c) {
    if (y < 0 || y >= map.height) {
      std::memset(to, 0, width * c * sizeof(float));
      continue;
    }
    std::memset(to, 0, left * c * sizeof(float));
    std::memcpy(to + left * c, image + y * map.row(),
                inside * c * sizeof(float));
    std::memset(to + (left + inside) * c, 0,
                (width - left - inside) * c * sizeof(float));
  }
}

float* Scratch(int64_t floats) {
  thread_local std::vector<float> scratch;
  if (static_cast<int64_t>(scratch.size()) < floats) scratch.resize(floats);
  return scratch.data();
}

// A tap: its offset from a window's first element, and its weights.
struct Tap {
  int64_t offset;
  const float* weights;
};

// Computes P outputs; `in` and `out` are the distances between consecutive
// ones.
template <int P>
void Tile(const float* from, int64_t in, const std::vector<Tap>& taps,
          int64_t channels, float* to, int64_t out) {
  const auto compute = [&](auto zero, int64_t c) {
    using T = decltype(zero);
    T sums[P] = {};
    for (const Tap& tap : taps) {
      const T w = Load<T>(tap.weights + c);
      const float* x = from + tap.offset + c;
      for (int i = 0; i < P; ++i) sums[i] += Load<T>(x + i * in) * w;
    }
    for (int i = 0; i < P; ++i) Store(to + i * out + c, sums[i]);
  };
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) compute(Vector{}, c);
  for (; c < channels; ++c) compute(0.0f, c);
}

template <int P = kPositions>
void TileOf(int64_t count, const float* from, int64_t in,
            const std::vector<Tap>& taps, int64_t channels, float* to,
            int64_t out) {
  if (count == P)
    Tile<P>(from, in, taps, channels, to, out);
  else if constexpr (P > 1)
    TileOf<P - 1>(count, from, in, taps, channels, to, out);
}

void Row(int64_t count, const float* from, int64_t in,
         const std::vector<Tap>& taps, int64_t channels, float* to,
         int64_t out) {
  for (int64_t i = 0; i < count; i += kPositions)
    TileOf(std::min<int64_t>(kPositions, count - i), from + i * in, in, taps,
           channels, to + i * out, out);
}

// Returns the number of output rows of a band whose input fits into a cache.
int64_t BandOf(int64_t row, int64_t strides) {
  return std::max<int64_t>(1, kBand / (row * strides));
}

ffi::Error Forward(ffi::ThreadPool pool, Floats x, Floats w, FloatsOut y,
                   int64_t strides, int64_t top, int64_t left) {
  const Map in = MapOf(x), out = MapOf(*y);
  const int64_t images = x.dimensions()[0], k = w.dimensions()[0];
  const int64_t c = in.channels;
  const int64_t width = std::max((out.width - 1) * strides + k, left);
  std::vector<Tap> taps;
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j)
      taps.push_back(
          {(i * width + j) * c, w.typed_data() + (i * k + j) * c});
  const int64_t band = BandOf(width * c, strides);
  const int64_t bands = Divide(out.height, band);
  Team team(pool);
  team.Run(images * bands, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / bands, first = unit % bands * band;
      const int64_t rows = std::min(band, out.height - first);
      const int64_t needed = (rows - 1) * strides + k;
      float* padded = Scratch(needed * width * c);
      CopyPadded(x.typed_data() + image * in.size(), in, first * strides - top,
                 needed, left, width, padded);
      float* to = y->typed_data() + image * out.size() + first * out.row();
      for (int64_t row = 0; row < rows; ++row)
        Row(out.width, padded + row * strides * width * c, strides * c, taps, c,
            to + row * out.row(), c);
    }
  });
  return ffi::Error::Success();
}

// Computes the gradient of x from the gradient g of the output. Output q reads
// position v of x with tap i if v + top = q * strides + i. All taps that read v
// have the same remainder r: v + top = q0 * strides + r, i = r + a * strides,
// q = q0 - a.
ffi::Error InputGradient(ffi::ThreadPool pool, Floats g, Floats w, FloatsOut dx,
                         int64_t strides, int64_t top, int64_t left) {
  const Map in = MapOf(g), out = MapOf(*dx);
  const int64_t images = g.dimensions()[0], k = w.dimensions()[0];
  const int64_t c = in.channels, s = strides;
  const int64_t before = (k - 1) / s;  // The largest a.
  const int64_t width =
      std::max((out.width - 1 + left) / s + 1, in.width) + before;
  // Taps by the remainders of row and column.
  std::vector<std::vector<Tap>> taps(s * s);
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j)
      taps[i % s * s + j % s].push_back(
          {-(i / s * width + j / s) * c, w.typed_data() + (i * k + j) * c});
  const int64_t band = BandOf(width * c, 1) * s;
  const int64_t bands = Divide(out.height, band);
  Team team(pool);
  team.Run(images * bands, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / bands, first = unit % bands * band;
      const int64_t stop = std::min(first + band, out.height);
      const int64_t low = (first + top) / s - before;
      const int64_t needed = (stop - 1 + top) / s + 1 - low;
      float* padded = Scratch(needed * width * c);
      CopyPadded(g.typed_data() + image * in.size(), in, low, needed, before,
                 width, padded);
      for (int64_t y = first; y < stop; ++y) {
        const int64_t q = (y + top) / s - low;
        float* to = dx->typed_data() + image * out.size() + y * out.row();
        for (int64_t x = 0; x < std::min(s, out.width); ++x)
          Row(Divide(out.width - x, s),
              padded + (q * width + (x + left) / s + before) * c, c,
              taps[(y + top) % s * s + (x + left) % s], c, to + x * c, s * c);
      }
    }
  });
  return ffi::Error::Success();
}

// Adds the products of a row of g with R rows of K taps of its windows.
template <int K, int R>
void Products(const float* x, int64_t width, int64_t strides, const float* g,
              int64_t count, int64_t channels, float* sums, int64_t k) {
  const auto compute = [&](auto zero, int64_t c) {
    using T = decltype(zero);
    T totals[R][K];
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < K; ++j)
        totals[i][j] = Load<T>(sums + (i * k + j) * channels + c);
    for (int64_t p = 0; p < count; ++p) {
      const T grad = Load<T>(g + p * channels + c);
      const float* window = x + p * strides * channels + c;
      for (int i = 0; i < R; ++i)
        for (int j = 0; j < K; ++j)
          totals[i][j] += grad * Load<T>(window + (i * width + j) * channels);
    }
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < K; ++j)
        Store(sums + (i * k + j) * channels + c, totals[i][j]);
  };
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) compute(Vector{}, c);
  for (; c < channels; ++c) compute(0.0f, c);
}

// Adds the products of a row of g with all k x k taps, as many at a time as
// there are registers.
void AllProducts(int64_t k, const float* x, int64_t width, int64_t strides,
                 const float* g, int64_t count, int64_t channels, float* sums) {
  const auto run = [&](auto products, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < k; i += rows)
      for (int64_t j = 0; j < k; j += columns)
        products(x + (i * width + j) * channels, width, strides, g, count,
                 channels, sums + (i * k + j) * channels, k);
  };
  if (k == 3)
    run(Products<3, 3>, 3, 3);
  else if (k == 5 && kLanes == 16)
    run(Products<5, 5>, 5, 5);
  else if (k == 5)
    run(Products<5, 1>, 1, 5);
  else
    run(Products<1, 1>, 1, 1);
}

// Computes the gradient of the kernel. `partial` contains the sums of parts,
// which are added in order, so results do not depend on the number of threads.
ffi::Error KernelGradient(ffi::ThreadPool pool, Floats x, Floats g,
                          FloatsOut dw, FloatsOut partial, int64_t strides,
                          int64_t top, int64_t left) {
  const Map in = MapOf(x), out = MapOf(g);
  const int64_t images = x.dimensions()[0], k = dw->dimensions()[0];
  const int64_t c = in.channels, size = k * k * c;
  const int64_t width = std::max((out.width - 1) * strides + k, left);
  const int64_t band = BandOf(width * c, strides);
  const int64_t bands = Divide(out.height, band), units = images * bands;
  const int64_t parts = partial->dimensions()[0];
  Team team(pool);
  team.Run(parts, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      float* sums = partial->typed_data() + part * size;
      std::fill_n(sums, size, 0.0f);
      for (int64_t unit = units * part / parts;
           unit < units * (part + 1) / parts; ++unit) {
        const int64_t image = unit / bands, first = unit % bands * band;
        const int64_t rows = std::min(band, out.height - first);
        const int64_t needed = (rows - 1) * strides + k;
        float* padded = Scratch(needed * width * c);
        CopyPadded(x.typed_data() + image * in.size(), in,
                   first * strides - top, needed, left, width, padded);
        const float* grads =
            g.typed_data() + image * out.size() + first * out.row();
        for (int64_t row = 0; row < rows; ++row)
          AllProducts(k, padded + row * strides * width * c, width, strides,
                      grads + row * out.row(), out.width, c, sums);
      }
    }
  });
  float* total = dw->typed_data();
  std::copy_n(partial->typed_data(), size, total);
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < size; ++i)
      total[i] += partial->typed_data()[part * size + i];
  return ffi::Error::Success();
}

}  // namespace
