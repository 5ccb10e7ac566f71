// Matrix products that read the rows of the left operand in place, through
// pointers (Dukhan, "The Indirect Convolution Algorithm", 2019).

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

// A tile has kTile rows and one panel of kWidth columns, which is two vectors.
// Its sums take all registers except those for the panel's row and a broadcast
// value. A loop iteration has kUnroll steps.
#if defined(__AVX512F__)
constexpr int kTile = 10, kUnroll = 1;
#else
constexpr int kTile = 6, kUnroll = 4;
#endif
constexpr int kWidth = 2 * kLanes;

// Keeps a vector in its register. Otherwise, the compiler would reload it in
// the instruction of each product.
inline void Keep(Vector& v) {
#if defined(__AVX__) && !defined(__AVX512F__)
  asm("" : "+x"(v));
#endif
}

// Uninitialized scratch memory of a thread. It is reused, because allocations
// would make threads wait for each other.
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

constexpr int64_t kLine = 16;  // Floats per cache line.
// Number of cache lines of a step's weights, and their distance in floats.
constexpr int kLines = kWidth > kLine ? kWidth / kLine : 1;
constexpr int64_t kStride = kWidth / kLines;

// Number of steps in a piece. The weights of a piece take half of a first-level
// cache or all of it, and are used for all rows of a block before those of the
// next piece. With a single tile of rows, weights are prefetched kAhead steps
// ahead.
constexpr int64_t kPiece = 256, kAhead = 64;

// Returns the size of the second-level cache, in bytes.
inline int64_t CacheBytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 512 << 10;
}

// Minimum number of parts of a product per thread, if there are enough rows.
constexpr int64_t kParts = 16;

// First row to which a ReLU is applied.
constexpr int64_t kAllRows = 0, kNoRow = std::numeric_limits<int64_t>::max();

// The cap of a ReLU without an upper bound.
constexpr float kNoCap = std::numeric_limits<float>::infinity();

// rows x weights + bias, plus the output's old value if `add`, followed by a
// ReLU capped at `cap` from row `relu_from` on. Weights are packed as
// float[panels][1 + taps * depth][kWidth], with the bias first and zeros for
// missing columns.
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

// A part of a panel's sums: `taps` taps starting at `tap`, and `depth` floats
// of each tap starting at `start`.
struct Piece {
  const float* weights;
  int64_t tap, taps, start, depth;
  bool first, last;
  const float* ahead;  // Weights to prefetch.
};

// Computes M rows and V vectors of a panel. rows[tap * M + i] points to the
// floats of a tap; M more pointers follow, to rows to prefetch. Prefetches L
// lines of weights per step. `partial` contains the sums between two pieces;
// `row` is the number of the first row.
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
    // The processor prefetches a few lines by itself.
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

// Multiplies the `count` rows of a block, starting at number `row`, by one
// panel. With more than one tile of rows, a piece of the weights is used for
// all rows while the next piece is prefetched. `partial` has `count` rows of a
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
        // Each of the first tiles prefetches one line of the next piece's
        // steps.
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

// Computes a product of `count` rows. reads(i, rows, step) writes the pointers
// of row i, `step` apart; writes(i) returns a pointer to its output.
template <typename Reads, typename Writes>
void Multiply(Team& team, const Product& product, int64_t count,
              const Reads& reads, const Writes& writes) {
  if (count == 0) return;
  const int64_t taps = product.taps;
  // A unit is a block of rows and a panel.
  const int64_t panels = product.num_panels();
  // All panels read the same rows in turn, so a block's rows must fit into the
  // cache.
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
          const int64_t first = i - i % kTile;  // First row of the tile.
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
