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
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value ? __builtin_clz(static_cast<unsigned>(value)) : 32; }
inline float __uint_as_float(unsigned bits) { return emulated::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return emulated::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return emulated::bit_cast<unsigned>(value); }
inline int __float_as_int(float value) { return emulated::bit_cast<int>(value); }

namespace emulated {

// Clamped to [0, 1]; not a number becomes 0.
inline float saturate(float value) { return value > 0.0f ? fminf(value, 1.0f) : 0.0f; }

// The 32 bits of a register operand, whatever its C++ type.
template <typename T>
inline uint32_t word(T value) {
  if constexpr (sizeof(T) == 4) {
    return bit_cast<uint32_t>(value);
  } else {
    return static_cast<uint32_t>(value);
  }
}

// Writes a result into a register of the same size by its bits, into another by its value.
template <typename Target, typename T>
inline void set(Target& target, T value) {
  if constexpr (sizeof(Target) == sizeof(T)) {
    target = bit_cast<Target>(value);
  } else {
    target = static_cast<Target>(value);
  }
}

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

// Bit (a, b, c) of the table, a being the highest, for each bit.
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, unsigned table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i) {
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return result;
}

// PTX clamps amounts; C++ leaves those of 32 and more undefined.
inline uint32_t shift_left(uint32_t value, uint32_t by) { return by > 31 ? 0 : value << by; }
inline uint32_t shift_right(uint32_t value, uint32_t by) { return by > 31 ? 0 : value >> by; }
inline int32_t shift_right(int32_t value, uint32_t by) { return value >> (by > 31 ? 31 : by); }

template <typename T, typename A, typename B>
inline T multiply_high(A a, B b) {
  using Wide = std::conditional_t<std::is_signed<T>::value, int64_t, uint64_t>;
  return static_cast<T>(Wide{static_cast<T>(a)} * Wide{static_cast<T>(b)} >> 32);
}

template <typename A, typename B>
inline uint32_t dp4a(uint32_t a, uint32_t b, uint32_t sum) {
  using ByteA = std::conditional_t<std::is_signed<A>::value, int8_t, uint8_t>;
  using ByteB = std::conditional_t<std::is_signed<B>::value, int8_t, uint8_t>;
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<uint32_t>(int{ByteA(a >> 8 * i)} * int{ByteB(b >> 8 * i)});
  }
  return sum;
}

inline float max_or_nan(float a, float b) { return a > b || isnan(a) ? a : b; }
inline float min_or_nan(float a, float b) { return a < b || isnan(a) ? a : b; }

// The sum of two floats is a double, unless one is tiny beside the other.
inline float add_towards_zero(float a, float b) {
  double sum = static_cast<double>(a) + b;
  float nearest = static_cast<float>(sum);
  return fabs(static_cast<double>(nearest)) > fabs(sum) ? nextafterf(nearest, 0.0f) : nearest;
}

// The nearest float8_e4m3fn, to even, saturated: found among all of them.
inline uint16_t to_e4m3(float value) {
  if (isnan(value)) return 0x7F;
  double size = fabs(static_cast<double>(value)), best = INFINITY;
  uint16_t found = 0;
  for (uint16_t code = 0; code < 0x7F; ++code) {
    double apart = fabs(e4m3_to_float(code) - size);
    if (apart < best || (apart == best && code % 2 == 0)) {
      best = apart;
      found = code;
    }
  }
  return found | (signbit(value) ? 0x80 : 0);
}
inline uint16_t pack_e4m3(float high, float low) { return to_e4m3(high) << 8 | to_e4m3(low); }

inline uint32_t unpack_e4m3(uint16_t codes) {
  return uint32_t{HalfFormat::encode(e4m3_to_float(codes >> 8))} << 16 |
         HalfFormat::encode(e4m3_to_float(codes & 0xFF));
}

template <typename Format>
inline uint32_t pack(float high, float low) {
  return uint32_t{Format::encode(high)} << 16 | Format::encode(low);
}

// float holds sums of two halves without rounding that matters to a half.
inline uint32_t add_halves(uint32_t a, uint32_t b) {
  auto sum = [=](int shift) {
    return HalfFormat::decode(uint16_t(a >> shift)) + HalfFormat::decode(uint16_t(b >> shift));
  };
  return pack<HalfFormat>(sum(16), sum(0));
}

}  // namespace emulated

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  return emulated::prmt(a, b, selector & 0x7777);
}
template <typename A, typename B>
inline int __dp4a(A a, B b, int sum) {
  return static_cast<int>(emulated::dp4a<A, B>(emulated::word(a), emulated::word(b), sum));
}
