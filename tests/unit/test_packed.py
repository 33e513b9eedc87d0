"""Packed rows equal documents taken one by one, and a padded batch: loss and every gradient, on one process.

The oracle is the stock kernel, one document at a time. Errors are relative to the largest entry of a tensor, or to a
part of the model's largest gradient where that is more (a tenth in float32, a hundredth in float64): gradients of
queries and keys are small differences of large sums, and the bias of keys has none in exact arithmetic. In float64
errors stay under 1e-6, which is the host's own casts of norms and losses to float32. In float32 a gradient is a sum
over some hundred tokens taken in another order: 1e-6, and 3e-6 where experts, BERT's layer norms or windows add sums.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import hf_longctx
from hf_longctx import PackingCollator, explain_attention
from hf_longctx.attention import kernels
from hf_longctx.attention.packed import packed_attention
from hf_longctx.parallel.shard import cut_batch

from ..models import MASKED_LM, VOCAB, build
from ..training import pad_right


STOCK = {"gemma2": "eager", "gpt_oss": "eager"}
LENGTHS = {
    "ragged": (9, 1, 13, 40, 2, 9),
    "single tokens": (1,) * 12,
    "64 documents": tuple(3 + index % 5 for index in range(64)),
    "one document": (23,),
}


def documents_of(lengths, name: str = "llama", seed: int = 1) -> list[dict]:
    """Random documents with labels; half of the tokens of a masked language model are trained."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        labels = ids.clone()
        if name in MASKED_LM:
            labels[torch.rand(length, generator=generator) < 0.5] = -100
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


def pack(documents: list[dict], name: str = "llama") -> dict:
    batch = PackingCollator(mask_first_label=name not in MASKED_LM)(documents)
    return batch if name in MASKED_LM else {**batch, "use_cache": False}


def sum_of_losses(logits: torch.Tensor, labels: torch.Tensor, name: str) -> torch.Tensor:
    if name not in MASKED_LM:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


def weights_like(logits: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)).to(logits)


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def one_by_one(name: str, documents: list[dict], dtype: torch.dtype = torch.float32):
    """Logits in order, gradients of a random projection of them, the summed loss and its gradients."""
    model = build(name, STOCK.get(name, "sdpa"), dtype).eval()
    inputs = [torch.tensor([document["input_ids"]]) for document in documents]
    logits = [model(input_ids=ids).logits for ids in inputs]
    whole = torch.cat(logits, dim=1)
    (whole * weights_like(whole, 7)).sum().backward(retain_graph=True)
    projected = gradients(model)
    loss = sum(
        sum_of_losses(part, torch.tensor([document["labels"]]), name) for part, document in zip(logits, documents)
    )
    loss.backward()
    return whole.detach(), projected, loss.detach(), gradients(model)


def packed(name: str, batch: dict, dtype: torch.dtype = torch.float32):
    model = build(name, "packed", dtype).eval()
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    (logits * weights_like(logits, 7)).sum().backward(retain_graph=True)
    projected = gradients(model)
    loss = sum_of_losses(logits, batch["labels"], name)
    loss.backward()
    return logits.detach(), projected, loss.detach(), gradients(model)


def assert_same(actual, expected, tolerance: float) -> None:
    assert_close(actual[0], expected[0], tolerance, "logits")
    assert_close(actual[2], expected[2], tolerance, "loss")
    for kind, ours, theirs in (("upstream", actual[1], expected[1]), ("loss", actual[3], expected[3])):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert_close(ours[name], theirs[name], tolerance, f"{kind} gradient of {name}", floor_of(theirs))


def floor_of(gradients: dict[str, torch.Tensor]) -> float:
    double = next(iter(gradients.values())).dtype == torch.float64
    return max((0.01 if double else 0.1) * max(float(gradient.abs().max()) for gradient in gradients.values()), 1e-3)


def assert_close(actual, expected, tolerance: float, what: str, floor: float = 1e-3) -> None:
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=floor)
    assert torch.isfinite(actual).all() and error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


EXACT_IN_FLOAT32 = ("llama", "gpt2", "qwen3")
MODELS = ["llama", "gpt2", "qwen3", "mistral", "gemma2", "gpt_oss", "llama4", "deepseek_v3", "bert", "modernbert"]


@pytest.mark.parametrize("layout", LENGTHS)
@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_equal_separate_documents(name, layout):
    documents = documents_of(LENGTHS[layout], name)
    tolerance = 1e-6 if name in EXACT_IN_FLOAT32 else 3e-6
    assert_same(packed(name, pack(documents, name)), one_by_one(name, documents), tolerance)


@pytest.mark.parametrize("layout", ["ragged", "64 documents"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in (*STOCK, "llama4")])
def test_packed_rows_equal_separate_documents_in_float64(name, layout):
    documents = documents_of(LENGTHS[layout], name)
    expected = one_by_one(name, documents, torch.float64)
    assert_same(packed(name, pack(documents, name), torch.float64), expected, 1e-6)


def loss_and_gradients(model, batch: dict):
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("name", ["llama", "mistral", "bert", "modernbert"])
def test_packed_batch_has_the_loss_and_gradients_of_a_padded_one(name):
    documents = documents_of((9, 1, 13, 40, 2, 9), name)
    if name not in MASKED_LM:  # the label of a first token is never predicted: neither batch may count it
        documents = [{**document, "labels": [-100, *document["labels"][1:]]} for document in documents]
    padded = pad_right(documents)
    expected = loss_and_gradients(build(name, "sdpa").eval(), padded)
    actual = loss_and_gradients(build(name, "packed").eval(), pack(documents, name))
    assert_close(actual[0], expected[0], 1e-6, "loss")
    for key, gradient in expected[1].items():
        assert_close(actual[1][key], gradient, 3e-6, key, floor_of(expected[1]))


def test_flex_attention_keeps_documents_apart_forward():
    """Forward only: torch has no backward of flex attention on a CPU. `tests/gpu` runs both."""
    documents = documents_of((9, 1, 13, 40, 2, 9))
    batch = cut_batch(pack(documents), 1, 0, inner_attention="flex_attention")
    # The smallest heads that the compiled kernel takes.
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}
    with torch.no_grad():
        actual = build("llama", "packed", **sizes).eval()(**batch).logits
        model = build("llama", "sdpa", **sizes).eval()
        alone = [model(input_ids=torch.tensor([document["input_ids"]])).logits for document in documents]
    assert_close(actual, torch.cat(alone, dim=1), 1e-5, "logits")


# Every way to say where documents are


BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@pytest.mark.parametrize("name", ["llama", "llama4", "gemma2", "gpt2", "bert"])
@pytest.mark.parametrize("keys", [("position_ids",), ("position_ids", *BOUNDS), ("position_ids", "seq_idx")])
def test_bounds_index_and_positions_say_the_same(name, keys):
    documents = documents_of((9, 1, 13, 40, 2, 9), name)
    batch = pack(documents, name)
    some = {key: batch[key] for key in ("input_ids", *keys)}
    model, extras = build(name, "packed").eval(), {} if name in MASKED_LM else {"use_cache": False}
    with torch.no_grad():
        actual = model(**some, **extras).logits
        stock = build(name, STOCK.get(name, "sdpa")).eval()
        alone = [stock(input_ids=torch.tensor([document["input_ids"]])).logits for document in documents]
    assert_close(actual, torch.cat(alone, dim=1), 2e-6, "logits")


def test_rows_of_different_documents():
    """Two rows, described by positions: flat bounds can only describe one."""
    rows = [documents_of((9, 14)), documents_of((3, 3, 17), seed=2)]
    batches = [pack(documents) for documents in rows]
    batch = {key: torch.cat([part[key] for part in batches]) for key in ("input_ids", "position_ids")}
    with torch.no_grad():
        both = build("mistral", "packed").eval()(**batch, use_cache=False).logits
        for row, part in enumerate(batches):
            alone = build("mistral", "packed").eval()(**{k: part[k] for k in batch}, use_cache=False).logits
            assert_close(both[row : row + 1], alone, 2e-6, f"row {row}")


def test_a_row_of_one_document_is_the_inner_kernels_own_call():
    ids = torch.randint(3, VOCAB, (2, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    for name in ("llama", "mistral", "bert"):
        ours, stock = build(name, "packed").eval(), build(name, "sdpa").eval()
        with torch.no_grad():
            for batch in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
                assert torch.equal(ours(**batch).logits, stock(**batch).logits)


def test_generation_is_the_inner_kernels():
    ids = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 6, "do_sample": False}
    ours, stock = build("llama", "packed").eval(), build("llama", "sdpa").eval()
    assert torch.equal(ours.generate(ids, **options), stock.generate(ids, **options))


@pytest.mark.parametrize("name", ["llama", "llama4"])
def test_a_cache_of_one_document_a_row_is_the_librarys(name):
    """Training with the cache left on. Only `"packed"` says that rows are packed where attention cannot see it."""
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    ours, stock = (build(name, kernel)(input_ids=ids, use_cache=True) for kernel in ("ulysses", "sdpa"))
    assert torch.equal(ours.logits, stock.logits) and ours.logits.requires_grad


def test_bounds_keep_documents_apart_in_compiled_attention_too():
    bounds = {key: value for key, value in pack(documents_of((9, 14))).items() if key in BOUNDS}
    query, key, value = torch.randn(3, 1, 2, 23, 8, generator=torch.Generator().manual_seed(0))
    call = torch.nn.Identity(), query, key, value, None
    expected, compiled = (
        attend(*call, **bounds)[0] for attend in (packed_attention, torch.compile(packed_attention, backend="eager"))
    )
    assert torch.equal(compiled, expected)
    assert not torch.allclose(expected, packed_attention(*call)[0])


# What is refused


def test_cache_with_packed_rows_is_refused():
    batch = pack(documents_of((9, 14)))
    batch.pop("use_cache")
    for name in ("llama", "llama4"):
        with pytest.raises(ValueError, match="`use_cache` is on .* pass `use_cache=False`"):
            build(name, "packed")(**batch)
    only_positions = {key: batch[key] for key in ("input_ids", "position_ids")}
    for name in ("llama", "llama4"):  # the second hides its positions from attention
        with pytest.raises(ValueError, match="`use_cache` is on"):
            build(name, "packed")(**only_positions)


def test_decoding_after_a_packed_prompt_is_refused():
    batch = {key: value for key, value in pack(documents_of((9, 14))).items() if key in BOUNDS}
    query, key = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 24, 8)
    with pytest.raises(ValueError, match="`use_cache` is on"):
        packed_attention(torch.nn.Identity(), query, key, key, None, **batch)


def test_padding_mask_beside_documents_is_refused():
    batch = pack(documents_of((9, 14)))
    with pytest.raises(ValueError, match="also has an `attention_mask`"):
        build("llama", "packed")(**batch, attention_mask=torch.ones_like(batch["input_ids"]))


@pytest.mark.parametrize("bounds", [[0, 9, 22], [0, 9, 9, 23], [1, 9, 23], [0, 23, 9]])
def test_bounds_that_do_not_describe_the_row_are_refused(bounds):
    batch = pack(documents_of((9, 14)))
    bounds = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match="must rise from 0 to the 23 tokens"):
        build("llama", "packed")(**{**batch, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds})


def test_share_of_a_row_is_refused_with_the_name_that_can():
    shard = cut_batch({"input_ids": torch.arange(8)[None]}, 2, 0)["sequence_shard"]
    query = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="set_attn_implementation\\('ulysses'\\)"):
        packed_attention(torch.nn.Identity(), query, query, query, None, sequence_shard=shard)


def test_unreadable_mask_of_packed_rows_is_refused():
    model = build("llama", "packed")
    batch = pack(documents_of((9, 14)))
    with pytest.raises(NotImplementedError, match="mask of Tensor that the model made itself"):
        packed_attention(
            model.model.layers[0].self_attn, *[torch.zeros(1, 6, 23, 8)] * 3, torch.zeros(1, 1, 23, 23),
            **{key: batch[key] for key in BOUNDS},
        )  # fmt: skip


# Memory


class LargestTensor(TorchDispatchMode):
    """Remember the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("llama", (512,) * 64),
        ("llama", (1000, 3000, 7, 20_000, 8761)),
        ("mistral", (32_768,)),
        ("modernbert", (8192,) * 4),
        ("gemma2", (256,) * 128),
    ],
)
def test_nothing_of_t_by_t_is_made_at_32768_tokens(name, lengths):
    tokens = sum(lengths)
    assert tokens == 32_768
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32}
    small |= {"num_hidden_layers": 2, "max_position_embeddings": tokens, "intermediate_size": 16}
    if name == "modernbert":
        small |= {"head_dim": None, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 1}
    model = build(name, "packed", **{key: value for key, value in small.items() if value is not None})
    documents = [{"input_ids": torch.randint(3, 32, (length,)).tolist()} for length in lengths]
    with LargestTensor() as watch:
        model(**pack(documents, name)).loss.backward()
    # 32 logits a token, or for `eager` two heads of scores within a document; `T x T` would be 32,768 a token.
    assert tokens * 16 <= watch.entries <= tokens * 520, watch.entries / tokens


def test_documents_that_only_the_hosts_mask_knows_make_no_mask_either():
    """Llama 4 keeps its positions from attention; the host finds the documents and hides them in its mask."""
    batch = pack(documents_of((64,) * 32))
    some = {key: batch[key] for key in ("input_ids", "position_ids", "use_cache")}
    with LargestTensor() as watch, torch.no_grad():
        build("llama4", "packed", max_position_embeddings=4096)(**some)
    assert watch.entries < 2048 * 2048 / 4


# What was chosen


def test_explanation_names_kernel_rule_documents_and_method():
    batch = PackingCollator()(documents_of((512, 512, 1000)))
    plans = explain_attention(build("mistral", "packed"), batch).plans
    assert [plan.kernel for plan in plans] == ["sdpa"]
    assert str(plans[0]) == (
        "causal, window of 5 tokens: sdpa, 3 segments of 512 to 1,000 tokens: 16 blocks in 3 calls, largest mask "
        "32,768 entries"
    )
    plans = explain_attention(build("llama", "ulysses"), batch).plans
    assert str(plans[0]) == "causal: sdpa, 3 segments of 512 to 1,000 tokens: 3 blocks in 2 calls, no mask"
    plans = explain_attention(build("llama", "packed"), {"input_ids": batch["input_ids"]}).plans
    assert "one document of 2,024 tokens a row: one call of the kernel's own path, no mask" in str(plans[0])
    plans = explain_attention(build("gemma2", "packed"), batch).plans
    assert {plan.kernel for plan in plans} == {"eager"} and len(plans) == 2


def test_explanation_of_a_stock_kernel_is_refused():
    with pytest.raises(ValueError, match="whose plan only transformers knows.*set_attn_implementation\\('packed'\\)"):
        explain_attention(build("llama", "sdpa"), PackingCollator()(documents_of((5, 6))))


def test_plan_is_made_once_for_all_layers(monkeypatch):
    counted = []
    original = kernels.plan_blocks
    monkeypatch.setattr(kernels, "plan_blocks", lambda *args: counted.append(1) or original(*args))
    build("llama", "packed", num_hidden_layers=4)(**pack(documents_of((9, 14))))
    assert len(counted) == 1


def test_name_is_registered_by_the_import():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert hf_longctx.__version__
    assert ALL_ATTENTION_FUNCTIONS["packed"] is packed_attention and "packed" in ALL_MASK_ATTENTION_FUNCTIONS


def test_an_encoder_that_does_not_say_is_causal_sees_both_ways_without_a_mask():
    """Splinter has no `is_causal`, which `sdpa` takes for causal; its own attention is eager."""
    config = transformers.SplinterConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    outputs = []
    for name in ("eager", "ulysses", "packed"):
        torch.manual_seed(0)
        outputs.append(transformers.AutoModel.from_config(config, attn_implementation=name).eval()(ids)[0])
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=1e-5)  # one layer norm after another: entries of 1
