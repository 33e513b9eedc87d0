"""Sparse layers on one process: packed documents as if alone, whole rows as transformers', and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from hf_longctx import LongContextConfig, SequenceMesh, adapt, shard_batch
from hf_longctx.adapters.attach import attach_adapters
from hf_longctx.proof.model_under_test import default_config
from hf_longctx.proof.tiny import shrink
from hf_longctx.trainer.checks import check_model, refuse_eight_bits

from ..models import build
from ..sparse import (
    COUNTING,
    KINDS,
    TOLERANCE,
    TOLERANCES,
    assert_same,
    backward,
    build_sparse,
    one_by_one,
    packed_row,
    relative,
)


needs_v4 = pytest.mark.skipif("deepseek_v4" not in KINDS, reason="transformers has no deepseek_v4")


def padded_rows(side: str = "right") -> dict[str, torch.Tensor]:
    ids = torch.randint(10, 120, (3, 19), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, count in ((1, 7), (2, 16)):
        mask[row, slice(0, count) if side == "left" else slice(-count, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", ["packed", "ulysses"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_equal_documents_one_by_one(kind, name):
    """By positions and, where the model adds none, by bounds; in training mode, recomputed or not."""
    model, batch = build_sparse(kind), packed_row()
    expected = one_by_one(model, batch)
    model.set_attn_implementation(name)
    attach_adapters(model)
    model.train()
    # With `use_reentrant`, layers of mistral_large4 that share keys fail in transformers itself.
    reentrant = name == "packed" and kind != "mistral_large4_text"
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.get_input_embeddings().weight.requires_grad_()
    outputs = model(**batch, use_cache=False)[0]
    assert_same((outputs.detach(), backward(model, outputs)), expected, TOLERANCES.get(kind, TOLERANCE))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_rows_equal_transformers(kind):
    """Padded on the right, with a cache that the model makes itself and without; attached and removed."""
    # The mask that transformers makes of pools is -inf in double precision once its softmax is in single.
    dtype = torch.float32 if kind == "glm5_next_text" else torch.float64
    model, batch = build_sparse(kind, dtype=dtype), padded_rows()
    real = batch["attention_mask"].bool()
    expected = model(**batch)[0][real].detach()
    model.set_attn_implementation("ulysses")
    handle = attach_adapters(model)
    for cache in (False, True):
        with torch.no_grad():
            assert relative(model(**batch, use_cache=cache)[0][real], expected) < TOLERANCE
    handle.remove()
    model.set_attn_implementation("eager")
    assert torch.equal(model(**batch)[0][real], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_that_begin_elsewhere_change_nothing(kind):
    """Positions are relative, and windows and blocks are counted from the first token of a document."""
    model, batch = build_sparse(kind, "packed"), packed_row((11, 8))
    attach_adapters(model)
    with torch.no_grad():
        expected = model(**batch, use_cache=False)[0]
        moved = model(**{**batch, "position_ids": batch["position_ids"] + 5}, use_cache=False)[0]
    if kind != "mistral_large4_text":  # it scales queries by their positions
        assert relative(moved, expected) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_another_document(kind):
    model, batch = build_sparse(kind, "packed"), packed_row((9, 8, 12))
    attach_adapters(model)
    embeddings = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    hashed = kind == "deepseek_v4"
    if hashed:
        model.config.mlp_layer_types, model.layers[0].mlp = [], model.layers[1].mlp  # hash routing needs token ids
    outputs = model(inputs_embeds=embeddings, **batch, use_cache=False)[0]
    gradient = torch.autograd.grad(outputs[:, 17:].square().sum(), embeddings)[0]
    assert not gradient[:, :17].any() and bool(gradient[:, 17:].any(-1).all())


@needs_v4
def test_transformers_leaks_in_packed_rows_of_deepseek_v4():
    """Why packed rows of this type need an adapter: the third document attends to entries of the first."""
    model, batch = build_sparse("deepseek_v4"), packed_row((9, 8, 12))
    outputs, _ = one_by_one(model, batch)
    with torch.no_grad():
        assert relative(model(**batch, use_cache=False)[0], outputs) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_generated_text_is_that_of_transformers(kind):
    base = build_sparse(kind, dtype=torch.float32)
    if type(base.config) in AutoModelForCausalLM._model_mapping:
        model = AutoModelForCausalLM.from_config(base.config, attn_implementation="eager").eval()
        model.base_model.load_state_dict(base.state_dict())
    else:  # a text model with a head only beside images
        config = shrink(default_config(kind.removesuffix("_text")))
        config.text_config = base.config
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
        model.base_model.language_model.load_state_dict(base.state_dict())
    prompts = padded_rows("left" if kind not in COUNTING else "right")
    prompts = prompts if kind not in COUNTING else {"input_ids": prompts["input_ids"][:1]}
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**prompts, **options)
    model.set_attn_implementation("packed")
    adapt(model, SequenceMesh.build())
    assert torch.equal(model.generate(**prompts, **options), expected)


@pytest.mark.parametrize("kind", [kind for kind in ("deepseek_v32", "deepseek_v4") if kind in KINDS])
def test_memory_grows_with_the_tokens(kind):
    """Bytes that autograd keeps for the backward, with the kernels of one layer: linear, not quadratic."""
    model = build_sparse(kind, "packed", torch.float32)
    attach_adapters(model)
    sizes = []
    for tokens in (512, 1024, 2048):
        kept: dict[int, int] = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        ids = torch.randint(10, 120, (1, tokens))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model(input_ids=ids, use_cache=False)[0]
        sizes.append(sum(kept.values()))
        del outputs
    first, second = sizes[1] - sizes[0], sizes[2] - sizes[1]
    assert second / first < 2.1, sizes  # quadratic: 4


@pytest.mark.parametrize("kind", [kind for kind in COUNTING if kind in KINDS])
def test_left_padding_is_refused(kind):
    model = build_sparse(kind, "packed")
    attach_adapters(model)
    with pytest.raises(NotImplementedError, match="a row is padded on the left, and `.*` counts windows or blocks"):
        model(**padded_rows("left"), use_cache=False)


@pytest.mark.parametrize("kind", [kind for kind in COUNTING if kind in KINDS])
def test_positions_with_gaps_are_refused(kind):
    model = build_sparse(kind, "packed")
    attach_adapters(model)
    batch = {"input_ids": torch.arange(20, 30)[None], "attention_mask": torch.ones(1, 10, dtype=torch.long)}
    positions = torch.tensor([[0, 1, 2, 3, 9, 10, 11, 12, 13, 14]])
    with pytest.raises(NotImplementedError, match="`position_ids` do not go up by one in each document"):
        model(**batch, position_ids=positions, use_cache=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_next_to_packed_rows_is_refused(kind):
    model = build_sparse(kind, "packed")
    attach_adapters(model)
    with pytest.raises(ValueError, match="`use_cache` is on for a batch that packs documents"):
        model(**packed_row(), use_cache=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_the_callers_own_is_refused(kind):
    model, batch = build_sparse(kind, "packed"), packed_row((12,))
    attach_adapters(model)
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    if kind == "glm5_next_text":  # it makes nothing of such a mask; masks that are prepared by layer reach the layers
        padding = torch.arange(12)[None] > 2
        mask = dict.fromkeys(model.config.layer_types, padding)
    with pytest.raises(NotImplementedError, match="got a mask of Tensor that is not transformers' own for causal"):
        model(**batch, attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("kind", KINDS)
def test_without_adapters_every_type_is_refused(kind):
    """Not dense in silence, and no error of torch's."""
    for name in ("packed", "ulysses"):
        model = build_sparse(kind, name)
        # What picks pools is masked by transformers itself, which is right for one document.
        for batch in (packed_row((12,)), packed_row())[kind == "glm5_next_text" :]:
            with pytest.raises(NotImplementedError, match="adapt|eager"):
                model(**batch, use_cache=False)


@needs_v4
def test_token_ids_that_route_by_hash_are_asked_for():
    model = build_sparse("deepseek_v4", "packed")
    attach_adapters(model)
    with pytest.raises(ValueError, match="routes tokens to experts by their ids"):
        model(inputs_embeds=torch.randn(1, 9, model.config.hidden_size, dtype=torch.float64), use_cache=False)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_which_everything_is_picked_are_warned_about_once(kind, caplog):
    model = build_sparse(kind, "ulysses", torch.float32)
    mesh = SequenceMesh.build()
    adapt(model, mesh)
    assert not any("so nothing is sparse" in record.getMessage() for record in caplog.records)  # on tiny rows
    for tokens, warnings in ((23, 0), (5, 1), (5, 1)):
        share = shard_batch({"input_ids": torch.arange(20, 20 + tokens)[None]}, mesh, model)
        model(**share, use_cache=False)
        found = [record.getMessage() for record in caplog.records if "so nothing is sparse" in record.getMessage()]
        assert len(found) == warnings


def test_weights_of_eight_bits_that_would_train_are_refused():
    model = build("llama", "packed", torch.float32)
    weight = model.get_decoder().layers[0].self_attn.q_proj.weight
    model.get_decoder().layers[0].self_attn.q_proj.weight = torch.nn.Parameter(weight.to(torch.float8_e4m3fn))
    with pytest.raises(NotImplementedError, match="q_proj.weight` is trainable and has dtype float8_e4m3fn"):
        refuse_eight_bits(model)
    model.get_decoder().layers[0].self_attn.q_proj.weight.requires_grad_(False)
    refuse_eight_bits(model)


@pytest.mark.parametrize("kind", ["qwen4_exp_text"])
def test_pools_of_keys_are_refused_by_name(kind):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {kind}")
    model = AutoModelForCausalLM.from_config(shrink(default_config(kind)), attn_implementation="ulysses")
    config = LongContextConfig(sequence_parallel_size=2)
    with pytest.raises(NotImplementedError, match="picks keys with `.*Indexer`, which scores pools of tokens"):
        check_model(model, config)
