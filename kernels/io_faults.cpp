#include "io_faults.h"

#include <algorithm>
#include <chrono>
#include <thread>

namespace lohan_fx {

bool FaultySource::concerns(const Transfer& transfer) const {
  return transfer.direction == Direction::read ? faults_.on_read : faults_.on_write;
}

Transfer* FaultySource::shorten(Transfer* transfer) {
  if (transfer == nullptr || faults_.short_every == 0 || !concerns(*transfer)) return transfer;
  if (++counts_.started % faults_.short_every == 0)
    transfer->bytes = std::max(kAlign, transfer->bytes / 2 / kAlign * kAlign);
  return transfer;
}

Transfer* FaultySource::next() { return shorten(inner_.next()); }

Transfer* FaultySource::finished(Transfer* transfer, std::int64_t result) {
  if (concerns(*transfer)) {
    if (faults_.delay_ms > 0)
      std::this_thread::sleep_for(std::chrono::milliseconds(faults_.delay_ms));
    const std::uint64_t nth = ++counts_.finished;  // 1 for the first
    if (faults_.error != 0 && nth > faults_.after &&
        (faults_.times == 0 || nth <= std::uint64_t{faults_.after} + faults_.times))
      result = -faults_.error;
  }
  if (faults_.flip_every > 0 && transfer->direction == Direction::read && result > 0 &&
      ++counts_.reads % faults_.flip_every == 0)
    transfer->memory[result / 2] ^= 0x10;
  return shorten(inner_.finished(transfer, result));
}

}  // namespace lohan_fx
