// Residual blocks at the active positions of a mask, in float32, for CPUs.
//
// A convolution at K positions is a matrix product, see product.h, or where
// positions are neighbours one of squares, see squares.h. All maps are NHWC.
// Shapes are checked by native.py, which is the only caller.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "dots.h"
#include "positions.h"
#include "product.h"
#include "squares.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// A size x size convolution at the active positions of a mask. `squares` are
// its weights for MultiplySquares, if any: faster where positions are
// neighbours.
template <typename Row, typename Writes>
void Convolve(Team& team, Product product, const Floats& squares, int64_t size,
              int64_t strides, Map in, const Positions& positions,
              const float* zeros, const Row& row, const Writes& writes) {
  if (squares.element_count() > 0) {
    const auto found = FindSquares(positions);
    if (kSquareStart + kSquareCost * Divide(found.size(), kTile) <
        9 * Divide(positions.active, kTile)) {
      product.panels = squares.typed_data();
      MultiplySquares(team, product, found, in, zeros, row, writes);
      return;
    }
  }
  Multiply(team, product, positions.active,
           Windows(size, strides, in, positions, zeros, row), writes);
}

// relu(shortcut(x) + mask * branch(x)). The branch is relu(first) and second,
// in a bottleneck relu(second) and third. Without a projection (size 0) x and
// out are one buffer, and what is not active stays. y and z are scratch for the
// rows of `group` images.
ffi::Error Block(ffi::ThreadPool pool, Floats x, Floats hard, Floats dilated,
                 Floats first, Floats second, Floats third, Floats projection,
                 Floats first_squares, Floats second_squares, FloatsOut out,
                 FloatsOut y, FloatsOut z, int64_t first_size,
                 int64_t first_strides, int64_t second_strides, int64_t group) {
  const int64_t images = x.dimensions()[0], channels = x.dimensions()[3];
  const int64_t planes = y->dimensions()[1], features = out->dimensions()[3];
  const Map in = MapOf(x), middle = MapOf(dilated);
  const float* xs = x.typed_data();
  float *outs = out->typed_data(), *ys = y->typed_data(), *zs = z->typed_data();
  const std::vector<float> zeros(std::max(channels, planes));
  const auto x_row = [=](int64_t j) { return xs + j * channels; };

  Team team(pool);
  for (int64_t image = 0; image < images; image += group) {
    // A group of images after the other: their maps stay in the cache.
    const int64_t stop = std::min(image + group, images);
    const bool projects = projection.element_count() > 0;
    const Positions all(hard, image, stop, projects);
    const int64_t active = all.active;
    const auto out_row = [&](int64_t i) {
      return outs + all.numbers[i] * features;
    };

    if (projects) {
      // Where nothing is added the sum is rectified at once.
      const int64_t strides = first_strides * second_strides;
      Multiply(team,
               {projection.typed_data(), 1, channels, features, false, active},
               all.size(), Windows(1, strides, in, all, zeros.data(), x_row),
               out_row);
    }

    const Positions needed(dilated, image, stop);
    Convolve(team,
             {first.typed_data(), first_size * first_size, channels, planes,
              false, kAllRows},
             first_squares, first_size, first_strides, in, needed, zeros.data(),
             x_row, [=](int64_t i) { return ys + i * planes; });

    const int64_t offset = image * middle.area();
    std::vector<const float*> y_rows((stop - image) * middle.area(),
                                     zeros.data());
    for (int64_t i = 0; i < needed.size(); ++i)
      y_rows[needed.numbers[i] - offset] = ys + i * planes;
    const auto y_row = [&](int64_t j) { return y_rows[j - offset]; };
    const auto convolve = [&](Product product, const auto& writes) {
      Convolve(team, product, second_squares, 3, second_strides, middle, all,
               zeros.data(), y_row, writes);
    };
    Product product{second.typed_data(), 9, planes, features, true, kAllRows};
    if (third.element_count() == 0) {
      convolve(product, out_row);
      continue;
    }
    const int64_t last = z->dimensions()[1];
    product.columns = last;
    product.add = false;
    convolve(product, [=](int64_t i) { return zs + i * last; });
    Multiply(
        team, {third.typed_data(), 1, last, features, true, kAllRows}, active,
        [=](int64_t i, const float** rows, int64_t) { *rows = zs + i * last; },
        out_row);
  }
  return ffi::Error::Success();
}

// A size x size convolution of a padded map, at all positions.
ffi::Error Convolution(ffi::ThreadPool pool, Floats x, Floats panels,
                       FloatsOut out, int64_t size, int64_t strides,
                       bool relu) {
  Team team(pool);
  const Map in = MapOf(x), end = MapOf(*out);
  const int64_t channels = x.dimensions()[3], features = out->dimensions()[3];
  const float* xs = x.typed_data();
  float* outs = out->typed_data();
  // Nothing is missing: a row of the window is one tap.
  Multiply(
      team,
      {panels.typed_data(), size, size * channels, features, false,
       relu ? kAllRows : kNoRow},
      out->dimensions()[0] * end.area(),
      [=](int64_t i, const float** rows, int64_t step) {
        const int64_t image = i / end.area();
        const int64_t top = i / end.width % end.height * strides;
        const int64_t left = i % end.width * strides;
        for (int64_t y = top; y < top + size; ++y, rows += step)
          *rows = xs + (image * in.area() + y * in.width + left) * channels;
      },
      [=](int64_t i) { return outs + i * features; });
  return ffi::Error::Success();
}

// The maximum over 3x3 windows, 2 apart, padded by 1.
ffi::Error MaxPool(ffi::ThreadPool pool, Floats x, FloatsOut out) {
  const Map in = MapOf(x), end = MapOf(*out);
  const int64_t channels = x.dimensions()[3];
  const float* xs = x.typed_data();
  float* outs = out->typed_data();
  Team team(pool);
  const auto pool_line = [=](int64_t line) {
    const int64_t image = line / end.height, top = line % end.height * 2 - 1;
    const int64_t first_y = std::max<int64_t>(top, 0);
    const int64_t last_y = std::min(top + 3, in.height);
    for (int64_t column = 0; column < end.width; ++column) {
      const int64_t first_x = std::max<int64_t>(column * 2 - 1, 0);
      const int64_t last_x = std::min(column * 2 + 2, in.width);
      float* best = outs + (line * end.width + column) * channels;
      std::fill_n(best, channels, -std::numeric_limits<float>::infinity());
      for (int64_t y = first_y; y < last_y; ++y)
        for (int64_t x = first_x; x < last_x; ++x) {
          const float* row =
              xs + (image * in.area() + y * in.width + x) * channels;
          for (int64_t c = 0; c < channels; ++c)  // Keeps NaN.
            best[c] = row[c] > best[c] || row[c] != row[c] ? row[c] : best[c];
        }
    }
  };
  team.Run(out->dimensions()[0] * end.height, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) pool_line(line);
  });
  return ffi::Error::Success();
}

// The logits of a mask unit: a size x size convolution with one output plus a
// linear map of the average over the map, whose weights are the last of
// `weights`. Both are linear: the products of all taps and of the average are
// formed in one pass over x, each in a plane of its own, and summed afterwards.
ffi::Error MaskLogits(ffi::ThreadPool pool, Floats x, Floats weights,
                      Floats bias, FloatsOut out, FloatsOut products,
                      int64_t size, int64_t strides) {
  const Map in = MapOf(x), end = MapOf(*out);
  const int64_t images = x.dimensions()[0], channels = x.dimensions()[3];
  const int64_t plane = images * in.area(), taps = size * size;
  float *outs = out->typed_data(), *planes = products->typed_data();
  Team team(pool);
  MultiplyFew(team, x.typed_data(), plane, weights.typed_data(), channels,
              taps + 1, planes);
  const auto sum_image = [=](int64_t image) {
    const float* average = planes + taps * plane + image * in.area();
    const double total = std::accumulate(average, average + in.area(), 0.0);
    float* logits = outs + image * end.area();
    std::fill_n(logits, end.area(),
                bias.typed_data()[0] +
                    static_cast<float>(total / static_cast<double>(in.area())));
    for (int64_t tap = 0; tap < taps; ++tap) {
      const float* terms = planes + tap * plane + image * in.area();
      const int64_t left = tap % size - size / 2;
      const int64_t first = left < 0 ? Divide(-left, strides) : 0;
      const int64_t stop =
          std::min(end.width, Divide(in.width - left, strides));
      for (int64_t row = 0; row < end.height; ++row) {
        const int64_t y = row * strides + tap / size - size / 2;
        if (y < 0 || y >= in.height) continue;
        for (int64_t column = first; column < stop; ++column)
          logits[row * end.width + column] +=
              terms[y * in.width + column * strides + left];
      }
    }
  };
  team.Run(images, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) sum_image(image);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dynconv_block, Block,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()  // x
                                  .Arg<Floats>()  // hard
                                  .Arg<Floats>()  // dilated
                                  .Arg<Floats>()  // first
                                  .Arg<Floats>()  // second
                                  .Arg<Floats>()  // third
                                  .Arg<Floats>()  // projection
                                  .Arg<Floats>()  // first_squares
                                  .Arg<Floats>()  // second_squares
                                  .Ret<Floats>()  // out
                                  .Ret<Floats>()  // y
                                  .Ret<Floats>()  // z
                                  .Attr<int64_t>("first_size")
                                  .Attr<int64_t>("first_strides")
                                  .Attr<int64_t>("second_strides")
                                  .Attr<int64_t>("group"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(dynconv_convolution, Convolution,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()  // x
                                  .Arg<Floats>()  // panels
                                  .Ret<Floats>()  // out
                                  .Attr<int64_t>("size")
                                  .Attr<int64_t>("strides")
                                  .Attr<bool>("relu"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(dynconv_max_pool, MaxPool,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()    // x
                                  .Ret<Floats>());  // out

XLA_FFI_DEFINE_HANDLER_SYMBOL(dynconv_mask_logits, MaskLogits,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()  // x
                                  .Arg<Floats>()  // weights
                                  .Arg<Floats>()  // bias
                                  .Ret<Floats>()  // out
                                  .Ret<Floats>()  // products
                                  .Attr<int64_t>("size")
                                  .Attr<int64_t>("strides"));

// Columns of a panel of packed weights.
extern "C" const int dynconv_width = kWidth;
