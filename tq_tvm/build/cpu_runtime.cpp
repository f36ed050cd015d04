// What the CPU kernels of a library call: a thread pool for parallel loops and scratch memory.
//
// The functions have the names and signatures that TVM's generated code expects. A constructor
// registers them with tvm-ffi, which hands them to this library when it is loaded; where a TVM
// runtime is in the process, its own functions, registered before, stay.
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

extern "C" {
struct TVMParallelGroupEnv {
  void* sync_handle;
  int32_t num_task;
};
typedef int (*ParallelBody)(int task_id, TVMParallelGroupEnv* env, void* data);
int TVMFFIEnvModRegisterContextSymbol(const char* name, void* symbol);
}

namespace {

thread_local bool inside_task = false;

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {
    for (int i = 1; i < threads; ++i) std::thread([this] { Work(); }).detach();
  }

  int Run(ParallelBody body, void* data, int tasks) {
    std::lock_guard<std::mutex> one_at_a_time(launch_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = body;
      data_ = data;
      env_ = {nullptr, tasks};
      failed_ = 0;
      next_ = 0;
      busy_ = threads_ - 1;
      ++generation_;
    }
    start_.notify_all();
    Drain();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    return failed_;
  }

  int threads() const { return threads_; }

 private:
  void Drain() {
    inside_task = true;
    for (int i = next_++; i < env_.num_task; i = next_++) {
      if (body_(i, &env_, data_) != 0) failed_ = -1;
    }
    inside_task = false;
  }

  void Work() {
    uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        start_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
      }
      Drain();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  const int threads_;
  std::mutex launch_, mutex_;
  std::condition_variable start_, done_;
  uint64_t generation_ = 0;
  int busy_ = 0;
  std::atomic<int> next_{0}, failed_{0};
  ParallelBody body_ = nullptr;
  void* data_ = nullptr;
  TVMParallelGroupEnv env_{nullptr, 0};
};

int AvailableCores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(std::thread::hardware_concurrency());
}

std::mutex pool_mutex;
Pool* pool = nullptr;
int wanted_threads = 0;

// After fork the threads of the parent are gone, and a lock may be held for ever: start afresh.
// The old pool leaks on purpose: its memory may be in use by nobody, but never safely freed.
void AfterFork() {
  new (&pool_mutex) std::mutex;
  pool = nullptr;
}

Pool* GetPool() {
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (wanted_threads == 0) wanted_threads = AvailableCores();
  // A pool of another size may still be running tasks for another caller; it is left to sleep.
  if (pool == nullptr || pool->threads() != wanted_threads) pool = new Pool(wanted_threads);
  return pool;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int tq_tvm_set_num_threads(int threads) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  wanted_threads = threads > 0 ? threads : AvailableCores();
  return wanted_threads;
}

static int ParallelLaunch(ParallelBody body, void* data, int tasks) {
  if (inside_task) {
    TVMParallelGroupEnv env{nullptr, 1};
    return body(0, &env, data);
  }
  Pool* workers = GetPool();
  int count = tasks > 0 ? tasks : workers->threads();
  return workers->Run(body, data, count);
}

static int ParallelBarrier(int, TVMParallelGroupEnv*) {
  // Generated code calls this only for parallel regions with barriers, which no kernel here has.
  abort();
}

static void* AllocWorkspace(int, int, uint64_t bytes, int, int) {
  void* memory = nullptr;
  return posix_memalign(&memory, 64, bytes ? bytes : 64) == 0 ? memory : nullptr;
}

static int FreeWorkspace(int, int, void* memory) {
  free(memory);
  return 0;
}

__attribute__((constructor)) static void Register() {
  pthread_atfork(nullptr, nullptr, AfterFork);
  TVMFFIEnvModRegisterContextSymbol("__TVMBackendParallelLaunch",
                                    reinterpret_cast<void*>(ParallelLaunch));
  TVMFFIEnvModRegisterContextSymbol("__TVMBackendParallelBarrier",
                                    reinterpret_cast<void*>(ParallelBarrier));
  TVMFFIEnvModRegisterContextSymbol("__TVMBackendAllocWorkspace",
                                    reinterpret_cast<void*>(AllocWorkspace));
  TVMFFIEnvModRegisterContextSymbol("__TVMBackendFreeWorkspace",
                                    reinterpret_cast<void*>(FreeWorkspace));
}
}
