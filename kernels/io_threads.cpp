// The backend for kernels that refuse io_uring: a few threads with pread and pwrite.
#include <errno.h>
#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "io.h"
#include "native_thread.h"

namespace lohan_fx {
namespace {

std::int64_t move_bytes(const Transfer& transfer) {
  const auto offset = static_cast<off_t>(transfer.offset);
  const ssize_t moved = transfer.direction == Direction::read
                            ? ::pread(transfer.fd, transfer.memory, transfer.bytes, offset)
                            : ::pwrite(transfer.fd, transfer.memory, transfer.bytes, offset);
  return moved < 0 ? -errno : moved;
}

class IoThreads final : public IoBackend {
 public:
  IoThreads(TransferSource& source, unsigned num_threads) : source_(source) {
    threads_.reserve(num_threads);
    try {
      for (unsigned i = 0; i < num_threads; ++i)
        threads_.push_back(start_thread("lohan-io", [this] { run(); }));
    } catch (...) {
      stop();
      throw;
    }
  }

  ~IoThreads() override { stop(); }

  void wake(std::size_t transfers) override {
    {
      std::lock_guard lock(mutex_);
      waiting_ += transfers;
    }
    transfers > 1 ? work_.notify_all() : work_.notify_one();
  }

 private:
  void run() {
    for (;;) {
      {
        std::unique_lock lock(mutex_);
        work_.wait(lock, [this] { return waiting_ > 0 || stopping_; });
        if (waiting_ == 0) return;
        --waiting_;
      }
      Transfer* transfer = source_.next();
      while (transfer != nullptr) transfer = source_.finished(transfer, move_bytes(*transfer));
    }
  }

  void stop() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  TransferSource& source_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::size_t waiting_ = 0;  // transfers announced by wake() and not yet asked for
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<IoBackend> make_io_threads(TransferSource& source, unsigned num_threads) {
  return std::make_unique<IoThreads>(source, num_threads);
}

}  // namespace lohan_fx
