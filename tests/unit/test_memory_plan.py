"""A plan counts what a real step holds: byte for byte on tiny models, and along straight lines beyond them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, BertConfig, MambaConfig
from transformers.masking_utils import AttentionMaskInterface

from hf_longctx import LongContextConfig
from hf_longctx.adapters.recurrent.delta_exchange import state_has_gradient
from hf_longctx.adapters.wrapped import runs_our_attention
from hf_longctx.attention.registry import find_attention, known_to_transformers
from hf_longctx.planner.fake_attention import SHAPE_ONLY, SHAPE_ONLY_ATTENTION, _Kernel
from hf_longctx.planner.fake_model import Adapter, add_adapters, fake_mode, find_stack, model_on_meta
from hf_longctx.planner.layer_watch import watch_layers
from hf_longctx.planner.measure import can_measure, measure_in_process, shorten
from hf_longctx.planner.memory_plan import DEVICE_KINDS, USABLE_SHARE, Planner, on_device
from hf_longctx.planner.presets import PRESETS
from hf_longctx.planner.settings import Settings
from hf_longctx.planner.simulate import prepare, run_step, simulate
from hf_longctx.planner.tracker import StorageTracker
from hf_longctx.trainer.checks import check_model

from ..hybrids import build as build_hybrid
from ..models import VOCAB, config_of


TOKENS = 96
POSITIONS = 8  # bytes a token: under a trace, which a simulation looks like, transformers keeps where documents start
PLAIN = {"tokens": TOKENS, "compute_dtype": torch.float32, "on_gpu": False}
TILES = {"loss_tile_size": TOKENS, "mlp_tile_size": 32}


def tiny(**changes):
    """Two layers, so that the whole model is simulated."""
    return config_of("llama", **changes)


def totals(peaks) -> dict[tuple[str, str], int]:
    return {phase: round(on_device(kinds)) for phase, kinds in peaks.device.items()}


def real_step(config, settings: Settings):
    """The peaks of a step on real tensors with the real kernel, watched by the same tracker."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="packed", dtype=settings.weights_dtype)
    stack = find_stack(model)
    if settings.optimizer == "lora":
        add_adapters(model, stack, settings.lora_rank)
    tracker = StorageTracker()
    prepare(model, settings, tracker)
    watch_layers(model, stack, tracker)
    ids = torch.randint(VOCAB, (settings.rows, settings.tokens))
    batch = {name: ids.clone() for name in ("input_ids", "labels", "shift_labels")}
    return run_step(model, {**batch, "use_cache": False, "num_items_in_batch": 1}, settings, tracker)


# The tracker


def test_tracker_counts_what_is_alive_once_and_by_kind():
    tracker = StorageTracker()
    tracker.phase = "work"
    weight = torch.nn.Parameter(torch.ones(10, 20))
    tracker.mark(weight, "weights")
    with tracker:
        with tracker.made("mlp"):
            out = torch.ones(5, 10) @ weight.detach()
        view = out.t()
        assert tracker.live["mlp"] == 5 * 20 * 4  # the left operand is gone, the view is no second storage
        with tracker.made("cpu"):
            copy = out.clone()
        with tracker.made("workspace", share=0.25):
            shard = torch.empty(100)
        assert (tracker.live["cpu"], tracker.live["workspace"]) == (400, 100)
        tracker.mark(out, "logits", share=0.5)
        del shard
    assert tracker.live["weights"] == 800 and tracker.live["logits"] == 200 and tracker.live["workspace"] == 0
    peak = max(map(on_device, tracker.peaks.values()))
    assert (
        peak == 800 + 5 * 10 * 4 + 5 * 20 * 4
    )  # both operands and the product; transformers' copy is not on the device
    del out, view, copy
    assert on_device(tracker.live) == 800 and tracker.live["cpu"] == 0 and tracker.cpu_peak == 400


def test_tracker_sums_gradients_in_place_as_autograd_does_unwatched():
    x = torch.randn(50, requires_grad=True)

    def loss():
        y = x * 1.0
        return sum((y * scale).sum() for scale in (1.0, 2.0, 3.0))

    expected = torch.autograd.grad(loss(), x)[0]
    tracker = StorageTracker()
    with tracker:
        torch.autograd.backward(loss())
    assert torch.equal(x.grad, expected)
    assert max(map(on_device, tracker.peaks.values())) < 7 * 50 * 4


# A simulation is the real step


LORA = {"optimizer": "lora", "weights_dtype": torch.bfloat16, "compute_dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama", {"compute_dtype": torch.bfloat16}),
        ("llama", {"checkpointing": True, "every_n_layers": 2, "optimizer": "adafactor"}),
        ("llama", {"checkpointing": True, "offload": True}),
        ("llama", {**TILES, "checkpointing": True, "compute_dtype": torch.bfloat16}),
        ("llama", {**TILES, **LORA}),
        ("gpt2", {"rows": 2, "accumulates": True, "optimizer": "sgd"}),
        ("gpt2", {"checkpointing": True}),
        ("gpt2", TILES),
        ("gpt2", LORA),
        ("lfm2", {"checkpointing": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_simulation_holds_what_a_real_step_holds_in_every_phase(name, changes):
    settings = Settings(**{**PLAIN, **changes})
    config = config_of(name)
    model = model_on_meta(config)
    planned = simulate(model, settings, find_stack(model), 2)
    real = real_step(config, settings)
    expected, actual = totals(real), totals(planned)
    assert actual.keys() == expected.keys()
    positions = POSITIONS * TOKENS * settings.rows
    assert {actual[phase] - expected[phase] for phase in actual} <= {0, positions, -positions}
    assert (planned.cpu, planned.num_checkpoints) == (real.cpu, real.num_checkpoints)
    assert abs(max(actual.values()) / max(expected.values()) - 1) < 0.002


def test_weights_gradients_and_states_are_those_counted_by_hand():
    config = tiny()
    model = model_on_meta(config)
    numel = sum(p.numel() for p in model.parameters())
    num_tensors = len(list(model.parameters()))
    peaks = simulate(model, Settings(**PLAIN), find_stack(model), 2)
    kinds = peaks.device["step", "workspace"]
    buffers = sum(buffer.numel() * 4 for buffer in model.buffers())
    assert kinds["weights"] == 4 * numel + buffers
    assert kinds["gradients"] == 4 * numel
    assert kinds["optimizer"] == 8 * numel + 4 * num_tensors  # two moments, and a step count for each tensor
    # Fullest in backward: log-probabilities, their gradient, and the gradient of the logits; beside them what the last
    # norm made, in and out of it, a count of its squares, and two scalars.
    logits = peaks.device["loss", "logits"]["logits"]
    assert logits == 4 * (3 * TOKENS * VOCAB + 2 * TOKENS * config.hidden_size + TOKENS + 2)


def test_gpu_kernel_holds_nothing_quadratic_and_has_buffers_in_backward():
    heads, kv_heads, size = 6, 2, 8
    most = {}
    for tokens in (TOKENS, 4 * TOKENS):
        for is_flash in (True, False):
            tracker = StorageTracker()
            with fake_mode(), tracker:
                shapes = [(1, count, tokens, size) for count in (heads, kv_heads, kv_heads)]
                output = _Kernel.apply(is_flash, *(torch.empty(shape, requires_grad=True) for shape in shapes))
                tracker.forget_peaks()
                output.backward(torch.empty_like(output))
            most[tokens, is_flash] = max(map(on_device, tracker.peaks.values()))
    assert all(most[4 * TOKENS, is_flash] == 4 * most[TOKENS, is_flash] for is_flash in (True, False))
    accumulated = 4 * TOKENS * heads * size  # the gradient of the queries in fp32
    expanded = 2 * 4 * TOKENS * heads * size  # those of keys and values for every query head
    assert most[TOKENS, True] - most[TOKENS, False] == accumulated + expanded + 4 * TOKENS * heads


# Straight lines


@pytest.mark.parametrize(
    ("name", "changes", "sizes"),
    [
        ("llama", {}, (2, 3)),
        ("gemma2", {"checkpointing": True}, (2, 3)),
        ("deepseek_v3", {"compute_dtype": torch.bfloat16}, (4, 5)),  # its first two layers are dense
    ],
)
def test_few_layers_tell_many(name, changes, sizes):
    planner = Planner(config_of(name, num_hidden_layers=7))
    assert planner.stack.sizes == sizes
    settings = Settings(**{**PLAIN, **changes})
    whole = simulate(planner.model, settings, planner.stack, 7)
    assert planner.breakdown(settings).device == max(totals(whole).values())


def test_layers_that_are_checkpointed_now_and_then_repeat_with_that_period():
    planner = Planner(tiny(num_hidden_layers=9))
    assert replace(planner.stack, period=2).sizes == (5, 7)
    settings = Settings(**PLAIN, checkpointing=True, every_n_layers=2)
    whole = simulate(planner.model, settings, planner.stack, 9)
    assert planner.breakdown(settings).device == max(totals(whole).values())


@pytest.mark.parametrize("preset", ["off", "max"])
def test_length_is_a_straight_line(preset):
    planner = Planner(tiny(num_hidden_layers=2))
    settings = planner.preset(preset, Settings(tokens=1)).of(loss_tile_size=None)
    tokens = 50_000
    direct = planner._at(settings, tokens)
    breakdown = planner.breakdown(settings.of(tokens=tokens))
    assert breakdown.device == pytest.approx(max(map(on_device, direct.device.values())), rel=1e-6)
    assert breakdown.cpu == 2 * 2 ** (tokens * 48 * 4 - 1).bit_length() * (preset == "max")


@pytest.mark.parametrize(("preset", "size"), [("off", 1), ("checkpoint", 2)])
def test_longest_row_fills_the_device_and_one_more_token_does_not_fit(preset, size):
    planner = Planner(tiny(num_hidden_layers=2))
    settings = Settings(tokens=1, world_size=2, wrapper="fsdp2", sequence_parallel_size=size)
    settings = planner.preset(preset, settings).of(loss_tile_size=None)
    longest = planner.longest_tokens(settings, 2**30)
    assert longest > 10_000 and longest % size == 0
    assert planner.fits(settings.of(tokens=longest), 2**30)
    assert not planner.fits(settings.of(tokens=longest + 2 * size), 2**30)


def test_short_rows_are_solved_for_at_their_own_length():
    planner = Planner(tiny())
    settings = Settings(**PLAIN)
    wanted = planner.breakdown(settings.of(tokens=500)).device
    assert abs(planner.longest_tokens(settings, round(wanted / USABLE_SHARE)) - 500) <= 5
    assert planner.longest_tokens(settings, 1000) == 0


def test_host_memory_limits_offload_by_powers_of_two():
    planner = Planner(tiny())
    settings = Settings(tokens=1, world_size=2, wrapper="ddp", processes_per_node=2, checkpointing=True, offload=True)
    each = 48 * 4  # bytes of a token in a checkpoint
    cpu_bytes = 2 * 2 * 2**20 + 12345  # two ranks, two layers, a MiB each
    longest = planner.longest_tokens(settings, 2**40, cpu_bytes)
    assert longest == 2**20 // each
    assert planner.fits(settings.of(tokens=longest), 2**40, cpu_bytes)
    assert not planner.fits(settings.of(tokens=longest + 1), 2**40, cpu_bytes)
    assert planner.longest_tokens(settings, 2**40, 3) == 0


# Several ranks, wrappers, presets


def test_ranks_share_the_tokens_of_a_row():
    planner = Planner(tiny())
    alone = Settings(tokens=TOKENS, world_size=6, wrapper="ddp")
    shared = alone.of(tokens=6 * TOKENS - 3, sequence_parallel_size=6)
    one, six = (simulate(planner.model, s, planner.stack, 2) for s in (alone, shared))
    assert six.device["backward 0", "mlp"]["mlp"] == one.device["backward 0", "mlp"]["mlp"]
    assert six.device["loss", "logits"]["logits"] == one.device["loss", "logits"]["logits"]
    # Six ranks of one query head each need a key/value head each, though there are two: twice three copies.
    assert six.device["backward 0", "attention"]["attention"] > one.device["backward 0", "attention"]["attention"]
    with pytest.raises(ValueError, match="exceeds the model's query heads"):
        planner.breakdown(alone.of(world_size=7, sequence_parallel_size=7))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_of_a_hybrid_hold_the_last_tokens_of_all(size):
    model = model_on_meta(config_of("lfm2"))
    stack, width, kernel = find_stack(model), model.config.hidden_size, model.config.conv_L_cache
    settings = Settings(**{**PLAIN, "tokens": TOKENS})
    phase, kind = ("forward 0", "recurrent"), "recurrent"
    alone = simulate(model, settings, stack, 2).device[phase][kind]
    settings = settings.of(tokens=size * TOKENS, sequence_parallel_size=size, world_size=size, wrapper="ddp")
    shared = simulate(model, settings, stack, 2).device[phase][kind]
    tails = size * width * (kernel - 1) * 4
    copies = 3 * width * (TOKENS + kernel) * 4  # rows with a halo, their outputs, those cut out
    assert tails <= shared - alone <= tails + copies


def test_a_plan_of_delta_rules_leaves_no_answer_to_a_run():
    model = model_on_meta(build_hybrid("qwen3_next").config)
    state_has_gradient.cache_clear()
    settings = Settings(**PLAIN).of(tokens=2 * TOKENS, sequence_parallel_size=2, world_size=2, wrapper="ddp")
    assert simulate(model, settings, find_stack(model), 2).device["forward 0", "recurrent"]["recurrent"] > 0
    assert state_has_gradient.cache_info().currsize == 0


def test_fsdp2_divides_and_gathers():
    planner = Planner(tiny(tie_word_embeddings=False))
    settings = Settings(tokens=TOKENS, world_size=4, wrapper="fsdp2", accumulates=True)
    peaks = planner._at(settings, TOKENS)
    numel = sum(p.numel() for p in planner.model.parameters())
    layer = sum(p.numel() for p in planner.model.model.layers[0].parameters())
    head = planner.model.lm_head.weight.numel()
    kinds = peaks.device["loss", "logits"]
    buffers = sum(buffer.numel() * 4 for buffer in planner.model.buffers())
    assert kinds["weights"] == 4 * numel / 4 + buffers  # masters in fp32, of which a quarter is here
    assert kinds["gradients"] == 4 * numel / 4
    assert kinds["optimizer"] == pytest.approx(8 * numel / 4, rel=0.01)
    ints = 3 * 8 * TOKENS
    assert peaks.device["loss", "logits"]["workspace"] == 2 * head + ints
    assert peaks.device["forward 0", "mlp"]["workspace"] == 2 * (head + 3 * layer) + ints
    assert peaks.device["backward 0", "mlp"]["workspace"] == 2 * (head + 5 * layer) + ints


def test_ddp_keeps_its_buckets():
    planner = Planner(tiny())
    one = Settings(tokens=TOKENS)
    ddp = one.of(world_size=2, wrapper="ddp")
    numel = sum(p.numel() for p in planner.model.parameters())
    assert planner.breakdown(ddp).workspace - planner.breakdown(one).workspace == 4 * numel
    lora = ddp.of(optimizer="lora", weights_dtype=torch.bfloat16, lora_rank=4)
    # Seven linear layers in each of two layers; inputs plus outputs of rank 4.
    sizes = 2 * (48 + 48) + 2 * (48 + 16) + 3 * (48 + 64)
    assert planner.breakdown(lora).workspace - planner.breakdown(lora.of(world_size=1)).workspace == 4 * 4 * 2 * sizes


def test_lora_learns_adapters_only():
    planner = Planner(tiny())
    settings = Settings(tokens=TOKENS, optimizer="lora", weights_dtype=torch.bfloat16)
    kinds = simulate(planner.model, settings, planner.stack, 2).device["step", "workspace"]
    adapters = 16 * 2 * (2 * (48 + 48) + 2 * (48 + 16) + 3 * (48 + 64))
    frozen = sum(p.numel() for p in planner.model.parameters())
    assert kinds["gradients"] == 4 * adapters
    assert kinds["weights"] == pytest.approx(2 * frozen + 4 * adapters, rel=1e-3)


def test_adapter_computes_a_low_rank_update():
    layer = torch.nn.Linear(6, 4)
    adapter = Adapter(layer, 2)
    x = torch.randn(3, 6)
    update = 2.0 * adapter.lora_b.weight @ adapter.lora_a.weight
    torch.testing.assert_close(adapter(x), layer(x) + x @ update.t())


def test_every_preset_fits_longer_rows_than_the_one_before():
    config = config_of("qwen3", hidden_size=256, intermediate_size=1024, vocab_size=150_000)
    planner = Planner(config)
    settings = Settings(tokens=1, world_size=2, wrapper="fsdp2")
    longest = [planner.longest_tokens(planner.preset(name, settings), 2**34) for name in PRESETS]
    assert longest == sorted(longest) and longest[0] < longest[-1] / 4
    at = settings.of(tokens=2**17)
    needed = [planner.breakdown(planner.preset(name, at)).device for name in PRESETS]
    assert needed == sorted(needed, reverse=True)
    for step, (preset, tokens) in enumerate(zip(PRESETS.values(), longest)):
        chosen, fitting = planner.choose_preset(settings.of(tokens=tokens), 2**34)
        assert list(PRESETS).index(chosen.name) <= step and planner.fits(fitting, 2**34)
        assert chosen.name == preset.name or tokens == longest[list(PRESETS).index(chosen.name)]
    assert planner.choose_preset(settings.of(tokens=2 * longest[-1]), 2**34) is None


def test_experts_stay_whole_and_a_measured_factor_is_applied():
    planner = Planner(config_of("gpt_oss"))
    assert not planner.tiles_mlp and planner.preset("max", Settings(tokens=8)).mlp_tile_size is None
    plain, corrected = (Planner(tiny(), factor).breakdown(Settings(**PLAIN)) for factor in (1.0, 1.5))
    assert corrected.weights == plain.weights and corrected.optimizer == plain.optimizer
    for kind in ("hidden", "attention", "mlp", "logits"):
        assert getattr(corrected, kind) == pytest.approx(1.5 * getattr(plain, kind), abs=1)
    assert plain.device == sum(getattr(plain, kind) for kind in DEVICE_KINDS)


# What is measured


@pytest.mark.skipif(not can_measure("cpu"), reason="the system does not tell what a process held at most")
def test_measured_step_is_near_the_planned_one():
    config = tiny(hidden_size=512, intermediate_size=1024, vocab_size=20_000, num_attention_heads=8)
    settings = Settings(**{**PLAIN, "tokens": 256})
    planned = Planner(config).breakdown(settings).device
    assert abs(planned / measure_in_process(config, settings, "cpu") - 1) < 0.1


def test_shortened_config_keeps_lists_of_layers_in_step():
    config = shorten(config_of("gemma2", num_hidden_layers=6), 3)
    assert config.num_hidden_layers == len(config.layer_types) == 3
    assert len(AutoModelForCausalLM.from_config(config).model.layers) == 3


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "`tokens` (0) must be a positive integer"),
        ({"mlp_tile_size": True}, "`mlp_tile_size` (True) must be a positive integer"),
        ({"optimizer": "lion"}, "`optimizer` ('lion') must be one of adamw, adafactor, sgd, lora"),
        ({"wrapper": "zero"}, "`wrapper` ('zero') must be one of none, ddp, fsdp2"),
        ({"sequence_parallel_size": 4, "world_size": 6, "wrapper": "ddp"}, "must divide `world_size` (6)"),
        ({"world_size": 2}, "`world_size` is 2: choose 'ddp' or 'fsdp2'"),
        ({"offload": True}, "set `checkpointing` as well"),
    ],
    ids=str,
)
def test_settings_that_no_run_has_are_refused(changes, message):
    with pytest.raises(ValueError) as error:
        Settings(**{"tokens": 8, **changes})
    assert message in str(error.value)


def test_models_that_cannot_be_planned_are_named():
    with pytest.raises(ValueError, match="`BertConfig` makes no decoder"):
        Planner(BertConfig(is_decoder=False, is_encoder_decoder=True))
    with pytest.raises(NotImplementedError, match="`MambaConfig` has no `num_attention_heads`"):
        Planner(MambaConfig())
    with pytest.raises(ValueError, match="`wrapper` .'ddp'.* not those of one process"):
        measure_in_process(tiny(), Settings(tokens=8, world_size=2, wrapper="ddp"), "cpu")


def test_attention_of_plans_refuses_to_train():
    with known_to_transformers(SHAPE_ONLY_ATTENTION):
        model = AutoModelForCausalLM.from_config(tiny(), attn_implementation=SHAPE_ONLY)
        with pytest.raises(RuntimeError, match="computes nothing, it only plans memory"):
            model(input_ids=torch.ones(1, 4, dtype=torch.int64))


def registered() -> list[dict]:
    return [dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)]


def test_a_plan_leaves_its_attention_in_no_registry():
    before = registered()
    assert Planner(tiny()).breakdown(Settings(**PLAIN)).device
    assert registered() == before and find_attention(SHAPE_ONLY) is None
    assert all(SHAPE_ONLY not in mapping for mapping in before)


def test_a_simulation_that_fails_leaves_it_neither_and_nested_ones_keep_it_to_their_end():
    before = registered()
    with pytest.raises(ZeroDivisionError), known_to_transformers(SHAPE_ONLY_ATTENTION):
        with known_to_transformers(SHAPE_ONLY_ATTENTION):
            pass
        assert all(SHAPE_ONLY in mapping for mapping in registered()) and find_attention(SHAPE_ONLY) is None
        1 / 0  # noqa: B018
    assert registered() == before


def test_a_real_model_on_the_attention_of_plans_is_refused():
    """By transformers when it is built, and by our trainers, which take it for an attention like any other."""
    Planner(tiny())
    with pytest.raises(ValueError, match=f'attn_implementation="{SHAPE_ONLY}"` is not supported'):
        AutoModelForCausalLM.from_config(tiny(), attn_implementation=SHAPE_ONLY)
    model = AutoModelForCausalLM.from_config(tiny())
    model.config._attn_implementation = SHAPE_ONLY
    assert not runs_our_attention(model)
    with pytest.raises(ValueError, match="runs attn_implementation='planned', which would see only this rank's"):
        check_model(model, LongContextConfig(sequence_parallel_size=2))


def test_config_alone_is_enough(tmp_path):
    tiny().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path / "config.json")
    assert Planner(config).breakdown(Settings(**PLAIN)) == Planner(tiny()).breakdown(Settings(**PLAIN))
