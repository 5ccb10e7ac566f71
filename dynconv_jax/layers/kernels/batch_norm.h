// Batch normalization in training and the activation after it, in float32, for
// CPUs: two passes over a map forward, two backward. Maps are rows of channels.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "team.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using FloatsOut = ffi::ResultBuffer<ffi::F32>;

// Parts whose sums are added in order: results do not depend on the number of
// threads. A part sums kRows rows in float32, and these sums in float64.
constexpr int64_t kSumParts = 16, kRows = 64;

// Their numbers in norm.py.
enum Activation { kNone, kRelu, kRelu6 };

template <typename T>
T Clip(T z, int64_t activation) {
  if (activation == kNone) return z;
  z = z > 0 ? z : T{};
  return activation == kRelu6 ? (z < 6 ? z : T{} + 6) : z;
}

// The gradient of z, of which g is the activation's.
template <typename T>
T Clipped(T z, T g, int64_t activation) {
  if (activation == kNone) return g;
  g = z > 0 ? g : T{};
  return activation == kRelu6 ? (z < 6 ? g : T{}) : g;
}

// Calls run(zero, c) for all channels, the zero a Vector or a float.
template <typename Function>
void ForChannels(int64_t channels, const Function& run) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) run(Vector{}, c);
  for (; c < channels; ++c) run(0.0f, c);
}

// Sums over all rows of the two values that terms(zero, row, c) returns.
template <typename Terms>
std::vector<double> Sums(Team& team, int64_t rows, int64_t channels,
                         const Terms& terms) {
  std::vector<double> totals(kSumParts * 2 * channels);
  team.Run(kSumParts, [&](int64_t begin, int64_t end) {
    std::vector<float> kept(2 * channels);
    for (int64_t part = begin; part < end; ++part) {
      double* total = totals.data() + part * 2 * channels;
      const int64_t last = rows * (part + 1) / kSumParts;
      for (int64_t r = rows * part / kSumParts; r < last; r += kRows) {
        const int64_t stop = std::min(last, r + kRows);
        ForChannels(channels, [&](auto zero, int64_t c) {
          auto first = zero, second = zero;
          for (int64_t row = r; row < stop; ++row) {
            const auto [a, b] = terms(zero, row, c);
            first += a;
            second += b;
          }
          Store(kept.data() + c, first);
          Store(kept.data() + channels + c, second);
        });
        for (int64_t i = 0; i < 2 * channels; ++i) total[i] += kept[i];
      }
    }
  });
  for (int64_t part = 1; part < kSumParts; ++part)
    for (int64_t i = 0; i < 2 * channels; ++i)
      totals[i] += totals[part * 2 * channels + i];
  return totals;
}

// Runs run(begin, end) on ranges of rows.
template <typename Function>
void ForRows(Team& team, int64_t rows, int64_t channels, const Function& run) {
  const int64_t parts =
      std::min<int64_t>(rows, Divide(rows * channels, 1 << 14));
  team.Run(parts, [&](int64_t begin, int64_t end) {
    run(rows * begin / parts, rows * end / parts);
  });
}

template <typename T>
struct Pair {
  T first, second;
};

ffi::Error BatchNorm(ffi::ThreadPool pool, Floats x_, Floats scale_,
                     Floats bias_, FloatsOut y_, FloatsOut mean_,
                     FloatsOut var_, float epsilon, int64_t activation) {
  const int64_t channels = scale_.element_count();
  const int64_t rows = x_.element_count() / channels;
  const float* x = x_.typed_data();
  float *y = y_->typed_data(), *mean = mean_->typed_data();
  float* var = var_->typed_data();
  Team team(pool);
  // Of differences from the first row, so that squares do not cancel.
  const auto sums =
      Sums(team, rows, channels, [=](auto zero, int64_t row, int64_t c) {
        using T = decltype(zero);
        const T d = Load<T>(x + row * channels + c) - Load<T>(x + c);
        return Pair<T>{d, d * d};
      });
  std::vector<float> slope(channels), shift(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double d = sums[c] / rows;
    mean[c] = x[c] + d;
    var[c] = std::max(0.0, sums[channels + c] / rows - d * d);
    slope[c] = scale_.typed_data()[c] / std::sqrt(var[c] + epsilon);
    shift[c] = bias_.typed_data()[c];
  }
  ForRows(team, rows, channels, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      ForChannels(channels, [&](auto zero, int64_t c) {
        using T = decltype(zero);
        const T z = (Load<T>(x + row * channels + c) - Load<T>(mean + c)) *
                        Load<T>(&slope[c]) +
                    Load<T>(&shift[c]);
        Store(y + row * channels + c, Clip(z, activation));
      });
  });
  return ffi::Error::Success();
}

ffi::Error BatchNormGradient(ffi::ThreadPool pool, Floats x_, Floats scale_,
                             Floats bias_, Floats mean_, Floats var_, Floats g_,
                             FloatsOut dx_, FloatsOut dscale_, FloatsOut dbias_,
                             float epsilon, int64_t activation) {
  const int64_t channels = scale_.element_count();
  const int64_t rows = x_.element_count() / channels;
  const float *x = x_.typed_data(), *g = g_.typed_data();
  const float *mean = mean_.typed_data(), *bias = bias_.typed_data();
  float* dx = dx_->typed_data();
  std::vector<float> inverse(channels), slope(channels);
  for (int64_t c = 0; c < channels; ++c) {
    inverse[c] = 1 / std::sqrt(var_.typed_data()[c] + epsilon);
    slope[c] = scale_.typed_data()[c] * inverse[c];
  }
  // The centered x and the gradient of what is activated.
  const auto terms = [&](auto zero, int64_t row, int64_t c) {
    using T = decltype(zero);
    const T d = Load<T>(x + row * channels + c) - Load<T>(mean + c);
    const T z = d * Load<T>(&slope[c]) + Load<T>(bias + c);
    return Pair<T>{d, Clipped(z, Load<T>(g + row * channels + c), activation)};
  };
  Team team(pool);
  const auto sums =
      Sums(team, rows, channels, [&](auto zero, int64_t row, int64_t c) {
        const auto [d, dz] = terms(zero, row, c);
        return Pair<decltype(zero)>{dz, dz * d};
      });
  std::vector<float> offset(channels), factor(channels);
  for (int64_t c = 0; c < channels; ++c) {
    dbias_->typed_data()[c] = sums[c];
    dscale_->typed_data()[c] = sums[channels + c] * inverse[c];
    offset[c] = sums[c] / rows;
    factor[c] = sums[channels + c] / rows * inverse[c] * inverse[c];
  }
  ForRows(team, rows, channels, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      ForChannels(channels, [&](auto zero, int64_t c) {
        using T = decltype(zero);
        const auto [d, dz] = terms(zero, row, c);
        Store(dx + row * channels + c,
              (dz - Load<T>(&offset[c]) - d * Load<T>(&factor[c])) *
                  Load<T>(&slope[c]));
      });
  });
  return ffi::Error::Success();
}

}  // namespace
