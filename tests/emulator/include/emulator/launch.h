// The scheduler: clusters one after another, the threads of their CTAs as fibers.
#pragma once

#include <algorithm>
#include <deque>
#include <limits>
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
  Cta(int first, int count) : first_(first), count_(count) {
    for (int i = 0; i < count; i += kWarp) {
      warps_.emplace_back(first + i, std::min(kWarp, count - i));
    }
  }

  void start() {
    for (int i = 0; i < count_; ++i) {
      Thread& thread = own(i);
      thread.state = State::kReady;
      thread.lane = i % kWarp;
      thread.arrivals = 0;
      thread.arrived = false;
      thread.call_site = 0;
      thread.copies.clear();
      thread.group = 0;
      unsigned x = blockDim.x, y = blockDim.y, index = static_cast<unsigned>(i);
      thread.index = {index % x, index / x % y, index / x / y};
    }
  }

  // Runs until every thread has exited or waits for the cluster; whether any of them moved.
  bool run() {
    bool any = false;
    for (bool moved = true; moved;) {
      moved = false;
      for (std::size_t i = 0; i < warps_.size(); ++i) {
        moved |= warps_[descending ? warps_.size() - 1 - i : i].run();
      }
      moved |= release_barriers();
      any |= moved;
    }
    for (int i = 0; i < count_; ++i) {
      if (own(i).state != State::kExited && own(i).state != State::kCluster) report();
    }
    return any;
  }

  bool exited() {
    for (int i = 0; i < count_; ++i) {
      if (own(i).state != State::kExited) return false;
    }
    return true;
  }

  [[noreturn]] void report() {
    std::string text = "CTA: its threads must arrive at the same barrier, got", before;
    for (int i = 0; i < count_; ++i) {
      std::string said = describe(own(i));
      std::string what = said.substr(said.find(' ', 5) + 1);
      if (what == before) continue;
      text += (before.empty() ? " warp " : ", warp ") + std::to_string(i / kWarp) + " " + said;
      before = what;
    }
    throw KernelError(text + "; look for divergent control flow");
  }

 private:
  Thread& own(int index) { return threads[first_ + index]; }

  bool release_barriers() {
    int live = 0;
    int waiting[16] = {};
    for (int i = 0; i < count_; ++i) {
      live += own(i).state != State::kExited;
      if (own(i).state == State::kBarrier) ++waiting[own(i).barrier];
    }
    bool any = false;
    for (int i = 0; i < count_; ++i) {
      Thread& thread = own(i);
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
      if (own(i).state == State::kBarrier && own(i).barrier == leader.barrier &&
          own(i).line != leader.line) {
        report();
      }
    }
  }

  int first_, count_;
  std::vector<Warp> warps_;
};

// The CTAs that can read one another's shared memory; one alone is a cluster, too.
class Cluster {
 public:
  Cluster(int ctas, int count) {
    for (int i = 0; i < ctas; ++i) ctas_.emplace_back(i * count, count);
    total_ = ctas * count;
  }

  // `first` is the CTA of rank 0; the others follow along x.
  void run(const uint3& first) {
    images.clear();
    images.resize(ctas_.size());
    for (Cta& cta : ctas_) cta.start();
    std::size_t held = ctas_.size();  // whose memory is in place
    for (bool moved = true; moved;) {
      moved = false;
      for (std::size_t i = 0; i < ctas_.size(); ++i) {
        std::size_t rank = descending ? ctas_.size() - 1 - i : i;
        if (images[rank].exited) continue;
        cluster_rank = static_cast<unsigned>(rank);
        blockIdx = {first.x + cluster_rank, first.y, first.z};
        if (rank != held) {
          if (held < ctas_.size()) save_shared(images[held]);
          restore_shared(images[rank]);
          held = rank;
        }
        moved |= ctas_[rank].run();
        images[rank].exited = ctas_[rank].exited();
      }
      moved |= release();
    }
    for (Cta& cta : ctas_) {
      if (!cta.exited()) cta.report();
    }
  }

 private:
  // Threads that have exited count as arrived.
  bool release() {
    int least = std::numeric_limits<int>::max();
    for (int i = 0; i < total_; ++i) {
      if (threads[i].state != State::kExited) least = std::min(least, threads[i].arrivals);
    }
    bool any = false;
    for (int i = 0; i < total_; ++i) {
      Thread& thread = threads[i];
      if (thread.state != State::kCluster || thread.arrivals > least) continue;
      thread.state = State::kReady;
      thread.arrived = false;
      any = true;
    }
    return any;
  }

  std::vector<Cta> ctas_;
  int total_;
};

inline void place_threads(int count) {
  while (static_cast<int>(threads.size()) < count) {
    threads.emplace_back();
    auto* base = static_cast<char*>(stacks.at(threads.size() - 1));
    threads.back().fiber.place(base + StackPool::kGuard, StackPool::kBytes - StackPool::kGuard,
                               &thread_body);
  }
}

inline void check_launch(const dim3& grid, const dim3& block, unsigned cluster,
                         std::size_t shared) {
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
  if (cluster < 1 || cluster > 16 || grid.x % cluster) {
    throw KernelError("launch: clusterDim.x must be 1 to 16 and divide gridDim.x, got " +
                      std::to_string(cluster) + " of " + std::to_string(grid.x));
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

inline void launch(const dim3& grid, const dim3& block, unsigned ctas, std::size_t shared,
                   std::function<void()> kernel) {
  check_launch(grid, block, ctas, shared);
  int count = static_cast<int>(block.x * block.y * block.z);
  thread_body = [&kernel] {
    kernel();
    current->state = State::kExited;
  };
  place_threads(count * static_cast<int>(ctas));
  dynamic_shared_bytes = shared;
  gridDim = grid;
  blockDim = block;
  Cluster cluster(static_cast<int>(ctas), count);
  std::size_t row = grid.x / ctas, total = row * grid.y * grid.z;
  try {
    for (std::size_t i = 0; i < total; ++i) {
      std::size_t at = descending ? total - 1 - i : i;
      cluster.run({static_cast<unsigned>(at % row * ctas), static_cast<unsigned>(at / row % grid.y),
                   static_cast<unsigned>(at / row / grid.y)});
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
