"""Types of the compiled part. Pointers are addresses as int; sizes are in bytes unless named numel.

Arguments that make no sense raise ValueError; a transfer that fails or takes too long raises
lohan_fx.errors.TransferError. Calls that can take long release the GIL.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias, TypedDict

# ---- host memory ----

class HostBuffer:
    """Page-aligned host memory, a writable buffer of nbytes; freed with its last reference.

    `bytes` is rounded up to 4096. From 2 MiB up huge pages are asked for unless declined. Every
    page is there on return; `threads` (0: one for each usable CPU) share that work. A forked child
    does not have the memory. MemoryError when the host does not have it.
    """

    def __init__(self, bytes: int, *, huge_pages: bool = True, threads: int = 0) -> None: ...
    @property
    def ptr(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def copy(dst_ptr: int, src_ptr: int, bytes: int, threads: int = 0) -> None:
    """Copies with several threads (0: one for each usable CPU). The spans must not overlap."""

def host_available_bytes(root: str = "") -> int:
    """Bytes of memory this process may still take.

    The least of what the host has free or can free and what the process's control groups (version
    1 or 2) leave. `root` stands in for "/" when /proc and the control groups are read.
    """

# ---- files ----

class Faults(TypedDict, total=False):
    """Disk troubles made on purpose, for tests; alike on every backend."""

    short_every: int  # every n-th transfer moves only about half of its bytes
    errno: int  # transfers fail with this ...
    after: int  # ... from the one after the first `after` on ...
    times: int  # ... this many times (0, the default: always)
    delay_ms: int  # every transfer finishes this much later
    on: Literal["read", "write", "both"]  # which transfers the keys above are about; default both
    flip_every: int  # every n-th read brings back one wrong bit
    refuse_tmpfile: bool  # as a file system without O_TMPFILE does
    refuse_direct: bool  # as a file system without O_DIRECT does
    refuse_fallocate: bool  # as a file system without fallocate does

class FileEngine:
    """Asynchronous direct file I/O over directories, each extent striped over them.

    `capacities` are bytes for each directory, 0 for no limit. backend "auto" is io_uring where the
    kernel allows it, else threads; LOHAN_FX_IO=io_uring|threads stands in for "auto". Transfers
    have block_bytes at most; queue_depth of them are in flight for each directory. Files are
    nameless and mode 0600. TransferError, with path and errno, when a directory cannot be used.
    `verify` keeps 8 bytes for each 4096 written; a read of something else fails with EBADMSG.
    """

    def __init__(
        self,
        directories: Sequence[str],
        *,
        capacities: Sequence[int] | None = None,
        backend: str = "auto",
        block_bytes: int = 8388608,
        queue_depth: int = 32,
        verify: bool = False,
        faults: Faults | None = None,
    ) -> None: ...
    def close(self) -> None:
        """Waits for what is in flight and gives the disk space back. May be repeated."""

    def allocate(self, bytes: int) -> int:
        """Reserves disk space and returns its extent. TransferError (ENOSPC) when there is none."""

    def release(self, extent: int) -> None:
        """Gives the extent's space back, once the last request on it is done."""

    def read(self, extent: int, offset: int, ptr: int, bytes: int, name: str) -> int:
        """Starts a read into ptr and returns its ticket; never waits for the disk.

        ptr and offset are multiples of 4096; the memory has room up to the next multiple after
        `bytes`, all of which is moved, and stays valid until the ticket is done. Requests have no
        order among each other. `name` is for errors and the trace.
        """

    def write(self, extent: int, offset: int, ptr: int, bytes: int, name: str) -> int:
        """Starts a write from ptr; as for read."""

    def done(self, ticket: int) -> bool:
        """True once the request is over, also when it failed: wait() then raises."""

    def wait(self, ticket: int, timeout_s: float = 60.0) -> None:
        """Waits until done. TransferError, naming the request, if it failed or after timeout_s.

        A request that is late (ETIMEDOUT) is still in flight.
        """

    def take_trace(self) -> list[tuple[str, str, float, float]]:
        """(name, lane, start_s, end_s) of the requests done since the last call, oldest first.

        Lanes are "ssd_read" and "ssd_write"; times are time.monotonic()'s. At most the last 65536.
        """

    @property
    def backend(self) -> str:
        """The one in use, "io_uring" or "threads"."""

    @property
    def directories(self) -> list[str]: ...
    @property
    def direct(self) -> list[bool]:
        """For each directory: False where O_DIRECT is refused and the page cache is used."""

    @property
    def block_bytes(self) -> int: ...
    @property
    def queue_depth(self) -> int: ...
    @property
    def allocated_bytes(self) -> int:
        """Bytes of live extents, each rounded up to 4096."""

    @property
    def bytes_read(self) -> int: ...
    @property
    def bytes_written(self) -> int: ...
    @property
    def read_busy_s(self) -> float:
        """Seconds with at least one read in flight."""

    @property
    def write_busy_s(self) -> float: ...

# ---- CPU Adam ----

def isa() -> str:
    """Instruction set of the Adam in use: the best this CPU has, or LOHAN_FX_ISA."""

def available_isas() -> list[str]:
    """Instruction sets there is an Adam for on this CPU, best first; the last is "scalar"."""

def usable_cpus() -> int:
    """CPUs this process may run on."""

def measure(values_ptr: int, numel: int) -> tuple[float, float]:
    """(Sum of squares, largest magnitude) of fp32 values; NaN counts as the largest."""

def adam_factors(
    step: AdamStep,
) -> tuple[float, float, float, float, float, bool, float, float, float, float, float]:
    """The scalars that adam_update applies, each an fp32 value, for another implementation of it.

    unscale, grad_scale, decay, l2, blend, blend_from_grad, beta2, one_minus_beta2, bias2_sqrt, eps,
    step_size; kernels/adam.h says what they are. ValueError for a step below 1.
    """

def adam_update(
    master_ptr: int,
    exp_avg_ptr: int,
    exp_avg_sq_ptr: int,
    grad_ptr: int,
    grad_dtype: str,
    out_ptr: int,
    out_dtype: str | None,
    numel: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    step: int,
    grad_scale: float = 1.0,
    unscale: float = 1.0,
    num_threads: int = 0,
    isa: str | None = None,
    new_master_ptr: int = 0,
    new_exp_avg_ptr: int = 0,
    new_exp_avg_sq_ptr: int = 0,
) -> None:
    """Updates numel elements with torch.optim.AdamW's arithmetic.

    master, exp_avg and exp_avg_sq are fp32; grad_dtype is "float32", "bfloat16" or "float16". With an
    out_dtype ("bfloat16", "float16") the new weights also go to out_ptr, rounded to nearest even; it
    may be the memory of a 16-bit gradient. Else out_ptr is 0. `decoupled` is AdamW, else L2. Gradients
    are multiplied by unscale first, then by grad_scale. Every instruction set and number of threads
    (0: all usable CPUs) gives the same bits.

    The update is in place; with the three new_ pointers (all or none) master and moments are read only and
    their new values go there, to memory that overlaps no other array of the call.
    """

# ---- optimizer pipeline ----

Extent: TypeAlias = tuple[int, int]  # (extent of a FileEngine, byte offset in it: 4096 * n)
Place: TypeAlias = int | Extent  # host pointer, or on SSD

class AdamStep:
    """One step's scalars for one parameter group; names as in torch.optim.AdamW."""

    def __init__(
        self,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        decoupled: bool,
        step: int,
        grad_scale: float = 1.0,
        unscale: float = 1.0,
    ) -> None: ...
    @property
    def lr(self) -> float: ...
    @property
    def beta1(self) -> float: ...
    @property
    def beta2(self) -> float: ...
    @property
    def eps(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def decoupled(self) -> bool: ...
    @property
    def step(self) -> int: ...
    @property
    def grad_scale(self) -> float: ...
    @property
    def unscale(self) -> float: ...

class AdamJob:
    """One bucket's update. Its host memory stays valid and untouched until the job is done.

    Arrays have numel elements; master, exp_avg and exp_avg_sq are fp32. Segments are (offset, numel,
    index into groups) in elements, disjoint; what lies between them keeps its value.

    New weights in out_dtype ("bfloat16", "float16") go to the host pointer `out` (which may be that of
    a 16-bit gradient), to out_extent on SSD, or to both; with both, `out` is 4096-byte aligned with
    room up to the next multiple. Without an out_dtype the master is the weight.

    ready_events are CUevents (torch.cuda.Event.cuda_event; zeros are ignored) that must be complete
    before the gradient is read and any weight is written. They must exist until the job is done.

    With `accum`, a host pointer to numel fp32 sums, each segment's gradient first goes into them as its
    entry of `adds` says ("keep", "set", "add"; none at all: keep), and the update is made from the sums.
    With no groups there is no update, and no place for state is needed (0). `magnitudes` points to two
    doubles for each segment: its sums' sum of squares, and their largest magnitude (NaN counts as it).

    The update is in place, or the host pointers new_master, new_exp_avg and new_exp_avg_sq (all or none)
    receive the new fp32 values of the segments: then the old ones, which must be in memory, are
    only read, and no new array may overlap another array of the job. 16-bit weights go to `out` either way.

    Of the jobs that can be updated, that of the lowest rank comes first.
    """

    def __init__(
        self,
        *,
        name: str,
        numel: int,
        grad: int,
        grad_dtype: str,
        segments: Sequence[tuple[int, int, int]],
        groups: Sequence[AdamStep],
        master: Place,
        exp_avg: Place,
        exp_avg_sq: Place,
        out: int = 0,
        out_extent: Extent | None = None,
        out_dtype: str | None = None,
        ready_events: Sequence[int] = (),
        accum: int = 0,
        adds: Sequence[str] = (),
        magnitudes: int = 0,
        rank: int = 0,
        new_master: int = 0,
        new_exp_avg: int = 0,
        new_exp_avg_sq: int = 0,
    ) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def numel(self) -> int: ...
    @property
    def buffer_bytes(self) -> int:
        """Bytes of a state buffer that this job takes; 0 if nothing of it is on SSD only."""

class AdamPipeline:
    """Runs optimizer jobs one after another on threads of its own.

    mode "optimized" reads the next job's state from SSD and writes the last one's back beside the
    update of this one, "naive" does one thing after another; the numbers are the same. Of the
    jobs that can be updated, one that passes through a state buffer comes first, else that of the lowest
    rank, else that submitted first. state_buffers are (pointer, bytes), 4096-byte aligned, owned by
    the caller; two or three of the largest job's buffer_bytes let reads, updates and writes overlap.
    timeout_s bounds one job's read, its write and the wait for its events.
    """

    def __init__(
        self,
        num_threads: int = 0,
        mode: str = "optimized",
        engine: FileEngine | None = None,
        state_buffers: Sequence[tuple[int, int]] = (),
        *,
        timeout_s: float = 600.0,
        cuda_device: int = 0,
        trace_events: int = 65536,
    ) -> None: ...
    def set_state_buffers(self, buffers: Sequence[tuple[int, int]]) -> None:
        """Replaces the state buffers. ValueError while a job is in flight."""

    def submit(self, job: AdamJob) -> int:
        """Queues the job and returns its ticket; tickets grow by one."""

    def cancel(self, ticket: int) -> bool:
        """Drops the job if its update has not begun and it takes no state buffer; else does nothing.

        A dropped job is done soon: its arrays stay as they are, wait() returns without error, stats and
        trace leave it out. Returns at once, also while another job is being updated. ValueError for a ticket
        that was never given.
        """

    def done(self, ticket: int) -> bool:
        """True once new weights are in host memory and all of the job on SSD is written.

        Also for a failed job: wait() then raises.
        """

    def weights_ready(self, ticket: int) -> bool:
        """True once new weights are in host memory; state may still be on its way to SSD."""

    def wait(self, ticket: int, timeout_s: float) -> None:
        """Waits until done. TransferError, naming the job, if it failed or after timeout_s."""

    def wait_weights(self, ticket: int, timeout_s: float) -> None:
        """Like wait, for weights_ready."""

    def wait_any_weights(self, tickets: Sequence[int], timeout_s: float) -> None:
        """Waits until weights_ready of one of them; a failed one counts. TransferError after timeout_s."""

    @property
    def progress(self) -> int:
        """Grows whenever a job's weights are ready and whenever it is done."""

    def drain(self, timeout_s: float) -> None:
        """Waits for all jobs. Once one has failed, every drain raises its TransferError."""

    def close(self) -> None:
        """Finishes jobs under way, drops those not begun, ends the threads. May be repeated."""

    def stats(self) -> dict[str, float]:
        """Totals since construction.

        adam_s, read_s, write_s: seconds a lane was busy. read_wait_s, event_wait_s: seconds without an
        update because the next job's state, or its gradient, was not there. params, jobs: updated
        (cancelled and failed jobs are left out).
        """

    def take_trace(self) -> list[tuple[str, str, float, float]]:
        """(job, lane, start_s, end_s) of what ended since the last call, oldest first.

        Lanes are "ssd_read", "cpu_adam" and "ssd_write"; times are time.monotonic()'s.
        """
