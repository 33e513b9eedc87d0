"""The configs: valid from the moment they exist, and more dataclasses beside the libraries'."""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter

import pytest

from hf_longctx import LongContextConfig, MemoryConfig, SourcesConfig, TextsConfig
from hf_longctx.config.run import INNER_ATTENTIONS


CONFIGS = (LongContextConfig, MemoryConfig, SourcesConfig, TextsConfig)


def test_defaults_are_no_sharding_and_a_checked_model():
    config = LongContextConfig()
    assert (config.sequence_parallel_size, config.inner_attention) == (1, "auto")


@pytest.mark.parametrize("kind", CONFIGS)
def test_config_is_frozen_keyword_only_and_helps_on_the_command_line(kind):
    first, *_ = fields = dataclasses.fields(kind)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(kind(), first.name, 2)
    with pytest.raises(TypeError):
        kind(first.default)
    assert all(field.metadata.get("help") for field in fields)


@pytest.mark.parametrize("size", [1, 2, 3, 4096])
def test_positive_sizes_are_accepted(size):
    assert LongContextConfig(sequence_parallel_size=size).sequence_parallel_size == size


@pytest.mark.parametrize("size", [0, -1, True, False, "4", 2.0, None])
def test_size_that_is_no_positive_integer_is_refused_with_its_value_and_the_remedy(size):
    with pytest.raises(ValueError) as error:
        LongContextConfig(sequence_parallel_size=size)
    assert f"`sequence_parallel_size` ({size!r}) must be a positive integer" in str(error.value)
    assert "use 1 for no sharding" in str(error.value)


@pytest.mark.parametrize("name", [*INNER_ATTENTIONS, "kernels-community/flash-attn2", "org/name@v1"])
def test_known_and_hub_kernels_are_accepted(name):
    assert LongContextConfig(inner_attention=name).inner_attention == name


def test_promised_kernels_are_known():
    flash = {f"flash_attention_{version}" for version in (2, 3, 4)}
    assert {"auto", "sdpa", "eager", "flex_attention", *flash} <= set(INNER_ATTENTIONS)


@pytest.mark.parametrize("name", ["sdpaa", "ulysses", "", "a/b/c", None, 3])
def test_unknown_kernel_is_refused_with_its_value_and_the_choices(name):
    with pytest.raises(ValueError) as error:
        LongContextConfig(inner_attention=name)
    assert f"`inner_attention` ({name!r})" in str(error.value)
    assert all(choice in str(error.value) for choice in (*INNER_ATTENTIONS, "kernels-community/flash-attn2"))


@pytest.mark.parametrize("name", ["/", "org/", "/name"])
def test_half_a_hub_kernel_is_refused(name):
    with pytest.raises(ValueError, match="inner_attention"):
        LongContextConfig(inner_attention=name)


def test_replace_validates_again():
    with pytest.raises(ValueError, match="sequence_parallel_size"):
        dataclasses.replace(LongContextConfig(), sequence_parallel_size=0)


def shared_fields(kinds) -> list[str]:
    names = Counter(field.name for kind in kinds for field in dataclasses.fields(kind))
    return sorted(name for name, count in names.items() if count > 1)


@pytest.mark.parametrize("recipe", ["sft", "pretrain", "embed"])
def test_no_two_configs_that_a_recipe_parses_share_a_field(recipe):
    pytest.importorskip("trl")
    if recipe == "embed":
        pytest.importorskip("sentence_transformers")
    kinds = importlib.import_module(f"hf_longctx.tasks.{recipe}").ARGUMENTS
    assert len(set(CONFIGS) & set(kinds)) >= 2
    assert shared_fields(kinds) == []
    assert shared_fields((*kinds, kinds[0])) != []  # the check can fail


def test_no_field_is_one_of_another_config_or_of_trls_script():
    trl = pytest.importorskip("trl")
    assert shared_fields((*CONFIGS, trl.SFTConfig, trl.ScriptArguments)) == []
    assert shared_fields((*CONFIGS, trl.ModelConfig)) == []


@pytest.fixture
def parse(tmp_path):
    """A function from YAML text and command-line arguments to the parsed config."""
    trl = pytest.importorskip("trl")

    def parse(yaml: str, *arguments: str, kind=LongContextConfig):
        path = tmp_path / "run.yaml"
        path.write_text(yaml)
        (config,) = trl.TrlParser((kind,)).parse_args_and_config(["--config", str(path), *arguments])
        return config

    return parse


def test_yaml_round_trip(parse):
    config = parse("sequence_parallel_size: 4\ninner_attention: sdpa\n")
    assert config == LongContextConfig(sequence_parallel_size=4, inner_attention="sdpa")


def test_command_line_overrides_yaml_and_the_rest_keeps_its_default(parse):
    config = parse("sequence_parallel_size: 4\n", "--sequence_parallel_size", "2")
    assert config == LongContextConfig(sequence_parallel_size=2)


def test_yaml_value_is_validated(parse):
    with pytest.raises(ValueError, match=r"`sequence_parallel_size` \(0\)"):
        parse("sequence_parallel_size: 0\n")


def test_misspelled_yaml_key_raises(parse):
    with pytest.raises(ValueError, match="sequence_paralel_size"):
        parse("sequence_paralel_size: 4\n")


def test_a_yaml_is_flat_and_a_key_of_another_recipe_raises(tmp_path):
    trl = pytest.importorskip("trl")
    path = tmp_path / "run.yaml"
    parser = trl.TrlParser((LongContextConfig, MemoryConfig))
    path.write_text("sequence_parallel_size: 2\nmemory: max\n")
    assert parser.parse_args_and_config(["--config", str(path)]) == (
        LongContextConfig(sequence_parallel_size=2),
        MemoryConfig(memory="max"),
    )
    path.write_text("memory: max\ndeduplicate: true\n")
    with pytest.raises(ValueError, match="deduplicate"):
        parser.parse_args_and_config(["--config", str(path)])


@pytest.mark.parametrize("steps", [-1, 2.5, True, "100"])
def test_interval_that_is_no_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match="`check_replicas` .* or 0 for never"):
        LongContextConfig(check_replicas=steps)


def test_unknown_policy_for_steps_that_are_not_finite_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="`on_nonfinite` \\('ignore'\\) must be one of raise, skip, stop, off"):
        LongContextConfig(on_nonfinite="ignore")


SOURCES = {"source_weights": {"nli": 1, "docs": 4.5}, "source_caps": {"docs": 1000}, "sources_per_batch": 2}


def test_sources_survive_yaml_and_are_json_on_the_command_line(parse):
    wanted = SourcesConfig(**SOURCES, swap_probability=0.5, deduplicate=True, balance_by="tokens")
    yaml = "source_weights: {nli: 1, docs: 4.5}\nsource_caps:\n  docs: 1000\nsources_per_batch: 2\n"
    more = "swap_probability: 0.5\ndeduplicate: true\nbalance_by: tokens\n"
    assert parse(yaml + more, kind=SourcesConfig) == wanted
    over = parse(yaml, "--source_weights", '{"nli": 2, "docs": 1}', kind=SourcesConfig)
    assert over.source_weights == {"nli": 2, "docs": 1} and over.source_caps == {"docs": 1000}
    assert parse("source_temperature: 2.0\n", kind=SourcesConfig).source_temperature == 2.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source_weights": {"nli": 0}}, "`source_weights` gives the source `nli` 0, but it must be a number over 0"),
        ({"source_weights": {"nli": -1.0}}, "gives the source `nli` -1.0"),
        ({"source_weights": {"nli": float("nan")}}, "gives the source `nli` nan"),
        ({"source_weights": {"nli": True}}, "gives the source `nli` True"),
        ({"source_weights": {}}, "`source_weights` ({}) must map at least one name of a source to a number"),
        ({"source_weights": "nli=1"}, "`source_weights` ('nli=1') is no JSON object: write it like"),
        ({"source_weights": "[1]"}, "`source_weights` ([1]) must map at least one name"),
        ({"source_caps": {"nli": 2.5}}, "`source_caps` gives the source `nli` 2.5, but it must be a whole number"),
        ({"source_caps": {"nli": 0}}, "it must be a whole number of rows, at least 1"),
        ({"source_temperature": 0.0}, "`source_temperature` (0.0) must be a number over 0"),
        ({"source_temperature": -2}, "`source_temperature` (-2) must be a number over 0"),
        (
            {"source_temperature": 2.0, "source_weights": {"nli": 1}},
            "`source_weights` and `source_temperature` (2.0) both say how often a source is drawn",
        ),
        ({"sources_per_batch": 0}, "`sources_per_batch` (0) must be a whole number of sources, at least 1"),
        ({"sources_per_batch": 1.5}, "`sources_per_batch` (1.5)"),
        ({"swap_probability": 1.01}, "`swap_probability` (1.01) must lie between 0 (never) and 1 (always)"),
        ({"swap_probability": -0.1}, "`swap_probability` (-0.1)"),
        ({"tokens_per_rank": 0}, "`tokens_per_rank` (0) must be a positive integer"),
    ],
)
def test_sources_that_no_run_could_draw_are_refused(fields, message):
    with pytest.raises(ValueError) as error:
        SourcesConfig(**fields)
    assert message in str(error.value)
