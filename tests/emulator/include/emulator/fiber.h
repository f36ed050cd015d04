// A fiber: a stack of its own, and switches that make no system call.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

namespace emulated {

inline jmp_buf scheduler_context;

__attribute__((noinline)) inline void jump_between(jmp_buf& from, jmp_buf& to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

class Fiber {
 public:
  // Runs `body` until it suspends or ends.
  void resume() {
    if (started_) {
      jump_between(scheduler_context, context_);
    } else if (_setjmp(scheduler_context) == 0) {
      started_ = true;
      starting = this;
      setcontext(&entry_);
    }
  }

  void suspend() { jump_between(context_, scheduler_context); }

  // The stack's lowest page stays unmapped, so that an overflow is a fault.
  void place(void* stack, std::size_t bytes, std::function<void()>* body) {
    body_ = body;
    stack_ = stack;
    bytes_ = bytes;
    reset();
  }

  void reset() {
    started_ = false;
    getcontext(&entry_);
    entry_.uc_stack.ss_sp = stack_;
    entry_.uc_stack.ss_size = bytes_;
    entry_.uc_link = nullptr;
    makecontext(&entry_, &Fiber::enter, 0);
  }

 private:
  static void enter() {
    Fiber* self = starting;
    for (;;) {
      (*self->body_)();
      self->suspend();
    }
  }

  static inline Fiber* starting = nullptr;

  bool started_ = false;
  ucontext_t entry_;
  jmp_buf context_;
  void* stack_ = nullptr;
  std::size_t bytes_ = 0;
  std::function<void()>* body_ = nullptr;
};

// Stacks of the threads of a CTA, kept from launch to launch.
class StackPool {
 public:
  static constexpr std::size_t kBytes = 256 << 10;
  static constexpr std::size_t kGuard = 4096;

  ~StackPool() {
    for (void* stack : stacks_) munmap(stack, kBytes);
  }

  void* at(std::size_t index) {
    while (stacks_.size() <= index) {
      void* stack = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) throw std::bad_alloc();
      mprotect(stack, kGuard, PROT_NONE);
      stacks_.push_back(stack);
    }
    return stacks_[index];
  }

 private:
  std::vector<void*> stacks_;
};

}  // namespace emulated
