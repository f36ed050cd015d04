// mbarriers: phases that complete when all arrivals and all bytes that were expected are there; and
// the stores that bring bytes.
#pragma once

#include "emulator/memory.h"
#include "emulator/threads.h"

namespace emulated {

// The eight bytes in shared memory. Memory that was never written is not `kValid`.
struct Mbarrier {
  static constexpr unsigned kValid = 1;
  static constexpr long kMost = (1 << 20) - 1;

  uint64_t expected : 20, pending : 20, phase : 1, valid : 2;
  int64_t bytes : 21;
};
static_assert(sizeof(Mbarrier) == 8, "an mbarrier has 64 bits");

inline Mbarrier& mbarrier_at(const char* name, void* pointer) {
  auto& barrier = *static_cast<Mbarrier*>(aligned(name, pointer, sizeof(Mbarrier)));
  if (barrier.valid != Mbarrier::kValid) {
    fail(std::string(name) + ": address must be one of an mbarrier, got other memory; put an "
         "mbarrier.init and a barrier before");
  }
  return barrier;
}

inline void init_mbarrier(const char* name, void* pointer, uint32_t count) {
  if (count < 1 || count > Mbarrier::kMost) {
    fail(std::string(name) + ": count must be 1 to 1048575, got " + std::to_string(count));
  }
  auto& barrier = *static_cast<Mbarrier*>(aligned(name, pointer, sizeof(Mbarrier)));
  barrier = {count, count, 0, Mbarrier::kValid, 0};
}

inline void invalidate_mbarrier(const char* name, void* pointer) {
  std::memset(&mbarrier_at(name, pointer), kPoison, sizeof(Mbarrier));
}

inline void complete_phase(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.expected;
}

// Bytes may arrive before they are expected.
inline void add_bytes(const char* name, Mbarrier& barrier, long bytes) {
  long sum = barrier.bytes + bytes;
  if (sum > Mbarrier::kMost || sum < -Mbarrier::kMost) {
    fail(std::string(name) + ": bytes under way must be at most 1048575, got " +
         std::to_string(sum));
  }
  barrier.bytes = sum;
}

inline void expect_bytes(const char* name, void* pointer, uint32_t bytes) {
  add_bytes(name, mbarrier_at(name, pointer), bytes);
}

inline void complete_bytes(const char* name, void* pointer, uint32_t bytes) {
  Mbarrier& barrier = mbarrier_at(name, pointer);
  add_bytes(name, barrier, -static_cast<long>(bytes));
  complete_phase(barrier);
}

// Gives the state before.
inline uint64_t arrive_at_mbarrier(const char* name, void* pointer, uint32_t count = 1) {
  Mbarrier& barrier = mbarrier_at(name, pointer);
  uint64_t before = bit_cast<uint64_t>(barrier);
  if (count < 1 || count > barrier.pending) {
    fail(std::string(name) + ": arrivals must be 1 to the " + std::to_string(barrier.pending) +
         " that the phase still needs, got " + std::to_string(count));
  }
  barrier.pending -= count;
  complete_phase(barrier);
  return before;
}

inline uint64_t arrive_and_expect(const char* name, void* pointer, uint32_t bytes) {
  uint64_t before = bit_cast<uint64_t>(mbarrier_at(name, pointer));
  expect_bytes(name, pointer, bytes);
  arrive_at_mbarrier(name, pointer);
  return before;
}

// Whether the mbarrier that a thread waits for has left the phase of its parity.
inline bool phase_is_complete(Thread& thread) {
  std::memcpy(&thread.mbarrier_word, thread.mbarrier, sizeof(Mbarrier));
  return bit_cast<Mbarrier>(thread.mbarrier_word).phase != thread.parity;
}

inline std::string describe_phase(const Thread& thread) {
  auto barrier = bit_cast<Mbarrier>(thread.mbarrier_word);
  return " for parity " + std::to_string(thread.parity) + ", which needs " +
         std::to_string(barrier.pending) + " arrivals and " + std::to_string(barrier.bytes) +
         " bytes";
}

inline void aim_at_phase(const char* name, void* pointer, uint32_t parity) {
  if (parity > 1) fail(std::string(name) + ": parity must be 0 or 1, got " + std::to_string(parity));
  current->mbarrier = &mbarrier_at(name, pointer);
  current->parity = parity;
}

inline void wait_for_phase(const char* name, void* pointer, uint32_t parity,
                           int line = __builtin_LINE()) {
  aim_at_phase(name, pointer, parity);
  while (!phase_is_complete(*current)) wait(State::kMbarrier, name, line);
  current->failed_tests = 0;
}

// A test that fails after another that failed is one of a loop, and waits.
inline uint32_t test_phase(const char* name, void* pointer, uint32_t parity,
                           int line = __builtin_LINE()) {
  aim_at_phase(name, pointer, parity);
  if (!phase_is_complete(*current) && ++current->failed_tests < 2) return 0;
  wait_for_phase(name, pointer, parity, line);
  return 1;
}

// A store to a CTA of the cluster, which arrives when that CTA cannot go on without it.
struct AsyncStore {
  const char* name;
  uint32_t rank;
  void* to;
  void* mbarrier;
  unsigned bytes;
  alignas(16) char data[16];
};
inline std::vector<AsyncStore> async_stores;

template <typename Element, typename... Registers>
inline void store_async(const char* name, uint64_t address, uint64_t mbarrier,
                        const Registers&... registers) {
  constexpr unsigned kBytes = sizeof...(Registers) * sizeof(Element);
  static_assert(kBytes <= 16, "st.async stores 16 bytes at most");
  // Both have to be there, and not only when the store arrives.
  mbarrier_at(name, cluster_pointer(name, mbarrier, sizeof(Mbarrier)));
  cluster_pointer(name, address, kBytes);
  ClusterTarget to = cluster_target(name, address, kBytes);
  ClusterTarget signal = cluster_target(name, mbarrier, sizeof(Mbarrier));
  if (to.rank != signal.rank) {
    fail(std::string(name) + ": address and mbarrier must be of one CTA, got ranks " +
         std::to_string(to.rank) + " and " + std::to_string(signal.rank));
  }
  AsyncStore store{name, to.rank, aligned(name, to.pointer, kBytes), signal.pointer, kBytes, {}};
  write<Element>(name, store.data, registers...);
  async_stores.push_back(store);
}

// Whether stores to the CTA that runs have arrived.
inline bool deliver_stores(bool exited) {
  std::vector<AsyncStore> others;
  bool any = false;
  // Completing bytes can throw, and then nothing of this is looked at again.
  for (const AsyncStore& store : async_stores) {
    if (store.rank != cluster_rank) {
      others.push_back(store);
      continue;
    }
    if (exited) {
      fail(std::string(store.name) + ": CTA " + std::to_string(store.rank) +
           " of the cluster must be there when a store arrives, got one that has exited; let it "
           "wait for the mbarrier");
    }
    std::memcpy(store.to, store.data, store.bytes);
    complete_bytes(store.name, store.mbarrier, store.bytes);
    any = true;
  }
  async_stores.swap(others);
  return any;
}

}  // namespace emulated
