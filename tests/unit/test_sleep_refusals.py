"""What does not sleep says why: configurations, models, batches, ways to generate, and settings of a trainer."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import peft
import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import (
    DataCollatorWithFlattening,
    DynamicCache,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    StaticCache,
    TextStreamer,
    cache_utils,
)

from hf_longctx import (
    LongContextConfig,
    LongContextTrainer,
    MemoryConfig,
    PackingCollator,
    SleepConfig,
    SleepWarmup,
    sleep_generate,
    sleep_loss,
)
from hf_longctx.attention.cache_names import OUTPUT_NAME
from hf_longctx.cli.command_line import main
from hf_longctx.proof import sleeping
from hf_longctx.proof.model_under_test import default_config
from hf_longctx.proof.sleeping import check_tiny, verify_sleep
from hf_longctx.sleep import row_windows, sleepers
from hf_longctx.sleep.cache import SleepCache
from hf_longctx.sleep.generate import _arguments as other_arguments
from hf_longctx.sleep.sleepers import check_sleeper

from ..models import build as build_decoder
from ..sleepers import build_sleeper, tokens_of
from ..tokenizer import tiny_tokenizer
from ..training import arguments, reset_state


CONFIG = SleepConfig(window=8, passes=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"passes": 0}, r"`passes` \(0\) must be a whole number, 1 or more"),
        ({"passes": 1.5}, r"`passes` \(1.5\)"),
        ({"passes": True}, r"`passes` \(True\)"),
        ({"passes": "many"}, r"`passes` \('many'\)"),
        ({"window": 1}, r"`window` \(1\) must be a number of tokens, 2 or more"),
        ({"window": "all"}, r"`window` \('all'\)"),
        ({"window": None, "passes": 2}, "set `window`, too"),
        ({"eviction": "soft"}, r"`eviction` \('soft'\) must be one of hard, sliding"),
        ({"loop_layers": (3, 3)}, r"`loop_layers` \(\(3, 3\)\) holds no layer"),
        ({"loop_layers": (1, 2, 3)}, "must be two numbers of layers"),
        ({"loop_layers": (-1, 2)}, "must be two numbers of layers"),
        ({"answers_sleep": 1}, r"`answers_sleep` \(1\) must be True or False"),
        ({"warmup": 3}, r"`warmup` \(3\) must be given as a `SleepWarmup`"),
        (
            {"passes": 3, "warmup": SleepWarmup(pass_steps=(5,))},
            "adds 1 passes to the first, but `passes` is 3: name 2",
        ),
    ],
)
def test_settings_that_no_run_could_use(values, message):
    with pytest.raises(ValueError, match=message):
        SleepConfig(**{"window": 8, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pass_steps": (5, 5)}, "must be rising numbers of optimizer steps"),
        ({"pass_steps": (0,)}, "must be rising numbers"),
        ({"pass_steps": 5}, "must be rising numbers"),
        ({"recurrent_steps": -1}, r"`recurrent_steps` \(-1\) must be a number of optimizer steps"),
    ],
)
def test_warmups_that_no_run_could_use(values, message):
    with pytest.raises(ValueError, match=message):
        SleepWarmup(**values)


def test_a_warmup_adds_passes_at_its_steps():
    config = SleepConfig(
        window=8, passes=3, eviction="sliding", warmup=SleepWarmup(pass_steps=[2, 5], recurrent_steps=1)
    )
    assert [config.at(step).passes for step in range(7)] == [1, 1, 2, 2, 2, 3, 3]
    assert [config.at(step).eviction for step in range(3)] == ["hard", "sliding", "sliding"]
    assert config.at(9) == SleepConfig(window=8, passes=3, eviction="sliding") == config.at(9).at(0)


# Models


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("lfm2", ValueError, "short convolutions and no recurrent state: there is nothing to consolidate"),
        ("qwen3", ValueError, "no layer with a recurrent state.*or put recurrent layers in with `hybridize`"),
        ("zamba2", NotImplementedError, "shows its layers the embeddings of the tokens beside the hidden states"),
        ("jamba", NotImplementedError, "reads several tokens at once without the state that it left before"),
        (
            "recurrent_gemma",  # older versions do not say that it has states
            ValueError,
            "leaves no recurrent state in its cache|no layer with a recurrent state",
        ),
        ("minimax", NotImplementedError, "does not take transformers' `DynamicCache`"),
        ("mamba2", ValueError, "has no attention, so it forgets no keys"),
    ],
)
def test_model_types_that_cannot_sleep(name, kind, message):
    with pytest.raises(kind, match=message):
        check_tiny(default_config(name), SleepConfig(window=16))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 3}, r"`window` \(3\) is shorter than the kernel of the short convolutions \(4\)"),
        ({"loop_layers": (0, 5)}, r"`loop_layers` \(\(0, 5\)\) reaches past the 2 layers"),
        (
            {"loop_layers": (1, 2)},
            r"holds no recurrent layer, so its passes would consolidate nothing: take in one of \[0\]",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model(values, message):
    with pytest.raises(ValueError, match=message):
        sleep_loss(build_sleeper("qwen3_next"), tokens_of(), SleepConfig(**{"window": 8, **values}))


def test_other_models_that_cannot_sleep_as_asked():
    model = build_sleeper("qwen3_next")
    with pytest.raises(ValueError, match="`window` is unset, so nothing would sleep"):
        sleep_loss(model, tokens_of(), SleepConfig())
    with pytest.raises(ValueError, match="`Qwen3NextModel` is no causal language model"):
        check_sleeper(model.model, CONFIG)
    wrapped = object.__new__(FullyShardedDataParallel)  # which asks for a device when it is made
    torch.nn.Module.__init__(wrapped)
    wrapped._fsdp_wrapped_module = model
    with pytest.raises(NotImplementedError, match="is sharded by FSDP, whose units have not been proven"):
        check_sleeper(wrapped, CONFIG)
    with pytest.raises(ValueError, match="`Linear` is no causal language model"):
        check_sleeper(torch.nn.Linear(2, 2), CONFIG)
    model.config.return_dict = False
    with pytest.raises(ValueError, match="`return_dict` .False. in the configuration of `Qwen3NextForCausalLM` makes"):
        sleep_loss(model, tokens_of(), CONFIG)
    model.config.return_dict = True
    model.config.output_router_logits = True
    with pytest.raises(NotImplementedError, match="which N passes would count N times: set `model.config"):
        sleep_loss(model, tokens_of(), CONFIG)
    sliding = SleepConfig(window=8, eviction="sliding")
    with pytest.raises(NotImplementedError, match="attn_implementation='packed' does not take"):
        sleep_loss(build_sleeper("qwen3_5_text", "packed"), tokens_of(), sliding)


def test_a_model_that_sees_pictures_is_told_of_its_text_part():
    text = build_sleeper("qwen3_5_text")
    sizes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 48}
    config = Qwen3_5Config(text_config=text.config.to_dict(), vision_config={**sizes, "patch_size": 4})
    with pytest.raises(NotImplementedError, match="hidden states come from: load its text part alone, with `AutoM"):
        sleep_loss(Qwen3_5ForConditionalGeneration._from_config(config), tokens_of(), CONFIG)


def test_a_kernel_that_returns_no_gradient_for_its_state(monkeypatch):
    model = build_sleeper("qwen3_5_text")
    module = __import__(type(model).__module__, fromlist=["x"])
    own = module.torch_chunk_gated_delta_rule
    monkeypatch.setattr(
        module,
        "torch_chunk_gated_delta_rule",
        lambda *args, initial_state=None, **kwargs: own(
            *args, initial_state=None if initial_state is None else initial_state.detach(), **kwargs
        ),
    )
    with pytest.raises(NotImplementedError, match="its kernel returns no gradient for it: windows would forget"):
        sleep_loss(model, tokens_of(), CONFIG)
    monkeypatch.undo()
    sleep_loss(model, tokens_of(), CONFIG)
    vars(model)["_hf_longctx_sleeps"] = "cuda"  # another device may run another kernel: it is tried there, too
    monkeypatch.setattr(sleepers, "_try_states", Mock(side_effect=NotImplementedError("tried")))
    with pytest.raises(NotImplementedError, match="tried"):
        sleep_loss(model, tokens_of(), CONFIG)


# Batches


def changed(**changes) -> dict:
    batch = tokens_of()
    return {name: value for name, value in {**batch, **changes}.items() if value is not None}


LEFT = torch.ones(2, 26, dtype=torch.long)
LEFT[1, :3] = 0
NO_END = torch.ones(2, 26, dtype=torch.long)
NO_END[0, -1] = 0
RESTART = torch.cat([torch.arange(13), torch.arange(13)])[None].expand(2, -1)
NO_LABEL = torch.full((2, 26), -100)
NO_LABEL[0, -1] = 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": None}, "a batch that sleeps needs `input_ids`"),
        ({"labels": None}, "a batch without `labels` has no loss"),
        ({"input_ids": torch.ones(2, 26)}, r"`input_ids` \(torch.float32\) must be whole numbers"),
        ({"labels": torch.ones(2, 26)}, r"`labels` \(torch.float32\) must be whole numbers"),
        ({"attention_mask": NO_END}, "row 0 has labels where `attention_mask` is 0, on padding"),
        (
            {"position_ids": torch.arange(20)[None]},
            r"`position_ids` \(1, 20\), or the `attention_mask` .* must",
        ),
        ({"sleep_windows": "all"}, r"`sleep_windows` \('all'\) must say True or False"),
        ({"sleep_windows": torch.full((2, 4), 0.5)}, "must say True or False .*, and has other numbers"),
        ({"input_ids": [[5] * 26] * 2}, "`input_ids` .a `list`. must be a tensor"),
        ({"labels": [[5] * 26] * 2}, "`labels` .a `list`. must be a tensor"),
        ({"input_ids": torch.ones(26, dtype=torch.long)}, r"`input_ids` \(26,\) must be of shape .rows, tokens."),
        ({"attention_mask": torch.ones(2, 25)}, r"`attention_mask` \(2, 25\) must have the shape of `input_ids`"),
        ({"attention_mask": {"full_attention": None}}, "`attention_mask` .a `dict`. must be a tensor"),
        ({"logits_to_keep": 3}, "the batch has `logits_to_keep`, which a row that sleeps chooses itself"),
        ({OUTPUT_NAME: DynamicCache()}, f"the batch has `{OUTPUT_NAME}`, which a row that sleeps chooses itself"),
        ({"labels": torch.ones(2, 25, dtype=torch.long)}, "must have the shape of `input_ids`"),
        ({"labels": NO_LABEL}, "row 1 has no label behind its first token, so no window of it is awake"),
        ({"attention_mask": LEFT}, "row 1 is padded on the left or in between"),
        ({"attention_mask": torch.ones(2, 1, 26, 26)}, "`attention_mask` has 4 dimensions"),
        ({"position_ids": RESTART}, "`position_ids` do not count a row's tokens from 0: packed rows"),
        ({"cu_seq_lens_q": torch.tensor([0, 26, 52])}, "the batch has `cu_seq_lens_q`, so its rows are packed"),
        ({"seq_idx": torch.zeros(2, 26)}, "the batch has `seq_idx`, so its rows are packed or shared"),
        ({"token_type_ids": torch.zeros(2, 26)}, "the batch has `token_type_ids`, which sleep would have to cut"),
        ({"use_cache": False}, r"`use_cache` \(False\) leaves nowhere to put the states"),
        ({"sleep_windows": torch.zeros(2, 3)}, r"`sleep_windows` \(2, 3\) must have one entry for each window"),
        (
            {"sleep_windows": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])},
            "row 1 is asked to sleep over window 2, which has labels",
        ),
        ({"sleep_windows": torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0]])}, "window 3, which is not full"),
    ],
)
def test_batches_that_do_not_sleep(changes, message):
    with pytest.raises(ValueError, match=message):
        sleep_loss(build_sleeper("qwen3_5_text"), changed(**changes), CONFIG)


def test_other_batches():
    model = build_sleeper("qwen3_5_text")
    for count in (0, -3, "20", True, torch.tensor(0)):
        with pytest.raises(ValueError, match="`num_items_in_batch` .* must be the number of labels of a step"):
            sleep_loss(model, tokens_of(), CONFIG, num_items_in_batch=count)
    with pytest.raises(ValueError, match="`batch` .a `list`. must map names to tensors"):
        sleep_loss(model, [1, 2], CONFIG)
    for config in (None, {"window": 8}):
        with pytest.raises(ValueError, match="`sleep` .* must be given as a `SleepConfig`"):
            sleep_loss(model, tokens_of(), config)
    with pytest.raises(NotImplementedError, match="`output_router_logits` .True. adds a loss of the routers"):
        sleep_loss(model, changed(output_router_logits=True), CONFIG)
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(NotImplementedError, match=f"the batch has `{name}` .True., which is of one pass"):
            sleep_loss(model, changed(**{name: True}), CONFIG)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="`torch.inference_mode` records nothing"):
        sleep_loss(model.train(), tokens_of(), CONFIG)
    fresh = build_sleeper("qwen3_5_text")
    with torch.inference_mode():  # an evaluation may, also as the first that a model does
        sleep_loss(fresh, tokens_of(), CONFIG)


def test_other_passes_than_the_trained_ones_are_warned_of_once(caplog):
    model = build_sleeper("qwen3_5_text").train()
    sleep_loss(model, tokens_of(), CONFIG)
    model.eval()
    for _ in range(2):
        sleep_loss(model, tokens_of(), SleepConfig(window=8, passes=4))
        generate(model, sleep=SleepConfig(window=8, passes=4))
    generate(model, sleep=CONFIG)
    warned = [record.getMessage() for record in caplog.records if record.name.startswith("hf_longctx.sleep")]
    assert warned == [
        "`passes` is 4, and `Qwen3_5ForCausalLM` was trained with 2: its layers have not seen hidden states of other "
        "passes."
    ]


def test_adapters_that_put_tokens_in_front_of_rows(tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build_sleeper("qwen3_5_text"), config)
    ids = tokens_of(tokens=9)["input_ids"]
    for run in (
        lambda: sleep_loss(model, tokens_of(), CONFIG),
        lambda: model.generate(input_ids=ids, custom_generate=sleep_generate, sleep=CONFIG, max_new_tokens=2),
        lambda: trainer(tmp_path, model),
    ):
        with pytest.raises(NotImplementedError, match="puts virtual tokens in front .* others window by window"):
            run()
    reset_state()


# Generation


def generate(model, **changes):
    options = {"custom_generate": sleep_generate, "sleep": CONFIG, "max_new_tokens": 2, "do_sample": False}
    return model.generate(**{"inputs": tokens_of(tokens=9)["input_ids"], **options, **changes})


def test_ways_to_generate_that_do_not_go_with_sleep():
    model, ids = build_sleeper("qwen3_5_text"), tokens_of(tokens=9)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    right = torch.ones_like(ids)
    right[0, -2:] = 0
    used = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, **{OUTPUT_NAME: used})
    static = StaticCache(config=model.config, max_cache_len=32)
    model._is_stateful = False  # transformers refuses assistants of models that say so; not all hybrids do
    for changes, kind, message in (
        ({"sleep": None}, ValueError, r"pass `sleep=SleepConfig\(window=..., passes=...\)` to `generate`"),
        ({"sleep": 4}, ValueError, r"`sleep` \(4\) must say how"),
        ({"num_beams": 2}, NotImplementedError, r"`num_beams` \(2\) reorders states between beams"),
        ({"assistant_model": model}, NotImplementedError, "assisted decoding takes tokens back"),
        ({"prompt_lookup_num_tokens": 2}, NotImplementedError, "assisted decoding takes tokens back"),
        ({"guidance_scale": 2.0}, NotImplementedError, r"`guidance_scale` \(2.0\) reads a row in another way"),
        ({"penalty_alpha": 0.6, "top_k": 4}, NotImplementedError, r"`penalty_alpha` \(0.6\) reads a row in another"),
        ({"dola_layers": "high"}, NotImplementedError, r"`dola_layers` \('high'\) reads a row in another way"),
        ({"inputs": torch.empty(1, 0, dtype=torch.long)}, ValueError, r"`input_ids` \(1, 0\) must be of shape"),
        ({"inputs": None, "inputs_embeds": torch.zeros(1, 9, 32)}, ValueError, "was given `inputs_embeds`"),
        ({"streamer": Silent()}, NotImplementedError, "does not hand `streamer` to a `custom_generate`"),
        ({"use_cache": False}, ValueError, r"`use_cache` \(False\) leaves nowhere"),
        ({"output_attentions": True, "return_dict_in_generate": True}, NotImplementedError, "are those of one pass"),
        ({"synced_gpus": True}, NotImplementedError, "N passes were not proven with"),
        ({"cache_implementation": "offloaded"}, NotImplementedError, r"`cache_implementation` \('offloaded'\)"),
        ({"cache_implementation": "static"}, NotImplementedError, r"`cache_implementation` \('static'\)"),
        ({OUTPUT_NAME: used}, NotImplementedError, "was made or filled outside"),
        ({OUTPUT_NAME: static}, NotImplementedError, "a `StaticCache`. was made or filled outside"),
        ({"attention_mask": mask}, ValueError, "row 0 is padded on the left"),
        ({"attention_mask": right}, ValueError, "prompts are padded"),
        ({"attention_mask": right[1:, :8].expand(2, -1)}, ValueError, r"`attention_mask`.* of `input_ids` \(2, 9\)"),
        ({"inputs": tokens_of(tokens=9)["input_ids"], "sleep": SleepConfig(window=3)}, ValueError, "kernel"),
    ):
        with pytest.raises(kind, match=message):
            generate(model, **changes)
    with pytest.raises(ValueError, match="no layer with a recurrent state"):
        generate(build_decoder("llama", "sdpa"))
    assert generate(model).shape == (2, 11)


class Silent(TextStreamer):
    def __init__(self) -> None:
        pass

    def put(self, value) -> None:
        pass


# Trainers


def trainer(tmp_path, model=None, config=CONFIG, **changes):
    reset_state()
    of_trainer = {name: changes.pop(name) for name in list(changes) if name in NAMES}
    return LongContextTrainer(
        model=build_sleeper("qwen3_5_text") if model is None else model,
        args=arguments(str(tmp_path), **changes),
        train_dataset=[{"input_ids": [5] * 20, "labels": [5] * 20}],
        sleep=config,
        **of_trainer,
    )


NAMES = ("data_collator", "long_context", "memory", "compute_loss_func")


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"data_collator": PackingCollator(max_tokens=64)}, ValueError, "`PackingCollator` packs several documents"),
        ({"data_collator": DataCollatorWithFlattening()}, ValueError, "`DataCollatorWithFlattening` packs several"),
        ({"memory": MemoryConfig(loss_tile_size=8)}, NotImplementedError, "does not go with `MemoryConfig`"),
        ({"compute_loss_func": lambda *args, **kwargs: 0}, NotImplementedError, "has logits of awake windows alone"),
        ({"label_smoothing_factor": 0.1}, NotImplementedError, "has logits of awake windows alone"),
        ({"torch_compile": True}, NotImplementedError, r"`torch_compile` \(True\) replaces the forward"),
        ({"config": SleepConfig(window=3)}, ValueError, "shorter than the kernel"),
    ],
)
def test_settings_of_a_trainer_that_do_not_go_with_sleep(changes, kind, message, tmp_path):
    with pytest.raises(kind, match=message):
        trainer(tmp_path, **changes)
    reset_state()


def test_trainers_that_do_not_sleep(tmp_path):
    from hf_longctx.trainer.sleep_checks import refuse_sleep_settings

    made = trainer(tmp_path)
    refuse_sleep_settings(made)
    made.is_fsdp_enabled = True
    with pytest.raises(NotImplementedError, match="FSDP and DeepSpeed have not been proven with: use DDP"):
        refuse_sleep_settings(made)
    made.is_fsdp_enabled = False
    made.args._n_gpu = 2
    with pytest.raises(ValueError, match="one process sees 2 GPUs"):
        refuse_sleep_settings(made)
    made.args._n_gpu = 0
    made.long_context = LongContextConfig(sequence_parallel_size=2)
    with pytest.raises(NotImplementedError, match="ranks that share a row would wait for each other"):
        refuse_sleep_settings(made)
    made.long_context = LongContextConfig()
    made.sleep = SleepConfig(window=8, warmup=SleepWarmup(recurrent_steps=2))
    made.model.requires_grad_(False)
    with pytest.raises(ValueError, match="trains the recurrent layers alone, and all of them are frozen"):
        refuse_sleep_settings(made)
    made.model.requires_grad_(True)
    made.args.ddp_find_unused_parameters = False
    made.mesh = type("Mesh", (), {"world_size": 2})()
    with pytest.raises(ValueError, match="freezes parameters that DDP waits for: set `ddp_find_unused"):
        refuse_sleep_settings(made)
    reset_state()


def test_the_sft_trainer_is_refused(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig

    from hf_longctx import LongContextSFTTrainer

    reset_state()
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_length=None)
    data = Dataset.from_list([{"input_ids": [5] * 20}])
    with pytest.raises(NotImplementedError, match="`LongContextSFTTrainer` computes its loss without it: use `LongC"):
        LongContextSFTTrainer(
            model=build_sleeper("qwen3_5_text"),
            args=args,
            train_dataset=data,
            processing_class=tiny_tokenizer(),
            sleep=CONFIG,
        )
    reset_state()


# Commands


def test_commands_say_which_models_sleep(capsys):
    assert main(["check", "qwen3_next", "--sleep"]) == 0
    assert "can sleep: 36 of 48 layers hold a recurrent state" in capsys.readouterr().out
    assert main(["check", "lfm2", "--sleep"]) == 2
    assert "nothing to consolidate a window into" in capsys.readouterr().out
    assert main(["verify", "qwen3_5_text", "--sleep"]) == 0
    told = capsys.readouterr().out
    assert "windows              off by 0.0e+00, allowed 0.0e+00" in told and "exact: windows, states" in told
    assert main(["verify", "jamba", "--sleep"]) == 2
    assert "reads several tokens at once" in capsys.readouterr().out


def test_a_proof_sees_keys_that_are_not_dropped(monkeypatch):
    monkeypatch.setattr(row_windows, "forget", lambda cache, config: cache)
    result = verify_sleep("qwen3_5_text")
    assert not result and result.exit_code == 1 and result.errors["one window"] == 0 < result.errors["windows"]
    assert result.message == "windows, generation: not what one process gives" == result.to_dict()["message"]


# What no model of transformers does, and others may


def test_parts_that_are_not_where_they_stand_in_a_hybrid(monkeypatch):
    model = build_sleeper("qwen3_5_text")
    with monkeypatch.context() as patch:
        patch.setattr(SleepCache, "state_layers", property(lambda self: []))
        with pytest.raises(ValueError, match="leaves no recurrent state in its cache"):
            check_sleeper(model, CONFIG)
    with monkeypatch.context() as patch:
        odd = type("OddLayer", (cache_utils.DynamicLayer,), {})
        patch.setitem(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, "full_attention", odd)
        with pytest.raises(NotImplementedError, match="layer 1 keeps a `OddLayer`, which sleep does not know how to"):
            SleepCache(model.config)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.model), "forward", lambda self, input_ids=None: None)
        with pytest.raises(
            NotImplementedError, match="`Qwen3_5TextModel.forward` takes no cache or no `inputs_embeds`"
        ):
            check_sleeper(model, CONFIG)
    for widen, message in (
        (lambda inputs: ((inputs[:, None],), {}), "does not hand `inputs_embeds` to its first layer as hidden states"),
        (lambda inputs: ((inputs.detach(),), {}), "does not hand `inputs_embeds` to its first layer as hidden states"),
        (lambda inputs: ((inputs * 3,), {"beside": (inputs.mean(-1),)}), "shows its layers the embeddings of the"),
    ):

        def forward(self, input_ids=None, inputs_embeds=None, cache=None, past_key_values=None, widen=widen, **kwargs):
            args, others = widen(inputs_embeds)
            return self.layers[0](*args, **others)

        with monkeypatch.context() as patch:
            patch.setattr(type(model.model), "forward", forward)
            with pytest.raises(NotImplementedError, match=message):
                check_sleeper(model, CONFIG)
    model.model.norm = torch.nn.Identity()
    with pytest.raises(NotImplementedError, match=r"no single stack `layers` with one norm behind it \(0 found\)"):
        check_sleeper(model, CONFIG)
    with pytest.raises(ValueError, match="`token_type_ids` would have to be cut into windows"):
        other_arguments({"token_type_ids": torch.zeros(2, 9)})


def test_a_configuration_without_a_tiny_model(monkeypatch):
    tested = SimpleNamespace(name="odd", config=None, problem="no sizes")
    monkeypatch.setattr(sleeping.ModelUnderTest, "of", lambda *args: tested)
    with pytest.raises(ValueError, match="no tiny model can be made of it to try .no sizes."):
        check_tiny(default_config("qwen3_next"), CONFIG)
    assert verify_sleep("qwen3_next").exit_code == 3
