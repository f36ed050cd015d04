// What the CPU kernels of a library call: a thread pool for parallel loops, and scratch memory.
//
// TVM's generated code calls through pointers, such as __TVMBackendParallelLaunch, that are weak
// and null, and that tvm-ffi fills in at load time if somebody registered a value: a TVM runtime
// does. Here they are defined, strong and hidden: the linker takes these definitions, and nobody
// outside can change them. So a library brings its own pool, needs no TVM, runs the same with one
// in the process, and leaves what TVM registered, and other libraries, alone.
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#define TQ_HIDDEN extern "C" __attribute__((visibility("hidden")))
#define TQ_PUBLIC extern "C" __attribute__((visibility("default")))

namespace {

struct ParallelGroupEnv {
  void* sync_handle;
  int32_t num_task;
};
using ParallelBody = int (*)(int task_id, ParallelGroupEnv* env, void* data);

// Tasks a thread takes on average: loops over ragged sequences have tasks of unequal length.
constexpr int kTasksPerThread = 4;

// Looks at the generation counter before a thread goes to sleep, some tens of microseconds:
// one kernel often has two parallel loops, and waking a thread costs more than a short loop.
constexpr int kSpins = 4000;

thread_local bool inside_task = false;

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

int AvailableCores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

class Pool {
 public:
  explicit Pool(int threads)
      : pid(getpid()), wanted(threads), spins_(threads <= AvailableCores() ? kSpins : 0) {
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { Work(); });
    } catch (const std::system_error&) {
      // No more threads to be had: the loops run on those that there are.
    }
  }

  int Run(ParallelBody body, void* data, int tasks) {
    std::lock_guard<std::mutex> one_at_a_time(launch_);
    body_ = body;
    data_ = data;
    env_ = {nullptr, tasks > 0 ? tasks : (static_cast<int>(workers_.size()) + 1) * kTasksPerThread};
    status_ = 0;
    error_ = nullptr;
    next_ = 0;
    busy_ = static_cast<int>(workers_.size());
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ++generation_;
    }
    start_.notify_all();
    Drain();
    for (int i = 0; i < spins_ && busy_ != 0; ++i) Pause();
    if (busy_ != 0) {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, [this] { return busy_ == 0; });
    }
    // An error is raised per thread: hand the first one over to the caller's.
    if (error_ != nullptr) TVMFFIErrorSetRaised(error_);
    return status_;
  }

  // Ends the workers. The pool itself is never freed: at exit, another thread may be inside it.
  void Close() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
      ++generation_;
    }
    start_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  const pid_t pid;
  const int wanted;

 private:
  void Drain() {
    inside_task = true;
    for (int i = next_++; i < env_.num_task; i = next_++) {
      int status = body_(i, &env_, data_);
      if (status == 0) continue;
      TVMFFIObjectHandle error = nullptr;
      TVMFFIErrorMoveFromRaised(&error);
      std::lock_guard<std::mutex> lock(mutex_);
      if (status_ == 0) {
        status_ = status;
        error_ = error;
      } else if (error != nullptr) {
        TVMFFIObjectDecRef(error);
      }
    }
    inside_task = false;
  }

  void Work() {
    uint64_t seen = 0;
    for (;;) {
      for (int i = 0; i < spins_ && generation_ == seen; ++i) Pause();
      if (generation_ == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        start_.wait(lock, [&] { return generation_ != seen; });
      }
      seen = generation_;
      if (closed_) return;
      Drain();
      if (--busy_ == 0) {
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_one();
      }
    }
  }

  const int spins_;
  std::vector<std::thread> workers_;
  std::mutex launch_, mutex_;
  std::condition_variable start_, done_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<bool> closed_{false};
  std::atomic<int> busy_{0}, next_{0};
  ParallelBody body_ = nullptr;
  void* data_ = nullptr;
  ParallelGroupEnv env_{nullptr, 0};
  int status_ = 0;
  TVMFFIObjectHandle error_ = nullptr;
};

// A plain pointer: the constructor and destructor of a global would run at load and at exit.
std::atomic<Pool*> pool{nullptr};
std::atomic<int> wanted_threads{0};
pthread_mutex_t pool_mutex = PTHREAD_MUTEX_INITIALIZER;
std::atomic<pid_t> pool_owner{0};

Pool* GetPool() {
  Pool* current = pool;
  const pid_t pid = getpid();
  const int wanted = wanted_threads;
  if (current != nullptr && current->pid == pid && current->wanted == wanted) return current;
  if (pool_owner.exchange(pid) != pid) {
    // After fork the parent's threads are gone, and the lock may have been held by one of them.
    pthread_mutex_t fresh = PTHREAD_MUTEX_INITIALIZER;
    pool_mutex = fresh;
  }
  pthread_mutex_lock(&pool_mutex);
  current = pool;
  if (current == nullptr || current->pid != pid || current->wanted != wanted_threads) {
    // A pool of another size stays: it may be running another caller's tasks. It sleeps.
    if (wanted_threads == 0) wanted_threads = AvailableCores();
    pool = current = new Pool(wanted_threads);
  }
  pthread_mutex_unlock(&pool_mutex);
  return current;
}

int ParallelLaunch(ParallelBody body, void* data, int tasks) {
  if (inside_task) {
    ParallelGroupEnv env{nullptr, 1};
    return body(0, &env, data);
  }
  return GetPool()->Run(body, data, tasks);
}

int ParallelBarrier(int, ParallelGroupEnv* env) {
  if (env->num_task <= 1) return 0;
  // Needs every task on a thread of its own, and no schedule here asks for it.
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", "tq_tvm: barriers in parallel loops are absent");
  return -1;
}

void* AllocWorkspace(int, int, uint64_t bytes, int, int) {
  void* memory = nullptr;
  return posix_memalign(&memory, 64, bytes ? bytes : 64) == 0 ? memory : nullptr;
}

int FreeWorkspace(int, int, void* memory) {
  free(memory);
  return 0;
}

// When the library is unloaded, or the process ends, no thread may be left in its code.
__attribute__((destructor)) void Unload() {
  Pool* current = pool.exchange(nullptr);
  if (current != nullptr && current->pid == getpid()) current->Close();
}

}  // namespace

TQ_HIDDEN void* __TVMBackendParallelLaunch;
void* __TVMBackendParallelLaunch = reinterpret_cast<void*>(ParallelLaunch);
TQ_HIDDEN void* __TVMBackendParallelBarrier;
void* __TVMBackendParallelBarrier = reinterpret_cast<void*>(ParallelBarrier);
TQ_HIDDEN void* __TVMBackendAllocWorkspace;
void* __TVMBackendAllocWorkspace = reinterpret_cast<void*>(AllocWorkspace);
TQ_HIDDEN void* __TVMBackendFreeWorkspace;
void* __TVMBackendFreeWorkspace = reinterpret_cast<void*>(FreeWorkspace);

// Sets the threads of parallel loops from the next one on; 0 or less: one a core of the affinity
// mask. Returns their number.
TQ_PUBLIC int tq_tvm_set_num_threads(int threads) {
  return wanted_threads = threads > 0 ? threads : AvailableCores();
}
