"""Memory while a model is filled, saved and loaded does not depend on its size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20

# 57 M parameters: 226 MB of values, 679 MB with moments, under budgets of 75 and 100 MB.
_CHILD = """
import json, sys, time
from pathlib import Path
import torch
from torch import nn
import lohan_fx
from lohan_fx.checkpoint.shards import ShardWriter, TensorSpec

folder = Path(sys.argv[1])
torch.set_num_threads(1)

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1536, 1536, bias=False) for _ in range(24))
    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x) / 100
        return x.square().mean()

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024

found = {}
def measured(what, do, before=None):
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = status("VmRSS") if before is None else before
    start = time.perf_counter()
    do()
    found[what] = {"over": status("VmHWM") - before, "seconds": time.perf_counter() - start}

with torch.device("meta"):
    model = Deep()
specs = [TensorSpec(n, torch.float32, tuple(p.shape)) for n, p in model.named_parameters()]
writer = ShardWriter(folder / "model.safetensors", specs)
for spec in specs:
    writer.write(spec.name, 0, torch.randn(spec.numel).view(torch.uint8).numpy().data)
writer.finish()

budget = f"gpu=75MB, dram=100MB, ssd={folder}:3GB"
model = lohan_fx.compile(
    model, budget, device="cpu", lowering="aten", weights=folder / "model.safetensors"
)
optimizer = lohan_fx.AdamW(model.parameters(), lr=1e-5)
x = torch.randn(4, 1536)

def step():
    model(x).backward()
    optimizer.step()

from lohan_fx.runtime import Runtime

adopt = Runtime.adopt
Runtime.adopt = lambda *args: measured("place", lambda: adopt(*args))
step()
step()
model._lohan.runtime.drain()
found["report"] = {str(k): v for k, v in model._lohan.stats().current_bytes.items()}
measured("save", lambda: lohan_fx.save(model, optimizer, folder / "ckpt"))
measured("load", lambda: lohan_fx.load(model, optimizer, folder / "ckpt"))
found["saved"] = sum(p.stat().st_size for p in (folder / "ckpt").iterdir())
model.close()
print(json.dumps(found))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_memory_is_bounded_by_pieces(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    assert found["saved"] > 675_000_000
    assert found["report"]["ssd"] > 500_000_000
    assert found["save"]["over"] < 160 * MIB
    assert found["load"]["over"] < 160 * MIB
    # Both budgets, which on the CPU are memory of this process, and a few pieces.
    assert found["place"]["over"] < 175_000_000 + 96 * MIB
