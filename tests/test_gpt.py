import math

import pytest
import torch
from golden_figures import CONFIG, FACTS, arrays, batch, golden_model, relative_error
from kernel_cases import kernel_device

from nanochat.common import UserError
from nanochat.engine import KVCache
from nanochat.gpt import GPT, GPTConfig, flops_per_token, parameter_counts, scaling_params


def test_logits_match_golden():
    idx, _ = batch()
    with torch.no_grad():
        logits = golden_model()(idx[:1])[0]
    torch.testing.assert_close(logits, arrays("outputs")["logits_row0"], atol=1e-4, rtol=0)


def test_losses_of_every_reduction_match_golden():
    outputs, (idx, targets) = arrays("outputs"), batch()
    model = golden_model()
    with torch.no_grad():
        per_token = model(idx, targets, "none")
        assert per_token.shape == targets.shape
        torch.testing.assert_close(per_token.flatten(), outputs["loss_per_token"], atol=1e-4, rtol=0)
        torch.testing.assert_close(model(idx, targets, "sum"), outputs["loss_sum"], rtol=1e-5, atol=0)
        torch.testing.assert_close(model(idx, targets), outputs["loss_mean"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("flags", [{}, {"chunked_ce": True}, {"fused_rmsnorm": True}], ids=str)
def test_gradients_match_golden(flags):
    device = kernel_device() if flags else "cpu"
    model = golden_model(device, **flags)
    model(*batch(device)).backward()
    golden = arrays("grads")
    errors = {name: relative_error(p.grad.cpu(), golden[name]) for name, p in model.named_parameters()}
    assert set(errors) == set(golden)
    assert max(errors.values()) < 1e-3, errors


def test_decoding_with_a_cache_matches_golden():
    idx, _ = batch()
    model, cache = golden_model(), KVCache(CONFIG, 1, 220, "cpu", torch.float32)
    prefill, steps = FACTS["kv_prefill_tokens"], FACTS["kv_decode_tokens"]
    with torch.no_grad():
        logits = [model(idx[:1, :prefill], kv_cache=cache)[:, -1]]
        logits += [model(idx[:1, t : t + 1], kv_cache=cache)[:, -1] for t in range(prefill, prefill + steps)]
    torch.testing.assert_close(torch.stack(logits, 1), arrays("outputs")["kv_decode_logits"], atol=1e-4, rtol=0)


def test_counts_flops_and_windows_match_golden():
    assert parameter_counts(CONFIG) == FACTS["param_counts"]
    assert flops_per_token(CONFIG) == FACTS["flops_per_token"]
    assert CONFIG.windows == [left for left, _ in FACTS["window_sizes"]]


@pytest.mark.parametrize(("length", "short"), [(64, 128), (512, 128), (1100, 384), (2048, 512)])
def test_short_windows_are_a_quarter_rounded_up_to_128(length, short):
    config = GPTConfig(length, n_layer=6, window_pattern="SSL")
    assert config.windows == [short, short, length, short, short, length]


def test_a_window_longer_than_the_sequence_costs_no_more_than_the_sequence():
    assert flops_per_token(GPTConfig(64, window_pattern="S")) == flops_per_token(GPTConfig(64, window_pattern="L"))


@pytest.mark.parametrize(("n_layer", "layers"), [(1, [0]), (4, [1, 3]), (5, [0, 2, 4])])
def test_value_embeddings_are_in_every_second_layer_and_in_the_last(n_layer, layers):
    model = GPT(GPTConfig(64, vocab_size=64, n_layer=n_layer, n_head=2, n_kv_head=2, n_embd=32))
    assert [int(layer) for layer in model.value_embeds] == layers
    assert [i for i, block in enumerate(model.transformer.h) if block.attn.ve_gate is not None] == layers


def test_counts_are_those_of_the_model_built():
    config = GPTConfig(64, vocab_size=100, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL")
    model, counts = GPT(config), parameter_counts(config)
    assert sum(p.numel() for p in model.parameters()) == counts["total"]
    blocks = sum(p.numel() for p in model.transformer.h.parameters())
    assert blocks == counts["transformer_matrices"]
    assert scaling_params(config) == blocks + model.lm_head.weight.numel()


def test_initial_values_have_the_golden_statistics():
    model = GPT(CONFIG)
    model.init_weights(seed=7)
    for name, p in model.named_parameters():
        golden = FACTS["init_stats"][name]
        assert list(p.shape) == golden["shape"]
        noise = 5 * golden["std"] / math.sqrt(p.numel())
        assert abs(p.mean().item() - golden["mean"]) <= 2 * noise + 1e-6, name
        if p.numel() > 1:
            assert p.std().item() == pytest.approx(golden["std"], rel=4 / math.sqrt(2 * p.numel()), abs=1e-6), name
        if "wte" not in name and "lm_head" not in name:  # the bounded ones
            assert p.min().item() >= golden["min"] - 0.15 * golden["std"] - 1e-6, name
            assert p.max().item() <= golden["max"] + 0.15 * golden["std"] + 1e-6, name


def test_initial_values_that_are_not_drawn():
    model = GPT(GPTConfig(64, vocab_size=64, n_layer=3, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights(seed=7)
    for name, expected in {"resid_lambdas": [1.15, 1.10, 1.05], "x0_lambdas": [0.20, 0.125, 0.05],
                           "smear_lambda": [0.0], "backout_lambda": [0.2]}.items():
        torch.testing.assert_close(model.get_parameter(name).data, torch.tensor(expected), msg=name)


def test_initial_values_are_drawn_for_each_matrix_of_its_own_and_as_wide_as_they_should():
    model = GPT(GPTConfig(64, vocab_size=1024, n_layer=3, n_head=2, n_kv_head=2, n_embd=128))
    model.init_weights(seed=7)
    values = dict(model.named_parameters())
    spread = {name: values[name].std().item() for name in ("transformer.wte.weight", "lm_head.weight",
                                                           "value_embeds.0.weight", "transformer.h.1.mlp.c_fc.weight")}
    assert list(spread.values()) == pytest.approx([0.8, 0.001, 128**-0.5, 0.4 * 128**-0.5], rel=0.01)
    drawn = [value.flatten()[:100] for value in values.values() if value.numel() > 100 and value.any()]
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert len(drawn) > 15 and correlation.abs().max() < 0.5


def test_initial_values_depend_on_the_seed_alone():
    first, second, other = (GPT(CONFIG) for _ in range(3))
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        model.init_weights(seed)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_padded_columns_change_neither_loss_nor_gradients():
    idx, targets = batch()
    model, disturbed = golden_model(), golden_model()
    with torch.no_grad():
        disturbed.lm_head.weight[CONFIG.vocab_size :] = 1e3
    losses = [m(idx, targets) for m in (model, disturbed)]
    assert torch.equal(*losses)
    losses[1].backward()
    assert torch.count_nonzero(disturbed.lm_head.weight.grad[CONFIG.vocab_size :]) == 0


def test_short_windows_hide_distant_tokens():
    config = GPTConfig(sequence_len=512, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="S")
    model = GPT(config)
    model.init_weights(0)
    block = model.transformer.h[0].attn
    assert block.window == 128
    x = torch.randn(1, 300, 32, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 299 - 129] += 1.0  # one token further than the last query sees
    cos_sin = model.cos[:, :300], model.sin[:, :300]
    with torch.no_grad():
        block.c_proj.weight.copy_(torch.eye(32))
        value = torch.zeros(1, 300, 32) if block.ve_gate is not None else None
        before, after = (block(v, value, cos_sin, None)[0] for v in (x, changed))
    assert torch.equal(before[299], after[299])
    assert not torch.allclose(before[298], after[298])


@pytest.mark.parametrize("flags", [{"fused_rmsnorm": True, "chunked_ce": True}, {}], ids=str)
def test_the_model_compiles_into_one_graph(flags):
    device = kernel_device() if flags else "cpu"
    model = golden_model(device, **flags)
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        loss = run(*batch(device))
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=0)
    for gradient, expected in zip(results[1][1:], results[0][1:], strict=True):
        assert relative_error(gradient, expected) < 1e-5


def test_state_dict_names_are_upstreams():
    assert set(GPT(CONFIG).state_dict()) == set(arrays("weights"))


def test_bf16_model_stays_close_to_fp32():
    idx, targets = batch()
    model = GPT(CONFIG, torch.bfloat16)
    model.load_state_dict(arrays("weights"))
    assert model.transformer.wte.weight.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.float32
    assert model(idx, targets).item() == pytest.approx(arrays("outputs")["loss_mean"].item(), rel=2e-2)


@pytest.mark.parametrize(("compute", "stored"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                                                 (torch.float16, torch.float32)])
def test_embeddings_are_stored_in_the_compute_dtype_unless_its_range_is_too_small(compute, stored):
    model = GPT(CONFIG, compute)
    assert {e.weight.dtype for e in (model.transformer.wte, *model.value_embeds.values())} == {stored}
    assert model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize(("change", "word"), [
    ({"n_embd": 30}, "heads"), ({"n_kv_head": 3}, "share"), ({"window_pattern": "SX"}, "window-pattern"),
    ({"window_pattern": ""}, "window-pattern")])
def test_sizes_that_cannot_be_are_refused(change, word):
    with pytest.raises(UserError, match=word):
        GPTConfig(**{**FACTS["config"], "n_head": 4, **change})


def test_unknown_keys_of_a_model_config_are_named():
    with pytest.raises(UserError, match="n_expert"):
        GPTConfig.from_dict({**FACTS["config"], "n_expert": 8})
