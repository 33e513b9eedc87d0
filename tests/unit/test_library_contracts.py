"""What we rely on in the libraries beyond their public promises. An upgrade that changes one fails here, with its
name, not in a loss.

The list and what breaks is in `docs/library_contracts.md`.
"""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import send_to_device
from transformers import Trainer, masking_utils
from transformers.integrations import flash_attention, sdpa_attention
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.gemma3 import modeling_gemma3
from transformers.utils.generic import GeneralInterface

from hf_longctx.adapters.rebind import called_names
from hf_longctx.parallel.shard import SequenceShard


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_get_dataloader", ["dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key"]),
        ("_prepare_inputs", ["inputs"]),
        ("_get_num_items_in_batch", ["batch_samples", "device"]),
        ("_track_num_input_tokens", ["inputs"]),
        ("_set_signature_columns_if_needed", []),
        ("_remove_unused_columns", ["dataset", "description"]),
        ("_get_collator_with_removed_columns", ["data_collator", "description"]),
        ("get_total_train_batch_size", ["args"]),
        ("training_step", ["model", "inputs", "num_items_in_batch"]),
        ("_save_checkpoint", ["model", "trial"]),
        ("_get_output_dir", ["trial"]),
        ("prediction_step", ["model", "inputs", "prediction_loss_only", "ignore_keys"]),
        (
            "evaluation_loop",
            ["dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"],
        ),
    ],
)
def test_transformers_trainer_seams(name, expected):
    assert parameters(getattr(Trainer, name))[1:] == expected, f"transformers changed `Trainer.{name}`"


def test_transformers_trainer_scales_and_counts_as_the_gradient_law_needs():
    compute = inspect.getsource(Trainer.compute_loss)
    assert "self.accelerator.num_processes" in compute and "average_tokens_across_devices" in compute
    count = inspect.getsource(Trainer._get_num_items_in_batch)
    assert '"shift_labels" in batch' in count and "self.accelerator.gather" in count
    assert "_loss_shifts_labels" in inspect.getsource(Trainer.__init__)


def test_transformers_losses_take_shifted_labels():
    logits = torch.randn(1, 4, 7)
    shifted = torch.tensor([[1, 2, -100, 3]])
    ours = ForCausalLMLoss(logits, None, 7, num_items_in_batch=6.0, shift_labels=shifted)
    expected = torch.nn.functional.cross_entropy(logits[0], shifted[0], reduction="sum") / 6
    torch.testing.assert_close(ours, expected)


def test_transformers_mask_functions_are_named_and_closed_as_we_read_them():
    zeros = torch.zeros(1, dtype=torch.long)
    makers = {
        "sliding_window_overlay": (masking_utils.sliding_window_overlay(3), "sliding_window"),
        "sliding_window_bidirectional_overlay": (
            masking_utils.sliding_window_bidirectional_overlay(3),
            "sliding_window",
        ),
        "chunked_overlay": (masking_utils.chunked_overlay(3, zeros), "chunk_size"),
        "and_masks": (masking_utils.and_masks(masking_utils.causal_mask_function), "mask_functions"),
    }
    for maker, (function, variable) in makers.items():
        assert function.__qualname__.split(".")[0] == maker, f"transformers changed `masking_utils.{maker}`"
        assert variable in inspect.getclosurevars(function).nonlocals, f"transformers changed `masking_utils.{maker}`"


def test_gemmas_embedding_masks_are_named_and_closed_as_we_read_them():
    overlay = modeling_gemma3._bidirectional_window_overlay(4)
    assert overlay.__qualname__ == "_bidirectional_window_overlay.<locals>.inner_mask"
    assert inspect.getclosurevars(overlay).nonlocals == {"sliding_window": 4}
    assert [overlay(0, 0, 9, key) for key in (5, 6, 12, 13)] == [False, True, True, False]
    source = inspect.getsource(modeling_gemma3.Gemma3TextModel.forward)
    assert "lambda *args: torch.tensor(True, dtype=torch.bool)" in source


def test_transformers_passes_a_mask_function_what_we_keep():
    needed = {"batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask"}
    for name in ("sdpa", "eager", "flex_attention"):
        function = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[name]
        assert needed <= set(parameters(function)), f"transformers changed `{function.__name__}`"


def test_transformers_registries_take_a_name_and_a_function():
    assert parameters(GeneralInterface.register) == ["key", "value"]
    assert issubclass(transformers.AttentionInterface, GeneralInterface)
    assert issubclass(masking_utils.AttentionMaskInterface, GeneralInterface)
    for interface in (transformers.AttentionInterface, masking_utils.AttentionMaskInterface):
        assert "sdpa" in interface._global_mapping, f"transformers changed `{interface.__name__}._global_mapping`"


def test_transformers_kernels_read_what_the_module_view_overrides():
    assert "module.num_key_value_groups" in inspect.getsource(sdpa_attention.sdpa_attention_forward)
    source = inspect.getsource(flash_attention.flash_attention_forward)
    assert "module.config._attn_implementation" in source
    for name in ("is_causal", "sliding_window", "softcap", "s_aux"):
        assert name in parameters(flash_attention.flash_attention_forward)


@pytest.mark.parametrize(
    ("name", "layer", "inputs"),
    [
        ("lfm2", "Lfm2ShortConv", ["hidden_states", "attention_mask"]),
        ("zaya", "ZayaCCAProjection", ["hidden_states", "conv_mask"]),
        ("inkling2", "Inkling2DynamicShortConvolution", ["hidden_states", "dynamic_input", "conv_mask"]),
    ],
)
def test_transformers_convolutions_are_named_as_we_read_them(name, layer, inputs):
    modeling = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    kind = getattr(modeling, layer)
    assert set(inputs) <= set(parameters(inspect.unwrap(kind.forward)))
    assert "causal_conv1d_fn" in called_names(kind.forward) or "self.conv_kernel_size = " in inspect.getsource(kind)


def test_accelerate_deals_rows_to_as_many_groups_as_it_is_told():
    rows = torch.utils.data.DataLoader(range(10), batch_size=2)
    for rank in range(2):
        loader = prepare_data_loader(rows, num_processes=2, process_index=rank, dispatch_batches=False)
        assert [batch.tolist() for batch in loader][0] == [2 * rank, 2 * rank + 1], "accelerate assigns rows otherwise"


def test_accelerate_cuts_gathered_values_only_while_it_knows_a_remainder():
    """Scalars of ranks are gathered like rows; `_drop_last` keeps accelerate from taking them for rows."""
    loader = prepare_data_loader(torch.utils.data.DataLoader(range(5), batch_size=2), num_processes=1, process_index=0)
    assert [loader.remainder for _ in loader][-1] == 1
    loader._drop_last = True
    assert [loader.remainder for _ in loader][-1] == -1, (
        "accelerate ignores `_drop_last` when it computes the remainder"
    )


def test_accelerate_moves_a_shard_through_its_own_method():
    shard = SequenceShard(size=1, rank=0, num_tokens=2, local_len=2, segment_ids=torch.zeros(1, 2))
    moved = send_to_device({"sequence_shard": shard}, torch.device("meta"), non_blocking=True)["sequence_shard"]
    assert moved.segment_ids.device.type == "meta" and moved.num_tokens == 2


def test_accelerate_marks_a_model_it_prepared():
    """`evaluate()` takes this mark off again. An older accelerate set it in `prepare` only."""
    from accelerate import accelerator

    assert "_is_accelerate_prepared" in inspect.getsource(accelerator), "accelerate renamed this mark"


def test_accelerate_shards_fsdp2_over_all_ranks_unless_a_mesh_is_configured():
    """The trainers' FSDP2 path, whose run needs GPUs (`tests/gpu`): parameters over the whole world, gradients "
    "averaged."""
    from accelerate.utils import fsdp_utils

    source = inspect.getsource(fsdp_utils.fsdp2_prepare_model)
    assert "fully_shard" in source and "torch_device_mesh" in source


def test_trl_scores_shifted_labels_without_shifting_them_again():
    from trl.trainer import utils

    source = inspect.getsource(utils.add_fused_lm_head)
    assert "shift_labels is None" in source and "labels = shift_labels" in source


def test_trl_preference_losses_ask_for_numbers_of_whole_rows():
    from trl import DPOTrainer, KTOTrainer, RewardTrainer
    from trl.trainer.utils import FusedCausalLMOutput

    from hf_longctx.trainer.scored_rows import FIELDS

    assert {*FIELDS, "loss", "aux_loss"} == set(FusedCausalLMOutput.__dataclass_fields__), (
        "TRL's head has other fields"
    )
    for trainer in (DPOTrainer, KTOTrainer):
        assert "fused_lm_head=True" in inspect.getsource(trainer._compute_loss)
        assert parameters(trainer._precompute_ref_logps)[1:] == ["dataset", "name", "batch_size"]
        ahead = inspect.getsource(trainer._precompute_ref_logps)
        assert "self.accelerator.prepare(" in ahead and "self.accelerator.gather_for_metrics(" in ahead
    for trainer in (DPOTrainer, KTOTrainer, RewardTrainer):
        assert "// self._tp_size" in inspect.getsource(trainer), "TRL counts tokens in another way"


def test_trl_trainer_seams():
    from trl import SFTTrainer

    assert parameters(SFTTrainer.compute_loss)[1:] == ["model", "inputs", "return_outputs", "num_items_in_batch"]
    assert parameters(SFTTrainer.prediction_step)[1:] == ["model", "inputs", "prediction_loss_only", "ignore_keys"]


def test_transformers_gives_sigterm_back_and_steps_after_training_step():
    from transformers.trainer_jit_checkpoint import JITCheckpointCallback

    assert "signal.signal" in inspect.getsource(JITCheckpointCallback.on_train_end)
    epoch = inspect.getsource(Trainer._run_epoch)
    order = [epoch.index(part) for part in ("self.training_step(", "self._clip_grad_norm(", "self.optimizer.step()")]
    assert order == sorted(order), "transformers changed the order of `Trainer._run_epoch`"


def test_transformers_checkpoints_by_arguments_and_methods_that_we_set():
    names = [
        name
        for name in ("activation_checkpointing", "gradient_checkpointing")
        if hasattr(transformers.TrainingArguments, name)
    ]
    assert names and all(hasattr(transformers.TrainingArguments, f"{name}_kwargs") for name in names)
    model = transformers.PreTrainedModel
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    assert {"every_n_layers", "offload"} <= set(parameters(enable))
    assert hasattr(model, "get_output_embeddings") and hasattr(model, "base_model_prefix")


def test_torch_has_a_default_store_and_optimizers_leave_parameters_without_gradient():
    from torch.distributed import distributed_c10d

    assert callable(distributed_c10d._get_default_store)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=1.0)
    weight.sum().backward()
    optimizer.step()
    before, state = weight.detach().clone(), {k: v.clone() for k, v in optimizer.state[weight].items()}
    weight.grad = None
    optimizer.step()
    assert torch.equal(weight, before) and all(torch.equal(optimizer.state[weight][k], v) for k, v in state.items())


def test_sentence_transformers_flattens_by_attributes_that_we_set():
    modules = pytest.importorskip("sentence_transformers.base.modules")
    source = inspect.getsource(modules.Transformer.preprocess)
    assert "self.data_collator(" in source and "self._flatten_position_offset" in source
    assert "self.can_flatten_inputs" in inspect.getsource(modules.Transformer._should_flatten_inputs)
    assert "self.model_forward_params" in inspect.getsource(modules.Transformer.forward)
    assert parameters(modules.Transformer._infer_flatten_position_offset) == ["self"]


def test_sentence_transformers_pooling_encode_and_gradient_cache():
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.losses import gradcache
    from sentence_transformers.sentence_transformer.modules import Pooling

    source = inspect.getsource(Pooling.forward)
    assert all(name in source for name in ("token_embeddings", "cu_seq_lens_q", "prompt_length", "include_prompt"))
    assert "output_value" in parameters(SentenceTransformer.encode)
    assert "total_tokens" in inspect.getsource(gradcache._create_minibatch)
    assert parameters(gradcache._minibatch_ranges) == ["sentence_feature", "mini_batch_size", "mini_batch_num_tokens"]
    hook = ["grad_output", "sentence_features", "loss_obj", "cache", "random_states", "ranges"]
    assert parameters(gradcache._backward_hook) == hook


def test_sentence_transformers_trainer_seams():
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

    loader = parameters(SentenceTransformerTrainer._build_dataloader)
    assert loader == ["self", "dataset", "batch_size", "dataset_kind"]
    assert "self.evaluator" in inspect.getsource(SentenceTransformerTrainer.evaluation_loop)
    assert parameters(SentenceTransformerDataCollator._resolve_prompts) == ["self", "batch"]
    assert parameters(SentenceTransformerDataCollator._get_prompt_for_column) == ["self", "prompts", "column_name"]
    assert "_save_optimizer_and_scheduler(" in inspect.getsource(Trainer._save_checkpoint)


def test_fsdp2_modules_have_the_state_that_gradient_caching_reads():
    from torch.distributed.fsdp import FSDPModule

    assert callable(FSDPModule._get_fsdp_state)
    assert callable(FSDPModule.set_requires_gradient_sync)


def test_which_peft_transformers_own_adapters_take(tmp_path):
    """transformers 5.24 asks for peft 0.22, and peft's newest release is 0.21.2: `get_peft_model` takes both."""
    peft = pytest.importorskip("peft")
    from packaging.version import Version
    from transformers.integrations.peft import MIN_PEFT_VERSION

    config = transformers.LlamaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    lora = peft.LoraConfig(target_modules=["q_proj"])
    assert type(peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)).__name__ == "PeftModel"
    model = transformers.LlamaForCausalLM(config)
    is_old = Version(peft.__version__) < Version(MIN_PEFT_VERSION)
    assert is_old == (
        Version(transformers.__version__) >= Version("5.24") and Version(peft.__version__) < Version("0.22")
    )
    if is_old:
        with pytest.raises(ValueError, match="version of PEFT you are using is not compatible"):
            model.add_adapter(lora)
    else:
        model.add_adapter(lora)
        assert model.active_adapters() == ["default"]
