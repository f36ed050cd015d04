// wgmma: products of four warps, which happen as late as a kernel lets them. Until a thread has
// waited, its accumulators hold poison, and operands in shared memory are not read.
#pragma once

#include "emulator/memory.h"
#include "emulator/numbers.h"
#include "emulator/shared_matrix.h"
#include "emulator/threads.h"

namespace emulated {

constexpr int kWarpgroup = 4 * kWarp;
constexpr int kRows = 64, kMaxColumns = 256, kDepth = 16;

inline Operand in_shared(uint64_t descriptor, bool transposed) {
  return {descriptor, transposed, false, {}};
}
inline Operand in_registers(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3) {
  return {0, false, true, {a0, a1, a2, a3}};
}

// Scratch of the product that is performed.
inline double left[kRows][kDepth], right[kDepth][kMaxColumns], total[kMaxColumns];

// Calls `put` with the elements of `count` rows or columns.
template <typename Format, typename Put>
inline void read_matrix(const Product& product, const Operand& operand, int count, Put put) {
  SharedMatrix matrix(product.name, operand);
  int step_mn = operand.transposed ? 8 : 1, step_k = operand.transposed ? 1 : 8;
  for (int mn = 0; mn < count; mn += step_mn) {
    for (int k = 0; k < kDepth; k += step_k) {
      const uint16_t* chunk = matrix.chunk(mn, k);
      for (int e = 0; e < 8; ++e) {
        put(mn + (step_mn == 8 ? e : 0), k + (step_k == 8 ? e : 0), Format::decode(chunk[e]));
      }
    }
  }
}

// Rows of register r of a thread: those of its warp, g and g + 8 in turns.
inline int row_of(int thread, int r) { return thread / kWarp * 16 + thread % kWarp / 4 + r % 2 * 8; }

template <typename Format>
__attribute__((optimize("O3"))) inline void perform_product(const std::vector<Product*>& shares) {
  const Product& first = *shares[0];
  int columns = static_cast<int>(first.sums->registers.size()) * 2;
  if (first.a.in_registers) {
    for (int t = 0; t < kWarpgroup; ++t) {
      for (int i = 0; i < 8; ++i) {
        uint32_t half = shares[t]->a.registers[i / 2] >> i % 2 * 16;
        left[row_of(t, i / 2)][t % 4 * 2 + i % 2 + i / 4 * 8] = Format::decode(half & 0xFFFF);
      }
    }
  } else {
    read_matrix<Format>(first, first.a, kRows, [](int m, int k, float v) { left[m][k] = v; });
  }
  read_matrix<Format>(first, first.b, columns, [](int n, int k, float v) { right[k][n] = v; });
  for (int row = 0; row < kRows; ++row) {
    for (int n = 0; n < columns; ++n) total[n] = 0;
    for (int k = 0; k < kDepth; ++k) {
      for (int n = 0; n < columns; ++n) total[n] += left[row][k] * right[k][n];
    }
    for (int quad = 0; quad < 4; ++quad) {
      int thread = row / 16 * kWarp + row % 8 * 4 + quad;
      std::vector<float>& values = shares[thread]->sums->values;
      for (int i = row % 16 / 8 * 2; i < columns / 2; i += i % 2 ? 3 : 1) {
        double before = first.accumulate ? values[i] : 0.0f;
        values[i] = static_cast<float>(before + total[i / 4 * 8 + quad * 2 + i % 2]);
      }
    }
  }
}

inline bool is_poison(float value) { return bit_cast<uint32_t>(value) == 0xFFFFFFFF; }

inline void check_untouched(const char* name, const Accumulators& sums) {
  for (const float* value : sums.registers) {
    if (!is_poison(*value)) {
      fail(std::string(name) + ": an accumulator must not be written before its product is waited "
           "for, got one that was");
    }
  }
}

// The accumulators of a product that goes on with those of one under way, or new ones.
inline std::shared_ptr<Accumulators> accumulators(const char* name, std::vector<float*> registers) {
  for (const Product& product : current->products) {
    const std::vector<float*>& held = product.sums->registers;
    bool shared = false;
    for (float* value : held) shared |= value == registers.front() || value == registers.back();
    if (!shared) continue;
    if (held != registers) {
      fail(std::string(name) + ": accumulators must be those of a product under way or others, got "
           "some of them");
    }
    check_untouched(name, *product.sums);
    return product.sums;
  }
  auto sums = std::make_shared<Accumulators>();
  for (float* value : registers) {
    sums->values.push_back(*value);
    std::memset(value, kPoison, sizeof(float));
  }
  sums->registers = std::move(registers);
  return sums;
}

// All lanes of a warp have to be there.
inline void in_step(const char* name, int line) {
  int nothing = 0;
  collective(name, line, ~0u, nothing, [](void* const*, unsigned) {});
}

inline void fence_registers(const char* name, int line = __builtin_LINE()) {
  in_step(name, line);
  current->registers_fenced = true;
}

// A library that has products takes note of writes.
template <typename Format>
inline const bool kNotesWrites = writes_are_noted = true;

template <typename Format>
inline void multiply_async(const char* name, std::vector<float*> registers, const Operand& a,
                           const Operand& b, bool accumulate, int line = __builtin_LINE()) {
  (void)&kNotesWrites<Format>;
  in_step(name, line);
  if (!current->registers_fenced) {
    fail(std::string(name) + ": registers must be fenced at first and after a wait; put a "
         "wgmma.fence before");
  }
  auto sums = accumulators(name, std::move(registers));
  current->products.push_back({name, site(line), a, b, accumulate, current->product_group,
                               std::move(sums), perform_product<Format>});
}

inline void commit_products(const char* name, int line = __builtin_LINE()) {
  in_step(name, line);
  ++current->product_group;
}

// Whether all products that a thread waits for are performed.
inline bool has_products(const Thread& thread) {
  return thread.performed == thread.products.size() ||
         thread.products[thread.performed].group >= thread.awaited_group;
}

inline void wait_for_products(const char* name, int pending, int line = __builtin_LINE()) {
  in_step(name, line);
  current->awaited_group = current->product_group - pending;
  if (!has_products(*current)) wait(State::kProducts, name, line);
  current->registers_fenced = false;
  auto& products = current->products;
  while (!products.empty() && products.front().group < current->awaited_group) {
    auto sums = std::move(products.front().sums);
    products.pop_front();
    --current->performed;
    if (sums.use_count() > 1) continue;
    check_untouched(name, *sums);
    for (std::size_t i = 0; i < sums->values.size(); ++i) *sums->registers[i] = sums->values[i];
  }
}

inline void check_same(const Product& first, const Product& other) {
  auto same = [](const Operand& a, const Operand& b) {
    return a.in_registers == b.in_registers && a.transposed == b.transposed &&
           a.descriptor == b.descriptor;
  };
  if (std::strcmp(first.name, other.name) == 0 && same(first.a, other.a) &&
      same(first.b, other.b) && first.accumulate == other.accumulate) {
    return;
  }
  fail(std::string(first.name) + ": descriptors and scale must be the same in all threads of a "
       "warpgroup, got others at lines " + std::to_string(first.line) + " and " +
       std::to_string(other.line));
}

// Performs the next product of a warpgroup if all of its threads have issued it.
inline bool perform_next(const std::vector<Thread*>& group) {
  std::vector<Product*> shares;
  for (Thread* thread : group) {
    if (thread->performed == thread->products.size()) return false;
    shares.push_back(&thread->products[thread->performed]);
  }
  if (shares.size() < kWarpgroup) {
    fail(std::string(shares[0]->name) + ": a warpgroup must have 128 threads, got " +
         std::to_string(shares.size()));
  }
  for (const Product* share : shares) check_same(*shares[0], *share);
  shares[0]->perform(shares);
  for (Thread* thread : group) ++thread->performed;
  return true;
}

// Performs what threads wait for; whether any of them can go on.
inline bool finish_products_of(const std::vector<Thread*>& group) {
  bool any = false;
  for (Thread* thread : group) {
    if (thread->state != State::kProducts) continue;
    while (!has_products(*thread) && perform_next(group)) {
    }
    if (!has_products(*thread)) continue;
    thread->state = State::kReady;
    any = true;
  }
  return any;
}

// At the end of a kernel.
inline void check_finished() {
  if (current->products.empty()) return;
  fail(std::string(current->products.front().name) + ": a kernel must wait for its products, got " +
       "one of line " + std::to_string(current->products.front().line) +
       " that it has not; add a wgmma.wait_group");
}

}  // namespace emulated
