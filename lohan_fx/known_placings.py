"""How a training's values were placed, kept on disk, so that its next run can begin with that at once.

[Note: placing ahead] Where values go is known once there is a plan, which needs the traced step; but the
same training mostly gets the same plan. So the first call begins to place values as the last run did,
beside tracing. The plan decides: where it says otherwise, all values are taken back and placed by it. So
a file can only cost time, and its name need not tell all that a plan depends on. It is a digest of what
there is before tracing: parameters, the caller's settings, the machine's rates, the shapes of the inputs.

Of a file, only which parameters move together and where to is used: layouts follow from the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from .compiler.buckets import make_bucket, param_infos
from .errors import LohanError
from .hardware import cache_dir
from .kept import read_kept, write_kept
from .params import ManagedParams
from .planner import Overlap
from .program import Bucket, BucketPlacement, Tier
from .runtime import RuntimeOptions
from .settings import Settings
from .solutions import planner_digest

log = logging.getLogger(__name__)

MAX_FILES = 64
MAX_BYTES = 16 << 20  # of one file; that of a Llama of 28 layers has 20 kB
# What was placed sooner need not begin sooner.
WORTH_S = 0.5


@dataclass(frozen=True, slots=True)
class Placed:
    """All that placing values needs: what moves together, where to, and the windows beside."""

    buckets: tuple[Bucket, ...]
    placements: tuple[BucketPlacement, ...]
    options: RuntimeOptions


def file_of(
    settings: Settings,
    params: ManagedParams,
    *,
    overlap: Overlap,
    accumulates: bool,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Path | None:
    """The file of a training that begins with this call; None where nothing is kept.

    That is with a policy of the caller's own: what it would do is not known.
    """
    if callable(settings.policy):
        return None
    words = [
        *_machine(settings),
        *(
            f"{name} {p.dtype} {tuple(p.shape)} {p.stride()} {p.requires_grad}"
            for name, p in zip(params.names, params.stubs, strict=True)
        ),
        *(repr(getattr(settings, name)) for name in _CHOSEN),
        repr(sorted(settings.pin.items())),
        "" if settings.plan is None else settings.plan.to_json(),
        f"{overlap} {accumulates}",
        *_inputs(args, kwargs),
    ]
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()
    return cache_dir() / "placings" / f"{digest}.json"


_CHOSEN = (
    "model_name",
    "overlap",
    "policy",
    "lowering",
    "profile",
    "max_writes_per_day",
    "poison",
    "bucket_numel",
    "verify_io",
)


def _machine(settings: Settings) -> Iterator[str]:
    """What there is to place in. How much is free changes all the time: see [Note: an unused SSD]."""
    yield f"{planner_digest()} torch {torch.__version__}"
    device, given = settings.device, settings.capacities
    yield torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    yield f"{given.gpu_bytes} {given.dram_bytes} {given.ssd_bytes.bit_length()}"
    yield repr([str(path) for path, _ in settings.budget.ssd or ()])
    rates = dataclasses.replace(
        settings.hardware, dram_bytes=0, ssd_bytes=0, source="", measured="", details={}
    )
    yield rates.to_json()


def _inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[str]:
    leaves, structure = tree_flatten((args, dict(kwargs)))
    yield str(structure)
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            yield f"{leaf.dtype} {tuple(leaf.shape)}"
        else:
            plain = leaf is None or isinstance(leaf, bool | int | float | str)
            yield repr(leaf) if plain else type(leaf).__qualname__


def read(path: Path, params: ManagedParams) -> Placed | None:
    """What a file says of this model; None where there is none, or none that can be used."""
    try:
        data = read_kept(path, MAX_BYTES)
        return None if data is None else _placed(json.loads(data), params)
    except Exception as error:  # whatever is in the file must not end a run
        log.warning("%s is not used, values are placed once there is a plan: %s", path, error)
        with contextlib.suppress(OSError):
            path.unlink()
        return None


def keep(path: Path, placed: Placed) -> None:
    """Write the file, or leave it where that cannot be."""
    buckets = [
        {
            "name": bucket.name,
            "params": [spec.pid for spec in bucket.params],
            "trainable": bucket.trainable,
            "place": dataclasses.asdict(placement),
        }
        for bucket, placement in zip(placed.buckets, placed.placements, strict=True)
    ]
    content = {"buckets": buckets, "options": dataclasses.asdict(placed.options)}
    text = json.dumps(content, default=sorted)  # the set of buckets that speculate
    write_kept(path, text.encode(), MAX_FILES)


def _placed(raw: Any, params: ManagedParams) -> Placed:
    infos = param_infos(params.names, params.stubs, frozenset())
    listed = [pid for entry in raw["buckets"] for pid in entry["params"]]
    if sorted(listed) != list(range(len(infos))):
        raise LohanError("its parameters are others")
    buckets, placements = [], []
    for index, entry in enumerate(raw["buckets"]):
        trainable = bool(entry["trainable"])
        members = [dataclasses.replace(infos[pid], trainable=trainable) for pid in entry["params"]]
        if len({member.dtype for member in members}) != 1:
            raise LohanError(f"bucket {index} has parameters of several dtypes, or none")
        if trainable and not all(params.stubs[pid].requires_grad for pid in entry["params"]):
            raise LohanError(f"bucket {index} has frozen parameters among others")
        buckets.append(make_bucket(index, str(entry["name"]), members))
        tiers = {"weight": Tier(entry["place"]["weight"]), "state": Tier(entry["place"]["state"])}
        placements.append(BucketPlacement(**entry["place"] | tiers))
    speculating = raw["options"]["speculating"]
    sets = {"speculating": None if speculating is None else frozenset(speculating)}
    options = RuntimeOptions(**raw["options"] | sets)
    return Placed(tuple(buckets), tuple(placements), options)
