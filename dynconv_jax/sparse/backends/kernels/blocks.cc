// Gated blocks at the active positions of their masks, in float32, for CPUs.
//
// A convolution at K positions is a matrix product (product.h), or uses
// Winograd tiles if enough positions are neighbors (winograd.h). All maps are
// NHWC. The only caller is cpu.py, which checks shapes.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "bands.h"
#include "depthwise.h"
#include "layer.h"
#include "positions.h"
#include "product.h"
#include "winograd.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// A convolution of `count` positions, given the rows of their windows.
template <typename Reads, typename Writes>
void Compute(Team& team, const Layer& layer, const Product& product,
             int64_t count, const Reads& reads, const Writes& writes) {
  if (!layer.depthwise) {
    Multiply(team, product, count, reads, writes);
    return;
  }
  const int64_t parts =
      std::min(Divide(count, 2 * kPositions), 8 * team.size());
  team.Run(parts, [&](int64_t begin, int64_t end) {
    Depthwise(product, count * begin / parts, count * end / parts, reads,
              writes);
  });
}

// A convolution at the active positions of a mask.
template <typename Row, typename Writes>
void Convolve(Team& team, const Layer& layer, Product product, Map in,
              const Positions& positions, const float* zeros, const Row& row,
              const Writes& writes) {
  if (layer.winograd != nullptr) {
    const auto found = FindWinogradTiles(positions);
    if (kWinogradStart + kWinogradCost * Divide(found.size(), kTile) <
        9 * Divide(positions.active, kTile)) {
      product.panels = layer.winograd;
      MultiplyWinograd(team, product, found, in, zeros, row, writes);
      return;
    }
  }
  Compute(team, layer, product, positions.active,
          Windows(layer.window, in, positions, zeros, row), writes);
}

// The shortcut: the input, whose buffer is also the output; the input's
// projection; or nothing.
enum Shortcut { kIdentity, kProjection, kNothing };

// Computes activation(shortcut(x) + mask * branch(x)), where the branch is a
// chain of convolutions. Layer i runs on the mask levels[i]; the last layer
// runs on level 0. With an identity shortcut, inactive positions are left
// unchanged. With `bands`, x and out are separate buffers, see RunBands.
//
// Arguments after x: the masks of the levels, the weights of the convolutions,
// the weights of the projection, and the weights for MultiplyWinograd, empty if
// not used. Results after out: for each convolution except the last,
// scratch memory for the rows of `group` images. `activations` has one more
// entry than there are convolutions: the activation after the addition.
ffi::Error Block(ffi::ThreadPool pool, Floats x, ffi::RemainingArgs args,
                 FloatsOut out, ffi::RemainingRets results,
                 ffi::Span<const int64_t> sizes,
                 ffi::Span<const int64_t> strides,
                 ffi::Span<const int64_t> tops, ffi::Span<const int64_t> lefts,
                 ffi::Span<const int64_t> levels,
                 ffi::Span<const int64_t> depthwise,
                 ffi::Span<const int64_t> activations, int64_t shortcut,
                 bool bands, int64_t group) {
  const int64_t convs = sizes.size();
  const int64_t num_levels =
      1 + *std::max_element(levels.begin(), levels.end());
  if (static_cast<int64_t>(args.size()) != num_levels + 2 * convs + 1 ||
      static_cast<int64_t>(results.size()) != convs - 1)
    return ffi::Error::InvalidArgument("wrong number of buffers");
  const auto argument = [&](int64_t i) { return args.get<Floats>(i).value(); };
  const int64_t images = x.dimensions()[0], channels = x.dimensions()[3];
  const int64_t features = out->dimensions()[3];
  const Map in = MapOf(x);
  const float* xs = x.typed_data();
  float* outs = out->typed_data();
  std::vector<float*> scratch;
  std::vector<Layer> layers;
  int64_t depth = channels, widest = channels;
  for (int64_t i = 0; i < convs; ++i) {
    int64_t width = features;
    if (i + 1 < convs) {
      auto rows = results.get<ffi::Buffer<ffi::F32>>(i).value();
      scratch.push_back(rows->typed_data());
      width = rows->dimensions()[1];
    }
    const Floats winograd = argument(num_levels + convs + 1 + i);
    layers.push_back({{sizes[i], strides[i], tops[i], lefts[i]},
                      levels[i],
                      depth,
                      width,
                      depthwise[i] != 0,
                      static_cast<Activation>(activations[i]),
                      argument(num_levels + i).typed_data(),
                      winograd.element_count() > 0 ? winograd.typed_data()
                                                  : nullptr});
    depth = width;
    widest = std::max(widest, width);
  }
  // The last convolution applies the activation after the addition.
  layers.back().activation = static_cast<Activation>(activations[convs]);
  const std::vector<float> zeros(widest);
  const auto x_row = [=](int64_t j) { return xs + j * channels; };

  Team team(pool);
  std::vector<const float*> table;  // Rows of a convolution, by position.
  for (int64_t image = 0; image < images; image += group) {
    // Process images in groups whose maps stay in the cache.
    const int64_t stop = std::min(image + group, images);
    std::vector<Positions> lists;
    lists.reserve(num_levels);
    for (int64_t level = 0; level < num_levels; ++level)
      lists.emplace_back(argument(level), image, stop,
                         level == 0 && shortcut != kIdentity && !bands);
    const Positions& all = lists[0];
    if (bands) {
      RunBands(team, convs == 3 ? &layers[0] : nullptr, layers[convs - 2],
               layers[convs - 1], shortcut == kIdentity, in, all,
               lists[num_levels - 1], xs, outs, zeros.data());
      continue;
    }
    const auto out_row = [&](int64_t i) {
      return outs + all.numbers[i] * features;
    };

    if (shortcut == kProjection) {
      int64_t total = 1;
      for (const int64_t stride : strides) total *= stride;
      Layer projection = layers.back();
      projection.window = {1, total, 0, 0};
      projection.depth = channels;
      projection.panels = argument(num_levels + convs).typed_data();
      // Inactive positions, to which nothing is added, are activated here.
      Multiply(team, projection.product(false, all.active), all.size(),
               Windows(projection.window, in, all, zeros.data(), x_row),
               out_row);
    }
    if (shortcut == kNothing)
      for (int64_t i = all.active; i < all.size(); ++i)
        std::fill_n(out_row(i), features, 0.0f);

    for (int64_t i = 0; i < convs; ++i) {
      const Layer& layer = layers[i];
      const bool last = i + 1 == convs;
      const Positions& positions = lists[layer.level];
      const Product product = layer.product(last && shortcut != kNothing);
      const auto run = [&](const auto& writes) {
        if (i == 0) {
          Convolve(team, layer, product, in, positions, zeros.data(), x_row,
                   writes);
          return;
        }
        const float* const before = scratch[i - 1];
        const int64_t width = layer.depth;
        if (layer.level == layers[i - 1].level) {  // Pointwise: row by row.
          Compute(
              team, layer, product, positions.active,
              [=](int64_t j, const float** read, int64_t) {
                *read = before + j * width;
              },
              writes);
          return;
        }
        const Positions& needed = lists[layers[i - 1].level];
        const int64_t offset = image * needed.map.area();
        table.assign((stop - image) * needed.map.area(), zeros.data());
        for (int64_t j = 0; j < needed.active; ++j)
          table[needed.numbers[j] - offset] = before + j * width;
        Convolve(
            team, layer, product, needed.map, positions, zeros.data(),
            [&](int64_t j) { return table[j - offset]; }, writes);
      };
      if (last) {
        run(out_row);
      } else {
        float* const rows = scratch[i];
        const int64_t width = layer.features;
        run([=](int64_t j) { return rows + j * width; });
      }
    }
  }
  return ffi::Error::Success();
}

// Computes a size x size convolution of a padded map at all positions.
ffi::Error Convolution(ffi::ThreadPool pool, Floats x, Floats panels,
                       FloatsOut out, int64_t size, int64_t strides,
                       int64_t activation) {
  Team team(pool);
  const Map in = MapOf(x), end = MapOf(*out);
  const int64_t channels = x.dimensions()[3], features = out->dimensions()[3];
  const float* xs = x.typed_data();
  float* outs = out->typed_data();
  // All positions exist, so each row of the window is contiguous: one tap.
  Multiply(
      team,
      {panels.typed_data(), size, size * channels, features, false,
       activation == kNone ? kNoRow : kAllRows,
       activation == kRelu6 ? 6.0f : kNoCap},
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

// Computes the 3x3 max pooling with stride 2 and padding 1.
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

// Computes the logits of a mask unit: a size x size convolution with one
// output, plus a linear map of the average over the map, which has the last
// column. Because both are linear, one pass over x computes the products of all
// taps and of the average, which are summed afterwards. `products` has a row of
// them for each position.
ffi::Error MaskLogits(ffi::ThreadPool pool, Floats x, Floats panels,
                      Floats bias, FloatsOut out, FloatsOut products,
                      int64_t size, int64_t strides) {
  const Map in = MapOf(x), end = MapOf(*out);
  const int64_t images = x.dimensions()[0], channels = x.dimensions()[3];
  const int64_t columns = products->dimensions()[1], taps = size * size;
  const float* xs = x.typed_data();
  float *outs = out->typed_data(), *terms = products->typed_data();
  Team team(pool);
  Multiply(
      team, {panels.typed_data(), 1, channels, columns, false, kNoRow},
      images * in.area(),
      [=](int64_t i, const float** row, int64_t) { *row = xs + i * channels; },
      [=](int64_t i) { return terms + i * columns; });
  std::vector<double> totals(images * in.height);  // Of lines.
  const auto sum_line = [&](int64_t line) {
    const float* term = terms + line * in.width * columns + taps;
    for (int64_t x = 0; x < in.width; ++x) totals[line] += term[x * columns];
  };
  team.Run(totals.size(), [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) sum_line(line);
  });
  const auto write_line = [&](int64_t line) {
    const int64_t image = line / end.height, row = line % end.height;
    const double* const first = totals.data() + image * in.height;
    const double total = std::accumulate(first, first + in.height, 0.0);
    float* const logits = outs + line * end.width;
    std::fill_n(logits, end.width,
                bias.typed_data()[0] +
                    static_cast<float>(total / static_cast<double>(in.area())));
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t y = row * strides + tap / size - size / 2;
      const int64_t left = tap % size - size / 2;
      if (y < 0 || y >= in.height) continue;
      const float* term =
          terms + ((image * in.height + y) * in.width + left) * columns + tap;
      const int64_t start = left < 0 ? Divide(-left, strides) : 0;
      const int64_t stop =
          std::min(end.width, Divide(in.width - left, strides));
      for (int64_t x = start; x < stop; ++x)
        logits[x] += term[x * strides * columns];
    }
  };
  team.Run(images * end.height, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) write_line(line);
  });
  return ffi::Error::Success();
}

}  // namespace

using Integers = ffi::Span<const int64_t>;

XLA_FFI_DEFINE_HANDLER_SYMBOL(dynconv_block, Block,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()    // x
                                  .RemainingArgs()  // see Block
                                  .Ret<Floats>()    // out
                                  .RemainingRets()  // scratch
                                  .Attr<Integers>("sizes")
                                  .Attr<Integers>("strides")
                                  .Attr<Integers>("tops")
                                  .Attr<Integers>("lefts")
                                  .Attr<Integers>("levels")
                                  .Attr<Integers>("depthwise")
                                  .Attr<Integers>("activations")
                                  .Attr<int64_t>("shortcut")
                                  .Attr<bool>("bands")
                                  .Attr<int64_t>("group"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(dynconv_convolution, Convolution,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()  // x
                                  .Arg<Floats>()  // panels
                                  .Ret<Floats>()  // out
                                  .Attr<int64_t>("size")
                                  .Attr<int64_t>("strides")
                                  .Attr<int64_t>("activation"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(dynconv_max_pool, MaxPool,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()    // x
                                  .Ret<Floats>());  // out

XLA_FFI_DEFINE_HANDLER_SYMBOL(dynconv_mask_logits, MaskLogits,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()  // x
                                  .Arg<Floats>()  // panels
                                  .Arg<Floats>()  // bias
                                  .Ret<Floats>()  // out
                                  .Ret<Floats>()  // products
                                  .Attr<int64_t>("size")
                                  .Attr<int64_t>("strides"));

// Columns of a panel of packed weights.
extern "C" const int dynconv_width = kWidth;
