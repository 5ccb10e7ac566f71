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
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
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
typedef float Vector __attribute__((vector_size(4 * kLanes)));

// A Vector or a float at any address.
template <typename T>
T Load(const float* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <typename T>
void Store(float* to, T value) {
  std::memcpy(to, &value, sizeof(T));
}

constexpr int64_t kLine = 16;            // Floats that a cache line holds.
constexpr int64_t kAhead = 32 * kWidth;  // Weights that are fetched ahead.

// Input rows that a task reads for one panel after the other: they stay in the
// second-level cache.
constexpr int64_t kTaskBytes = 256 << 10;

// Squares of outputs that a task transforms, see MultiplySquares.
constexpr int64_t kSquares = 4 * kTile;

// What a tile of squares takes, and a convolution by squares more than by rows,
// where a tile of rows takes 1 a tap: 16 products and the transforms; 7 more taps
// of weights to fetch from memory.
constexpr int64_t kSquareCost = 20, kSquareStart = 32;

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

int64_t Divide(int64_t a, int64_t b) { return (a + b - 1) / b; }  // Upwards.

// rows x weights + bias, then `add` what the output holds, then a ReLU.
struct Product {
  const float* panels;
  int64_t taps, depth, columns;
  bool add, relu;
  int64_t num_panels() const { return Divide(columns, kWidth); }

  template <typename T>
  void Finish(T sum, float* out) const {
    if (add) sum += Load<T>(out);
    if (relu) sum = sum < 0 ? T{} : sum;  // Keeps NaN.
    Store(out, sum);
  }
};

// M rows of one panel, of which V vectors; rows[tap * M + i] points at `depth`
// floats. M more pointers follow, what is read next: it is fetched meanwhile.
template <int M, int V>
void Tile(const Product& product, const float* const* rows, int64_t panel,
          float* const* outputs) {
  const float* weights =
      product.panels + panel * (1 + product.taps * product.depth) * kWidth;
  const int64_t start = panel * kWidth;
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v)
      __builtin_prefetch(outputs[i] + start + v * kLanes, 1);
  const auto load = [&](int v) { return Load<Vector>(weights + v * kLanes); };
  Vector sums[M][V];
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v) sums[i][v] = load(v);
  weights += kWidth;
  for (int64_t tap = 0; tap < product.taps; ++tap, rows += M) {
    const float* row[M];
    for (int i = 0; i < M; ++i) row[i] = rows[i];
    for (int64_t k = 0; k < product.depth;) {
      for (int i = 0; i < M; ++i) __builtin_prefetch(rows[M + i] + k);
      const int64_t end = std::min(k + kLine, product.depth);
      for (; k < end; ++k, weights += kWidth) {
        __builtin_prefetch(weights + kAhead);
        __builtin_prefetch(weights + kAhead + kLine);
        Vector w[V];
        for (int v = 0; v < V; ++v) w[v] = load(v);
        for (int i = 0; i < M; ++i)
          for (int v = 0; v < V; ++v) sums[i][v] += row[i][k] * w[v];
      }
    }
  }
  const int64_t width = std::min<int64_t>(product.columns - start, V * kLanes);
  for (int i = 0; i < M; ++i) {
    float* out = outputs[i] + start;
    if (width == V * kLanes) {
      for (int v = 0; v < V; ++v)
        product.Finish(sums[i][v], out + v * kLanes);
    } else {
      const float* sum = reinterpret_cast<const float*>(sums[i]);
      for (int64_t j = 0; j < width; ++j)
        product.Finish(Load<float>(sum + j), out + j);
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
  const int64_t wanted = 8 * std::max<int64_t>(pool.num_threads(), 1);
  int64_t block = std::max<int64_t>(kTaskBytes / (4 * product.depth), 1);
  block = std::min(block, Divide(count, wanted));
  block = std::max<int64_t>(Divide(block, kTile), 4) * kTile;
  const int64_t blocks = Divide(count, block), panels = product.num_panels();
  const int64_t group = Divide(panels, std::min(panels, Divide(wanted, blocks)));
  const int64_t groups = Divide(panels, group);
  Parallel(pool, blocks * groups, [&](int64_t task) {
    const int64_t start = task / groups * block;
    const int64_t size = std::min(block, count - start);
    std::vector<const float*> rows(size * product.taps + kTile);
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

// The active positions of a mask in the images of [start, end), or the others.
struct Positions {
  const float* mask;
  Map map;
  int64_t start, end;
  std::vector<int64_t> numbers;

  Positions(const Floats& mask, bool active, int64_t start, int64_t end)
      : mask(mask.typed_data()), map(MapOf(mask)), start(start), end(end) {
    numbers.reserve((end - start) * map.area());
    for (int64_t i = start * map.area(); i < end * map.area(); ++i)
      if ((this->mask[i] != 0) == active) numbers.push_back(i);
  }
  int64_t size() const { return numbers.size(); }
};

// The reads of a size x size convolution, padded by size / 2, at positions of
// its output; row(j) points at position j of the map `in`.
template <typename Row>
auto Windows(int64_t size, int64_t strides, Map in, const Positions& positions,
             const float* zeros, const Row& row) {
  const Map out = positions.map;
  return [=, &positions](int64_t i, const float** rows, int64_t step) {
    const int64_t position = positions.numbers[i];
    const int64_t image = position / out.area();
    const int64_t top = position / out.width % out.height * strides - size / 2;
    const int64_t left = position % out.width * strides - size / 2;
    for (int64_t y = top; y < top + size; ++y)
      for (int64_t x = left; x < left + size; ++x, rows += step) {
        const bool inside = 0 <= y && y < in.height && 0 <= x && x < in.width;
        *rows = inside ? row(image * in.area() + y * in.width + x) : zeros;
      }
  };
}

// 2x2 outputs of a map: the row of each that is active, -1 of the others.
struct Square {
  int64_t image, top, left, rows[4];
};

// The squares that have an active position.
std::vector<Square> FindSquares(const Positions& positions) {
  const Map map = positions.map;
  std::vector<Square> squares;
  squares.reserve((positions.end - positions.start) * Divide(map.height, 2) *
                  Divide(map.width, 2));
  int64_t next = 0;  // The active positions are numbered line by line.
  for (int64_t image = positions.start; image < positions.end; ++image)
    for (int64_t top = 0; top < map.height; top += 2) {
      const float* line =
          positions.mask + (image * map.height + top) * map.width;
      int64_t row = next;
      for (int64_t x = 0; x < map.width; ++x) next += line[x] != 0;
      for (int64_t left = 0; left < map.width; left += 2) {
        Square square{image, top, left, {-1, -1, -1, -1}};
        bool any = false;
        for (int64_t x = left; x < std::min(left + 2, map.width); ++x) {
          if (line[x] != 0) square.rows[x - left] = row++, any = true;
          if (top + 1 < map.height && line[map.width + x] != 0)
            square.rows[2 + x - left] = next++, any = true;
        }
        if (any) squares.push_back(square);
      }
    }
  return squares;
}

// B' d B of Winograd's F(2x2, 3x3): d[i] is at rows[i] + channel, the result goes
// to out + i * step.
template <typename T>
void TransformInput(const float* const* rows, int64_t channel, float* out,
                    int64_t step) {
  T a[4][4];
  for (int x = 0; x < 4; ++x) {
    T d[4];
    for (int y = 0; y < 4; ++y) d[y] = Load<T>(rows[4 * y + x] + channel);
    a[0][x] = d[0] - d[2];
    a[1][x] = d[1] + d[2];
    a[2][x] = d[2] - d[1];
    a[3][x] = d[1] - d[3];
  }
  for (int y = 0; y < 4; ++y, out += 4 * step) {
    Store<T>(out, a[y][0] - a[y][2]);
    Store<T>(out + step, a[y][1] + a[y][2]);
    Store<T>(out + 2 * step, a[y][2] - a[y][1]);
    Store<T>(out + 3 * step, a[y][1] - a[y][3]);
  }
}

// A' m A of Winograd's F(2x2, 3x3), at the square's active outputs.
template <typename T>
void TransformOutput(const float* m, const Product& product,
                     float* const* outputs, int64_t column) {
  T a[2][4];
  for (int x = 0; x < 4; ++x) {
    T d[4];
    for (int y = 0; y < 4; ++y) d[y] = Load<T>(m + (4 * y + x) * kWidth);
    a[0][x] = d[0] + d[1] + d[2];
    a[1][x] = d[1] - d[2] - d[3];
  }
  for (int i = 0; i < 4; ++i) {
    if (outputs[i] == nullptr) continue;
    const T* b = a[i / 2];
    product.Finish<T>(i % 2 ? b[1] - b[2] - b[3] : b[0] + b[1] + b[2],
                      outputs[i] + column);
  }
}

// A 3x3 convolution with strides 1 by Winograd's minimal filtering F(2x2, 3x3)
// (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016):
// 16 products of a row a square instead of 9 an output. Weights are G g G', see
// native.py: float[panels][16][1 + depth][kWidth].
template <typename Row, typename Writes>
void MultiplySquares(ffi::ThreadPool& pool, const Product& product,
                     const std::vector<Square>& squares, Map map,
                     const float* zeros, const Row& row,
                     const Writes& writes) {
  const int64_t count = squares.size(), depth = product.depth;
  const int64_t wanted = 8 * std::max<int64_t>(pool.num_threads(), 1);
  const int64_t block =
      std::min<int64_t>(kSquares, Divide(Divide(count, wanted), kTile) * kTile);
  const int64_t blocks = Divide(count, block), panels = product.num_panels();
  // The inputs are transformed anew for each group of panels.
  const int64_t group = std::min(
      panels, std::max<int64_t>(Divide(panels, Divide(wanted, blocks)), 4));
  const int64_t groups = Divide(panels, group);
  Parallel(pool, blocks * groups, [&](int64_t task) {
    const int64_t start = task / groups * block;
    const int64_t size = std::min(block, count - start);
    thread_local std::vector<float> scratch;
    const size_t floats = 16 * size * (depth + kWidth);
    if (scratch.size() < floats) scratch.resize(floats);
    float *inputs = scratch.data(), *products = inputs + 16 * size * depth;
    std::vector<float*> outputs(4 * size);
    for (int64_t i = 0; i < size; ++i) {
      const Square& square = squares[start + i];
      const float* rows[16];
      for (int64_t j = 0; j < 16; ++j) {
        const int64_t y = square.top - 1 + j / 4, x = square.left - 1 + j % 4;
        const bool inside = 0 <= y && y < map.height && 0 <= x && x < map.width;
        rows[j] = inside ? row((square.image * map.height + y) * map.width + x)
                         : zeros;
      }
      float* input = inputs + i * depth;
      int64_t k = 0;
      for (; k + kLanes <= depth; k += kLanes)
        TransformInput<Vector>(rows, k, input + k, size * depth);
      for (; k < depth; ++k)
        TransformInput<float>(rows, k, input + k, size * depth);
      for (int j = 0; j < 4; ++j)
        outputs[4 * i + j] =
            square.rows[j] < 0 ? nullptr : writes(square.rows[j]);
    }
    const int64_t first = task % groups * group;
    for (int64_t panel = first; panel < std::min(first + group, panels);
         ++panel) {
      const int64_t width =
          std::min<int64_t>(product.columns - panel * kWidth, kWidth);
      const auto tile = width <= kWidth / 2 ? TileOf<kWidth / kLanes / 2>
                                            : TileOf<kWidth / kLanes>;
      for (int64_t j = 0; j < 16; ++j)
        for (int64_t i = 0; i < size; i += kTile) {
          const int64_t rows = std::min<int64_t>(kTile, size - i);
          const float* reads[2 * kTile] = {};
          float* sums[kTile];
          for (int64_t k = 0; k < rows; ++k) {
            reads[k] = inputs + (j * size + i + k) * depth;
            sums[k] = products + ((i + k) * 16 + j) * kWidth;
          }
          tile(rows,
               {product.panels + (panel * 16 + j) * (1 + depth) * kWidth, 1,
                depth, kWidth, false, false},
               reads, 0, sums);
        }
      for (int64_t i = 0; i < size; ++i) {
        const float* m = products + i * 16 * kWidth;
        int64_t j = 0;
        for (; j + kLanes <= width; j += kLanes)
          TransformOutput<Vector>(m + j, product, &outputs[4 * i],
                                  panel * kWidth + j);
        for (; j < width; ++j)
          TransformOutput<float>(m + j, product, &outputs[4 * i],
                                 panel * kWidth + j);
      }
    }
  });
}

// A size x size convolution at the active positions of a mask. `squares` are its
// weights for MultiplySquares, if any: faster where positions are neighbours.
template <typename Row, typename Writes>
void Convolve(ffi::ThreadPool& pool, Product product, const Floats& squares,
              int64_t size, int64_t strides, Map in, const Positions& positions,
              const float* zeros, const Row& row, const Writes& writes) {
  if (squares.element_count() > 0) {
    const auto found = FindSquares(positions);
    if (kSquareStart + kSquareCost * Divide(found.size(), kTile) <
        9 * Divide(positions.size(), kTile)) {
      product.panels = squares.typed_data();
      MultiplySquares(pool, product, found, in, zeros, row, writes);
      return;
    }
  }
  Multiply(pool, product, positions.size(),
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

  for (int64_t image = 0; image < images; image += group) {
    // A group of images after the other: their maps stay in the cache.
    const int64_t stop = std::min(image + group, images);
    const Positions active(hard, true, image, stop);
    const auto out_row = [&](int64_t i) {
      return outs + active.numbers[i] * features;
    };

    if (projection.element_count() > 0) {
      const int64_t strides = first_strides * second_strides;
      Product product{projection.typed_data(), 1,     channels,
                      features,                false, false};
      Multiply(pool, product, active.size(),
               Windows(1, strides, in, active, zeros.data(), x_row),
               out_row);
      const Positions rest(hard, false, image, stop);
      product.relu = true;
      Multiply(pool, product, rest.size(),
               Windows(1, strides, in, rest, zeros.data(), x_row),
               [&](int64_t i) { return outs + rest.numbers[i] * features; });
    }

    const Positions needed(dilated, true, image, stop);
    Convolve(pool,
             {first.typed_data(), first_size * first_size, channels, planes,
              false, true},
             first_squares, first_size, first_strides, in, needed, zeros.data(),
             x_row, [=](int64_t i) { return ys + i * planes; });

    const int64_t offset = image * middle.area();
    std::vector<const float*> y_rows((stop - image) * middle.area(),
                                     zeros.data());
    for (int64_t i = 0; i < needed.size(); ++i)
      y_rows[needed.numbers[i] - offset] = ys + i * planes;
    const auto y_row = [&](int64_t j) { return y_rows[j - offset]; };
    const auto convolve = [&](Product product, const auto& writes) {
      Convolve(pool, product, second_squares, 3, second_strides, middle, active,
               zeros.data(), y_row, writes);
    };
    Product product{second.typed_data(), 9, planes, features, true, true};
    if (third.element_count() == 0) {
      convolve(product, out_row);
      continue;
    }
    const int64_t last = z->dimensions()[1];
    product.columns = last;
    product.add = false;
    convolve(product, [=](int64_t i) { return zs + i * last; });
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
  const int64_t taps = size * size, columns = products->dimensions()[1];
  const float* xs = x.typed_data();
  float *outs = out->typed_data(), *terms = products->typed_data();
  Multiply(
      pool, {panels.typed_data(), 1, channels, columns, false, false},
      images * in.area(),
      [=](int64_t i, const float** rows, int64_t) { *rows = xs + i * channels; },
      [=](int64_t i) { return terms + i * columns; });
  std::vector<double> totals(images * in.height);
  Parallel(pool, images * in.height, [&](int64_t row) {
    const float* term = terms + row * in.width * columns + taps;
    for (int64_t i = 0; i < in.width; ++i) totals[row] += term[i * columns];
  });
  Parallel(pool, images * end.height, [&](int64_t task) {
    const int64_t image = task / end.height, row = task % end.height;
    const double* total = &totals[image * in.height];
    const float average = std::accumulate(total, total + in.height, 0.0) /
                          static_cast<double>(in.area());
    float* logits = outs + task * end.width;
    std::fill_n(logits, end.width, average);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t y = row * strides + tap / size - size / 2;
      if (y < 0 || y >= in.height) continue;
      const float* term =
          terms + (image * in.height + y) * in.width * columns + tap;
      for (int64_t column = 0; column < end.width; ++column) {
        const int64_t x = column * strides + tap % size - size / 2;
        if (0 <= x && x < in.width) logits[column] += term[x * columns];
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
                                  .Arg<Floats>()   // first_squares
                                  .Arg<Floats>()   // second_squares
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
