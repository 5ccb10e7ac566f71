// Vectors of floats, in the processor's native width.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes)));

// Loads a Vector or a float from any address.
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

// Returns a / b rounded up.
int64_t Divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
