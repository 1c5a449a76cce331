"""`load`: check everything first, then set weights, optimizer, scheduler and random states."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lohan_fx.errors import LohanError
from lohan_fx.piecewise import in_memory
from lohan_fx.progress import progress_of_bytes

from .directory import real_path, recover
from .inventory import MOMENTS, Names, names_of
from .manifest import MANIFEST, Manifest, Shard
from .saving import Stateful, check_optimizer, group_names, session_of
from .shards import PIECE_BYTES, ShardFile, StoredTensor

if TYPE_CHECKING:
    from lohan_fx.optim import Adam
    from lohan_fx.session import Session

_VERIFY_THREADS = 4


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a checkpoint says of itself.

    Attributes:
        step: optimizer steps made when it was saved.
        extra: what `save` was given.
        created: when, in UTC (ISO 8601).
        version: the version of lohan_fx that wrote it.
    """

    step: int
    extra: Any
    created: str
    version: str


def load(
    model: Any,
    optimizer: Adam | None,
    path: str | PathLike[str],
    scheduler: Stateful | None = None,
    *,
    scaler: Stateful | None = None,
    verify: bool = True,
) -> Loaded:
    """Set a compiled model and its training state from a checkpoint that `save` wrote.

    Training goes on as if it had not been interrupted: bit for bit where the plan is the same or over
    `lowering="aten"`, else within rounding. Before the first forward, values are remembered and go
    from the files straight into their tiers when that comes. A save that was interrupted in the last
    moment is completed first.

    Args:
        optimizer: the model's optimizer; None loads the weights only.
        scheduler, scaler: those whose state is to be set; None leaves what the checkpoint has.
        verify: read every file once before anything is changed and compare its checksums.

    Raises:
        LohanError: the checkpoint is incomplete, damaged, of another model or of another version of
            lohan_fx; says what is wrong. Nothing has been changed.
        TransferError: reading failed; has path and errno.
    """
    session = session_of(model)
    check_optimizer(session, optimizer)
    if session.saving is not None:
        session.saving.settle()
    where = real_path(Path(path))
    recover(where, MANIFEST)
    manifest = Manifest.read(where)
    files = _open(where, {**manifest.weights, **manifest.optimizer})
    names = names_of(model)
    weights = _by_name(files[name] for name in manifest.weights)
    state = _by_name(files[name] for name in manifest.optimizer)
    _check_model(where, manifest, session, names, weights)
    if optimizer is not None:
        _check_optimizer_state(where, manifest, session, names, state, optimizer)
    for what, given, saved in (
        ("scheduler", scheduler, manifest.scheduler),
        ("scaler", scaler, manifest.scaler),
    ):
        if given is not None and saved is None:
            raise LohanError(f"{where} has no {what} state; leave {what}= out")
    if verify:
        _verify(files, {**manifest.weights, **manifest.optimizer})
    values, moments = _values(manifest, session, names, weights, state, optimizer is not None)
    nbytes = sum(v.entry.spec.nbytes for v in values.values())
    nbytes += sum(2 * m.entry.spec.nbytes for _, m, _ in (moments or {}).values())
    with progress_of_bytes("Loading", nbytes) as progress:
        session.check_open()
        session.state.restore(values, moments, progress)
    with torch.no_grad():
        for name, buffer in names.buffers.items():
            buffer.copy_(in_memory(weights[name]))
    if optimizer is not None:
        assert manifest.param_groups is not None
        for group, saved in zip(optimizer.param_groups, manifest.param_groups, strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
    if scheduler is not None:
        scheduler.load_state_dict(dict(manifest.scheduler or {}))
    if scaler is not None:
        scaler.load_state_dict(dict(manifest.scaler or {}))
    if optimizer is not None:
        _set_random(session, manifest)
    return Loaded(manifest.step, manifest.extra, manifest.created, manifest.version)


def _open(where: Path, shards: Mapping[str, Shard]) -> dict[str, ShardFile]:
    missing = [name for name in shards if not (where / name).is_file()]
    if missing:
        raise LohanError(f"{where} lacks {', '.join(missing)}, which its {MANIFEST} lists")
    files = {}
    for name, shard in shards.items():
        size = (where / name).stat().st_size
        if size != shard.nbytes:
            raise LohanError(
                f"{where / name} has {size:,} bytes, but {shard.nbytes:,} were written: it has been "
                "truncated or replaced"
            )
        file = files[name] = ShardFile(where / name)
        if file.header_crc != shard.header_crc or file.entries.keys() != shard.crcs.keys():
            raise LohanError(f"{where / name} is damaged: the checksum of its header is wrong")
    return files


def _by_name(files: Iterable[ShardFile]) -> dict[str, StoredTensor]:
    return {name: file.tensor(name) for file in files for name in file.entries}


def _check_model(
    where: Path,
    manifest: Manifest,
    session: Session,
    names: Names,
    weights: Mapping[str, StoredTensor],
) -> None:
    """Every tensor of the model is there, with its shape, and nothing else is."""
    shapes = {
        alias: tuple(session.params.stubs[pid].shape) for pid, alias in _known(names, weights)
    }
    shapes |= {name: tuple(buffer.shape) for name, buffer in names.buffers.items()}
    wrong = []
    missing = [n for n in shapes if n not in weights]
    unknown = [n for n in weights if n not in shapes]
    if missing:
        wrong.append(f"it lacks {_some(missing)}")
    if unknown:
        wrong.append(f"the model has no {_some(unknown)}")
    wrong += [
        f"{name} has shape {tuple(weights[name].shape)}, the model's {shape}"
        for name, shape in shapes.items()
        if name in weights and tuple(weights[name].shape) != shape
    ][:3]
    if wrong:
        raise LohanError(f"{where} is a checkpoint of another model: {'; '.join(wrong)}")


def _known(names: Names, weights: Mapping[str, StoredTensor]) -> Iterable[tuple[int, str]]:
    """(pid, the name among its aliases that the files have, or its first one)."""
    for pid, aliases in names.params.items():
        yield pid, next((alias for alias in aliases if alias in weights), aliases[0])


def _check_optimizer_state(
    where: Path,
    manifest: Manifest,
    session: Session,
    names: Names,
    state: Mapping[str, StoredTensor],
    optimizer: Adam,
) -> None:
    if manifest.param_groups is None:
        raise LohanError(f"{where} has no optimizer state; pass None for the optimizer")
    if manifest.optimizer_class != type(optimizer).__name__:
        raise LohanError(
            f"{where} has the state of {manifest.optimizer_class}, but the optimizer is a "
            f"{type(optimizer).__name__}"
        )
    ours, theirs = group_names(session, optimizer), [g["params"] for g in manifest.param_groups]
    if ours != theirs:
        sizes = [len(names) for names in theirs], [len(names) for names in ours]
        raise LohanError(
            f"{where} has parameter groups of {sizes[0]} parameters, this optimizer of {sizes[1]}, and "
            "they are not the same; make the optimizer from the same parameters in the same order"
        )
    pid_of = {alias: pid for pid, aliases in names.params.items() for alias in aliases}
    saved = {pid_of[name] for name in manifest.steps if name in pid_of}
    if saved != session.trainable:
        differing = sorted(saved ^ session.trainable)
        raise LohanError(
            f"{where} was saved with other parameters frozen: "
            f"{_some([names.of(pid) for pid in differing])}"
        )
    sections = ("master", *MOMENTS)
    for name in manifest.steps:
        shape = tuple(session.params.stubs[pid_of[name]].shape)
        found = [state[f"{s}.{name}"] for s in sections if f"{s}.{name}" in state]
        if len(found) < 2 or any(tuple(t.shape) != shape for t in found):
            raise LohanError(f"{where} is damaged: the optimizer state of {name} is not whole")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _verify(files: Mapping[str, ShardFile], shards: Mapping[str, Shard]) -> None:
    """Compare all checksums, of a few tensors at a time."""

    def check(file: ShardFile, name: str, expected: Sequence[int]) -> None:
        for index, piece in enumerate(file.pieces(name)):
            if zlib.crc32(piece) != expected[index]:
                raise LohanError(
                    f"{file.path} is damaged: the checksum of {name} is wrong (from byte "
                    f"{index * PIECE_BYTES:,} of it); use another checkpoint"
                )
            progress(len(piece))

    total = sum(shard.nbytes for shard in shards.values())
    with (
        progress_of_bytes("Checking", total) as progress,
        ThreadPoolExecutor(_VERIFY_THREADS) as threads,
    ):
        results = [
            threads.submit(check, files[file], name, expected)
            for file, shard in shards.items()
            for name, expected in shard.crcs.items()
        ]
        try:
            for result in results:
                result.result()
        finally:
            for result in results:
                result.cancel()


def _values(
    manifest: Manifest,
    session: Session,
    names: Names,
    weights: Mapping[str, StoredTensor],
    state: Mapping[str, StoredTensor],
    with_optimizer: bool,
) -> tuple[dict[int, StoredTensor], dict[int, tuple[int, StoredTensor, StoredTensor]] | None]:
    """Masters (or weights where there are none), and step counts with moments, by pid."""
    saved_as = dict(_known(names, weights))
    values = {
        pid: state.get(f"master.{name}", weights[name]) if manifest.masters else weights[name]
        for pid, name in saved_as.items()
    }
    if not with_optimizer:
        return values, None
    steps = {
        pid: next(manifest.steps[alias] for alias in aliases if alias in manifest.steps)
        for pid, aliases in names.params.items()
        if pid in session.trainable
    }
    moments = {
        pid: (step, state[f"exp_avg.{saved_as[pid]}"], state[f"exp_avg_sq.{saved_as[pid]}"])
        for pid, step in steps.items()
    }
    return values, moments


def _set_random(session: Session, manifest: Manifest) -> None:
    if "cpu" in manifest.random:
        torch.set_rng_state(manifest.random["cpu"])
    if "cuda" in manifest.random and session.device.type == "cuda":
        torch.cuda.set_rng_state(manifest.random["cuda"], session.device)
