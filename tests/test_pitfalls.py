"""Ways in which a planned step could be silently wrong, each closed off.

Runs over plain ATen regions; the same graphs under Inductor differ inside of regions only.
"""

from __future__ import annotations

import ast
import gc
import operator
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.compiled_autograd
from loops import (
    VOCAB,
    WIDTH,
    Block,
    Tiny,
    assert_losses,
    assert_same,
    compiled,
    plain_adamw,
    step,
    tokens,
)
from torch import fx, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from training import CASES, RandomPolicy, loss_of

import lohan_fx
from lohan_fx import ops
from lohan_fx.compiler.capture import paused_collector
from lohan_fx.compiler.values import storage_root
from lohan_fx.errors import CaptureError, TrainingLoopError
from lohan_fx.planner import (
    Forced,
    Ledger,
    Place,
    Problem,
    Room,
    Solution,
    activation_places,
    bucket_places,
    predict,
)

MLP = CASES["mlp"]
MOVES = [name for name in vars(ops.Moves) if not name.startswith("_")]


def trained(folder: Path, model: nn.Module | None = None, **options: Any) -> tuple[Any, Any]:
    """A compiled model and its optimizer after one step."""
    ours = compiled(Tiny() if model is None else model, folder, **options)
    optimizer = lohan_fx.AdamW(ours.parameters())
    step(ours, optimizer, tokens(0))
    return ours, optimizer


def moves_of(graph: fx.Graph) -> list[tuple[str, Any]]:
    """Name and number of every move; frames (begin, end) have no number of their own to compare."""
    found = []
    for node in graph.nodes:
        if ops.is_move(node):
            arg = node.args[1] if len(node.args) > 1 else None
            found.append((node.target._opname, arg if isinstance(arg, int) else None))  # type: ignore[union-attr]
    return found


# ---- Order: what the plan says is what runs ----


@pytest.mark.parametrize("seed", range(3))
def test_the_moves_that_run_are_those_of_the_program_in_its_order(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(tmp_path, policy=RandomPolicy(seed), dtype=torch.bfloat16)
    log: list[tuple[str, Any]] = []

    def logged(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def move(*args: Any) -> Any:
            log.append((name, args[0] if args and isinstance(args[0], int) else None))
            return plain(*args)

        return move

    passes = model._lohan.runtime.passes
    for name in MOVES:
        monkeypatch.setattr(passes, name, logged(name, getattr(passes, name)))
    step(model, optimizer, tokens(1))
    program = model._lohan.captured[0].woven.program
    expected = [
        ("begin", program.index),
        *((move.op, move.arg) for move in program.forward),
        ("end", None),
        ("begin_backward", None),
        *((move.op, move.arg) for move in program.backward),
        ("end", None),
    ]
    assert log == expected
    model.close()


def test_no_move_is_lost_between_graph_source_and_plan(tmp_path: Path) -> None:
    model, _ = trained(tmp_path, policy=RandomPolicy(1))
    captured = model._lohan.captured[0]
    for part in ("forward", "backward"):
        in_graph = moves_of(getattr(captured.woven, part).graph)
        skeleton = captured.skeletons[part]
        assert moves_of(skeleton.graph) == in_graph
        calls = [n.func for n in ast.walk(ast.parse(skeleton.source)) if isinstance(n, ast.Call)]
        names = Counter(f.id for f in calls if isinstance(f, ast.Name) and f.id in MOVES)
        assert names == Counter(op for op, _ in in_graph)
        planned = [(m.op, m.arg) for m in model.plan.schedule if m.in_pass == part]
        frame = ("begin", "begin_backward", "end")
        assert planned == [(op, arg) for op, arg in in_graph if op not in frame]
    model.close()


def test_every_slot_is_empty_after_a_step(tmp_path: Path) -> None:
    model, _ = trained(tmp_path, policy=RandomPolicy(1))
    program = model._lohan.captured[0].woven.program
    moves = Counter(move.op for move in (*program.forward, *program.backward))
    assert len(program.slots) > 0
    for op in ("offload", "offload_wait", "reload", "reload_wait"):
        assert moves[op] == len(program.slots)
    cells = model._lohan.runtime._resources.opened().slots._cells.values()
    assert {cell.state.name for cell in cells} == {"EMPTY"}
    model.close()


def test_each_gradient_arrives_once(tmp_path: Path) -> None:
    model, _ = trained(tmp_path, policy=RandomPolicy(2))
    program = model._lohan.captured[0].woven.program
    arrived = Counter(move.arg for move in program.backward if move.op == "grad")
    assert arrived == Counter(range(len(list(model.parameters()))))
    model.close()


# ---- Parameters without bytes ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("seed", range(2))
def test_no_parameter_nor_a_view_of_one_is_read_or_saved_as_it_is(
    seed: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Only what wait() hands out is read; what is saved for backward shares no bytes with that."""
    model, _ = trained(tmp_path, policy=RandomPolicy(seed), dtype=dtype)
    woven = model._lohan.captured[0].woven
    inputs = [node for node in woven.forward.graph.find_nodes(op="placeholder") if node.users]
    assert not any(node.meta["val"].is_floating_point() for node in inputs)
    for module in (woven.forward, woven.backward):
        for node in module.graph.output_node().all_input_nodes:
            root = storage_root(node)
            origin = root.args[0] if root.target is operator.getitem else root
            assert not (ops.is_move(origin) and origin.target._opname == "wait"), node
    model.close()


def test_views_of_one_tensor_are_swapped_as_one(tmp_path: Path) -> None:
    class Fused(nn.Module):
        """Query, key and value are three views of one result."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCAB, WIDTH)
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
            self.head = nn.Linear(WIDTH, VOCAB)

        def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(self.embed(ids)).chunk(3, -1)
            x = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

    for seed in range(4):
        model, optimizer = trained(tmp_path, Fused(), policy=RandomPolicy(seed))
        graph = model._lohan.captured[0].woven.forward.graph
        sources = [
            n.args[2] for n in graph.nodes if ops.is_move(n) and n.target._opname == "offload"
        ]
        roots = [storage_root(source) for source in sources]
        assert len(set(roots)) == len(roots)
        plain = Fused()
        reference = plain_adamw(plain)
        step(plain, reference, tokens(0))
        pair = step(model, optimizer, tokens(1)), step(plain, reference, tokens(1))
        assert pair[0] == pytest.approx(pair[1], rel=1e-5)
        model.close()


def test_evaluation_of_an_untouched_model_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    """A forward that nobody rewrote would read null there, and crash."""
    code = f"""
import torch, lohan_fx
from loops import Tiny, compiled, tokens
from pathlib import Path
model = compiled(Tiny(), Path({str(tmp_path)!r}), "gpu=160kB, dram=260kB").eval()
with torch.no_grad():
    ours = model(tokens(0)["ids"])
torch.testing.assert_close(ours, Tiny()(tokens(0)["ids"]))
"""
    folders = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import sys; sys.path[:0] = {folders}\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("after", [False, True], ids=["before the first step", "after it"])
def test_a_call_that_dynamo_leaves_to_eager_is_refused_and_does_no_harm(
    after: bool, tmp_path: Path
) -> None:
    """Eager kernels would read parameters without bytes."""
    model, plain = compiled(MLP.build(), tmp_path), MLP.build()
    optimizer, reference = lohan_fx.AdamW(model.parameters()), plain_adamw(plain)
    if after:
        assert_losses(
            [step(model, optimizer, MLP.batch(0))], [step(plain, reference, MLP.batch(0))]
        )
    with pytest.raises(CaptureError, match="FlopCounterMode"), FlopCounterMode(display=False):
        model(**MLP.batch(1))
    assert_losses([step(model, optimizer, MLP.batch(1))], [step(plain, reference, MLP.batch(1))])
    with (
        pytest.raises(CaptureError, match="left this call to eager"),
        torch.compiler.set_stance("force_eager"),
    ):
        model(**MLP.batch(1))
    assert_losses([step(model, optimizer, MLP.batch(2))], [step(plain, reference, MLP.batch(2))])
    model.close()


def test_an_outer_torch_compile_changes_nothing(tmp_path: Path) -> None:
    model, plain = compiled(MLP.build(), tmp_path), MLP.build()
    optimizer, reference = lohan_fx.AdamW(model.parameters()), plain_adamw(plain)

    @torch.compile(backend="eager")
    def doubled(batch: Any) -> torch.Tensor:
        return model(**batch) * 2

    for index in range(2):
        loss, expected = doubled(MLP.batch(index)), plain(**MLP.batch(index)) * 2
        torch.testing.assert_close(loss, expected)
        for total, opt in ((loss, optimizer), (expected, reference)):
            total.backward()
            opt.step()
            opt.zero_grad()
    assert_same(model, plain)
    model.close()


# ---- Caches and shared code ----


def test_one_graph_under_two_plans_is_two_programs(tmp_path: Path) -> None:
    """No cache serves the code of one plan for another."""
    models = [trained(tmp_path, policy=RandomPolicy(seed))[0] for seed in (1, 2)]
    programs = [m._lohan.captured[0].woven.program for m in models]
    assert programs[0].forward != programs[1].forward
    numbers = [m._lohan.runtime.number for m in models]
    assert numbers[0] != numbers[1]
    for model, number in zip(models, numbers, strict=True):
        graph = model._lohan.captured[0].woven.forward.graph
        assert {n.args[0] for n in graph.nodes if ops.is_move(n)} == {number}
        model.close()


@pytest.mark.parametrize("budget", ["gpu=1GB, dram=1GB", "gpu=230kB, dram=2MB"])
def test_distinct_regions_do_not_grow_with_depth(budget: str, tmp_path: Path) -> None:
    """So that a deep model costs no more to compile than a shallow one."""
    counts = []
    for layers in (2, 6):
        model, _ = trained(tmp_path, Tiny(layers), budget=budget, bucket_numel=10_000)
        skeletons = model._lohan.captured[0].skeletons
        counts.append({part: s.num_distinct for part, s in skeletons.items()})
        assert skeletons["backward"].num_regions >= 4 * layers
        model.close()
    assert counts[0] == counts[1]


# ---- Random numbers and recomputation ----


def policy(prefer: Place) -> Callable[[Problem, Forced], Solution]:
    """Every activation at `prefer` where that is allowed, weights in DRAM."""

    def solve(problem: Problem, forced: Forced) -> Solution:
        buckets = [bucket_places(b)[-1] for b in problem.buckets]
        activations = [
            prefer if prefer in activation_places(a) else activation_places(a)[0]
            for a in problem.activations
        ]
        windows = Ledger(problem, buckets, activations).windows(next(iter(Room)))
        return Solution(
            policy=str(prefer),
            buckets=tuple(buckets),
            activations=tuple(activations),
            windows=windows,
            predicted=predict(problem, buckets, activations, windows),
        )

    return solve


def test_dropout_is_the_same_whether_kept_swapped_or_recomputed(tmp_path: Path) -> None:
    """And the same as in plain PyTorch with the same seed."""
    plain = Tiny(2, dropout=0.3)
    reference = plain_adamw(plain)
    expected = []
    for index in range(3):
        torch.manual_seed(index)
        expected.append(step(plain, reference, tokens(index)))
    runs = []
    for place in (Place.GPU, Place.DRAM, Place.SSD, Place.RECOMPUTE):
        model = compiled(Tiny(2, dropout=0.3), tmp_path, policy=policy(place))
        optimizer = lohan_fx.AdamW(model.parameters())
        losses = []
        for index in range(3):
            torch.manual_seed(index)
            losses.append(step(model, optimizer, tokens(index)))
        used = Counter(t.placement for t in model.plan.tensors if t.cls == "activation")
        assert used[str(place)] > 2
        runs.append((losses, model.state_dict()))
        model.close()
    assert_losses(runs[0][0], expected)
    for losses, weights in runs[1:]:
        assert losses == runs[0][0]
        assert all(torch.equal(value, runs[0][1][name]) for name, value in weights.items())


def test_the_random_stream_goes_on_as_in_plain_pytorch(tmp_path: Path) -> None:
    """A step draws what plain dropout draws, no more: data loading after it sees the same numbers."""
    model, plain = compiled(Tiny(2, dropout=0.3), tmp_path), Tiny(2, dropout=0.3)
    optimizer, reference = lohan_fx.AdamW(model.parameters()), plain_adamw(plain)
    for index in range(2):
        after = []
        for which, opt in ((model, optimizer), (plain, reference)):
            torch.manual_seed(index)
            step(which, opt, tokens(index))
            after.append(torch.rand(3))
        assert torch.equal(*after)
    model.close()


@pytest.mark.parametrize("seed", range(2))
def test_the_users_own_checkpointing_with_dropout_is_exact(seed: int, tmp_path: Path) -> None:
    class Checkpointed(Tiny):
        def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
            x = self.embed(ids)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            assert labels is not None
            return functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

    model = compiled(Checkpointed(2, 0.2), tmp_path, policy=RandomPolicy(seed))
    plain = Checkpointed(2, 0.2)
    optimizer, reference = lohan_fx.AdamW(model.parameters()), plain_adamw(plain)
    for index in range(2):
        losses = []
        for which, opt in ((model, optimizer), (plain, reference)):
            torch.manual_seed(index)
            losses.append(step(which, opt, tokens(index)))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_same(model, plain)
    model.close()


# ---- Modes of autograd and of the compiler that do not go together with a plan ----


def test_saved_tensor_hooks_around_the_forward_are_refused(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    with (
        pytest.raises(TrainingLoopError, match="saved-tensor hooks"),
        torch.autograd.graph.save_on_cpu(),
    ):
        model(**MLP.batch(0))
    assert step(model, optimizer, MLP.batch(0)) > 0
    model.close()


def test_compiled_autograd_is_refused(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    compiler = torch.compile(backend="eager")
    with (
        pytest.raises(TrainingLoopError, match="compiled autograd"),
        torch._dynamo.compiled_autograd._enable(compiler),
    ):
        model(**MLP.batch(0))
    with (
        pytest.raises(TrainingLoopError, match="compiled autograd"),
        torch._dynamo.config.patch(compiled_autograd=True),
    ):
        model(**MLP.batch(0))
    assert step(model, optimizer, MLP.batch(0)) > 0
    model.close()


def test_nested_compile_regions_are_refused(tmp_path: Path) -> None:
    @torch.compiler.nested_compile_region
    def run(block: Block, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = block(x)
        return result

    class Nested(Tiny):
        def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
            x = self.embed(ids)
            for block in self.blocks:
                x = run(block, x)
            return x.square().mean() + self.head(x).mean()

    model = compiled(Nested(2), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    with pytest.raises(CaptureError, match="nested_compile_region"):
        model(**tokens(0))
    optimizer.zero_grad()
    model.close()


def test_symbolic_sizes_are_refused(tmp_path: Path) -> None:
    model = compiled(MLP.build(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    batch = MLP.batch(0)
    for value in batch.values():
        torch._dynamo.mark_dynamic(value, 0)
    with pytest.raises(CaptureError, match="symbolic size; call with fixed shapes"):
        model(**batch)
    assert step(model, optimizer, MLP.batch(0)) > 0
    model.close()


def test_a_returned_parameter_is_refused(tmp_path: Path) -> None:
    class Returns(Tiny):
        def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
            return super().forward(ids, labels), self.head.weight[:3]

    model = compiled(Returns(2), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    with pytest.raises(CaptureError, match=r"returns parameter 'head\.weight' or a view"):
        model(**tokens(0))
    optimizer.zero_grad()
    model.close()


# ---- Threads and logs ----


def test_no_python_thread_is_started(tmp_path: Path) -> None:
    """One would slow every operation of the step down by waiting for the interpreter."""
    before = set(threading.enumerate())
    model, optimizer = trained(tmp_path, policy=RandomPolicy(1))
    step(model, optimizer, tokens(1))
    started = set(threading.enumerate()) - before
    # torch's own tracing starts tqdm's monitor, which sleeps.
    assert {type(thread).__name__ for thread in started} <= {"TMonitor"}
    model.close()
    package = Path(lohan_fx.__file__).parent
    # Saving, loading, probing and the first placing use threads, for as long as they last; progress of
    # these needs a lock.
    files = [
        f
        for f in package.rglob("*.py")
        if not {"checkpoint", "probe"} & set(f.parts)
        and f.name not in ("placing.py", "progress.py")
    ]
    assert len(files) > 50
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            banned = ("threading", "concurrent.futures", "multiprocessing")
            assert not any(name.startswith(banned) for name in names), file


def test_what_a_capture_makes_is_old_to_the_garbage_collector() -> None:
    assert gc.isenabled()
    with paused_collector():
        assert not gc.isenabled()
        made = [[] for _ in range(5000)]  # type: ignore[var-annotated]
    assert gc.isenabled()
    assert any(item is made[0] for item in gc.get_objects(generation=2))
    gc.disable()
    try:
        with paused_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_capture_logs_nothing_at_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    case = CASES["llama"]
    model = compiled(case.build(), tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    loss_of(model(**case.batch(0))).backward()
    optimizer.step()
    model.close()
    assert caplog.records == []
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
