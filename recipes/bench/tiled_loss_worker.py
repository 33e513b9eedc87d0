"""One contender of the tiled-loss benchmark, in a process of its own: build, warm up, one measured loss, compare.

Started by `tiled_loss.py`. It reads its settings from one JSON argument and writes its numbers to `result`. A step is
the cross entropy of one row of random hidden states with random labels, and its backward to hidden states and weights:
what stands between the last norm of a model and the gradient that enters it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss
from ulysses_worker import Meter


WARM_UP_TOKENS = 256
TRL_VOCABULARY_CHUNK = 32768  # what TRL's trainers pass

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def untiled(settings: dict) -> Loss:
    """The loss of every causal language model of transformers, on whole logits."""

    def loss(hidden, weight, labels):
        logits = F.linear(hidden, weight)
        return ForCausalLMLoss(logits, None, len(weight), num_items_in_batch=len(labels), shift_labels=labels)

    return loss


def ours(settings: dict) -> Loss:
    from hf_longctx.losses.tiled_logits import tiled_cross_entropy

    def loss(hidden, weight, labels):
        return tiled_cross_entropy(hidden, weight, labels, num_items=len(labels), tile_size=settings["tile_size"])

    return loss


def ours_metrics(settings: dict) -> Loss:
    """With entropy and top-1 hits of every token, which are not differentiated."""
    from hf_longctx.losses.tiled_scores import tiled_token_scores

    def loss(hidden, weight, labels):
        scores = tiled_token_scores(hidden, weight, labels, tile_size=settings["tile_size"])
        return -scores.log_probs.sum() / len(labels)

    return loss


def trl(settings: dict, outputs: tuple[str, ...] = ("log_probs",)) -> Loss:
    """TRL's fused head as its `SFTTrainer` runs it, without the metrics."""
    from trl.kernels import ChunkedLogProbFunction

    def loss(hidden, weight, labels):
        mask = labels != -100
        if hidden.is_cuda:  # there it scores valid tokens only, elsewhere all
            hidden, labels = hidden[mask], labels[mask]
        scores = ChunkedLogProbFunction.apply(
            hidden, weight, None, labels.clamp(min=0), 1.0, TRL_VOCABULARY_CHUNK, None, 1.0, outputs
        )
        log_probs = scores[0] if hidden.is_cuda else scores[0].masked_fill(~mask, 0)
        return -log_probs.sum() / len(mask)

    return loss


def trl_metrics(settings: dict) -> Loss:
    """The same with the metrics, as `SFTTrainer` runs it."""
    return trl(settings, ("log_probs", "entropy", "is_top1"))


def torch_chunks(settings: dict) -> Loss:
    """Torch's own (2.13), which chooses its chunks unless a tile size is given."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=settings["tile_size"])

    def loss(hidden, weight, labels):
        return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options) / len(labels)

    return loss


def liger(settings: dict) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    function = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, labels: function(weight, hidden, labels) / len(labels)


CONTENDERS = {
    "untiled": untiled,
    "ours": ours,
    "ours_metrics": ours_metrics,
    "trl": trl,
    "trl_metrics": trl_metrics,
    "torch": torch_chunks,
    "liger": liger,
}


def make_inputs(settings: dict, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states and weight with logits of a trained model's size, and labels of which a share is ignored."""
    generator = torch.Generator(settings["device"]).manual_seed(0)
    width, words, dtype = settings["width"], settings["vocab"], getattr(torch, settings["dtype"])
    options = {"generator": generator, "device": settings["device"]}
    weight = torch.randn(words, width, **options).mul_(2 * width**-0.5).to(dtype)
    hidden = torch.randn(tokens, width, **options).to(dtype)
    labels = torch.randint(words, (tokens,), **options)
    labels[torch.rand(tokens, **options) < settings["ignored"]] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def measure(settings: dict) -> dict:
    """Warm up on a few tokens, then one step on the row, with its clocks and memory."""
    meter, loss_of = Meter(settings["device"]), CONTENDERS[settings["contender"]](settings)
    hidden, weight, labels = make_inputs(settings, settings["tokens"])
    few = hidden.detach()[:WARM_UP_TOKENS].requires_grad_()
    loss_of(few, weight, labels[:WARM_UP_TOKENS]).backward()
    weight.grad = None
    before = meter.memory()
    meter.reset_peak()
    meter.start()
    loss = loss_of(hidden, weight, labels)
    loss.backward()
    times, peak = meter.stop(), meter.peak()
    held = sum(x.numel() * x.element_size() for x in (hidden.grad, weight.grad))
    return {
        **times,
        "before_bytes": before,
        "step_bytes": peak - before,
        "above_bytes": peak - before - held,
        "device_name": torch.cuda.get_device_name() if meter.cuda else "CPU",
        **compare(loss.item(), {"hidden": hidden.grad, "weight": weight.grad}, settings["reference"]),
    }


def compare(loss: float, gradients: dict[str, torch.Tensor], reference: str | None) -> dict:
    """Relative errors of loss and worst gradient against `reference`, which is written if absent."""
    facts = {"loss": loss, "gradient_norm": sum(g.double().norm().item() for g in gradients.values())}
    if reference is None:
        return facts
    if not os.path.exists(reference):
        torch.save({"loss": loss, **{name: g.cpu() for name, g in gradients.items()}}, reference)
        return facts
    expected = torch.load(reference, mmap=True, weights_only=True)
    errors = [
        ((g.cpu().double() - expected[name].double()).norm() / expected[name].double().norm()).item()
        for name, g in gradients.items()
    ]
    return {**facts, "loss_error": abs(loss / expected["loss"] - 1), "gradient_error": max(errors)}


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    Path(settings["result"]).write_text(json.dumps(measure(settings)))


if __name__ == "__main__":
    main()
