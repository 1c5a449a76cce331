"""Hugging Face's own Trainer under a budget, against the same Trainer in plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loops import compiled
from peft import LoraConfig, get_peft_model
from terminals import terminal
from torch import nn
from torch.utils.data import Dataset
from training import RandomPolicy, llama
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lohan_fx
from lohan_fx.errors import LohanError
from lohan_fx.integrations.transformers import LohanTrainer
from lohan_fx.liveline import LiveLine

PLACES: dict[str, tuple[str, Any]] = {
    "gpu": ("gpu=1GB, dram=1GB", "greedy"),
    "mixed": ("gpu=1GB, dram=1GB", RandomPolicy(4)),
    "tight": ("gpu=300kB, dram=300kB", "greedy"),
}


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """Tokens; some labels are ignored, so that sentences count differently."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(1, 101, (12,), generator=torch.Generator().manual_seed(index))
        labels = ids.clone()
        labels[: index % 5] = -100
        return {"input_ids": ids, "labels": labels}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 5,
        "learning_rate": 5e-3,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def plain(folder: Path, model: nn.Module | None = None, **options: Any) -> Trainer:
    return Trainer(
        model=model or llama(1),
        args=arguments(folder / "plain", **options),
        train_dataset=Sentences(15),
        eval_dataset=Sentences(3),
    )


def lohan(
    folder: Path, model: nn.Module | None = None, place: str = "mixed", **options: Any
) -> LohanTrainer:
    (folder / "ssd").mkdir(exist_ok=True)
    budget, policy = PLACES[place]
    return LohanTrainer(
        model=model or llama(1),
        args=arguments(folder / "ours", **options),
        train_dataset=Sentences(15),
        eval_dataset=Sentences(3),
        budget=f"{budget}, ssd={folder / 'ssd'}:1GB",
        compile_options={"lowering": "aten", "bucket_numel": 3000, "policy": policy},
    )


def logged(trainer: Any, *names: str) -> list[dict[str, float]]:
    history = trainer.state.log_history
    return [{n: e[n] for n in names if n in e} for e in history if "train_runtime" not in e]


def assert_same_logs(ours: Any, theirs: Any, rel: float = 1e-4) -> None:
    names = ("loss", "grad_norm", "learning_rate", "eval_loss", "epoch", "step")
    found, expected = logged(ours, *names), logged(theirs, *names)
    assert len(found) == len(expected) > 0
    for mine, other in zip(found, expected, strict=True):
        assert mine == pytest.approx(other, rel=rel), (found, expected)


def assert_same_weights(ours: Any, theirs: Any) -> None:
    state = ours.model.state_dict()
    for name, value in theirs.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=2e-5, msg=name)


# Every step is clipped, or none is.
@pytest.mark.parametrize(("clip", "place"), [(0.5, "gpu"), (1e9, "mixed"), (0.5, "tight")])
def test_losses_norms_and_rates_are_those_of_plain_trainer(
    clip: float, place: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_grad_norm": clip, "eval_strategy": "steps", "eval_steps": 2}
    theirs, ours = plain(tmp_path, **options), lohan(tmp_path, place=place, **options)
    theirs.train()
    ours.train()
    assert_same_logs(ours, theirs)
    assert all(
        "grad_norm" in entry for entry in logged(ours, "loss", "grad_norm") if "loss" in entry
    )
    assert_same_weights(ours, theirs)
    assert [g["weight_decay"] for g in ours.optimizer.param_groups] == [0.1, 0.0]
    ours.model.close()


def test_without_clipping_no_norm_is_logged_and_updates_run_during_the_backward(
    tmp_path: Path,
) -> None:
    theirs, ours = (make(tmp_path, max_grad_norm=0.0) for make in (plain, lohan))
    theirs.train()
    ours.train()
    for entry in theirs.state.log_history:
        entry.pop("grad_norm", None)
    assert_same_logs(ours, theirs)
    assert_same_weights(ours, theirs)
    ours.model.close()


def test_micro_batches_accumulate_as_in_plain_trainer(tmp_path: Path) -> None:
    """Over unequal ones: 15 sentences in micro-batches of 2, 3 to a step, are 8, so 3 + 3 + 2."""
    options: dict[str, Any] = {"gradient_accumulation_steps": 3, "max_steps": 4}
    theirs, ours = (make(tmp_path, **options) for make in (plain, lohan))
    theirs.train()
    ours.train()
    assert_same_logs(ours, theirs)
    assert_same_weights(ours, theirs)
    ours.model.close()


def test_adapters_train_as_with_plain_trainer(tmp_path: Path) -> None:
    def build() -> nn.Module:
        base = llama(1)
        torch.manual_seed(1)
        config = LoraConfig(target_modules=["q_proj", "down_proj"], r=4, task_type="CAUSAL_LM")
        return get_peft_model(base, config)

    theirs, ours = plain(tmp_path, build()), lohan(tmp_path, build())
    theirs.train()
    ours.train()
    assert_same_logs(ours, theirs)
    assert_same_weights(ours, theirs)
    ours.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    ours.model.close()


def test_bf16_computes_in_bfloat16_with_fp32_masters(tmp_path: Path) -> None:
    theirs, ours = (make(tmp_path, bf16=True, max_steps=3) for make in (plain, lohan))
    theirs.train()
    ours.train()
    assert {p.dtype for p in ours.model.parameters()} == {torch.bfloat16}
    assert_same_logs(ours, theirs, rel=3e-2)
    masters = [s["master"].dtype for s in ours.optimizer.state_dict()["state"].values()]
    assert set(masters) == {torch.float32}
    ours.model.close()


def test_a_run_resumes_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    whole = lohan(tmp_path, max_steps=6, **saving)
    whole.train()
    names = sorted(p.name for p in (tmp_path / "ours").iterdir())
    assert names == ["checkpoint-4", "checkpoint-6"]
    resumed = lohan(tmp_path, max_steps=6, place="gpu", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-4"))
    assert resumed.state.global_step == 6
    files = {p.name for p in (tmp_path / "ours" / "checkpoint-4").iterdir()}
    assert {"lohan_fx.json", "config.json", "generation_config.json", "scheduler.pt"} <= files
    assert "optimizer.pt" not in files
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours" / "checkpoint-6")
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name
    whole.model.close()
    resumed.model.close()


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "learning_rate": 0.2,  # so that it gets worse
        "warmup_steps": 0,
        "max_steps": 4,
    }
    ours = lohan(tmp_path, **options)
    ours.train()
    best = ours.state.best_metric
    assert best is not None
    assert ours.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)
    ours.model.close()


def test_a_model_compiled_before_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "ssd").mkdir()
    model = compiled(llama(1), tmp_path / "ssd")
    ours = LohanTrainer(model, arguments(tmp_path / "ours"), train_dataset=Sentences(15))
    theirs = plain(tmp_path)
    ours.train()
    theirs.train()
    assert_same_logs(ours, theirs)
    with pytest.raises(LohanError, match="give budget="):
        LohanTrainer(model, arguments(tmp_path), budget="1GB")
    with pytest.raises(LohanError, match="give budget="):
        LohanTrainer(llama(1), arguments(tmp_path))
    model.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optim": "adafactor"}, r"optim='adafactor'.*choose one of adamw_torch"),
        ({"torch_compile": True}, r"torch_compile=True.*compiles the model itself"),
        ({"bf16_full_eval": True}, r"bf16_full_eval=True"),
        ({"auto_find_batch_size": True}, r"auto_find_batch_size=True"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused_by_name(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = llama(1)
    with pytest.raises(LohanError, match=words):
        LohanTrainer(model, arguments(tmp_path, **options), budget="1GB")
    assert not isinstance(model, lohan_fx.CompiledModel)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    model = llama(1)
    (tmp_path / "ssd").mkdir()
    trainer = LohanTrainer(
        model,
        arguments(tmp_path / "out"),
        train_dataset=Sentences(4),
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
        budget=f"gpu=1GB, dram=1GB, ssd={tmp_path / 'ssd'}:1GB",
    )
    with pytest.raises(LohanError, match=r"holds a SGD; give lohan_fx\.AdamW"):
        trainer.train()
    model.close()


def test_a_terminal_may_show_a_live_line_in_place_of_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = terminal(monkeypatch)
    # Every step is late enough to change it.
    monkeypatch.setattr("lohan_fx.liveline._PERIOD_S", 0.0)
    (tmp_path / "ssd").mkdir()
    trainer = LohanTrainer(
        model=llama(1),
        args=arguments(tmp_path, disable_tqdm=False, max_steps=3, logging_strategy="no"),
        train_dataset=Sentences(6),
        budget=f"gpu=1GB, dram=1GB, ssd={tmp_path / 'ssd'}:1GB",
        compile_options={"lowering": "aten"},
        live=True,
    )
    lines: list[str] = []
    monkeypatch.setattr(LiveLine, "_words", said(lines))
    trainer.train()
    assert len(lines) == 2 and "loss " in lines[-1] and "tokens/s" in lines[-1]
    assert trainer._line is None and "it/s" not in shown.getvalue()


def said(lines: list[str]) -> Any:
    """LiveLine._words, which notes what it says."""
    words = LiveLine._words

    def noting(self: LiveLine, *args: Any) -> str:
        lines.append(words(self, *args))
        return lines[-1]

    return noting
