"""`python -m lohan_fx.plan`: arguments, exit codes, and models by name."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import activation, bucket, problem

from lohan_fx import api, view
from lohan_fx.budget import Budget
from lohan_fx.cli.models import PRESETS, resolve_model
from lohan_fx.cli.plan import main
from lohan_fx.errors import LohanError
from lohan_fx.hardware import Hardware
from lohan_fx.plan import Plan, TensorRow, build_plan, validate_json
from lohan_fx.planner import solve
from lohan_fx.report import plain_text, tables_of
from lohan_fx.step import TracedStep

FACTORY = """
import torch

def build(batch, seq):
    return torch.nn.Linear(seq, 3), {"input": torch.zeros(batch, seq)}

def no_sizes():
    return torch.nn.Linear(2, 3), (torch.zeros(4, 2),)

def wrong():
    return torch.nn.Linear(2, 3)

def broken(batch):
    raise RuntimeError("no such thing")

def leaves():
    raise SystemExit(2)

def reads_values(**sizes):
    torch.ones(1).item()
    return torch.nn.Linear(2, 3), (torch.zeros(sizes["batch"], 2, dtype=torch.long),)
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with factories."""
    (tmp_path / "lohan_factories.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "lohan_factories", raising=False)
    return "lohan_factories"


Calls = list[dict[str, Any]]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Answers make_plan and trace_step with a small problem, under the caller's budget; records the
    calls."""
    calls: Calls = []

    def trace_step(
        model: torch.nn.Module, budget: Budget, example_inputs: Any, **rest: Any
    ) -> TracedStep:
        calls.append({"model": model, "budget": budget, "inputs": example_inputs, **rest})
        asked = problem(2, (bucket(0, 0), bucket(1, 1)), (activation(0, 0),))
        rows = (TensorRow("w", "weight16", 0, (1024, 1024), "bfloat16", 2**21, bucket=0),)
        return TracedStep(
            model=type(model).__name__,
            hardware=rest["hardware"],
            problem=dataclasses.replace(asked, capacities=budget.capacities()),
            tensors=rows,
            tokens_per_step=None,
        )

    def make_plan(*args: Any, **rest: Any) -> Plan:
        return trace_step(*args, **rest).plan(rest["policy"])

    monkeypatch.setattr(api, "trace_step", trace_step)
    monkeypatch.setattr(api, "make_plan", make_plan)
    return calls


def test_a_bound_on_ssd_writes_is_read_with_its_unit(planned: Calls, factories: str) -> None:
    asked = ["--model", f"{factories}:build", "--hardware", "rtx4090"]
    assert main([*asked, "--max-writes-per-day", "1.5TB"]) == 0
    assert planned[0]["max_writes_per_day"] == 1_500_000_000_000


def test_a_bound_on_ssd_writes_that_is_no_size_is_an_error(
    factories: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--model", f"{factories}:build", "--hardware", "rtx4090"]
    assert main([*asked, "--max-writes-per-day", "lots"]) == 1
    assert "--max-writes-per-day: 'lots' is not a size" in capsys.readouterr().err


def test_a_plan_that_fits_is_summarised_and_exits_with_0(
    planned: Calls, factories: str, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = ["--hardware", "lohan-rtx4090", "--ssds", "3", "--budget", "gpu=24GB,dram=100GB"]
    sizes = ["--batch", "2", "--seq", "5", "--dtype", "fp16"]
    code = main(["--model", f"{factories}:build", *machine, *sizes])
    assert code == 0
    (call,) = planned
    assert call["dtype"] is torch.float16
    assert call["policy"] == "optimal" and call["overlap"] == "auto"
    assert call["max_writes_per_day"] is None
    assert call["hardware"] == Hardware.preset("lohan-rtx4090", 3)
    assert call["budget"].dram == 100 * 10**9
    free = 0.9 * 3 * 3840e9  # of which a round number is taken
    assert free * 63 / 64 <= call["budget"].ssd_bytes <= free
    assert call["inputs"]["input"].shape == (2, 5)
    out, err = capsys.readouterr()
    assert f"{factories}:build" in out and "limited by" in out
    assert "\x1b" not in out and err == ""


def _deep_config(folder: Path) -> str:
    config = {"model_type": "gpt2", "n_layer": 12, "n_head": 2, "n_embd": 32, "vocab_size": 97}
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    file = folder / "config.json"
    file.write_text(json.dumps(config | dropout))
    return str(file)


def test_many_equal_layers_are_traced_as_few_unless_the_plan_may_be_replayed(
    planned: Calls, tmp_path: Path
) -> None:
    asked = ["--model", _deep_config(tmp_path), "--hardware", "h200"]

    def traced(*more: str) -> list[int]:
        planned.clear()
        assert main([*asked, *more]) == 0
        return [call["model"].config.n_layer for call in planned]

    # The problem that stands in here has as many stages for 4 layers as for 5.
    assert traced() == [4, 5, 12]
    assert {call["bucket_numel"] for call in planned[:2]} == {65536}
    assert planned[2]["bucket_numel"] is None
    assert traced("--full-trace") == [12]
    assert traced("--dump", str(tmp_path / "plan.json")) == [12]
    assert traced("--json") == [12]


def test_a_plan_from_few_layers_is_the_one_from_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--batch", "2", "--seq", "16", "--hardware", "lohan-rtx4090"]
    asked = ["--model", _deep_config(tmp_path), *sizes]
    assert main(asked) == 0
    repeated = capsys.readouterr().out.splitlines()
    assert main([*asked, "--full-trace"]) == 0
    full = capsys.readouterr().out.splitlines()
    (note,) = (line for line in repeated if "layers repeated from a trace of 4" in line)
    assert [line for line in repeated if line != note] == full


def test_the_plan_is_written_where_dump_says(
    planned: Calls, factories: str, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    assert main(["--model", f"{factories}:build", "--hardware", "h200", "--dump", str(file)]) == 0
    plan = Plan.from_json(file.read_text())
    assert plan.fits and plan.model == f"{factories}:build" and plan.hardware == "h200"


def test_the_plan_and_its_page_are_written_in_one_go(
    planned: Calls, factories: str, tmp_path: Path
) -> None:
    dump, page = tmp_path / "plan.json", tmp_path / "plan.html"
    asked = ["--model", f"{factories}:build", "--hardware", "h200", "--dump", str(dump)]
    assert main([*asked, "--html", str(page)]) == 0
    plan = Plan.from_json(dump.read_text())
    assert page.read_text() == view.render([(plan.model, plan)])
    assert main([*asked, "--html", str(page), "--budget", "gpu=1MB"]) == 2
    assert "Nothing fits" in page.read_text() and '"fits":false' in page.read_text()


def test_a_plan_that_does_not_fit_exits_with_2_and_says_what_would(
    planned: Calls, factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    arguments = ["--model", f"{factories}:build", "--hardware", "h200", "--budget", "gpu=1MB"]
    assert main([*arguments, "--dump", str(file)]) == 2
    err = capsys.readouterr().err
    assert "GPU: 6.29 MB at least, the budget has 1.00 MB" in err
    assert err.count("\n") == 1
    plan = Plan.from_json(file.read_text())
    assert not plan.fits and plan.solution is None and plan.budget.gpu == 10**6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--model"),
        (["--model", "x", "--batch", "0"], "positive whole number"),
        (["--model", "x", "--seq", "ten"], "positive whole number"),
        (["--model", "x", "--dtype", "int4"], "invalid choice"),
        (["--model", "x", "--policy", "magic"], "not available in this version; optimal is"),
        (["--model", "x", "--hardware", "abacus"], "no hardware preset 'abacus'"),
        (["--model", "x", "--hardware", "h200", "--budget", "gpu=much"], "'much' is not a size"),
        (["--model", "x", "--hardware", "h200", "--ssds", "4"], "fixed"),
        (["--model", "x", "--ssds", "4"], "--ssds"),
        (["--model", "x", "--hardware", "h200", "--dump", "/no/where/p.json"], "no directory"),
        (["--model", "x", "--hardware", "h200", "--dump", "/"], "is a directory"),
        (["--model", "x", "--hardware", "h200", "--html", "/no/where/p.html"], "no directory"),
        (["--model", "x", "--hardware", "h200", "--html", "/"], "is a directory"),
        (["--model", "x", "--hardware", "h200", "--compare", "--html", "p"], "--html writes one"),
        (["--model", "x" * 5000, "--hardware", "h200"], "is no model"),
        (["--model", "no-such-model", "--hardware", "h200"], "gpt-175b"),
        (["--model", "no_such_module:build", "--hardware", "h200"], "cannot be imported"),
    ],
)
def test_a_users_error_is_one_line_and_exits_with_1(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_help_lists_presets_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "Exit codes" in out and "lohan-rtx4090" in out and "gpt-412b" in out


def test_a_terminal_gets_tables(
    planned: Calls,
    factories: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["--model", f"{factories}:build", "--hardware", "h200"]) == 0
    out = capsys.readouterr().out
    assert "limited by" in out and "[" not in out.replace("\x1b[", "")


def test_plain_text_aligns_columns() -> None:
    text = plain_text([("t", ("a", "bb"), [("long", "x"), ("s", "yy")])])
    assert text.splitlines() == ["t", "  a     bb", "  long  x", "  s     yy"]


def test_a_plan_without_tokens_shows_no_rates() -> None:
    asked = problem(1, (bucket(0, 0),))
    plan = build_plan(
        asked, solve(asked), model="m", hardware="h", budget="", policy="greedy", tensors=()
    )
    assert "tokens/s" not in plain_text(tables_of(plan))


# ---- models ----


def test_a_factory_is_given_the_sizes_it_takes_and_allocates_nothing(factories: str) -> None:
    made = resolve_model(f"{factories}:build", batch=7, seq=5)
    assert all(p.is_meta for p in made.model.parameters())
    assert isinstance(made.example_inputs, dict)
    assert made.example_inputs["input"].shape == (7, 5)
    assert made.example_inputs["input"].device.type == "cpu"
    assert isinstance(resolve_model(f"{factories}:no_sizes", batch=7, seq=5).example_inputs, tuple)


def test_a_factory_that_reads_values_gets_real_ones(factories: str) -> None:
    made = resolve_model(f"{factories}:reads_values", batch=3, seq=5)
    assert made.tokens == 6


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrong", "must return"),
        ("broken", "RuntimeError: no such thing"),
        ("leaves", "SystemExit: 2"),
        ("absent", "cannot be imported"),
    ],
)
def test_a_factory_that_fails_is_named(factories: str, name: str, words: str) -> None:
    with pytest.raises(LohanError, match=words):
        resolve_model(f"{factories}:{name}", batch=1, seq=1)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-1b", 1.24),
        ("llama-3b", 3.21),
        ("llama-7b", 6.74),
        ("qwen-0.5b", 0.494),
        ("qwen-7b", 7.62),
        ("gpt-6b", 5.85),
        ("gpt-13b", 12.85),
    ],
)
def test_a_preset_is_built_at_its_size_without_allocating(name: str, billions: float) -> None:
    made = resolve_model(name, batch=2, seq=16)
    assert all(p.is_meta for p in made.model.parameters())
    assert sum(p.numel() for p in made.model.parameters()) / 1e9 == pytest.approx(
        billions, rel=0.01
    )
    assert isinstance(made.example_inputs, dict)
    assert made.example_inputs["labels"].shape == (2, 16)
    assert made.tokens == 32


def test_a_preset_takes_longer_sequences_than_it_was_made_for() -> None:
    assert resolve_model("gpt-6b", batch=1, seq=4096).model.config.n_positions == 4096


def test_the_papers_models_are_all_there() -> None:
    names = [f"gpt-{size}b" for size in (6, 13, 30, 70, 135, 175, 276, 412)]
    assert all(name in PRESETS for name in names)


@pytest.mark.parametrize("where", [lambda p: p, lambda p: p / "config.json"], ids=["dir", "file"])
def test_a_hugging_face_config_is_built(tmp_path: Path, where: Callable[[Path], Path]) -> None:
    folder = tmp_path / "tiny-bert"
    folder.mkdir()
    config = {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 100,
    }
    (folder / "config.json").write_text(json.dumps(config))
    made = resolve_model(str(where(folder)), batch=2, seq=8)
    assert made.name == "tiny-bert"
    assert type(made.model).__name__ == "BertForMaskedLM"


def test_a_vision_config_gets_pictures_and_counts_no_tokens(tmp_path: Path) -> None:
    config = {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 16,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = resolve_model(str(tmp_path), batch=3, seq=8)
    assert isinstance(made.example_inputs, dict)
    assert made.example_inputs["pixel_values"].shape == (3, 3, 32, 32)
    assert made.tokens is None


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"model_type": "no-such-model"}'])
def test_a_config_that_cannot_be_used_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(LohanError, match="config"):
        resolve_model(str(tmp_path), batch=1, seq=1)


# ---- from the command to the file, nothing replaced ----

REAL = """
import torch
from torch import nn

class Blocks(nn.Module):
    def __init__(self, seq):
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
            for _ in range(3)
        )
        self.register_buffer("positions", torch.arange(seq))

    def forward(self, tokens, bias):
        x = self.embed(tokens) + self.embed(self.positions) + bias
        for block in self.blocks:
            x = x + block(x)
        return x.float().logsumexp(-1).mean()

def build(batch, seq):
    inputs = {"tokens": torch.zeros(batch, seq, dtype=torch.long), "bias": torch.zeros(32)}
    return Blocks(seq), inputs

def misfit(batch, seq):
    return nn.Linear(4, 3), (torch.zeros(batch, seq),)

def branches(batch):
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)
    return Branching(4, 3), (torch.zeros(batch, 4),)
"""


def test_a_hugging_face_config_is_planned_on_the_command_line(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_layer": 3, "n_head": 2, "n_embd": 32, "vocab_size": 97}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = ["--batch", "2", "--seq", "16"]
    asked = ["--model", "config.json", "--hardware", "lohan-rtx4090", *sizes, "--dump", "plan.json"]
    done = subprocess.run(
        [sys.executable, "-m", "lohan_fx.plan", *asked],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    plan = Plan.from_json((tmp_path / "plan.json").read_text())
    assert plan.fits and plan.model == tmp_path.name
    assert plan.throughput.tokens_per_s is not None
    assert {move.in_pass for move in plan.schedule} == {"forward", "backward"}
    assert plan.num_params == 32 * (97 + 1024 + 2) + 3 * (12 * 32**2 + 13 * 32)


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments; the module `real` is there to be imported."""
    (tmp_path / "real.py").write_text(REAL)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "real", raising=False)
    return ["--hardware", "lohan-rtx4090"]


def test_a_factory_is_planned(real: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    budget = ["--budget", "gpu=1300KB,dram=1MB,ssd=1GB"]
    assert main([*real, "--model", "real:build", "--batch", "8", "--seq", "64", *budget]) == 0
    out, err = capsys.readouterr()
    assert "1.3 MB" in out and "limited by" in out and err == ""


def test_what_cannot_fit_exits_with_2_and_leaves_a_plan_that_says_so(
    real: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = ["--budget", "gpu=20KB,dram=1MB,ssd=none", "--dump", str(tmp_path / "plan.json")]
    assert main([*real, "--model", "real:build", *budget]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "the budget has 20.00 kB" in err
    raw = json.loads((tmp_path / "plan.json").read_text())
    validate_json(raw)
    assert not raw["fits"] and "at least" in raw["reasons"][0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("misfit", "real:misfit: forward() fails on the example inputs: RuntimeError: "),
        ("branches", "real:branches: the model cannot be captured"),
    ],
)
def test_a_forward_that_cannot_be_traced_is_one_line_with_the_factorys_name(
    real: list[str], name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*real, "--model", f"real:{name}", "--batch", "2", "--seq", "5"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert words in err
