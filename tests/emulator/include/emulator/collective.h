// Operations of the lanes of a warp on one another, and barriers of a CTA.
#pragma once

#include <algorithm>

#include "emulator/threads.h"

namespace emulated {

enum class Shuffle { kIndex, kUp, kDown, kXor };

template <typename T>
struct ShuffleOperands {
  T value;
  Shuffle mode;
  unsigned by;
  int width;
  T result;
};

// Source lane as PTX defines shfl.sync; a lane without one keeps its own value.
inline int shuffle_source(Shuffle mode, int lane, unsigned by, int width) {
  int first = lane & ~(width - 1), last = first | (width - 1);
  switch (mode) {
    case Shuffle::kIndex: return first | (static_cast<int>(by) & (width - 1));
    case Shuffle::kUp: return lane - static_cast<int>(by) >= first ? lane - by : lane;
    case Shuffle::kDown: return lane + static_cast<int>(by) <= last ? lane + by : lane;
    case Shuffle::kXor: return (lane ^ static_cast<int>(by)) <= last ? lane ^ by : lane;
  }
  return lane;
}

template <typename T>
inline T shuffle(const char* name, Shuffle mode, unsigned mask, T value, unsigned by, int width,
                 int line) {
  if (width < 1 || width > kWarp || (width & (width - 1))) {
    fail(std::string(name) + ": width must be a power of two up to 32, got " +
         std::to_string(width));
  }
  ShuffleOperands<T> own{value, mode, by, width, value};
  collective(name, line, mask, own, [](void* const operands[kWarp], unsigned mask) {
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      auto& mine = operands_of<ShuffleOperands<T>>(operands, lane);
      int source = shuffle_source(mine.mode, lane, mine.by, mine.width);
      if (source >= 0 && source < kWarp && mask >> source & 1) {
        mine.result = operands_of<ShuffleOperands<T>>(operands, source).value;
      } else {
        std::memset(&mine.result, kPoison, sizeof(T));
      }
    }
  });
  return own.result;
}

struct VoteOperands {
  bool predicate;
  unsigned ballot;
};

inline unsigned ballot(const char* name, unsigned mask, bool predicate, int line) {
  VoteOperands own{predicate, 0};
  collective(name, line, mask, own, [](void* const operands[kWarp], unsigned mask) {
    unsigned result = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (mask >> lane & 1 && operands_of<VoteOperands>(operands, lane).predicate) {
        result |= 1u << lane;
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      if (mask >> lane & 1) operands_of<VoteOperands>(operands, lane).ballot = result;
    }
  });
  return own.ballot;
}

inline void check_barrier(const char* name, int id, int count) {
  if (id < 0 || id >= kBarriers) {
    fail(std::string(name) + ": barrier must be 0 to 15, got " + std::to_string(id));
  }
  if (count < 0 || count % kWarp) {
    fail(std::string(name) + ": threads must be a multiple of 32, got " + std::to_string(count));
  }
}

inline void barrier(const char* name, int id, int count, int line) {
  check_barrier(name, id, count);
  if (current->arrived_at[id]) {
    fail(std::string(name) + ": a thread that has arrived at barrier " + std::to_string(id) +
         " must not wait at it before it is complete; use another barrier");
  }
  current->barrier = id;
  current->barrier_count = count;
  wait(State::kBarrier, name, line);
}

inline void synchronize(const char* name, int id, int count = 0) {
  barrier(name, id, count, __LINE__);
}

// bar.arrive: threads go on, and count for those that wait.
inline void arrive_at_barrier(const char* name, int id, int count) {
  check_barrier(name, id, count);
  if (count == 0) fail(std::string(name) + ": threads must be 32 at least, got 0");
  if (current->arrived_at[id]) {
    fail(std::string(name) + ": a thread must not arrive at barrier " + std::to_string(id) +
         " again before it is complete; wait for those that it lets go on");
  }
  current->arrived_at[id] = count;
}

// setmaxnreg: registers are not counted.
inline void set_registers(const char* name, int count) {
  if (count < 24 || count > 256 || count % 8) {
    fail(std::string(name) + ": registers must be a multiple of 8 from 24 to 256, got " +
         std::to_string(count));
  }
}

// barrier.cluster.arrive and .wait, which take turns.
inline void arrive_at_cluster(const char* name) {
  if (current->arrived) {
    fail(std::string(name) + ": a thread must wait before it arrives again; add a "
         "barrier.cluster.wait");
  }
  current->arrived = true;
  ++current->arrivals;
}

inline void wait_for_cluster(const char* name) {
  if (!current->arrived) {
    fail(std::string(name) + ": a thread must arrive before it waits; add a "
         "barrier.cluster.arrive");
  }
  wait(State::kCluster, name, __LINE__);
}

enum class Redux { kAdd, kMin, kMax };

template <typename T>
struct ReduxOperands {
  T value;
  T result;
};

// redux.sync: the lanes that are named combine their values.
template <Redux kOperation, typename T, typename Register, typename Value>
inline void redux(const char* name, Register& result, Value value, unsigned mask) {
  ReduxOperands<T> own{static_cast<T>(value), T{}};
  collective(name, __LINE__, mask, own, [](void* const operands[kWarp], unsigned mask) {
    bool first = true;
    T total{};
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      T value = operands_of<ReduxOperands<T>>(operands, lane).value;
      if (first) {
        total = value;
      } else if (kOperation == Redux::kAdd) {
        total = static_cast<T>(static_cast<uint32_t>(total) + static_cast<uint32_t>(value));
      } else {
        total = kOperation == Redux::kMin ? std::min(total, value) : std::max(total, value);
      }
      first = false;
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      if (mask >> lane & 1) operands_of<ReduxOperands<T>>(operands, lane).result = total;
    }
  });
  result = static_cast<Register>(own.result);
}

}  // namespace emulated

#define EMULATED_SHUFFLE(NAME, MODE)                                                     \
  template <typename T>                                                                  \
  inline T NAME(unsigned mask, T value, unsigned by, int width = 32,                     \
                int line = __builtin_LINE()) {                                           \
    return emulated::shuffle(#NAME, emulated::Shuffle::MODE, mask, value, by, width, line); \
  }
EMULATED_SHUFFLE(__shfl_sync, kIndex)
EMULATED_SHUFFLE(__shfl_up_sync, kUp)
EMULATED_SHUFFLE(__shfl_down_sync, kDown)
EMULATED_SHUFFLE(__shfl_xor_sync, kXor)
#undef EMULATED_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return emulated::ballot("__ballot_sync", mask, predicate != 0, line);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return emulated::ballot("__any_sync", mask, predicate != 0, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return emulated::ballot("__all_sync", mask, predicate == 0, line) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  emulated::ballot("__syncwarp", mask, false, line);
}
inline unsigned __activemask(int line = __builtin_LINE()) {
  emulated::wait(emulated::State::kActiveMask, "__activemask", line);
  return emulated::current->mask;
}
inline void __syncthreads(int line = __builtin_LINE()) {
  emulated::barrier("__syncthreads", 0, 0, line);
}
