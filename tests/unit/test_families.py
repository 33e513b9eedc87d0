"""Every fact about a model family, proven on a tiny model or on transformers' own sources, and in one place."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForMultimodalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING,
)

import hf_longctx
from hf_longctx import families
from hf_longctx.adapters import rotary_lengths
from hf_longctx.proof.known_types import TABLE
from hf_longctx.proof.tiny import shrink


ROOT = Path(hf_longctx.__file__).parent
ROW = torch.tensor([[11, 12, 13, 14]])


def tiny(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return auto_of(kind).from_config(shrink(CONFIG_MAPPING[kind]())).eval()


def auto_of(kind: str) -> type:
    """A language model of this type, or its encoder."""
    masked = AutoModelForMaskedLM if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES else AutoModel
    return AutoModelForCausalLM if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else masked


def uses_positions(model: torch.nn.Module) -> bool:
    with torch.no_grad():
        rows = [
            model(input_ids=ROW, position_ids=positions, use_cache=False).logits
            for positions in (torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 2, 5, 11]]))
        ]
    return not torch.equal(*rows)


@pytest.mark.parametrize("kind", sorted(families.COUNTS_POSITIONS))
def test_a_decoder_that_counts_positions_ignores_position_ids(kind):
    model = tiny(kind)
    assert families.counts_positions(model.config)
    assert not uses_positions(model), f"transformers gives `{kind}` the positions of the batch"


def test_other_decoders_use_position_ids():
    assert uses_positions(tiny("llama")) and uses_positions(tiny("opt"))
    assert not families.counts_positions(transformers.LlamaConfig())
    assert not families.counts_positions(transformers.BartConfig())  # with its encoder it is another model


@pytest.mark.parametrize("kind", sorted(families.COUNTS_FROM_PADDING))
def test_a_model_that_counts_from_padding_does_so(kind):
    torch.manual_seed(0)
    model = AutoModel.from_config(shrink(CONFIG_MAPPING[kind]())).eval()
    row = ROW.repeat(1, 3)
    counted = torch.arange(row.shape[1])[None]
    first = (model.config.pad_token_id or 0) + 1
    with torch.no_grad():
        by_itself, from_zero, from_padding = (
            model(input_ids=row, **given)[0]
            for given in ({}, {"position_ids": counted}, {"position_ids": counted + first})
        )
    assert torch.equal(by_itself, from_padding) and not torch.allclose(by_itself, from_zero)


@pytest.mark.parametrize("kind", [*sorted(families.DROPS_SHARD), "llama"])
def test_a_model_drops_the_shard_of_its_batch_or_is_not_said_to(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shrink(CONFIG_MAPPING[kind]()), attn_implementation="ulysses").eval()
    try:
        model(input_ids=ROW, sequence_shard="no shard", use_cache=False)
        drops = True
    except AttributeError:  # attention looked into it
        drops = False
    assert drops == (kind in families.DROPS_SHARD)


@pytest.mark.parametrize(
    "kind", [kind for kind in sorted({*families.MIXES_TOKENS, *families.MIXES_TOKENS_WITH}) if kind in CONFIG_MAPPING]
)
def test_a_type_mixes_documents_or_its_masks_are_its_own(kind):
    """Its tokens are documents of one token each; transformers' own code looks at more of them, or cannot be told."""
    torch.manual_seed(0)
    config = shrink(CONFIG_MAPPING[kind]())
    if kind == "big_bird":
        config.block_size, config.num_random_blocks = 1, 1  # of rows that are longer than its blocks
    config.is_decoder = kind == "reformer"  # as its language model requires
    assert families.token_mixing(config) is not None
    model = auto_of(kind).from_config(config, attn_implementation="packed").eval()
    rows = torch.randint(10, 100, (2, 24))
    rows[1, 2:] = rows[0, 2:]
    row = {"position_ids": torch.zeros(1, 24, dtype=torch.long)}
    row = {name: value for name, value in row.items() if name in inspect.signature(type(model).forward).parameters}
    try:
        with torch.no_grad():
            one, other = (model(input_ids=ids[None], **row)[0][:, 2:] for ids in rows)
    except NotImplementedError as error:
        assert "edits its attention mask itself" in str(error) or "passes `position_bias`" in str(error)
    else:
        assert not torch.equal(one, other)


def test_types_that_mix_tokens_with_a_field_do_not_without_it():
    for kind, (field, value, _, other) in families.MIXES_TOKENS_WITH.items():
        config = CONFIG_MAPPING[kind]()
        assert getattr(config, field) == value
        setattr(config, field, other)
        assert families.token_mixing(config) is None


def rope_of(kind: str) -> dict[str, object]:
    """Settings that every kind of rotary embedding takes what it needs from."""
    longrope = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8} if kind == "longrope" else {}
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    scaled = {"original_max_position_embeddings": 64} if kind in ("longrope", "llama3", "yarn") else {}
    factor = {} if kind == "default" else {"factor": 4.0}
    return {"rope_type": kind, "rope_theta": 1e4, **factor, **longrope, **llama3, **scaled}


@pytest.mark.parametrize("kind", ["default", *ROPE_INIT_FUNCTIONS])
def test_rotary_kinds_that_depend_on_the_length_are_those_of_the_table(kind, monkeypatch):
    config = shrink(CONFIG_MAPPING["llama"](rope_parameters=rope_of(kind)))
    named = families.length_rope(config)
    assert (named is not None) == (kind in families.LENGTH_ROPE_KINDS)
    assert families.length_thresholds(config) == ([12] if named else [])
    monkeypatch.setattr(rotary_lengths, "length_rope", lambda config: None)  # by what it does, not by its name
    rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    assert rotary_lengths.depends_on_length(rotary) == (named is not None)


# What reads the largest position of a call, or scales by a position, in transformers' modeling files. Those that take
# the position of an image's last token compute it in the outermost model, which no share reaches.
READS_LENGTHS = {
    b"max(position_ids": {"phimoe"},
    b"position_ids.max(": {"hunyuan_vl", "hy_v4_vl", "qwen2_5_omni", "qwen3_omni_moe", "reformer"},
    b"position_ids.amax(": {"minicpmv4_7"},
    b"log1p(torch.floor": {"llama4"},
    b"torch.floor(position": {"ministral3", "mistral4"},
    b"token_dropout and": {"esm", "evolla"},
    b"log_scaling_n_floor": {"inkling", "inkling2", "inkling2_loop"},
}


def test_no_other_modeling_file_reads_a_length():
    """A new one is read by eye, and is exact or refused before it is added."""
    found: dict[bytes, set[str]] = {pattern: set() for pattern in READS_LENGTHS}
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        source = path.read_bytes()
        for pattern, names in found.items():
            if pattern in source:
                names.add(path.parent.name)
    assert all(found[pattern] <= names for pattern, names in READS_LENGTHS.items()), found


WHOLE_MODELS = {
    name: (f"{name.removesuffix('_text')}_thinker",) for name in ("qwen2_5_omni_text", "qwen3_omni_moe_text")
}


def text_model(kind: str) -> torch.nn.Module:
    if kind not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this version of transformers has no `{kind}`")
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind]()
    if type(config) not in MODEL_MAPPING:  # it is a part of another
        whole = next(name for name in WHOLE_MODELS.get(kind, (kind.removesuffix("_text"),)) if name in CONFIG_MAPPING)
        config = CONFIG_MAPPING[whole]()
        auto = AutoModel if type(config) in MODEL_MAPPING else AutoModelForMultimodalLM
        model = auto.from_config(shrink(config), dtype=torch.float32)
        parts = [part for part in model.modules() if getattr(part, "config", None) is not None]
        model = next(part for part in parts if part.config.model_type == kind and hasattr(part, "rotary_emb"))
    else:
        model = AutoModel.from_config(shrink(config), dtype=torch.float32)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("kind", sorted(families.POSITION_AXES))
def test_positions_have_a_plane_for_each_axis_or_one_more_for_the_text(kind):
    model = text_model(kind)
    rows, axes = ROW.repeat(3, 2), families.position_axes(model.config)
    tokens = rows.shape[1]
    counted = torch.arange(tokens).expand(3, -1)
    other = counted + 3 * torch.arange(axes).view(axes, 1, 1) * (counted > 2)

    def outputs(positions):
        with torch.no_grad():
            return model(input_ids=rows, position_ids=positions, use_cache=False)[0]

    expected, moved = outputs(counted), outputs(other)
    assert axes >= 3 and not torch.allclose(moved, expected), "every axis has a plane of its own"
    same = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(outputs(counted.expand(axes, 3, tokens)), expected, **same)
    if kind in families.NO_TEXT_PLANE:
        if kind != "cosmos3_edge_text":  # which takes it in later versions
            with pytest.raises(ValueError):
                outputs(counted.expand(axes + 1, 3, tokens))
        return
    torch.testing.assert_close(outputs(counted.expand(axes + 1, 3, tokens)), expected, **same)
    torch.testing.assert_close(outputs(torch.cat([counted[None], other])), moved, **same)


def test_only_models_of_the_table_have_planes_of_positions():
    """Of those that make a plane of text positions, all but those of two detectors, whose texts are short prompts."""
    folder = Path(transformers.__file__).parent / "models"
    found = {path.parent.name for path in folder.glob("*/modeling_*.py") if b"text_position_ids" in path.read_bytes()}
    known = {kind.removesuffix("_text") for kind in families.POSITION_AXES}
    assert found - known == {"grounding_dino", "mm_grounding_dino"}


MARKED = {
    "molmo2": "is required as a model input when training",
    "paligemma": None,  # without marks, tokens of unpadded rows see later ones
}


@pytest.mark.parametrize("kind", sorted(families.TEXT_MARKS))
def test_a_batch_of_text_says_so_where_the_model_asks(kind):
    assert MARKED.keys() == families.TEXT_MARKS.keys()
    if kind not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this version of transformers has no `{kind}`")
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(shrink(CONFIG_MAPPING[kind]()), attn_implementation="sdpa")
    rows = ROW.repeat(1, 2)
    marks = families.text_marks(model.config, rows)
    logits = [model(input_ids=ids, **marks).logits for ids in (rows, rows.clone().index_fill(1, torch.tensor([7]), 9))]
    torch.testing.assert_close(logits[0][:, :7], logits[1][:, :7])  # causal
    if MARKED[kind] is not None:
        with pytest.raises(ValueError, match=MARKED[kind]):
            model(input_ids=rows)
        return
    changed = rows.clone().index_fill(1, torch.tensor([7]), 9)
    assert not torch.allclose(model(input_ids=rows).logits[:, :7], model(input_ids=changed).logits[:, :7])


@pytest.mark.parametrize("kind", [*sorted(families.UNSHIFTED_LABELS), "llama"])
def test_labels_are_unshifted_where_the_table_says_so(kind):
    model = tiny(kind)
    outputs = model(input_ids=ROW, labels=ROW + 1)
    unshifted = torch.nn.functional.cross_entropy(outputs.logits[0], ROW[0] + 1)
    shifted = torch.nn.functional.cross_entropy(outputs.logits[0, :-1], ROW[0, 1:] + 1)
    expected = unshifted if families.expects_unshifted_labels(model.config) else shifted
    torch.testing.assert_close(outputs.loss, expected, msg=f"transformers changed the loss of `{kind}`")


FACTORS = [
    pytest.param(field, prefix, power, id=f"{prefix}-{field}")
    for table, power in ((families.LOGITS_MULTIPLIERS, 1), (families.LOGITS_DIVISORS, -1))
    for field, prefixes in table.items()
    for prefix in prefixes
]


@pytest.mark.parametrize(("field", "prefix", "power"), FACTORS)
def test_logits_are_scaled_by_the_field(field, prefix, power):
    kinds = [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind.startswith(prefix)]
    kinds = [kind for kind in kinds if hasattr(CONFIG_MAPPING[kind]().get_text_config(), field)]
    if not kinds:
        pytest.skip(f"this version of transformers has no model of the family {prefix}")
    config = shrink(CONFIG_MAPPING[kinds[0]]()).get_text_config()
    if getattr(config, field) in (None, 1.0):
        setattr(config, field, 2.0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        hidden = model.base_model(input_ids=ROW, use_cache=False)[0]
        plain, logits = model.get_output_embeddings()(hidden), model(input_ids=ROW, use_cache=False).logits
    factor = float(getattr(config, field)) ** power
    assert factor != 1
    torch.testing.assert_close(logits, plain * factor, rtol=1e-4, atol=1e-5)


def test_every_kind_of_sharded_layer_is_in_a_model_that_the_sweep_found_exact():
    """The proof itself is the sweep; here it is read."""
    models = json.loads(TABLE.read_text(encoding="utf-8"))["models"]
    exact = {m["type"] for m in models if all(rows["outcome"] == "exact" for rows in m["rows"])}
    kinds: set[str] = set()
    for name in sorted(exact & set(CONFIG_MAPPING_NAMES)):
        config = CONFIG_MAPPING[name]().get_text_config()
        kinds |= set(getattr(config, "layer_types", None) or ()) | set(getattr(config, "mlp_layer_types", None) or ())
    assert set(families.SHARDED_LAYERS) - kinds <= {"attention"}  # Jamba's, beside recurrent ones
    assert not {"linear_attention", "mamba", "conv"} & set(families.SHARDED_LAYERS)


def sources(kind: str) -> str:
    folder = Path(transformers.__file__).parent / "models"
    return "\n".join(path.read_text(encoding="utf-8") for path in folder.glob(f"*/{kind}_*.py"))


def test_fields_of_experts_and_names_of_multimodal_inputs_are_transformers_own():
    configurations, models = sources("configuration"), sources("modeling")
    for field in families.EXPERTS_PER_TOKEN:
        assert re.search(rf"\b{field}\b", configurations), field
    for name in set(families.MULTIMODAL_INPUTS) - (
        {"mm_encoder_outputs"} if "mm_encoder_outputs:" not in models else set()
    ):
        assert re.search(rf"^        \w*{name}\w*: ", models, re.MULTILINE), name


def model_types_in(source: str) -> set[str]:
    """Model types that stand in a table, a comparison or a call of `source`; words of messages are not meant."""
    types = set(CONFIG_MAPPING_NAMES)
    containers = (ast.Set, ast.Tuple, ast.List, ast.Dict, ast.Compare, ast.Call)
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, containers):
            children = [*getattr(node, "keys", ()), *ast.iter_child_nodes(node)]
            found |= {child.value for child in children if isinstance(child, ast.Constant) and child.value in types}
    return found


ELSEWHERE = {
    *(f"tasks/{name}.py" for name in ("indexer_warmup", "lsh_duplication", "recall_sparse", "sleep")),  # of toys
    *("config/lsh_settings.py", "attention/lsh_layouts.py", "attention/explain.py"),  # a layout is called so
    "proof/hints.py",  # how to make a configuration tiny; one line a type, proven by the sweep
    "proof/model_under_test.py",  # examples in a message
}


def test_nothing_else_lists_model_types():
    found = {
        path.relative_to(ROOT).as_posix(): types
        for path in ROOT.rglob("*.py")
        if (types := model_types_in(path.read_text(encoding="utf-8")))
    }
    assert found.keys() <= {"families.py", *ELSEWHERE}, found
    assert "families.py" in found


def test_the_reader_of_model_types_sees_them():
    assert model_types_in("X = {'bart'}\nif kind == 'marian': pass\nf('whisper')\nY = {'opt': 1}") == {
        "bart",
        "marian",
        "whisper",
        "opt",
    }
    assert model_types_in("raise ValueError(f'use llama')\nx = 'bart'") == set()
