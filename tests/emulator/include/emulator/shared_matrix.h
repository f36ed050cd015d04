// Operands of wgmma in shared memory, by their descriptors.
#pragma once

#include "emulator/memory.h"
#include "emulator/threads.h"

namespace emulated {

// The matrix of a descriptor, by chunks of 16 bytes: eight elements along k, or along m or n where
// it is transposed. Canonical layouts as CUTLASS's mma_traits_sm90_gmma.hpp writes them down.
class SharedMatrix {
 public:
  SharedMatrix(const char* name, const Operand& operand)
      : name_(name), transposed_(operand.transposed) {
    uint64_t bits = operand.descriptor;
    auto field = [&](int first) { return static_cast<uint32_t>(bits >> first & 0x3FFF) << 4; };
    start_ = field(0), leading_ = field(16), stride_ = field(32);
    unsigned mode = static_cast<unsigned>(bits >> 62);
    width_ = mode == 0 ? 16 : 256 >> mode;
    swizzle_ = width_ - 16;
    if (bits & kUnused) {
      refuse("base offset and unused bits must be 0, got ", bits & kUnused);
    }
    if (start_ & swizzle_ << 3) {
      refuse("start must be in the first row of a block of " + std::to_string(8 * width_) +
             " bytes, got address ", start_);
    }
    find_array();
  }

  // The chunk that begins with the element of row or column `mn` and of `k`.
  const uint16_t* chunk(int mn, int k) const {
    uint32_t linear = start_ + (transposed_ ? along_mn(mn, k) : along_k(mn, k));
    uint32_t address = linear ^ (linear >> 3 & swizzle_);
    if (address < first_ || address + 16 > first_ + bytes_) {
      refuse("chunks must lie inside of the shared array of the start, got address ", address);
    }
    const char* pointer = data_ + (address - first_);
    check_fence(pointer);
    return reinterpret_cast<const uint16_t*>(pointer);
  }

 private:
  uint32_t along_k(int mn, int k) const {
    uint32_t row = mn % 8 * width_ + mn / 8 * stride_;
    return row + (width_ == 16 ? k / 8 * leading_ : 2 * k);
  }

  uint32_t along_mn(int mn, int k) const {
    if (width_ == 16) return mn / 8 * stride_ + k % 8 * 16 + k / 8 * leading_;
    int elements = static_cast<int>(width_) / 2;
    return mn % elements * 2 + mn / elements * leading_ + k % 8 * width_ + k / 8 * stride_;
  }

  // A descriptor has 18 bits of an address: those of a static array may be those of another.
  void find_array() {
    int found = 0;
    auto consider = [&](char* data, std::size_t bytes) {
      uint32_t first = shared_address(data) & kAddresses;
      if (start_ < first || start_ >= first + bytes) return;
      data_ = data, first_ = first, bytes_ = static_cast<uint32_t>(bytes);
      ++found;
    };
    consider(dynamic_shared, dynamic_shared_bytes);
    for (const SharedArray& array : shared_arrays) consider(array.data, array.bytes);
    if (found > 1) refuse("start must be in one array; use dynamic shared memory; got ", start_);
    if (found == 0) refuse("start must be in a shared array, got address ", start_);
  }

  void check_fence(const char* pointer) const {
    auto& writes = generic_writes[cluster_rank];
    auto write = writes.find(reinterpret_cast<std::uintptr_t>(pointer) / 16);
    if (write == writes.end() || write->second.fences < write->second.thread->proxy_fences) return;
    refuse("a thread must fence.proxy.async what it has stored, got an unfenced store of thread ",
           write->second.thread->index.x);
  }

  [[noreturn]] void refuse(const std::string& what, uint64_t got) const {
    fail(std::string(name_) + ": " + what + std::to_string(got));
  }

  static constexpr uint64_t kUnused = 0x3FFFC000C000C000;
  static constexpr uint32_t kAddresses = (1 << 18) - 1;

  const char* name_;
  bool transposed_;
  uint32_t start_, leading_, stride_, width_, swizzle_;
  char* data_ = nullptr;
  uint32_t first_ = 0, bytes_ = 0;
};

}  // namespace emulated
