"""What a run refuses before its first step: the right error, naming the value, the rule and the remedy.

None of these needs a second process: a mistake in the script is reported before the processes meet.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import Trainer

from hf_longctx import LongContextConfig, LongContextTrainer

from ..models import _BASE, VOCAB, build
from ..training import Rows, arguments, pad_right, reset_state


def start(tmp_path, model=None, size=2, inner="auto", trainer_options=None, **changes):
    reset_state()
    return LongContextTrainer(
        model=model if model is not None else build("llama", "ulysses"),
        args=arguments(str(tmp_path), **changes),
        train_dataset=Rows(4),
        data_collator=pad_right,
        long_context=LongContextConfig(sequence_parallel_size=size, inner_attention=inner),
        **(trainer_options or {}),
    )


ARGUMENTS = [
    ({"torch_compile": True}, NotImplementedError, "torch_compile.*leave it off"),
    ({"neftune_noise_alpha": 5.0}, NotImplementedError, "neftune_noise_alpha.*5.0.*leave it unset"),
    ({"use_liger_kernel": True}, NotImplementedError, "use_liger_kernel.*leave it off"),
    ({"auto_find_batch_size": True}, NotImplementedError, "auto_find_batch_size.*set the batch size"),
    ({"train_sampling_strategy": "batch_rebalance"}, NotImplementedError, "batch_rebalance.*same rows.*use 'random'"),
    (
        {"accelerator_config": {"split_batches": True}},
        ValueError,
        "split_batches.*pieces of one batch to all processes.*unset",
    ),
    (
        {"accelerator_config": {"dispatch_batches": True}},
        ValueError,
        "dispatch_batches.*pieces of one batch to all processes.*unset",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), ARGUMENTS, ids=[next(iter(a[0])) for a in ARGUMENTS])
def test_arguments_that_cannot_be_exact_are_refused(tmp_path, changes, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        start(tmp_path, **changes)


def test_deepspeed_is_refused(tmp_path):
    args = arguments(str(tmp_path))
    args.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(NotImplementedError, match="deepspeed.*use DDP or FSDP2"):
        LongContextTrainer(
            model=build("llama", "ulysses"), args=args, long_context=LongContextConfig(sequence_parallel_size=2)
        )


@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
def test_the_hosts_own_parallel_axes_are_refused(tmp_path, name):
    class Parallelism:
        cp_size = sp_size = tp_size = 1

    parallelism = Parallelism()
    setattr(parallelism, name, 2)
    args = arguments(str(tmp_path))
    args.parallelism_config = parallelism
    with pytest.raises(ValueError, match=f"{name}=2.*leave `{name}` at 1"):
        LongContextTrainer(
            model=build("llama", "ulysses"), args=args, long_context=LongContextConfig(sequence_parallel_size=2)
        )


def test_a_model_on_another_attention_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'sdpa'.*attn_implementation='ulysses'"):
        start(tmp_path, model=build("llama", "sdpa"))


def test_more_ranks_than_query_heads_is_refused_with_the_sizes_that_work(tmp_path):
    with pytest.raises(ValueError, match=r"\(8\) exceeds the model's query heads \(6\).*1 to 6"):
        start(tmp_path, size=8)


def test_a_missing_flash_package_is_named(tmp_path):
    with pytest.raises(ImportError, match="flash_attention_2.*flash-attn"):
        start(tmp_path, inner="flash_attention_2")


def test_an_encoder_decoder_is_refused(tmp_path):
    small = dict(d_model=32, d_ff=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4)
    model = transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=VOCAB, decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, **small
        )
    )
    model.config._attn_implementation = "ulysses"
    with pytest.raises(NotImplementedError, match="encoder-decoder.*sequence_parallel_size` to 1"):
        start(tmp_path, model=model)


def test_recurrent_layers_without_an_adapter_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_longctx.adapters.recurrent.layers.RULES", {})
    config = transformers.Qwen3NextConfig(
        **{**_BASE, "head_dim": 8, "num_hidden_layers": 2, "num_experts": 2, "num_experts_per_tok": 1},
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="ulysses")
    with pytest.raises(NotImplementedError, match="linear_attention.*Qwen3NextGatedDeltaNet.*start anew on every"):
        start(tmp_path, model=model)


def test_virtual_prompt_tokens_are_refused(tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(build("llama", "ulysses"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(NotImplementedError, match="virtual tokens.*LoRA"):
        start(tmp_path, model=model)


@pytest.mark.parametrize("name", ["compute_metrics", "preprocess_logits_for_metrics"])
def test_metrics_on_logits_are_refused(tmp_path, name):
    with pytest.raises(NotImplementedError, match="compute_metrics.*eval_loss"):
        start(tmp_path, trainer_options={name: lambda *_: {}})


def test_several_processes_are_asked_for_when_there_is_one(tmp_path):
    with pytest.raises(RuntimeError, match=r"\(2\) needs that many processes.*torchrun --nproc_per_node 2"):
        start(tmp_path)


def test_one_process_with_any_attention_is_the_host(tmp_path):
    trainer = start(tmp_path, model=build("llama", "sdpa"), size=1)
    trainer.train()
    assert trainer.state.global_step == 4 and isinstance(trainer, Trainer)


def test_attention_refuses_what_it_cannot_split():
    from hf_longctx.attention.ulysses import ulysses_attention
    from hf_longctx.parallel.shard import SequenceShard

    module = torch.nn.Module()
    query = torch.zeros(1, 4, 6, 8)
    shard = SequenceShard(size=2, rank=0, num_tokens=12, local_len=6)
    for name in ("position_bias", "some_bias"):
        with pytest.raises(NotImplementedError, match=f"`{name}`.*cannot be split by heads"):
            ulysses_attention(
                module, query, query, query, None, sequence_shard=shard, **{name: torch.zeros(1, 4, 6, 6)}
            )
    with pytest.raises(NotImplementedError, match="from 6 to 5 tokens.*cross-attention"):
        ulysses_attention(module, query, query[:, :, :5], query[:, :, :5], None, sequence_shard=shard)
    with pytest.raises(NotImplementedError, match="mask of Tensor that the model made itself"):
        ulysses_attention(module, query, query, query, torch.zeros(1, 1, 6, 6), sequence_shard=shard)
    with pytest.raises(RuntimeError, match="not bound to this process's group"):
        ulysses_attention(module, query, query, query, None, sequence_shard=shard)


def test_dropout_outside_attention_is_warned_about(tmp_path, caplog):
    """Valid, but not comparable: not refused, not silent."""
    from peft import LoraConfig, get_peft_model

    def adapted(dropout):
        return get_peft_model(build("llama", "ulysses"), LoraConfig(target_modules=["q_proj"], lora_dropout=dropout))

    for dropout, warned in ((0.0, False), (0.1, True)):
        caplog.clear()
        with pytest.raises(RuntimeError, match="needs that many processes"):
            start(tmp_path, model=adapted(dropout))
        assert ("set dropout (also `lora_dropout`) to 0" in caplog.text) is warned
