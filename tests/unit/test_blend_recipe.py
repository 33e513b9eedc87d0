"""The recipe that trains on a blend, at a size of seconds, and the settings that it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from hf_longctx import add_embedding_norm
from hf_longctx.tasks import pretrain
from hf_longctx.tasks.blend_inputs import BlendArguments, read_blend, read_weights
from hf_longctx.tasks.inputs import RecipeArguments


CONFIG = str(Path(__file__).parents[2] / "recipes" / "pretrain_blend.yaml")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blend")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=["[EOS]"], initial_alphabet=alphabet)
    backend.train_from_iterator(["a text"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[EOS]").save_pretrained(folder / "model")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(vocab_size=260, eos_token_id=0, **sizes).save_pretrained(folder / "model")
    for name, count in (("code", 40), ("books", 9)):
        (folder / name).mkdir()
        (folder / name / "one.py").write_text(f"The {name} of a reader. " * count)
    return folder


def test_a_recipe_trains_on_a_blend_with_a_norm_and_says_what_it_read(inputs, tmp_path, monkeypatch):
    words = {
        "model_name_or_path": [str(inputs / "model")],
        "gguf_file": [""],
        "blend_sources": [f"code={inputs / 'code'}", f"books={inputs / 'books'}"],
        "blend_weights": ["code=0.3 books=0.7", "code=1"],
        "blend_rows": ["10", "2"],
        "row_tokens": ["32"],
        "max_steps": ["6"],
        "sequence_parallel_size": ["1"],
        "output_dir": [str(tmp_path)],
        "num_eval_documents": ["0"],
        "disable_tqdm": ["true"],
        "overwrite_output_dir": ["true"],
    }
    argv = [word for name, values in words.items() for word in (f"--{name}", *values)]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config", CONFIG, *argv])
    pretrain.main()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {name: read["rows"] for name, read in metrics["sources"].items()} == {"code": 5, "books": 7}
    assert metrics["sources"]["code"]["tokens"] == 5 * 32 and metrics["dataset"] == "a blend of code, books"
    card = (tmp_path / "README.md").read_text()
    assert "| code | 5 | " in card and "## Data" in card
    assert next((tmp_path / "blend").glob("blend-*/rows.npy")).is_file()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    add_embedding_norm(model)
    assert model.get_input_embeddings().embedding_norm.weight.std() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blend_weights": ["c=1"]}, "`blend_weights` names the source `c`, but `blend_sources` has a, b"),
        ({"blend_weights": ["a=x b=1"]}, "`blend_weights` gives `a` the weight 'x', which is no number"),
        ({"blend_weights": ["a=1"]}, "`blend_weights` has no weight for the source `b`"),
        ({"blend_weights": ["a 1"]}, "`blend_weights` has 'a', which is not a name and a value"),
        ({"blend_weights": ["a=1 a=2 b=1"]}, "`blend_weights` names `a` twice"),
    ],
)
def test_weights_that_do_not_fit_the_sources_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        read_weights(BlendArguments(**settings), ["a", "b"])


def test_unset_weights_are_alike_and_two_ways_to_name_data_are_refused():
    assert read_weights(BlendArguments(), ["a", "b"]) == [{"a": 1.0, "b": 1.0}]
    blend = BlendArguments(blend_sources=["a=stdlib:"])
    with pytest.raises(ValueError, match="`dataset_name` .'stdlib:'. and `blend_sources` both say what is read"):
        read_blend(blend, RecipeArguments(dataset_name="stdlib:"), None, None)
    for rows, message in (([5, 5], "has 2 numbers for 1 blends"), ([0], "must be a positive number of rows")):
        with pytest.raises(ValueError, match=rf"`blend_rows` \(.*\) {message}"):
            read_blend(BlendArguments(blend_sources=["a=stdlib:"], blend_rows=rows), RecipeArguments(), None, None)
    with pytest.raises(ValueError, match="`dataset_streaming` reads rows as they come"):
        read_blend(blend, RecipeArguments(dataset_streaming=True), None, None)
