// One io_uring by raw system calls. Used by one thread at a time.
#pragma once

#include <linux/io_uring.h>

#include <cstddef>
#include <cstdint>

namespace lohan_fx {

class Ring {
 public:
  // Throws TransferError when the kernel refuses io_uring or does not know the operations used
  // here.
  explicit Ring(unsigned entries);
  ~Ring();
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // A cleared entry that the next enter() submits. No more than `entries` between two calls of it.
  io_uring_sqe& push();
  // Submits what was pushed and waits for `wait_for` completions. Returns 0 or an errno value; what
  // was not taken then stays pushed.
  int enter(unsigned wait_for);
  // Takes one completion; false when there is none.
  bool pop(io_uring_cqe& completion);

 private:
  void* map(std::size_t bytes, std::uint64_t what);
  bool can_read_and_write() const;
  void unmap();

  int fd_ = -1;
  void* rings_ = nullptr;
  std::size_t rings_bytes_ = 0;
  io_uring_sqe* sqes_ = nullptr;
  std::size_t sqes_bytes_ = 0;
  // Shared with the kernel: it moves sq_head_ and cq_tail_, we move the other two.
  std::uint32_t *sq_head_ = nullptr, *sq_tail_ = nullptr, *sq_array_ = nullptr;
  std::uint32_t *cq_head_ = nullptr, *cq_tail_ = nullptr;
  io_uring_cqe* cqes_ = nullptr;
  std::uint32_t sq_mask_ = 0, cq_mask_ = 0;
  std::uint32_t tail_ = 0;  // our side of sq_tail_
};

}  // namespace lohan_fx
