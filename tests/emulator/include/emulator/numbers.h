// Half precision types: storage in 16 bits, arithmetic in float with one rounding.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace emulated {

template <typename To, typename From>
inline To bit_cast(const From& value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// Rounds to nearest even, keeps infinities and NaN.
inline uint16_t float_to_bfloat16(float value) {
  uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float bfloat16_to_float(uint16_t bits) { return bit_cast<float>(uint32_t{bits} << 16); }

inline uint16_t float_to_half(float value) {
  uint32_t bits = bit_cast<uint32_t>(value);
  uint32_t sign = bits >> 16 & 0x8000;
  uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return 0x7FFF;
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);
  if (magnitude < 0x38800000) {
    // Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
    uint32_t sum = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f);
    return static_cast<uint16_t>(sign | (sum - 0x3F000000));
  }
  uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1) - 0x38000000;
  return static_cast<uint16_t>(sign | rounded >> 13);
}

inline float half_to_float(uint16_t bits) {
  uint32_t sign = uint32_t{bits} << 16 & 0x80000000;
  uint32_t magnitude = bits & 0x7FFF;
  float value;
  if (magnitude >= 0x7C00) {
    value = bit_cast<float>(magnitude << 13 | 0x7F800000);
  } else if (magnitude < 0x0400) {
    value = static_cast<float>(magnitude) * 0x1p-24f;
  } else {
    value = bit_cast<float>((magnitude << 13) + 0x38000000);
  }
  return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
}

// The value of a float8_e4m3fn.
inline float e4m3_to_float(unsigned code) {
  unsigned exponent = code >> 3 & 15, fraction = code & 7;
  float size = exponent ? (8 + fraction) * exp2f(exponent - 10.0f) : fraction * 0x1p-9f;
  if ((code & 0x7F) == 0x7F) size = NAN;
  return code & 0x80 ? -size : size;
}

struct HalfFormat {
  static uint16_t encode(float value) { return float_to_half(value); }
  static float decode(uint16_t bits) { return half_to_float(bits); }
};

struct Bfloat16Format {
  static uint16_t encode(float value) { return float_to_bfloat16(value); }
  static float decode(uint16_t bits) { return bfloat16_to_float(bits); }
};

template <typename Format>
struct Number16 {
  uint16_t bits;

  Number16() = default;
  template <typename T, typename = std::enable_if_t<std::is_arithmetic<T>::value>>
  Number16(T value) : bits(Format::encode(static_cast<float>(value))) {}
  operator float() const { return Format::decode(bits); }

  friend Number16 operator+(Number16 a, Number16 b) { return float(a) + float(b); }
  friend Number16 operator-(Number16 a, Number16 b) { return float(a) - float(b); }
  friend Number16 operator*(Number16 a, Number16 b) { return float(a) * float(b); }
  friend Number16 operator/(Number16 a, Number16 b) { return float(a) / float(b); }
  friend bool operator<(Number16 a, Number16 b) { return float(a) < float(b); }
  friend bool operator>(Number16 a, Number16 b) { return float(a) > float(b); }
  friend bool operator<=(Number16 a, Number16 b) { return float(a) <= float(b); }
  friend bool operator>=(Number16 a, Number16 b) { return float(a) >= float(b); }
  friend bool operator==(Number16 a, Number16 b) { return float(a) == float(b); }
  friend bool operator!=(Number16 a, Number16 b) { return float(a) != float(b); }
};

template <typename T>
struct alignas(4) Pair16 {
  T x, y;
  Pair16() = default;
  Pair16(T x, T y) : x(x), y(y) {}
};

}  // namespace emulated

using __half = emulated::Number16<emulated::HalfFormat>;
using half = __half;
using __half2 = emulated::Pair16<__half>;
using half2 = __half2;
using __nv_bfloat16 = emulated::Number16<emulated::Bfloat16Format>;
using nv_bfloat16 = __nv_bfloat16;
using __nv_bfloat162 = emulated::Pair16<__nv_bfloat16>;
using nv_bfloat162 = __nv_bfloat162;

inline float __half2float(half value) { return value; }
inline half __float2half(float value) { return value; }
inline half __float2half_rn(float value) { return value; }
inline float __bfloat162float(nv_bfloat16 value) { return value; }
inline nv_bfloat16 __float2bfloat16(float value) { return value; }
inline nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
template <typename Format>
inline bool __hgt(emulated::Number16<Format> a, emulated::Number16<Format> b) {
  return a > b;
}
template <typename Format>
inline bool __hlt(emulated::Number16<Format> a, emulated::Number16<Format> b) {
  return a < b;
}

inline unsigned short __half_as_ushort(half value) { return value.bits; }
inline unsigned short __bfloat16_as_ushort(nv_bfloat16 value) { return value.bits; }
inline half __ushort_as_half(unsigned short bits) {
  half value;
  value.bits = bits;
  return value;
}
inline nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  nv_bfloat16 value;
  value.bits = bits;
  return value;
}
