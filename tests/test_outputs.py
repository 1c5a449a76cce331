"""What goes into and comes out of a model: losses made outside, results in tuples, dicts and dataclasses,
keyword and nested arguments; as in plain PyTorch, with weights on the GPU, in DRAM and on SSD."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import ROOMY, TIGHT, Tiny, assert_same, compiled, plain_adamw, tokens
from torch.nn import functional
from transformers.utils import ModelOutput

import lohan_fx
from lohan_fx.errors import CaptureError

BUDGETS = pytest.mark.parametrize(
    "budget", [ROOMY, "gpu=200kB, dram=1MB", TIGHT], ids=["gpu", "dram", "ssd"]
)


class Open(Tiny):
    """Tiny, whose logits and hidden states of two depths go out in a form of the subclass's."""

    def __init__(self) -> None:
        super().__init__(2)

    def pieces(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first = self.blocks[0](self.embed(ids))
        second = self.blocks[1](first)
        return self.head(second), first, second


class AsTuple(Open):
    def forward(self, ids: torch.Tensor) -> Any:  # type: ignore[override]
        logits, first, second = self.pieces(ids)
        return logits, (first, [second, None, 3])


class AsDict(Open):
    def forward(self, batch: dict[str, Any], *, scale: float = 1.0) -> Any:  # type: ignore[override]
        logits, first, second = self.pieces(batch["text"][0])
        return OrderedDict(logits=logits * scale, hidden={"first": first, "second": second})


@dataclass
class Result:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, torch.Tensor]
    name: str = "plain"


class AsDataclass(Open):
    def forward(self, ids: torch.Tensor, *, name: str) -> Result:  # type: ignore[override]
        logits, first, second = self.pieces(ids)
        return Result(logits, (first, second), name)


@dataclass
class HubResult(ModelOutput):
    logits: torch.Tensor | None = None
    hidden: tuple[torch.Tensor, ...] | None = None
    cache: torch.Tensor | None = None


class AsModelOutput(Open):
    def forward(self, **inputs: torch.Tensor) -> HubResult:  # type: ignore[override]
        logits, first, second = self.pieces(inputs["ids"])
        return HubResult(logits=logits, hidden=(first, second))


def call_tuple(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    logits, (first, (second, nothing, three)) = model(ids)
    assert (nothing, three) == (None, 3)
    return logits, first, second


def call_dict(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    found = model({"text": [ids], "source": "a file"}, scale=0.5)
    assert type(found) is OrderedDict
    return found["logits"], found["hidden"]["first"], found["hidden"]["second"]


def call_dataclass(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    found = model(ids, name="given")
    assert type(found) is Result
    assert found.name == "given"
    return found.logits, *found.hidden


def call_model_output(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    found = model(ids=ids)
    assert type(found) is HubResult
    assert found.cache is None
    assert list(found.keys()) == ["logits", "hidden"]
    return found[0], *found.hidden


@BUDGETS
@pytest.mark.parametrize(
    ("cls", "call"),
    [
        (AsTuple, call_tuple),
        (AsDict, call_dict),
        (AsDataclass, call_dataclass),
        (AsModelOutput, call_model_output),
    ],
    ids=["tuple", "dict", "dataclass", "model-output"],
)
def test_a_loss_made_outside_of_several_results(
    cls: type[Open],
    call: Callable[[Any, torch.Tensor], tuple[torch.Tensor, ...]],
    budget: str,
    tmp_path: Path,
) -> None:
    """Cross-entropy of one result, penalties on two others, one of them detached half of the time."""
    ours, theirs = compiled(cls(), tmp_path, budget), cls()
    optimizer, reference = lohan_fx.AdamW(ours.parameters()), plain_adamw(theirs)
    for index in range(3):
        ids = tokens(index, batch=2)["ids"]
        losses = []
        for model, opt in ((ours, optimizer), (theirs, reference)):
            logits, first, second = call(model, ids)
            assert logits.requires_grad
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss = loss + 1e-2 * first.square().mean()
            loss = loss + 1e-2 * (second.detach() if index == 1 else second).abs().mean()
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_same(ours, theirs)
    ours.close()


@BUDGETS
def test_a_branch_on_an_argument_is_a_program_of_its_own(budget: str, tmp_path: Path) -> None:
    """Python values decide at capture; what depends on tensors goes through torch.where."""

    class Choosing(Tiny):
        def forward(  # type: ignore[override]
            self, ids: torch.Tensor, labels: torch.Tensor, smooth: bool = False
        ) -> torch.Tensor:
            logits = super().forward(ids)
            if smooth:
                logits = torch.where(logits.mean() > 0, logits, logits * 0.5)
            return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    ours, theirs = compiled(Choosing(2), tmp_path, budget), Choosing(2)
    optimizer, reference = lohan_fx.AdamW(ours.parameters()), plain_adamw(theirs)
    for index in range(4):
        losses = []
        for model, opt in ((ours, optimizer), (theirs, reference)):
            loss = model(**tokens(index, batch=2), smooth=index % 2 == 1)
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(ours._lohan.captured) == 2
    assert_same(ours, theirs)
    ours.close()


def test_a_branch_on_a_tensor_deep_in_a_layer_names_its_line(tmp_path: Path) -> None:
    class Gate(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.abs().max() > 1e6:
                return x / 2
            return x

    model = Tiny(2)
    model.blocks[1].body.append(Gate())
    model = compiled(model, tmp_path)
    optimizer = lohan_fx.AdamW(model.parameters())
    source = Path(__file__).read_text().splitlines()
    number = 1 + next(i for i, text in enumerate(source) if "x.abs().max() > 1e6" in text)
    with pytest.raises(CaptureError, match=rf"test_outputs\.py:{number} in forward: if x\.abs"):
        model(**tokens(0))
    optimizer.zero_grad()
    model.close()
