// Residual blocks at the active positions of a mask, in float32, for CPUs.
//
// A convolution at K positions is a matrix product whose left operand is not
// formed: each row is one pointer a tap of the kernel, into the input or into a
// row of zeros (Dukhan, "The Indirect Convolution Algorithm", 2019). The tiles
// of the product stay in registers; weights are packed beforehand, see
// native.py: panels of kWidth columns, float[panels][1 + taps * depth][kWidth],
// the bias first, zeros where there are no more columns.
//
// All maps are NHWC. Shapes are checked by native.py, which is the only caller.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using FloatsOut = ffi::ResultBuffer<ffi::F32>;

constexpr int kWidth = 32;  // Columns of a panel, see native.py.

// Tiles of kTile rows and one panel: as many sums as there are registers, less
// those that hold the panel's row and a broadcast.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kTile = 10;
#elif defined(__AVX__)
constexpr int kLanes = 8, kTile = 3;
#else
constexpr int kLanes = 4, kTile = 2;
#endif
typedef float Vector
    __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// Input rows that a task reads for one panel after the other: they stay in the
// second-level cache.
constexpr int64_t kTaskBytes = 256 << 10;

// Calls run(0) ... run(tasks - 1), on the caller and the other threads of the
// pool. The caller never waits for a task that no thread has begun.
template <typename Function>
void Parallel(ffi::ThreadPool& pool, int64_t tasks, const Function& run) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  // `run` is not touched once all tasks are taken: a late thread may outlive it.
  auto work = [progress, tasks, &run] {
    for (int64_t i; (i = progress->next.fetch_add(1)) < tasks;) {
      run(i);
      progress->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), tasks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work(); });
  work();
  for (int spins = 0; progress->done.load(std::memory_order_acquire) < tasks;)
    if (++spins > 1000) std::this_thread::yield();
}

// rows x weights + bias, then `add` what the output holds, then a ReLU.
struct Product {
  const float* panels;
  int64_t taps, depth, columns;
  bool add, relu;
  int64_t num_panels() const { return (columns + kWidth - 1) / kWidth; }
};

// M rows of one panel, of which V vectors; rows[tap * M + i] points at `depth`
// floats.
template <int M, int V>
void Tile(const Product& product, const float* const* rows, int64_t panel,
          float* const* outputs) {
  const float* weights =
      product.panels + panel * (1 + product.taps * product.depth) * kWidth;
  const auto load = [&](int v) {
    return *reinterpret_cast<const Vector*>(weights + v * kLanes);
  };
  Vector sums[M][V];
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v) sums[i][v] = load(v);
  weights += kWidth;
  for (int64_t tap = 0; tap < product.taps; ++tap, rows += M) {
    const float* row[M];
    for (int i = 0; i < M; ++i) row[i] = rows[i];
    for (int64_t k = 0; k < product.depth; ++k, weights += kWidth) {
      Vector w[V];
      for (int v = 0; v < V; ++v) w[v] = load(v);
      for (int i = 0; i < M; ++i)
        for (int v = 0; v < V; ++v) sums[i][v] += row[i][k] * w[v];
    }
  }
  const int64_t start = panel * kWidth;
  const int64_t width = std::min<int64_t>(product.columns - start, V * kLanes);
  for (int i = 0; i < M; ++i) {
    float* out = outputs[i] + start;
    if (width == V * kLanes) {
      for (int v = 0; v < V; ++v) {
        Vector& at = *reinterpret_cast<Vector*>(out + v * kLanes);
        Vector y = sums[i][v];
        if (product.add) y += at;
        if (product.relu) y = y < 0 ? Vector{} : y;  // Keeps NaN.
        at = y;
      }
    } else {
      const float* sum = reinterpret_cast<const float*>(sums[i]);
      for (int64_t j = 0; j < width; ++j) {
        const float y = product.add ? out[j] + sum[j] : sum[j];
        out[j] = product.relu && y < 0 ? 0 : y;
      }
    }
  }
}

template <int V, int M = kTile>
void TileOf(int64_t count, const Product& product, const float* const* rows,
            int64_t panel, float* const* outputs) {
  if (count == M)
    Tile<M, V>(product, rows, panel, outputs);
  else if constexpr (M > 1)
    TileOf<V, M - 1>(count, product, rows, panel, outputs);
}

// A product of `count` rows. reads(i, rows, step) writes the pointers of row i,
// `step` apart; writes(i) returns where its output goes.
template <typename Reads, typename Writes>
void Multiply(ffi::ThreadPool& pool, const Product& product, int64_t count,
              const Reads& reads, const Writes& writes) {
  if (count == 0) return;
  // A task is a block of rows and a group of panels; several a thread, so that
  // all end at about the same time.
  const auto divide = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t wanted = 8 * std::max<int64_t>(pool.num_threads(), 1);
  int64_t block = std::max<int64_t>(kTaskBytes / (4 * product.depth), 1);
  block = std::min(block, divide(count, wanted));
  block = std::max<int64_t>(divide(block, kTile), 4) * kTile;
  const int64_t blocks = divide(count, block), panels = product.num_panels();
  const int64_t group = divide(panels, std::min(panels, divide(wanted, blocks)));
  const int64_t groups = divide(panels, group);
  Parallel(pool, blocks * groups, [&](int64_t task) {
    const int64_t start = task / groups * block;
    const int64_t size = std::min(block, count - start);
    std::vector<const float*> rows(size * product.taps);
    std::vector<float*> outputs(size);
    for (int64_t i = 0; i < size; ++i) {
      const int64_t first = i - i % kTile;  // Of the tile.
      reads(start + i, &rows[first * product.taps + i - first],
            std::min<int64_t>(kTile, size - first));
      outputs[i] = writes(start + i);
    }
    const int64_t first = task % groups * group;
    for (int64_t panel = first; panel < std::min(first + group, panels); ++panel)
      for (int64_t i = 0; i < size; i += kTile) {
        const auto tile = product.columns - panel * kWidth <= kWidth / 2
                              ? TileOf<kWidth / kLanes / 2>
                              : TileOf<kWidth / kLanes>;
        tile(std::min<int64_t>(kTile, size - i), product,
             &rows[i * product.taps], panel, &outputs[i]);
      }
  });
}

// Positions are numbered (image * height + row) * width + column.
struct Map {
  int64_t height, width;
  int64_t area() const { return height * width; }
};

template <typename Buffer>
Map MapOf(const Buffer& buffer) {
  return {buffer.dimensions()[1], buffer.dimensions()[2]};
}

// Positions in [start, end) that are active, or those that are not.
std::vector<int64_t> Find(const float* mask, bool active, int64_t start,
                          int64_t end) {
  std::vector<int64_t> positions;
  positions.reserve(end - start);
  for (int64_t i = start; i < end; ++i)
    if ((mask[i] != 0) == active) positions.push_back(i);
  return positions;
}

// The reads of a size x size convolution, padded by size / 2, at positions of
// the map `out`; row(j) points at position j of the map `in`.
template <typename Row>
auto Windows(int64_t size, int64_t strides, Map in, Map out,
             const std::vector<int64_t>& positions, const float* zeros,
             const Row& row) {
  return [=, &positions](int64_t i, const float** rows, int64_t step) {
    const int64_t position = positions[i], image = position / out.area();
    const int64_t top = position / out.width % out.height * strides - size / 2;
    const int64_t left = position % out.width * strides - size / 2;
    for (int64_t y = top; y < top + size; ++y)
      for (int64_t x = left; x < left + size; ++x, rows += step) {
        const bool inside = 0 <= y && y < in.height && 0 <= x && x < in.width;
        *rows = inside ? row(image * in.area() + y * in.width + x) : zeros;
      }
  };
}

// relu(shortcut(x) + mask * branch(x)). The branch is relu(first) and second,
// in a bottleneck relu(second) and third. Without a projection (size 0) x and
// out are one buffer, and what is not active stays. y and z are scratch for the
// rows of `group` images.
ffi::Error Block(ffi::ThreadPool pool, Floats x, Floats hard, Floats dilated,
                 Floats first, Floats second, Floats third, Floats projection,
                 FloatsOut out, FloatsOut y, FloatsOut z, int64_t first_size,
                 int64_t first_strides, int64_t second_strides, int64_t group) {
  const int64_t images = x.dimensions()[0], channels = x.dimensions()[3];
  const int64_t planes = y->dimensions()[1], features = out->dimensions()[3];
  const Map in = MapOf(x), middle = MapOf(dilated), end = MapOf(hard);
  const float* xs = x.typed_data();
  float *outs = out->typed_data(), *ys = y->typed_data(), *zs = z->typed_data();
  const std::vector<float> zeros(std::max(channels, planes));
  const auto x_row = [=](int64_t j) { return xs + j * channels; };

  for (int64_t image = 0; image < images; image += group) {
    // A group of images after the other: their maps stay in the cache.
    const int64_t stop = std::min(image + group, images);
    const auto find = [&](const Floats& mask, Map map, bool active) {
      return Find(mask.typed_data(), active, image * map.area(),
                  stop * map.area());
    };
    const auto active = find(hard, end, true);
    const auto out_row = [&](int64_t i) { return outs + active[i] * features; };

    if (projection.element_count() > 0) {
      const int64_t strides = first_strides * second_strides;
      Product product{projection.typed_data(), 1,     channels,
                      features,                false, false};
      Multiply(pool, product, active.size(),
               Windows(1, strides, in, end, active, zeros.data(), x_row),
               out_row);
      const auto rest = find(hard, end, false);
      product.relu = true;
      Multiply(pool, product, rest.size(),
               Windows(1, strides, in, end, rest, zeros.data(), x_row),
               [&](int64_t i) { return outs + rest[i] * features; });
    }

    const auto needed = find(dilated, middle, true);
    Multiply(pool,
             {first.typed_data(), first_size * first_size, channels, planes,
              false, true},
             needed.size(),
             Windows(first_size, first_strides, in, middle, needed,
                     zeros.data(), x_row),
             [=](int64_t i) { return ys + i * planes; });

    const int64_t offset = image * middle.area();
    std::vector<const float*> y_rows((stop - image) * middle.area(),
                                     zeros.data());
    for (size_t i = 0; i < needed.size(); ++i)
      y_rows[needed[i] - offset] = ys + i * planes;
    const auto windows =
        Windows(3, second_strides, middle, end, active, zeros.data(),
                [&](int64_t j) { return y_rows[j - offset]; });
    Product product{second.typed_data(), 9, planes, features, true, true};
    if (third.element_count() == 0) {
      Multiply(pool, product, active.size(), windows, out_row);
      continue;
    }
    const int64_t last = z->dimensions()[1];
    product.columns = last;
    product.add = false;
    Multiply(pool, product, active.size(), windows,
             [=](int64_t i) { return zs + i * last; });
    Multiply(
        pool, {third.typed_data(), 1, last, features, true, true},
        active.size(),
        [=](int64_t i, const float** rows, int64_t) { *rows = zs + i * last; },
        out_row);
  }
  return ffi::Error::Success();
}

// A size x size convolution of a padded map, at all positions.
ffi::Error Convolution(ffi::ThreadPool pool, Floats x, Floats panels,
                       FloatsOut out, int64_t size, int64_t strides,
                       bool relu) {
  const Map in = MapOf(x), end = MapOf(*out);
  const int64_t channels = x.dimensions()[3], features = out->dimensions()[3];
  const float* xs = x.typed_data();
  float* outs = out->typed_data();
  // Nothing is missing: a row of the window is one tap.
  Multiply(
      pool,
      {panels.typed_data(), size, size * channels, features, false, relu},
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
  Parallel(pool, out->dimensions()[0] * end.height, [=](int64_t task) {
    const int64_t image = task / end.height, top = task % end.height * 2 - 1;
    const int64_t first_y = std::max<int64_t>(top, 0);
    const int64_t last_y = std::min(top + 3, in.height);
    for (int64_t column = 0; column < end.width; ++column) {
      const int64_t first_x = std::max<int64_t>(column * 2 - 1, 0);
      const int64_t last_x = std::min(column * 2 + 2, in.width);
      float* best = outs + (task * end.width + column) * channels;
      std::fill_n(best, channels, -std::numeric_limits<float>::infinity());
      for (int64_t y = first_y; y < last_y; ++y)
        for (int64_t x = first_x; x < last_x; ++x) {
          const float* row =
              xs + (image * in.area() + y * in.width + x) * channels;
          for (int64_t c = 0; c < channels; ++c)  // Keeps NaN.
            best[c] = row[c] > best[c] || row[c] != row[c] ? row[c] : best[c];
        }
    }
  });
  return ffi::Error::Success();
}

// The logits of a mask unit: a size x size convolution with one output plus a
// linear map of the average over the map. Both are linear: the products of all
// taps and that of the average, the last, are formed in one pass over x, and
// summed afterwards.
ffi::Error MaskLogits(ffi::ThreadPool pool, Floats x, Floats panels,
                      FloatsOut out, FloatsOut products, int64_t size,
                      int64_t strides) {
  const Map in = MapOf(x), end = MapOf(*out);
  const int64_t images = x.dimensions()[0], channels = x.dimensions()[3];
  const int64_t taps = size * size, columns = taps + 1;
  const float* xs = x.typed_data();
  float *outs = out->typed_data(), *terms = products->typed_data();
  Multiply(
      pool, {panels.typed_data(), 1, channels, columns, false, false},
      images * in.area(),
      [=](int64_t i, const float** rows, int64_t) { *rows = xs + i * channels; },
      [=](int64_t i) { return terms + i * columns; });
  Parallel(pool, images, [=](int64_t image) {
    const float* first = terms + image * in.area() * columns;
    double total = 0;
    for (int64_t i = 0; i < in.area(); ++i) total += first[i * columns + taps];
    const float average = total / in.area();
    float* logit = outs + image * end.area();
    for (int64_t row = 0; row < end.height; ++row)
      for (int64_t column = 0; column < end.width; ++column, ++logit) {
        *logit = average;
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t y = row * strides + tap / size - size / 2;
          const int64_t x = column * strides + tap % size - size / 2;
          if (0 <= y && y < in.height && 0 <= x && x < in.width)
            *logit += first[(y * in.width + x) * columns + tap];
        }
      }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dynconv_block, Block,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()   // x
                                  .Arg<Floats>()   // hard
                                  .Arg<Floats>()   // dilated
                                  .Arg<Floats>()   // first
                                  .Arg<Floats>()   // second
                                  .Arg<Floats>()   // third
                                  .Arg<Floats>()   // projection
                                  .Ret<Floats>()   // out
                                  .Ret<Floats>()   // y
                                  .Ret<Floats>()   // z
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
                                  .Arg<Floats>()   // x
                                  .Ret<Floats>());  // out

XLA_FFI_DEFINE_HANDLER_SYMBOL(dynconv_mask_logits, MaskLogits,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()  // x
                                  .Arg<Floats>()  // panels
                                  .Ret<Floats>()  // out
                                  .Ret<Floats>()  // products
                                  .Attr<int64_t>("size")
                                  .Attr<int64_t>("strides"));
