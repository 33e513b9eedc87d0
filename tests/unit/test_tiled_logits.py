"""The tiled cross entropy and its gradients equal the stock ones on whole logits, whatever the tile.

Errors are relative to the largest entry of a tensor. 1e-6 in fp32 is some ten roundings, of sums over 131 words taken
in another order (a matmul with one row adds in another order than one with many); 1e-13 in fp64 likewise. Longer sums
round more, on whole logits as well: there, both are compared with fp64. Gradients are taken under an upstream scalar
that is not 1.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.trainer_pt_utils import LabelSmoother

from hf_longctx.losses.tiled_head import tiled_head_loss
from hf_longctx.losses.tiled_logits import tiled_cross_entropy
from hf_longctx.losses.tiled_scores import tiled_token_scores
from hf_longctx.losses.tiles import MIN_TILE_TOKENS, TILE_ENTRIES, choose_tile_size


TOKENS, WIDTH, WORDS = 63, 24, 131
UPSTREAM = 1.37
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}
RULES = {
    "plain": {},
    "label smoothing": {"label_smoothing": 0.1},
    "all smoothing": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 1e-2},
    "scale": {"scale": 0.0625},
    "negative scale": {"scale": -2.0},
    "softcap": {"softcap": 3.0},
    "scale and softcap": {"scale": 1.7, "softcap": 2.0},
    "everything": {"label_smoothing": 0.2, "z_loss": 3e-3, "scale": 0.3, "softcap": 1.5},
}


def tensors(dtype=torch.float32, tokens: int = TOKENS, words: int = WORDS, width: int = WIDTH, seed: int = 0):
    """Random hidden states, weight, bias and labels, a third of them ignored."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    labels = torch.randint(words, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.3] = -100
    hidden, weight, bias = draw(tokens, width), draw(words, width), draw(words)
    with torch.no_grad():
        weight.mul_(2 * width**-0.5)  # logits of a trained model: most within 4, the largest about 10
    return hidden, weight, bias, labels


def transformed(logits, scale: float = 1.0, softcap: float | None = None):
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def stock_loss(logits, labels, *, num_items=None, label_smoothing=0.0, z_loss=0.0, scale=1.0, softcap=None):
    """Ten obvious lines on whole logits."""
    logits = transformed(logits.flatten(0, -2), scale, softcap)
    labels = labels.flatten()
    valid = labels != -100
    total = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum")
    total = total + z_loss * logits.logsumexp(-1)[valid].square().sum()
    return total / (valid.sum().clamp(min=1) if num_items is None else num_items)


def gradients(loss, inputs):
    return torch.autograd.grad(UPSTREAM * loss, inputs)


def error_of(actual, expected) -> float:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def assert_same(actual, expected, tolerance: float) -> None:
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert error_of(ours, theirs) <= tolerance, (index, error_of(ours, theirs))


# The loss and its gradients


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tile_size", [1, 5, 44, 64, None])
@pytest.mark.parametrize("rule", RULES)
def test_loss_and_gradients_are_those_of_whole_logits(rule, tile_size, dtype):
    hidden, weight, bias, labels = tensors(dtype)
    expected = stock_loss(hidden @ weight.T + bias, labels, **RULES[rule])
    actual = tiled_cross_entropy(hidden, weight, labels, bias=bias, tile_size=tile_size, **RULES[rule])
    assert_same([actual], [expected], TOLERANCE[dtype])
    inputs = (hidden, weight, bias)
    assert_same(gradients(actual, inputs), gradients(expected, inputs), TOLERANCE[dtype])


@pytest.mark.parametrize("rule", ["plain", "everything"])
def test_over_many_words_the_noise_is_that_of_whole_logits(rule):
    hidden, weight, bias, labels = tensors(words=20011, tokens=300)
    inputs, exact = (hidden, weight, bias), [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = stock_loss(exact[0] @ exact[1].T + exact[2], labels, **RULES[rule])
    stock = stock_loss(hidden @ weight.T + bias, labels, **RULES[rule])
    actual = tiled_cross_entropy(hidden, weight, labels, bias=bias, tile_size=64, **RULES[rule])
    wanted = (expected, *gradients(expected, exact))
    theirs = [error_of(x.double(), y) for x, y in zip((stock, *gradients(stock, inputs)), wanted)]
    ours = [error_of(x.double(), y) for x, y in zip((actual, *gradients(actual, inputs)), wanted)]
    assert all(mine < max(2 * other, 1e-6) for mine, other in zip(ours, theirs)), (ours, theirs)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("trained", ["hidden", "weight", "both"])
def test_only_what_is_trained_gets_a_gradient(trained, with_bias):
    hidden, weight, bias, labels = tensors()
    hidden.requires_grad_(trained != "weight")
    weight.requires_grad_(trained != "hidden")
    bias.requires_grad_(trained == "weight")
    bias = bias if with_bias else None
    expected = stock_loss(F.linear(hidden, weight, bias), labels)
    actual = tiled_cross_entropy(hidden, weight, labels, bias=bias, tile_size=16)
    inputs = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    assert_same(gradients(actual, inputs), gradients(expected, inputs), 1e-6)


@pytest.mark.parametrize("ignored", ["none", "all but one", "all", "the first tile"])
def test_any_number_of_valid_tokens(ignored):
    hidden, weight, bias, labels = tensors()
    labels = labels.abs() % WORDS
    parts = {"none": slice(0), "all but one": slice(1, None), "all": slice(None), "the first tile": slice(9)}
    labels[parts[ignored]] = -100
    inputs = (hidden, weight, bias)
    actual = tiled_cross_entropy(hidden, weight, labels, bias=bias, tile_size=8)
    found = gradients(actual, inputs)
    if ignored == "all":  # a zero that a rank without targets can still run backward from
        assert actual == 0 and all(gradient.eq(0).all() for gradient in found)
        return
    expected = stock_loss(hidden @ weight.T + bias, labels)
    assert_same([actual, *found], [expected, *gradients(expected, inputs)], 1e-6)
    assert found[0][labels == -100].eq(0).all()


def test_one_token():
    hidden, weight, _, _ = tensors(tokens=1)
    labels = torch.tensor([7])
    expected = stock_loss(hidden @ weight.T, labels)
    actual = tiled_cross_entropy(hidden, weight, labels)
    inputs = (hidden, weight)
    assert_same([actual, *gradients(actual, inputs)], [expected, *gradients(expected, inputs)], 1e-6)


@pytest.mark.parametrize("num_items", [17, 0.25, torch.tensor(11), torch.tensor(2.5)], ids=str)
def test_the_count_of_the_whole_step_divides_the_sum(num_items):
    hidden, weight, _, labels = tensors()
    expected = stock_loss(hidden @ weight.T, labels, num_items=num_items)
    actual = tiled_cross_entropy(hidden, weight, labels, num_items=num_items, tile_size=10)
    assert_same([actual, *gradients(actual, (weight,))], [expected, *gradients(expected, (weight,))], 1e-6)


def test_rows_and_a_hidden_state_that_is_a_slice():
    hidden, weight, _, labels = tensors(tokens=60)
    rows, targets = hidden.view(3, 20, WIDTH)[:, :-1], labels.view(3, 20)[:, 1:]
    expected = stock_loss(rows @ weight.T, targets)
    actual = tiled_cross_entropy(rows, weight, targets, tile_size=7)
    inputs = (hidden, weight)
    assert_same([actual, *gradients(actual, inputs)], [expected, *gradients(expected, inputs)], 1e-6)


def test_a_tied_weight_gets_one_gradient_from_both_its_uses():
    _, weight, _, labels = tensors(torch.float64)
    ids, calls = torch.arange(TOKENS) % 50, []
    expected = stock_loss(F.embedding(ids, weight).tanh() @ weight.T, labels)
    expected.backward()
    reference, weight.grad = weight.grad, None
    weight.register_post_accumulate_grad_hook(lambda parameter: calls.append(parameter.grad.clone()))
    tiled_cross_entropy(F.embedding(ids, weight).tanh(), weight, labels, tile_size=13).backward()
    assert len(calls) == 1
    assert_same(calls, [reference], 1e-13)


@pytest.mark.parametrize("kind", ["linear", "two layers"])
def test_hooks_on_a_parameter_fire_once_a_backward(kind):
    hidden, _, _, labels = tensors()
    head = torch.nn.Linear(WIDTH, WORDS)
    if kind == "two layers":
        head = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU(), head)
    calls = []
    for name, parameter in head.named_parameters():
        parameter.register_hook(lambda gradient, name=name: calls.append(("tensor", name, gradient.clone())))
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: calls.append(("accumulated", name, p.grad)))
    for step in range(2):
        tiled_head_loss(hidden, head, labels, tile_size=4).backward()
        assert len(calls) == (step + 1) * 2 * len(list(head.parameters()))
    firsts = {name: gradient for kind, name, gradient in calls[: len(calls) // 2] if kind == "tensor"}
    expected = torch.autograd.grad(stock_loss(head(hidden), labels), tuple(head.parameters()))
    assert_same([firsts[name] for name, _ in head.named_parameters()], expected, 1e-6)


def test_two_backward_calls_accumulate():
    hidden, weight, bias, labels = tensors()
    other = tensors(seed=1)
    for states, targets in ((hidden, labels), (other[0], other[3])):
        tiled_cross_entropy(states, weight, targets, bias=bias, num_items=77, tile_size=9).backward()
    found = [x.grad for x in (hidden, other[0], weight, bias)]
    total = stock_loss(hidden @ weight.T + bias, labels, num_items=77)
    total = total + stock_loss(other[0] @ weight.T + bias, other[3], num_items=77)
    assert_same(found, torch.autograd.grad(total, (hidden, other[0], weight, bias)), 1e-6)


def test_without_gradients_only_the_loss_is_computed():
    hidden, weight, _, labels = tensors()
    with torch.no_grad(), Recorder() as seen:
        loss = tiled_cross_entropy(hidden, weight, labels, tile_size=8)
    assert not loss.requires_grad and seen.count("mm") == -(-int((labels != -100).sum()) // 8)
    assert_same([loss], [stock_loss(hidden @ weight.T, labels).detach()], 1e-6)
    with Recorder() as seen:
        tiled_cross_entropy(hidden, weight, labels, tile_size=64).backward()
    assert seen.count("mm") + seen.count("addmm_") == 3, "one matmul for logits, hidden states and weight each"


def test_a_masked_word_of_minus_infinity_is_never_predicted():
    hidden, weight, bias, labels = tensors()
    with torch.no_grad():
        bias[3] = -torch.inf
    labels[labels == 3] = 4
    expected = stock_loss(hidden @ weight.T + bias, labels)
    actual = tiled_cross_entropy(hidden, weight, labels, bias=bias, tile_size=8)
    assert_same([actual, *gradients(actual, (hidden,))], [expected, *gradients(expected, (hidden,))], 1e-6)


def test_label_smoothing_is_that_of_the_host():
    hidden, weight, _, labels = tensors(torch.float64)
    logits = (hidden @ weight.T)[None]
    theirs = LabelSmoother(epsilon=0.1)({"logits": logits}, labels[None], shift_labels=True, num_items_in_batch=29)
    ours = tiled_cross_entropy(hidden[:-1], weight, labels[1:], label_smoothing=0.1, num_items=29)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)  # transformers sums the smoothed part in fp32


def test_large_logits_keep_their_digits():
    hidden, weight, _, labels = tensors()
    expected = stock_loss((hidden.double() @ weight.double().T) * 1000, labels)
    actual = tiled_cross_entropy(hidden, weight, labels, scale=1000.0, tile_size=8)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)


# Half precision


def test_bf16_gradients_are_rounded_once_not_once_a_tile():
    """bf16 keeps 8 bits, so one rounding costs 2^-9 of an entry. The logits are rounded once too, as a bf16 head
    rounds them, which moves probabilities by up to 2^-9 of the largest logit (here 4): 2^-7 together. Adding 64 tiles
    up in bf16 loses several times more."""
    hidden, weight, bias, labels = tensors(torch.bfloat16, tokens=1024, words=64, width=16)
    with torch.no_grad():
        weight.mul_(0.25)
    inputs = (hidden, weight, bias)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    expected = stock_loss(exact[0] @ exact[1].T + exact[2], labels)
    wanted = torch.autograd.grad(expected, exact)
    actual = tiled_cross_entropy(hidden, weight, labels, bias=bias, tile_size=16)
    found = torch.autograd.grad(actual, inputs)
    assert actual.dtype == torch.float32 and {x.dtype for x in found} == {torch.bfloat16}
    assert actual.item() == pytest.approx(expected.item(), rel=1e-3)
    errors = [error_of(ours.float(), theirs) for ours, theirs in zip(found, wanted)]
    assert max(errors) < 2**-7, errors
    naive = [torch.zeros_like(x) for x in inputs[1:]]
    for part in range(0, 1024, 16):
        tile = slice(part, part + 16)
        loss = stock_loss(F.linear(hidden[tile], weight, bias).float(), labels[tile], num_items=(labels != -100).sum())
        for total, gradient in zip(naive, torch.autograd.grad(loss, inputs[1:])):
            total += gradient
    for ours, total, theirs in zip(errors[1:], naive, wanted[1:]):
        assert ours < error_of(total.float(), theirs) / 3


@pytest.mark.parametrize("kind", ["linear", "two layers"])
def test_autocast_multiplies_in_its_precision_and_gradients_keep_theirs(kind):
    hidden, _, _, labels = tensors()
    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, WORDS)
    if kind == "two layers":
        head = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), head)
    inputs = (hidden, *head.parameters())
    wanted = torch.autograd.grad(stock_loss(head(hidden), labels), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        stock = stock_loss(head(hidden).float(), labels)
        loss = tiled_head_loss(hidden, head, labels, tile_size=8)
    # Transformers rounds logits once the bias is added, we before: 2^-9 of a logit here and there.
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(stock.item(), rel=1e-3)
    found, stock = torch.autograd.grad(loss, inputs), torch.autograd.grad(stock, inputs)
    for ours, theirs, exact in zip(found, stock, wanted):
        assert ours.dtype == torch.float32
        # bf16 keeps 8 bits, and two layers round twice; transformers' own error under autocast is as large.
        assert error_of(ours, exact) < max(2**-6, 1.5 * error_of(theirs, exact))
    assert any(not torch.equal(ours, exact) for ours, exact in zip(found, wanted))


# Heads that are not a plain linear layer


def test_a_linear_head_takes_the_plain_path_and_others_do_not():
    hidden, _, _, labels = tensors()
    head = torch.nn.Linear(WIDTH, WORDS, bias=False)
    calls = []
    head.forward = lambda inputs: calls.append(len(inputs)) or F.linear(inputs, head.weight)
    other = tiled_head_loss(hidden, head, labels, tile_size=8)
    assert sum(calls) == int((labels != -100).sum()) and max(calls) == 8
    del head.forward
    hook = head.register_forward_hook(lambda module, inputs, output: calls.append(len(output)) or 2 * output)
    doubled = tiled_head_loss(hidden, head, labels, tile_size=8)
    assert sum(calls) == 2 * int((labels != -100).sum())
    hook.remove()
    with Recorder() as seen:
        plain = tiled_head_loss(hidden, head, labels, tile_size=8)
    assert seen.count("detach") == 0, "a graph was made inside a tile"
    assert_same([plain, other], [stock_loss(head(hidden), labels)] * 2, 1e-6)
    expected = stock_loss(2 * head(hidden), labels)
    assert_same([doubled, *gradients(doubled, (hidden,))], [expected, *gradients(expected, (hidden,))], 1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_head_of_several_layers(rule, dtype):
    hidden, _, _, labels = tensors(dtype)
    torch.manual_seed(1)
    head = torch.nn.Sequential(torch.nn.Linear(WIDTH, 9), torch.nn.Tanh(), torch.nn.Linear(9, WORDS)).to(dtype)
    head[0].bias.requires_grad_(False)
    expected = stock_loss(head(hidden), labels, **RULES[rule])
    actual = tiled_head_loss(hidden, head, labels, tile_size=10, **RULES[rule])
    inputs = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    assert_same([actual, *gradients(actual, inputs)], [expected, *gradients(expected, inputs)], TOLERANCE[dtype])


def test_finish_runs_behind_the_head_and_before_the_rule():
    hidden, weight, bias, labels = tensors()
    head = torch.nn.Linear(WIDTH, WORDS)
    labels = labels.clamp(max=WORDS - 10)
    expected = stock_loss(head(hidden)[..., : WORDS - 9] ** 2, labels, softcap=4.0)
    actual = tiled_head_loss(hidden, head, labels, tile_size=5, finish=lambda z: z[:, : WORDS - 9] ** 2, softcap=4.0)
    inputs = [hidden, *head.parameters()]
    assert_same([actual, *gradients(actual, inputs)], [expected, *gradients(expected, inputs)], 1e-6)


@pytest.mark.parametrize("adapter", ["lora", "dora", "saved copy"])
def test_adapters_on_the_head(adapter):
    peft = pytest.importorskip("peft")
    hidden, _, _, labels = tensors()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.lm_head = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WORDS, bias=False)

        def forward(self, x):
            return self.lm_head(self.body(x))

    torch.manual_seed(2)
    where = {"modules_to_save": ["lm_head"], "target_modules": ["body"]}
    if adapter != "saved copy":
        where = {"target_modules": ["lm_head"], "use_dora": adapter == "dora", "init_lora_weights": False}
    model = peft.get_peft_model(Model(), peft.LoraConfig(r=4, **where))
    head = model.base_model.model.lm_head
    inputs = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    assert len(inputs) >= 2 and not isinstance(head, torch.nn.Linear)
    expected, actual = stock_loss(head(hidden), labels), tiled_head_loss(hidden, head, labels, tile_size=10)
    assert_same([actual, *gradients(actual, inputs)], [expected, *gradients(expected, inputs)], 1e-6)
    assert head.base_layer.weight.grad is None if adapter != "saved copy" else True


def test_a_frozen_head_without_gradients_at_all():
    _, _, _, labels = tensors()
    head = torch.nn.Sequential(torch.nn.Linear(WIDTH, WORDS)).requires_grad_(False)
    hidden = torch.randn(TOKENS, WIDTH)
    loss = tiled_head_loss(hidden, head, labels, tile_size=10)
    assert not loss.requires_grad
    assert_same([loss], [stock_loss(head(hidden), labels)], 1e-6)
    none = tiled_head_loss(hidden.requires_grad_(), head, torch.full_like(labels, -100), tile_size=10)
    none.backward()
    assert none == 0 and hidden.grad.eq(0).all()


# One entry a token


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tile_size", [1, 11, None])
@pytest.mark.parametrize("rule", [{}, {"scale": 1.7, "softcap": 2.0}], ids=["plain", "scale and softcap"])
def test_token_scores_and_their_gradients(rule, tile_size, dtype):
    hidden, weight, bias, labels = tensors(dtype)
    hidden_rows, label_rows = hidden.view(3, 21, WIDTH), labels.view(3, 21)
    with torch.no_grad():  # some hits
        hits = torch.arange(0, TOKENS, 4)
        hits = hits[labels[hits] >= 0]
        hidden[hits] = 2 * weight[labels[hits]]
    scores = tiled_token_scores(hidden_rows, weight, label_rows, bias=bias, tile_size=tile_size, **rule)
    log_probs = torch.log_softmax(transformed(hidden_rows @ weight.T + bias, **rule), -1)
    valid = label_rows != -100
    chosen = log_probs.gather(-1, label_rows.clamp(min=0)[..., None])[..., 0]
    expected = [chosen.where(valid, 0), -(log_probs.exp() * log_probs).sum(-1).where(valid, 0)]
    assert_same([scores.log_probs, scores.entropy], expected, TOLERANCE[dtype])
    assert torch.equal(scores.is_top1, (log_probs.argmax(-1) == label_rows) & valid)
    assert scores.is_top1.any() and not scores.is_top1.requires_grad
    inputs = (hidden, weight, bias)
    weights = [torch.randn(3, 21, dtype=dtype) for _ in range(2)]
    for factors in ((1, 1), (1, 0), (0, 1)):
        ours = sum(f * (w * x).sum() for f, w, x in zip(factors, weights, (scores.log_probs, scores.entropy)) if f)
        theirs = sum(f * (w * x).sum() for f, w, x in zip(factors, weights, expected) if f)
        found = torch.autograd.grad(ours, inputs, retain_graph=True)
        assert_same(found, torch.autograd.grad(theirs, inputs, retain_graph=True), 2 * TOLERANCE[dtype])


def test_token_scores_of_no_valid_token_and_of_a_masked_word():
    hidden, weight, bias, labels = tensors()
    scores = tiled_token_scores(hidden, weight, torch.full_like(labels, -100))
    (scores.log_probs.sum() + scores.entropy.sum()).backward()
    assert not scores.is_top1.any() and hidden.grad.eq(0).all() and weight.grad.eq(0).all()
    with torch.no_grad():
        bias[3] = -torch.inf
    scores = tiled_token_scores(hidden, weight, labels.where(labels != 3, 4), bias=bias)
    (gradient,) = torch.autograd.grad(scores.entropy.sum(), hidden)
    assert scores.entropy.isfinite().all() and gradient.isfinite().all()


def test_token_scores_give_what_is_asked():
    hidden, weight, _, labels = tensors()
    with torch.no_grad():
        scores = tiled_token_scores(hidden, weight, labels, outputs=("is_top1",))
    assert scores.log_probs is None and scores.entropy is None and scores.is_top1.dtype == torch.bool
    scores = tiled_token_scores(hidden, weight, labels, outputs=["log_probs"], tile_size=5)
    loss = -scores.log_probs.sum() / (labels != -100).sum()
    other = tiled_cross_entropy(hidden, weight, labels)
    inputs = (hidden, weight)
    assert_same([loss, *gradients(loss, inputs)], [other, *gradients(other, inputs)], 1e-6)


class WithoutGradient(torch.autograd.Function):
    """The same values; what comes before gets no gradient from here, not even zeros."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, _):
        return None


def test_token_scores_that_get_no_gradient_give_none():
    hidden, weight, _, labels = tensors()
    scores = tiled_token_scores(hidden, weight, labels)
    (WithoutGradient.apply(scores.log_probs).sum() + hidden.sum()).backward()
    assert hidden.grad.eq(1).all() and weight.grad is None


def test_token_scores_under_autocast():
    hidden, weight, bias, labels = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        scores = tiled_token_scores(hidden, weight, labels, bias=bias, tile_size=5)
        loss = tiled_cross_entropy(hidden, weight, labels, bias=bias, tile_size=5)
    mean = -scores.log_probs.sum() / (labels != -100).sum()
    assert mean.item() == pytest.approx(loss.item(), rel=1e-6)
    inputs = (hidden, weight, bias)
    assert_same(gradients(mean, inputs), gradients(loss, inputs), 2**-7)


# Memory


class Recorder(TorchDispatchMode):
    """Every operation that ran, and the largest tensor that one made."""

    def __enter__(self):
        self.names, self.largest = [], 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result

    def count(self, name: str) -> int:
        return self.names.count(name)


@pytest.mark.parametrize("kind", ["loss", "head", "scores"])
def test_the_largest_tensor_does_not_grow_with_the_row(kind):
    words, width, tile_size, largest = 4096, 8, 64, {}
    for tokens in (2048, 16384):
        hidden, weight, _, labels = tensors(tokens=tokens, words=words, width=width)
        head = torch.nn.Sequential(torch.nn.Linear(width, words, bias=False))
        with Recorder() as seen:
            if kind == "scores":
                loss = tiled_token_scores(hidden, weight, labels, tile_size=tile_size).log_probs.sum()
            elif kind == "loss":
                loss = tiled_cross_entropy(hidden, weight, labels, tile_size=tile_size)
            else:
                loss = tiled_head_loss(hidden, head, labels, tile_size=tile_size)
            loss.backward()
        largest[tokens] = seen.largest
    assert largest[2048] == largest[16384] == tile_size * words


def test_the_default_tile_fits_the_vocabulary():
    assert choose_tile_size(None, 128 * 1024) * 128 * 1024 == TILE_ENTRIES
    assert choose_tile_size(None, 10**9) == MIN_TILE_TOKENS
    assert choose_tile_size(3, 10**9) == 3


# Bad input


@pytest.mark.parametrize("tile_size", [0, -1, 2.0, True, "8"])
def test_bad_tile_sizes_are_named(tile_size):
    hidden, weight, _, labels = tensors()
    for function in (tiled_cross_entropy, tiled_token_scores):
        with pytest.raises(ValueError, match=r"`tile_size` \(.*\) must be a positive integer"):
            function(hidden, weight, labels, tile_size=tile_size)
    with pytest.raises(ValueError, match="`tile_size`"):
        tiled_head_loss(hidden, torch.nn.Sequential(torch.nn.Linear(WIDTH, WORDS)), labels, tile_size=tile_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing": 1.5}, r"`label_smoothing` \(1.5\) must be between 0 and 1"),
        ({"label_smoothing": float("nan")}, "`label_smoothing`"),
        ({"z_loss": -1.0}, "`z_loss`"),
        ({"scale": 0.0}, "`scale`"),
        ({"softcap": 0.0}, "`softcap`"),
        ({"softcap": -1.0}, "`softcap`"),
        ({"labels": torch.zeros(TOKENS + 1, dtype=torch.long)}, "`labels` has shape .* one label a token"),
        ({"labels": torch.zeros(TOKENS)}, r"`labels` \(torch.float32\) must be integers"),
        ({"weight": torch.zeros(WORDS, WIDTH + 1)}, "`weight` has shape"),
        ({"weight": torch.zeros(WORDS, WIDTH, dtype=torch.bfloat16)}, "`hidden` is torch.float32 and `weight`"),
        ({"bias": torch.zeros(WORDS + 1)}, "`bias` has shape"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    hidden, weight, _, labels = tensors()
    with pytest.raises(ValueError, match=message):
        tiled_cross_entropy(**{"hidden": hidden, "weight": weight, "labels": labels, **changes})


@pytest.mark.parametrize("outputs", [(), ("log_prob",), ("entropy", "loss")])
def test_unknown_scores_are_named(outputs):
    hidden, weight, _, labels = tensors()
    with pytest.raises(ValueError, match="`outputs`.*log_probs, entropy, is_top1"):
        tiled_token_scores(hidden, weight, labels, outputs=outputs)


def test_a_label_outside_the_vocabulary_fails():
    hidden, weight, _, labels = tensors()
    labels[5] = WORDS
    with pytest.raises((IndexError, RuntimeError)):
        tiled_cross_entropy(hidden, weight, labels)


def test_a_head_that_pools_is_refused():
    hidden, _, _, labels = tensors()
    with pytest.raises(ValueError, match=r"`Flatten` answers .* must map \(tokens, features\) to \(tokens, words\)"):
        tiled_head_loss(hidden, torch.nn.Flatten(0), labels)


def test_a_second_backward_is_refused():
    hidden, weight, _, labels = tensors()
    loss = tiled_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="asked for twice"):
        loss.backward()
