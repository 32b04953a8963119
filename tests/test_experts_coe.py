# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The memory-efficient experts forward equals the eager experts, in outputs and gradients, or falls back aloud."""

import contextlib
import io
import logging
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_compiled_and_exported_equal_eager, build, tokens
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations import use_experts_implementation
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from modeling_coe import CoEConfig, CoEForCausalLM, experts_coe, modeling_coe
from modeling_coe.experts_coe import coe_experts_forward
from modeling_coe.modeling_coe import CoEExperts


NUM_EXPERTS, TOP_K, HIDDEN, WIDTH = 5, 3, 24, 16
ROUTING = {
    "uneven": lambda: torch.rand(37, NUM_EXPERTS).topk(TOP_K).indices,
    "one expert without tokens": lambda: torch.rand(37, NUM_EXPERTS - 1).topk(TOP_K).indices + 1,
    "one expert takes all": lambda: torch.full((37, 1), 2),
    "an expert chosen twice": lambda: torch.tensor([[1, 1, 4], [0, 4, 4]]),
    "one token": lambda: torch.tensor([[4, 0, 2]]),
    "no tokens": lambda: torch.empty(0, TOP_K, dtype=torch.long),
    "experts of other ranks": lambda: torch.rand(37, NUM_EXPERTS + 3).topk(TOP_K).indices.clamp(max=NUM_EXPERTS),
    "other ranks' experts only": lambda: torch.full((4, TOP_K), NUM_EXPERTS),
}


def experts(implementation="coe", dtype=torch.float32, expert_class=CoEExperts, config_class=CoEConfig, **overrides):
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_local_experts": NUM_EXPERTS}
    sizes |= {"num_attention_heads": 2, "num_experts_per_tok": TOP_K}
    module = expert_class(config_class(**{**sizes, **overrides}))
    module.config._experts_implementation = implementation
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(dtype)


def inputs(index, dtype=torch.float32, router_dtype=None):
    torch.manual_seed(1)
    hidden_states = torch.randn(index.shape[0], HIDDEN, dtype=dtype).requires_grad_()
    weights = torch.rand(index.shape, dtype=router_dtype or dtype).requires_grad_()
    return hidden_states, index, weights


def gradients(module, hidden_states, index, weights, forward=None):
    """Output and gradients of the input, the routing weights and both expert weights, for an uneven loss."""
    output = (forward or module)(hidden_states, index, weights)
    torch.manual_seed(2)
    wanted = (hidden_states, weights, module.gate_up_proj, module.down_proj)
    return output, *torch.autograd.grad((output.double() * torch.randn(output.shape).double()).sum(), wanted)


def relative_error(got, expected):
    return max(
        ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()
        for a, b in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("routing", ROUTING)
def test_output_and_gradients_equal_the_eager_experts(routing):
    torch.manual_seed(3)
    index = ROUTING[routing]()
    coe, eager = experts(), experts("eager")
    assert relative_error(gradients(coe, *inputs(index)), gradients(eager, *inputs(index))) <= 1e-6


TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.fixture
def row_by_row(monkeypatch):
    """The numbers of tokens that were computed one expert at a time."""
    taken = []
    function = experts_coe._expert_by_expert
    monkeypatch.setattr(experts_coe, "_expert_by_expert", lambda *args: taken.append(len(args[1])) or function(*args))
    return taken


def inference(index, dtype=torch.float32, **overrides):
    """Output of the module and of its eager twin, without gradients; index N is another rank's expert."""
    coe, eager = experts(dtype=dtype, **overrides), experts("eager", dtype, **overrides)
    coe._is_expert_parallel = bool((index == coe.num_experts).any())
    torch.manual_seed(1)
    hidden_states = torch.randn(index.shape[0], coe.hidden_dim, dtype=dtype)
    weights = torch.rand(index.shape, dtype=torch.promote_types(dtype, torch.float32))
    weights = weights.masked_fill(index == coe.num_experts, 0)
    with torch.no_grad():
        return coe(hidden_states, index, weights), eager(hidden_states, index, weights)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 12, 13, 40])
def test_inference_equals_the_eager_experts_at_every_number_of_tokens(num_tokens, dtype):
    torch.manual_seed(3)
    index = torch.rand(num_tokens, 25).topk(2).indices
    index[:1, 1] = 24
    got, expected = inference(index, dtype, num_local_experts=24, num_experts_per_tok=2)
    assert relative_error([got], [expected]) <= TOLERANCE[dtype] and got.dtype == dtype


@pytest.mark.parametrize("routing", ROUTING)
def test_decoding_equals_the_eager_experts_for_every_routing(routing, row_by_row):
    torch.manual_seed(3)
    index = ROUTING[routing]()
    sizes = {"num_local_experts": 120}  # at least as many as rows
    got, expected = inference(torch.where(index == NUM_EXPERTS, 120, index), **sizes)
    assert relative_error([got], [expected]) <= 1e-6
    assert row_by_row == [index.shape[0]]


def test_decoding_takes_sizes_of_no_whole_16_bytes(row_by_row):
    got, expected = inference(torch.tensor([[4, 0, 2]]), intermediate_size=7)
    assert relative_error([got], [expected]) <= 1e-6
    assert row_by_row == [1]


def test_up_to_as_many_rows_as_experts_are_matrix_vector_products(row_by_row):
    for num_tokens in (12, 13):
        inference(torch.zeros(num_tokens, 2, dtype=torch.long), num_local_experts=24)
    assert row_by_row == [12]


def test_with_gradients_no_row_is_computed_alone(row_by_row):
    experts()(*inputs(torch.tensor([[4, 0, 2]])))
    assert row_by_row == []


def test_decoding_under_autocast_equals_the_eager_experts(row_by_row):
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = inference(torch.tensor([[4, 0, 2]]))
    assert relative_error([got], [expected]) <= 2e-2 and got.dtype == expected.dtype
    assert row_by_row == []


def test_decoding_reads_the_chosen_experts_only():
    module = experts()
    with torch.no_grad():
        for weight in module.parameters():
            weight[1::2] = float("nan")
        assert module(torch.randn(1, HIDDEN), torch.tensor([[4, 0, 2]]), torch.rand(1, TOP_K)).isfinite().all()


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("routing", ROUTING)
def test_loop_of_products_equals_the_grouped_product(routing, expert_parallel, monkeypatch):
    """fp64, older GPUs and odd widths take the loop, everything else torch's grouped product."""
    torch.manual_seed(3)
    index = ROUTING[routing]()
    module = experts()
    module._is_expert_parallel = expert_parallel
    calls, kernel = [], F.grouped_mm

    def grouped_mm(*args, **kwargs):
        calls.append(args)
        output = kernel(*args, **kwargs)
        if output.dim() == 2:  # which the kernel leaves unwritten
            output[kwargs["offs"][-1] :] = float("nan")
        return output

    monkeypatch.setattr(F, "grouped_mm", grouped_mm)
    expected = gradients(module, *inputs(index))
    assert len(calls) == 6  # two products forward, four backward
    monkeypatch.setattr(experts_coe._Groups, "_has_kernel", lambda *args: False)
    assert relative_error(gradients(module, *inputs(index)), expected) <= 1e-6


def test_gradients_pass_gradcheck_in_double_precision():
    torch.manual_seed(3)
    module = experts(dtype=torch.float64, hidden_size=4, intermediate_size=3)
    _, index, weights = inputs(ROUTING["experts of other ranks"]()[:6], torch.float64)
    hidden_states = torch.randn(6, 4, dtype=torch.float64).requires_grad_()
    assert (index == NUM_EXPERTS).any()

    def function(hidden_states, weights, gate_up_proj, down_proj):
        arguments = (hidden_states, index, weights, gate_up_proj, down_proj, torch.float64, True)
        return experts_coe._Experts.apply(*arguments)

    parameters = (module.gate_up_proj, module.down_proj)
    assert torch.autograd.gradcheck(function, (hidden_states, weights, *parameters))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_fp32_as_transformers_grouped_mm(dtype):
    index = ROUTING["uneven"]()

    def error(implementation):
        module = experts(implementation, dtype)
        got = gradients(module, *inputs(index, dtype, router_dtype=torch.float32))
        exact = experts("eager", dtype).float()
        rounded = [t.detach().float().requires_grad_() for t in inputs(index, dtype, torch.float32)[::2]]
        assert got[0].dtype == got[1].dtype == got[3].dtype == dtype and got[2].dtype == torch.float32
        return relative_error(got, gradients(exact, rounded[0], index, rounded[1]))

    assert error("coe") <= 1.5 * error("grouped_mm")


def test_autocast_computes_in_its_dtype_as_the_eager_experts_do():
    index = ROUTING["uneven"]()
    results = {}
    for implementation in ("coe", "eager"):
        module = experts(implementation)
        with torch.autocast("cpu", torch.bfloat16):
            results[implementation] = gradients(module, *inputs(index))
    assert [t.dtype for t in results["coe"]] == [t.dtype for t in results["eager"]]
    assert relative_error(results["coe"], results["eager"]) <= 2e-2
    assert relative_error(results["coe"], gradients(experts(), *inputs(index))) >= 1e-4  # it did round


def test_frozen_weights_get_no_gradient_and_cost_no_product(monkeypatch):
    module = experts().requires_grad_(False)
    monkeypatch.setattr(experts_coe._Groups, "outer", None)
    hidden_states, index, weights = inputs(ROUTING["uneven"]())
    module(hidden_states, index, weights).sum().backward()
    assert hidden_states.grad.abs().sum() > 0 and weights.grad.abs().sum() > 0
    assert module.gate_up_proj.grad is None and module.down_proj.grad is None


@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_alone_equals_itself_among_all(wanted):
    module = experts()
    arguments = inputs(ROUTING["uneven"]())
    full = gradients(module, *arguments)[1:]
    leaves = [arguments[0], arguments[2], module.gate_up_proj, module.down_proj]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == wanted)
    output = module(*arguments)
    torch.manual_seed(2)
    alone = torch.autograd.grad((output.double() * torch.randn(output.shape).double()).sum(), leaves[wanted])[0]
    assert torch.equal(alone, full[wanted])


def test_second_derivative_is_refused():
    module = experts()
    hidden_states, index, weights = inputs(ROUTING["uneven"]())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(module(hidden_states, index, weights).sum(), hidden_states, create_graph=True)


def test_same_input_gives_the_same_bits():
    module = experts()
    arguments = inputs(ROUTING["uneven"]())
    first, second = gradients(module, *arguments), gradients(module, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def saved_bytes(module, hidden_states, index, weights):
    """Bytes of the distinct storages autograd keeps, beyond parameters and the block's own arguments."""
    given = {t.untyped_storage().data_ptr() for t in (*module.parameters(), hidden_states, index, weights)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # holding it keeps the address unique
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(hidden_states, index, weights)
    return sum(size for size, _ in kept.values())


def test_only_gate_and_up_projections_and_the_order_are_saved():
    index = torch.rand(100, NUM_EXPERTS).topk(TOP_K).indices
    rows = index.numel()
    assert saved_bytes(experts(), *inputs(index)) == rows * (2 * WIDTH * 4 + 8)
    assert saved_bytes(experts("grouped_mm"), *inputs(index)) > rows * (4 * WIDTH + 2 * HIDDEN) * 4


def test_a_fresh_model_uses_it_and_an_explicit_choice_is_kept(model, tmp_path):
    assert model.config._experts_implementation == "coe"
    model.save_pretrained(tmp_path)
    assert CoEForCausalLM.from_pretrained(tmp_path).config._experts_implementation == "coe"
    expected = model(tokens(2, 9)).logits
    for implementation in ("eager", "grouped_mm", "batched_mm", "coe"):
        other = CoEForCausalLM.from_pretrained(tmp_path, experts_implementation=implementation)
        assert other.config._experts_implementation == implementation
        torch.testing.assert_close(other(tokens(2, 9)).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="not supported"):
        CoEForCausalLM.from_pretrained(tmp_path, experts_implementation="fastest")


def test_sizes_that_grouped_products_refuse_take_the_eager_experts():
    assert build(intermediate_size=20).config._experts_implementation == "eager"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_a_model_gives_the_eager_gradients(checkpointing):
    ids = tokens(2, 11)
    grads = {}
    for implementation in ("coe", "eager"):
        model = build().train()
        model.set_experts_implementation(implementation)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        grads[implementation] = [parameter.grad for parameter in model.parameters()]
    assert relative_error(grads["coe"], grads["eager"]) <= 1e-6


def chain_gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_the_iterations_of_a_chain_share_one_weight_gradient(monkeypatch):
    model, ids = build(num_hidden_layers=1, num_iterations=3).train(), tokens(2, 11)
    fresh = []
    outer = experts_coe._Groups.outer
    monkeypatch.setattr(experts_coe._Groups, "outer", lambda *args: fresh.append(1) or outer(*args))
    shared = chain_gradients(model, ids)
    assert len(fresh) == 2  # gate_up_proj and down_proj, once for three iterations
    nothing = experts_coe.HandedOnWeights(())
    monkeypatch.setattr(modeling_coe, "one_weight_gradient", lambda weights: contextlib.nullcontext(nothing))
    separate = chain_gradients(model, ids)
    assert len(fresh) == 2 + 3 * 2
    assert relative_error(shared, separate) <= 1e-6


def test_sharing_survives_a_second_and_a_partial_backward_pass():
    model, ids = build(num_iterations=3).train(), tokens(2, 11)
    expected = chain_gradients(model, ids)
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    norm, weight = model.model.norm.weight, model.model.layers[0].mlp.gate.weight
    torch.autograd.grad(loss, (norm, weight), retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    assert relative_error([parameter.grad / 2 for parameter in model.parameters()], expected) <= 1e-6


def test_an_error_inside_a_chain_leaves_nothing_behind(model, monkeypatch):
    expected = model(tokens(1, 5)).logits
    monkeypatch.setattr(experts_coe, "_sum_over_experts", None)
    with pytest.raises(TypeError):
        model(tokens(1, 5))
    monkeypatch.undo()
    assert torch.equal(model(tokens(1, 5)).logits, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_pool_visited_from_several_layers_has_one_weight_gradient(checkpointing, monkeypatch):
    """Each "layer" may be checkpointed by itself: it takes the weights as tensors and returns them."""
    module, index = experts(), ROUTING["uneven"]()
    outer, fresh = experts_coe._Groups.outer, []
    monkeypatch.setattr(experts_coe._Groups, "outer", lambda *args: fresh.append(1) or outer(*args))

    def layer(x, routing, *weights):
        with experts_coe.one_weight_gradient(weights) as handed_on:
            for _ in range(2):
                x = x + module(x, index, routing)
        return x, *handed_on.weights

    def hands_on(x, index, routing):
        weights = ()
        for _ in range(3):
            if checkpointing:
                x, *weights = checkpoint(layer, x, routing, *weights, use_reentrant=False)
            else:
                x, *weights = layer(x, routing, *weights)
        return x

    def separate(x, index, routing):
        for _ in range(6):
            x = x + module(x, index, routing)
        return x

    together = gradients(module, *inputs(index), forward=hands_on)
    assert len(fresh) == 2  # gate_up_proj and down_proj, once for six visits
    assert relative_error(together, gradients(module, *inputs(index), forward=separate)) <= 1e-6
    assert len(fresh) == 2 + 6 * 2


@pytest.mark.parametrize("frozen", [("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")])
@pytest.mark.parametrize("num_iterations", [1, 3])
def test_frozen_experts_cost_no_weight_gradient_in_any_iteration(frozen, num_iterations, monkeypatch):
    model, ids = build(num_hidden_layers=1, num_iterations=num_iterations).train(), tokens(2, 11)
    pool = model.model.layers[0].mlp.experts
    for name in frozen:
        pool.get_parameter(name).requires_grad_(False)
    products, add_outer = [], experts_coe._Groups.add_outer
    monkeypatch.setattr(experts_coe._Groups, "add_outer", lambda *args: products.append(1) or add_outer(*args))
    model(ids, labels=ids).loss.backward()
    assert len(products) == (2 - len(frozen)) * num_iterations
    assert [name for name, weight in pool.named_parameters() if weight.grad is None] == list(frozen)


def test_eight_threads_share_one_model_with_gradients_enabled(model):
    ids = tokens(2, 9)
    expected = model(ids).logits
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda _: model(ids).logits, range(100)))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(logits, expected) for logits in results)
    assert parametrize._cache_enabled == 0


def test_a_chain_under_autocast_gives_the_eager_gradients():
    ids, grads = tokens(2, 11), {}
    for implementation in ("coe", "eager"):
        model = build(num_iterations=2).train()
        model.set_experts_implementation(implementation)
        with torch.autocast("cpu", torch.bfloat16):
            grads[implementation] = chain_gradients(model, ids)
    assert relative_error(grads["coe"], grads["eager"]) <= 0.1


def test_lora_on_the_experts_gets_the_eager_gradients():
    peft = pytest.importorskip("peft")
    ids, grads = tokens(2, 11), {}
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    for implementation in ("coe", "eager"):
        model = build(num_iterations=2)
        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=names, init_lora_weights=False)
        torch.manual_seed(4)
        adapted = peft.get_peft_model(model, config)
        model.set_experts_implementation(implementation)
        adapted(ids, labels=ids).loss.backward()
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        grads[implementation] = [parameter.grad for parameter in trained]
        assert len(trained) == 2 * 2 * 2 and all(gradient.any() for gradient in grads[implementation])
    assert relative_error(grads["coe"], grads["eager"]) <= 1e-5


def test_bf16_router_keeps_no_fp32_copy_and_gives_fp32_results():
    torch.manual_seed(0)
    x, weight = torch.randn(20, HIDDEN).bfloat16(), torch.randn(NUM_EXPERTS, HIDDEN).bfloat16()
    grads = {}
    for name, function in {
        "ours": experts_coe.router_linear,
        "copies": lambda x, weight: F.linear(x.float(), weight.float()),
    }.items():
        leaves, saved = [x.clone().requires_grad_(), weight.clone().requires_grad_()], []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.dtype) or t, lambda t: t):
            logits = function(*leaves)
        grads[name] = (logits, *torch.autograd.grad(logits.square().sum(), leaves))
        assert (torch.float32 in saved) == (name == "copies")
    assert all(torch.equal(a, b) for a, b in zip(grads["ours"], grads["copies"], strict=True))


@pytest.mark.parametrize(
    "model_class, config",
    [
        (MixtralForCausalLM, MixtralConfig(num_local_experts=7, intermediate_size=24)),
        (
            Qwen3MoeForCausalLM,
            Qwen3MoeConfig(num_experts=7, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8),
        ),
    ],
)
def test_other_fused_expert_models_can_choose_it(model_class, config):
    sizes = {"vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
    config.update(sizes | {"num_key_value_heads": 3, "pad_token_id": 0})
    torch.manual_seed(0)
    model = model_class(config)
    ids = tokens(2, 9)
    grads = {}
    for implementation in ("coe", "eager"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads[implementation] = [parameter.grad.clone() for parameter in model.parameters()]
    assert model.config._experts_implementation == "eager"
    assert relative_error(grads["coe"], grads["eager"]) <= 1e-6


class GeluExperts(nn.Module):
    """An experts class whose activation the autograd function does not know."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_local_experts
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * WIDTH, HIDDEN))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, HIDDEN, WIDTH))
        self.act_fn = nn.GELU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise NotImplementedError


@pytest.mark.parametrize(
    "expert_class, config_class, reason",
    [
        (use_experts_implementation(GeluExperts), CoEConfig, "activation GELU"),
        (GptOssExperts, GptOssConfig, "gate of GptOssExperts"),
        (use_experts_implementation(type("Biased", (MixtralExperts,), {}), has_bias=True), MixtralConfig, "biases"),
        (use_experts_implementation(type("Mixed", (MixtralExperts,), {}), is_concatenated=False), CoEConfig, "leaved"),
    ],
)
def test_what_it_cannot_express_runs_through_grouped_mm_with_a_warning(expert_class, config_class, reason, caplog):
    module = experts(expert_class=expert_class, config_class=config_class)
    if module.has_bias and expert_class is not GptOssExperts:
        module.gate_up_proj_bias = nn.Parameter(torch.randn(NUM_EXPERTS, 2 * WIDTH))
        module.down_proj_bias = nn.Parameter(torch.randn(NUM_EXPERTS, HIDDEN))
    arguments = inputs(ROUTING["uneven"]())
    with torch.no_grad():
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        experts_coe.logger.addHandler(handler)
        got = module(*arguments)
        experts_coe.logger.removeHandler(handler)
        module.config._experts_implementation = "grouped_mm"
        torch.testing.assert_close(got, module(*arguments))
    assert reason in stream.getvalue() and "grouped_mm" in stream.getvalue()


@pytest.mark.skipif(
    "grouped_mm_fallback_backward" not in dir(torch.ops.transformers),
    reason="this transformers cannot compile the backward pass of its fp32 grouped product, for any model",
)
def test_compiled_training_gives_the_eager_gradients():
    model, ids = build(num_hidden_layers=1, num_iterations=2), tokens(1, 9)
    expected = chain_gradients(model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(chain_gradients(compiled, ids), expected) <= 1e-6


def test_compiled_and_exported_inference_equal_the_eager_one():
    assert_compiled_and_exported_equal_eager(build(num_hidden_layers=1, num_iterations=2), tokens(1, 9))


def test_registering_again_as_remote_code_changes_nothing(model):
    expected = model(tokens(1, 7)).logits
    source = experts_coe.__loader__.get_source(experts_coe.__name__)
    exec(compile(source, "experts_coe_copy", "exec"), {"__name__": "experts_coe_copy"})
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    assert ALL_EXPERTS_FUNCTIONS["coe"] is not coe_experts_forward
    assert torch.equal(model(tokens(1, 7)).logits, expected)
    ALL_EXPERTS_FUNCTIONS.register("coe", coe_experts_forward)
