// Matrix products whose left operand is not formed: its rows are read where
// they are (Dukhan, "The Indirect Convolution Algorithm", 2019).

#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "team.h"
#include "vectors.h"

namespace {

// Tiles of kTile rows and one panel, of kWidth columns: two vectors, and as
// many sums as there are registers, less those that hold the panel's row and a
// broadcast. kUnroll steps are one pass of a loop.
#if defined(__AVX512F__)
constexpr int kTile = 10, kUnroll = 1;
#else
constexpr int kTile = 6, kUnroll = 4;
#endif
constexpr int kWidth = 2 * kLanes;

// Has a vector stay in its register: the compiler would load it anew for each
// of its products, in the same instruction.
inline void Keep(Vector& v) {
#if defined(__AVX__) && !defined(__AVX512F__)
  asm("" : "+x"(v));
#endif
}

// Memory of a thread for what it does now, to be written before it is read. It
// is kept: an allocation would have threads wait for each other.
struct Scratch {
  std::vector<float> floats;
  std::vector<const float*> rows;
  std::vector<float*> outputs;

  static Scratch& Of(size_t floats, size_t rows, size_t outputs) {
    thread_local Scratch scratch;
    if (scratch.floats.size() < floats) scratch.floats.resize(floats);
    if (scratch.rows.size() < rows) scratch.rows.resize(rows);
    if (scratch.outputs.size() < outputs) scratch.outputs.resize(outputs);
    return scratch;
  }
};

constexpr int64_t kLine = 16;  // Floats that a cache line holds.
// Those of a step's weights, and how far they are apart.
constexpr int kLines = kWidth > kLine ? kWidth / kLine : 1;
constexpr int64_t kStride = kWidth / kLines;

// Steps of a product whose weights, half of a first-level cache or all of it,
// serve all rows of a block before the next. Where there is one tile of rows,
// those of kAhead steps later are fetched.
constexpr int64_t kPiece = 256, kAhead = 64;

// Bytes of the second-level cache.
inline int64_t CacheBytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 512 << 10;
}

// Parts of a product for each thread, at least, if there are enough rows.
constexpr int64_t kParts = 16;

// Rows that a ReLU is applied to: from this one on.
constexpr int64_t kAllRows = 0, kNoRow = std::numeric_limits<int64_t>::max();

// What a ReLU does not cap.
constexpr float kNoCap = std::numeric_limits<float>::infinity();

// rows x weights + bias, then `add` what the output holds, then a ReLU that is
// capped at `cap`. Weights are packed: float[panels][1 + taps * depth][kWidth],
// the bias first, zeros where there are no more columns.
struct Product {
  const float* panels;
  int64_t taps, depth, columns;
  bool add;
  int64_t relu_from;
  float cap = kNoCap;

  int64_t num_panels() const { return Divide(columns, kWidth); }

  template <typename T>
  void Finish(T sum, float* out, bool relu) const {
    if (add) sum += Load<T>(out);
    if (relu) {  // Keeps NaN.
      const T most = T{} + cap;
      sum = sum < 0 ? T{} : sum;
      sum = sum > most ? most : sum;
    }
    Store(out, sum);
  }
};

// A part of a panel's sums: `taps` taps from `tap` on, of each `depth` floats
// from `start` on.
struct Piece {
  const float* weights;
  int64_t tap, taps, start, depth;
  bool first, last;
  const float* ahead;  // What is fetched meanwhile.
};

// M rows of one panel, of which V vectors; rows[tap * M + i] points at the
// floats of a tap. M more pointers follow, what is read next: it is fetched
// meanwhile, and L lines of weights a step. `partial` are the sums between two
// pieces; `row` is the number of the first row.
template <int M, int V, int L>
void Tile(const Product& product, const Piece& piece, int64_t panel,
          int64_t row, const float* const* rows, float* partial,
          float* const* outputs) {
  const int64_t column = panel * kWidth;
  Vector sums[M][V];
  for (int v = 0; v < V; ++v) {
    const int64_t at = v * kLanes;
    if (piece.first) {
      const Vector bias = Load<Vector>(piece.weights - kWidth + at);
      for (int i = 0; i < M; ++i) sums[i][v] = bias;
    } else {
      for (int i = 0; i < M; ++i)
        sums[i][v] = Load<Vector>(partial + i * kWidth + at);
    }
  }
  if (piece.last)
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < V; ++v)
        __builtin_prefetch(outputs[i] + column + v * kLanes, 1);
  const float *weights = piece.weights, *ahead = piece.ahead;
  rows += piece.tap * M;
  for (int64_t tap = 0; tap < piece.taps; ++tap, rows += M) {
    const float* reads[M];
    for (int i = 0; i < M; ++i) reads[i] = rows[i] + piece.start;
    // A few lines the processor fetches by itself.
    const bool few = piece.depth <= 4 * kLine;
    for (int64_t k = 0; k < piece.depth;) {
      for (int i = 0; i < M && !few; ++i)
        __builtin_prefetch(rows[M + i] + piece.start + k);
      const int64_t steps =
          few ? piece.depth : std::min(kLine, piece.depth - k);
#pragma GCC unroll kUnroll
      for (int64_t j = 0; j < steps; ++j) {
        for (int line = 0; line < L; ++line)
          __builtin_prefetch(ahead + (j * L + line) * kStride, 0, 2);
        Vector w[V];
        for (int v = 0; v < V; ++v) {
          w[v] = Load<Vector>(weights + j * kWidth + v * kLanes);
          Keep(w[v]);
        }
        for (int i = 0; i < M; ++i)
          for (int v = 0; v < V; ++v) sums[i][v] += reads[i][j] * w[v];
      }
      k += steps;
      weights += steps * kWidth;
      ahead += steps * L * kStride;
      for (int i = 0; i < M; ++i) reads[i] += steps;
    }
  }
  if (!piece.last) {
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < V; ++v)
        Store(partial + i * kWidth + v * kLanes, sums[i][v]);
    return;
  }
  const int64_t width = std::min<int64_t>(product.columns - column, V * kLanes);
  for (int i = 0; i < M; ++i) {
    float* out = outputs[i] + column;
    const bool relu = row + i >= product.relu_from;
    if (width == V * kLanes) {
      for (int v = 0; v < V; ++v)
        product.Finish(sums[i][v], out + v * kLanes, relu);
    } else {
      const float* sum = reinterpret_cast<const float*>(sums[i]);
      for (int64_t j = 0; j < width; ++j)
        product.Finish(Load<float>(sum + j), out + j, relu);
    }
  }
}

template <int V, int L, int M = kTile>
void TileOf(int64_t count, const Product& product, const Piece& piece,
            int64_t panel, int64_t row, const float* const* rows,
            float* partial, float* const* outputs) {
  if (count == M)
    Tile<M, V, L>(product, piece, panel, row, rows, partial, outputs);
  else if constexpr (M > 1)
    TileOf<V, L, M - 1>(count, product, piece, panel, row, rows, partial,
                        outputs);
}

// The `count` rows of a block, from number `row` on, times one panel. Where
// there is more than one tile of them, a piece of the weights serves all before
// the next, which is fetched meanwhile. `partial` holds `count` rows of a
// panel.
void MultiplyPanel(const Product& product, int64_t panel, int64_t row,
                   int64_t count, const float* const* rows,
                   float* const* outputs, float* partial) {
  const int64_t taps = product.taps, depth = product.depth;
  const float* weights =
      product.panels + panel * (1 + taps * depth) * kWidth + kWidth;
  const bool one_tile = count <= kTile;
  const bool split = !one_tile && taps * depth > kPiece;
  const int64_t length = split ? std::min(depth, kPiece) : depth;
  const int64_t most = split ? std::max<int64_t>(kPiece / depth, 1) : taps;
  constexpr decltype(&TileOf<2, 0>) kTiles[2][3] = {
      {TileOf<2, 0>, TileOf<2, 1>, TileOf<2, kLines>},
      {TileOf<1, 0>, TileOf<1, 1>, TileOf<1, kLines>}};
  const auto& tiles = kTiles[product.columns - panel * kWidth <= kLanes];
  for (int64_t tap = 0; tap < taps; tap += most)
    for (int64_t start = 0; start < depth; start += length) {
      Piece piece{weights,
                  tap,
                  std::min(most, taps - tap),
                  start,
                  std::min(length, depth - start),
                  tap == 0 && start == 0,
                  tap + most >= taps && start + length >= depth,
                  weights + kAhead * kWidth};
      const int64_t steps = piece.taps * piece.depth;
      for (int64_t i = 0; i < count; i += kTile) {
        // The first tiles fetch a line each of the steps that follow the piece.
        int lines = one_tile ? 2 : 0;
        if (!one_tile && i < kLines * kTile) {
          piece.ahead = weights + steps * (kWidth + i / kTile * kLine);
          lines = 1;
        }
        tiles[lines](std::min<int64_t>(kTile, count - i), product, piece, panel,
                     row + i, rows + i * taps, partial + i * kWidth,
                     outputs + i);
      }
      weights += steps * kWidth;
    }
}

// A product of `count` rows. reads(i, rows, step) writes the pointers of row i,
// `step` apart; writes(i) returns where its output goes.
template <typename Reads, typename Writes>
void Multiply(Team& team, const Product& product, int64_t count,
              const Reads& reads, const Writes& writes) {
  if (count == 0) return;
  const int64_t taps = product.taps;
  // A unit is a block of rows and a panel.
  const int64_t panels = product.num_panels();
  // Rows are read for one panel after the other: they stay in the cache.
  int64_t block = std::max<int64_t>(CacheBytes() / (16 * product.depth), 1);
  block = std::min(block, Divide(count * panels, kParts * team.size()));
  block = std::max<int64_t>(Divide(block, kTile), 4) * kTile;
  team.Run(Divide(count, block) * panels, [&](int64_t begin, int64_t end) {
    auto& scratch = Scratch::Of(block * kWidth, block * taps + kTile, block);
    const float** const rows = scratch.rows.data();
    float** const outputs = scratch.outputs.data();
    float* const partial = scratch.floats.data();
    int64_t size = 0;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t start = unit / panels * block;
      if (unit == begin || unit % panels == 0) {
        size = std::min(block, count - start);
        for (int64_t i = 0; i < size; ++i) {
          const int64_t first = i - i % kTile;  // Of the tile.
          reads(start + i, &rows[first * taps + i - first],
                std::min<int64_t>(kTile, size - first));
          outputs[i] = writes(start + i);
        }
      }
      MultiplyPanel(product, unit % panels, start, size, rows, outputs,
                    partial);
    }
  });
}

}  // namespace
