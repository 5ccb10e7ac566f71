// Sums over a batch for batch normalization, in float32, for CPUs. Maps are
// [rows][channels].

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "team.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using FloatsOut = ffi::ResultBuffer<ffi::F32>;

// Sums of parts are added in order, so results do not depend on the number of
// threads. A part sums kRows rows at a time in float32, and these sums in
// float64.
constexpr int64_t kSumParts = 16, kRows = 64;

// The numbers of activations in norm.py.
enum Activation { kNone, kRelu, kRelu6 };

// Returns the gradient of z, given the gradient g of the activation's output.
template <typename T>
T Masked(T z, T g, int64_t activation) {
  if (activation == kNone) return g;
  g = z > 0 ? g : T{};
  return activation == kRelu6 ? (z < 6 ? g : T{}) : g;
}

// Calls run(zero, c) for all channels, where zero is a Vector or a float.
template <typename Function>
void ForChannels(int64_t channels, const Function& run) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) run(Vector{}, c);
  for (; c < channels; ++c) run(0.0f, c);
}

// Sums the two values that terms(zero, row, c) returns over all rows.
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

template <typename T>
struct Pair {
  T first, second;
};

// Computes the mean and variance of each channel.
ffi::Error Moments(ffi::ThreadPool pool, Floats x_, FloatsOut mean,
                   FloatsOut var) {
  const int64_t channels = mean->element_count();
  const int64_t rows = x_.element_count() / channels;
  const float* x = x_.typed_data();
  Team team(pool);
  // Sum differences from the first row, to avoid cancellation of squares.
  const auto sums =
      Sums(team, rows, channels, [=](auto zero, int64_t row, int64_t c) {
        using T = decltype(zero);
        const T d = Load<T>(x + row * channels + c) - Load<T>(x + c);
        return Pair<T>{d, d * d};
      });
  for (int64_t c = 0; c < channels; ++c) {
    const double d = sums[c] / rows;
    mean->typed_data()[c] = x[c] + d;
    var->typed_data()[c] = std::max(0.0, sums[channels + c] / rows - d * d);
  }
  return ffi::Error::Success();
}

// Computes sums of the gradient of the activation's input,
// (x - mean) * slope + bias, and of its products with x - mean.
ffi::Error BatchNormSums(ffi::ThreadPool pool, Floats x_, Floats g_,
                         Floats mean_, Floats slope_, Floats bias_,
                         FloatsOut total, FloatsOut product,
                         int64_t activation) {
  const int64_t channels = mean_.element_count();
  const int64_t rows = x_.element_count() / channels;
  const float *x = x_.typed_data(), *g = g_.typed_data();
  const float *mean = mean_.typed_data(), *slope = slope_.typed_data();
  const float* bias = bias_.typed_data();
  Team team(pool);
  const auto sums =
      Sums(team, rows, channels, [=](auto zero, int64_t row, int64_t c) {
        using T = decltype(zero);
        const T d = Load<T>(x + row * channels + c) - Load<T>(mean + c);
        const T z = d * Load<T>(slope + c) + Load<T>(bias + c);
        const T dz = Masked(z, Load<T>(g + row * channels + c), activation);
        return Pair<T>{dz, dz * d};
      });
  std::copy_n(sums.begin(), channels, total->typed_data());
  std::copy_n(sums.begin() + channels, channels, product->typed_data());
  return ffi::Error::Success();
}

}  // namespace
