// The backend for Linux 5.6 and later: one ring and one thread per directory.
#include <errno.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "io.h"
#include "native_thread.h"
#include "ring.h"

namespace lohan_fx {
namespace {

// [Note: one thread owns the ring]
// Submitting a large direct transfer takes a while (the kernel pins its pages), so callers only
// queue it and ring the bell, an eventfd that the ring polls; the owner submits and reaps. The ring
// then needs no lock, no caller is delayed by the disk, and several drives are fed by several
// processors.
class IoUring final : public IoBackend {
 public:
  IoUring(TransferSource& source, unsigned queue_depth)
      : source_(source), queue_depth_(queue_depth), ring_(queue_depth + 1) {
    bell_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (bell_ < 0)
      throw TransferError("cannot make an eventfd: " + describe_errno(errno), "", -1, errno);
    try {
      owner_ = start_thread("lohan-uring", [this] { run(); });
    } catch (...) {
      ::close(bell_);
      throw;
    }
  }

  ~IoUring() override {
    stopping_ = true;
    ring_bell();
    owner_.join();
    ::close(bell_);
  }

  void wake(std::size_t) override { ring_bell(); }

 private:
  static constexpr std::uint64_t kBell = 0;  // user_data of the poll; transfers have their address

  void ring_bell() {
    const std::uint64_t one = 1;
    // Can only fail when the counter is full, and then it rings anyway.
    [[maybe_unused]] const ssize_t written = ::write(bell_, &one, sizeof one);
  }

  void run() {
    listen();
    while (!stopping_ || in_flight_ > 0) {
      while (in_flight_ < queue_depth_) {
        Transfer* transfer = source_.next();
        if (transfer == nullptr) break;
        start(transfer);
      }
      // EINTR, EAGAIN and EBUSY mean "reap, then try again". Anything else would be a broken ring:
      // what the kernel has taken may still write into memory, so it must not be reported as over;
      // whoever waits runs into the deadline and is told what is stuck.
      const int error = ring_.enter(1);
      if (!reap() && error != 0 && error != EINTR)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

  bool reap() {
    io_uring_cqe completion;
    bool any = false;
    for (; ring_.pop(completion); any = true) {
      if (completion.user_data == kBell) {
        std::uint64_t rings;
        [[maybe_unused]] const ssize_t taken = ::read(bell_, &rings, sizeof rings);
        listen();
        continue;
      }
      auto* transfer = reinterpret_cast<Transfer*>(completion.user_data);
      --in_flight_;
      if (Transfer* again = source_.finished(transfer, completion.res)) start(again);
    }
    return any;
  }

  void listen() {
    io_uring_sqe& entry = ring_.push();
    entry.opcode = IORING_OP_POLL_ADD;
    entry.fd = bell_;
    entry.poll_events = POLLIN;
    entry.user_data = kBell;
  }

  void start(Transfer* transfer) {
    io_uring_sqe& entry = ring_.push();
    entry.opcode = transfer->direction == Direction::read ? IORING_OP_READ : IORING_OP_WRITE;
    entry.fd = transfer->fd;
    entry.off = transfer->offset;
    entry.addr = reinterpret_cast<std::uint64_t>(transfer->memory);
    entry.len = static_cast<std::uint32_t>(transfer->bytes);
    entry.user_data = reinterpret_cast<std::uint64_t>(transfer);
    ++in_flight_;
  }

  TransferSource& source_;
  const unsigned queue_depth_;
  Ring ring_;
  int bell_ = -1;
  unsigned in_flight_ = 0;  // transfers, the poll not counted
  std::atomic<bool> stopping_ = false;
  std::thread owner_;  // See [Note: one thread owns the ring]
};

}  // namespace

std::unique_ptr<IoBackend> make_io_uring(TransferSource& source, unsigned queue_depth) {
  return std::make_unique<IoUring>(source, queue_depth);
}

}  // namespace lohan_fx
