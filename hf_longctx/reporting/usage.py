"""How to use a trained model: what it is for, what it needs to run, and lines of Python that run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


# How class names end, what such a model is for on the Hub, and the class that loads it.
_KINDS = (
    ("ForCausalLM", "text-generation", "AutoModelForCausalLM"),
    ("LMHeadModel", "text-generation", "AutoModelForCausalLM"),
    ("ForSequenceClassification", "text-classification", "AutoModelForSequenceClassification"),
    ("ForTokenClassification", "token-classification", "AutoModelForTokenClassification"),
    ("ForMaskedLM", "fill-mask", "AutoModelForMaskedLM"),
    ("ForQuestionAnswering", "question-answering", "AutoModelForQuestionAnswering"),
)
_IMAGES = ("image-text-to-text", "AutoModelForImageTextToText")
_OWN_KEYS = "hf_longctx_"  # settings of this package in a model's configuration, and what puts them on again
_PUT_ON = {
    "hf_longctx_alibi": "hf_longctx.use_alibi(model)",
    "hf_longctx_reversible": "hf_longctx.make_reversible(model)",
    "hf_longctx_axial": "hf_longctx.use_axial_positions(model, *model.config.hf_longctx_axial)",
    "hf_longctx_embedding_norm": "hf_longctx.add_embedding_norm(model)",
}
_ATTENTION = {"hf_longctx_lsh": "lsh", "hf_longctx_alibi": "packed"}  # which computes it

_LOAD = """\
from transformers import {loader}{tokenizer_class}

name = "{name}"  # or the folder that this card is in
{tokenizer}model = {loader}.from_pretrained(name, dtype="auto"{attention})"""
_GENERATE = """
inputs = tokenizer("{text}", return_tensors="pt")
output = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
_CHAT = """
messages = [{{"role": "user", "content": "{text}"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
_SCORE = """
inputs = tokenizer("{text}", return_tensors="pt")
print(model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits)"""
_FAST_WEIGHTS = """\
from hf_longctx import TTTForCausalLM
from transformers import AutoTokenizer

name = "{name}"  # or the folder that this card is in
tokenizer = AutoTokenizer.from_pretrained(name)
model = TTTForCausalLM.from_pretrained(name)
memory = model.read(tokenizer("{text}", return_tensors="pt").input_ids)  # of one size, however much it reads
question = tokenizer("{text}", return_tensors="pt").input_ids
output = model.generate(question, cache=memory.copy(), learn=False, max_new_tokens=64)
print(tokenizer.decode(output[0]))"""
_FAST_ADAPTER = """\
from hf_longctx import TTTForCausalLM

model = TTTForCausalLM.from_pretrained(base)  # then, for an adapter, `PeftModel.from_pretrained(model, "{name}")`
memory = model.read(input_ids)  # of one size
model.generate(question_ids, cache=memory.copy(), learn=False)"""
_TEXT = "The history of the long text"


def config_of(model: Any) -> Any:
    """The configuration of a model of transformers, in an adapter or in a sentence-transformer; `None` without one."""
    config = getattr(model, "config", None)
    if config is None and hasattr(model, "model_card_data"):
        config = getattr(getattr(model[0], "model", None), "config", None)
    return config


def kind_of(model: Any) -> dict[str, Any]:
    """What a card says of a model without its folder: its type, its task, and what it needs."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = config_of(inner)
    return {
        "model_type": getattr(config, "model_type", None),
        "pipeline_tag": _task(type(inner).__name__, config),
        "own_settings": sorted(key for key in vars(config) if key.startswith(_OWN_KEYS)) if config else [],
    }


def _task(name: str, config: Any) -> str | None:
    if name.endswith("ForConditionalGeneration"):
        return _IMAGES[0] if getattr(config, "vision_config", None) is not None else None
    return next((task for ending, task, _ in _KINDS if name.endswith(ending)), None)


def usage(folder: Path, metrics: dict[str, Any]) -> str | None:
    """Python that loads and runs the model that was saved into `folder`; `None` where none was."""
    is_adapter = (folder / "adapter_config.json").is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        return None
    fields = {"name": metrics.get("hub_model_id") or metrics["name"], "text": _TEXT}
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    if metrics.get("fast_weights"):
        return (_FAST_WEIGHTS if has_tokenizer and not is_adapter else _FAST_ADAPTER).format(**fields)
    task = metrics.get("pipeline_tag")
    loader = next((loader for _, known, loader in _KINDS if known == task), "AutoModel")
    if task == _IMAGES[0]:
        loader = _IMAGES[1]
    own = metrics.get("own_settings") or []
    attention = next((_ATTENTION[key] for key in own if key in _ATTENTION), None)
    source = "name" if has_tokenizer else repr(metrics["base_model"]) if metrics.get("base_model_id") else None
    lines = _LOAD.format(
        **fields,
        loader=loader,
        tokenizer_class=", AutoTokenizer" if source else "",
        attention=f', attn_implementation="{attention}"' if attention else "",
        tokenizer=f"tokenizer = AutoTokenizer.from_pretrained({source})\n" if source else "",
    )
    if own:
        lines = "\n".join([f"import hf_longctx\n{lines}", *(_PUT_ON[key] for key in own if key in _PUT_ON)])
    if source and task == "text-generation":
        lines += (_CHAT if _has_chat_template(folder) else _GENERATE).format(**fields)
    elif source and task in ("text-classification", "token-classification", "fill-mask"):
        lines += _SCORE.format(**fields)
    return lines


def needs(folder: Path, metrics: dict[str, Any]) -> list[str]:
    """The packages without which the saved model does not run as it was trained."""
    packages = ["hf_longctx" if metrics.get("fast_weights") or metrics.get("own_settings") else "transformers"]
    if (folder / "adapter_config.json").is_file():
        packages.append("peft")
    return packages


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(settings.get("chat_template"))
