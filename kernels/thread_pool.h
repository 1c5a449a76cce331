// Threads that share out the pieces of one piece of work, and sleep in between.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace lohan_fx {

unsigned usable_cpus();  // those this process may run on, at least 1

class ThreadPool {
 public:
  ThreadPool() = default;
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Calls task(0) ... task(num_tasks - 1), each once, in any order, on at most num_threads threads
  // (0: usable_cpus()), the calling one included, and returns when all have returned. Threads are
  // started when first needed. Tasks must not throw. A second caller waits for the first.
  void run(std::size_t num_tasks, unsigned num_threads, const std::function<void(std::size_t)>& task);

 private:
  struct Work;
  void work_loop();

  std::mutex one_caller_;
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  std::vector<std::thread> threads_;
  Work* work_ = nullptr;      // null between runs: a thread that wakes late finds nothing to join
  std::uint64_t run_ = 0;     // so that nobody joins one run twice
  unsigned helpers_wanted_ = 0;
  unsigned helpers_busy_ = 0;
  bool stopping_ = false;
};

// The pool of calls that bring none. A forked child, where no thread survives, gets a fresh one.
ThreadPool& shared_pool();

}  // namespace lohan_fx
