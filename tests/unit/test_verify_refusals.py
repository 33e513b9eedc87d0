"""The messages of `hf-longctx verify`, one by one: what it cannot build, find or take."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as tf

from hf_longctx.parallel.mesh import SequenceMesh
from hf_longctx.proof.build import build_model
from hf_longctx.proof.compare import Pair
from hf_longctx.proof.model_under_test import ModelUnderTest, Setting, read_config, validate_task
from hf_longctx.proof.numbers import of_one_process
from hf_longctx.proof.random_rows import make_rows
from hf_longctx.proof.tiny import CannotShrink, shrink, validate_tiny
from hf_longctx.proof.verification import verify


def test_a_configuration_that_stays_large_names_its_largest_field():
    config = tf.LlamaConfig(number_of_unheard_things=7_000_000)
    with pytest.raises(
        CannotShrink,
        match=r"cannot be made tiny: it still has 9,000,000,000 parameters, and its largest number is "
        r"`number_of_unheard_things` \(7,000,000\), a field that is not known to be a size: pass a configuration",
    ):
        validate_tiny(shrink(config), 9_000_000_000)


class Picky(tf.LlamaConfig):
    complaint = ""

    @classmethod
    def from_dict(cls, values, **_):
        raise ValueError(cls.complaint)


def test_a_configuration_that_the_host_rejects_names_the_field(monkeypatch):
    monkeypatch.setattr(Picky, "complaint", "`rms_norm_eps` does not suit me")
    with pytest.raises(CannotShrink, match="cannot be made tiny at `rms_norm_eps`: .*does not suit me"):
        shrink(Picky())


def test_a_configuration_that_the_host_rejects_without_a_field_names_the_error(monkeypatch):
    monkeypatch.setattr(Picky, "complaint", "it does not suit me")
    with pytest.raises(CannotShrink, match=r"cannot be made tiny \(ValueError\): it does"):
        shrink(Picky())


def test_an_encoder_that_pools_its_rows_has_no_numbers():
    class Pools(torch.nn.Module):
        config = tf.BertConfig()

        def forward(self, input_ids, **_):
            return (torch.ones(len(input_ids), 5),)

    with pytest.raises(ValueError, match=r"it answers with \(2, 5\), not with one vector a token"):
        of_one_process(Pools(), "encoder", make_rows("dense", "encoder", 128, 1, 23, 10, False))


def test_a_model_whose_documents_see_each_other_cannot_train_on_packed_rows():
    """An encoder on transformers' own attention ignores where documents end."""
    tested = ModelUnderTest.of(tf.BertConfig(), None, 1)
    pair = SimpleNamespace(
        model=build_model(tested, None, torch.float32), setting=Setting(1), mesh=SequenceMesh.build(1)
    )
    with pytest.raises(NotImplementedError, match="`BertForMaskedLM` cannot train on packed rows: .*see each other"):
        Pair._check_documents(pair, make_rows("packed", tested.task, 128, 1, 23, 10, True))


def test_a_setting_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"`wrapper` \('fsdp'\) must be one of none"):
        Setting(wrapper="fsdp")


def test_a_task_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"`task` \('chat'\) must be one of .*, or unset"):
        validate_task("chat")


def test_a_damaged_configuration_is_told(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"cannot be read \(.*\): check the file"):
        read_config(str(tmp_path))


def test_full_needs_weights():
    with pytest.raises(ValueError, match="`full` .True. needs weights"):
        verify(tf.LlamaConfig(), full=True)
