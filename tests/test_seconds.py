"""Seconds of nodes: a roofline over what fused code really moves, and measured ops kept on disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import lohan_fx
from lohan_fx.compiler import op_seconds
from lohan_fx.compiler.fusion import fused_kernels
from lohan_fx.compiler.op_seconds import OpSeconds, signature
from lohan_fx.compiler.seconds import (
    ATTENTION_EFFICIENCY,
    KERNEL_S,
    MATMUL_EFFICIENCY,
    MEMORY_EFFICIENCY,
    Seconds,
    work_flops,
)
from lohan_fx.hardware import Hardware

aten = torch.ops.aten
# One TFLOP/s (bf16; fp32 a quarter) and one GB/s.
MACHINE = dataclasses.replace(
    Hardware.preset("h200"),
    flops_per_s={"bfloat16": 1e12, "float32": 0.25e12},
    gpu_mem_bytes_per_s=1e9,
)
CPU = torch.device("cpu")
ROW = 1000 * 100 * 4  # bytes of one [1000, 100] tensor of fp32


def traced(function: Callable[..., Any], *shapes: tuple[int, ...], dtype: Any = None) -> fx.Graph:
    """The ATen graph of a function of tensors of these shapes."""
    inputs = [torch.zeros(shape, dtype=dtype or torch.float32) for shape in shapes]
    graph: fx.Graph = make_fx(function, tracing_mode="fake")(*inputs).graph
    return graph


def run_of(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


def moved(graph: fx.Graph) -> list[int]:
    """Bytes of each fused kernel, in order of their first nodes."""
    return [kernel.nbytes for kernel in fused_kernels(run_of(graph))]


def memory_s(nbytes: int) -> float:
    return nbytes / (1e9 * MEMORY_EFFICIENCY) + KERNEL_S


def test_a_chain_of_pointwise_ops_reads_its_input_and_writes_its_result() -> None:
    graph = traced(lambda x: torch.relu(torch.exp(x) + 1) * 2, (1000, 100))
    assert moved(graph) == [2 * ROW]
    assert Seconds(MACHINE).of(run_of(graph)) == pytest.approx(memory_s(2 * ROW))


def test_the_same_chain_unfused_moves_every_result() -> None:
    graph = traced(lambda x: torch.relu(torch.exp(x) + 1) * 2, (1000, 100))
    seconds = Seconds(MACHINE, fused=False).of(run_of(graph))
    assert seconds == pytest.approx(4 * memory_s(2 * ROW))


def test_a_value_read_twice_in_a_kernel_is_read_once() -> None:
    graph = traced(lambda x, y: (x * y + x, x - y), (1000, 100), (1000, 100))
    # x and y once; the two results are of kernels that share nothing that was computed.
    assert sum(moved(graph)) == 2 * 3 * ROW
    graph = traced(lambda x, y: x * y + x + y, (1000, 100), (1000, 100))
    assert moved(graph) == [3 * ROW]


def test_a_norm_is_one_kernel_with_its_reduction_inside() -> None:
    graph = traced(lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)), (1000, 100))
    assert moved(graph) == [2 * ROW]


def test_the_gradient_of_a_bias_is_a_kernel_that_repeats_what_is_before_it() -> None:
    graph = traced(lambda g, x: (g * x).sum(0), (1000, 100), (1000, 100))
    assert moved(graph) == [2 * ROW + 100 * 4]


def test_code_on_both_sides_of_a_product_is_two_kernels() -> None:
    graph = traced(lambda x, w: torch.relu((x * 2) @ w) + x, (1000, 100), (100, 100))
    assert moved(graph) == [2 * ROW, 3 * ROW]


def test_what_is_made_again_for_a_gradient_is_made_where_that_arrives() -> None:
    """Nothing but backward's product reads exp(x), so it never reaches memory."""

    def backward(x: torch.Tensor, g: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        again = torch.exp(x)
        return (g @ w) * again

    graph = traced(backward, (1000, 100), (1000, 100), (100, 100))
    assert moved(graph) == [3 * ROW]


def test_what_another_pass_or_a_later_stage_reads_is_written() -> None:
    graph = traced(lambda x: torch.relu(torch.exp(x)), (1000, 100))
    exp, relu = run_of(graph)
    assert [k.nbytes for k in fused_kernels([exp, relu], kept={exp})] == [3 * ROW]
    assert [k.nbytes for k in fused_kernels([exp], later={relu})] == [2 * ROW]
    # Alone, and not kept, it is made again where it is read.
    assert fused_kernels([exp]) == []


def test_a_look_up_reads_the_rows_it_returns() -> None:
    def look_up(table: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return aten.embedding.default(table, at.long()) * 2

    graph = traced(look_up, (100_000, 100), (1000,))
    # Rows, indices and result; the table of 40 MB stays where it is.
    assert moved(graph) == [2 * ROW + 1000 * 4]


@pytest.mark.parametrize(("dtype", "rate"), [(torch.bfloat16, 1e12), (torch.float32, 0.25e12)])
def test_a_product_takes_its_flops_at_the_rate_of_its_dtype(dtype: Any, rate: float) -> None:
    graph = traced(lambda a, b: a @ b, (4096, 4096), (4096, 4096), dtype=dtype)
    expected = 2 * 4096**3 / (rate * MATMUL_EFFICIENCY) + KERNEL_S
    assert Seconds(MACHINE).of(run_of(graph)) == pytest.approx(expected)


def test_small_products_are_slower_than_large_ones() -> None:
    rates = []
    for size in (16, 64, 256, 1024):
        graph = traced(lambda a, b: a @ b, (size, size), (size, size))
        fast = dataclasses.replace(MACHINE, gpu_mem_bytes_per_s=1e15)
        rates.append(2 * size**3 / Seconds(fast).of(run_of(graph)))
    assert rates == sorted(rates) and rates[0] < rates[-1] / 10


def test_a_narrow_product_takes_what_its_bytes_take() -> None:
    graph = traced(lambda a, b: a @ b, (1, 4096), (4096, 4096))
    (node,) = run_of(graph)
    nbytes = 4 * (4096 * 4096 + 2 * 4096)
    assert Seconds(MACHINE).of([node]) == pytest.approx(memory_s(nbytes))


def attention(causal: bool) -> Callable[..., torch.Tensor]:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)[0]

    return run


@pytest.mark.parametrize("causal", [True, False])
def test_attention_has_its_own_rate_and_no_work_above_the_diagonal(causal: bool) -> None:
    shape = (2, 4, 512, 64)
    graph = traced(attention(causal), shape, shape, shape)
    node = run_of(graph)[0]
    full = 2 * 2 * 2 * 4 * 512 * 512 * 64
    assert work_flops(node) == (full / 2 if causal else full)
    fast = dataclasses.replace(MACHINE, gpu_mem_bytes_per_s=1e15)
    seconds = Seconds(fast).of_op(node)
    rate = 0.25e12 * ATTENTION_EFFICIENCY
    assert seconds == pytest.approx(work_flops(node) / rate + KERNEL_S)


# ---- measured ----


def measured(graph: fx.Graph, *, room_bytes: int = 10**9, **options: float) -> dict[str, float]:
    options = {"warm_s": 0.0, "measure_s": 0.0, **options}
    found = OpSeconds(CPU, room_bytes=room_bytes, **options).of(graph.nodes)
    return {node.name: seconds for node, seconds in found.items()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOHAN_FX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def products(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.relu(x @ w) @ w @ w.t()


def test_products_are_measured_once_each_and_nothing_else_is(cache: Path) -> None:
    graph = traced(products, (8, 16), (16, 16))
    calls = []
    real = op_seconds.seconds_per_call

    def counted(run: Any, device: torch.device, **options: float) -> float:
        calls.append(run)
        return real(run, device, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op_seconds, "seconds_per_call", counted)
        first = measured(graph)
        assert sorted(first) == ["mm", "mm_1", "mm_2"]
        assert first["mm"] == first["mm_1"] > 0  # the same op
        assert len(calls) == 2
        assert measured(graph) == first
        assert len(calls) == 2  # read from disk
    assert not OpSeconds(CPU, room_bytes=0).lacks(graph.nodes)
    assert OpSeconds(CPU, room_bytes=0).lacks(traced(products, (4, 16), (16, 16)).nodes)
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["machine"] == f"cpu, torch {torch.__version__}"


def test_strides_and_dtypes_are_part_of_what_is_measured() -> None:
    keys = {
        signature(run_of(traced(function, (16, 16), (16, 16), dtype=dtype))[-1])
        for function in (lambda a, b: a @ b, lambda a, b: a @ b.t())
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(keys) == 4


def test_measured_seconds_replace_the_roofline_and_say_so() -> None:
    graph = traced(lambda a, b: torch.relu(a @ b), (1000, 100), (100, 100))
    mm, relu = run_of(graph)
    seconds = Seconds(MACHINE, measured={mm: 5.0})
    assert seconds.source == "measured" and Seconds(MACHINE).source == "roofline"
    assert seconds.of([mm, relu]) == pytest.approx(5.0 + memory_s(2 * ROW))


def test_an_op_that_fails_is_left_to_the_roofline_with_a_note(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    graph = traced(products, (8, 16), (16, 16))

    def fails(*_: Any, **__: Any) -> float:
        raise RuntimeError("no kernel image")

    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(op_seconds, "seconds_per_call", fails)
        assert measured(graph) == {}
    assert "no kernel image" in caplog.text and "roofline" in caplog.text
    assert not OpSeconds(CPU, room_bytes=0).lacks(graph.nodes)
    assert measured(graph, room_bytes=0) == {}
    assert measured(graph)  # tried again


def test_an_op_that_does_not_fit_is_not_tried(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    graph = traced(lambda x, w, v: (x @ w, v @ w), (8, 16), (16, 16), (64, 16))
    with caplog.at_level("INFO"):
        # x @ w takes 4 * (8 * 16 + 16 * 16 + 8 * 16) = 2048 bytes, v @ w 9216; twice each.
        found = measured(graph, room_bytes=5000)
    assert list(found) == ["mm"]
    assert "mm_1: needs 18432 bytes" in caplog.text


def test_measuring_ends_in_time(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert measured(traced(products, (8, 16), (16, 16)), limit_s=-1.0) == {}
    assert "out of time" in caplog.text


@pytest.mark.parametrize("text", ["{", '{"schema": 0}', '{"schema": 1, "machine": "x"}', "[]"])
def test_a_cache_that_is_damaged_or_of_another_machine_is_measured_anew(
    cache: Path, text: str
) -> None:
    graph = traced(products, (8, 16), (16, 16))
    measured(graph)
    (file,) = cache.iterdir()
    file.write_text(text)
    assert len(measured(graph)) == 3
    assert json.loads(file.read_text())["schema"] == op_seconds.CACHE_SCHEMA


def test_measuring_under_fake_tensors_is_real_and_leaves_random_numbers_alone(cache: Path) -> None:
    shape = (2, 4, 64, 16)
    graph = traced(attention(True), shape, shape, shape)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with FakeTensorMode():
        found = measured(graph)
    assert len(found) == 1 and min(found.values()) > 0
    assert torch.equal(torch.rand(3), expected)


def test_backward_of_attention_is_measured_too(cache: Path) -> None:
    def both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> Any:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, out, lse, 0.0, True
        )

    shape = (2, 4, 64, 16)
    found = measured(traced(both, shape, shape, shape, shape))
    assert len(found) == 2


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.square().mean()


@pytest.mark.parametrize("profile", ["measured", "roofline", "auto"])
def test_a_run_measures_its_ops_where_it_is_told_to(
    profile: str, cache: Path, tmp_path: Path
) -> None:
    model = lohan_fx.compile(
        Small(), f"gpu=1MB, dram=1MB, ssd={tmp_path}:1MB", device="cpu", profile=profile
    )
    optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-3)
    loss = model(torch.ones(4, 32))
    loss.backward()
    optimizer.step()
    assert (
        f"seconds of ops: {'measured' if profile == 'measured' else 'roofline'}" in model.report()
    )
    assert cache.exists() == (profile == "measured")
    model.close()


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(lohan_fx.LohanError, match="roofline"):
        lohan_fx.compile(Small(), "gpu=1MB", device="cpu", profile="guess")
