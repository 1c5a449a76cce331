#include "pipeline.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <utility>

#include "cuda_driver.h"
#include "native_thread.h"
#include "pipeline_task.h"

namespace lohan_fx {

AdamPipeline::AdamPipeline(PipelineOptions options, std::shared_ptr<FileEngine> engine,
                           std::vector<StateBuffer> buffers)
    : options_(options), engine_(std::move(engine)) {
  active_adam();  // throws for a wrong LOHAN_FX_ISA here, not on a thread
  set_state_buffers(std::move(buffers));
  try {
    reader_ = start_thread("lohan-opt-read", [this] { read_loop(); });
    adam_ = start_thread("lohan-opt-adam", [this] { adam_loop(); });
    writer_ = start_thread("lohan-opt-write", [this] { write_loop(); });
  } catch (...) {
    close();
    throw;
  }
}

AdamPipeline::~AdamPipeline() { close(); }

void AdamPipeline::close() {
  const std::lock_guard one(close_mutex_);
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    changed();
  }
  for (std::thread* thread : {&adam_, &reader_}) {
    if (thread->joinable()) thread->join();
  }
  {
    const std::lock_guard lock(mutex_);
    adam_ended_ = true;
    changed();
  }
  if (writer_.joinable()) writer_.join();
}

void AdamPipeline::set_state_buffers(std::vector<StateBuffer> buffers) {
  for (const StateBuffer& buffer : buffers)
    if (buffer.data == nullptr || !page_aligned(buffer.data) || buffer.bytes == 0)
      throw std::invalid_argument("a state buffer must be 4096-byte aligned and not empty");
  const std::lock_guard lock(mutex_);
  if (!tasks_.empty())
    throw std::invalid_argument("state buffers cannot be replaced while job '" +
                                tasks_.front()->job.name + "' is in flight; drain() first");
  for (const auto& buffer : buffers_)
    for (const Ticket ticket : buffer->stuck)
      if (!engine_->done(ticket))
        throw std::invalid_argument("a state buffer is still in the hands of a transfer that timed out");
  buffers_.clear();
  for (const StateBuffer& buffer : buffers) {
    buffers_.push_back(std::make_unique<Buffer>());
    buffers_.back()->memory = buffer;
  }
}

Ticket AdamPipeline::submit(AdamJob job) {
  std::erase(job.ready_events, std::uintptr_t{0});
  validate(job, engine_ != nullptr);
  auto task = std::make_shared<Task>();
  for (const AdamStep& step : job.groups) task->factors.emplace_back(step);
  for (std::size_t index = 0; index < job.segments.size(); ++index) {
    const Segment& segment = job.segments[index];
    for (std::size_t at = 0; at < segment.numel; at += kAdamPiece)
      task->pieces.push_back({segment.offset + at,
                              segment.offset + std::min(segment.numel, at + kAdamPiece), segment.group,
                              index, segment.add});
  }
  const std::size_t bytes = buffer_bytes(job);
  for (const Array& array : arrays_of(job)) task->writes |= array.place->extent != 0;
  task->needs_buffer = bytes > 0;
  task->events = std::move(job.ready_events);
  task->events_done = task->events.empty();
  task->job = std::move(job);

  const std::lock_guard lock(mutex_);
  if (stopping_) throw std::invalid_argument("this pipeline is closed");
  if (task->needs_buffer) {
    std::size_t smallest = buffers_.empty() ? 0 : SIZE_MAX;
    for (const auto& buffer : buffers_) smallest = std::min(smallest, buffer->memory.bytes);
    if (bytes > smallest)
      throw std::invalid_argument("optimizer job '" + task->job.name + "' takes " +
                                  std::to_string(bytes) + " bytes of state buffer; the smallest has " +
                                  std::to_string(smallest));
    task->stage = Stage::queued;
  }
  task->ticket = ++last_ticket_;
  tasks_.push_back(task);
  start_reads();
  changed();
  return task->ticket;
}

bool AdamPipeline::cancel(Ticket ticket) {
  const std::lock_guard lock(mutex_);
  find(ticket);  // throws for an unknown one
  const auto at = std::find_if(tasks_.begin(), tasks_.end(),
                               [&](const TaskPtr& task) { return task->ticket == ticket; });
  if (at == tasks_.end() || (*at)->needs_buffer || (*at)->stage != Stage::ready) return false;
  const TaskPtr task = *at;
  task->cancelled = true;
  // Once a job is done, its events may be destroyed: while they are looked at, the Adam thread finishes it.
  if (task.get() != polled_) finish(task);
  return true;
}

// ---- with mutex_ held ----

void AdamPipeline::changed() {
  ++changes_;
  change_.notify_all();
}

bool AdamPipeline::conflicts(const Task& task) const {
  for (const TaskPtr& earlier : tasks_) {
    if (earlier.get() == &task) return false;
    if (earlier->job.name == task.job.name) return true;
    if (earlier->writes && task.writes && share_bytes(earlier->job, task.job)) return true;
  }
  return false;
}

AdamPipeline::Buffer* AdamPipeline::free_buffer() {
  for (const auto& buffer : buffers_) {
    std::erase_if(buffer->stuck, [&](Ticket ticket) { return engine_->done(ticket); });
    if (!buffer->taken && buffer->stuck.empty()) return buffer.get();
  }
  return nullptr;
}

// See [Note: the order of reads and writes].
void AdamPipeline::start_reads() {
  for (const TaskPtr& task : tasks_) {
    if (task->stage != Stage::queued) continue;
    if (stopping_) return;
    if (options_.mode == PipelineMode::naive && (task != tasks_.front() || !task->events_done)) return;
    if (conflicts(*task)) return;
    Buffer* const buffer = free_buffer();
    if (buffer == nullptr) return;
    buffer->taken = true;
    task->buffer = buffer;
    task->stage = Stage::reading;
    task->io_start_s = now_s();
    task->attempt([&] {
      for (const Array& array : arrays_of(task->job))
        if (array.read && array.place->host == nullptr)
          task->io.push_back(engine_->read(array.place->extent, array.place->offset,
                                           task->memory_of(*array.place), array.bytes,
                                           task->job.name + " " + array.what));
    });
    reading_.push_back(task);
  }
}

void AdamPipeline::record(const Task& task, const char* lane, double start_s, double end_s) {
  if (options_.trace_events == 0) return;
  if (trace_.size() == options_.trace_events) trace_.pop_front();
  trace_.push_back({task.job.name, lane, start_s, end_s});
}

void AdamPipeline::finish(const TaskPtr& task) {
  task->stage = Stage::done;
  if (task->buffer != nullptr) task->buffer->taken = false;
  if (task->failure && !task->cancelled)
    failures_.emplace(task->ticket, *task->failure);
  else if (!task->cancelled)
    ++stats_.jobs;
  ++progress_;
  std::erase(tasks_, task);
  start_reads();
  changed();
}

// ---- the three threads ----

// Waits for the task's reads or writes. Called without mutex_; the stage makes the task ours.
void AdamPipeline::wait_all(Task& task) {
  const double deadline_s = task.io_start_s + options_.timeout_s;
  std::vector<Ticket> stuck;
  for (const Ticket ticket : task.io) {
    task.attempt([&] { engine_->wait(ticket, std::max(0., deadline_s - now_s())); });
    if (task.failure && !engine_->done(ticket)) stuck.push_back(ticket);
  }
  task.io.clear();
  if (stuck.empty() || task.buffer == nullptr) return;
  const std::lock_guard lock(mutex_);
  task.buffer->stuck = std::move(stuck);
}

void AdamPipeline::read_loop() {
  std::unique_lock lock(mutex_);
  double busy_until_s = 0.;
  for (;;) {
    change_.wait(lock, [&] { return !reading_.empty() || stopping_; });
    if (reading_.empty()) return;
    const TaskPtr task = reading_.front();
    lock.unlock();
    wait_all(*task);
    const double end_s = now_s();
    lock.lock();
    reading_.pop_front();
    record(*task, "ssd_read", task->io_start_s, end_s);
    // Reads are issued ahead: the seconds of two that overlap count once.
    stats_.read_s += end_s - std::max(task->io_start_s, busy_until_s);
    busy_until_s = end_s;
    if (stopping_) task->fail("the pipeline was closed before its update");
    if (task->failure) {
      finish(task);
    } else {
      task->stage = Stage::ready;
      changed();
    }
  }
}

// True when the task's events are complete, or one has failed it. Without mutex_: a driver call can
// take long while memory is being pinned.
bool AdamPipeline::poll_events(Task& task) {
  if (task.events_deadline_s == 0.) task.events_deadline_s = now_s() + options_.timeout_s;
  bool all_done = false;
  task.attempt([&] {
    CudaDriver& driver = *CudaDriver::get();
    if (!cuda_entered_) driver.enter(options_.cuda_device);
    cuda_entered_ = true;
    while (!task.events.empty() && driver.done(task.events.back())) task.events.pop_back();
    all_done = task.events.empty();
  });
  if (!all_done && now_s() > task.events_deadline_s)
    task.fail("its gradient has not arrived after " + seconds(options_.timeout_s));
  return all_done || task.failure;
}

void AdamPipeline::update(Task& task) {
  const AdamJob& job = task.job;
  const bool updates = job.updates(), has_out = updates && job.out_dtype != Dtype::none;
  AdamArrays arrays;
  if (updates) {
    arrays.master = static_cast<float*>(task.memory_of(job.master));
    arrays.exp_avg = static_cast<float*>(task.memory_of(job.exp_avg));
    arrays.exp_avg_sq = static_cast<float*>(task.memory_of(job.exp_avg_sq));
    arrays.grad = job.accum != nullptr ? job.accum : job.grad;
    arrays.grad_dtype = job.accum != nullptr ? Dtype::f32 : job.grad_dtype;
    arrays.out16 = has_out ? task.memory_of(job.out) : nullptr;
    arrays.out_dtype = job.out_dtype;
    arrays.new_master = job.new_master;
    arrays.new_exp_avg = job.new_exp_avg;
    arrays.new_exp_avg_sq = job.new_exp_avg_sq;
  }
  if (has_out && job.out.host == nullptr) zero_gaps(job, static_cast<char*>(arrays.out16));
  std::vector<Magnitude> magnitudes(job.magnitudes != nullptr ? task.pieces.size() : 0);
  pool_.run(task.pieces.size(), options_.num_threads, [&](std::size_t i) {
    const Task::Piece& piece = task.pieces[i];
    // A gradient may share its memory with `out`: it is read before new weights are written there.
    if (piece.add != Add::keep)
      accumulate(job.accum, job.grad, job.grad_dtype, piece.add == Add::set, piece.begin, piece.end);
    if (job.magnitudes != nullptr) magnitudes[i] = measure_piece(job.accum, piece.begin, piece.end);
    if (updates) adam_update(arrays, task.factors[piece.group], piece.begin, piece.end);
  });
  if (job.magnitudes == nullptr) return;
  std::vector<Magnitude> totals(job.segments.size());
  for (std::size_t i = 0; i < magnitudes.size(); ++i)
    totals[task.pieces[i].segment].merge(magnitudes[i]);
  for (std::size_t i = 0; i < totals.size(); ++i) {
    job.magnitudes[2 * i] = totals[i].sum_squares;
    job.magnitudes[2 * i + 1] = static_cast<double>(totals[i].largest);
  }
}

// Are the events of a job with its state in memory complete? Lets go of `lock` to ask.
bool AdamPipeline::has_arrived(const TaskPtr& task, bool& polling, std::unique_lock<std::mutex>& lock) {
  if (task->events_done) return true;
  polled_ = task.get();
  lock.unlock();
  const bool arrived = poll_events(*task);
  lock.lock();
  polled_ = nullptr;
  polling |= !arrived;
  task->events_done = arrived;
  return arrived;
}

// See [Note: whose turn it is]. Null where nothing can be updated, or where what there is has changed
// meanwhile; `polling` where events must be asked again. While they are, other tasks may be cancelled.
AdamPipeline::TaskPtr AdamPipeline::next_update(const std::vector<TaskPtr>& waiting, bool& polling,
                                                std::unique_lock<std::mutex>& lock) {
  const bool naive = options_.mode == PipelineMode::naive;
  bool buffered_seen = false, late = false;
  std::vector<TaskPtr> arrived;
  for (const TaskPtr& task : waiting) {
    const bool asks_first = naive && task->stage == Stage::queued;
    if (task->needs_buffer) {
      if (std::exchange(buffered_seen, true)) continue;
    } else if (late) {
      continue;
    }
    if (task->stage != Stage::ready && !asks_first) continue;
    const bool has_events = has_arrived(task, polling, lock);
    if (task->cancelled) {
      finish(task);
      return nullptr;
    }
    if (!has_events) {
      late |= !task->needs_buffer;
      continue;
    }
    if (task->failure) {
      finish(task);
      return nullptr;
    }
    if (asks_first) {
      start_reads();
      changed();
    } else if (!task->needs_buffer) {
      arrived.push_back(task);
    } else if (!conflicts(*task)) {
      return task;
    }
  }
  std::stable_sort(arrived.begin(), arrived.end(), [](const TaskPtr& a, const TaskPtr& b) {
    return a->job.rank < b->job.rank;
  });
  for (const TaskPtr& task : arrived)
    if (!task->cancelled && !conflicts(*task)) return task;
  return nullptr;
}

void AdamPipeline::adam_loop() {
  constexpr std::chrono::microseconds kShortestPoll{20}, kLongestPoll{500};
  auto poll = kShortestPoll;
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    std::vector<TaskPtr> waiting;  // not yet updated; naive: the one that comes next
    for (const TaskPtr& task : tasks_) {
      if (task->stage < Stage::updating) waiting.push_back(task);
      if (options_.mode == PipelineMode::naive) break;
    }
    bool polling = false;
    const std::uint64_t seen = changes_;
    const TaskPtr next = next_update(waiting, polling, lock);

    if (next != nullptr && !stopping_) {
      poll = kShortestPoll;
      next->stage = Stage::updating;
      lock.unlock();
      const double start_s = now_s();
      update(*next);
      const double end_s = now_s();
      lock.lock();
      if (next->job.updates())
        for (const Task::Piece& piece : next->pieces) stats_.params += piece.end - piece.begin;
      stats_.adam_s += end_s - start_s;
      record(*next, "cpu_adam", start_s, end_s);
      if (next->writes) {
        next->stage = Stage::writing;
        ++progress_;
        writing_.push_back(next);
        changed();
      } else {
        finish(next);
      }
      continue;
    }

    if (changes_ != seen) continue;
    double* idle_s = nullptr;
    if (!waiting.empty()) {
      const Task& first = *waiting.front();
      if (!first.events_done && (first.stage == Stage::ready || polling))
        idle_s = &stats_.event_wait_s;
      if (first.stage == Stage::reading || (first.stage == Stage::queued && first.events_done))
        idle_s = &stats_.read_wait_s;
    }
    const double start_s = now_s();
    const auto changed_meanwhile = [&] { return changes_ != seen; };
    if (polling) {
      change_.wait_for(lock, poll, changed_meanwhile);
      poll = std::min(poll * 2, kLongestPoll);
    } else {
      change_.wait(lock, changed_meanwhile);
    }
    if (idle_s != nullptr) *idle_s += now_s() - start_s;
  }

  // What is being read is dropped by the reader, once nothing writes into its buffer any more.
  const std::deque<TaskPtr> left = tasks_;
  for (const TaskPtr& task : left) {
    if (task->stage != Stage::queued && task->stage != Stage::ready) continue;
    task->fail("the pipeline was closed before its update");
    finish(task);
  }
  lock.unlock();
  if (cuda_entered_) CudaDriver::get()->leave(options_.cuda_device);
}

void AdamPipeline::write_loop() {
  std::unique_lock lock(mutex_);
  for (;;) {
    change_.wait(lock, [&] { return !writing_.empty() || adam_ended_; });
    if (writing_.empty()) return;
    const TaskPtr task = writing_.front();
    writing_.pop_front();
    lock.unlock();
    task->io_start_s = now_s();
    task->attempt([&] {
      for (const Array& array : arrays_of(task->job))
        if (array.place->extent != 0)
          task->io.push_back(engine_->write(array.place->extent, array.place->offset,
                                            task->memory_of(*array.place), array.bytes,
                                            task->job.name + " " + array.what));
    });
    wait_all(*task);
    const double end_s = now_s();
    lock.lock();
    stats_.write_s += end_s - task->io_start_s;
    record(*task, "ssd_write", task->io_start_s, end_s);
    finish(task);
  }
}

}  // namespace lohan_fx
