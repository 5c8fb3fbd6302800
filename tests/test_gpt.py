"""The model against upstream's golden numbers, and its counts, initial values and refusals."""

import math

import pytest
import torch
from golden_figures import CONFIG, FACTS, arrays, assert_golden, batch, golden_model
from kernel_cases import kernel_device

from nanochat.common import UserError
from nanochat.engine import KVCache
from nanochat.gpt import GPT, GPTConfig, flops_per_token, parameter_counts, scaling_params


def small_model(fused_rmsnorm=False, chunked_ce=False, **changes):
    sizes = {"vocab_size": 64, "n_layer": 3, "n_head": 2, "n_kv_head": 2, "n_embd": 32, **changes}
    config = GPTConfig(64, **sizes)
    return GPT(config, fused_rmsnorm=fused_rmsnorm, chunked_ce=chunked_ce)


# --- golden numbers -------------------------------------------------------------------------------

def test_logits_and_losses_match_golden():
    expected, (idx, targets) = arrays("expected"), batch()
    model = golden_model()
    with torch.no_grad():
        logits, losses = model(idx[:1])[0, ::16], model(idx, targets, "none")
        loss = model(idx, targets)
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    assert losses.shape == targets.shape
    torch.testing.assert_close(losses.flatten(), expected["loss_per_token"], atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, expected["loss_mean"], rtol=1e-5, atol=0)
    bf16_loss = golden_model(compute_dtype=torch.bfloat16)(idx, targets)
    assert bf16_loss.item() == pytest.approx(loss.item(), rel=2e-2)


@pytest.mark.parametrize("flags", [{}, {"chunked_ce": True}, {"fused_rmsnorm": True}], ids=str)
def test_gradients_match_golden(flags):
    device = kernel_device() if flags else "cpu"
    model = golden_model(device, **flags)
    model(*batch(device)).backward()
    assert_golden({name: p.grad for name, p in model.named_parameters()}, "gradients")


def test_decoding_with_a_cache_matches_golden():
    idx, _ = batch()
    model, cache = golden_model(), KVCache(CONFIG, 1, 220, "cpu", torch.float32)
    start, steps = FACTS["kv_prefill_tokens"], FACTS["kv_decode_tokens"]
    with torch.no_grad():
        logits = [model(idx[:1, :start], kv_cache=cache)[:, -1]]
        for t in range(start, start + steps):
            logits.append(model(idx[:1, t : t + 1], kv_cache=cache)[:, -1])
    expected = arrays("expected")["kv_decode_logits"]  # after every fourth token
    torch.testing.assert_close(torch.stack(logits, 1)[:, ::4], expected, atol=1e-4, rtol=0)


def test_counts_flops_windows_and_names_match_golden():
    model, counts = GPT(CONFIG), parameter_counts(CONFIG)
    assert counts == FACTS["param_counts"]
    assert sum(p.numel() for p in model.parameters()) == counts["total"]
    assert scaling_params(CONFIG) == counts["transformer_matrices"] + counts["lm_head"]
    assert flops_per_token(CONFIG) == FACTS["flops_per_token"]
    assert CONFIG.windows == [left for left, _ in FACTS["window_sizes"]]
    assert set(model.state_dict()) == set(arrays("weights"))


def test_initial_values_have_the_golden_statistics():
    model = GPT(CONFIG)
    model.init_weights(seed=7)
    for name, p in model.named_parameters():
        golden = FACTS["init_stats"][name]
        assert list(p.shape) == golden["shape"]
        noise = 5 * golden["std"] / math.sqrt(p.numel())
        assert abs(p.mean().item() - golden["mean"]) <= 2 * noise + 1e-6, name
        if p.numel() > 1:
            tolerance = 4 / math.sqrt(2 * p.numel())
            assert p.std().item() == pytest.approx(golden["std"], rel=tolerance, abs=1e-6), name
        if "wte" not in name and "lm_head" not in name:  # the others are bounded
            margin = 0.15 * golden["std"] + 1e-6
            assert p.min().item() >= golden["min"] - margin, name
            assert p.max().item() <= golden["max"] + margin, name


# --- sizes and initial values ---------------------------------------------------------------------

@pytest.mark.parametrize(("length", "short"), [(64, 128), (512, 128), (1100, 384), (2048, 512)])
def test_short_windows_are_a_quarter_rounded_up_to_128(length, short):
    config = GPTConfig(length, n_layer=6, window_pattern="SSL")
    assert config.windows == [short, short, length, short, short, length]


@pytest.mark.parametrize(("n_layer", "layers"), [(1, [0]), (4, [1, 3]), (5, [0, 2, 4])])
def test_value_embeddings_are_in_every_second_layer_and_in_the_last(n_layer, layers):
    model = small_model(n_layer=n_layer)
    assert [int(layer) for layer in model.value_embeds] == layers
    gated = [i for i, block in enumerate(model.transformer.h) if block.attn.ve_gate is not None]
    assert gated == layers


@pytest.mark.parametrize("change", [
    {"n_embd": 30}, {"n_kv_head": 3}, {"window_pattern": "SX"}, {"n_layer": 0}, {"n_expert": 8}])
def test_an_impossible_config_is_refused(change):
    with pytest.raises(UserError):
        GPTConfig.from_dict({**FACTS["config"], "n_head": 4, **change})


def test_initial_values_depend_only_on_the_seed_and_differ_between_matrices():
    first, second, other = (small_model(n_embd=128) for _ in range(3))
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        model.init_weights(seed)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    drawn = [p.flatten()[:100] for p in first.parameters() if p.numel() > 100 and p.any()]
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert len(drawn) > 15 and correlation.abs().max() < 0.5


# --- the forward pass -----------------------------------------------------------------------------

def test_padded_columns_change_neither_loss_nor_gradients():
    idx, targets = batch()
    model, disturbed = golden_model(), golden_model()
    with torch.no_grad():
        disturbed.lm_head.weight[CONFIG.vocab_size :] = 1e3
    losses = [each(idx, targets) for each in (model, disturbed)]
    assert torch.equal(*losses)
    losses[1].backward()
    assert not disturbed.lm_head.weight.grad[CONFIG.vocab_size :].any()


@pytest.mark.parametrize("flags", [{"fused_rmsnorm": True, "chunked_ce": True}, {}], ids=str)
def test_the_model_compiles_to_one_graph_with_the_same_results(flags):
    device = kernel_device() if flags else "cpu"
    model = small_model(n_layer=1, **flags).to(device)
    model.init_weights(0)
    idx = torch.arange(40, device=device).view(2, 20)
    torch._dynamo.reset()
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)):
        loss = run(idx, idx)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)
