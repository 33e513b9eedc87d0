"""`LongContextSentenceTransformerTrainer`: sentence-transformers' trainer without padding and on shared documents."""

from __future__ import annotations

import contextlib

import torch

from ..config.audiences import TRAINERS
from ..trainer.base import TrainerBase


try:
    from sentence_transformers import SentenceTransformerTrainer
except ImportError as error:
    raise ImportError(
        "`LongContextSentenceTransformerTrainer` needs sentence-transformers: `pip install hf-longctx[embedding]`."
    ) from error

from .evaluation_rounds import ALONE, ROWS, EvaluationSums, count_rows, without_gathering
from .evaluators import evaluate_everywhere
from .held_models import (
    average_gradients,
    bare_model,
    holds_model,
    named_row_readers,
    pad_for_held_models,
    put_wrapper,
    refuse_direct_calls,
    refuse_losses_of_rows,
    refuse_trained_copies,
    same_parameters,
)
from .loss_checkpoint import load_loss, save_loss
from .packable import check_packable
from .packed_model import pack_embeddings, shared_rows
from .run_checks import check_named_sources, report_truncation
from .text_collator import EmbeddingCollator
from .tiled_ranking_loss import bind_losses, check_losses
from .training_loaders import build_evaluation_loader, build_training_loader, describe_streams


class LongContextSentenceTransformerTrainer(TrainerBase, SentenceTransformerTrainer):
    """`sentence_transformers.SentenceTransformerTrainer` without padding and on shared documents.

    Args:
        long_context ([`LongContextConfig`], *optional*): number of processes that share a document.
        sources ([`SourcesConfig`], *optional*): which rows of several sources make a batch.
        texts ([`TextsConfig`], *optional*): what is done with texts that the model cannot read whole.
        args, kwargs: those of `SentenceTransformerTrainer`, unchanged: any loss, evaluator and model card. The model
            must be loaded with `model_kwargs={"attn_implementation": "packed"}` or `"ulysses"`.

    Texts are never padded, whatever the kernel. With `sequence_parallel_size` above 1 the ranks of a group share the
    tokens of a batch, and losses and evaluators still see whole embeddings. What cannot equal one process raises
    before the first step.

    Example:
    ```python
    model = SentenceTransformer(name, model_kwargs={"attn_implementation": "ulysses"})
    trainer = LongContextSentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset={"nli": nli, "docs": docs},
        loss=TiledMultipleNegativesRankingLoss(model, mini_batch_num_tokens=16_384),
        long_context=LongContextConfig(sequence_parallel_size=2),
        sources=SourcesConfig(source_weights={"nli": 1, "docs": 4}),
    )
    trainer.train()
    ```
    """

    configs = TRAINERS["LongContextSentenceTransformerTrainer"]
    data_collator_class = EmbeddingCollator
    flattens_rows = True
    _evaluated_rows: int = 1  # of the batch whose loss is computed
    reads_own_shards = False  # every rank reads the sources of all, see `build_source_loader`

    def prepare_arguments(self, given: dict[str, object]) -> None:
        check_named_sources(given.get("train_dataset"), self.sources)
        for name in ("train_dataset", "eval_dataset"):
            given[name] = describe_streams(given.get(name))

    def check_model(self) -> None:
        check_packable(self.model)
        refuse_losses_of_rows(self.loss, self.model)

    def prepare_model(self) -> None:
        # The proof is run on rows as training has them. Outside its own steps every process has rows of its own, so
        # that `model.encode` on one rank waits for no other.
        inner, proves = self.long_context.inner_attention, self.long_context.check_packing
        pack_embeddings(self.model, self.mesh, inner_attention=inner, prove=proves)
        pack_embeddings(self.model, prove=False)
        self._checks_packing = False
        check_losses(self.loss, self.mesh)
        # A step that is to be skipped must not raise in its forward.
        bind_losses(self.loss, self.mesh, refuse_nonfinite=self.long_context.on_nonfinite == "raise")
        self._adapt_losses()
        report_truncation(self)

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        return pack_embeddings(model, prove=False)

    def override_model_in_loss(self, loss, model):
        """Every attribute that is the model, whatever its name; sentence-transformers looks at `model` alone."""
        if hasattr(self, "model"):
            put_wrapper(loss, bare_model(self.model), model)
        return loss if holds_model(loss, bare_model(model)) else super().override_model_in_loss(loss, model)

    def _adapt_losses(self) -> None:
        """What `prepare_model` does to losses; again where a loss was set, or a model was built, since."""
        self._adapted = (self.loss, self.model)
        pad_for_held_models(self.loss, bare_model(self.model))
        if self.args.world_size > 1:
            same_parameters(self.loss, bare_model(self.model))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._adapted[0] is not self.loss or self._adapted[1] is not self.model:
            self._adapt_losses()
        trained = bare_model(self.model)
        if model is self.model_wrapped:
            put_wrapper(self.loss, trained, model)
        with named_row_readers(self.loss, trained, inputs.get("label") is not None):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def get_train_dataloader(self):
        loader = build_training_loader(self)
        if loader is None:
            return super().get_train_dataloader()
        self._train_dataloader = loader
        return loader

    def get_eval_dataloader(self, eval_dataset=None):
        if eval_dataset is None and self.eval_dataset is None:
            return super().get_eval_dataloader(eval_dataset)
        return build_evaluation_loader(self, self.eval_dataset if eval_dataset is None else eval_dataset)

    def training_step(self, model, inputs, num_items_in_batch=None):
        trained = bare_model(self.model)
        with self._shared_rows(), refuse_direct_calls(model, trained):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.args.world_size > 1 and self.accelerator.sync_gradients:
            refuse_trained_copies(self.loss, trained)
            average_gradients(self.loss, trained)
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = dict(inputs)
        alone = inputs.pop(ALONE, False)
        self._evaluated_rows = inputs.pop(ROWS, None)
        if self._evaluated_rows is None:
            self._evaluated_rows = count_rows(inputs)
        with self._shared_rows(), without_gathering(self.loss) if alone else contextlib.nullcontext():
            output = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self._evaluation_sums.add(output[0], self._evaluated_rows, self.args.logging_nan_inf_filter)
        return output

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """sentence-transformers' loop, with `eval_loss` as the mean of batches weighed by their rows, on any mesh."""
        self._evaluation_sums = EvaluationSums()
        if self.mesh.sequence_parallel_size == 1 or self.evaluator is None:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        else:
            with self._shared_rows():
                output = evaluate_everywhere(
                    self, super().evaluation_loop, *args, metric_key_prefix=metric_key_prefix, **kwargs
                )
        loss = self._evaluation_sums.mean(self.accelerator)
        if loss is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        return output

    def track_loss_components(self, loss):
        """sentence-transformers' own; in an evaluation, weighed by rows as their sum is."""
        if self.model.training:
            return super().track_loss_components(loss)
        sums = self.accum_loss_components["eval"]
        for name, value in loss.items():
            value = value.detach() * self._evaluated_rows
            sums[name] = sums[name] + value if name in sums else value
        device = next(iter(loss.values())).device
        sums["steps"] = sums.get("steps", torch.tensor(0, device=device)) + self._evaluated_rows

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        save_loss(self, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint):
        load_loss(self, checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _shared_rows(self):
        return shared_rows(self.model, self.mesh, self.long_context.inner_attention)
