"""Small planner problems, built in one line. One unit of size is MIB, and rates are MIB a second."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any

from hypothesis import strategies as st

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


def deep(num_layers: int) -> Problem:
    """Layers of 6 buckets and 15 activations under budgets that force every kind of choice."""
    buckets, acts = [], []
    for layer in range(num_layers):
        for _ in range(6):
            buckets.append(bucket(len(buckets), layer))
        first = len(acts)
        for k in range(15):
            needs = (first,) if k else ()
            acts.append(
                activation(first + k, layer, mib=1 + k % 3, recompute_s=0.01 * k, needs=needs)
            )
    states = num_layers * 6 * 14
    return problem(
        num_layers,
        tuple(buckets),
        tuple(acts),
        gpu=60 + states * 0.05,
        dram=200 + states * 0.5,
        rates=lanes(h2d_bytes_per_s=20 * MIB, d2h_bytes_per_s=20 * MIB),
    )


def irregular(num_buckets: int, num_activations: int, num_stages: int) -> Problem:
    """Buckets and activations of which no two have the same size."""
    random = Random(0)
    buckets = []
    for k in range(num_buckets):
        numel = (k + 1) * MIB // 2 + 2 * random.randrange(1024)
        made = bucket(k, k * num_stages // num_buckets)
        buckets.append(
            dataclasses.replace(
                made,
                numel=numel,
                weight_bytes=2 * numel,
                grad_bytes=2 * numel,
                state_bytes=12 * numel,
            )
        )
    acts: list[Activation] = []
    firsts: dict[int, int] = {}
    for k in range(num_activations):
        at = k * num_stages // num_activations
        first = firsts.setdefault(at, k)
        made_act = activation(
            k,
            at,
            recompute_s=random.uniform(0, 0.2),
            needs=() if first == k else (first,),
            read_in=min(at + 1, num_stages - 1) if first == k else at,
            can_recompute=first != k,
        )
        acts.append(dataclasses.replace(made_act, bytes=random.randrange(MIB // 4, 16 * MIB)))
    weights = sum(b.weight_bytes + b.state_bytes for b in buckets) / MIB
    everything = weights + sum(a.bytes for a in acts) / MIB
    return problem(
        tuple(stage(i, random.uniform(0.5, 1.5), random.randrange(64)) for i in range(num_stages)),
        tuple(buckets),
        tuple(acts),
        gpu=0.15 * everything,
        dram=0.4 * everything,
        ssd=4 * weights,
        rates=lanes(
            h2d_bytes_per_s=8000 * MIB,
            d2h_bytes_per_s=8000 * MIB,
            ssd_read_bytes_per_s=4000 * MIB,
            ssd_write_bytes_per_s=4000 * MIB,
            cpu_adam_params_per_s=1000 * MIB,
        ),
    )


@st.composite
def problems(
    draw: st.DrawFn, most_buckets: int = 5, most_activations: int = 6, most_gpu: int = 120
) -> Problem:
    """Any small problem."""
    num_stages = draw(st.integers(1, 4))
    stages = tuple(
        stage(i, draw(st.sampled_from([0.1, 1.0, 5.0])), draw(st.integers(0, 3)))
        for i in range(num_stages)
    )
    where = st.integers(0, num_stages - 1)
    buckets = []
    for index in range(draw(st.integers(0, most_buckets))):
        readers = sorted(draw(st.sets(where, min_size=1, max_size=2)))
        made = bucket(
            index,
            *readers,
            weight_mib=draw(st.integers(1, 5)),
            master=draw(st.booleans()),
            trainable=draw(st.booleans()),
            in_backward=draw(st.booleans()),
        )
        # Sizes that are no multiple of a page or a block.
        odd = draw(st.sampled_from([0, 2, 1000]))
        buckets.append(dataclasses.replace(made, weight_bytes=made.weight_bytes + odd))
    acts = []
    for index in range(draw(st.integers(0, most_activations))):
        made_in = draw(where)
        earlier = [a.index for a in acts if a.forward_stage <= made_in]
        needs = draw(st.sets(st.sampled_from(earlier), max_size=2)) if earlier else set()
        made = activation(
            index,
            made_in,
            mib=draw(st.integers(1, 5)),
            recompute_s=draw(st.sampled_from([0.0, 0.1, 3.0])),
            needs=tuple(sorted(needs)),
            read_in=draw(st.integers(made_in, num_stages - 1)),
            can_recompute=draw(st.booleans()),
            can_swap=draw(st.booleans()),
        )
        acts.append(
            dataclasses.replace(
                made,
                bytes=made.bytes + draw(st.sampled_from([0, 7])),
                leaves_at=draw(st.sampled_from([1.0, 0.3])),
                returns_at=draw(st.sampled_from([0.0, 0.6])),
            )
        )
    return problem(
        stages,
        tuple(buckets),
        tuple(acts),
        gpu=draw(st.integers(1, most_gpu)),
        dram=draw(st.sampled_from([0, 10, 40, 80, 200])),
        ssd=draw(st.sampled_from([0, 30, 100, 500])),
        rates=lanes(
            duplex_factor=draw(st.sampled_from([0.5, 1.0])),
            ssd_simplex=draw(st.booleans()),
            gpu_bytes_per_s=draw(st.sampled_from([1e18, float(MIB)])),
            dram_bytes_per_s=draw(st.sampled_from([1e18, 5.0 * MIB])),
        ),
        overlap=draw(st.sampled_from(Overlap)),
        max_ssd_bytes_per_day=draw(st.sampled_from([None, None, 0, 10_000 * MIB])),
        fixed_gpu_bytes=draw(st.integers(0, MIB)),
        gpu_margin_bytes=draw(st.sampled_from([0, MIB])),
        gpu_adam_workspace_bytes=draw(st.sampled_from([0, MIB])),
        ssd_bounce_bytes=draw(st.sampled_from([0, MIB])),
    )
