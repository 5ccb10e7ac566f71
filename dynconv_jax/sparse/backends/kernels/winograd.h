// 3x3 convolutions with Winograd tiles F(2x2, 3x3) of 2x2 outputs each (Lavin
// and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016).

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "positions.h"
#include "product.h"

namespace {

// Maximum number of tiles whose inputs are transformed at a time.
constexpr int64_t kWinogradTiles = 64;

// The cost of kTile Winograd tiles (16 products and the transforms), and the
// additional fixed cost of such a convolution (7 more taps of weights to read
// from memory), in units of the cost of kTile rows per tap.
constexpr int64_t kWinogradCost = 20, kWinogradStart = 32;

// 2x2 outputs of a map, with the row of each output; -1 if inactive.
struct WinogradTile {
  int64_t image, top, left, rows[4];
};

// Returns the tiles that have an active position.
std::vector<WinogradTile> FindWinogradTiles(const Positions& positions) {
  const Map map = positions.map;
  std::vector<WinogradTile> tiles;
  tiles.reserve((positions.end - positions.start) * Divide(map.height, 2) *
                  Divide(map.width, 2));
  int64_t next = 0;  // Active positions are numbered line by line.
  for (int64_t image = positions.start; image < positions.end; ++image)
    for (int64_t top = 0; top < map.height; top += 2) {
      const float* line =
          positions.mask + (image * map.height + top) * map.width;
      int64_t row = next;
      for (int64_t x = 0; x < map.width; ++x) next += line[x] != 0;
      for (int64_t left = 0; left < map.width; left += 2) {
        WinogradTile tile{image, top, left, {-1, -1, -1, -1}};
        bool any = false;
        for (int64_t x = left; x < std::min(left + 2, map.width); ++x) {
          if (line[x] != 0) tile.rows[x - left] = row++, any = true;
          if (top + 1 < map.height && line[map.width + x] != 0)
            tile.rows[2 + x - left] = next++, any = true;
        }
        if (any) tiles.push_back(tile);
      }
    }
  return tiles;
}

// Computes B' d B, where d[i] is at rows[i] + channel; element i of the result
// is written to out + i * step.
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

// Computes A' m A at the tile's active outputs.
template <typename T>
void TransformOutput(const float* m, const Product& product, bool relu,
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
                      outputs[i] + column, relu);
  }
}

// Computes a 3x3 convolution with stride 1, with 16 row products per tile
// instead of 9 per output. Weights are G g G' (see cpu.py),
// float[panels][16][1 + depth][kWidth].
template <typename Row, typename Writes>
void MultiplyWinograd(Team& team, const Product& product,
                      const std::vector<WinogradTile>& tiles, Map map,
                      const float* zeros, const Row& row,
                      const Writes& writes) {
  const int64_t count = tiles.size(), depth = product.depth;
  const int64_t panels = product.num_panels(), parts = 4 * team.size();
  // Blocks are small enough that their inputs stay in the cache.
  int64_t block =
      std::min(kWinogradTiles, CacheBytes() * 13 / 16 / (64 * depth));
  block = std::min(block, Divide(count * panels, parts));
  block = Divide(block, kTile) * kTile;
  const int64_t blocks = Divide(count, block);
  // Inputs may be transformed again for each group of panels.
  const int64_t group =
      std::min(panels, std::max<int64_t>(Divide(panels * blocks, parts), 2));
  const int64_t groups = Divide(panels, group);
  const bool relu = product.relu_from == kAllRows;
  team.Run(blocks * groups, [&](int64_t begin, int64_t end) {
    Scratch& scratch = Scratch::Of(block * (16 * depth + 17 * kWidth),
                                   block + kTile, 5 * block);
    const float** const reads = scratch.rows.data();
    float** const outputs = scratch.outputs.data();
    float** const sums = outputs + 4 * block;
    float* const inputs = scratch.floats.data();
    float* const products = inputs + 16 * block * depth;
    float* const partial = products + 16 * block * kWidth;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t start = unit / groups * block;
      const int64_t size = std::min(block, count - start);
      const bool known = unit > begin && unit % groups > 0;
      for (int64_t i = 0; i < (known ? 0 : size); ++i) {
        const WinogradTile& tile = tiles[start + i];
        const float* rows[16];
        for (int64_t j = 0; j < 16; ++j) {
          const int64_t y = tile.top - 1 + j / 4, x = tile.left - 1 + j % 4;
          const bool inside =
              0 <= y && y < map.height && 0 <= x && x < map.width;
          rows[j] = inside
                        ? row((tile.image * map.height + y) * map.width + x)
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
              tile.rows[j] < 0 ? nullptr : writes(tile.rows[j]);
      }
      const int64_t first = unit % groups * group;
      for (int64_t panel = first; panel < std::min(first + group, panels);
           ++panel) {
        const int64_t width =
            std::min<int64_t>(product.columns - panel * kWidth, kWidth);
        for (int64_t j = 0; j < 16; ++j) {
          for (int64_t i = 0; i < size; ++i) {
            reads[i] = inputs + (j * size + i) * depth;
            sums[i] = products + (i * 16 + j) * kWidth;
          }
          MultiplyPanel(
              {product.panels + (panel * 16 + j) * (1 + depth) * kWidth, 1,
               depth, width <= kLanes ? kLanes : kWidth, false, kNoRow},
              0, 0, size, reads, sums, partial);
        }
        for (int64_t i = 0; i < size; ++i) {
          const float* m = products + i * 16 * kWidth;
          int64_t j = 0;
          for (; j + kLanes <= width; j += kLanes)
            TransformOutput<Vector>(m + j, product, relu, &outputs[4 * i],
                                    panel * kWidth + j);
          for (; j < width; ++j)
            TransformOutput<float>(m + j, product, relu, &outputs[4 * i],
                                   panel * kWidth + j);
        }
      }
    }
  });
}

}  // namespace
