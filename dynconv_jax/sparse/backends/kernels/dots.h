// Matrix products with a few columns, computed as dot products along rows.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "product.h"

namespace {

// Returns the pairwise sum of N floats.
template <int N>
float Sum(const float* v) {
  if constexpr (N == 1) {
    return *v;
  } else {
    float half[N / 2];
    for (int i = 0; i < N / 2; ++i) half[i] = v[i] + v[i + N / 2];
    return Sum<N / 2>(half);
  }
}

constexpr int kDotRows = kLanes == 16 ? 4 : 2, kDotColumns = 5;

// Computes out[j * plane + i] = rows[i] . weights[j] for M rows and N columns
// of `depth` floats each. Prefetches the next M rows.
template <int M, int N>
void Dots(const float* rows, const float* weights, int64_t depth, float* out,
          int64_t plane) {
  Vector sums[M][N] = {};
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    Vector row[M];
    for (int i = 0; i < M; ++i) row[i] = Load<Vector>(rows + i * depth + k);
    for (int i = 0; i < M; ++i) __builtin_prefetch(rows + (i + M) * depth + k);
    for (int j = 0; j < N; ++j) {
      const Vector w = Load<Vector>(weights + j * depth + k);
      for (int i = 0; i < M; ++i) sums[i][j] += row[i] * w;
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) {
      float sum = Sum<kLanes>(reinterpret_cast<const float*>(&sums[i][j]));
      for (int64_t rest = k; rest < depth; ++rest)
        sum += rows[i * depth + rest] * weights[j * depth + rest];
      out[j * plane + i] = sum;
    }
}

// Like Dots, for any number of columns.
template <int M>
void DotsOf(const float* rows, const float* weights, int64_t depth,
            int64_t columns, float* out, int64_t plane) {
  int64_t j = 0;
  for (; j + kDotColumns <= columns; j += kDotColumns)
    Dots<M, kDotColumns>(rows, weights + j * depth, depth, out + j * plane,
                         plane);
  for (; j < columns; ++j)
    Dots<M, 1>(rows, weights + j * depth, depth, out + j * plane, plane);
}

// Computes float[columns][count], the products of `count` rows of `depth`
// floats with weights [columns][depth].
void MultiplyFew(Team& team, const float* rows, int64_t count,
                 const float* weights, int64_t depth, int64_t columns,
                 float* out) {
  const int64_t block = std::max<int64_t>(
      Divide(count, kParts * team.size() * kDotRows) * kDotRows, 8 * kDotRows);
  team.Run(Divide(count, block), [=](int64_t begin, int64_t end) {
    const int64_t stop = std::min(end * block, count);
    int64_t i = begin * block;
    for (; i + kDotRows <= stop; i += kDotRows)
      DotsOf<kDotRows>(rows + i * depth, weights, depth, columns, out + i,
                       count);
    for (; i < stop; ++i)
      DotsOf<1>(rows + i * depth, weights, depth, columns, out + i, count);
  });
}

}  // namespace
