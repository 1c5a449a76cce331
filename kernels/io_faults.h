// A source between the engine and its backend that spoils transfers as Faults says.
#pragma once

#include <atomic>
#include <cstdint>

#include "io.h"

namespace lohan_fx {

// One engine's counts, shared by its directories.
struct FaultCounts {
  std::atomic<std::uint64_t> started = 0, finished = 0, reads = 0;
};

class FaultySource final : public TransferSource {
 public:
  FaultySource(TransferSource& inner, const Faults& faults, FaultCounts& counts)
      : inner_(inner), faults_(faults), counts_(counts) {}

  Transfer* next() override;
  Transfer* finished(Transfer* transfer, std::int64_t result) override;

 private:
  bool concerns(const Transfer& transfer) const;
  Transfer* shorten(Transfer* transfer);

  TransferSource& inner_;
  const Faults faults_;
  FaultCounts& counts_;
};

}  // namespace lohan_fx
