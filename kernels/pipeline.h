// Optimizer jobs, one after another: read a bucket's state from SSD, update it, write it back.
//
// [Note: the order of reads and writes]
// A job whose state is on SSD borrows one of the state buffers from the start of its read to the end of
// its write. Optimized: a read starts as soon as a buffer is free, so the next job's read goes ahead of
// this job's write, and that write runs beside the next job's update; two buffers are enough for the
// overlap. Naive: one job is read, updated and written before anything of the next one starts. The
// numbers are the same; only the time differs.
//
// [Note: whose turn it is]
// Naive: the job submitted first. Optimized: the first job that passes through a state buffer, as soon as
// it can be updated, since the next read waits for its buffer. Else, of the jobs whose gradients have
// arrived, that of the lowest rank. A backward ends with the layers that the next forward begins with:
// ranked by their first use, they are updated at once, and what is left over when the backward ends
// is updated beside the next forward instead of before it. Gradients arrive in the order of submission, so
// the search ends at the first that has not.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "adam_job.h"
#include "files.h"
#include "thread_pool.h"

namespace lohan_fx {

struct StateBuffer {
  void* data = nullptr;  // 4096-byte aligned
  std::size_t bytes = 0;
};

enum class PipelineMode { optimized, naive };

struct PipelineOptions {
  unsigned num_threads = 0;        // of the update; 0 = all usable CPUs
  PipelineMode mode = PipelineMode::optimized;
  double timeout_s = 600.;         // for one job's read, write, or wait for its events
  int cuda_device = 0;             // whose context the events belong to
  std::size_t trace_events = 1u << 16;  // kept for take_trace(); newest win
};

// Totals since construction. Seconds of different lanes overlap.
struct PipelineStats {
  double adam_s = 0.;        // updating
  double read_s = 0.;        // at least one job being read
  double write_s = 0.;       // a job being written
  double read_wait_s = 0.;   // nothing to update, the next job's state not read yet
  double event_wait_s = 0.;  // nothing to update, the next job's events not complete
  std::uint64_t params = 0;  // elements updated
  std::uint64_t jobs = 0;    // finished, the failed and cancelled ones left out
};

// Thread-safe. Jobs are updated in the order of [Note: whose turn it is]; of one rank, in the order they
// were submitted. Two jobs with the same name, or that share bytes on SSD, keep their order and never
// overlap in time.
class AdamPipeline {
 public:
  struct Event {
    std::string name;  // the job's
    const char* lane;  // "ssd_read", "cpu_adam" or "ssd_write"
    double start_s, end_s;  // CLOCK_MONOTONIC
  };

  AdamPipeline(PipelineOptions options, std::shared_ptr<FileEngine> engine,
               std::vector<StateBuffer> buffers);
  ~AdamPipeline();  // close()
  AdamPipeline(const AdamPipeline&) = delete;
  AdamPipeline& operator=(const AdamPipeline&) = delete;

  // Only while no job is in flight.
  void set_state_buffers(std::vector<StateBuffer> buffers);

  // Throws std::invalid_argument for a job that makes no sense or fits no state buffer. Tickets grow
  // by one.
  Ticket submit(AdamJob job);

  // Drops a job whose update has not begun and that takes no state buffer: it is done soon, without
  // failure, its arrays untouched, and counts nowhere. Leaves any other job alone. Never waits for an update.
  bool cancel(Ticket ticket);

  // Done: the new weights are in host memory (if they have a place there) and everything on SSD is
  // written. A failed job is done; wait() then throws what went wrong, as often as it is called.
  bool done(Ticket ticket) const;
  // The new weights are in host memory; the write-back may still be under way.
  bool weights_ready(Ticket ticket) const;

  // Grows whenever new weights are in host memory and whenever a job is done.
  std::uint64_t progress() const;

  // Throw TransferError, naming the job, if it failed or is not there after timeout_s seconds.
  // `between` is called several times a second meanwhile and may throw.
  void wait(Ticket ticket, double timeout_s, const std::function<void()>& between = {}) const;
  void wait_weights(Ticket ticket, double timeout_s, const std::function<void()>& between = {}) const;
  // Until the new weights of one of them are in host memory, or it has failed. Throws for the deadline only.
  void wait_any_weights(const std::vector<Ticket>& tickets, double timeout_s,
                        const std::function<void()>& between = {}) const;
  // Waits for all jobs. Once a job has failed every drain throws: state may be lost.
  void drain(double timeout_s, const std::function<void()>& between = {}) const;

  // Finishes the jobs under way, drops those whose update has not begun, joins the threads.
  void close();

  PipelineStats stats() const;
  std::vector<Event> take_trace();

 private:
  struct Task;
  struct Buffer;
  using TaskPtr = std::shared_ptr<Task>;

  void read_loop();
  void adam_loop();
  void write_loop();

  void start_reads();  // these with mutex_ held
  bool conflicts(const Task& task) const;
  Buffer* free_buffer();
  void finish(const TaskPtr& task);
  void changed();
  const Task* find(Ticket ticket) const;
  void record(const Task& task, const char* lane, double start_s, double end_s);

  bool poll_events(Task& task);
  bool has_arrived(const TaskPtr& task, bool& polling, std::unique_lock<std::mutex>& lock);
  TaskPtr next_update(const std::vector<TaskPtr>& waiting, bool& polling,
                      std::unique_lock<std::mutex>& lock);
  void update(Task& task);
  void wait_all(Task& task);
  void wait_until(const std::function<bool()>& reached, const std::function<std::string()>& missed,
                  double timeout_s, const std::function<void()>& between,
                  std::unique_lock<std::mutex>& lock) const;
  void wait_for(Ticket ticket, bool weights_only, double timeout_s,
                const std::function<void()>& between) const;

  const PipelineOptions options_;
  const std::shared_ptr<FileEngine> engine_;
  ThreadPool pool_;

  mutable std::mutex mutex_;
  mutable std::condition_variable change_;
  std::uint64_t changes_ = 0;
  std::uint64_t progress_ = 0;
  std::deque<TaskPtr> tasks_;    // all that are not done, in ticket order
  std::deque<TaskPtr> reading_;  // in the order their reads were issued
  std::deque<TaskPtr> writing_;  // updated, in order
  std::vector<std::unique_ptr<Buffer>> buffers_;
  std::map<Ticket, TransferError> failures_;
  Ticket last_ticket_ = 0;
  const Task* polled_ = nullptr;  // whose events the Adam thread is asking for, without mutex_
  bool stopping_ = false;
  bool adam_ended_ = false;
  PipelineStats stats_;
  std::deque<Event> trace_;

  bool cuda_entered_ = false;  // of the Adam thread alone

  std::mutex close_mutex_;
  std::thread reader_, adam_, writer_;
};

}  // namespace lohan_fx
