// The threads of one CTA, and how they wait for one another.
//
// A thread that has to wait notes down at what and suspends; the scheduler finds groups of lanes
// that have all arrived at the same operation, performs it for the group, and resumes them. A warp
// in which no lane can go on is a bug of the kernel and reported as such.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "emulator/fiber.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Those of the thread that runs.
inline uint3 threadIdx;
inline uint3 blockIdx;
inline dim3 blockDim;
inline dim3 gridDim;

namespace emulated {

constexpr int kWarp = 32;
constexpr unsigned kPoison = 0xFF;

class KernelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class State { kReady, kCollective, kActiveMask, kBarrier, kExited };

// Performs an operation for the lanes in `mask`, whose operands are given.
using Execute = void (*)(void* const operands[kWarp], unsigned mask);

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, valid;
  long group;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  int lane = 0;
  State state = State::kExited;
  // What it waits for.
  const char* operation = nullptr;
  int line = 0;
  unsigned mask = 0;
  int barrier = 0;
  int barrier_count = 0;
  void* operands = nullptr;
  Execute execute = nullptr;
  // Line of the call of the helper that it is in, 0 outside of helpers.
  int call_site = 0;
  // cp.async: copies in flight, and the group that the next ones belong to.
  std::vector<Copy> copies;
  long group = 0;
  std::string error;
};

inline Thread* current = nullptr;

// Gives up on the kernel: the launch throws what `message` says.
[[noreturn]] inline void fail(const std::string& message) {
  if (current == nullptr) throw KernelError(message);
  current->error = message;
  for (;;) current->fiber.suspend();
}

// Names the line of a call for the collectives inside of a helper.
class CallSite {
 public:
  explicit CallSite(int line) { current->call_site = line; }
  ~CallSite() { current->call_site = 0; }
};

inline int site(int line) { return current->call_site ? current->call_site : line; }

inline void wait(State state, const char* operation, int line) {
  current->state = state;
  current->operation = operation;
  current->line = site(line);
  current->fiber.suspend();
}

template <typename Operands>
inline void collective(const char* operation, int line, unsigned mask, Operands& operands,
                       Execute execute) {
  current->mask = mask;
  current->operands = &operands;
  current->execute = execute;
  wait(State::kCollective, operation, line);
}

template <typename Operands>
inline Operands& operands_of(void* const operands[kWarp], int lane) {
  return *static_cast<Operands*>(operands[lane]);
}

// A static array that a kernel declares __shared__.
struct SharedArray {
  const char* kernel;
  const char* name;
  char* data;
  std::size_t bytes;
};

inline std::vector<SharedArray> shared_arrays;

class SharedRegistration {
 public:
  SharedRegistration(const char* kernel, const char* name, void* data, std::size_t bytes) {
    std::memset(data, kPoison, bytes);
    shared_arrays.push_back({kernel, name, static_cast<char*>(data), bytes});
  }
};

constexpr std::size_t kMaxStaticShared = 48 << 10;
constexpr std::size_t kMaxDynamicShared = 227 << 10;
alignas(1024) inline char dynamic_shared[kMaxDynamicShared];
inline std::size_t dynamic_shared_bytes = 0;

}  // namespace emulated
