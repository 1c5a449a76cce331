#include "files.h"

#include <errno.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <unordered_map>

#include "checksums.h"
#include "extent_space.h"
#include "io.h"
#include "io_faults.h"

namespace lohan_fx {
namespace {

constexpr unsigned kMostThreads = 16;  // per directory; more only fight over the processors
constexpr int kMostRetries = 1000;     // of one transfer without a byte moved

double now_s() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(since).count();
}

// Seconds with at least one thing going on.
class BusyClock {
 public:
  void begin() {
    if (going_++ == 0) since_s_ = now_s();
  }
  void end() {
    if (--going_ == 0) total_s_ += now_s() - since_s_;
  }
  double seconds() const { return total_s_ + (going_ > 0 ? now_s() - since_s_ : 0.0); }

 private:
  unsigned going_ = 0;
  double since_s_ = 0, total_s_ = 0;
};

struct Extent {
  std::uint64_t bytes;        // as asked for
  std::vector<Piece> pieces;  // block_bytes each, the last one what remains
  unsigned requests = 0;      // not done yet
  bool released = false;
};

struct Request;

struct Block : Transfer {
  Request* request;
  std::size_t directory;
  std::size_t left;  // bytes still to move; Transfer::bytes may be less
  int retries = 0;
  bool started = false;
};

struct Failure {
  std::string message, path;
  std::int64_t offset;
  int error;
};

// [Note: the life of a request]
// submit() cuts it into blocks and queues them by directory. A block is: queued; in flight (a
// backend took it with next() and has it until finished() returns null); over. The request is done,
// and its ticket forgotten, when its last block is over. Only a failure is kept after that: wait()
// must be able to tell it however late it comes.
struct Request {
  Ticket ticket;
  std::string name;
  Direction direction;
  std::uint64_t bytes;
  std::shared_ptr<Extent> extent;
  std::vector<Block> blocks;
  std::size_t blocks_left;
  double start_s = 0;                // of the first block that was taken; 0 before
  std::unique_ptr<Failure> failure;  // the first one

  std::string describe() const {
    return (direction == Direction::read ? "read of '" : "write of '") + name + "' (" +
           std::to_string(bytes) + " bytes)";
  }
};

std::string choose_backend(const std::string& option) {
  const char* variable = option == "auto" ? std::getenv("LOHAN_FX_IO") : nullptr;
  const bool forced = variable != nullptr && *variable != '\0';
  const std::string name = forced ? variable : option;
  if (name == "io_uring" || name == "threads" || (name == "auto" && !forced)) return name;
  throw std::invalid_argument((forced ? "LOHAN_FX_IO=" : "backend ") + name +
                              " is unknown; use io_uring or threads" + (forced ? "" : " or auto"));
}

FileEngineOptions checked(FileEngineOptions options) {
  if (options.directories.empty())
    throw std::invalid_argument("no directory given; give at least one");
  options.capacities.resize(
      options.capacities.empty() ? options.directories.size() : options.capacities.size(), 0);
  if (options.capacities.size() != options.directories.size())
    throw std::invalid_argument(std::to_string(options.directories.size()) + " directories but " +
                                std::to_string(options.capacities.size()) +
                                " capacities; give one for each");
  if (options.block_bytes == 0 || options.block_bytes % kAlign != 0 ||
      options.block_bytes > (1u << 30))
    throw std::invalid_argument("block_bytes " + std::to_string(options.block_bytes) +
                                " must be a multiple of 4096 up to 2**30");
  if (options.queue_depth == 0 || options.queue_depth > 1024)
    throw std::invalid_argument("queue_depth " + std::to_string(options.queue_depth) +
                                " must be 1 to 1024");
  options.backend = choose_backend(options.backend);
  return options;
}

}  // namespace

struct FileEngine::Impl {
  // One directory: its queue, and the backend that empties it.
  struct Directory final : TransferSource {
    explicit Directory(Impl& engine_) : engine(engine_) {}
    Transfer* next() override { return engine.next(*this); }
    Transfer* finished(Transfer* transfer, std::int64_t result) override {
      return engine.finished(static_cast<Block&>(*transfer), result);
    }

    Impl& engine;
    std::deque<Block*> queue;  // under mutex
    FaultySource faulty{*this, engine.options.faults, engine.fault_counts};
    std::unique_ptr<IoBackend> backend;
  };

  explicit Impl(FileEngineOptions options_)
      : options(checked(std::move(options_))), space(options) {
    for (std::size_t i = 0; i < options.directories.size(); ++i) {
      direct.push_back(space.direct(i));
      directories.push_back(std::make_unique<Directory>(*this));
    }
    start_backends();
  }

  void start_backends() {
    if (options.backend != "threads") {
      try {
        for (auto& directory : directories)
          directory->backend = make_io_uring(directory->faulty, options.queue_depth);
        backend = "io_uring";
        return;
      } catch (const TransferError&) {
        for (auto& directory : directories) directory->backend.reset();
        if (options.backend == "io_uring") throw;
      }
    }
    for (auto& directory : directories)
      directory->backend =
          make_io_threads(directory->faulty, std::min(options.queue_depth, kMostThreads));
    backend = "threads";
  }

  void check_open() const {  // under mutex
    if (closed)
      throw TransferError("the file engine is closed", options.directories.front(), -1, EBADF);
  }

  ExtentId allocate(std::uint64_t bytes) {
    if (bytes == 0 || bytes > (std::uint64_t{1} << 60))
      throw std::invalid_argument("an extent cannot have " + std::to_string(bytes) + " bytes");
    auto extent = std::make_shared<Extent>();
    extent->bytes = bytes;
    extent->pieces = space.take(bytes);
    std::lock_guard lock(mutex);
    check_open();
    allocated_bytes += round_up(bytes);
    extents.emplace(++last_extent, std::move(extent));
    return last_extent;
  }

  const std::shared_ptr<Extent>& find(ExtentId id) const {  // under mutex
    check_open();
    const auto found = extents.find(id);
    if (found == extents.end())
      throw std::invalid_argument("extent " + std::to_string(id) + " does not exist (any more)");
    return found->second;
  }

  void release(ExtentId id) {
    std::lock_guard lock(mutex);
    const std::shared_ptr<Extent> extent = find(id);
    extents.erase(id);
    allocated_bytes -= round_up(extent->bytes);
    extent->released = true;
    if (extent->requests == 0) give(*extent);
  }

  void give(Extent& extent) {
    if (options.verify)
      for (const Piece& piece : extent.pieces)
        checksums.forget(space.fd(piece.directory), piece.offset, round_up(piece.bytes));
    space.give(std::move(extent.pieces));
  }

  // Requests. See [Note: the life of a request]

  Ticket submit(Direction direction, ExtentId id, std::uint64_t offset, char* memory,
                std::size_t bytes, std::string name) {
    auto request = std::make_unique<Request>();
    request->name = std::move(name);
    request->direction = direction;
    request->bytes = bytes;
    if (reinterpret_cast<std::uintptr_t>(memory) % kAlign != 0 || offset % kAlign != 0)
      throw std::invalid_argument(request->describe() +
                                  ": memory and offset must be multiples of 4096");
    std::lock_guard lock(mutex);
    request->extent = find(id);
    const std::uint64_t have = request->extent->bytes;
    if (offset > have || bytes > have - offset)
      throw std::invalid_argument(request->describe() + " at offset " + std::to_string(offset) +
                                  " ends past its extent of " + std::to_string(have) + " bytes");
    if (bytes == 0) return 0;
    cut(*request, offset, memory);
    request->ticket = ++last_ticket;
    ++request->extent->requests;
    std::vector<std::size_t> queued(directories.size(), 0);
    for (Block& block : request->blocks) {
      directories[block.directory]->queue.push_back(&block);
      ++queued[block.directory];
    }
    requests.emplace(request->ticket, std::move(request));
    for (std::size_t i = 0; i < directories.size(); ++i)
      if (queued[i] > 0) directories[i]->backend->wake(queued[i]);
    return last_ticket;
  }

  void cut(Request& request, std::uint64_t offset, char* memory) {
    const std::uint64_t end = offset + round_up(request.bytes);
    while (offset < end) {
      const Piece& piece = request.extent->pieces[offset / options.block_bytes];
      const std::uint64_t skip = offset % options.block_bytes;
      const std::uint64_t now = std::min(piece.bytes - skip, end - offset);
      Block block;
      block.direction = request.direction;
      block.fd = space.fd(piece.directory);
      block.memory = memory;
      block.offset = piece.offset + skip;
      block.bytes = block.left = now;
      block.request = &request;
      block.directory = piece.directory;
      request.blocks.push_back(block);
      offset += now;
      memory += now;
    }
    request.blocks_left = request.blocks.size();
  }

  BusyClock& clock(Direction direction) { return direction == Direction::read ? reading : writing; }

  Transfer* next(Directory& directory) {
    std::lock_guard lock(mutex);
    if (directory.queue.empty()) return nullptr;
    Block* block = directory.queue.front();
    directory.queue.pop_front();
    block->started = true;
    if (block->request->start_s == 0) block->request->start_s = now_s();
    clock(block->direction).begin();
    return block;
  }

  Transfer* finished(Block& block, std::int64_t result) {
    int error = 0;
    std::uint64_t moved = 0;
    if (result < 0) {
      error = static_cast<int>(-result);
      if ((error == EINTR || error == EAGAIN) && ++block.retries <= kMostRetries) {
        if (error == EAGAIN) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        block.bytes = block.left;
        return &block;
      }
    } else if (static_cast<std::size_t>(result) >= block.left) {
      moved = block.left;
    } else {
      // Direct I/O goes on from a multiple of 4096 only: a torn last page is moved again.
      moved = static_cast<std::uint64_t>(result) / kAlign * kAlign;
      block.retries = moved > 0 ? 0 : block.retries + 1;
      if (block.retries > kMostRetries || result == 0) error = EIO;
    }
    if (options.verify && moved > 0) {
      const std::int64_t wrong = compare(block, moved);
      if (wrong >= 0) {
        block.offset = static_cast<std::uint64_t>(wrong);
        over(block, 0, EBADMSG);
        return nullptr;
      }
    }
    block.memory += moved;
    block.offset += moved;
    block.left -= moved;
    block.bytes = block.left;
    if (error == 0 && block.left > 0) {
      std::lock_guard lock(mutex);
      count(block.direction, moved);
      return &block;
    }
    over(block, moved, error);
    return nullptr;
  }

  // Notes what was written; where in the file a read differs from that, or -1.
  std::int64_t compare(const Block& block, std::uint64_t moved) {
    if (block.direction == Direction::read)
      return checksums.first_difference(block.fd, block.offset, block.memory, moved);
    checksums.note(block.fd, block.offset, block.memory, moved);
    return -1;
  }

  void count(Direction direction, std::uint64_t moved) {
    (direction == Direction::read ? bytes_read : bytes_written) += moved;
  }

  void over(Block& block, std::uint64_t moved, int error) {
    std::lock_guard lock(mutex);
    Request& request = *block.request;
    count(block.direction, moved);
    clock(block.direction).end();
    if (error != 0 && !request.failure) {
      const std::string& path = options.directories[block.directory];
      request.failure = std::make_unique<Failure>(
          Failure{request.describe() + " failed at byte " + std::to_string(block.offset) +
                      " of the file in " + path + ": " +
                      (error == EBADMSG && options.verify
                           ? "what was read is not what was written there (checksums differ); "
                             "the disk, its cable or memory is faulty"
                           : describe_errno(error)),
                  path, static_cast<std::int64_t>(block.offset), error});
    }
    if (--request.blocks_left > 0) return;
    Extent& extent = *request.extent;
    if (--extent.requests == 0 && extent.released) give(extent);
    record(request);
    if (request.failure) failures.emplace(request.ticket, std::move(*request.failure));
    requests.erase(request.ticket);
    done_changed.notify_all();
  }

  void record(Request& request) {
    if (options.trace_events == 0) return;
    if (trace.size() == options.trace_events) trace.pop_front();
    trace.push_back({std::move(request.name), request.direction, request.start_s, now_s()});
  }

  bool done(Ticket ticket) const {  // under mutex
    if (ticket > last_ticket)
      throw std::invalid_argument("ticket " + std::to_string(ticket) + " was never given out");
    return requests.find(ticket) == requests.end();
  }

  void wait(Ticket ticket, double timeout_s, const std::function<void()>& poll) {
    using Seconds = std::chrono::duration<double>;
    const auto start = std::chrono::steady_clock::now();
    std::unique_lock lock(mutex);
    while (!done(ticket)) {
      const double left_s = timeout_s - Seconds(std::chrono::steady_clock::now() - start).count();
      if (!(left_s > 0)) throw_late(*requests.at(ticket), timeout_s);
      done_changed.wait_for(lock, Seconds(std::min(left_s, 0.2)));
      if (!poll) continue;
      lock.unlock();
      poll();
      lock.lock();
    }
    const auto found = failures.find(ticket);
    if (found == failures.end()) return;
    const Failure& failure = found->second;
    throw TransferError(failure.message, failure.path, failure.offset, failure.error);
  }

  [[noreturn]] void throw_late(const Request& request, double timeout_s) const {
    const auto late = std::find_if(request.blocks.begin(), request.blocks.end(),
                                   [](const Block& block) { return block.left > 0; });
    const Block& block = late == request.blocks.end() ? request.blocks.back() : *late;
    const std::string& path = options.directories[block.directory];
    char seconds[32];
    std::snprintf(seconds, sizeof seconds, "%g", timeout_s);
    throw TransferError(request.describe() + " is not done after " + seconds +
                            " s: " + std::to_string(request.blocks_left) + " of " +
                            std::to_string(request.blocks.size()) + " blocks are left, one " +
                            (block.started ? "in flight" : "queued") + " in " + path,
                        path, static_cast<std::int64_t>(block.offset), ETIMEDOUT);
  }

  void close() {
    std::lock_guard closing(close_mutex);
    {
      std::unique_lock lock(mutex);
      closed = true;
      extents.clear();
      allocated_bytes = 0;
      done_changed.wait(lock, [this] { return requests.empty(); });
    }
    for (auto& directory : directories) directory->backend.reset();
    space.close();
  }

  const FileEngineOptions options;
  const pid_t owner = ::getpid();
  ExtentSpace space;
  FaultCounts fault_counts;
  Checksums checksums;
  const char* backend = "";
  std::vector<bool> direct;
  std::mutex close_mutex;  // taken before mutex

  mutable std::mutex mutex;  // everything below; no disk is waited for under it
  std::condition_variable done_changed;
  bool closed = false;
  std::unordered_map<ExtentId, std::shared_ptr<Extent>> extents;
  std::unordered_map<Ticket, std::unique_ptr<Request>> requests;  // not done yet
  std::unordered_map<Ticket, Failure> failures;
  ExtentId last_extent = 0;
  Ticket last_ticket = 0;
  std::uint64_t allocated_bytes = 0, bytes_read = 0, bytes_written = 0;
  BusyClock reading, writing;
  std::deque<Event> trace;

  // Last, so that their threads end before anything that they use.
  std::vector<std::unique_ptr<Directory>> directories;
};

FileEngine::FileEngine(FileEngineOptions options)
    : impl_(std::make_unique<Impl>(std::move(options))) {}

FileEngine::~FileEngine() {
  if (!impl_) return;
  if (impl_->owner != ::getpid()) {
    // A forked child has none of the threads, and the ring and the files are its parent's.
    [[maybe_unused]] Impl* left_alone = impl_.release();
    return;
  }
  impl_->close();
}

void FileEngine::close() { impl_->close(); }

ExtentId FileEngine::allocate(std::uint64_t bytes) { return impl_->allocate(bytes); }

void FileEngine::release(ExtentId extent) { impl_->release(extent); }

Ticket FileEngine::read(ExtentId extent, std::uint64_t offset, void* to, std::size_t bytes,
                        std::string name) {
  return impl_->submit(Direction::read, extent, offset, static_cast<char*>(to), bytes,
                       std::move(name));
}

Ticket FileEngine::write(ExtentId extent, std::uint64_t offset, const void* from, std::size_t bytes,
                         std::string name) {
  // A write only reads this memory; a Transfer serves both directions.
  auto* memory = static_cast<char*>(const_cast<void*>(from));
  return impl_->submit(Direction::write, extent, offset, memory, bytes, std::move(name));
}

bool FileEngine::done(Ticket ticket) const {
  std::lock_guard lock(impl_->mutex);
  return impl_->done(ticket);
}

void FileEngine::wait(Ticket ticket, double timeout_s, const std::function<void()>& poll) {
  impl_->wait(ticket, timeout_s, poll);
}

const char* FileEngine::backend() const { return impl_->backend; }
const std::vector<std::string>& FileEngine::directories() const {
  return impl_->options.directories;
}
std::vector<bool> FileEngine::direct() const { return impl_->direct; }
std::size_t FileEngine::block_bytes() const { return impl_->options.block_bytes; }
unsigned FileEngine::queue_depth() const { return impl_->options.queue_depth; }

std::uint64_t FileEngine::allocated_bytes() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->allocated_bytes;
}

std::uint64_t FileEngine::bytes_read() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->bytes_read;
}

std::uint64_t FileEngine::bytes_written() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->bytes_written;
}

double FileEngine::read_busy_s() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->reading.seconds();
}

double FileEngine::write_busy_s() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->writing.seconds();
}

std::vector<FileEngine::Event> FileEngine::take_trace() {
  std::lock_guard lock(impl_->mutex);
  std::vector<Event> events(std::make_move_iterator(impl_->trace.begin()),
                            std::make_move_iterator(impl_->trace.end()));
  impl_->trace.clear();
  return events;
}

}  // namespace lohan_fx
