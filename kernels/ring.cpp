#include "ring.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "io.h"

namespace lohan_fx {
namespace {

// The kernel writes these words at the same time, so every access is atomic.
std::uint32_t load(std::uint32_t* word) {
  return std::atomic_ref<std::uint32_t>(*word).load(std::memory_order_acquire);
}
void store(std::uint32_t* word, std::uint32_t value) {
  std::atomic_ref<std::uint32_t>(*word).store(value, std::memory_order_release);
}

[[noreturn]] void refuse(const char* step, int error) {
  throw TransferError(std::string("io_uring is refused here: ") + step + ": " +
                          describe_errno(error) + "; use LOHAN_FX_IO=threads",
                      "", -1, error);
}

}  // namespace

Ring::Ring(unsigned entries) {
  io_uring_params params{};
  fd_ = static_cast<int>(::syscall(SYS_io_uring_setup, entries, &params));
  if (fd_ < 0) refuse("io_uring_setup", errno);
  try {
    // Both are as old as IORING_OP_READ (Linux 5.6), or older.
    if ((params.features & IORING_FEAT_SINGLE_MMAP) == 0 || !can_read_and_write())
      refuse("this kernel lacks IORING_OP_READ", ENOSYS);
    rings_bytes_ = std::max(params.sq_off.array + params.sq_entries * sizeof(std::uint32_t),
                            params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
    rings_ = map(rings_bytes_, IORING_OFF_SQ_RING);
    sqes_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
    sqes_ = static_cast<io_uring_sqe*>(map(sqes_bytes_, IORING_OFF_SQES));

    char* base = static_cast<char*>(rings_);
    const auto word = [base](std::uint32_t at) {
      return reinterpret_cast<std::uint32_t*>(base + at);
    };
    sq_head_ = word(params.sq_off.head);
    sq_tail_ = word(params.sq_off.tail);
    sq_array_ = word(params.sq_off.array);
    sq_mask_ = *word(params.sq_off.ring_mask);
    cq_head_ = word(params.cq_off.head);
    cq_tail_ = word(params.cq_off.tail);
    cqes_ = reinterpret_cast<io_uring_cqe*>(base + params.cq_off.cqes);
    cq_mask_ = *word(params.cq_off.ring_mask);
    tail_ = load(sq_tail_);

    // A filter may let io_uring_setup pass and refuse the rest: try a round trip now.
    push().opcode = IORING_OP_NOP;
    if (const int error = enter(1)) refuse("io_uring_enter", error);
    io_uring_cqe completion;
    if (!pop(completion)) refuse("a first operation did not complete", EIO);
  } catch (...) {
    unmap();
    throw;
  }
}

Ring::~Ring() { unmap(); }

void Ring::unmap() {
  if (sqes_ != nullptr) ::munmap(sqes_, sqes_bytes_);
  if (rings_ != nullptr) ::munmap(rings_, rings_bytes_);
  ::close(fd_);
}

void* Ring::map(std::size_t bytes, std::uint64_t what) {
  void* memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_,
                        static_cast<off_t>(what));
  if (memory == MAP_FAILED) refuse("mmap of the rings", errno);
  ::madvise(memory, bytes, MADV_DONTFORK);  // a forked child must not touch our ring
  return memory;
}

bool Ring::can_read_and_write() const {
  constexpr unsigned kOps = 256;
  std::vector<char> memory(sizeof(io_uring_probe) + kOps * sizeof(io_uring_probe_op), 0);
  auto* probe = reinterpret_cast<io_uring_probe*>(memory.data());
  if (::syscall(SYS_io_uring_register, fd_, IORING_REGISTER_PROBE, probe, kOps) < 0) return false;
  const auto supports = [probe](unsigned op) {
    return op <= probe->last_op && (probe->ops[op].flags & IO_URING_OP_SUPPORTED) != 0;
  };
  return supports(IORING_OP_READ) && supports(IORING_OP_WRITE) && supports(IORING_OP_POLL_ADD);
}

io_uring_sqe& Ring::push() {
  const std::uint32_t slot = tail_ & sq_mask_;
  ::memset(&sqes_[slot], 0, sizeof(io_uring_sqe));
  sq_array_[slot] = slot;
  ++tail_;
  return sqes_[slot];
}

int Ring::enter(unsigned wait_for) {
  store(sq_tail_, tail_);
  const std::uint32_t to_submit = tail_ - load(sq_head_);
  const long taken = ::syscall(SYS_io_uring_enter, fd_, to_submit, wait_for, IORING_ENTER_GETEVENTS,
                               nullptr, std::size_t{0});
  return taken < 0 ? errno : 0;
}

bool Ring::pop(io_uring_cqe& completion) {
  const std::uint32_t head = load(cq_head_);
  if (head == load(cq_tail_)) return false;
  completion = cqes_[head & cq_mask_];
  store(cq_head_, head + 1);
  return true;
}

}  // namespace lohan_fx
