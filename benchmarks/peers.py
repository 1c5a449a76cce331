"""Other ways to train the same model: in memory with torch.compile, DeepSpeed ZeRO, FSDP2.

`python benchmarks/train.py --engine NAME` runs them; `ENGINES` has the names. Each trains a bf16 model
of benchmarks/models.py with AdamW on one device. A GPU budget is held by torch's allocator, which then
fails with an out-of-memory error; DRAM is not limited.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable
from typing import Any

import models
import torch

LEARNING_RATE = 1e-5
WEIGHT_DECAY = 1e-2
BETAS = (0.9, 0.999)
EPS = 1e-8


class NotInstalled(Exception):
    """A peer that cannot be imported here; the message says what to install."""


class Peer:
    """What the peers share; see measure.Engine for what is asked of one."""

    overlaps = False

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args = args
        self.device = device
        self.batch = 0
        self.clip: float | None = None
        self.num_params = 0

    def set(self, batch: int, clip: float | None) -> None:
        """Take the next steps with this batch and this bound on the gradients' norm (None: none)."""
        self.batch, self.clip = batch, clip

    def save_memory(self) -> bool:
        """After an out-of-memory error: change something and say True to try again."""
        return False

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def drain(self) -> None:
        pass

    def moved_bytes(self) -> dict[str, int]:
        return {}

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


class InMemory(Peer):
    """torch.compile of the whole model, everything on the device.

    With `masters`, as lohan_fx trains a bf16 model: fp32 master weights and moments, updated by one
    compiled kernel a parameter that reads the bf16 gradient and writes the bf16 weight (28 bytes a
    parameter; torch's fused AdamW would need fp32 gradients, and more passes). Without, torch's fused
    AdamW on bf16 weights and moments: other numbers, half the memory.

    Layers are checkpointed from the first on, as few as an estimate of the activations says.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, masters: bool) -> None:
        super().__init__(args, device)
        self.masters = masters
        self.backend = "inductor" if args.lowering == "inductor" else "aot_eager"
        self.model = models.build(args.size, args.seq, torch.bfloat16, device)
        self.num_params = models.num_params(self.model)
        self.checkpointed = -1
        self.model.compile(backend=self.backend, dynamic=False)
        params = list(self.model.parameters())
        if masters:
            self.update = FusedAdamW(params, self.backend)
        else:
            self.optimizer = torch.optim.AdamW(
                params, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
            )

    def set(self, batch: int, clip: float | None) -> None:
        if (batch, clip) == (self.batch, self.clip):
            return
        if batch != self.batch:
            chosen = self.args.checkpoint_layers
            self._checkpoint(self._estimate(batch) if chosen is None else chosen)
        super().set(batch, clip)

    def save_memory(self) -> bool:
        layers = len(self.model.model.layers)
        if self.args.checkpoint_layers is not None or self.checkpointed == layers:
            return False
        self.model.zero_grad()
        self._checkpoint(min(layers, self.checkpointed + math.ceil(layers / 4)))
        return True

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=tokens_BS, labels=tokens_BS).loss
        return loss

    def step(self) -> None:
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        if self.masters:
            self.update.step()
        else:
            self.optimizer.step()
        self.model.zero_grad()

    def facts(self) -> dict[str, Any]:
        return {
            "checkpointed_layers": self.checkpointed,
            "states": "fp32 masters and moments" if self.masters else "bf16 moments, no masters",
        }

    def _estimate(self, batch: int) -> int:
        """Layers to checkpoint so that the step should fit the GPU budget."""
        room = self.args.gpu_bytes
        config = self.model.config
        tokens, hidden = batch * self.args.seq, config.hidden_size
        states = (16 if self.masters else 8) * self.num_params
        # bf16: input, q, k, v, attention's output, residual; gate and up. Logits: bf16, fp32, gradient.
        layer = tokens * 2 * (6 * hidden + 2 * config.intermediate_size)
        head = tokens * config.vocab_size * 12
        layers = len(self.model.model.layers)
        over = states + layers * layer + head - 0.98 * room
        saved = layer - 2 * tokens * hidden
        return min(layers, max(0, math.ceil(over / saved)))

    def _checkpoint(self, layers: int) -> None:
        if layers == self.checkpointed:
            return
        self.checkpointed = layers
        if layers:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        for index, layer in enumerate(self.model.model.layers):
            layer.gradient_checkpointing = index < layers
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _adamw(
    weight_N: torch.Tensor,
    grad_N: torch.Tensor,
    master_N: torch.Tensor,
    exp_avg_N: torch.Tensor,
    exp_avg_sq_N: torch.Tensor,
    step_size: torch.Tensor,
    root_correction2: torch.Tensor,
) -> None:
    """AdamW of Loshchilov and Hutter (arXiv 1711.05101), as torch.optim.AdamW computes it."""
    grad_N = grad_N.float()
    exp_avg_N.lerp_(grad_N, 1 - BETAS[0])
    exp_avg_sq_N.mul_(BETAS[1]).addcmul_(grad_N, grad_N, value=1 - BETAS[1])
    denominator_N = exp_avg_sq_N.sqrt() / root_correction2 + EPS
    master_N.mul_(1 - LEARNING_RATE * WEIGHT_DECAY).sub_(step_size * exp_avg_N / denominator_N)
    weight_N.copy_(master_N)


class FusedAdamW:
    """AdamW with fp32 masters and moments of 16-bit parameters; a kernel a parameter."""

    def __init__(self, params: list[torch.nn.Parameter], backend: str = "inductor") -> None:
        self.states = [
            (param, master, torch.zeros_like(master), torch.zeros_like(master))
            for param in params
            for master in [param.detach().reshape(-1).float()]
        ]
        self.count = 0
        self._update = torch.compile(_adamw, backend=backend, dynamic=True, fullgraph=True)
        device = params[0].device
        self._step_size, self._root = (torch.zeros((), device=device) for _ in range(2))

    @torch.no_grad()
    def step(self) -> None:
        self.count += 1
        self._step_size.fill_(LEARNING_RATE / (1 - BETAS[0] ** self.count))
        self._root.fill_(math.sqrt(1 - BETAS[1] ** self.count))
        for param, master_N, exp_avg_N, exp_avg_sq_N in self.states:
            assert param.grad is not None
            self._update(
                param.detach().view(-1),
                param.grad.reshape(-1),
                master_N,
                exp_avg_N,
                exp_avg_sq_N,
                self._step_size,
                self._root,
            )


def single_process_group(device: torch.device) -> None:
    """The process group of one rank that DeepSpeed and FSDP2 want."""
    import torch.distributed as dist

    if dist.is_initialized():
        return
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    # Without a network there is no other interface, and one process needs none.
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    with tempfile.NamedTemporaryFile(prefix="rendezvous") as file:
        path = file.name
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(0)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=f"file://{path}", rank=0, world_size=1)


class FSDP2(Peer):
    """fully_shard on one device: fp32 parameters, gradients and AdamW on the CPU, bf16 copies in flight.

    Every layer is checkpointed. With `compiled`, each layer goes through torch.compile.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, compiled: bool) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        super().__init__(args, device)
        single_process_group(device)
        cuda = device.type == "cuda"
        self.model = models.build(args.size, args.seq, torch.float32)
        self.num_params = models.num_params(self.model)
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        mesh = init_device_mesh(device.type, (1,))
        kwargs: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16
            ),
        }
        # On a CPU mesh the parameters are on the CPU as it is.
        if cuda:
            kwargs["offload_policy"] = CPUOffloadPolicy(pin_memory=True)
        for layer in self.model.model.layers:
            if compiled:
                layer.compile(backend="inductor" if args.lowering == "inductor" else "aot_eager")
            fully_shard(layer, **kwargs)
        fully_shard(self.model, **kwargs)
        # Buffers are not sharded, and the CPU offload leaves them where they are.
        for buffer_owner in self.model.modules():
            for name, buffer in list(buffer_owner.named_buffers(recurse=False)):
                setattr(buffer_owner, name, buffer.to(device))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=tokens_BS, labels=tokens_BS).loss
        return loss

    def step(self) -> None:
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def facts(self) -> dict[str, Any]:
        return {"checkpointed_layers": len(self.model.model.layers)}

    def close(self) -> None:
        torch.distributed.destroy_process_group()


class DeepSpeed(Peer):
    """DeepSpeed ZeRO stage 3 with parameters and optimizer on the CPU ("cpu") or on files ("nvme"),
    or only the optimizer on files ("nvme states").

    Every layer is checkpointed. Sizes are DeepSpeed's own where it has working ones; see
    `deepspeed_config`.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, where: str) -> None:
        super().__init__(args, device)
        try:
            import deepspeed
        except ImportError as error:
            raise NotInstalled(
                f"DeepSpeed cannot be imported ({error}); install it with `pip install deepspeed` "
                "(figures in benchmarks/results/ are of 0.19.8)"
            ) from error
        if device.type != "cuda":
            raise NotInstalled("DeepSpeed's offloading needs a CUDA device; there is none here")
        single_process_group(device)
        deepspeed.init_distributed()
        self.folder = None if where == "cpu" else tempfile.TemporaryDirectory(dir=args.ssd)
        with torch.device("meta"):
            shapes = models.LlamaForCausalLM(models.config_of(args.size, args.seq))
        config = deepspeed_config(
            [param.numel() for param in shapes.parameters()],
            args.batch[0],
            None if self.folder is None else self.folder.name,
            params_too=where == "nvme",
        )
        previous = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with deepspeed.zero.Init(config_dict_or_path=config):
                model = models.LlamaForCausalLM(models.config_of(args.size, args.seq))
        finally:
            torch.set_default_dtype(previous)
        self.num_params = models.num_params(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=config
        )
        self.version = deepspeed.__version__
        self.layers = len(model.model.layers)

    def set(self, batch: int, clip: float | None) -> None:
        super().set(batch, clip)
        self.engine.set_train_micro_batch_size(batch)
        self.engine.optimizer.clip_grad = clip or 0.0

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.engine(input_ids=tokens_BS, labels=tokens_BS).loss
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> None:
        self.engine.step()

    def facts(self) -> dict[str, Any]:
        return {"deepspeed": self.version, "checkpointed_layers": self.layers}

    def close(self) -> None:
        if self.folder is not None:
            self.folder.cleanup()


def deepspeed_config(
    numels: list[int], batch: int, nvme: str | None, params_too: bool = True
) -> dict[str, Any]:
    """A configuration of ZeRO stage 3 with everything offloaded, to `nvme` or else to the CPU.

    Without `params_too` parameters are on the CPU whatever `nvme` is.

    Files need buffers of a hand-set number and size. A parameter holds one of them as long as it is
    on the GPU, so the number follows from how many parameters may be live; one of the optimizer's
    holds a whole group, of which three (being read, updated and written) have four tensors each.
    """
    largest = max(numels)
    optimizer: dict[str, Any] = {"device": "cpu", "pin_memory": True}
    params: dict[str, Any] = dict(optimizer)
    zero: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_prefetch_bucket_size": 200_000_000,
        "sub_group_size": 200_000_000,
    }
    if nvme is not None:
        zero["sub_group_size"] = max(largest, 100_000_000)
        optimizer |= {
            "device": "nvme",
            "nvme_path": nvme,
            "buffer_count": 13,
            "pipeline_read": True,
            "pipeline_write": True,
        }
    if nvme is not None and params_too:
        live = 2 * largest
        # Smaller parameters than a block of the disk stay in memory.
        smallest = min((n for n in numels if n * 2 >= _AIO_BLOCK), default=largest)
        zero |= {
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": 0,
            # 0.19.8 reads a parameter ahead twice where a checkpointed layer uses it twice in a row, and
            # fails ("already assigned swap buffer"); 0 reads nothing ahead.
            "stage3_prefetch_bucket_size": 0,
        }
        params |= {
            "device": "nvme",
            "nvme_path": nvme,
            "buffer_count": 2 * math.ceil(live / smallest),
            "buffer_size": largest + 2**20,
            "max_in_cpu": 0,
        }
    return {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": 0.0,
        "steps_per_print": 1_000_000,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": LEARNING_RATE,
                "betas": list(BETAS),
                "eps": EPS,
                "weight_decay": WEIGHT_DECAY,
            },
        },
        "zero_optimization": zero | {"offload_optimizer": optimizer, "offload_param": params},
        "aio": {
            "block_size": _AIO_BLOCK,
            "queue_depth": 16,
            "intra_op_parallelism": 4,
            "single_submit": False,
            "overlap_events": True,
        },
    }


_AIO_BLOCK = 8 << 20

ENGINES: dict[str, Callable[[argparse.Namespace, torch.device], Peer]] = {
    "compile": lambda args, device: InMemory(args, device, masters=True),
    "compile-bf16": lambda args, device: InMemory(args, device, masters=False),
    "fsdp2": lambda args, device: FSDP2(args, device, compiled=False),
    "fsdp2-compile": lambda args, device: FSDP2(args, device, compiled=True),
    "ds_offload": lambda args, device: DeepSpeed(args, device, "cpu"),
    "ds_infinity": lambda args, device: DeepSpeed(args, device, "nvme"),
    "ds_infinity-states": lambda args, device: DeepSpeed(args, device, "nvme states"),
}
