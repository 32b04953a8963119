# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What the model computes: Mixtral at C = 1, the paper's equations at every C, the same under every backend."""

import itertools

import naive_coe
import pytest
import torch
import transformers
from conftest import SMALL, build, tokens
from packaging import version
from torch._dynamo.backends.registry import lookup_backend
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, MixtralConfig, MixtralForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.mixtral.modeling_mixtral import MixtralPreTrainedModel

from modeling_coe import (
    CoEForCausalLM,
    CoEForQuestionAnswering,
    CoEForSequenceClassification,
    CoEForTokenClassification,
    CoEModel,
    configuration_coe,
    modeling_coe,
)


CHAINS = [
    {"residual": residual, "independent_gating": gating, "num_shared_experts": shared, "norm_topk_prob": norm}
    for residual, gating, shared, norm in itertools.product(
        ("nested", "inner", "outer"), (True, False), (0, 2), (True, False)
    )
]


def largest_difference(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def mixtral_twin(model):
    """A MixtralForCausalLM with the weights of a C = 1 model."""
    shared = {k: v for k, v in SMALL.items() if k != "num_iterations"}
    mixtral = MixtralForCausalLM(MixtralConfig(**shared)).eval()
    state = model.state_dict()
    for layer in range(SMALL["num_hidden_layers"]):
        name = f"model.layers.{layer}.mlp.gate.weight"
        state[name] = state[name].squeeze(0)
    mixtral.load_state_dict(state)
    return mixtral


@pytest.mark.parametrize("residual", ["nested", "outer"])
@pytest.mark.parametrize("implementation", ["eager", None])
def test_one_iteration_is_mixtral_in_logits_and_gradients(residual, implementation):
    model = build(num_iterations=1, residual=residual, router_aux_loss_coef=0.0, initializer_range=0.05)
    mixtral = mixtral_twin(model)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    input_ids = tokens(2, 13)
    ours, theirs = (m.train()(input_ids, labels=input_ids) for m in (model, mixtral))
    assert (ours.logits - theirs.logits).abs().max() <= 1e-5
    ours.loss.backward()
    theirs.loss.backward()
    gradients = dict(mixtral.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad.reshape(-1) - gradients[name].grad.reshape(-1)).abs().max() <= 1e-5, name
        assert parameter.grad.abs().sum() > 0, name


def test_one_iteration_of_the_papers_residual_is_not_mixtral():
    model = build(num_iterations=1, residual="inner")
    input_ids = tokens(2, 13)
    assert (model(input_ids).logits - mixtral_twin(model)(input_ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("implementation", ["eager", None])
@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_chain_equals_the_naive_loop_in_outputs_and_gradients(chain, implementation):
    model = build(iteration_scale=True, **chain)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    layer, config = model.model.layers[1], model.config
    generator = torch.Generator().manual_seed(3)
    stream = torch.randn(1, 5, config.hidden_size, generator=generator)
    weight = torch.randn(1, 5, config.hidden_size, generator=generator)

    def run(function):
        leaf = stream.clone().requires_grad_()
        parameters = [*layer.mlp.parameters(), layer.post_attention_layernorm.weight]
        output = function(leaf)
        return output, torch.autograd.grad((output * weight).sum(), [leaf, *parameters])

    def ours(h):
        normed = layer.post_attention_layernorm(h)
        return (normed if config.residual == "inner" else h) + layer.mlp(normed)

    output, gradients = run(ours)
    expected, expected_gradients = run(lambda h: naive_coe.sparse_half(h, layer, config))
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert (gradient - expected_gradient).abs().max() <= 1e-5 * expected_gradient.abs().max()


@pytest.mark.parametrize("residual", ["nested", "inner", "outer"])
def test_layer_ends_as_its_residual_says(residual):
    model = build(residual=residual)
    layer = model.model.layers[0]
    stream = torch.randn(1, 4, 48)
    captured = {}
    hook = layer.self_attn.register_forward_hook(lambda m, a, output: captured.update(attention=output[0]))
    position_embeddings = model.model.rotary_emb(stream, torch.arange(4)[None])
    output = layer(stream, position_embeddings=position_embeddings)
    hook.remove()
    expected = naive_coe.sparse_half(stream + captured["attention"], layer, model.config)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_iterations": 1, "num_experts_per_tok": 7},
        {"num_iterations": 5, "num_experts_per_tok": 1},
        {"num_local_experts": 1, "num_experts_per_tok": 1},
        {"num_local_experts": 33, "num_experts_per_tok": 4, "num_iterations": 2},
    ],
)
def test_any_number_of_iterations_and_experts_works(sizes):
    model = build(**sizes)
    layer = model.model.layers[0]
    stream = torch.randn(1, 3, 48)
    normed = layer.post_attention_layernorm(stream)
    expected = naive_coe.sparse_half(stream, layer, model.config)
    torch.testing.assert_close(stream + layer.mlp(normed), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_experts_implementations_agree(model, implementation):
    input_ids = tokens(2, 11)
    model.set_experts_implementation("eager")
    expected = model(input_ids).logits
    model.set_experts_implementation(implementation)
    assert model.config._experts_implementation == implementation
    torch.testing.assert_close(model(input_ids).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("implementation", "padding"),
    [
        ("sdpa", "left"),
        ("sdpa", "right"),
        ("sdpa", None),
        pytest.param("flex_attention", "left", marks=pytest.mark.slow),
        pytest.param("flex_attention", None, marks=pytest.mark.slow),
    ],
)
def test_attention_implementations_agree(model, implementation, padding):
    input_ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    if padding is not None:
        mask[1, slice(0, 4) if padding == "left" else slice(5, 9)] = 0
    model.set_attn_implementation("eager")
    expected = model(input_ids, attention_mask=mask).logits[mask.bool()]
    model.set_attn_implementation(implementation)
    logits = model(input_ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_attention_receives_every_keyword_a_kernel_may_need(model):
    seen = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append(kwargs)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    input_ids = tokens(1, 6)
    expected = model(input_ids).logits
    model.set_attn_implementation("spy")
    lengths = {"cu_seq_lens_q": torch.tensor([0, 6]), "max_length_q": 6}
    torch.testing.assert_close(model(input_ids, **lengths).logits, expected)
    assert len(seen) == SMALL["num_hidden_layers"]
    assert all(kwargs.items() >= lengths.items() for kwargs in seen)
    assert all(kwargs["scaling"] == 8**-0.5 and kwargs["sliding_window"] is None for kwargs in seen)


def test_the_host_is_told_what_it_is_told_of_mixtral():
    ours, mixtral = CoEForCausalLM, MixtralForCausalLM
    flags = [name for name in vars(MixtralPreTrainedModel) if name.startswith(("_supports", "_can_compile"))]
    assert "_supports_flash_attn" in flags
    for name in [*flags, "supports_gradient_checkpointing", "base_model_prefix", "_skip_keys_device_placement"]:
        assert getattr(ours, name) == getattr(mixtral, name), name
    for name in ("_tied_weights_keys", "_tp_plan", "_pp_plan", "_fsdp_plan"):
        assert getattr(ours, name) == getattr(mixtral, name), name
    assert ours._no_split_modules == ["CoEDecoderLayer"]


def test_sliding_window_hides_tokens_beyond_it():
    model = build(sliding_window=3, num_hidden_layers=1)
    input_ids = tokens(1, 8)
    changed = input_ids.clone()
    changed[0, 0] = 50 if input_ids[0, 0] != 50 else 51
    difference = (model(input_ids).logits - model(changed).logits).abs().amax(-1)[0]
    assert difference[2] > 1e-3
    assert difference[3:].max() < 1e-5


def test_packed_sequences_do_not_see_each_other(model):
    first, second = tokens(1, 5, seed=2), tokens(1, 7, seed=3)
    packed = torch.cat([first, second], dim=1)
    position_ids = torch.cat([torch.arange(5), torch.arange(7)])[None]
    logits = model(packed, position_ids=position_ids, use_cache=False).logits
    torch.testing.assert_close(logits[:, :5], model(first).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[:, 5:], model(second).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("qk_norm", [None, "head", "full"])
def test_query_and_key_norms_have_the_width_they_say(qk_norm):
    attention = build(qk_norm=qk_norm).model.layers[0].self_attn
    if qk_norm is None:
        assert not any("norm" in name for name, _ in attention.named_parameters())
    else:
        expected = (8, 8) if qk_norm == "head" else (48, 24)
        assert (attention.q_norm.weight.numel(), attention.k_norm.weight.numel()) == expected


def test_router_is_fp32_whatever_the_weights_and_autocast(model):
    gate = model.model.layers[0].mlp.gate.bfloat16()
    x = torch.randn(6, 48).bfloat16()
    expected = x.float() @ gate.weight[1].float().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, scores, _ = gate(x, 1)
    assert logits.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_and_stays_near_fp32(dtype):
    model = build(initializer_range=0.05)
    input_ids = tokens(2, 9)
    expected = model(input_ids).logits
    outputs = model.to(dtype).train()(input_ids, labels=input_ids)
    outputs.loss.backward()
    assert outputs.logits.dtype == dtype
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    # the mean, because a token between two experts may take the other one
    assert (outputs.logits.float() - expected).abs().mean() < 0.03 * expected.abs().mean()


def test_bf16_loss_without_logits_is_the_fp32_loss_of_the_logits_and_torchs_fused_one_is_not():
    model = build(initializer_range=0.05).bfloat16()
    input_ids = tokens(2, 9)
    plain = model(input_ids, labels=input_ids).loss
    torch.testing.assert_close(model(input_ids, labels=input_ids, skip_logits=True).loss, plain)
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        states = model.model(input_ids).last_hidden_state[:, :-1].flatten(0, 1)
        fused = torch.nn.functional.linear_cross_entropy(states, model.lm_head.weight, input_ids[:, 1:].flatten())
        assert (plain.dtype, fused.dtype) == (torch.float32, torch.bfloat16)


def test_autocast_trains_fp32_weights_with_bf16_products():
    model = build(initializer_range=0.05).train()
    input_ids = tokens(2, 9)
    expected = model(input_ids, labels=input_ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_jitter_moves_the_routed_input_in_training_only():
    model = build(router_jitter_noise=0.2)
    input_ids = tokens(1, 6)
    assert torch.equal(model(input_ids).logits, model(input_ids).logits)
    model.train()
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)


def test_router_logits_are_layer_major_with_one_entry_per_iteration(model):
    input_ids = tokens(2, 5)
    seen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    router_logits = model(input_ids, output_router_logits=True).router_logits
    assert len(router_logits) == SMALL["num_hidden_layers"] * SMALL["num_iterations"]
    assert all(logits.shape == (10, SMALL["num_local_experts"]) for logits in router_logits)
    assert all(torch.equal(a, b) for a, b in zip(router_logits, seen, strict=True))
    assert model(input_ids).router_logits is None


def test_hidden_states_and_attentions_are_recorded(model):
    model.set_attn_implementation("eager")
    outputs = model(tokens(2, 5), output_hidden_states=True, output_attentions=True)
    assert [h.shape for h in outputs.hidden_states] == [(2, 5, 48)] * 3
    assert [a.shape for a in outputs.attentions] == [(2, 6, 5, 5)] * 2


def test_logits_to_keep_keeps_the_last_and_the_named_positions(model):
    input_ids = tokens(2, 7)
    logits = model(input_ids).logits
    torch.testing.assert_close(model(input_ids, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(model(input_ids, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]])


def test_inputs_embeds_equal_input_ids(model):
    input_ids = tokens(2, 7)
    logits = model(inputs_embeds=model.get_input_embeddings()(input_ids)).logits
    torch.testing.assert_close(logits, model(input_ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_tie_and_resize(tied):
    model = build(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    input_ids = tokens(1, 5)
    expected = model(input_ids).logits
    model.resize_token_embeddings(105, mean_resizing=False)
    assert model.config.vocab_size == 105
    logits = model(input_ids, labels=input_ids).logits
    assert logits.shape[-1] == 105
    torch.testing.assert_close(logits[..., :99], expected)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_task_heads_classify_tokens_sequences_and_spans():
    input_ids = tokens(2, 6)
    sequence = build(CoEForSequenceClassification, num_labels=4)
    assert sequence(input_ids, labels=torch.tensor([1, 3])).logits.shape == (2, 4)
    token = build(CoEForTokenClassification, num_labels=5)
    assert token(input_ids, labels=torch.zeros(2, 6, dtype=torch.long)).logits.shape == (2, 6, 5)
    span = build(CoEForQuestionAnswering)
    outputs = span(input_ids, start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([3, 4]))
    assert outputs.start_logits.shape == (2, 6)
    assert all(torch.isfinite(h.train()(input_ids).logits).all() for h in (sequence, token))


def test_sequence_head_pools_the_last_real_token():
    model = build(CoEForSequenceClassification)
    input_ids = tokens(1, 6)
    padded = torch.cat([input_ids, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    mask = (padded != 0).long()
    torch.testing.assert_close(
        model(padded, attention_mask=mask).logits, model(input_ids).logits, rtol=1e-4, atol=1e-4
    )


def gradients(model, input_ids):
    model.zero_grad()
    loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


def test_gradient_checkpointing_changes_no_gradient_and_no_loss():
    model = build(initializer_range=0.05, router_aux_loss_coef=0.5).train()
    input_ids = tokens(2, 9)
    loss, expected = gradients(model, input_ids)
    model.gradient_checkpointing_enable()
    checkpointed_loss, checkpointed = gradients(model, input_ids)
    assert torch.equal(loss, checkpointed_loss)
    assert largest_difference(checkpointed, expected) <= 1e-6


@pytest.mark.parametrize("model_class", [CoEForCausalLM, CoEModel, CoEForSequenceClassification])
def test_reentrant_checkpointing_changes_no_gradient_either(model_class):
    model = build(model_class, initializer_range=0.05, router_aux_loss_coef=0.5).train()
    input_ids, grads = tokens(2, 9), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        model.zero_grad()
        if model_class is CoEModel:
            loss = model(input_ids).last_hidden_state.square().mean()
        else:
            labels = input_ids if model_class is CoEForCausalLM else torch.tensor([0, 1])
            loss = model(input_ids, labels=labels).loss
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert largest_difference(*grads) <= 1e-6


@pytest.mark.skipif(
    "grouped_mm_fallback_backward" not in dir(torch.ops.transformers),
    reason="this transformers cannot compile the backward pass of its fp32 grouped product, for any model",
)
@pytest.mark.parametrize(
    "model_class, checkpointing, layers",
    [(CoEForCausalLM, False, 1), (CoEForCausalLM, True, 2), (CoEForTokenClassification, True, 1)],
)
def test_a_model_that_never_ran_trains_in_one_graph(model_class, checkpointing, layers):
    input_ids, graphs = tokens(2, 8), []

    def aot_eager(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    def train(model, function):
        function(input_ids, labels=input_ids % 2).loss.backward()
        return [p.grad for p in model.parameters()]

    options = {"num_hidden_layers": layers, "layers_per_pool": layers, "num_iterations": 2, "initializer_range": 0.05}
    fresh, twin = (build(model_class, classifier_dropout=0.0, **options).train() for _ in range(2))
    if checkpointing:
        fresh.gradient_checkpointing_enable()
    torch.compiler.reset()
    got = train(fresh, torch.compile(fresh, fullgraph=True, backend=aot_eager))
    assert len(graphs) == 1
    assert largest_difference(got, train(twin, twin)) <= 1e-6


def test_functional_transforms_give_the_gradients_of_plain_loops(model):
    rows = tokens(3, 7)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, row):
        return functional_call(model, parameters, (row[None],), {"labels": row[None], "use_cache": False}).loss

    def plain(row):
        return torch.autograd.grad(model(row[None], labels=row[None]).loss, list(model.parameters()))

    expected = [torch.stack(gradients) for gradients in zip(*map(plain, rows), strict=True)]
    assert largest_difference(grad(loss)(parameters, rows[0]).values(), [g[0] for g in expected]) <= 1e-6
    assert largest_difference(vmap(grad(loss), (None, 0))(parameters, rows).values(), expected) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batched_gradients_are_those_of_a_loop(model, dtype):
    outputs, weights = model.to(dtype)(tokens(2, 7)).logits.flatten()[:3], list(model.parameters())
    directions = torch.eye(3, dtype=dtype)

    def gradient(direction):
        return torch.autograd.grad(outputs, weights, direction, retain_graph=True)

    expected = [torch.stack(gradients) for gradients in zip(*map(gradient, directions), strict=True)]
    batched = torch.autograd.grad(outputs, weights, directions, is_grads_batched=True, retain_graph=True)
    for got in (batched, vmap(gradient)(directions)):
        scale = max(g.abs().max() for g in expected)
        assert largest_difference(got, expected) <= (1e-6 if dtype == torch.float32 else 2e-2) * scale


class EmbeddingInDisguise(torch.nn.Module):
    """An adapter around the embedding: no attribute of it is known, and it has one token more."""

    def __init__(self, embedding):
        super().__init__()
        self.inner, self.extra = embedding, torch.nn.Parameter(torch.randn(embedding.embedding_dim))

    def forward(self, input_ids):
        known = self.inner(input_ids.clamp(max=SMALL["vocab_size"] - 1))
        return torch.where(input_ids[..., None] < SMALL["vocab_size"], known, self.extra)


def test_any_module_may_stand_for_the_embedding(model):
    input_ids = tokens(2, 7)
    expected = model(input_ids).logits
    model.model.embed_tokens = EmbeddingInDisguise(model.model.embed_tokens)
    assert torch.equal(model(input_ids).logits, expected)
    input_ids[0, 0] = SMALL["vocab_size"]
    model.train()(input_ids, labels=input_ids.masked_fill(input_ids == SMALL["vocab_size"], -100)).loss.backward()
    assert model.model.embed_tokens.extra.grad.any()


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("rope", ["default", "dynamic", "yarn"])
def test_every_rotation_works_without_a_head_dim(rope):
    """Which is then hidden_size / num_attention_heads, as everywhere else."""
    default = build(rope_parameters=ROPES[rope])
    heads = default.config.num_attention_heads
    expected = build(rope_parameters=ROPES[rope], head_dim=SMALL["hidden_size"] // heads)
    ids = tokens(1, 40)
    assert default.config.head_dim is None
    torch.testing.assert_close(default(ids).logits, expected(ids).logits, rtol=0, atol=0)


def test_the_configuration_of_another_model_is_refused_by_name(tmp_path):
    build().save_pretrained(tmp_path)
    for make in (CoEForCausalLM, CoEModel, lambda config: CoEForCausalLM.from_pretrained(tmp_path, config=config)):
        with pytest.raises(ValueError, match=r"has `model_type='mixtral'`.*upcycle"):
            make(MixtralConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=4, num_key_value_heads=2))


@pytest.mark.parametrize("rope", ROPES)
def test_no_cast_and_no_empty_memory_spoils_the_rotation(rope):
    config = build(CoEModel, rope_parameters=ROPES[rope], head_dim=8).config
    positions = torch.arange(300)[None]
    cosine, sine = modeling_coe.CoERotaryEmbedding(config)(torch.zeros(1), positions)
    with torch.device("meta"):
        empty = modeling_coe.CoERotaryEmbedding(config)
    moved = {
        "bf16": modeling_coe.CoERotaryEmbedding(config).to(torch.bfloat16),
        "half": modeling_coe.CoERotaryEmbedding(config).half(),
        "grown, then cast": modeling_coe.CoERotaryEmbedding(config),
        "meta": empty.to_empty(device="cpu"),
    }
    moved["grown, then cast"](torch.zeros(1), positions)
    moved["grown, then cast"].bfloat16()
    with torch.device("meta"):
        moved["meta, then assigned"] = modeling_coe.CoERotaryEmbedding(config)
    moved["meta, then assigned"].load_state_dict({}, assign=True)
    for name, rotary in moved.items():
        for short in (positions[:, :9], positions):
            modeling_coe.CoERotaryEmbedding(config)(torch.zeros(1), short)
            rotary(torch.zeros(1), short)
        got = rotary(torch.zeros(1), positions)
        assert torch.equal(got[0], cosine) and torch.equal(got[1], sine), name


def test_a_rotation_stays_what_the_model_was_built_from():
    model, ids = build(), tokens(1, 40)
    expected = model(ids).logits
    model.config.rope_parameters["rope_theta"] = 5.0
    torch.testing.assert_close(model.to(torch.float64).to(torch.float32)(ids).logits, expected)


def test_the_second_output_of_training_is_the_logits_unless_router_logits_were_asked_for():
    model, input_ids = build().train(), tokens(2, 9)
    outputs = model(input_ids, labels=input_ids)
    assert outputs[1] is outputs.logits and outputs.aux_loss > 1
    asked = model(input_ids, labels=input_ids, output_router_logits=True)
    assert asked[1] is asked.aux_loss
    assert torch.equal(model(input_ids, labels=input_ids, return_dict=False)[1], outputs.logits)


def test_a_block_mask_is_no_padding_mask():
    def causal(module, query, key, value, attention_mask, **kwargs):
        assert isinstance(attention_mask, BlockMask)
        return sdpa_attention_forward(module, query, key, value, None, **(kwargs | {"is_causal": True}))

    AttentionInterface.register("block", causal)
    model, input_ids = build().train(), tokens(1, 8)
    expected = model(input_ids, labels=input_ids)
    model.set_attn_implementation("block")
    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, None, 8, 8, device="cpu", BLOCK_SIZE=8)
    outputs = model(input_ids, attention_mask=mask, labels=input_ids, use_cache=False)
    torch.testing.assert_close(outputs.loss, expected.loss)


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("num_items", [None, 7, "tensor"])
def test_the_loss_is_where_the_model_is_not_where_the_labels_are(num_items, skip_logits):
    """Two devices without a GPU: fake tensors check them; a model of `device_map="auto"` ends on another device."""
    model = build(router_aux_loss_coef=0.1, num_hidden_layers=1).train()
    model.set_experts_implementation("batched_mm")
    with FakeTensorMode(allow_non_fake_inputs=True):
        labels = torch.zeros(2, 9, dtype=torch.long, device="meta")
        count = torch.tensor(7, device="meta") if num_items == "tensor" else num_items
        loss = model(
            inputs_embeds=torch.zeros(2, 9, 48), labels=labels, skip_logits=skip_logits, num_items_in_batch=count
        ).loss
        assert loss.device == torch.device("cpu")


@torch.no_grad()
def test_compiles_without_a_graph_break(model):
    input_ids = tokens(2, 8)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(
        compiled(input_ids, use_cache=False).logits, model(input_ids).logits, rtol=1e-3, atol=1e-3
    )


@pytest.mark.slow
@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.17"),
    reason="the grouped products of transformers 5.16 do not compile with a backward on CPU, in Mixtral either",
)
def test_compiled_training_gives_the_same_gradients():
    model = build(initializer_range=0.05).train()
    input_ids = tokens(2, 8)
    _, expected = gradients(model, input_ids)
    compiled = torch.compile(model, fullgraph=True)
    model.zero_grad()
    compiled(input_ids, labels=input_ids, use_cache=False).loss.backward()
    assert largest_difference([p.grad for p in model.parameters()], expected) <= 1e-4


@torch.no_grad()
def test_exports_to_a_graph_that_gives_the_same_logits(model):
    input_ids = tokens(2, 8)
    program = torch.export.export(model, (), {"input_ids": input_ids, "use_cache": False})
    logits = program.module()(input_ids=input_ids, use_cache=False).logits
    torch.testing.assert_close(logits, model(input_ids).logits, rtol=1e-3, atol=1e-3)


def test_fresh_weights_follow_the_initial_range_and_none_is_left_out():
    model = build(CoEModel, iteration_scale=True, num_shared_experts=1, initializer_range=0.02)
    for name, parameter in model.named_parameters():
        if "norm" not in name and "iteration_scale" not in name:
            # the padding row of the embedding is zero
            values = parameter[1:] if name.startswith("embed") else parameter
            assert 0.015 < values.std() < 0.025, name
    torch.manual_seed(0)
    fresh = CoEModel(model.config)
    assert torch.equal(fresh.layers[0].mlp.iteration_scale, torch.ones(SMALL["num_iterations"]))


@pytest.mark.parametrize("norm_topk_prob, learns", [(True, False), (False, True)])
def test_the_router_of_a_single_expert_learns_from_raw_weights_only_and_the_config_warns(
    norm_topk_prob, learns, monkeypatch
):
    warnings = []
    monkeypatch.setattr(configuration_coe.logger, "warning_once", warnings.append)
    model = build(num_experts_per_tok=1, norm_topk_prob=norm_topk_prob, router_aux_loss_coef=0.0).train()
    inputs = tokens(2, 9)
    model(input_ids=inputs, labels=inputs).loss.backward()
    gradient = model.model.layers[0].mlp.gate.weight.grad
    assert gradient.abs().max().item() > 1e-6 if learns else gradient.abs().max().item() < 1e-6
    assert bool(warnings) is not learns and all("norm_topk_prob=False" in warning for warning in warnings)


def test_the_loss_without_logits_has_gradients_under_functional_transforms():
    model = build()
    ids = torch.arange(3, 19).view(2, 8)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights, skip_logits):
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False, "skip_logits": skip_logits}
        return torch.func.functional_call(model, weights, (), inputs).loss

    expected, found = (torch.func.grad(loss)(weights, skip) for skip in (False, True))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_outputs_in_training_are_mixtrals(model):
    ids = torch.arange(3, 19).view(2, 8)
    output = model.train()(ids, labels=ids)
    assert list(output.keys()) == ["loss", "logits", "past_key_values"] and output.aux_loss is not None
