"""Tables of several plans: --compare, --sweep, --max-model, --pin and --json."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from small_step import BUDGET, build, small_step

import lohan_fx
from lohan_fx.cli import many
from lohan_fx.cli import plan as command
from lohan_fx.cli.models import family_of, preset_names, resolve_model
from lohan_fx.cli.plan import main
from lohan_fx.errors import InfeasiblePlan, LohanError
from lohan_fx.pins import forced_placements
from lohan_fx.plan import Plan
from lohan_fx.planner import SOLVERS, Overlap, validate

SMALL = ["--model", "small_step:build", "--hardware", "lohan-rtx4090", "--budget", BUDGET]
SIZES = ["--batch", "8", "--seq", "64"]


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    code = main([*SMALL, *SIZES, *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Tracing answers with the small model's step, whatever is asked for; records what was."""
    asked: list[tuple[str, int, int]] = []

    def trace(self: Any, batch: int, seq: int, model: str | None = None) -> Any:
        asked.append((model or self.args.model, batch, seq))
        have = self.budget.capacities()
        step = small_step(batch, seq).named(asked[-1][0])
        return step.with_capacity(gpu=have.gpu_bytes, dram=have.dram_bytes, ssd=have.ssd_bytes)

    monkeypatch.setattr(command._Question, "trace", trace)
    return asked


# ---- compare ----


def test_compare_traces_once_and_has_a_row_for_every_policy(
    traced: list[tuple[str, int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, raw = printed(["--compare"], capsys)
    assert code == 0
    assert [row["policy"] for row in raw["rows"]] == list(SOLVERS)
    assert traced == [("small_step:build", 8, 64)]
    greedy = next(row for row in raw["rows"] if row["policy"] == "greedy")
    expected = small_step().solve("greedy").predicted
    assert greedy["step_s"] == expected.step_s and greedy["peak_bytes"] == expected.peak_bytes


def test_what_a_traced_step_plans_is_what_make_plan_plans() -> None:
    model, inputs = build(8, 64)
    plan = lohan_fx.make_plan(model, BUDGET, inputs, hardware="lohan-rtx4090", dtype=torch.bfloat16)
    again = small_step().plan()
    assert again.solution == plan.solution
    assert again.tensors == plan.tensors and again.throughput == plan.throughput


def test_a_table_is_plain_text_where_piped(
    traced: list[tuple[str, int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *SIZES, "--compare"]) == 0
    out = capsys.readouterr().out
    assert "policy" in out and "greedy" in out and "SSD writes" in out and "\x1b" not in out


# ---- sweep ----


def test_sweeps_multiply_and_trace_each_size_once(
    traced: list[tuple[str, int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, raw = printed(["--sweep", "batch=4,8", "--sweep", "dram=1MB,2MB,4MB"], capsys)
    assert code == 0
    points = [(row["batch"], row["dram"]) for row in raw["rows"]]
    assert points == [(b, d) for b in ("4", "8") for d in ("1MB", "2MB", "4MB")]
    assert [size[1:] for size in traced] == [(4, 64), (8, 64)]
    for row in raw["rows"]:
        assert row["peak_bytes"]["dram"] <= float(row["dram"][:-2]) * 1e6
    assert all(
        b["step_s"] <= a["step_s"] for a, b in zip(raw["rows"][:2], raw["rows"][1:3], strict=True)
    )


def test_a_sweep_says_what_each_row_lacks_and_exits_with_2_if_none_fits(
    traced: list[tuple[str, int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, raw = printed(["--sweep", "gpu=1KB,20KB"], capsys)
    assert code == 2
    assert not any(row["fits"] for row in raw["rows"])
    first, second = (row["lacks_bytes"]["gpu"] for row in raw["rows"])
    assert first - second == 19_000
    code, raw = printed(["--sweep", "gpu=1KB,1300KB"], capsys)
    assert code == 0 and [row["fits"] for row in raw["rows"]] == [False, True]


def test_more_ssds_are_faster_and_larger(
    traced: list[tuple[str, int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--sweep", "ssds=1,4", "--sweep", "gpu=800KB", "--sweep", "dram=410KB"]
    code, raw = printed(arguments, capsys)
    one, four = raw["rows"]
    assert code == 0 and one["ssd_bytes_written_per_step"] > 0
    assert four["step_s"] < one["step_s"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sweep", "batch"], "is not NAME=VALUE"),
        (["--sweep", "batch="], "is not NAME=VALUE"),
        (["--sweep", "batch=4,,8"], "empty value"),
        (["--sweep", "batch=4,four"], "'four' is not a positive whole number"),
        (["--sweep", "batch=0"], "positive whole number"),
        (["--sweep", "batch=²"], "positive whole number"),
        (["--sweep", "batch=4,4"], "twice"),
        (["--sweep", "batch=4", "--sweep", "batch=8"], "there twice"),
        (["--sweep", "dram=lots"], "'lots' is not a size"),
        (["--sweep", "speed=1"], "choose one of batch"),
        (["--sweep", "policy=magic"], "'magic'"),
        (["--sweep", "overlap=never"], "'never' is not one of"),
        (["--sweep", "ssds=13"], "1 to 12"),
        (["--sweep", "batch=" + ",".join(map(str, range(1, 1100)))], "1099 plans"),
        (["--sweep", "batch=2", "--compare"], "not allowed with"),
        (["--sweep", "batch=2", "--dump", "p.json"], "one plan"),
        (["--max-model"], "families of presets (llama, qwen, gpt, dit)"),
        (["--pin", "embed.weight"], "is not NAME_PATTERN=PLACE"),
        (["--pin", "=ssd"], "is not NAME_PATTERN=PLACE"),
        (["--pin", "embed.weight=tape"], "places are gpu, dram, ssd, recompute"),
        (["--pin", "state:*=recompute"], "only activations"),
        (["--pin", "a=ssd", "--pin", "a=dram"], "asks for ssd and for dram"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    traced: list[tuple[str, int, int]],
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*SMALL, *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1
    assert traced == []


# ---- the largest model ----


@pytest.mark.parametrize("limit", range(6))
def test_the_largest_model_is_found_between_two_that_were_planned(limit: int) -> None:
    names = [f"m{n}" for n in range(5)]
    answer = small_step().solve("greedy").predicted

    def attempt(name: str) -> many.Row:
        fits = names.index(name) < limit
        return many.Row({"model": name}, "backward", answer if fits else None)

    rows, best, beyond = many.largest_fitting(names, attempt)
    planned = [row.labels["model"] for row in rows]
    assert best == (names[limit - 1] if limit else None)
    assert best is None or best in planned
    if limit < 5:
        assert beyond is not None and beyond.labels["model"] == names[limit]
    else:
        assert beyond is None


def test_max_model_takes_a_family_or_a_member_and_says_what_the_next_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The batch stands for the model's size here: 1, 2, 4, ... for one preset after another."""

    def trace(self: Any, batch: int, seq: int, model: str | None = None) -> Any:
        assert model is not None
        step = small_step(2 ** family_of(model).index(model), 64)
        return step.named(model).with_capacity(gpu=160_000)

    monkeypatch.setattr(command._Question, "trace", trace)
    machine = ["--hardware", "lohan-rtx4090", "--budget", "gpu=160KB,dram=1MB,ssd=1GB"]
    for spec in ("gpt", "gpt-6b"):
        assert main(["--model", spec, *machine, "--max-model"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "the next one, gpt-" in lines[-2] and "at least, the budget has" in lines[-1]
    monkeypatch.undo()
    assert main(["--model", "gpt", *machine]) == 1
    assert "--max-model" in capsys.readouterr().err


def test_families_are_in_ascending_order() -> None:
    for family in ("llama", "qwen", "gpt", "dit"):
        sizes = [float(name.split("-")[1].removesuffix("b")) for name in family_of(family)]
        assert sizes == sorted(sizes) and len(sizes) >= 5
    assert family_of("gpt-13b") == family_of("gpt")
    assert family_of("gpt-13") == family_of("") == family_of("a/b-c") == ()


# ---- image models ----


@pytest.mark.parametrize("name", family_of("dit"))
def test_an_image_preset_has_the_size_in_its_name(name: str) -> None:
    made = resolve_model(name, batch=2, seq=256)
    count = sum(p.numel() for p in made.model.parameters())
    assert all(p.is_meta for p in made.model.parameters())
    assert count / 1e9 == pytest.approx(float(name[4:-1]), rel=0.05)
    assert isinstance(made.example_inputs, dict)
    assert made.example_inputs["latents"].shape == (2, 4, 32, 32)
    assert name in preset_names()


def test_an_image_model_of_no_square_is_refused() -> None:
    with pytest.raises(LohanError, match="try 961 or 1024"):
        resolve_model("dit-0.7b", batch=1, seq=1000)


def test_an_image_model_learns() -> None:
    from lohan_fx.cli.dit import DiT, example_inputs

    torch.manual_seed(0)
    model = DiT(layers=2, heads=2, hidden=32, side=4)
    torch.nn.init.zeros_(model.positions)
    inputs = example_inputs(2, 4)
    inputs["noise"] = torch.randn_like(inputs["noise"])
    before = model(**inputs)
    before.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.01 * p.grad
    assert model(**inputs) < before


# ---- pins ----


def test_a_pin_holds_in_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    code = main([*SMALL, *SIZES, "--pin", "blocks.1.*=ssd", "--json"])
    plan = Plan.from_json(capsys.readouterr().out)
    assert code == 0
    pinned = [t for t in plan.tensors if t.name.startswith("blocks.1.") and t.cls != "gradient"]
    assert pinned and {t.placement for t in pinned} == {"ssd"}
    assert {t.reason for t in pinned} == {"forced"}


def test_a_pin_of_states_leaves_weights_to_the_solver() -> None:
    step = small_step().with_capacity(gpu=10**9, dram=10**9)
    free = step.solve()
    assert {p.state for p in free.buckets} == {"gpu"}
    pinned = step.solve(pins={"state:*": "dram"})
    assert {p.state for p in pinned.buckets} == {"dram"}
    assert not validate(step.problem, pinned)
    both = step.solve(pins={"state:*": "dram", "weights:*": "dram"})
    assert {p.weight for p in both.buckets} == {"dram"}
    assert pinned.predicted.step_s <= both.predicted.step_s


def test_activations_are_pinned_by_layer() -> None:
    step = small_step().with_capacity(gpu=10**9, dram=10**9)
    layer = step.problem.stages[2].name
    solution = step.solve(pins={f"activation:{layer}": "dram"})
    inside = [
        place
        for place, a in zip(solution.activations, step.problem.activations, strict=True)
        if a.forward_stage == 2
    ]
    assert inside and set(inside) == {"dram"}
    outside = [
        place
        for place, a in zip(solution.activations, step.problem.activations, strict=True)
        if a.forward_stage == 1
    ]
    assert set(outside) == {"gpu"}


def test_compile_honours_pins() -> None:
    model, inputs = build(4, 16)
    compiled = lohan_fx.compile(
        model,
        "gpu=1GB, dram=1GB, ssd=none",
        pin={"embed.weight": "dram"},
        device="cpu",
        lowering="aten",
    )
    optimizer = lohan_fx.AdamW(compiled.parameters(), lr=1e-3)
    compiled(**inputs).backward()
    optimizer.step()
    places = {t.placement for t in compiled.plan.tensors if t.name == "embed.weight"}
    with torch.no_grad():
        compiled(**inputs)  # evaluation has no activations; pins stay silent there
    compiled.close()
    assert places == {"dram"}


@pytest.mark.parametrize(
    ("pins", "words"),
    [
        ({"blocks.7.*": "ssd"}, "near names are blocks"),
        ({"activation:blocks.7": "ssd"}, "no activation of this step"),
        ({"nothing like it": "ssd"}, "names look like"),
        ({"blocks.0.*": "ssd", "*": "dram"}, "'blocks.0.*' and '*' ask for ssd and dram"),
        ({"[": "ssd"}, "no tensor of this step is called '['"),
        ({"weights:": "ssd"}, "has no name in it"),
        ({"activation:*": "gpu", "activation:blocks.0": "ssd"}, "which another pin puts on gpu"),
    ],
)
def test_a_pin_that_cannot_hold_says_why(pins: dict[str, str], words: str) -> None:
    with pytest.raises(LohanError) as caught:
        small_step().solve(pins=pins)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_pin_that_no_plan_can_honour_is_infeasible() -> None:
    with pytest.raises(InfeasiblePlan, match="Forced placements: "):
        small_step().solve(pins={"*": "gpu"})


def test_a_pin_finds_the_same_bucket_by_either_name() -> None:
    step = small_step()
    bucket = next(b for b in step.problem.buckets if "embed" in b.name)
    (by_bucket,) = forced_placements({bucket.name: "ssd"}, step.tensors, step.problem)
    (by_tensor,) = forced_placements({"embed.weight": "ssd"}, step.tensors, step.problem)
    assert by_bucket == by_tensor and set(by_bucket.buckets) == {bucket.index}


def test_overlap_in_a_sweep_is_the_optimizers(
    traced: list[tuple[str, int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, raw = printed(["--sweep", "overlap=serial,backward", "--policy", "greedy"], capsys)
    assert [row["overlap"] for row in raw["rows"]] == [Overlap.SERIAL, Overlap.BACKWARD]
    for row in raw["rows"]:
        step = small_step().with_overlap(Overlap(row["overlap"]))
        assert row["step_s"] == step.solve("greedy").predicted.step_s
