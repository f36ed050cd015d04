// The threads of a warp as fibers, and what they do together.
#pragma once

#include <algorithm>
#include <deque>
#include <sstream>

#include "emulator/mbarrier.h"
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
      if (thread.state == State::kMbarrier) text << describe_phase(thread);
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
    if (waiting && !waits_for_phase()) report();
    return false;
  }

  // Others may arrive once a phase is complete.
  bool waits_for_phase() {
    for (int i = 0; i < count_; ++i) {
      if (lane(i).state == State::kMbarrier) return true;
    }
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

}  // namespace emulated
