"""Models that learn from what they read: gradients, causality, rows, caches, recomputation, checkpoints."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

from hf_longctx import TTTCache, TTTConfig, TTTForCausalLM
from hf_longctx.attention.cache_names import OUTPUT_NAME
from hf_longctx.ttt import chunked_rows, fast_model
from hf_longctx.ttt.clipped_step import clipped_step
from hf_longctx.ttt.inner import Step, take_step
from tests.fast_weights import loss_and_gradients, tiny_base, tiny_ttt, tokens, worst


# float64: nothing but the order of sums differs.
EXACT = 1e-12


def losses_of(model, ids, **inputs):
    """The loss of every next token, from logits of one forward."""
    with torch.no_grad():
        logits = model(ids, **inputs).logits
    flat = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return flat.view(len(ids), -1)


def test_the_meta_gradient_of_every_parameter_is_that_of_finite_differences():
    model, ids = tiny_ttt(), tokens()
    _, gradients = loss_and_gradients(model, ids)
    generator = torch.Generator().manual_seed(5)
    model.eval()
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction = direction / direction.norm() + gradients[name] / gradients[name].norm()
        numeric, step = 0.0, 3e-3 * float(parameter.detach().abs().mean())
        for steps, weight in ((1, 8 / 12), (-1, -8 / 12), (2, -1 / 12), (-2, 1 / 12)):  # of fourth order
            with torch.no_grad():
                parameter.add_(direction, alpha=steps * step)
                numeric = numeric + weight * model(ids, labels=ids).loss / step
                parameter.sub_(direction, alpha=steps * step)
        exact = (direction * gradients[name]).sum()
        assert abs(numeric - exact) <= 1e-6 * abs(exact), name


@pytest.mark.parametrize("most", [0.5, 100.0])  # clipped, and not
def test_the_step_can_be_differentiated_twice(most):
    generator = torch.Generator().manual_seed(1)
    fast, gradients = (
        [torch.randn(2, *shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
        for shapes in [((3, 2), (2, 3))] * 2
    )

    def step(*tensors):
        return tuple(clipped_step(list(tensors[:2]), list(tensors[2:]), 0.7, most)[0])

    assert torch.autograd.gradcheck(step, (*fast, *gradients))
    assert torch.autograd.gradgradcheck(step, (*fast, *gradients))
    norms = torch.stack([gradient.square().sum((1, 2)) for gradient in gradients]).sum(0).sqrt()
    plain = [w - 0.7 * (most / norms).clamp(max=1)[:, None, None] * g for w, g in zip(fast, gradients)]
    assert all(torch.allclose(a, b, rtol=EXACT, atol=EXACT) for a, b in zip(step(*fast, *gradients), plain))


def test_first_order_is_another_gradient_and_the_same_loss():
    exact, ids = tiny_ttt(), tokens()
    first = tiny_ttt(meta_gradient="first_order")
    (loss, gradients), (same, others) = loss_and_gradients(exact, ids), loss_and_gradients(first, ids)
    assert loss == same and worst(others, gradients) > 1e-2


@pytest.mark.parametrize(("attention", "suffix"), [("sdpa", "sdpa"), ("packed", "sdpa"), ("packed", "eager")])
def test_without_prime_and_steps_it_is_the_base_with_a_window(attention, suffix):
    window, ids = 8, tokens()
    base = tiny_base()
    mask = torch.ones(29, 29, dtype=torch.bool).tril().triu(1 - window)[None, None]
    with torch.no_grad():
        expected = base(ids, attention_mask=mask.expand(2, 1, -1, -1)).logits
    base.set_attn_implementation(attention)
    model = tiny_ttt(base=base, zero=True, inner_learning_rate=0.0, suffix_attention=suffix)
    error = (model(ids).logits - expected).abs().max()
    # eager attention of transformers computes its softmax in float32
    assert error <= (EXACT if suffix == "sdpa" else 1e-6)


def test_chunks_without_steps_are_one_chunk_and_the_first_chunk_learns_nothing():
    ids = tokens()
    learns, still = tiny_ttt(), tiny_ttt(inner_learning_rate=0.0)
    whole = tiny_ttt(inner_learning_rate=0.0, chunk_tokens=32, window=32)
    narrow = tiny_ttt(inner_learning_rate=0.0, chunk_tokens=8, window=32)
    assert (losses_of(whole, ids) - losses_of(narrow, ids)).abs().max() <= EXACT
    on, off = losses_of(learns, ids), losses_of(still, ids)
    assert torch.equal(on[:, :6], off[:, :6]) and (on[:, 6:] - off[:, 6:]).abs().max() > 1e-3
    assert (losses_of(learns, ids, learn=False) - off).abs().max() <= EXACT


def test_a_later_token_changes_no_earlier_loss():
    model, ids = tiny_ttt(), tokens()
    for place in (7, 12, 13, 28):
        changed = ids.clone()
        changed[:, place] = 3 + (changed[:, place] - 2) % 90
        before, after = losses_of(model, ids), losses_of(model, changed)
        assert torch.equal(before[:, : place - 1], after[:, : place - 1])
        assert not torch.equal(before[:, place - 1 :], after[:, place - 1 :])


def test_rows_learn_by_themselves():
    model, ids = tiny_ttt(), tokens(3)
    alone = torch.cat([losses_of(model, row[None]) for row in ids])
    assert (losses_of(model, ids) - alone).abs().max() <= EXACT


def test_padding_on_the_right_changes_nothing():
    model, ids = tiny_ttt(), tokens()
    mask = torch.ones_like(ids)
    mask[1, 16:] = 0
    padded = ids.masked_fill(mask == 0, 0)
    labels = padded.masked_fill(mask == 0, -100)
    loss, gradients = loss_and_gradients(model, padded, attention_mask=mask, labels=labels)
    sums, found = [], None
    for row in (ids[:1], ids[1:, :16]):
        part, more = loss_and_gradients(model, row, num_items_in_batch=28 + 15)
        sums.append(part)
        found = more if found is None else {name: found[name] + more[name] for name in found}
    assert abs(sum(sums) - loss) <= EXACT and worst(found, gradients) <= 1e-9


def test_the_inner_loss_learns_from_no_bos():
    model, ids = tiny_ttt(), tokens()
    ids[:, 4] = model.config.bos_token_id
    with torch.no_grad():
        model(ids)
        masked = model.last_rows.squares[0]
        model.config.bos_token_id = None
        model(ids)
    assert not torch.allclose(model.last_rows.squares[0], masked)


def test_outer_labels_do_not_touch_the_inner_loss():
    """A masked prompt, and labels that are not the tokens read."""
    model, ids = tiny_ttt(), tokens()
    each = losses_of(model, ids)
    masked = ids.clone()
    masked[:, :10] = -100
    with torch.no_grad():
        prompt = model(ids, labels=masked).loss
        other = model(ids, labels=(ids + 1) % 90).loss
        shifted = model(ids, shift_labels=torch.nn.functional.pad(masked[:, 1:], (0, 1), value=-100)).loss
        logits = model(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ((ids + 1) % 90)[:, 1:].flatten())
    assert abs(prompt - each[:, 9:].mean()) <= EXACT and abs(other - expected) <= EXACT and shifted == prompt


def test_evaluation_is_the_training_forward():
    model, ids = tiny_ttt(), tokens()
    training, _ = loss_and_gradients(model, ids)
    model.eval()
    with torch.no_grad():
        assert abs(model(ids, labels=ids).loss - training) <= EXACT


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputation_changes_neither_loss_nor_gradient(levels, dropout, monkeypatch):
    monkeypatch.setattr(fast_model, "recomputation_levels", lambda chunks: levels)
    model, ids = tiny_ttt(base=tiny_base(attention_dropout=dropout), suffix_attention="eager"), tokens()
    torch.manual_seed(4)
    loss, gradients = loss_and_gradients(model, ids)
    runs, run = [], chunked_rows.Chunk.__call__
    monkeypatch.setattr(chunked_rows.Chunk, "__call__", lambda *given: runs.append(1) or run(*given))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(4)
    again, others = loss_and_gradients(model, ids)
    assert len(runs) == 5 * (1 + levels)  # once in forward, and once a level
    if levels == 1 or not dropout:
        # torch folds products with weights differently where no graph is kept
        assert abs(again - loss) <= 1e-9 and worst(others, gradients) <= (1e-6 if dropout else 1e-9)


def test_rows_of_many_chunks_are_recomputed_in_groups():
    assert [chunked_rows.recomputation_levels(chunks) for chunks in (1, 8, 9, 128)] == [1, 1, 2, 2]


def test_recomputation_keeps_few_copies_of_the_fast_weights():
    """By what a forward saves: one level holds a copy a chunk, two about the root of their number."""
    model = tiny_ttt(torch.float32, base=tiny_base(dtype=torch.float32), fast_intermediate_size=256)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    sizes: dict[tuple[int, int], int] = {}
    for chunks in (9, 36):
        ids = tokens(1, 6 * chunks)
        for levels in (0, 1, 2):
            sizes[chunks, levels] = _kept_bytes(model, ids, levels)
    state = sum(matrix.nbytes for matrix in model.primes.matrices())
    grown = {levels: sizes[36, levels] - sizes[9, levels] for levels in (0, 1, 2)}
    assert 27 * state <= grown[1] <= 27 * state * 1.5 < grown[0]
    # 3 groups of 3 chunks, and 6 of 6
    assert grown[2] <= 3 * state * 1.5 + (grown[1] - 27 * state)


class _Held:
    def __init__(self, tensor) -> None:
        self.tensor = tensor


def _kept_bytes(model, ids, levels) -> int:
    """What is still held after a forward; a body that runs without a graph saves tensors for a moment."""
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def keep(tensor):
        holder = _Held(tensor)
        held.add(holder)
        return holder

    previous, fast_model.recomputation_levels = fast_model.recomputation_levels, lambda chunks: levels
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda holder: holder.tensor):
            loss = model(ids, labels=ids).loss
    finally:
        fast_model.recomputation_levels = previous
    storages = [holder.tensor.untyped_storage() for holder in held]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    del loss
    return sum(sizes.values())


def test_a_row_without_anything_to_learn_from_has_a_gradient():
    weights = [torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    means = torch.stack([sum(weight[0].square().sum() for weight in weights), weights[0][1].sum() * 0])
    after, squares = take_step(weights, means, Step(0.1, 1.0), builds=True)
    sum(weight.sum() for weight in after).backward()
    assert squares[0, 1] == 0 and all(torch.isfinite(weight.grad).all() for weight in weights)
    step = torch.cat([(new - old)[0].flatten() for new, old in zip(after, weights)])
    assert abs(step.norm() - 0.1) < 1e-12  # clipped by the norm over all matrices


@pytest.mark.parametrize("pieces", [[29], [1] * 29, [6, 6, 6, 6, 5], [7, 5, 1, 13, 3]])
def test_reading_in_pieces_is_one_forward(pieces):
    model, ids = tiny_ttt(torch.float32), tokens()
    with torch.no_grad():
        expected = model(ids).logits
        cache, found = model.make_cache(), []
        for piece in ids.split(pieces, 1):
            found.append(model(piece, **{OUTPUT_NAME: cache}).logits)
    assert (torch.cat(found, 1) - expected).abs().max() <= 1e-5
    assert cache.seen == 29 and cache.steps == 4
    assert (model.read_losses(ids) - losses_of(model, ids)).abs().max() <= 1e-5


@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generating_with_a_cache_is_generating_without(attention, beams):
    model, prompt = tiny_ttt(torch.float32), tokens(length=10)
    model.set_attn_implementation(attention)
    options = {"max_new_tokens": 17, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    found = model.generate(prompt, **options)
    assert found.shape == (2, 27) and torch.equal(found, model.generate(prompt, use_cache=False, **options))
    assert not torch.equal(found, model.generate(prompt, learn=False, **options))


def test_learning_while_writing_can_be_left_out():
    model, prompt = tiny_ttt(torch.float32, learn_while_generating=False), tokens(length=14)
    options = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
    cache, frozen = model.make_cache(), model.read(prompt)
    model.generate(prompt, cache=cache, **options)
    assert cache.steps == 2 and cache.is_frozen
    assert all(torch.equal(one, other) for one, other in zip(cache.fast, frozen.fast))
    writing = model.make_cache()
    model.generate(prompt, cache=writing, learn=True, **options)
    assert writing.steps == 4


def test_one_book_many_questions(tmp_path):
    model, book, question = tiny_ttt(torch.float32), tokens(1, 40), tokens(1, 5, seed=9)
    memory = model.read(book)
    memory.save(tmp_path / "memory.safetensors")
    loaded = TTTCache.load(tmp_path / "memory.safetensors")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    found = [model.generate(question, cache=kept.copy(), learn=False, **options) for kept in (memory, memory, loaded)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert memory.seen == 40 and memory.steps == 6
    with torch.no_grad():
        logits = model(question, **{OUTPUT_NAME: memory.copy()}).logits
        whole = model(torch.cat((book, question), 1)).logits[:, 40:]
    assert (logits - whole).abs().max() <= 1e-5
    several = model.generate(
        question, cache=memory.repeat(3), learn=False, num_return_sequences=3, num_beams=3, **options
    )
    assert len(several) == 3


def test_reordered_rows_take_all_that_they_learned_with_them():
    model, ids = tiny_ttt(torch.float32), tokens(2, 27)
    swapped, cache = model.read(ids), model.read(ids.flip(0))
    swapped.reorder_cache(torch.tensor([1, 0]))
    for name, tensor in cache._tensors().items():
        assert torch.allclose(tensor, swapped._tensors()[name], atol=1e-6), name


def test_the_size_of_a_cache_does_not_depend_on_what_was_read():
    model = tiny_ttt(torch.float32)
    sizes = {model.read(tokens(1, length)).nbytes for length in (1, 5, 31, 200)}
    assert len(sizes) == 1


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_generates_the_same_tokens(tmp_path, tied):
    model = tiny_ttt(torch.float32, base=tiny_base(dtype=torch.float32, tie_word_embeddings=tied))
    prompt = tokens(length=10)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(prompt, **options)
    model.save_pretrained(tmp_path)
    loaded = TTTForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(prompt, **options), expected)
    assert loaded.settings == model.settings and loaded.config._attn_implementation == "packed"
    half = TTTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="model type `hf_longctx_ttt_e2e`"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hf_longctx_ttt_e2e"):
        tf.AutoConfig.from_pretrained(tmp_path)


def test_weights_of_another_window_or_chunk_are_refused_however_they_are_loaded(tmp_path):
    model = tiny_ttt(torch.float32)
    model.save_pretrained(tmp_path)
    state = {name: weight for name, weight in model.state_dict().items() if not name.endswith("prime_facts")}
    with pytest.raises(ValueError, match="hold `primes.prime_layers.0.prime_gate` but no `prime_facts`"):
        tiny_ttt(torch.float32).load_state_dict(state, strict=False)
    slow = {name: weight for name, weight in state.items() if "prime" not in name}
    assert tiny_ttt(torch.float32).load_state_dict(slow, strict=False).unexpected_keys == []

    config = TTTForCausalLM.config_class.from_pretrained(tmp_path)
    config.ttt = {**config.ttt, "chunk_tokens": 4}
    with pytest.raises(ValueError, match="trained with `chunk_tokens` 6, but this model has .* 4"):
        TTTForCausalLM.from_pretrained(tmp_path, config=config)
    path = tmp_path / "model.safetensors"
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="hold `prime_layers.0.prime_gate` but no `prime_facts`"):
        TTTForCausalLM.from_pretrained(tmp_path)
    save_file(slow, path, metadata={"format": "pt"})
    anew, info = TTTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert anew.primes.prime_facts.tolist()[:5] == [8, 6, 2, 3, 16] and "primes.prime_facts" in info["missing_keys"]
    assert not anew.primes.prime_layers[0].prime_down.any() and anew.primes.prime_layers[0].prime_gate.any()


def test_a_resized_vocabulary_is_saved_and_loaded(tmp_path):
    model = tiny_ttt(torch.float32)
    model.resize_token_embeddings(101, mean_resizing=False)
    ids = torch.cat((tokens(1, 10), torch.full((1, 3), 100)), 1)
    assert model.get_output_embeddings().weight.shape[0] == model.config.vocab_size == 101
    model.save_pretrained(tmp_path)
    loaded = TTTForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)


def test_half_precision_keeps_fast_weights_in_float32():
    model, ids = tiny_ttt(torch.float32), tokens()
    loss, gradients = loss_and_gradients(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        half, others = loss_and_gradients(model, ids)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        again, recomputed = loss_and_gradients(model, ids)
    assert abs(half - loss) < 3e-2 * loss and half.dtype == torch.float32
    assert abs(again - half) <= 1e-5 * loss and worst(recomputed, others) <= 5e-2
    # bfloat16 has 8 bits, and inner steps multiply its noise
    cosine = torch.nn.functional.cosine_similarity
    assert all(cosine(others[name].flatten(), gradients[name].flatten(), 0) > 0.9 for name in gradients)
    cast = tiny_ttt(torch.float32).to(torch.bfloat16)
    assert {weight.dtype for weight in cast.read(ids).fast} == {torch.float32}


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_llama_like_types_decode_what_one_forward_computes(name):
    window = {"window": 5, "chunk_tokens": 4} if name == "mistral" else {}
    model, ids = tiny_ttt(torch.float32, base=tiny_base(name, torch.float32), **window), tokens()
    with torch.no_grad():
        expected, cache = model(ids).logits, model.make_cache()
        found = [model(piece, **{OUTPUT_NAME: cache}).logits for piece in ids.split([5, 1, 1, 22], 1)]
    assert (torch.cat(found, 1) - expected).abs().max() <= 1e-5


def test_a_base_with_a_window_gives_its_own():
    settings = TTTConfig(chunk_tokens=4, suffix_layers=1)
    model = TTTForCausalLM.from_base(tiny_base("mistral", torch.float32), settings)
    assert model.settings.window == 5 and model.settings.fast_intermediate_size == 64
    quarter = TTTForCausalLM.from_base(tiny_base(dtype=torch.float32, layers=8), TTTConfig(window=8, chunk_tokens=4))
    assert quarter.settings.suffix_layers == 2


def test_the_base_is_held_as_it_was():
    base = tiny_base(dtype=torch.float32)
    before = copy.deepcopy(base.state_dict())
    model = tiny_ttt(torch.float32, base=base)
    assert model.base is base
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.base.state_dict().items())
    prime = [name for name, _ in model.named_parameters() if "prime" in name]
    assert len(prime) == 2 * 4 and len(prime) + len(list(base.parameters())) == len(list(model.parameters()))
