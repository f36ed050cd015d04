// The threads of one CTA, and how they wait for one another.
//
// A thread that has to wait notes down at what and suspends; the scheduler finds groups of lanes
// that have all arrived at the same operation, performs it for the group, and resumes them. A warp
// in which no lane can go on is a bug of the kernel and reported as such.
//
// The CTAs of a cluster take turns. Static arrays and dynamic shared memory are those of the CTA
// that runs; what the others hold is kept aside, and is what their peers read.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <memory>
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
constexpr int kBarriers = 16;
constexpr unsigned kPoison = 0xFF;

class KernelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class State {
  kReady, kCollective, kActiveMask, kBarrier, kCluster, kMbarrier, kProducts, kExited
};

// Performs an operation for the lanes in `mask`, whose operands are given.
using Execute = void (*)(void* const operands[kWarp], unsigned mask);

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, valid;
  long group;
};

// Accumulators of products under way: registers, which hold poison, and what they will hold.
struct Accumulators {
  std::vector<float*> registers;
  std::vector<float> values;
};

// An operand of wgmma: a descriptor of a matrix in shared memory, or a thread's part of one.
struct Operand {
  uint64_t descriptor;
  bool transposed;
  bool in_registers;
  uint32_t registers[4];
};

// A product under way, as one thread of its warpgroup has issued it.
struct Product {
  const char* name;
  int line;
  Operand a, b;
  bool accumulate;
  long group;
  std::shared_ptr<Accumulators> sums;
  void (*perform)(const std::vector<Product*>& shares);
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
  // barrier.cluster: how often it has arrived, and whether it has still to wait.
  int arrivals = 0;
  bool arrived = false;
  // Line of the call of the helper that it is in, 0 outside of helpers.
  int call_site = 0;
  // cp.async: copies in flight, and the group that the next ones belong to.
  std::vector<Copy> copies;
  long group = 0;
  // bar.arrive: the counts given at barriers that are not complete yet, 0 where it has not arrived.
  int arrived_at[kBarriers] = {};
  // mbarriers: what it waits for, what that held last, and how often a test has failed in a row.
  const void* mbarrier = nullptr;
  unsigned parity = 0;
  uint64_t mbarrier_word = 0;
  int failed_tests = 0;
  // wgmma: products under way, how many of them are performed, the group that the next ones belong
  // to, the one that it waits for, and whether registers are fenced.
  std::deque<Product> products;
  std::size_t performed = 0;
  long product_group = 0, awaited_group = 0;
  bool registers_fenced = false;
  // fence.proxy.async: how many.
  long proxy_fences = 0;
  std::string error;

  // Forgets the last kernel.
  void start(int lane_, const uint3& index_) {
    state = State::kReady;
    lane = lane_;
    index = index_;
    arrivals = 0;
    arrived = false;
    call_site = 0;
    copies.clear();
    group = 0;
    std::memset(arrived_at, 0, sizeof(arrived_at));
    failed_tests = 0;
    products.clear();
    performed = 0;
    product_group = 0;
    registers_fenced = false;
    proxy_fences = 0;
  }
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
// Dynamic shared memory begins behind the static arrays of its kernel, at the alignment that it is
// declared with: an address is a distance from where shared memory begins.
alignas(1024) inline char shared_memory[kMaxStaticShared + kMaxDynamicShared];
inline char* dynamic_shared = shared_memory;
inline std::size_t dynamic_shared_bytes = 0;

struct SharedSize {
  std::size_t alignment, bytes;
};

inline char* dynamic_shared_behind(std::initializer_list<SharedSize> arrays, std::size_t alignment) {
  std::size_t end = 0;
  auto align = [&end](std::size_t to) { end = (end + to - 1) / to * to; };
  for (const SharedSize& array : arrays) align(array.alignment), end += array.bytes;
  align(alignment);
  return dynamic_shared = shared_memory + end;
}

// What one CTA of a cluster holds in shared memory while others run.
struct SharedImage {
  std::vector<std::vector<char>> arrays;
  std::vector<char> dynamic;
  bool exited = false;
};

inline std::vector<SharedImage> images;
inline unsigned cluster_rank = 0;

// Keeps what the CTA that runs has in shared memory.
inline void save_shared(SharedImage& image) {
  image.arrays.resize(shared_arrays.size());
  for (std::size_t i = 0; i < shared_arrays.size(); ++i) {
    image.arrays[i].assign(shared_arrays[i].data, shared_arrays[i].data + shared_arrays[i].bytes);
  }
  image.dynamic.assign(dynamic_shared, dynamic_shared + dynamic_shared_bytes);
}

// Puts it back; what was never written is poison.
inline void restore_shared(const SharedImage& image) {
  for (std::size_t i = 0; i < shared_arrays.size(); ++i) {
    if (i < image.arrays.size()) {
      std::memcpy(shared_arrays[i].data, image.arrays[i].data(), shared_arrays[i].bytes);
    } else {
      std::memset(shared_arrays[i].data, kPoison, shared_arrays[i].bytes);
    }
  }
  if (image.dynamic.empty()) {
    std::memset(shared_memory, kPoison, sizeof(shared_memory));
  } else {
    std::memcpy(dynamic_shared, image.dynamic.data(), dynamic_shared_bytes);
  }
}

}  // namespace emulated
