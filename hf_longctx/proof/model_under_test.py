"""What is proven, and how: plain facts that travel to the ranks.

Reading a name needs neither torch nor, for a model type, a network.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.lsh_settings import LSH, LSH_KEY, LSHConfig
from ..config.run import LongContextConfig, validate_inner_attention
from ..config.test_time import FAST_WEIGHTS
from ..data.model_files import check_model_files
from ..families import expects_unshifted_labels
from .hints import LAYER_KINDS
from .tiny import CannotShrink, shrink, without_dropout


if TYPE_CHECKING:
    from transformers import PretrainedConfig

TASKS = ("causal-lm", "masked-lm", "multimodal-lm", "encoder", "embedding", "dpo", "reward")
KINDS = ("dense", "even", "padded", "packed")
EMBEDDING_KINDS = ("packed", "shared")
# Rows of pairs; with an adapter, and without padding where the loss is one over tokens.
REWARD_KINDS = (*KINDS[:3], "lora")
DPO_KINDS = (*REWARD_KINDS, "flattened")
WRAPPERS = ("none", "ddp", "fsdp2")
DTYPES = ("float32", "float64")
# Inside tiny rows, so that tokens meet some of the others.
_TINY_LSH: dict[str, int] = {"num_hashes": 2, "window": 4, "num_buckets": 2}
_UNREADABLE = (OSError, ValueError, KeyError)  # what transformers raises for a configuration


@dataclass(frozen=True)
class Setting:
    """How a model is shared.

    Args:
        sequence_parallel_size (`int`), data_parallel_size (`int`): ranks of a row, and groups of them.
        inner_attention (`str`): see [`LongContextConfig`].
        kinds (`tuple[str, ...]`): kinds of rows, in order; `"dense"` comes first.
        wrapper (`str`): `"none"`, `"ddp"` or `"fsdp2"`: who averages gradients.
        dtype (`str`): `"float32"`, in which what exceeds its tolerance is decided in float64, or `"float64"`.

    Raises:
        ValueError: a value that no proof could use.
    """

    sequence_parallel_size: int = 2
    data_parallel_size: int = 1
    inner_attention: str = "auto"
    kinds: tuple[str, ...] = KINDS[:3]
    wrapper: str = "none"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        LongContextConfig(sequence_parallel_size=self.sequence_parallel_size)
        groups = self.data_parallel_size
        if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
            raise ValueError(f"`data_parallel_size` ({groups!r}) must be a positive integer, a number of groups.")
        validate_inner_attention(self.inner_attention)
        for name, choices in (("wrapper", WRAPPERS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                hint = "; half precision rounds too much to prove anything" if name == "dtype" else ""
                raise ValueError(f"`{name}` ({getattr(self, name)!r}) must be one of {', '.join(choices)}{hint}.")
        if self.wrapper != "none" and self.world_size == 1:
            raise ValueError(
                f"`wrapper` ({self.wrapper!r}) averages gradients over several processes, but there is 1: set "
                "`data_parallel_size` or `sequence_parallel_size` to 2, or `wrapper` to 'none'."
            )

    @property
    def world_size(self) -> int:
        return self.sequence_parallel_size * self.data_parallel_size


@dataclass(frozen=True)
class ModelUnderTest:
    """A model to prove.

    Args:
        name (`str`): model type.
        task (`str`): `"causal-lm"`, `"masked-lm"`, `"multimodal-lm"` (on text alone), `"encoder"`, `"embedding"`,
            `"dpo"` or `"reward"`.
        config (`PretrainedConfig`, *optional*): to build with; `None` if there is no tiny one.
        original (`PretrainedConfig`): as it was given.
        weights (`str`, *optional*): hub id or folder whose weights are taken, instead of random ones.
        problem (`str`): why there is no tiny one.
    """

    name: str
    task: str
    config: PretrainedConfig | None
    original: PretrainedConfig
    weights: str | None = None
    problem: str = ""

    @property
    def shifts_labels(self) -> bool:
        """Whether labels are the inputs, of which each predicts the next."""
        if self.task == "dpo":  # TRL's head does, whatever the model's own loss does
            return True
        return self.task in ("causal-lm", "multimodal-lm") and not expects_unshifted_labels(self.original)

    @classmethod
    def of(
        cls,
        config: PretrainedConfig,
        task: str | None,
        sequence_parallel_size: int,
        weights: str | None = None,
        inner_attention: str = "auto",
    ) -> ModelUnderTest:
        """The tiny model of a configuration, or the model itself where `weights` are given."""
        name = getattr(config, "model_type", "") or type(config).__name__
        chosen = task or task_of(config)
        config = copy.deepcopy(config)
        if chosen in ("causal-lm", "dpo") and getattr(config, "is_decoder", None) is False:
            config.is_decoder = True  # as transformers requires for such an encoder that predicts the next token
        lsh = LSHConfig.of_model(config.get_text_config())
        if lsh is None and inner_attention == LSH:
            lsh = LSHConfig()
            setattr(config.get_text_config(), LSH_KEY, lsh.to_dict())
        original = copy.deepcopy(config)
        if weights is not None:
            return cls(name, chosen, without_dropout(config), original, weights)
        try:
            tiny = shrink(config, sequence_parallel_size)
            if lsh is not None:
                setattr(tiny.get_text_config(), LSH_KEY, {**lsh.to_dict(), **_TINY_LSH})
            return cls(name, chosen, tiny, original)
        except CannotShrink as error:
            return cls(name, chosen, None, original, problem=str(error))


def validate_task(task: str | None, bidirectional: bool = False) -> None:
    """Raise `ValueError` for a task that is none, or `ImportError` for one whose library is not installed."""
    if task is not None and task not in TASKS:
        raise ValueError(f"`task` ({task!r}) must be one of {', '.join(TASKS)}, or unset.")
    if bidirectional and task != "embedding":
        raise ValueError(
            f"`bidirectional` ({bidirectional}) lets a decoder see later tokens, which a language model is to predict:"
            " set `task` to 'embedding', or drop `bidirectional`."
        )
    if task == "embedding" and importlib.util.find_spec("sentence_transformers") is None:
        raise ImportError("`task` ('embedding') needs sentence-transformers: `pip install hf-longctx[embedding]`.")
    if task in ("dpo", "reward") and not all(importlib.util.find_spec(name) for name in ("trl", "peft")):
        raise ImportError(f"`task` ({task!r}) needs TRL and PEFT: `pip install hf-longctx[trl]`.")


def kinds_of_task(task: str | None, packed: bool) -> tuple[str, ...]:
    """The kinds of rows that are compared for a task; `packed` adds those that hold several documents."""
    if task == "embedding":
        return EMBEDDING_KINDS
    if task == "reward":
        return REWARD_KINDS
    kinds = DPO_KINDS if task == "dpo" else KINDS
    return kinds if packed else kinds[:-1]


def task_of(config: PretrainedConfig) -> str:
    """What the model is for: as its `architectures` say, else masked before causal before multimodal language model
    before encoder.

    Raises:
        ValueError: transformers has no text model of this type.
    """
    from transformers.models.auto import modeling_auto

    causal, masked, multimodal = (
        dict(getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES"))
        for name in ("CAUSAL_LM", "MASKED_LM", "MULTIMODAL_LM")
    )
    kind = config.model_type
    said = set(getattr(config, "architectures", None) or ())
    for task, mapping in (("causal-lm", causal), ("masked-lm", masked), ("multimodal-lm", multimodal)):
        if mapping.get(kind) in said:
            return task
    if kind in masked and not getattr(config, "is_encoder_decoder", False):
        return "masked-lm"
    if kind in causal:
        return "causal-lm"
    if kind in masked:
        return "masked-lm"
    if kind in multimodal:
        return "multimodal-lm"
    if kind in modeling_auto.MODEL_MAPPING_NAMES and hasattr(config.get_text_config(), "vocab_size"):
        return "encoder"
    raise ValueError(
        f"transformers has no text model of type `{kind}`: give a causal, masked or multimodal language model, or an "
        "encoder."
    )


def read_config(model: str) -> PretrainedConfig:
    """The configuration of a folder, a model type or a hub id.

    Raises:
        ValueError: it is none of them, or cannot be read; the message says what to try.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    path = _transformer_folder(Path(model).expanduser())
    if os.path.lexists(path):
        if path.is_dir() and not os.path.lexists(path / "config.json"):
            raise ValueError(f"the folder `{model}` has no config.json: give a folder that `save_pretrained` wrote.")
        try:
            check_model_files(path)
            return AutoConfig.from_pretrained(str(path))
        except _UNREADABLE as error:
            if FAST_WEIGHTS in str(error):  # the file is whole
                raise
            raise ValueError(f"`{model}` cannot be read ({_reason(error)}): check the file.") from error
    if model in CONFIG_MAPPING_NAMES:
        return default_config(model)
    known = list(CONFIG_MAPPING_NAMES)
    nearest = _nearest(model, known)
    is_plain = os.sep not in model and "/" not in model
    if is_plain and (model.lower() in known or difflib.get_close_matches(model, known, 1, cutoff=0.8)):
        raise ValueError(f"`{model}` is neither a folder nor a model type: did you mean {nearest}?")
    try:
        return AutoConfig.from_pretrained(model)
    except _UNREADABLE as error:
        raise ValueError(
            f"`{model}` is neither a folder nor a model type, and the Hub did not give its configuration "
            f"({_reason(error)}): check the name and the connection, or verify its model type without them, such as "
            f"{nearest}."
        ) from error


def default_config(model_type: str) -> PretrainedConfig:
    """The configuration of a type that is only named, with every kind of layer that its released models have."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[model_type]()
    except StrictDataclassError as error:
        raise ValueError(
            f"`{model_type}` has no default configuration that is valid ({_reason(error.__cause__ or error)}): "
            "verify a folder with its `config.json`."
        ) from error
    text = config.get_text_config()
    for field, kinds in LAYER_KINDS.get(text.model_type, {}).items():
        layers = text.num_hidden_layers
        setattr(text, field, kinds if isinstance(kinds[0], int) else (kinds * layers)[:layers])
    return config


def _transformer_folder(path: Path) -> Path:
    """The folder of the transformer in a sentence-transformer, which may be one below."""
    modules = path / "modules.json"
    if not modules.is_file() or (path / "config.json").is_file():
        return path
    try:
        return path / json.loads(modules.read_text())[0]["path"]
    except (ValueError, LookupError, TypeError):
        return path


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _nearest(model: str, known: list[str]) -> str:
    """Model types that a name may mean: those that it begins with, else those that look like it."""
    name = model.rsplit("/", 1)[-1].lower()
    plain = lambda text: text.lower().replace("-", "").replace("_", "").replace(".", "")
    prefixes = sorted((kind for kind in known if plain(name).startswith(plain(kind))), key=len, reverse=True)
    similar = difflib.get_close_matches(name, known, 3, 0.5)
    found = prefixes[:1] + [kind for kind in similar if kind not in prefixes[:1]]
    return " or ".join(f"`{kind}`" for kind in (found or ["qwen3", "bert"])[:3])
