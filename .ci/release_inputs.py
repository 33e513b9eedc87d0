"""What the smoke test of a release works on, in the folder that is its argument: tiny models and some rows of text."""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


TEXT = "She opened the window and looked at the sea; a ship went by, slow and grey. "
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[UNK]", "[PAD]", "[EOS]", "[CLS]", "[SEP]"]
    backend.train_from_iterator([TEXT], trainers.WordLevelTrainer(special_tokens=special))
    names = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", model_max_length=512, **names
    )


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(folder: Path) -> None:
    tokenizer = make_tokenizer()
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    llama = LlamaConfig(**SIZES, **vocabulary, num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id)
    LlamaForCausalLM(llama).save_pretrained(folder / "model")
    BertModel(BertConfig(**SIZES, **vocabulary)).save_pretrained(folder / "encoder")
    LlamaConfig(num_hidden_layers=4).save_pretrained(folder / "large")  # its configuration alone
    for name in ("model", "encoder"):
        tokenizer.save_pretrained(folder / name)
    (folder / "model" / "README.md").write_text("---\nlicense: mit\n---\n# A tiny model\n", encoding="utf-8")
    (folder / "documents" / "part two").mkdir(parents=True)
    for number in range(6):
        place = folder / "documents" / ("part two" if number % 2 else "")
        (place / f"chapter {number}.md").write_text(TEXT * (4 + 5 * number), encoding="utf-8")
    words = TEXT.split()
    pairs = [(" ".join(words[: 2 + i % 9]), " ".join(words[i % 9 : 12])) for i in range(24)]
    write_rows(folder / "texts.jsonl", [{"text": TEXT * (1 + i % 5)} for i in range(24)])
    write_rows(folder / "pairs.jsonl", [{"anchor": first, "positive": second} for first, second in pairs])
    rows = [{"prompt": first, "chosen": f" {second}", "rejected": " the sea"} for first, second in pairs]
    write_rows(folder / "preferences.jsonl", rows)
    rows = [
        {"prompt": first, "completion": f" {second}", "label": i % 2 == 0} for i, (first, second) in enumerate(pairs)
    ]
    write_rows(folder / "labelled.jsonl", rows)
    (folder / "script.py").write_text("import hf_longctx\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
