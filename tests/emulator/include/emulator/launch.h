// The scheduler: clusters one after another, the CTAs of each in turns.
#pragma once

#include <limits>

#include "emulator/cta.h"

namespace emulated {

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
    generic_writes.assign(ctas_.size(), {});
    async_stores.clear();
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
    report();
  }

 private:
  void report() {
    std::string text;
    for (std::size_t rank = 0; rank < ctas_.size(); ++rank) {
      if (ctas_[rank].exited()) continue;
      if (ctas_.size() == 1) ctas_[rank].report();
      text += (text.empty() ? " CTA " : "; CTA ") + std::to_string(rank) +
              ctas_[rank].describe_threads();
    }
    if (text.empty()) return;
    throw KernelError("cluster: its threads must arrive at the same barrier, got" + text +
                      "; look for a thread that does not arrive");
  }

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
    check_finished();
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
