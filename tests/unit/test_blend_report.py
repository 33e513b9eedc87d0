"""What a `BlendReport` says: marks of batches, the card, and trainers and collators that it cannot serve."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from hf_longctx import (
    BlendedRows,
    BlendReport,
    LongContextTrainer,
    LossSpikeGuard,
    PackedDataset,
    PackingCollator,
    RampConfig,
    add_embedding_norm,
)
from hf_longctx.data.blend.blended_rows import SOURCE_MARKS
from hf_longctx.data.blend.marked_collator import MarkedCollator
from hf_longctx.reporting.blend_report import sources_read
from hf_longctx.reporting.model_card import sources_table

from ..models import build
from ..training import Rows, arguments, pad_right


def blend(num_rows: int = 40) -> BlendedRows:
    return BlendedRows({"code": (Rows(9), 0.5), "books": (Rows(4), 0.5)}, num_rows)


def trainer_of(folder, dataset=None, collator=pad_right, kind=LongContextTrainer, **changes):
    model = build("llama", "packed" if kind is LongContextTrainer else "sdpa")
    args = arguments(str(folder), **changes)
    return kind(model=model, args=args, train_dataset=dataset or blend(), data_collator=collator)


def pad_left(rows):
    batch = pad_right(rows)
    order = batch["attention_mask"].argsort(dim=1, stable=True)
    return {key: value.gather(1, order) for key, value in batch.items()}


def test_marks_stand_at_their_tokens():
    rows = blend()
    rows.marks_sources = True
    first, second = rows[0], rows[1]
    assert first[SOURCE_MARKS][0] % 2 == 1 and (first[SOURCE_MARKS][1:] % 2 == 0).all()
    for pad in (pad_right, pad_left):
        batch = MarkedCollator(pad)([first, second])
        for row, marks, mask in zip((first, second), batch[SOURCE_MARKS], batch["attention_mask"].bool()):
            assert marks[mask].tolist() == row[SOURCE_MARKS].tolist() and not marks[~mask].any()
    flat = MarkedCollator(lambda rows: {"input_ids": torch.tensor([sum((row["input_ids"] for row in rows), [])])})
    whole = [*first[SOURCE_MARKS].tolist(), *second[SOURCE_MARKS].tolist()]
    assert flat([first, second])[SOURCE_MARKS][0].tolist() == whole
    assert PackingCollator(pad_to_multiple_of=64)([first, second])[SOURCE_MARKS][0, : len(whole)].tolist() == whole
    assert SOURCE_MARKS not in MarkedCollator(pad_right)([dict(Rows()[0])])


def test_collators_that_hide_which_token_is_which_are_refused():
    rows = blend()
    rows.marks_sources = True
    cut = lambda rows: {"input_ids": torch.tensor([row["input_ids"][:2] for row in rows])}
    with pytest.raises(ValueError, match=r"made a batch of shape \(3, 2\) .*pad with an `attention_mask`"):
        MarkedCollator(cut)([rows[0], rows[1], rows[2]])


def test_trainers_that_have_no_blend_or_take_no_marks_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`train_dataset` \(`Rows`\) is no `BlendedRows`"):
        BlendReport().attach(trainer_of(tmp_path, Rows()))
    with pytest.raises(ValueError, match="`Trainer` does not take marks off its batches"):
        BlendReport().attach(trainer_of(tmp_path, kind=Trainer))
    texts = BlendedRows({"texts": ([{"text": "x"}], 1.0)}, 3)
    texts.marks_sources = True
    with pytest.raises(ValueError, match="a row of source `texts` has no `input_ids`"):
        texts[0]


def order_of(trainer) -> list[int]:
    return list(trainer._get_train_sampler())


def test_trainers_read_a_blend_in_order(tmp_path, caplog):
    assert order_of(trainer_of(tmp_path)) == list(range(40))
    packed = PackedDataset(blend(), 48, strategy="in_order")
    collator = PackingCollator(max_tokens=48, strategy="in_order")
    assert order_of(trainer_of(tmp_path, packed, PackingCollator())) == list(range(len(packed)))
    batch = next(iter(trainer_of(tmp_path, collator=collator).get_train_dataloader()))
    expected = PackingCollator()([*packed[0], *packed[1]])
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    with pytest.raises(ValueError, match=r"`strategy` \('best_fit_decreasing'\) sorts the rows of a blend by length"):
        trainer_of(tmp_path, collator=PackingCollator(max_tokens=48)).get_train_dataloader()
    with pytest.raises(ValueError, match=r"`train_sampling_strategy` \('group_by_length'\) sorts the rows of a blend"):
        trainer_of(tmp_path, train_sampling_strategy="group_by_length").get_train_dataloader()
    assert order_of(trainer_of(tmp_path, Rows())) != list(range(16))  # not a blend


def test_a_second_epoch_is_warned_of(tmp_path, caplog):
    for epochs in (1, 2):
        trainer = trainer_of(tmp_path, blend(4), max_steps=-1, num_train_epochs=epochs)
        trainer.train()
        assert ("`num_train_epochs` (2) reads the same rows of the blend" in caplog.text) == (epochs == 2)


def test_losses_that_a_forward_does_not_give_are_left_out(tmp_path, caplog):
    trainer = trainer_of(tmp_path, max_steps=1)
    BlendReport().attach(trainer)
    trainer.train()
    assert "loss/code" in trainer.state.log_history[0]
    report = trainer.blend_report
    report.expect(torch.full((1, 3), 2), torch.ones(1, 3, dtype=torch.long))
    report._read_losses(trainer.model.train(), (), object())
    assert "the logs will have no loss a source" in caplog.text


def test_a_model_card_says_what_was_read(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=2)
    BlendReport().attach(trainer)
    trainer.train()
    read = sources_read(trainer.state)
    assert read["code"]["rows"] + read["books"]["rows"] == 4 and read["code"]["passes"] == read["code"]["rows"] / 9
    lines = sources_table(read).splitlines()
    assert lines[2].startswith("| code | 2 | 0.222 |") and len(lines) == 4
    assert sources_read(TrainerState()) == {}


def test_a_trainer_of_transformers_reads_a_blend(tmp_path):
    rows = BlendedRows({"all": ([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}], 1.0)}, 8)
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
    Trainer(build("llama", "sdpa"), args, train_dataset=rows, data_collator=default_data_collator).train()


class Spoiled(TrainerCallback):
    """Logits of one step are huge."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.is_on = False
        model.get_submodule("lm_head").register_forward_hook(lambda module, inputs, output: self.spoil(output))

    def on_step_begin(self, args, state, control, **kwargs):
        self.is_on = state.global_step == 6

    def spoil(self, output):
        return output * 200 if self.is_on and torch.is_grad_enabled() else output


def test_a_run_with_everything_at_once_is_resumed_bit_for_bit(tmp_path):
    """Inside a ramp, before a skipped spike: packed rows of a blend, a norm, tied weights, evaluations."""
    lengths = torch.randint(2, 9, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": [3 + (7 * i + j) % 60 for j in range(length)]} for i, length in enumerate(lengths)]
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    fields = ("step", "loss", "grad_norm", "learning_rate", "epoch", "eval_loss", "loss/a", "tokens/b", "loss_spikes")
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        torch.manual_seed(0)
        config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="packed")
        add_embedding_norm(model)
        settings = {"max_steps": 9, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
        settings |= {"save_steps": 4, "eval_steps": 3, "eval_strategy": "steps", "logging_steps": 1, "use_cpu": True}
        args = TrainingArguments(str(tmp_path), **settings, learning_rate=1e-2, report_to="none", disable_tqdm=True)
        guard = LossSpikeGuard("skip", window=3, deviations=20)
        trainer = LongContextTrainer(
            model=model,
            args=args,
            train_dataset=BlendedRows([{"a": (rows[:23], 0.3), "b": (rows[23:], 0.7)}, {"a": 1.0}], [60, 90]),
            eval_dataset=rows[:5],
            data_collator=PackingCollator(max_tokens=24, strategy="in_order"),
            ramp=RampConfig(start=2, increment=2, rows=20),
            callbacks=[guard, Spoiled()],
        )
        BlendReport().attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        log = [tuple(entry.get(name) for name in fields) for entry in trainer.state.log_history]
        runs.append((model.state_dict(), log, guard.notes))
    (weights, log, notes), (again, log_again, notes_again) = runs
    assert [note["step"] for note in notes] == [7] and notes == notes_again and log == log_again
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
