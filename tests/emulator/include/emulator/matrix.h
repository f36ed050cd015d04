// Matrix instructions; fragment layouts as the PTX ISA's section on warp-level matrices gives them.
#pragma once

#include "emulator/arithmetic.h"
#include "emulator/memory.h"
#include "emulator/numbers.h"
#include "emulator/threads.h"

namespace emulated {

constexpr unsigned kFullWarp = ~0u;

inline unsigned byte_of(uint32_t word, int index) { return word >> 8 * index & 0xFF; }
inline uint16_t half_of(uint32_t word, int index) {
  return static_cast<uint16_t>(word >> 16 * index);
}

template <typename Accumulator>
struct MmaOperands {
  uint32_t a[4], b[2];
  Accumulator c[4];
};

// D = A B + C of a warp. Elements of A and B are numbered along K, `kPerWord` to a register;
// register r of A holds rows g + 8 (r % 2) and the columns of half r / 2, registers of B likewise.
template <int kPerWord, typename Accumulator, typename Sum, typename DecodeA, typename DecodeB>
inline void multiply(void* const operands[kWarp], DecodeA decode_a, DecodeB decode_b) {
  constexpr int kK = 8 * kPerWord;
  Sum a[16][kK], b[8][kK];
  for (int lane = 0; lane < kWarp; ++lane) {
    auto& own = operands_of<MmaOperands<Accumulator>>(operands, lane);
    int group = lane / 4, first = lane % 4 * kPerWord;
    for (int e = 0; e < kPerWord; ++e) {
      for (int r = 0; r < 4; ++r) {
        a[group + r % 2 * 8][first + e + r / 2 * (kK / 2)] = decode_a(own.a[r], e);
      }
      for (int r = 0; r < 2; ++r) {
        b[group][first + e + r * (kK / 2)] = decode_b(own.b[r], e);
      }
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    auto& own = operands_of<MmaOperands<Accumulator>>(operands, lane);
    for (int i = 0; i < 4; ++i) {
      int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      Sum sum = static_cast<Sum>(own.c[i]);
      for (int k = 0; k < kK; ++k) sum += a[row][k] * b[column][k];
      own.c[i] = static_cast<Accumulator>(sum);
    }
  }
}

template <typename Format, typename D>
inline void mma_m16n8k16(const char* name, D& d0, D& d1, D& d2, D& d3, uint32_t a0, uint32_t a1,
                         uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, uint32_t c0,
                         uint32_t c1, uint32_t c2, uint32_t c3) {
  MmaOperands<float> own{{a0, a1, a2, a3},
                         {b0, b1},
                         {bit_cast<float>(c0), bit_cast<float>(c1), bit_cast<float>(c2),
                          bit_cast<float>(c3)}};
  collective(name, __LINE__, kFullWarp, own, [](void* const operands[kWarp], unsigned) {
    auto decode = [](uint32_t word, int e) -> double { return Format::decode(half_of(word, e)); };
    multiply<2, float, double>(operands, decode, decode);
  });
  set(d0, own.c[0]), set(d1, own.c[1]), set(d2, own.c[2]), set(d3, own.c[3]);
}

// The first half of the columns of A, and of the rows of B.
template <typename Format, typename D>
inline void mma_m16n8k8(const char* name, D& d0, D& d1, D& d2, D& d3, uint32_t a0, uint32_t a1,
                        uint32_t b0, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  mma_m16n8k16<Format>(name, d0, d1, d2, d3, a0, a1, 0, 0, b0, 0, c0, c1, c2, c3);
}

// A and B are int8_t or uint8_t. Sums wrap.
template <typename A, typename B, typename D>
inline void mma_m16n8k32(const char* name, D& d0, D& d1, D& d2, D& d3, uint32_t a0, uint32_t a1,
                         uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, uint32_t c0,
                         uint32_t c1, uint32_t c2, uint32_t c3) {
  MmaOperands<uint32_t> own{{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};
  collective(name, __LINE__, kFullWarp, own, [](void* const operands[kWarp], unsigned) {
    multiply<4, uint32_t, uint32_t>(
        operands,
        [](uint32_t word, int e) { return static_cast<uint32_t>(int{A(byte_of(word, e))}); },
        [](uint32_t word, int e) { return static_cast<uint32_t>(int{B(byte_of(word, e))}); });
  });
  set(d0, own.c[0]), set(d1, own.c[1]), set(d2, own.c[2]), set(d3, own.c[3]);
}

// One 8x8 matrix of 16-bit elements: lane l holds elements 2 (l % 4) and the next of row l / 4.
template <typename D, typename A>
inline void movmatrix(const char* name, D& d, A a) {
  uint32_t own = word(a);
  collective(name, __LINE__, kFullWarp, own, [](void* const operands[kWarp], unsigned) {
    uint16_t matrix[8][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int e = 0; e < 2; ++e) {
        matrix[lane / 4][lane % 4 * 2 + e] = half_of(operands_of<uint32_t>(operands, lane), e);
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      int row = lane / 4, column = lane % 4 * 2;
      operands_of<uint32_t>(operands, lane) =
          matrix[column][row] | uint32_t{matrix[column + 1][row]} << 16;
    }
  });
  set(d, own);
}

struct LdmatrixOperands {
  const void* row;
  uint32_t words[4];
};

// Matrix m has its rows at the addresses of lanes 8 m to 8 m + 7; lanes past the last are unused.
template <bool kTrans, typename... Registers>
inline void ldmatrix(const char* name, uint32_t address, Registers&... registers) {
  constexpr int kMatrices = sizeof...(Registers);
  LdmatrixOperands own{nullptr, {}};
  if (current->lane < 8 * kMatrices) {
    own.row = aligned(name, shared_pointer(name, address, 16), 16);
  }
  collective(name, __LINE__, kFullWarp, own, [](void* const operands[kWarp], unsigned) {
    for (int m = 0; m < kMatrices; ++m) {
      uint16_t matrix[8][8];
      for (int row = 0; row < 8; ++row) {
        std::memcpy(matrix[row], operands_of<LdmatrixOperands>(operands, 8 * m + row).row, 16);
      }
      for (int lane = 0; lane < kWarp; ++lane) {
        int row = lane / 4, column = lane % 4 * 2;
        uint16_t low = kTrans ? matrix[column][row] : matrix[row][column];
        uint16_t high = kTrans ? matrix[column + 1][row] : matrix[row][column + 1];
        operands_of<LdmatrixOperands>(operands, lane).words[m] = low | uint32_t{high} << 16;
      }
    }
  });
  int next = 0;
  (set(registers, own.words[next++]), ...);
}

}  // namespace emulated
