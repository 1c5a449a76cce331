"""weights=: a model on the meta device takes its values from files, straight into its tiers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import TIGHT, Tiny, assert_same, compiled, step, steps, tokens
from safetensors.torch import save_file
from torch import nn
from training import CASES, gpt2, llama, qwen3, vit

import lohan_fx
from lohan_fx import LohanError


def on_meta(build: Callable[[], nn.Module]) -> Any:
    with torch.device("meta"):
        return build()


def written(model: nn.Module, path: Path, **changes: torch.Tensor | None) -> Path:
    """The model's state in one file; None leaves a tensor out."""
    state = {**model.state_dict(), **changes}
    save_file({n: v.contiguous() for n, v in state.items() if v is not None}, path)
    return path


@pytest.mark.parametrize("build", [gpt2, llama, qwen3, vit], ids=["gpt2", "llama", "qwen3", "vit"])
def test_a_hugging_face_directory_fills_a_meta_model(
    build: Callable[[], Any], tmp_path: Path
) -> None:
    plain = build()
    plain.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    model = compiled(on_meta(build), tmp_path, weights=tmp_path / "hf")
    assert_same(model, plain, exact=True)
    ours, theirs = dict(model.named_buffers()), dict(plain.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, buffer in ours.items():
        assert torch.equal(buffer, theirs[name]), name
    model.close()


def test_training_from_files_equals_training_from_memory(tmp_path: Path) -> None:
    case = CASES["llama"]
    plain = case.build()
    plain.save_pretrained(tmp_path / "hf")
    losses, models = [], []
    for build, weights in ((case.build, None), (lambda: on_meta(llama), tmp_path / "hf")):
        options: dict[str, Any] = {} if weights is None else {"weights": weights}
        model = compiled(
            build(), tmp_path, "gpu=400kB, dram=600kB", dtype=torch.bfloat16, **options
        )
        optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-3)
        losses.append(steps(model, optimizer, [case.batch(0), case.batch(1)]))
        models.append((model, optimizer))
    assert losses[0] == losses[1]
    first, second = (optimizer.state_dict()["state"] for _, optimizer in models)
    for index, state in first.items():
        for name, value in state.items():
            assert torch.equal(value, second[index][name]), name
    for model, _ in models:
        model.close()


def test_a_checkpoint_of_ours_is_a_source_too(tmp_path: Path) -> None:
    model = compiled(Tiny(), tmp_path, TIGHT, dtype=torch.bfloat16)
    optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-2)
    step(model, optimizer, tokens(0))
    lohan_fx.save(model, optimizer, tmp_path / "ckpt")
    again = compiled(on_meta(Tiny), tmp_path, dtype=torch.bfloat16, weights=tmp_path / "ckpt")
    assert_same(again, model, exact=True)
    resumed = lohan_fx.AdamW(again.parameters(), lr=1e-2)
    lohan_fx.load(again, resumed, tmp_path / "ckpt")
    assert step(again, resumed, tokens(1)) == step(model, optimizer, tokens(1))
    model.close()
    again.close()


def test_values_are_converted_and_replace_those_of_a_model_in_memory(tmp_path: Path) -> None:
    source = Tiny().to(torch.float16)
    file = written(source, tmp_path / "half.safetensors")
    other = Tiny()
    with torch.no_grad():
        other.head.weight.zero_()
    model = compiled(other, tmp_path, weights=file)
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.state_dict()["head.weight"], source.head.weight.float())
    model.close()


class Buffers(nn.Module):
    """A persistent and a non-persistent buffer, a transposed parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.across = nn.Parameter(torch.randn(4, 6).t())
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("ramp", torch.arange(6.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x @ self.across) * self.mean[:4] + self.ramp[:4]).sum()


def test_buffers_come_from_the_file_or_are_named(tmp_path: Path) -> None:
    plain = Buffers()
    file = written(plain, tmp_path / "one.safetensors")
    with pytest.raises(LohanError, match=r"buffer\(s\) ramp are on the meta device, in no file"):
        compiled(on_meta(Buffers), tmp_path, weights=file)
    model = on_meta(Buffers)
    model.ramp = torch.arange(6.0)
    model = compiled(model, tmp_path, weights=file)
    assert torch.equal(model.mean, plain.mean)
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model.state_dict()["across"], plain.across)
    model.close()


def _index(path: Path, **weight_map: str) -> None:
    text = json.dumps({"weight_map": weight_map})
    (path / "model.safetensors.index.json").write_text(text)


def test_what_does_not_fit_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    source = Tiny()
    file = tmp_path / "w.safetensors"

    def refused(match: str, weights: Path = file) -> None:
        model = on_meta(Tiny)
        with pytest.raises(LohanError, match=match):
            compiled(model, tmp_path, weights=weights)
        assert type(model) is Tiny and model.head.bias.is_meta

    written(source, file, **{"head.bias": None, "embed.weight": None})
    refused(r"does not fit Tiny: 2 parameter\(s\) are not in it: embed\.weight, head\.bias")
    written(source, file, **{"head.bias": torch.zeros(5)})
    refused(r"head\.bias has shape \(5,\) there, \(61,\) in the model")
    written(source, file, **{"head.bias": torch.zeros(61).to(torch.float8_e4m3fn)})
    refused(r"head\.bias is torch\.float8_e4m3fn there; quantized weights")
    written(source, file)
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    refused(r"w\.safetensors has [\d,]+ bytes, but its header says")
    file.write_bytes(b"\xff" * 100)
    refused(r"w\.safetensors is no safetensors file")
    file.write_bytes(data[:8] + b"[" + data[9:])
    refused(r"its header is damaged")
    refused(r"no such file or directory", tmp_path / "nothing")
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(r"this one has none", folder)
    _index(folder, a="part.safetensors")
    refused(r"folder lacks part\.safetensors, which model\.safetensors\.index\.json lists", folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(r"index\.json is damaged", folder)


def test_tensors_that_the_model_lacks_are_warned_of(tmp_path: Path) -> None:
    file = written(Tiny(), tmp_path / "w.safetensors", spare=torch.zeros(3))
    with pytest.warns(UserWarning, match=r"1 tensor\(s\) of weights=.* are not in Tiny: spare"):
        compiled(on_meta(Tiny), tmp_path, weights=file).close()
