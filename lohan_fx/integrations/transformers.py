"""Hugging Face's `Trainer` under a memory budget.

    from lohan_fx.integrations.transformers import LohanTrainer

    trainer = LohanTrainer(model=model, args=args, train_dataset=data, budget="gpu=24GB, dram=100GB")
    trainer.train()

Everything else is the Trainer's: data, schedules, logging, evaluation, `checkpoint-N` directories and
resuming from them. For a subclass of Trainer, put `LohanMixin` before it in the bases.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_pt_utils import get_parameter_names

from lohan_fx.api import CompiledModel, compile
from lohan_fx.budget import Budget
from lohan_fx.checkpoint import load, save
from lohan_fx.checkpoint.manifest import MANIFEST, Manifest
from lohan_fx.errors import LohanError, TrainingLoopError
from lohan_fx.liveline import LiveLine
from lohan_fx.liveline import live as live_line
from lohan_fx.optim import Adam, AdamW

# TrainingArguments.optim whose update is lohan_fx.AdamW's.
_ADAMW = ("adamw_torch", "adamw_torch_fused")


class LohanMixin:
    """Makes a Trainer train within `budget`: compiles its model, and gives it `lohan_fx.AdamW`.

    Of the training arguments, these mean:

    * `max_grad_norm` is the optimizer's (exact, over all gradients); the logged `grad_norm` is the norm
      before clipping, as in plain Trainer, and is left out where there is no clipping.
    * `bf16` computes in bfloat16 with fp32 masters, in place of autocast; `fp16` is refused.
    * Checkpoints of a whole model are those of `lohan_fx.save`: streamed, in shards that `from_pretrained`
      reads, with the optimizer's state in the same `checkpoint-N`; adapters (peft) are saved as the
      Trainer does. Resuming is exact: bit for bit under the same plan.
    * `gradient_accumulation_steps` goes through `model.no_sync()`.
    * `weight_decay`, `adam_beta1`, `adam_beta2`, `adam_epsilon` and `optim` (one of torch's AdamW) as
      usual; another optimizer, DeepSpeed, FSDP, several processes, `torch_compile`, `model_init`,
      full 16-bit evaluation are refused.

    Args:
        model: a model, or one that `lohan_fx.compile` has had already (then without `budget`).
        budget: as in `lohan_fx.compile`.
        compile_options: further keyword arguments of `lohan_fx.compile`.
        live: on a terminal, the line of `lohan_fx.live` in place of the Trainer's bar.

    Raises:
        LohanError: an argument asks for what cannot be had under a budget; names it.
        BudgetError: see `lohan_fx.compile`.
    """

    model: Any
    args: Any
    optimizer: Any
    accelerator: Any
    lr_scheduler: Any
    state: Any
    processing_class: Any
    data_collator: Any
    _with_state = False  # whether _save writes the optimizer's state
    _line: LiveLine | None = None  # while training

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        args: TrainingArguments | None = None,
        *arguments: Any,
        budget: str | int | Budget | None = None,
        compile_options: Mapping[str, Any] | None = None,
        live: bool = False,
        **keywords: Any,
    ) -> None:
        if model is None:
            raise LohanError("give the model itself; model_init would build a second one beside it")
        if (budget is None) != isinstance(model, CompiledModel):
            raise LohanError(
                "give budget=, or a model that lohan_fx.compile has had already, and not both"
            )
        if args is None:
            args = TrainingArguments(output_dir="tmp_trainer")
        _check_arguments(args)
        super().__init__(model, args, *arguments, **keywords)  # type: ignore[call-arg]
        self._live = live
        if live:
            self.remove_callback(ProgressCallback)  # type: ignore[attr-defined]
        if budget is not None:
            options = {"device": args.device, **(compile_options or {})}
            if args.bf16:
                options.setdefault("dtype", torch.bfloat16)
            compile(model, budget, **options)
        # What accelerate leaves as it is: neither moved, nor wrapped, nor under autocast.
        object.__setattr__(model, "_is_accelerate_prepared", True)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer."""
        if not self._live:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        with live_line(self.model) as self._line:
            try:
                return super().train(*args, **kwargs)  # type: ignore[misc]
            finally:
                self._line = None

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        """The plan says where the model's tensors are."""

    def _wrap_model(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        return model

    def create_optimizer(self, model: torch.nn.Module | None = None) -> Any:
        """lohan_fx.AdamW over two groups, with weight decay and (biases, norms) without."""
        if self.optimizer is None:
            options = self.args
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            decays = set(self._decaying())
            groups = [
                {"params": [p for n, p in named if (n in decays) is wanted], "weight_decay": decay}
                for wanted, decay in ((True, options.weight_decay), (False, 0.0))
            ]
            self.optimizer = AdamW(
                [group for group in groups if group["params"]],
                lr=options.learning_rate,
                betas=(options.adam_beta1, options.adam_beta2),
                eps=options.adam_epsilon,
                max_grad_norm=options.max_grad_norm or None,
            )
        elif not isinstance(self.optimizer, Adam):
            raise LohanError(
                f"optimizers= holds a {type(self.optimizer).__name__}; give lohan_fx.AdamW or "
                "lohan_fx.Adam, made after lohan_fx.compile"
            )
        optimizer: Any = self.optimizer
        optimizer._is_accelerate_prepared = True
        optimizer.step_was_skipped = False  # what accelerate asks its own wrapper
        return optimizer

    def _decaying(self) -> list[str]:
        names = getattr(self, "get_decay_parameter_names", None)
        if names is not None:
            found: list[str] = names(self.model)
            return found
        return list(get_parameter_names(self.model, [torch.nn.LayerNorm], ["bias", "norm"]))

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """As in Trainer; all micro-batches of a step but the last one run under `no_sync()`."""
        if isinstance(num_items_in_batch, int):  # as a number it would be part of the program
            num_items_in_batch = torch.tensor(num_items_in_batch, device=self.args.device)
        last = self.accelerator.gradient_state.sync_gradients
        with contextlib.nullcontext() if last else model.no_sync():
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if self._line is not None:
            self._line.update(loss)
        return loss

    def _prepare_input(self, data: Any) -> Any:
        """On the device; floating-point inputs (not labels) in the compute dtype, as under autocast."""
        data = super()._prepare_input(data)  # type: ignore[misc]
        if not isinstance(data, MutableMapping) or not self.args.bf16:
            return data
        labels = getattr(self, "label_names", None) or ()
        cast = {
            name: value.to(torch.bfloat16)
            for name, value in data.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point() and name not in labels
        }
        data.update(cast)  # a dict or a UserDict, made by the Trainer's own method
        return data

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._with_state = not self.args.save_only_model
        try:
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._with_state = False

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As in Trainer; a whole model streams to the disk instead of through a state_dict."""
        where = Path(output_dir or self.args.output_dir)
        if state_dict is not None or hasattr(self.model, "peft_config"):
            super()._save(str(where), state_dict)  # type: ignore[misc]
            return
        save(self.model, self.optimizer if self._with_state else None, where)
        torch.save(self.args, where / "training_args.bin")
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(where)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if hasattr(self.model, "peft_config"):
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        else:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights come with the optimizer's state, in _load_optimizer_and_scheduler."""
        if not _is_ours(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not _is_ours(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        with_state = Manifest.read(Path(checkpoint)).param_groups is not None
        load(self.model, self.optimizer if with_state else None, checkpoint)
        schedule = Path(checkpoint) / SCHEDULER_NAME
        if schedule.exists():
            self.lr_scheduler.load_state_dict(torch.load(schedule, weights_only=True))

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if _is_ours(best):
            load(self.model, None, best)
        else:
            super()._load_best_model()  # type: ignore[misc]

    def _clip_grad_norm(self, model: Any) -> None:
        """The optimizer clips in its step."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> None:
        """Known after the step; see _maybe_log_save_evaluate."""

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any
    ) -> None:
        norm = self.optimizer.last_grad_norm
        super()._maybe_log_save_evaluate(tr_loss, norm, *args, **kwargs)  # type: ignore[misc]


class LohanTrainer(LohanMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` within a memory budget; see LohanMixin."""


def _is_ours(checkpoint: str) -> bool:
    return (Path(checkpoint) / MANIFEST).is_file()


def _check_arguments(args: TrainingArguments) -> None:
    optim = str(getattr(args.optim, "value", args.optim))
    wrong = {
        "fp16=True": (args.fp16, "fp16 needs loss scaling; use bf16=True"),
        f"optim={optim!r}": (optim not in _ADAMW, f"choose one of {', '.join(_ADAMW)}"),
        "deepspeed=": (bool(args.deepspeed), "the budget takes its place"),
        "fsdp=": (bool(args.fsdp), "the budget takes its place"),
        "torch_compile=True": (args.torch_compile, "lohan_fx compiles the model itself"),
        "bf16_full_eval=True": (args.bf16_full_eval, "evaluation computes as training does"),
        "fp16_full_eval=True": (args.fp16_full_eval, "evaluation computes as training does"),
        "auto_find_batch_size=True": (
            args.auto_find_batch_size,
            "a budget that is too small is an error that says by how much",
        ),
    }
    for name, (given, instead) in wrong.items():
        if given:
            raise LohanError(f"{name} cannot be used under a budget: {instead}")
    if args.world_size > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainingLoopError("lohan_fx trains in one process on one device; start one process")


__all__ = ["LohanMixin", "LohanTrainer"]
