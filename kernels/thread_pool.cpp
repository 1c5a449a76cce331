#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <system_error>

#if defined(__linux__)
#include <sched.h>
#endif
#include <unistd.h>

#include "native_thread.h"

namespace lohan_fx {

unsigned usable_cpus() {
#if defined(__linux__)
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof(cpus), &cpus) == 0) {
    const int count = CPU_COUNT(&cpus);
    if (count > 0) return static_cast<unsigned>(count);
  }
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

struct ThreadPool::Work {
  const std::function<void(std::size_t)>& task;
  const std::size_t num_tasks;
  std::atomic<std::size_t> next{0};

  void take_all() {
    for (;;) {
      const std::size_t index = next.fetch_add(1, std::memory_order_relaxed);
      if (index >= num_tasks) return;
      task(index);
    }
  }
};

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(std::size_t num_tasks, unsigned num_threads,
                     const std::function<void(std::size_t)>& task) {
  if (num_tasks == 0) return;
  if (num_threads == 0) num_threads = usable_cpus();
  auto helpers = static_cast<unsigned>(std::min<std::size_t>(num_threads, num_tasks) - 1);
  Work work{task, num_tasks};
  if (helpers == 0) return work.take_all();

  const std::lock_guard one_caller(one_caller_);
  {
    const std::lock_guard lock(mutex_);
    try {
      while (threads_.size() < helpers)
        threads_.push_back(start_thread("lohan-adam", [this] { work_loop(); }));
    } catch (const std::system_error&) {  // at the limit of threads: slower, but just as right
      helpers = static_cast<unsigned>(threads_.size());
    }
    work_ = &work;
    ++run_;
    helpers_wanted_ = helpers;
  }
  wake_.notify_all();
  work.take_all();
  std::unique_lock lock(mutex_);
  work_ = nullptr;
  idle_.wait(lock, [this] { return helpers_busy_ == 0; });
}

void ThreadPool::work_loop() {
  std::uint64_t seen = 0;
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return stopping_ || (work_ != nullptr && run_ != seen); });
    if (stopping_) return;
    seen = run_;
    if (helpers_wanted_ == 0) continue;
    --helpers_wanted_;
    ++helpers_busy_;
    Work* const work = work_;
    lock.unlock();
    work->take_all();
    lock.lock();
    if (--helpers_busy_ == 0) idle_.notify_all();
  }
}

ThreadPool& shared_pool() {
  // Never destroyed: at process exit its threads sleep, and joining them after a fork would hang.
  static std::mutex mutex;
  static ThreadPool* pool = nullptr;
  static pid_t owner = 0;
  const std::lock_guard lock(mutex);
  if (pool == nullptr || owner != getpid()) {
    pool = new ThreadPool;
    owner = getpid();
  }
  return *pool;
}

}  // namespace lohan_fx
