"""Trainers as users write them: losses of their own in `compute_loss` and in `compute_loss_func`."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy, pad


def targets_of(inputs):
    """What each position predicts, also where a stock trainer has labels only."""
    targets = inputs.get("shift_labels")
    return pad(inputs["labels"], (0, 1), value=-100)[:, 1:] if targets is None else targets


def token_losses(logits, targets):
    return cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def shifted(outputs, labels):
    """Losses of tokens as a `compute_loss_func` has them in one process, and which of them count."""
    return token_losses(outputs.logits[:, :-1], labels[:, 1:]), labels[:, 1:] != -100


# Losses by tokens that add up


def z_loss(outputs, labels, num_items_in_batch=None):
    losses, counts = shifted(outputs, labels)
    return (losses + 1e-2 * outputs.logits[:, :-1].logsumexp(-1) ** 2 * counts).sum() / num_items_in_batch


def smoothed(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return cross_entropy(logits, labels, label_smoothing=0.2, reduction="sum") / num_items_in_batch


def focal(outputs, labels, num_items_in_batch=None):
    losses, _ = shifted(outputs, labels)
    return (losses * (1 - torch.exp(-losses)) ** 2).sum() / num_items_in_batch


def by_target(outputs, labels, num_items_in_batch=None):
    losses, _ = shifted(outputs, labels)
    return (losses * (1 + labels[:, 1:].remainder(7) / 7)).sum() / num_items_in_batch


ADDITIVE = [z_loss, smoothed, focal, by_target]


# Losses that do not


def by_position(outputs, labels, num_items_in_batch=None):
    losses, _ = shifted(outputs, labels)
    weights = torch.linspace(0.5, 1.5, losses.shape[1], device=losses.device)
    return (losses * weights).sum() / num_items_in_batch


def squared_rows(outputs, labels, num_items_in_batch=None):
    return (shifted(outputs, labels)[0].sum(1) ** 2).sum() / num_items_in_batch


def neighbours(outputs, labels, num_items_in_batch=None):
    losses, _ = shifted(outputs, labels)
    return (losses.sum() + 1e-3 * (losses[:, 1:] - losses[:, :-1]).pow(2).sum()) / num_items_in_batch


def mean_of_rows(outputs, labels, num_items_in_batch=None):
    losses, counts = shifted(outputs, labels)
    return (losses.sum(1) / counts.sum(1).clamp(min=1)).sum() / num_items_in_batch


def hardest(outputs, labels, num_items_in_batch=None):
    return shifted(outputs, labels)[0].max(1).values.sum() / num_items_in_batch


def hidden_in_the_gradient(outputs, labels, num_items_in_batch=None):
    """The value is that of the sum over tokens; the gradient is weighted by position."""
    losses, _ = shifted(outputs, labels)
    weights = torch.linspace(0.5, 1.5, losses.shape[1], device=losses.device)
    return ((losses * weights).sum() + (losses - losses * weights).detach().sum()) / num_items_in_batch


MIXING = [by_position, squared_rows, neighbours, mean_of_rows, hardest, hidden_in_the_gradient]


# `compute_loss`: each is the body of a mixin in front of a trainer, with `super()` as `own`


def logs(self, own, model, inputs, count):
    loss = own()
    self.seen = [*getattr(self, "seen", []), float(self.accelerator.gather_for_metrics(loss.detach()).mean())]
    return loss


def scales(self, own, model, inputs, count):
    return 0.5 * own()


def decays(self, own, model, inputs, count):
    return own() + 1e-3 * sum(parameter.pow(2).sum() for parameter in model.parameters())


def adds_a_term(self, own, model, inputs, count):
    targets = targets_of(inputs)
    loss, outputs = own(return_outputs=True)
    term = (outputs.logits.logsumexp(-1) ** 2 * (targets != -100)).sum() / count
    return loss + 1e-2 * term * (self.accelerator.num_processes if self.args.average_tokens_across_devices else 1)


def sums_aligned(self, own, model, inputs, count):
    targets = targets_of(inputs)
    losses = token_losses(model(**inputs).logits, targets)
    return losses.sum() / count * self.accelerator.num_processes


def runs_twice(self, own, model, inputs, count):
    return (own() + own()) / 2


EXACT_OVERRIDES = [logs, scales, decays, adds_a_term, sums_aligned, runs_twice]


def shifts_a_share(self, own, model, inputs, count):
    labels = inputs["labels"]
    outputs = model(**inputs)
    return token_losses(outputs.logits[:, :-1], labels[:, 1:]).sum() / count * self.accelerator.num_processes


def averages_a_share(self, own, model, inputs, count):
    targets = targets_of(inputs)
    return cross_entropy(model(**inputs).logits.flatten(0, 1), targets.flatten())


def forgets_the_count(self, own, model, inputs, count):
    return model(**inputs).loss


def squares(self, own, model, inputs, count):
    return own() ** 2


def divides_twice(self, own, model, inputs, count):
    return token_losses(model(**inputs).logits, targets_of(inputs)).sum() / count


def adds_a_maximum(self, own, model, inputs, count):
    loss, outputs = own(return_outputs=True)
    return loss + 1e-2 * outputs.logits.max()


def drops_the_shard(self, own, model, inputs, count):
    targets = targets_of(inputs)
    outputs = model(input_ids=inputs["input_ids"], position_ids=inputs.get("position_ids"))
    return token_losses(outputs.logits, targets).sum() / count * self.accelerator.num_processes


def drops_positions(self, own, model, inputs, count):
    targets = targets_of(inputs)
    kept = {key: value for key, value in inputs.items() if key != "position_ids"}
    return token_losses(model(**kept).logits, targets).sum() / count * self.accelerator.num_processes


def changes_labels(self, own, model, inputs, count):
    inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] % 2 == 0, -100)
    return own()


def differs_in_training(self, own, model, inputs, count):
    return own() ** 2 if model.training else own()


def warms_up(self, own, model, inputs, count):
    loss = own()
    return loss + min(self.state.global_step / 1000, 1) * loss**2


def ignores_the_model(self, own, model, inputs, count):
    return model.get_input_embeddings()(inputs["input_ids"]).pow(2).sum() / count


REFUSED_OVERRIDES = {
    shifts_a_share: "a share's last target is on the next rank",
    averages_a_share: "its means are local",
    forgets_the_count: "its means are local",
    squares: "in one process and .* over 2 shares",
    divides_twice: "multiply by `self.accelerator.num_processes`",
    adds_a_maximum: "its means are local",
    drops_the_shard: "does not give the model all of `inputs`",
    drops_positions: "does not give the model all of `inputs`",
    changes_labels: "change `labels` in the collator",
    differs_in_training: "`compute_loss` of `.*` is ",
    warms_up: "over 2 shares",
    ignores_the_model: "depends on nothing that `model",
}


def with_compute_loss(base: type, body) -> type:
    """`base` with an overridden `compute_loss`."""

    class Overriding(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            def own(return_outputs=False):
                return super(Overriding, self).compute_loss(
                    model, dict(inputs), return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
                )

            loss = body(self, own, model, inputs, num_items_in_batch)
            return (loss, None) if return_outputs else loss

    return Overriding
