// The warps of a CTA, and the barriers between them.
#pragma once

#include "emulator/warp.h"
#include "emulator/warpgroup.h"

namespace emulated {

class Cta {
 public:
  Cta(int first, int count) : first_(first), count_(count) {
    for (int i = 0; i < count; i += kWarp) {
      warps_.emplace_back(first + i, std::min(kWarp, count - i));
    }
  }

  void start() {
    for (int i = 0; i < count_; ++i) {
      unsigned x = blockDim.x, y = blockDim.y, index = static_cast<unsigned>(i);
      own(i).start(i % kWarp, {index % x, index / x % y, index / x / y});
    }
  }

  // Runs until every thread has exited or waits for the cluster; whether any of them moved. What is
  // asynchronous happens when nothing else can: a kernel that does not wait for it has gone on.
  bool run() {
    bool any = false;
    for (bool moved = true; moved;) {
      moved = false;
      for (std::size_t i = 0; i < warps_.size(); ++i) {
        moved |= warps_[descending ? warps_.size() - 1 - i : i].run();
      }
      moved |= release_barriers();
      moved |= release_mbarriers();
      if (!moved) moved = finish_products() || deliver_stores(exited());
      any |= moved;
    }
    if (!exited() && !waits_for_peers()) report();
    return any;
  }

  bool exited() {
    for (int i = 0; i < count_; ++i) {
      if (own(i).state != State::kExited) return false;
    }
    return true;
  }

  [[noreturn]] void report() {
    throw KernelError("CTA: its threads must arrive at the same barrier, got" + describe_threads() +
                      "; look for divergent control flow");
  }

  std::string describe_threads() {
    std::string text, before;
    for (int i = 0; i < count_; ++i) {
      std::string said = describe(own(i));
      std::string what = said.substr(said.find(' ', 5) + 1);
      if (what == before) continue;
      text += (before.empty() ? " warp " : ", warp ") + std::to_string(i / kWarp) + " " + said;
      before = what;
    }
    return text;
  }

 private:
  Thread& own(int index) { return threads[first_ + index]; }

  // A thread that a CTA of the cluster can let go on.
  bool waits_for_peers() {
    for (int i = 0; i < count_; ++i) {
      if (own(i).state == State::kCluster || own(i).state == State::kMbarrier) return true;
    }
    return false;
  }

  // How many threads complete barrier `id`, as a thread at it says; -1 where it is not there.
  static int count_at(const Thread& thread, int id) {
    if (thread.state == State::kBarrier && thread.barrier == id) return thread.barrier_count;
    return thread.arrived_at[id] ? thread.arrived_at[id] : -1;
  }

  bool release_barriers() {
    bool any = false;
    for (int id = 0; id < kBarriers; ++id) any |= release_barrier(id);
    return any;
  }

  bool release_barrier(int id) {
    int live = 0, present = 0, needed = -1;
    for (int i = 0; i < count_; ++i) {
      live += own(i).state != State::kExited;
      int count = count_at(own(i), id);
      if (count < 0) continue;
      if (needed >= 0 && count != needed) {
        throw KernelError("barrier " + std::to_string(id) + ": all must name the same number of " +
                          "threads, got " + std::to_string(needed) + " and " +
                          std::to_string(count));
      }
      needed = count;
      ++present;
    }
    if (present == 0 || present < (needed ? needed : live)) return false;
    bool any = false;
    for (int i = 0; i < count_; ++i) {
      Thread& thread = own(i);
      thread.arrived_at[id] = 0;
      if (thread.state != State::kBarrier || thread.barrier != id) continue;
      check_lines(thread);
      thread.state = State::kReady;
      any = true;
    }
    return any;
  }

  bool release_mbarriers() {
    bool any = false;
    for (int i = 0; i < count_; ++i) {
      if (own(i).state == State::kMbarrier && phase_is_complete(own(i))) {
        own(i).state = State::kReady;
        any = true;
      }
    }
    return any;
  }

  bool finish_products() {
    bool any = false;
    for (int first = 0; first < count_; first += kWarpgroup) {
      std::vector<Thread*> group;
      for (int i = first; i < std::min(first + kWarpgroup, count_); ++i) group.push_back(&own(i));
      any |= finish_products_of(group);
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

}  // namespace emulated
