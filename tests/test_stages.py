"""Stages are found by structure in joint graphs of many kinds of models."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from builders import GraphBuilder, TinyGPT, aten, joint_graph, tokens
from torch import fx, nn

from lohan_fx.compiler.stages import (
    StageInfo,
    assign_stages,
    backward_calls,
    settle_stragglers,
)
from lohan_fx.errors import PassError


def stages_of(graph: fx.Graph, backward: bool) -> list[int]:
    """Stages of one pass's calls in graph order."""
    belongs = backward_calls(graph)
    return [
        node.meta["lohan_stage"]
        for node in graph.nodes
        if node.op == "call_function" and (node in belongs) == backward
    ]


def repeated(stages: tuple[StageInfo, ...]) -> int:
    """Size of the largest group of stages of one kind."""
    kinds = [stage.kind for stage in stages]
    return max(kinds.count(kind) for kind in kinds)


def test_each_block_of_a_module_list_is_a_stage() -> None:
    stages = assign_stages(joint_graph(TinyGPT(3), tokens()))
    assert [stage.name for stage in stages] == [
        "tokens",
        "blocks.0",
        "blocks.1",
        "blocks.2",
        "head",
    ]
    assert repeated(stages) == 3


def test_forward_stages_do_not_decrease_and_backward_stages_do_not_increase() -> None:
    graph = joint_graph(TinyGPT(3), tokens())
    assign_stages(graph)
    forward, backward = stages_of(graph, backward=False), stages_of(graph, backward=True)
    assert forward == sorted(forward) and set(forward) == set(range(5))
    assert backward == sorted(backward, reverse=True) and set(backward) == set(range(5))


def test_the_sum_of_a_tied_weights_gradients_is_in_the_stage_that_ends_it() -> None:
    graph = joint_graph(TinyGPT(2), tokens())
    assign_stages(graph)
    sums = [node for node in backward_calls(graph) if node.target is aten.add.Tensor]
    assert max(sums).meta["lohan_stage"] == 0


def test_sequential_patches_and_layers_are_recognised() -> None:
    def layer() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    patches = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.Flatten(2))
    trunk = nn.Sequential(*[layer() for _ in range(4)])
    head = nn.Linear(16, 2)

    def loss(image: torch.Tensor) -> torch.Tensor:
        return head(trunk(patches(image).transpose(1, 2)).mean(1)).sum()

    stages = assign_stages(joint_graph(loss, torch.randn(2, 3, 8, 8)))
    assert repeated(stages) == 4


def test_numbered_attributes_are_recognised() -> None:
    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = nn.Linear(4, 16)
            for number in range(3):
                block = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
                setattr(self, f"step_{number}_of_net", block)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.into(x)
            for number in range(3):
                x = x + getattr(self, f"step_{number}_of_net")(x)
            return x.sum()

    stages = assign_stages(joint_graph(Numbered(), torch.randn(8, 4)))
    assert repeated(stages) == 3
    # The residual sum stands in the parent's code and still belongs to its block.
    assert [stage.name for stage in stages].count("into") == 1 and len(stages) == 5


def test_parallel_branches_inside_a_block_are_not_taken_for_blocks() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([branch(x) for branch in self.branches]).sum(0)

    model = nn.Sequential(*[Branches() for _ in range(3)])
    stages = assign_stages(joint_graph(lambda x: model(x).sum(), torch.randn(8, 32)))
    assert repeated(stages) == 3


def test_one_layer_called_again_and_again_is_a_stage_each_time() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = self.layer(x)
            return x.sum()

    assert repeated(assign_stages(joint_graph(Shared(), torch.randn(8, 16)))) == 3


def test_a_plain_mlp_is_cut_into_several_stages() -> None:
    widths = [16, 32, 64, 48, 8]
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(widths)])
    graph = joint_graph(lambda x: model(x).sum(), torch.randn(8, 16))
    stages = assign_stages(graph)
    assert 2 <= len(stages) <= 4
    assert stages_of(graph, backward=False) == sorted(stages_of(graph, backward=False))


def test_a_model_of_one_op_has_one_stage() -> None:
    graph = joint_graph(
        lambda x, w: (x @ w).sum(), torch.randn(4, 4), torch.randn(4, 4, requires_grad=True)
    )
    assert len(assign_stages(graph)) == 1


def test_a_graph_without_calls_is_refused() -> None:
    builder = GraphBuilder()
    module = builder.module(builder.input("x", 2))
    with pytest.raises(PassError, match="no forward"):
        assign_stages(module.graph)


def tiny_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return transformers.LlamaForCausalLM(config)


def tiny_gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=32,
        n_layer=3,
        n_head=4,
        vocab_size=64,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    return model


def tiny_t5() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=3,
        num_heads=4,
        vocab_size=64,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("build", "blocks"),
    [
        (tiny_llama, ["model.layers.{}"]),
        (tiny_gpt2, ["transformer.h.{}"]),
        (tiny_t5, ["encoder.block.{}.layer", "decoder.block.{}.layer"]),
    ],
)
def test_layers_of_hugging_face_models_are_stages(
    build: Callable[[], nn.Module], blocks: list[str]
) -> None:
    model = build()
    ids = tokens(vocab=64)
    graph = joint_graph(lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss, ids)
    stages = assign_stages(graph)
    names = [stage.name for stage in stages]
    for block in blocks:
        layers = [block.format(number) for number in range(3)]
        assert [name for name in names if name in layers] == layers
        # The first layer of some models holds what the others share.
        kinds = {stage.name: stage.kind for stage in stages}
        assert kinds[layers[1]] == kinds[layers[2]]


def test_a_straggler_of_an_earlier_stage_moves_up_to_what_it_reads() -> None:
    builder = GraphBuilder()
    x = builder.input("x", 4)
    first = builder.call(aten.relu.default, x, stage=0)
    second = builder.call(aten.exp.default, first, stage=1)
    late = builder.call(aten.neg.default, first, stage=0)
    module = builder.module(second, late)
    settle_stragglers(module.graph)
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    assert calls == [first, late, second]
