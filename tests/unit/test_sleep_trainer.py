"""The trainer's `sleep`: its steps are `sleep_loss`, its warm-up comes when it says, and nothing of it is left."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_longctx import LongContextTrainer, SleepConfig, SleepWarmup, sleep_loss
from hf_longctx.sleep.sleepers import recurrent_parameters

from ..hybrids import gradients
from ..sleepers import build_sleeper, randomize, tokens_of
from ..training import arguments, pad_right, reset_state


CONFIG = SleepConfig(window=8, passes=3)


def rows_of(count: int = 8) -> list[dict]:
    batch = tokens_of(rows=count)
    return [{name: value[row].tolist() for name, value in batch.items()} for row in range(count)]


def trainer(folder, model=None, config=CONFIG, callbacks=None, **changes):
    reset_state()
    model = build_sleeper("qwen3_5_text") if model is None else model
    return LongContextTrainer(
        model=model,
        args=arguments(str(folder), **{"learning_rate": 0.05, **changes}),
        train_dataset=rows_of(),
        eval_dataset=rows_of(4),
        data_collator=pad_right,
        callbacks=callbacks,
        sleep=config,
    )


class Watch(TrainerCallback):
    """Gradients and weights of every step."""

    def __init__(self) -> None:
        self.gradients: list[dict] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def test_a_step_has_the_gradient_of_sleep_loss_and_the_checkpoint_is_vanilla(tmp_path):
    watch, reference = Watch(), build_sleeper("qwen3_5_text").train()
    randomize(reference)
    model = build_sleeper("qwen3_5_text")
    model.load_state_dict(reference.state_dict())
    made = trainer(tmp_path, model, callbacks=[watch], max_steps=1, train_sampling_strategy="sequential")
    made.args.max_grad_norm = 0
    made.train()
    batch = pad_right(rows_of()[:2])
    sleep_loss(reference, batch, CONFIG).backward()
    for name, gradient in gradients(reference).items():
        assert torch.allclose(watch.gradients[0][name], gradient, atol=1e-6), name
    assert "forward" not in vars(model)
    made.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again) is type(model) and again.state_dict().keys() == reference.state_dict().keys()
    metrics = made.evaluate()
    with torch.no_grad():
        expected = sleep_loss(again.eval(), pad_right(rows_of(4)), CONFIG)
    assert metrics["eval_loss"] == pytest.approx(float(expected), abs=1e-5)
    assert made.predict(rows_of(4)).predictions.shape == (4, 26, 97)
    made.data_collator = lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])}
    with pytest.raises(ValueError, match="rows without `labels` do not say which of their windows are answers"):
        made.predict(rows_of(4))


def stack_columns(rows: list[dict]) -> dict:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def test_what_rows_say_of_their_windows_reaches_the_model(tmp_path):
    losses = []
    for asleep in (None, [1, 1, 0, 0], [0, 0, 0, 0]):
        made = trainer(tmp_path)
        rows = [row if asleep is None else {**row, "sleep_windows": asleep} for row in rows_of(4)]
        made.data_collator = stack_columns
        losses.append(made.evaluate(rows)["eval_loss"])
    assert losses[0] == losses[1] != losses[2]


def test_a_fresh_trainer_evaluates_behind_the_warmup(tmp_path):
    warmup = SleepWarmup(pass_steps=(2, 3), recurrent_steps=1)
    config, model = SleepConfig(window=8, passes=3, eviction="sliding", warmup=warmup), build_sleeper("qwen3_5_text")
    randomize(model)
    found = trainer(tmp_path, model, config).evaluate()["eval_loss"]
    with torch.no_grad():
        expected, once = (
            float(sleep_loss(model, pad_right(rows_of(4)), of)) for of in (config, SleepConfig(window=8))
        )
    assert found == pytest.approx(expected, abs=1e-5) and abs(found - once) > 1e-2


def test_a_warmup_raises_passes_at_its_steps_trains_the_state_first_and_resumes_there(tmp_path):
    warmup = SleepWarmup(pass_steps=(2, 3), recurrent_steps=1)
    config = SleepConfig(window=8, passes=3, eviction="sliding", warmup=warmup)
    watch = Watch()
    made = trainer(tmp_path / "a", config=config, callbacks=[watch], save_strategy="steps", save_steps=2)
    mine = {id(parameter) for parameter in recurrent_parameters(made.model)}
    recurrent = {name for name, parameter in made.model.named_parameters() if id(parameter) in mine}
    made.train()
    assert 0 < len(recurrent) < len(watch.gradients[1])
    assert watch.gradients[0].keys() == recurrent
    assert watch.gradients[1].keys() == {name for name, _ in made.model.named_parameters()}
    assert all(parameter.requires_grad for parameter in made.model.parameters())
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry["sleep_passes"] for entry in logs] == [1, 1, 2, 3]
    assert [entry["sleep_peak_keys"] for entry in logs] == [
        8,
        15,
        15,
        15,
    ]  # what slides is kept while a window is read

    resumed = trainer(tmp_path / "a", config=config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    again = [entry for entry in resumed.state.log_history if "loss" in entry]
    assert [entry["sleep_passes"] for entry in again] == [1, 1, 2, 3]
    assert again[2:] == logs[2:]


def test_without_a_window_a_trainer_is_as_it_was(tmp_path):
    logs = []
    for config in (None, SleepConfig()):
        made = trainer(tmp_path, config=config)
        made.train()
        logs.append([entry["loss"] for entry in made.state.log_history if "loss" in entry])
        assert not any("sleep_passes" in entry for entry in made.state.log_history)
    assert logs[0] == logs[1]


def test_weights_of_sixteen_bits_keep_states_of_thirty_two(tmp_path):
    made = trainer(tmp_path, bf16=True, max_steps=2)
    made.train()
    assert all(entry["loss"] > 0 for entry in made.state.log_history if "loss" in entry)
    reset_state()
    model = build_sleeper("qwen3_5_text", dtype=torch.bfloat16)
    from hf_longctx.sleep.cache import SleepCache
    from hf_longctx.sleep.sleepers import check_sleeper
    from hf_longctx.sleep.window_passes import Window, sleep_window

    cache = SleepCache(model.config)
    window = Window(tokens_of()["input_ids"][:, :8], 0, {})
    _, cache = sleep_window(check_sleeper(model, CONFIG), cache, window, CONFIG)
    assert {cache.layers[index].recurrent_states[0].dtype for index in cache.state_layers} == {torch.float32}


@pytest.mark.parametrize("attention", ["eager", "packed", "ulysses"])
def test_attention_layers_run_on_any_kernel(attention):
    batch = tokens_of()
    expected = sleep_loss(build_sleeper("qwen3_next", "sdpa"), batch, CONFIG)
    found = sleep_loss(build_sleeper("qwen3_next", attention), batch, CONFIG)
    assert torch.allclose(found, expected, atol=1e-5)
