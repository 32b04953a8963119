# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""However transformers decodes, the tokens are the argmax of the plain forward."""

import pytest
import torch
from conftest import build, tokens
from transformers import CompileConfig, GenerationConfig
from transformers.generation import ContinuousBatchingConfig


NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads from a GPU only")


@torch.no_grad()
def argmax_continuation(model, prompt, length=NEW):
    """Greedy decoding by plain forwards over the whole sequence, one row `[S]` at a time."""
    sequence = prompt
    for _ in range(length):
        logits = model(sequence[None], use_cache=False).logits[0, -1]
        sequence = torch.cat([sequence, logits.argmax()[None]])
    return sequence


def expected_rows(model, prompts):
    return torch.stack([argmax_continuation(model, prompt)[len(prompt) :] for prompt in prompts])


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        pytest.param({"cache_implementation": "offloaded"}, marks=NEEDS_GPU),
        pytest.param({"cache_implementation": "offloaded_static"}, marks=NEEDS_GPU),
        {"prefill_chunk_size": 2},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
@pytest.mark.parametrize("overrides", [{}, {"residual": "inner", "num_shared_experts": 1, "qk_norm": "head"}])
def test_generation_equals_the_plain_forwards_argmax(options, overrides):
    model, prompts = build(**overrides), tokens(2, 5)
    generated = model.generate(prompts, attention_mask=torch.ones_like(prompts), **GREEDY, **options)
    assert torch.equal(generated[:, 5:], expected_rows(model, prompts))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_left_padded_generation_equals_unpadded(model, implementation):
    model.set_attn_implementation(implementation)
    short, long = tokens(3, seed=5), tokens(7, seed=6)
    batch = torch.stack([torch.cat([torch.zeros(4, dtype=torch.long), short]), long])
    generated = model.generate(batch, attention_mask=(batch != 0).long(), **GREEDY)
    assert torch.equal(generated[:, 7:], expected_rows(model, [short, long]))


def test_sliding_window_generation_equals_the_plain_forwards_argmax():
    model, prompts = build(sliding_window=4), tokens(2, 6)
    generated = model.generate(prompts, attention_mask=torch.ones_like(prompts), **GREEDY)
    assert torch.equal(generated[:, 6:], expected_rows(model, prompts))


@torch.no_grad()
def test_beam_search_returns_sequences_with_the_score_of_the_plain_forward(model):
    prompts = tokens(2, 5)
    beams = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), **GREEDY, num_beams=3, num_return_sequences=3,
        return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    log_probabilities = model(beams.sequences, use_cache=False).logits[:, 4:-1].log_softmax(-1)
    scores = log_probabilities.gather(-1, beams.sequences[:, 5:, None]).sum((1, 2))
    torch.testing.assert_close(beams.sequences_scores, scores, rtol=1e-3, atol=1e-3)
    greedy = expected_rows(model, prompts)
    greedy_scores = torch.stack(
        [
            model(torch.cat([prompt, row])[None]).logits[0, 4:-1].log_softmax(-1).gather(-1, row[:, None]).sum()
            for prompt, row in zip(prompts, greedy, strict=True)
        ]
    )
    assert (beams.sequences_scores.view(2, 3)[:, 0] >= greedy_scores - 1e-4).all()


def test_assisted_generation_equals_greedy(model):
    assistant, prompt = build(num_hidden_layers=1), tokens(1, 5)
    generated = model.generate(prompt, assistant_model=assistant, **GREEDY)
    assert torch.equal(generated[:, 5:], expected_rows(model, prompt))


def test_sampling_follows_the_models_distribution(model):
    prompt = tokens(1, 5)
    torch.manual_seed(0)
    drawn = model.generate(
        prompt.expand(4000, -1), max_new_tokens=1, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0
    )[:, -1]
    frequencies = torch.bincount(drawn, minlength=99) / 4000
    probabilities = model(prompt).logits[0, -1].softmax(-1)
    assert (frequencies - probabilities).abs().max() < 0.03


def test_continuous_batching_equals_the_plain_forwards_argmax(model):
    prompts = [tokens(3, seed=5), tokens(7, seed=6), tokens(5, seed=7)]
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    memory = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    outputs = model.generate_batch(
        inputs=[prompt.tolist() for prompt in prompts], generation_config=config, continuous_batching_config=memory
    )
    generated = torch.tensor([outputs[f"req_{i}"].generated_tokens for i in range(3)])
    assert torch.equal(generated, expected_rows(model, prompts))


def test_cached_step_equals_the_whole_forward(model):
    input_ids = tokens(2, 8)
    cache = model(input_ids[:, :5], use_cache=True).past_key_values
    step = model(input_ids[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(step, model(input_ids).logits[:, 5:], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_static_cache_generation_equals_the_plain_forwards_argmax(model):
    prompts = tokens(2, 5)
    compile_config = CompileConfig(fullgraph=True, mode="default")
    compile_config._compile_all_devices = True
    generated = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), **GREEDY, cache_implementation="static",
        compile_config=compile_config,
    )  # fmt: skip
    assert torch.equal(generated[:, 5:], expected_rows(model, prompts))
