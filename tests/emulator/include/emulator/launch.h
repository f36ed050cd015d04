// The scheduler: CTAs one after another, the threads of a CTA as fibers.
#pragma once

#include <algorithm>
#include <deque>
#include <sstream>

#include "emulator/threads.h"

namespace emulated {

// Threads, warps and CTAs run in descending order: what a missing barrier lets pass, changes.
inline bool descending = false;

inline StackPool stacks;
inline std::deque<Thread> threads;
inline std::function<void()> thread_body;

inline std::string describe(const Thread& thread) {
  std::ostringstream text;
  text << "lane " << thread.lane << " ";
  switch (thread.state) {
    case State::kReady: text << "can go on"; break;
    case State::kExited: text << "has exited"; break;
    default:
      text << "waits at " << thread.operation << " of line " << thread.line;
      if (thread.state == State::kCollective) text << " with mask 0x" << std::hex << thread.mask;
  }
  return text.str();
}

class Warp {
 public:
  Warp(int first, int count) : first_(first), count_(count) {}

  // Runs until every lane has exited or waits at a barrier; whether any lane moved.
  bool run() {
    bool moved = false;
    for (bool again = true; again;) {
      for (int i = 0; i < count_; ++i) {
        Thread& thread = lane(descending ? count_ - 1 - i : i);
        if (thread.state != State::kReady) continue;
        moved = true;
        step(thread);
      }
      again = complete();
      moved |= again;
    }
    return moved;
  }

  Thread& lane(int index) { return threads[first_ + index]; }
  int count() const { return count_; }

 private:
  static void step(Thread& thread) {
    current = &thread;
    threadIdx = thread.index;
    thread.fiber.resume();
    current = nullptr;
    if (!thread.error.empty()) {
      const uint3& index = thread.index;
      std::ostringstream text;
      text << thread.error << "; look at ";
      if (thread.call_site) text << "line " << thread.call_site << ", ";
      text << "thread (" << index.x << ", " << index.y << ", " << index.z << ")";
      throw KernelError(text.str());
    }
  }

  // Performs every operation that its lanes have arrived at.
  bool complete() {
    bool any = false, waiting = false;
    for (int i = 0; i < count_; ++i) {
      if (lane(i).state != State::kCollective) continue;
      waiting = true;
      any |= perform(lane(i));
    }
    if (any) return true;
    if (answer_active_mask()) return true;
    if (waiting) report();
    return false;
  }

  bool perform(const Thread& leader) {
    unsigned existing = count_ == kWarp ? ~0u : (1u << count_) - 1;
    unsigned mask = leader.mask & existing;
    if (!(mask >> leader.lane & 1)) {
      std::ostringstream text;
      text << leader.operation << ": mask must name the lane itself, got 0x" << std::hex
           << leader.mask << std::dec << " in lane " << leader.lane << " at line " << leader.line
           << "; name every lane that arrives";
      throw KernelError(text.str());
    }
    void* operands[kWarp] = {};
    for (int i = 0; i < count_; ++i) {
      if (!(mask >> i & 1)) continue;
      const Thread& other = lane(i);
      if (other.state != State::kCollective || other.operation != leader.operation ||
          other.line != leader.line || other.mask != leader.mask) {
        return false;
      }
      operands[i] = other.operands;
    }
    leader.execute(operands, mask);
    for (int i = 0; i < count_; ++i) {
      if (mask >> i & 1) lane(i).state = State::kReady;
    }
    return true;
  }

  // The lanes that are at the same __activemask() when no other can go on.
  bool answer_active_mask() {
    unsigned mask = 0;
    int line = 0;
    for (int i = 0; i < count_; ++i) {
      if (lane(i).state != State::kActiveMask || (mask && lane(i).line != line)) continue;
      line = lane(i).line;
      mask |= 1u << i;
    }
    for (int i = 0; i < count_; ++i) {
      if (!(mask >> i & 1)) continue;
      lane(i).mask = mask;
      lane(i).state = State::kReady;
    }
    return mask != 0;
  }

  [[noreturn]] void report() {
    std::ostringstream text;
    text << "warp " << first_ / kWarp << ": its lanes must arrive at the same operation, got";
    std::string before;
    for (int i = 0; i < count_; ++i) {
      std::string said = describe(lane(i));
      std::string what = said.substr(said.find(' ', 5) + 1);
      if (what != before) text << (before.empty() ? " " : ", ") << said;
      before = what;
    }
    throw KernelError(text.str() + "; look for divergent control flow");
  }

  int first_, count_;
};

class Cta {
 public:
  explicit Cta(int count) : count_(count) {
    for (int i = 0; i < count; i += kWarp) warps_.emplace_back(i, std::min(kWarp, count - i));
  }

  void run() {
    for (SharedArray& array : shared_arrays) std::memset(array.data, kPoison, array.bytes);
    std::memset(dynamic_shared, kPoison, dynamic_shared_bytes);
    for (int i = 0; i < count_; ++i) {
      Thread& thread = threads[i];
      thread.state = State::kReady;
      thread.lane = i % kWarp;
      thread.call_site = 0;
      thread.copies.clear();
      thread.group = 0;
      unsigned x = blockDim.x, y = blockDim.y, index = static_cast<unsigned>(i);
      thread.index = {index % x, index / x % y, index / x / y};
    }
    bool moved = true;
    while (moved) {
      moved = false;
      for (std::size_t i = 0; i < warps_.size(); ++i) {
        moved |= warps_[descending ? warps_.size() - 1 - i : i].run();
      }
      moved |= release_barriers();
    }
    for (int i = 0; i < count_; ++i) {
      if (threads[i].state != State::kExited) report();
    }
  }

 private:
  bool release_barriers() {
    int live = 0;
    int waiting[16] = {};
    for (int i = 0; i < count_; ++i) {
      live += threads[i].state != State::kExited;
      if (threads[i].state == State::kBarrier) ++waiting[threads[i].barrier];
    }
    bool any = false;
    for (int i = 0; i < count_; ++i) {
      Thread& thread = threads[i];
      if (thread.state != State::kBarrier) continue;
      int needed = thread.barrier_count ? thread.barrier_count : live;
      if (waiting[thread.barrier] < needed) continue;
      check_lines(thread);
      thread.state = State::kReady;
      any = true;
    }
    return any;
  }

  void check_lines(const Thread& leader) {
    for (int i = 0; i < count_; ++i) {
      if (threads[i].state == State::kBarrier && threads[i].barrier == leader.barrier &&
          threads[i].line != leader.line) {
        report();
      }
    }
  }

  [[noreturn]] void report() {
    std::string text = "CTA: its threads must arrive at the same barrier, got", before;
    for (int i = 0; i < count_; ++i) {
      std::string said = describe(threads[i]);
      std::string what = said.substr(said.find(' ', 5) + 1);
      if (what == before) continue;
      text += (before.empty() ? " warp " : ", warp ") + std::to_string(i / kWarp) + " " + said;
      before = what;
    }
    throw KernelError(text + "; look for divergent control flow");
  }

  int count_;
  std::vector<Warp> warps_;
};

inline void place_threads(int count) {
  while (static_cast<int>(threads.size()) < count) {
    threads.emplace_back();
    auto* base = static_cast<char*>(stacks.at(threads.size() - 1));
    threads.back().fiber.place(base + StackPool::kGuard, StackPool::kBytes - StackPool::kGuard,
                               &thread_body);
  }
}

inline void check_launch(const dim3& grid, const dim3& block, std::size_t shared) {
  std::size_t count = std::size_t{block.x} * block.y * block.z;
  if (count == 0 || count > 1024 || block.z > 64) {
    throw KernelError("launch: blockDim must be 1 to 1024 threads, z up to 64, got " +
                      std::to_string(count) + " threads, z " + std::to_string(block.z) +
                      "; launch smaller CTAs");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    throw KernelError("launch: gridDim must be 1 or more, y and z up to 65535, got " +
                      std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
                      std::to_string(grid.z) + "; launch fewer CTAs");
  }
  if (shared > kMaxDynamicShared) {
    throw KernelError("launch: dynamic shared memory must be at most " +
                      std::to_string(kMaxDynamicShared) + " bytes, got " + std::to_string(shared) +
                      "; use less");
  }
}

// Each kernel's own arrays: a kernel is known by its first launch.
inline void check_static_shared() {
  for (const SharedArray& array : shared_arrays) {
    std::size_t total = 0;
    for (const SharedArray& other : shared_arrays) {
      if (std::strcmp(array.kernel, other.kernel) == 0) total += other.bytes;
    }
    if (total > kMaxStaticShared) {
      throw KernelError(std::string(array.kernel) + ": static shared memory must be at most " +
                        std::to_string(kMaxStaticShared) + " bytes, got " + std::to_string(total) +
                        "; use less");
    }
  }
}

inline void launch(const dim3& grid, const dim3& block, std::size_t shared,
                   std::function<void()> kernel) {
  check_launch(grid, block, shared);
  int count = static_cast<int>(block.x * block.y * block.z);
  thread_body = [&kernel] {
    kernel();
    current->state = State::kExited;
  };
  place_threads(count);
  dynamic_shared_bytes = shared;
  gridDim = grid;
  blockDim = block;
  Cta cta(count);
  std::size_t total = std::size_t{grid.x} * grid.y * grid.z;
  try {
    for (std::size_t i = 0; i < total; ++i) {
      std::size_t at = descending ? total - 1 - i : i;
      blockIdx = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                     static_cast<unsigned>(at / grid.x / grid.y)};
      cta.run();
    }
    check_static_shared();
  } catch (...) {
    current = nullptr;
    for (Thread& thread : threads) {
      thread.fiber.reset();
      thread.error.clear();
      thread.state = State::kExited;
    }
    throw;
  }
}

}  // namespace emulated
