"""The rates and sizes of one machine, and their JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from lohan_fx.budget import Machine
from lohan_fx.errors import LohanError
from lohan_fx.planner import Lanes

HARDWARE_SCHEMA = 2


@dataclass(frozen=True, slots=True)
class Hardware:
    """The rates and sizes of one machine; `source` says whence.

    `flops_per_s` is by dtype name: large matrix products, at the clock the GPU holds for seconds.
    `duplex_factor` is the H2D rate while D2H is busy too, over H2D alone. `dram_bytes_per_s` is what
    all cores together read plus write. `ssd_simplex`: reads and writes share the device;
    `ssd_mixed_bytes_per_s` is then the sum of both, half and half; 0 where it is not known.
    `cpu_adam_ahead_params_per_s` is Adam's rate into a second copy of weights and state; 0 where not known.
    `pinned_alloc_bytes_per_s` is how fast the runtime gets pinned host memory; 0 where not known.
    `measured` is the day it was measured (YYYY-MM-DD) and `cpu_name` on which CPU; both are empty
    for presets. `details` are single measurements behind the rates, with units in their names.
    """

    name: str
    source: str
    gpu_name: str
    gpu_memory_bytes: int
    flops_per_s: Mapping[str, float]
    gpu_mem_bytes_per_s: float
    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    duplex_factor: float
    dram_bytes: int
    dram_bytes_per_s: float
    ssd_bytes: int
    ssd_read_bytes_per_s: float
    ssd_write_bytes_per_s: float
    ssd_simplex: bool
    cpu_adam_params_per_s: float
    cpu_adam_ahead_params_per_s: float = 0.0
    ssd_mixed_bytes_per_s: float = 0.0
    pinned_alloc_bytes_per_s: float = 0.0
    measured: str = ""
    cpu_name: str = ""
    details: Mapping[str, float] = field(default_factory=dict)

    def gpu_flops_per_s(self, dtype: str) -> float:
        """FLOP/s of matrix multiplication in a dtype; the slowest known one where it is not known.

        Raises LohanError where no rate is known at all.
        """
        if not self.flops_per_s:
            raise LohanError(f"hardware {self.name!r} has no FLOP rate for any dtype")
        return self.flops_per_s.get(dtype, min(self.flops_per_s.values()))

    def lanes(self) -> Lanes:
        """The rates as the planner reads them."""
        return Lanes(
            h2d_bytes_per_s=self.h2d_bytes_per_s,
            d2h_bytes_per_s=self.d2h_bytes_per_s,
            duplex_factor=self.duplex_factor,
            gpu_bytes_per_s=self.gpu_mem_bytes_per_s,
            ssd_read_bytes_per_s=self.ssd_read_bytes_per_s,
            ssd_write_bytes_per_s=self.ssd_write_bytes_per_s,
            ssd_simplex=self.ssd_simplex,
            cpu_adam_params_per_s=self.cpu_adam_params_per_s,
            dram_bytes_per_s=self.dram_bytes_per_s,
            cpu_adam_ahead_params_per_s=self.cpu_adam_ahead_params_per_s
            or self.cpu_adam_params_per_s,
        )

    def machine(self) -> Machine:
        """An idle machine of this sort, to complete a budget with."""
        has_ssd = self.ssd_bytes > 0
        return Machine(
            gpu_bytes=self.gpu_memory_bytes,
            dram_free_bytes=self.dram_bytes,
            ssd_free_bytes=lambda _: self.ssd_bytes,
            default_ssd_dir=Path("/ssd") if has_ssd else None,
        )

    @staticmethod
    def preset(name: str, num_ssds: int | None = None) -> Hardware:
        """A machine by name, see `PRESETS`. `num_ssds` (1 to 12) is for the paper's server alone.

        Raises LohanError for an unknown name, or for SSDs where their number is fixed.
        """
        from .presets import preset

        return preset(name, num_ssds)

    def to_json(self, indent: int | None = None) -> str:
        raw = {"schema": HARDWARE_SCHEMA, **dataclasses.asdict(self)}
        return json.dumps(raw, sort_keys=True, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Hardware:
        """The hardware `to_json` wrote. Raises LohanError on another schema or malformed data."""
        try:
            raw: dict[str, Any] = json.loads(text)
            schema = raw.pop("schema", None)
            if schema != HARDWARE_SCHEMA:
                raise LohanError(
                    f"this hardware file has schema {schema!r}, this version reads "
                    f"{HARDWARE_SCHEMA}; measure the machine again (python -m lohan_fx.probe)"
                )
            made = cls(**raw)
        except (AttributeError, TypeError, ValueError) as exc:
            raise LohanError(f"this is not a hardware file: {exc}") from exc
        wrong = [f.name for f in dataclasses.fields(cls) if not _is_valid(getattr(made, f.name), f)]
        if wrong:
            raise LohanError(
                f"this is not a hardware file: {wrong[0]} is {getattr(made, wrong[0])!r}"
            )
        return made


# These may be unknown, or the thing may not be there.
_MAY_BE_ZERO = ("ssd_", "pinned_alloc_", "cpu_adam_ahead_")


def _is_valid(value: object, field: dataclasses.Field[Any]) -> bool:
    """Whether a field read from JSON has its type; rates are above zero, but for a missing SSD's."""
    if field.name == "flops_per_s":
        rates = list(value.values()) if isinstance(value, dict) else [0]
        return all(_is_number(rate) and rate > 0 for rate in rates)
    if field.name == "details":
        return isinstance(value, dict) and all(_is_number(number) for number in value.values())
    if field.name.endswith("_bytes"):
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if field.name.endswith(("_per_s", "_factor")):
        may_be_zero = field.name.startswith(_MAY_BE_ZERO)
        return _is_number(value) and (value > 0 or (value == 0 and may_be_zero))
    return isinstance(value, bool if field.name == "ssd_simplex" else str)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
