"""Refusals of the newer systems that no other test provokes, each with its sentence."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
import transformers

from hf_longctx import (
    AxialPositionEmbedding,
    LSHConfig,
    PreferenceConfig,
    SleepConfig,
    lsh_attention,
    make_reversible,
    sleep_loss,
    tie_query_key,
    use_axial_positions,
    use_lsh,
)
from hf_longctx.adapters import reversible_rules
from hf_longctx.adapters.hashed import refuse_lost_lsh
from hf_longctx.cli import main
from hf_longctx.config.ramp import RampConfig
from hf_longctx.config.watches import WatchConfig
from hf_longctx.data.blend.blend_settings import read_blends
from hf_longctx.planner.memory_plan import Planner
from hf_longctx.planner.settings import Settings
from hf_longctx.proof import model_under_test
from hf_longctx.proof.model_under_test import default_config
from hf_longctx.proof.tiny import shrink
from hf_longctx.resilience.spike_guard import LossSpikeGuard
from hf_longctx.sleep.sleepers import check_sleeper
from hf_longctx.trainer import ramp_checks, ramp_mixin, whole_rows, whole_rows_checks

from ..models import config_of


def llama(attention: str = "packed", **changes) -> torch.nn.Module:
    config = config_of("llama", **{"num_key_value_heads": 6, **changes})
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def gpt2() -> torch.nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=97, n_embd=24, n_head=2, n_layer=1))


@pytest.mark.parametrize("convert", [None, 0, "false", [1]])
def test_reversible_layers_are_asked_for_in_words_that_are_known(convert):
    with pytest.raises(ValueError, match=r"`convert` \(.*\) must be true, false or a batch"):
        make_reversible(llama(), convert=convert)


def test_a_batch_to_convert_on_has_labels(tmp_path):
    llama("sdpa").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`convert` is a batch without `labels`"):
        make_reversible(model, convert={"input_ids": torch.ones(1, 4, dtype=torch.long)})


@pytest.mark.parametrize("shape", [1024, (), "12", (0, 4)])
def test_the_grid_of_positions_is_read_before_it_is_shared_out(shape):
    with pytest.raises(ValueError, match=r"`shape` \(.*\) must be positive integers"):
        use_axial_positions(gpt2(), shape)


def test_a_grid_has_no_more_axes_than_a_token_has_numbers():
    with pytest.raises(ValueError, match="has more axes than a token has numbers"):
        use_axial_positions(gpt2(), (2,) * 25)


def test_queries_of_lsh_attention_have_four_dimensions():
    with pytest.raises(ValueError, match="must have the shape"):
        lsh_attention(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))


def test_lsh_settings_on_an_attention_of_transformers():
    model = llama("sdpa")
    tie_query_key(model)
    with pytest.raises(ValueError, match="runs attn_implementation='sdpa', which knows nothing of LSH"):
        use_lsh(model, LSHConfig())
    with pytest.raises(ValueError, match="is to run LSH attention .* which attn_implementation='sdpa' does not"):
        refuse_lost_lsh(model, "lsh")


@pytest.mark.parametrize(
    ("devices", "said"), [(["cuda:0", "cuda:1"], "are on 2 devices"), (["mps:0"], "which has no float64")]
)
def test_reversible_layers_on_devices_that_this_machine_lacks(devices, said):
    """Parameters that say where they are: no such device is here."""
    layers = SimpleNamespace(parameters=lambda: [SimpleNamespace(device=device) for device in devices])
    with pytest.raises(NotImplementedError, match=said):
        reversible_rules.validate_model(llama(), layers)


def test_layers_whose_halves_do_not_add_up():
    model = llama()
    layer, own = model.model.layers[0], model.model.layers[0].mlp.forward
    calls = []

    def changes(hidden_states):
        calls.append(None)
        return own(hidden_states) * (1 + 0.5 * len(calls))

    layer.mlp.forward = changes
    with pytest.raises(NotImplementedError, match="is not the sum of its halves"):
        make_reversible(model)


def test_a_type_that_builds_no_model_and_cannot_be_made_tiny_is_refused(monkeypatch, capsys):
    problem = SimpleNamespace(config=None, problem="`dots1` cannot be made tiny: a field is not known")
    monkeypatch.setattr(model_under_test.ModelUnderTest, "of", lambda *_: problem)
    assert main(["check", "dots1"]) == 2
    assert (
        "refused: the defaults of type `dots1` build no model to look at, and `dots1` cannot be made tiny"
        in capsys.readouterr().out
    )


def test_a_model_without_a_list_of_layers_is_not_planned_reversible(monkeypatch):
    planner = Planner(config_of("llama"))
    monkeypatch.setattr(planner, "stack", None)
    with pytest.raises(NotImplementedError, match="has no list of layers that could be reversible"):
        planner.breakdown(Settings(tokens=16, reversible=True))


def test_watches_and_ramps_leave_the_engine_of_deepspeed_alone():
    trainer = SimpleNamespace(
        args=SimpleNamespace(), is_deepspeed_enabled=True, callback_handler=SimpleNamespace(callbacks=[])
    )
    with pytest.raises(NotImplementedError, match="DeepSpeed's engine takes it itself"):
        LossSpikeGuard(action="skip").refuse(trainer)
    with pytest.raises(NotImplementedError, match="which DeepSpeed's engine counts"):
        ramp_checks.check_ramp(trainer, RampConfig(start=2, increment=2, rows=8), 1)


def test_a_schedule_that_counts_steps_by_itself_has_no_ramp():
    class Library:
        def create_scheduler(self, *_: object):
            return torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), 1)

    class Trainer(ramp_mixin.RampMixin, Library):
        def __init__(self) -> None:
            self._ramp_plan = SimpleNamespace(full_steps=lambda steps: steps)
            self.args = SimpleNamespace(lr_scheduler_type="of my own")

    Trainer.__abstractmethods__ = frozenset()
    with pytest.raises(NotImplementedError, match="makes a `StepLR`, which counts steps"):
        Trainer().create_scheduler(4)


def test_windows_of_attention_do_not_slide_twice():
    model = transformers.AutoModelForCausalLM.from_config(shrink(default_config("qwen3_next")))
    model.config.layer_types = ["linear_attention", "sliding_attention"]
    model.config.sliding_window = 4
    with pytest.raises((NotImplementedError, ValueError), match="window of their own"):
        check_sleeper(model, SleepConfig(window=8, eviction="sliding"))


def test_rows_of_pairs_are_flattened_or_not():
    with pytest.raises(ValueError, match=r"`flatten_rows` \('yes'\) must be true or false"):
        PreferenceConfig(flatten_rows="yes")


def test_pairs_are_preferred_and_rejected(monkeypatch):
    pytest.importorskip("trl")
    from datasets import Dataset

    from hf_longctx.tasks import dpo

    monkeypatch.setattr(dpo, "read_documents", lambda *_: (Dataset.from_dict({"chosen": ["a"], "text": ["b"]}), None))
    args = SimpleNamespace(main_process_first=lambda **_: contextlib.nullcontext())
    with pytest.raises(ValueError, match="has the columns chosen, text and no `rejected`"):
        dpo.read_pairs(SimpleNamespace(dataset_name="pairs"), args)


def test_models_that_answer_otherwise_on_shares_train_no_preferences(monkeypatch):
    answers = iter([{"log_probs": torch.ones(3)}, {"log_probs": torch.zeros(3)}])
    monkeypatch.setattr(whole_rows_checks, "_numbers", lambda *_: next(answers))
    monkeypatch.setattr(whole_rows_checks, "rows_shared", lambda *_: contextlib.nullcontext())
    sharing = SimpleNamespace(mesh=SimpleNamespace(sequence_parallel_size=2), flatten=False)
    with pytest.raises(NotImplementedError, match="gives other `log_probs` where rows are shared"):
        whole_rows_checks._compare(llama(), sharing)


def test_rows_have_tokens():
    with pytest.raises(ValueError, match="got neither `input_ids` nor `inputs_embeds` of whole rows"):
        whole_rows.WholeRows(llama(), {}, SimpleNamespace(sharing=object()))


@pytest.mark.parametrize("positions", [[[0, -1]], [[-5]]])
def test_positions_of_a_grid_begin_at_zero(positions):
    """Division would take -1 for the last entry of the grid."""
    with pytest.raises(ValueError, match="the positions of a grid begin at 0"):
        AxialPositionEmbedding((4, 4), (8, 8))(torch.tensor(positions))
    model = gpt2()
    use_axial_positions(model, (4, 8))
    ids = torch.ones_like(torch.tensor(positions))
    with pytest.raises(ValueError, match="the positions of a grid begin at 0"):
        model(input_ids=ids, position_ids=torch.tensor(positions))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kill_switch": True}, r"`kill_switch` \(True\) must name a file"),
        ({"kill_switch": ""}, r"`kill_switch` \(''\) must name a file"),
        ({"advise_checkpoints": "no"}, r"`advise_checkpoints` \('no'\) must be true or false"),
        ({"spike_window": 50}, r"`spike_window` \(50\) is of the guard of spikes, which is off"),
    ],
)
def test_watches_that_would_be_ignored_or_misread(values, said):
    with pytest.raises(ValueError, match=said):
        WatchConfig(**values)
    assert WatchConfig(spike_action="skip", spike_window=50).spike_window == 50


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ({"a": ([1], 1e308), "b": ([2], 1e308)}, "are too large to be added up"),
        ({"a": ([1], 1.0), "b": ([2], 1e-320)}, "or too far apart"),
        ({1: ([1], 0.5), "1": ([2], 0.5)}, "the source 1 of blend 0 is no text"),
    ],
)
def test_blends_whose_shares_are_no_numbers(sources, said):
    with pytest.raises(ValueError, match=said):
        read_blends(sources)


def test_rows_that_sleep_are_read_in_order():
    model = transformers.AutoModelForCausalLM.from_config(shrink(default_config("qwen3_next")))
    ids = torch.ones(1, 16, dtype=torch.long)
    labels = torch.where(torch.arange(16)[None] < 8, -100, ids)
    with pytest.raises(ValueError, match=r"the batch has `is_causal` \(False\)"):
        sleep_loss(model, {"input_ids": ids, "labels": labels, "is_causal": False}, SleepConfig(window=8))
