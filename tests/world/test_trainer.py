"""Whole trajectories of `LongContextTrainer` equal the stock `Trainer` in one process: losses, gradient norms,
weights.

Tolerance 1e-5 relative in fp32: four steps at a large learning rate amplify the noise of reordered sums (1e-7) by less
than 100.
"""

from __future__ import annotations

import pytest
from transformers import TrainingArguments

from ..lengths import build_with_lengths
from ..own_attention import model_of
from ..training import Rows, Stream, assert_same_trajectory, pad_right, train


def compare(world, size, tolerance=1e-5, **options):
    data_parallel = world.size // size
    batch = options.pop("per_device_train_batch_size", 2)
    expected = train(0, per_device_train_batch_size=batch * data_parallel, **options)
    results = world.run(run_here, size, {"per_device_train_batch_size": batch, **options})
    for actual in results:
        assert_same_trajectory(actual, expected, tolerance)
    return expected, results


def run_here(size, options):
    return train(size, **options)


@pytest.mark.parametrize(("world_size", "size"), [(2, 2), (4, 4), (4, 2), (2, 1)])
def test_mesh_shapes_equal_one_process(worlds, world_size, size):
    expected, results = compare(worlds(world_size), size)
    for _, _, extra in results:
        assert extra["wrapped"] == "DistributedDataParallel"
        assert extra["total_train_batch_size"] == 2 * world_size // size


@pytest.mark.parametrize("case", ["gpt_neo", "stablelm"])
def test_attention_of_ones_own(world2, case):
    expected = train(0, model=model_of(case, None))
    for actual in world2.run(train_own_attention, case):
        assert_same_trajectory(actual, expected)


def train_own_attention(case):
    return train(2, model=model_of(case, "ulysses"))


def test_accumulation_with_uneven_valid_tokens(world4):
    compare(world4, 2, gradient_accumulation_steps=3, num_train_epochs=4, rows=Rows(24))


def test_tokens_averaged_per_group_when_asked(worlds):
    """`average_tokens_across_devices=False`: the mean of the groups' own means, as in a data-parallel run of the "
    "groups."""
    options = {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2, "num_train_epochs": 4}
    expected = worlds(2).run(run_here, 0, {"per_device_train_batch_size": 2, **options})[0]
    for actual in worlds(4).run(run_here, 2, {"per_device_train_batch_size": 2, **options}):
        assert_same_trajectory(actual, expected)


def test_label_smoothing(world2):
    compare(world2, 2, label_smoothing_factor=0.1)


def shifting_loss(outputs, labels, num_items_in_batch=None):
    """A user's loss as written for one process: squared error of the right token's probability, shifted inside."""
    logits, labels = outputs.logits[..., :-1, :], labels[..., 1:]
    chosen = logits.softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (((1 - chosen) ** 2) * (labels != -100)).sum() / num_items_in_batch


def test_compute_loss_func_written_for_one_process(world4):
    options = {"trainer_options": {"compute_loss_func": shifting_loss}, "learning_rate": 10.0}
    compare(world4, 2, gradient_accumulation_steps=2, **options)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(world2, reentrant):
    compare(world2, 2, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})


def offloading(size, options):
    """Let transformers' offload run without an accelerator, whose pinned memory is the one thing that a CPU lacks."""
    from transformers import modeling_utils

    plain = modeling_utils.save_on_cpu
    modeling_utils.save_on_cpu = lambda **_: plain(pin_memory=False)
    try:
        return train(size, **options)
    finally:
        modeling_utils.save_on_cpu = plain


@pytest.mark.skipif(
    "activation_checkpointing" not in TrainingArguments.__dataclass_fields__, reason="this transformers has no offload"
)
def test_checkpoint_offload(world2):
    settings = {"use_reentrant": False, "offload": True, "every_n_layers": 1}
    expected = train(0)
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": settings}
    for actual in world2.run(offloading, 2, options):
        assert_same_trajectory(actual, expected)


def with_lora(model):
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_alpha=64))


def test_lora(world2):
    compare(world2, 2, prepare=with_lora, learning_rate=1.0)


def with_dynamic_rotations(model):
    """Rows on both sides of the length at which the frequencies change, in training and evaluation."""
    return build_with_lengths("llama", "dynamic", model.config._attn_implementation, model.dtype).train()


def test_a_rotary_embedding_that_reads_the_length_and_remembers_it(world2):
    compare(world2, 2, prepare=with_dynamic_rotations)


def test_bf16_autocast(world2):
    """Autocast rounds activations to 8 bits of mantissa (4e-3), so the two runs agree to a few such roundings."""
    compare(world2, 2, tolerance=3e-2, bf16=True)


# A world's processes would start theirs as they were started; a user's fork them.
ONE_WORKER = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "fork"}


def test_data_workers(world2):
    compare(world2, 2, **ONE_WORKER)


def test_iterable_dataset(world4):
    compare(world4, 2, rows=Stream(Rows()), accelerator_config={"dispatch_batches": False})


def stream_of_hub_datasets():
    import datasets

    return datasets.Dataset.from_list(list(Rows().rows)).to_iterable_dataset()


def test_streaming_datasets(world4):
    compare(world4, 2, rows=stream_of_hub_datasets(), accelerator_config={"dispatch_batches": False})


def test_epochs_batch_size_and_token_counts(worlds):
    """Compared with a stock data-parallel run of two processes, which pads the same batches."""
    options = {"num_train_epochs": 2, "max_steps": -1, "include_num_input_tokens_seen": "all", "rows": Rows(16)}
    expected = worlds(2).run(run_here, 0, options)[0]
    for actual in worlds(4).run(run_here, 2, options):
        assert_same_trajectory(actual, expected)
        assert actual[2]["state"] == expected[2]["state"]
        assert actual[2]["total_train_batch_size"] == expected[2]["total_train_batch_size"] == 4


def test_non_padding_token_count(world2):
    expected, results = compare(world2, 2, include_num_input_tokens_seen="non_padding")
    for _, _, extra in results:
        assert extra["state"]["num_input_tokens_seen"] == expected[2]["state"]["num_input_tokens_seen"]


def masking_collator(rows):
    """A random collator: it masks other tokens each time it is called."""
    import torch

    batch = pad_right(rows)
    chosen = torch.rand(batch["input_ids"].shape) < 0.4
    batch["labels"] = batch["input_ids"].masked_fill(~chosen, -100)
    batch["input_ids"] = batch["input_ids"].masked_fill(chosen, 5)
    return batch


@pytest.mark.parametrize("workers", [{}, ONE_WORKER], ids=["no_worker", "one_worker"])
def test_ranks_of_a_group_draw_the_same_rows_from_a_random_collator(world2, workers):
    """Every batch's checksum is compared inside the trainer, so a run that ends has drawn the same rows."""
    options = {"trainer_options": {"data_collator": masking_collator}, **workers}
    results = world2.run(run_here, 2, options)
    for actual in results[1:]:
        assert_same_trajectory(actual, results[0])


@pytest.mark.parametrize("model", ["bert", "modernbert"])
def test_masked_language_model(world2, model):
    """BERT's own head averages over the tokens it sees; the trainer notices and counts over the whole step instead."""
    options = {"model": model, "gradient_accumulation_steps": 2}
    if model == "bert":
        from hf_longctx.losses.token_mean import token_mean

        expected = train(0, trainer_options={"compute_loss_func": token_mean}, **options)
    else:
        expected = train(0, **options)
    for actual in world2.run(run_here, 2, options):
        assert_same_trajectory(actual, expected)


def test_decoder_that_numbers_its_tokens_and_compares_their_own_labels(world2):
    """BART's loss averages over the tokens it sees; the reference sees all tokens of a step at once."""
    expected = train(0, model="bart", per_device_train_batch_size=4)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    options |= {"ddp_find_unused_parameters": True, "gradient_accumulation_steps": 2}  # it has cross-attention
    for actual in world2.run(run_here, 2, {"model": "bart", "per_device_train_batch_size": 2, **options}):
        assert_same_trajectory(actual, expected)


@pytest.mark.parametrize("model", ["mistral", "gemma2", "gpt_oss", "llama4"])
def test_windows_softcap_sinks_and_chunks_train_alike(world2, model):
    attention = "eager" if model in ("gemma2", "gpt_oss") else "sdpa"
    expected = train(0, model=model, attention=attention)
    for actual in world2.run(run_here, 2, {"model": model}):
        assert_same_trajectory(actual, expected, 3e-5)


def test_a_model_whose_loss_type_the_host_does_not_know(world2):
    """GPT-2: transformers counts its labels unshifted, so the reference is our own one process."""
    expected = train(1, model="gpt2")
    for actual in world2.run(run_here, 2, {"model": "gpt2"}):
        assert_same_trajectory(actual, expected)


def averaging(model):
    """A causal head that averages over the tokens it sees."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    def loss(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
        return ForCausalLMLoss(logits, labels, vocab_size, **kwargs)

    model.loss_function = loss
    return model


def test_a_causal_head_that_ignores_the_count_is_counted_for(world2):
    expected = train(0, gradient_accumulation_steps=2)
    for actual in world2.run(run_here, 2, {"prepare": averaging, "gradient_accumulation_steps": 2}):
        assert_same_trajectory(actual, expected)


def label_tokens(rows):
    batch = pad_right(rows)
    batch["labels"] = (batch["labels"] % 5).masked_fill(batch["labels"] == -100, -100)
    return batch


def token_classifier(_):
    import torch
    from transformers import LlamaForTokenClassification

    from ..models import config_of

    torch.manual_seed(0)
    attention = "ulysses" if torch.distributed.is_initialized() else "sdpa"
    config = config_of("llama", num_labels=5, classifier_dropout=0.0)
    return LlamaForTokenClassification._from_config(config, attn_implementation=attention)


def test_token_classification(world2):
    options = {"prepare": token_classifier, "trainer_options": {"data_collator": label_tokens}, "learning_rate": 1.0}
    from hf_longctx.losses.token_mean import token_mean

    counted = {"data_collator": label_tokens, "compute_loss_func": token_mean}
    expected = train(0, **{**options, "trainer_options": counted})
    for actual in world2.run(run_here, 2, options):
        assert_same_trajectory(actual, expected)
