// A job on its way through the pipeline, for the pipeline's own files.
#pragma once

#include <chrono>
#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "pipeline.h"

namespace lohan_fx {

inline double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline std::string seconds(double s) {
  std::string text = std::to_string(s);
  text.erase(text.find_last_not_of('0') + 1);
  if (text.back() == '.') text.pop_back();
  return text + " s";
}

// Where a job's bytes are. Each stage leads to the next one; a job with nothing on SSD begins at ready
// and one with nothing to write ends after updating. A failure leads to done from anywhere,
// cancel() from ready.
enum class Stage {
  queued,    // on SSD; waits for a state buffer
  reading,   // on their way into the buffer
  ready,     // all in host memory; waits for its events and its turn
  updating,  // being changed
  writing,   // new weights in host memory; state and weights on their way to SSD
  done,
};

struct AdamPipeline::Buffer {
  StateBuffer memory;
  bool taken = false;
  std::vector<lohan_fx::Ticket> stuck;  // gave up waiting for these; they may still touch the memory
};

struct AdamPipeline::Task {
  struct Piece {
    std::size_t begin, end, group, segment;
    Add add;
  };

  AdamJob job;
  lohan_fx::Ticket ticket = 0;
  bool needs_buffer = false;  // something of it is on SSD only
  bool writes = false;        // something of it is on SSD
  std::vector<AdamFactors> factors;
  std::vector<Piece> pieces;

  // Below: guarded by mutex_ until the stage says whose the task is.
  Stage stage = Stage::ready;
  bool cancelled = false;
  bool events_done = true;
  std::vector<std::uintptr_t> events;  // not yet complete; looked at by the Adam thread alone
  double events_deadline_s = 0.;  // 0 until first looked at
  Buffer* buffer = nullptr;
  std::vector<lohan_fx::Ticket> io;  // this stage's reads or writes
  double io_start_s = 0.;
  std::optional<TransferError> failure;

  void fail(const std::string& message, const std::string& path = "", std::int64_t offset = -1,
            int error = 0) {
    if (!failure)  // the first one is the cause
      failure.emplace("optimizer job '" + job.name + "': " + message, path, offset, error);
  }

  // Calls `issue` and takes what it throws as this task's failure.
  template <typename Issue>
  void attempt(Issue&& issue) {
    try {
      issue();
    } catch (const TransferError& error) {
      fail(error.what(), error.path, error.offset, error.error);
    } catch (const std::exception& error) {
      fail(error.what());
    }
  }

  // The array's memory: its host place, else its part of the state buffer.
  void* memory_of(const Place& place) const {
    if (place.host != nullptr) return place.host;
    auto* memory = static_cast<char*>(buffer->memory.data);
    for (const Array& array : arrays_of(job)) {
      if (array.place == &place) break;
      if (array.place->host == nullptr) memory += round_up_page(array.bytes);
    }
    return memory;
  }

  const char* doing() const {
    switch (stage) {
      case Stage::queued: return "waiting for a state buffer";
      case Stage::reading: return "reading its state";
      case Stage::ready:
        return events_done ? "waiting for its turn" : "waiting for its gradient";
      case Stage::updating: return "updating";
      case Stage::writing: return "writing its state back";
      case Stage::done: break;
    }
    return "done";
  }
};

}  // namespace lohan_fx
