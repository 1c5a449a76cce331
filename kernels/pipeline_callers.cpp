// What callers ask of the pipeline about jobs they have submitted: how far they are, waits, stats, trace.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <stdexcept>

#include "pipeline_task.h"

namespace lohan_fx {

const AdamPipeline::Task* AdamPipeline::find(Ticket ticket) const {
  if (ticket > last_ticket_)
    throw std::invalid_argument("no optimizer job has ticket " + std::to_string(ticket));
  for (const TaskPtr& task : tasks_)
    if (task->ticket == ticket) return task.get();
  return nullptr;
}

bool AdamPipeline::done(Ticket ticket) const {
  const std::lock_guard lock(mutex_);
  return find(ticket) == nullptr;
}

bool AdamPipeline::weights_ready(Ticket ticket) const {
  const std::lock_guard lock(mutex_);
  const Task* const task = find(ticket);
  return task == nullptr || task->stage >= Stage::writing;
}

void AdamPipeline::wait_until(const std::function<bool()>& reached,
                              const std::function<std::string()>& missed, double timeout_s,
                              const std::function<void()>& between,
                              std::unique_lock<std::mutex>& lock) const {
  const double deadline_s = now_s() + timeout_s;
  while (!reached()) {
    const double left_s = deadline_s - now_s();
    if (left_s <= 0.)
      throw TransferError(missed() + " after " + seconds(timeout_s), "", -1, ETIMEDOUT);
    const double slice_s = between ? std::min(left_s, .1) : left_s;
    change_.wait_for(lock, std::chrono::duration<double>(std::min(slice_s, 3600.)), reached);
    if (between && !reached()) {
      lock.unlock();
      between();
      lock.lock();
    }
  }
}

void AdamPipeline::wait_for(Ticket ticket, bool weights_only, double timeout_s,
                            const std::function<void()>& between) const {
  std::unique_lock lock(mutex_);
  const auto reached = [&] {
    const Task* const task = find(ticket);
    return task == nullptr || (weights_only && task->stage >= Stage::writing);
  };
  const auto missed = [&] {
    const Task& task = *find(ticket);
    return "optimizer job '" + task.job.name + "' is not done (" + task.doing() + ")";
  };
  wait_until(reached, missed, timeout_s, between, lock);
  const auto failure = failures_.find(ticket);
  if (failure != failures_.end()) throw TransferError(failure->second);
}

std::uint64_t AdamPipeline::progress() const {
  const std::lock_guard lock(mutex_);
  return progress_;
}

void AdamPipeline::wait_any_weights(const std::vector<Ticket>& tickets, double timeout_s,
                                    const std::function<void()>& between) const {
  if (tickets.empty()) throw std::invalid_argument("no optimizer job to wait for");
  std::unique_lock lock(mutex_);
  const auto reached = [&] {
    return std::any_of(tickets.begin(), tickets.end(), [&](Ticket ticket) {
      const Task* const task = find(ticket);
      return task == nullptr || task->stage >= Stage::writing;
    });
  };
  const auto missed = [&] {
    const Task& task = *find(tickets.front());
    return "none of " + std::to_string(tickets.size()) + " optimizer jobs is done, the first of them '" +
           task.job.name + "' (" + task.doing() + ")";
  };
  wait_until(reached, missed, timeout_s, between, lock);
}

void AdamPipeline::wait(Ticket ticket, double timeout_s, const std::function<void()>& between) const {
  wait_for(ticket, false, timeout_s, between);
}

void AdamPipeline::wait_weights(Ticket ticket, double timeout_s,
                                const std::function<void()>& between) const {
  wait_for(ticket, true, timeout_s, between);
}

void AdamPipeline::drain(double timeout_s, const std::function<void()>& between) const {
  std::unique_lock lock(mutex_);
  const auto missed = [&] {
    const Task& task = *tasks_.front();
    return std::to_string(tasks_.size()) + " optimizer jobs are not done, the first of them '" +
           task.job.name + "' (" + task.doing() + ")";
  };
  wait_until([&] { return tasks_.empty(); }, missed, timeout_s, between, lock);
  if (!failures_.empty()) throw TransferError(failures_.begin()->second);
}

PipelineStats AdamPipeline::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

std::vector<AdamPipeline::Event> AdamPipeline::take_trace() {
  const std::lock_guard lock(mutex_);
  std::vector<Event> events(trace_.begin(), trace_.end());
  trace_.clear();
  return events;
}

}  // namespace lohan_fx
