"""Small planner problems, built in one line. One unit of size is MIB, and rates are MIB a second."""

from __future__ import annotations

from typing import Any

from lohan_fx.planner import (
    Activation,
    Bucket,
    Capacities,
    Lanes,
    Overlap,
    Problem,
    Stage,
)

MIB = 2**20
UNBOUNDED = 10**6


def lanes(**changes: Any) -> Lanes:
    """Lanes that each move one MiB a second; the GPU's own memory and DRAM never limit."""
    rates: dict[str, Any] = {
        "h2d_bytes_per_s": MIB,
        "d2h_bytes_per_s": MIB,
        "duplex_factor": 1.0,
        "gpu_bytes_per_s": 1e18,
        "ssd_read_bytes_per_s": MIB,
        "ssd_write_bytes_per_s": MIB,
        "ssd_simplex": True,
        # A bucket of weight_mib MiB in 16 bit has half as many parameters as bytes.
        "cpu_adam_params_per_s": MIB,
        "dram_bytes_per_s": 1e18,
    }
    return Lanes(**{**rates, **changes})


def stage(index: int, seconds: float = 1.0, workspace_mib: int = 0) -> Stage:
    """A stage whose backward takes twice its forward."""
    space = workspace_mib * MIB
    return Stage(index, f"layer{index}", "layer", seconds, 2 * seconds, space, space)


def bucket(
    index: int,
    *stages: int,
    weight_mib: int = 2,
    master: bool = True,
    trainable: bool = True,
    in_backward: bool = True,
) -> Bucket:
    """A bucket read by `stages`, of 16-bit weights with a master or of fp32 weights."""
    weight = weight_mib * MIB
    numel = weight // (2 if master else 4)
    return Bucket(
        index=index,
        name=f"bucket{index}",
        numel=numel,
        weight_bytes=weight,
        grad_bytes=weight if trainable else 0,
        state_bytes=numel * (12 if master else 8) if trainable else 0,
        has_master=master and trainable,
        forward_stages=stages,
        backward_stages=stages if in_backward else (),
        grad_stage=min(stages) if trainable else None,
    )


def activation(
    index: int,
    made_in: int,
    *,
    mib: int = 2,
    recompute_s: float = 0.5,
    needs: tuple[int, ...] = (),
    read_in: int | None = None,
    can_recompute: bool = True,
    can_swap: bool = True,
) -> Activation:
    """A value made in one stage and read, there or in `read_in`, by forward and backward."""
    reader = made_in if read_in is None else read_in
    return Activation(
        index=index,
        name=f"act{index}",
        bytes=mib * MIB,
        forward_stage=made_in,
        last_forward_stage=reader,
        first_backward_stage=reader,
        last_backward_stage=min(reader, made_in),
        recompute_s=recompute_s,
        needs=needs,
        can_recompute=can_recompute,
        can_swap=can_swap,
    )


def problem(
    stages: int | tuple[Stage, ...],
    buckets: tuple[Bucket, ...] = (),
    activations: tuple[Activation, ...] = (),
    *,
    gpu: float = UNBOUNDED,
    dram: float = UNBOUNDED,
    ssd: float = UNBOUNDED,
    rates: Lanes | None = None,
    overlap: Overlap = Overlap.BACKWARD,
    **rest: int | None,
) -> Problem:
    """A problem with capacities in MiB; a number of stages stands for that many of one second."""
    if isinstance(stages, int):
        stages = tuple(stage(index) for index in range(stages))
    return Problem(
        capacities=Capacities(int(gpu * MIB), int(dram * MIB), int(ssd * MIB)),
        lanes=rates or lanes(),
        stages=stages,
        buckets=buckets,
        activations=activations,
        overlap=overlap,
        **rest,
    )
