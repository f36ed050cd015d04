// Scalar intrinsics and instructions.
#pragma once

#include <math.h>

#include "emulator/numbers.h"

#define EMULATED_EXTREMA(T)                                 \
  inline T max(T a, T b) { return a > b ? a : b; }          \
  inline T min(T a, T b) { return a < b ? a : b; }
EMULATED_EXTREMA(int)
EMULATED_EXTREMA(unsigned)
EMULATED_EXTREMA(long)
EMULATED_EXTREMA(unsigned long)
EMULATED_EXTREMA(long long)
EMULATED_EXTREMA(unsigned long long)
#undef EMULATED_EXTREMA
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(double a, double b) { return fmin(a, b); }

inline int __float2int_rn(float value) {
  if (isnan(value)) return 0;
  if (value >= 0x1p31f) return 0x7FFFFFFF;
  if (value < -0x1p31f) return -0x7FFFFFFF - 1;
  return static_cast<int>(nearbyintf(value));
}
inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
inline float __expf(float value) { return expf(value); }
inline float __fdividef(float a, float b) { return a / b; }
template <typename T>
inline T __ldg(const T* pointer) {
  return *pointer;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }

namespace emulated {

// Default mode of prmt: bit 3 of a selector replicates the sign of the byte it selects.
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    uint32_t choice = selector >> 4 * i & 0xF;
    uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (choice & 7) & 0xFF);
    if (choice & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= byte << 8 * i;
  }
  return result;
}

template <typename Format>
inline uint32_t pack(float high, float low) {
  return uint32_t{Format::encode(high)} << 16 | Format::encode(low);
}

}  // namespace emulated

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  return emulated::prmt(a, b, selector & 0x7777);
}
