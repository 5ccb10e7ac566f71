// Gated blocks at the active positions of their masks, in float32, for CPUs.
//
// A convolution at K positions is a matrix product, see product.h, or where
// positions are neighbours one of squares, see squares.h. All maps are NHWC.
// Shapes are checked by cpu.py, which is the only caller.

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

// relu(shortcut(x) + mask * branch(x)), where the branch is a chain of
// convolutions with a ReLU between. Convolution i, of kernel sizes[i] and
// strides[i], runs on mask levels[i]; the last one on level 0. Without a
// projection x and out are one buffer, and what is not active stays.
//
// Arguments after x: the masks of the levels; the weights of the convolutions,
// and of the projection; those for MultiplySquares, without elements where there
// are none. Results after out: scratch for the rows of `group` images, of each
// convolution but the last.
ffi::Error Block(ffi::ThreadPool pool, Floats x, ffi::RemainingArgs args,
                 FloatsOut out, ffi::RemainingRets results,
                 ffi::Span<const int64_t> sizes,
                 ffi::Span<const int64_t> strides,
                 ffi::Span<const int64_t> levels, int64_t group) {
  const int64_t convs = sizes.size();
  const int64_t num_levels =
      1 + *std::max_element(levels.begin(), levels.end());
  if (static_cast<int64_t>(args.size()) != num_levels + 2 * convs + 1 ||
      static_cast<int64_t>(results.size()) != convs - 1)
    return ffi::Error::InvalidArgument("wrong number of buffers");
  const auto argument = [&](int64_t i) { return args.get<Floats>(i).value(); };
  const int64_t images = x.dimensions()[0], channels = x.dimensions()[3];
  const int64_t features = out->dimensions()[3];
  const Floats projection = argument(num_levels + convs);
  const Map in = MapOf(x);
  const float* xs = x.typed_data();
  float* outs = out->typed_data();
  std::vector<float*> scratch;
  std::vector<int64_t> depths;  // Channels of each convolution's output.
  for (int64_t i = 0; i + 1 < convs; ++i) {
    auto rows = results.get<ffi::Buffer<ffi::F32>>(i).value();
    scratch.push_back(rows->typed_data());
    depths.push_back(rows->dimensions()[1]);
  }
  depths.push_back(features);
  const std::vector<float> zeros(
      std::max(channels, *std::max_element(depths.begin(), depths.end())));
  const auto x_row = [=](int64_t j) { return xs + j * channels; };

  Team team(pool);
  std::vector<const float*> table;  // Rows of a convolution, by position.
  for (int64_t image = 0; image < images; image += group) {
    // A group of images after the other: their maps stay in the cache.
    const int64_t stop = std::min(image + group, images);
    const bool projects = projection.element_count() > 0;
    std::vector<Positions> lists;
    lists.reserve(num_levels);
    for (int64_t level = 0; level < num_levels; ++level)
      lists.emplace_back(argument(level), image, stop, projects && level == 0);
    const Positions& all = lists[0];
    const auto out_row = [&](int64_t i) {
      return outs + all.numbers[i] * features;
    };

    if (projects) {
      // Where nothing is added the sum is rectified at once.
      int64_t total = 1;
      for (const int64_t stride : strides) total *= stride;
      Multiply(team,
               {projection.typed_data(), 1, channels, features, false,
                all.active},
               all.size(), Windows(1, total, in, all, zeros.data(), x_row),
               out_row);
    }

    for (int64_t i = 0; i < convs; ++i) {
      const bool last = i + 1 == convs;
      const Positions& positions = lists[levels[i]];
      const Floats squares = argument(num_levels + convs + 1 + i);
      const int64_t depth = i == 0 ? channels : depths[i - 1];
      const Product product{argument(num_levels + i).typed_data(),
                            sizes[i] * sizes[i],
                            depth,
                            depths[i],
                            last,
                            kAllRows};
      float* const rows = last ? nullptr : scratch[i];
      const int64_t width = depths[i];
      const auto run = [&](const auto& writes) {
        if (i == 0) {
          Convolve(team, product, squares, sizes[i], strides[i], in, positions,
                   zeros.data(), x_row, writes);
          return;
        }
        const float* const before = scratch[i - 1];
        if (levels[i] == levels[i - 1]) {  // Pointwise: row by row.
          Multiply(
              team, product, positions.active,
              [=](int64_t j, const float** read, int64_t) {
                *read = before + j * depth;
              },
              writes);
          return;
        }
        const Positions& needed = lists[levels[i - 1]];
        const int64_t offset = image * needed.map.area();
        table.assign((stop - image) * needed.map.area(), zeros.data());
        for (int64_t j = 0; j < needed.active; ++j)
          table[needed.numbers[j] - offset] = before + j * depth;
        Convolve(team, product, squares, sizes[i], strides[i], needed.map,
                 positions, zeros.data(),
                 [&](int64_t j) { return table[j - offset]; }, writes);
      };
      if (last)
        run(out_row);
      else
        run([=](int64_t j) { return rows + j * width; });
    }
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
                                  .Arg<Floats>()    // x
                                  .RemainingArgs()  // see Block
                                  .Ret<Floats>()    // out
                                  .RemainingRets()  // scratch
                                  .Attr<ffi::Span<const int64_t>>("sizes")
                                  .Attr<ffi::Span<const int64_t>>("strides")
                                  .Attr<ffi::Span<const int64_t>>("levels")
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
