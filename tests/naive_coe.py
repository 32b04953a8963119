# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The paper's equations as loops over tokens, iterations and experts: what the model must equal.

Nothing here is fast and nothing is shared with the package but the weights.
"""

import torch


def swiglu(x, gate, up, down):
    """E(x) = down @ (silu(gate @ x) * (up @ x)) for one token `x [H]`."""
    gated = gate @ x
    return down @ (gated * torch.sigmoid(gated) * (up @ x))


def iteration(x, block, pool, config, t):
    """F_t(x) of one token `x [H]`: router t, its K best experts of the pool, the shared expert (eq. 1-3)."""
    t_router = t if config.independent_gating else 0
    N, outputs = config.num_local_experts, config.num_local_experts + config.num_null_experts
    scores = block.gate.weight[t_router] @ x
    bias = block.gate.e_score_correction_bias[t_router] if config.router_bias else torch.zeros(outputs)
    chosen = sorted(range(outputs), key=lambda i: -(scores[i] + bias[i]).item())[: config.num_experts_per_tok]
    # A null expert counts only where it is chosen, and then as an expert whose output is 0.
    known = chosen if config.norm_topk_prob else sorted({*range(N), *chosen})
    total = sum(torch.exp(scores[i]) for i in known)
    output = torch.zeros_like(x)
    for i in chosen:
        if i < N:
            gate, up = pool.gate_up_proj[i].chunk(2)
            output = output + torch.exp(scores[i]) / total * swiglu(x, gate, up, pool.down_proj[i])
    if config.num_shared_experts:
        shared = block.shared_expert
        output = output + swiglu(x, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
    if config.iteration_scale:
        output = output * block.iteration_scale[t]
    return output


def chain(h, x_0, block, pool, config):
    """The sparse half of a layer for one token: stream `h [H]`, normalised stream `x_0 [H]` -> new stream `[H]`."""
    x = x_0
    for t in range(config.num_iterations):
        update = iteration(x, block, pool, config, t)
        x = update if config.residual == "outer" else x + update
    return {"nested": h + (x - x_0), "inner": x, "outer": h + x}[config.residual]


def rms_norm(x, norm):
    return norm.weight * x / torch.sqrt((x * x).mean() + norm.variance_epsilon)


def sparse_half(stream, layer, config, pool=None):
    """`[B, S, H]` after attention -> `[B, S, H]` after the chain, token by token; the pool is the layer's own."""
    flat = stream.reshape(-1, stream.shape[-1])
    pool = layer.mlp.experts if pool is None else pool
    out = [chain(h, rms_norm(h, layer.post_attention_layernorm), layer.mlp, pool, config) for h in flat]
    return torch.stack(out).view_as(stream)


def attention(x, block, config):
    """Causal attention of one sequence `x [S, H]` with rotary positions, query by query and head by head."""
    width = config.hidden_size // config.num_attention_heads
    q, k, v = ((proj.weight @ x.T).T.unflatten(-1, (-1, width)) for proj in (block.q_proj, block.k_proj, block.v_proj))
    group = config.num_attention_heads // config.num_key_value_heads
    rows = []
    for now in range(len(x)):
        heads = []
        for head in range(config.num_attention_heads):
            query = rotate(q[now, head], now, config)
            scores = [query @ rotate(k[then, head // group], then, config) / width**0.5 for then in range(now + 1)]
            weights = torch.softmax(torch.stack(scores), dim=0)
            heads.append(sum(weights[then] * v[then, head // group] for then in range(now + 1)))
        rows.append(block.o_proj.weight @ torch.cat(heads))
    return torch.stack(rows)


def rotate(x, position, config):
    """Rotary embedding of one head `x [D]`: the pairs (i, i + D / 2) turn by position / theta^(2i / D)."""
    half = len(x) // 2
    angle = position / config.rope_parameters["rope_theta"] ** (torch.arange(half, dtype=x.dtype) / half)
    first, second = x[:half], x[half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()])


def decoder(ids, model, config):
    """Token ids `[S]` -> logits `[S, V]`: every run of `layers_per_pool` layers visits the first one's experts."""
    layers = model.model.layers
    stream = model.model.embed_tokens.weight[ids]
    for number, layer in enumerate(layers):
        normed = torch.stack([rms_norm(h, layer.input_layernorm) for h in stream])
        stream = stream + attention(normed, layer.self_attn, config)
        first = number // config.layers_per_pool * config.layers_per_pool
        stream = sparse_half(stream, layer, config, layers[first].mlp.experts)
    return torch.stack([model.lm_head.weight @ rms_norm(h, model.model.norm) for h in stream])


def load_balancing_loss(router_logits, num_experts, top_k, attention_mask):
    """Switch's loss (arXiv 2101.03961, eq. 4-6) over all routers, counted token by token."""
    keep = [bool(m) for m in attention_mask.reshape(-1)]
    count, chosen, probability = 0, [0.0] * num_experts, [0.0] * num_experts
    for logits in router_logits:
        for token, row in enumerate(logits):
            if not keep[token]:
                continue
            count += 1
            probabilities = torch.softmax(row.double(), dim=0)
            for i in range(num_experts):
                probability[i] = probability[i] + probabilities[i]
            for i in sorted(range(num_experts), key=lambda i: -probabilities[i].item())[:top_k]:
                chosen[i] += 1.0
    return num_experts * sum(c / count * p / count for c, p in zip(chosen, probability, strict=True))
