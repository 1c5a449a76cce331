"""`save`: from the tiers into a directory, tensor by tensor, with a few pieces in memory."""

from __future__ import annotations

import copy
import datetime
import shutil
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lohan_fx import __version__
from lohan_fx.errors import LohanError, TransferError
from lohan_fx.params import owner_of
from lohan_fx.progress import progress_of_bytes
from lohan_fx.units import format_bytes

from .directory import Staging, write_file
from .inventory import Inventory, Item, by_bucket, take_inventory
from .manifest import MANIFEST, Manifest, Shard, encode
from .shards import PIECE_BYTES, ShardWriter, TensorSpec, index_json, shard_names, split_shards
from .snapshot import ReadPiece, Snapshot

if TYPE_CHECKING:
    from lohan_fx.optim import Adam
    from lohan_fx.session import Session

_PIECES = 6  # in memory at a time
_WRITERS = 3  # threads that compute checksums and write

# Copies of values that are overwritten before they are saved, at most.
COPY_BYTES = 256 << 20


class Stateful(Protocol):
    """A learning-rate scheduler, a GradScaler."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


def save(
    model: Any,
    optimizer: Adam | None,
    path: str | PathLike[str],
    *,
    scheduler: Stateful | None = None,
    scaler: Stateful | None = None,
    extra: Any = None,
    dtype: str = "compute",
    max_shard_bytes: int = 5 * 10**9,
    asynchronous: bool = False,
) -> Saving:
    """Write a checkpoint of a compiled model into the directory `path`, in place of the one there.

    The directory holds `model.safetensors` (or shards with an index) and `config.json`, which
    `from_pretrained` of Hugging Face models reads, and beside them what training needs to go on: fp32
    masters, moments, step count, parameter groups, the states of scheduler and scaler, random states.
    Tied weights are written once, as transformers does.

    Values stream from their tiers to the disk, with less than 256 MiB in DRAM. All is written aside
    and synced first, then takes the place of the previous checkpoint at once: a crash, a full disk or
    an error at any moment leaves that one whole. Files of your own in the directory stay.

    Args:
        optimizer: the model's optimizer; None writes the weights only.
        scheduler, scaler: anything with state_dict() and load_state_dict().
        extra: anything JSON can express (and tuples, sets, tensors); `load` returns it.
        dtype: "compute" writes weights in the compute dtype (and masters with the optimizer),
            "float32" writes the masters as weights.
        max_shard_bytes: most bytes of tensors in one file; a larger tensor gets one by itself.
        asynchronous: return once updates under way have finished, and write in the background. What
            is saved is the state at this call: an update that would overwrite a value not saved yet
            copies it first, into at most 256 MiB more of DRAM, or waits where that is full. A model
            that has not been called yet is written at once.

    Returns:
        A handle; with `asynchronous`, call its `wait()` to learn of failures. Saves of one model
        happen one after another, and before its values are set or moved otherwise.

    Raises:
        TrainingLoopError: between backward and step(), or after an update that failed.
        LohanError: an argument cannot be saved, or the disk has too little room.
        TransferError: reading or writing failed; has path and errno.
    """
    session = session_of(model)
    if dtype not in ("compute", "float32"):
        raise LohanError(f'dtype is {dtype!r}; choose "compute" or "float32"')
    if max_shard_bytes <= 0:
        raise LohanError(f"max_shard_bytes is {max_shard_bytes}; give a positive number")
    check_optimizer(session, optimizer)
    if session.saving is not None:
        session.saving.settle()
        session.saving = None
    session.check_open()
    session.state.rest()
    inventory = take_inventory(
        model, session, full=dtype == "float32", optimizer=optimizer is not None
    )
    state = _State.of(model, session, inventory, optimizer, scheduler, scaler, extra)
    job = _Job(Path(path), inventory, state, max_shard_bytes)
    runtime = session.runtime
    backwards = runtime is not None and not runtime.waits_for_step
    groups = by_bucket(inventory, session, backwards=backwards)
    if asynchronous and runtime is not None and session.state.placed:
        snapshot = Snapshot(
            dict(groups),
            runtime.background_reader(),
            runtime.values.read_piece,
            limit_bytes=COPY_BYTES,
            deadline_s=runtime.deadline_s,
        )
        saving = session.saving = Saving(job, snapshot)
        runtime.values.watch(snapshot.before_update, saving.settle)
        saving.start()
        return saving
    with progress_of_bytes("Saving", inventory.nbytes) as progress:
        order = (item for items in groups.values() for item in items)
        job.run(job.begin(), order, session.state.read_piece, progress)
    return Saving(job)


class Saving:
    """A checkpoint being written, or written."""

    def __init__(self, job: _Job, snapshot: Snapshot | None = None) -> None:
        self.path = job.path
        self._job = job
        self._snapshot = snapshot
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._seen = False

    def start(self) -> None:
        """Make the directory, or raise as `save` does; then go on in a thread of its own."""
        assert self._snapshot is not None
        try:
            staging = self._job.begin()
        except BaseException as error:
            self._error, self._seen = error, True
            self._snapshot.give_up()
            raise
        # Not a daemon: the interpreter waits for the checkpoint before it ends.
        self._thread = threading.Thread(
            target=self._run, args=(staging,), name="lohan-save", daemon=False
        )
        self._thread.start()

    def _run(self, staging: Staging) -> None:
        snapshot = self._snapshot
        assert snapshot is not None
        try:
            self._job.run(staging, snapshot.items(), snapshot.read, lambda nbytes: None)
        except BaseException as error:  # it is raised where it is waited for
            self._error = error
        finally:
            snapshot.give_up()

    def done(self) -> bool:
        """True once the checkpoint is in place, or has failed: `wait` then raises."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until the checkpoint is in place.

        Raises:
            TimeoutError: it is not after `timeout_s`.
            LohanError, TransferError: it failed, as for `save`; the previous one is whole.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise TimeoutError(f"{self.path} is still being written after {timeout_s:g} s")
        if self._error is not None:
            self._seen = True
            raise self._error

    def settle(self) -> None:
        """Block until nothing more is read; warn of a failure that nobody has waited for."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None and not self._seen:
            self._seen = True
            warnings.warn(
                f"the checkpoint {self.path} could not be written in the background: {self._error}",
                RuntimeWarning,
                stacklevel=2,
            )


def session_of(model: Any) -> Session:
    """Raises LohanError for a model that is not compiled."""
    session: Session | None = getattr(model, "_lohan", None)
    if session is None:
        raise LohanError(
            f"{type(model).__name__} is not a compiled model; call lohan_fx.compile first"
        )
    return session


def check_optimizer(session: Session, optimizer: Adam | None) -> None:
    """Raise LohanError unless it is the model's."""
    if optimizer is not None and session.optimizer is not optimizer:
        raise LohanError("this optimizer is not the model's; give the one made from its parameters")


@dataclass(frozen=True, slots=True)
class _State:
    """Everything but tensors, as it is at one moment."""

    model_name: str
    step: int
    steps: Mapping[str, int]
    param_groups: Sequence[Mapping[str, Any]] | None
    optimizer_class: str | None
    scheduler: Any
    scaler: Any
    extra: Any
    random: Mapping[str, torch.Tensor]
    configs: tuple[Any, ...]  # objects with save_pretrained()

    @classmethod
    def of(
        cls,
        model: Any,
        session: Session,
        inventory: Inventory,
        optimizer: Adam | None,
        scheduler: Stateful | None,
        scaler: Stateful | None,
        extra: Any,
    ) -> _State:
        random = {"cpu": torch.get_rng_state()}
        if session.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(session.device)
        encode(extra, "extra")
        names = inventory.names
        steps = {names.of(pid): session.state.steps(pid) for pid in sorted(session.trainable)}
        return cls(
            model_name=type(model).__name__.removeprefix("Lohan"),
            step=session.state.step_count,
            steps={} if optimizer is None else steps,
            param_groups=None if optimizer is None else _groups(session, optimizer),
            optimizer_class=None if optimizer is None else type(optimizer).__name__,
            scheduler=None if scheduler is None else copy.deepcopy(scheduler.state_dict()),
            scaler=None if scaler is None else copy.deepcopy(scaler.state_dict()),
            extra=copy.deepcopy(extra),
            random=random,
            configs=_configs(model, session),
        )


def group_names(session: Session, optimizer: Adam) -> list[list[str]]:
    """The names of the parameters of each group."""
    found = [[owner_of(param) for param in group["params"]] for group in optimizer.param_groups]
    return [[session.names[f[1]] for f in group if f is not None] for group in found]


def _groups(session: Session, optimizer: Adam) -> list[dict[str, Any]]:
    """Parameter groups, with names for parameters."""
    pairs = zip(optimizer.param_groups, group_names(session, optimizer), strict=True)
    return [
        copy.deepcopy({k: v for k, v in group.items() if k != "params"}) | {"params": names}
        for group, names in pairs
    ]


def _configs(model: Any, session: Session) -> tuple[Any, ...]:
    """Copies of a Hugging Face model's configurations, as its own save_pretrained completes them."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained"):
        return ()
    config = copy.deepcopy(config)
    config.architectures = [type(model).__name__.removeprefix("Lohan")]
    generation = getattr(model, "generation_config", None)
    found = (config, copy.deepcopy(generation))
    return tuple(c for c in found if hasattr(c, "save_pretrained"))


@dataclass(frozen=True, slots=True)
class _Job:
    """A checkpoint to be written."""

    path: Path
    inventory: Inventory
    state: _State
    max_shard_bytes: int

    def begin(self) -> Staging:
        """An empty directory on a disk with room."""
        staging = Staging(self.path, MANIFEST)
        try:
            _check_room(staging.path, self._shards())
        except BaseException:
            staging.abandon()
            raise
        return staging

    def run(
        self,
        staging: Staging,
        order: Iterable[Item],
        read: ReadPiece,
        progress: Callable[[int], None],
    ) -> None:
        """Fill the directory and put it in place; on failure nothing is left of it."""
        writers: dict[str, ShardWriter] = {}
        try:
            for name, specs in self._shards().items():
                writers[name] = ShardWriter(staging.path / name, specs)
            _stream(order, writers, read, progress)
            for writer in writers.values():
                writer.finish()
            self._write_rest(staging, writers)
            staging.publish(_files_of_others(staging))
        except BaseException:
            for writer in writers.values():
                writer.close()
            staging.abandon()
            raise

    def _shards(self) -> dict[str, list[TensorSpec]]:
        """File name -> its tensors."""
        found: dict[str, list[TensorSpec]] = {}
        for stem, items in (
            ("model", self.inventory.weights),
            ("optimizer", self.inventory.optimizer),
        ):
            parts = split_shards([item.spec for item in items], self.max_shard_bytes)
            found.update(zip(shard_names(stem, len(parts)), parts, strict=True))
        return found

    def _write_rest(self, staging: Staging, writers: Mapping[str, ShardWriter]) -> None:
        """The index, the configurations and, last of all, the manifest."""
        weights = [name for name in writers if name.startswith("model")]
        if len(weights) > 1:
            where = {tensor: name for name in weights for tensor in writers[name].crcs}
            total = sum(item.spec.nbytes for item in self.inventory.weights)
            write_file(staging.path / "model.safetensors.index.json", index_json(where, total))
        self._write_configs(staging.path)
        state = self.state
        listed = {
            name: Shard(writer.nbytes, writer.header_crc, writer.crcs)
            for name, writer in writers.items()
        }
        others = sorted(p.name for p in staging.path.iterdir() if p.name not in listed)
        manifest = Manifest(
            version=__version__,
            torch_version=torch.__version__,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            model=state.model_name,
            step=state.step,
            masters=self.inventory.masters,
            weights={name: shard for name, shard in listed.items() if name in weights},
            optimizer={name: shard for name, shard in listed.items() if name not in weights},
            steps=state.steps,
            param_groups=state.param_groups,
            optimizer_class=state.optimizer_class,
            scheduler=state.scheduler,
            scaler=state.scaler,
            random=state.random,
            extra=state.extra,
            other_files=tuple(others),
        )
        write_file(staging.path / MANIFEST, manifest.to_json())

    def _write_configs(self, path: Path) -> None:
        floats = [i.spec.dtype for i in self.inventory.weights if i.spec.dtype.is_floating_point]
        for config in self.state.configs:
            if floats and hasattr(config, "dtype"):
                config.dtype = floats[0]
            config.save_pretrained(path)
        for file in path.glob("*.json"):
            write_file(file, file.read_text(encoding="utf-8"))  # onto the disk


def _check_room(path: Path, shards: Mapping[str, Sequence[TensorSpec]]) -> None:
    needed = sum(ShardWriter.size_of(specs) for specs in shards.values())
    free = shutil.disk_usage(path).free
    if needed > free:
        raise LohanError(
            f"the checkpoint needs {format_bytes(needed)} on disk, but {path.parent} has "
            f"{format_bytes(free)} free (the previous checkpoint stays until the new one is whole)"
        )


def _stream(
    order: Iterable[Item],
    writers: Mapping[str, ShardWriter],
    read: ReadPiece,
    progress: Callable[[int], None],
) -> None:
    """Read piece after piece, and write beside it."""
    writer_of = {name: writer for writer in writers.values() for name in writer.crcs}
    pending: deque[Future[None]] = deque()
    ring = [torch.empty(PIECE_BYTES, dtype=torch.uint8) for _ in range(_PIECES)]
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="lohan-save") as threads:
        try:
            for item in order:
                for index, data in enumerate(_pieces(item, read, ring)):
                    writer = writer_of[item.spec.name]
                    view = data.numpy().data
                    pending.append(threads.submit(writer.write, item.spec.name, index, view))
                    progress(data.numel())
                    if len(pending) == _PIECES - 1:
                        pending.popleft().result()
            while pending:
                pending.popleft().result()
        except BaseException:
            for future in pending:
                future.cancel()
            raise


def _pieces(item: Item, read: ReadPiece, ring: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The bytes of a tensor; each piece is valid until _PIECES - 1 more have been made.

    What the bucket stores in another order than row-major passes through memory as a whole.
    """
    numel, size = item.spec.numel, item.spec.dtype.itemsize
    whole_N = item.buffer
    if whole_N is None and not item.row_major:
        stored_N = torch.empty(numel, dtype=item.stored)
        read(item.pid, item.section, 0, stored_N)
        whole_N = stored_N.as_strided(item.spec.shape, item.stride).contiguous()
    step = PIECE_BYTES // size
    for start in range(0, numel, step):
        stop = min(start + step, numel)
        ring.append(ring.pop(0))
        out = ring[-1][: (stop - start) * size]
        out_N = out.view(item.spec.dtype)
        if whole_N is not None:
            out_N.copy_(whole_N.reshape(-1)[start:stop])
        elif item.stored == item.spec.dtype:
            read(item.pid, item.section, start, out_N)
        else:
            stored_N = torch.empty(stop - start, dtype=item.stored)
            read(item.pid, item.section, start, stored_N)
            out_N.copy_(stored_N)
        yield out


def _files_of_others(staging: Staging) -> Iterator[Path]:
    """What the user has put beside the previous checkpoint: a tokenizer, notes."""
    if not staging.target.is_dir():
        return
    try:
        ours = Manifest.read(staging.target).files
    except (LohanError, TransferError):
        ours = {path.name for path in staging.target.glob("*.safetensors*")}
    for path in staging.target.iterdir():
        if path.name not in ours and path.name != MANIFEST:
            yield path
