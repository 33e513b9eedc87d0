"""`TrainerBase`: start-up, mesh, loaders, guards and batch size of every trainer on shared or packed rows.

What: a mixin in front of a library's trainer, `class X(TrainerBase, Trainer)`. It holds what does not depend on the
loss; there is no arithmetic here. What depends on it, a trainer adds in the hooks: `prepare_arguments`, `check_model`
and `prepare_model` while it is built, `check_share` before a forward. Losses that are means over tokens have theirs in
[`SequenceParallelMixin`].

Order of the start: configs and arguments are checked; the library builds its trainer; what it built is checked, since
a launcher may have brought settings that the arguments do not show; the mesh is built; the model is changed and
checked on it. So a model is unchanged when a run is refused for its settings.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from ..adapters.few_bits import keep_gradients
from ..config.audiences import take_configs
from ..config.run import LongContextConfig
from ..data.packing.collator import PackingCollator, fills_rows
from ..data.packing.document_columns import READ_COLUMNS
from ..parallel.mesh import SequenceMesh
from ..parallel.shard import validate_same_rows
from ..resilience.fault_tolerance import FaultToleranceMixin
from ..resilience.same_settings import validate_same_settings
from .checks import check_arguments, check_model, check_trainer
from .inner_checks import refuse_by_name, refuse_lost_reference
from .loaders import build_loader, check_streams, never_ends
from .packed_rows import check_packed_batch, pack_dataset
from .random_draws import check_noise, check_noise_of_batch, warn_about_draws
from .true_cause import refuse_sampling


class TrainerBase(FaultToleranceMixin):
    """Put in front of a library's trainer class: `class X(TrainerBase, Trainer)`.

    Args:
        args, kwargs: the library's, unchanged, and one keyword for each entry of `configs`, which is then an attribute
            of the trainer.

    Attributes:
        configs (`dict[str, type]`): the configs that the trainer understands, by keyword; a row of `TRAINERS`.
        mesh ([`SequenceMesh`]): the axes of the run.
        shards_batches (`bool`): whether loaders cut rows into the shares of a group.
        gives_whole_rows (`bool`): whether the ranks of a group get the same whole rows, which their models cut.
        flattens_rows (`bool`): whether the trainer itself makes packed rows of whatever its collator gives.
        reads_own_shards (`bool`): whether every group reads its own shards of a training stream; see [`split_stream`].
    """

    args: Any  # of the library's trainer
    long_context: LongContextConfig
    configs: Mapping[str, type] = {"long_context": LongContextConfig}
    shards_batches = False
    gives_whole_rows: Any = False
    flattens_rows = False
    reads_own_shards = True
    _has_same_settings = False

    def __init__(self, *args, **kwargs) -> None:
        for name, config in take_configs(type(self).__name__, self.configs, kwargs).items():
            setattr(self, name, config)
        refuse_sampling(type(self), self.long_context.sequence_parallel_size)
        given = _by_name(type(self), args, kwargs)
        refuse_by_name(given.get("model"))
        refuse_lost_reference(type(self), given)
        self._compare_settings(given.get("args"))
        check_arguments(given.get("args"), self.long_context)
        self.prepare_arguments(given)
        super().__init__(**given)
        self._compare_settings(self.args)
        check_arguments(self.args, self.long_context)
        check_trainer(self)
        check_streams(self)
        self.check_model()
        keep_gradients(self.model)
        self._noise = check_noise(self)
        warn_about_draws(self.model, self.long_context.sequence_parallel_size)
        self.build_mesh()
        self._checks_packing = self.long_context.check_packing
        self._attach_guards()
        self.prepare_model()

    def _compare_settings(self, args: Any) -> None:
        """Compare the settings of all ranks, once: at first where the arguments started the processes' group."""
        if args is None or self._has_same_settings:
            return
        configs = {name: getattr(self, name) for name in self.configs}
        shares_rows = self.long_context.sequence_parallel_size > 1
        self._has_same_settings = validate_same_settings(configs, args, shares_rows)

    def build_mesh(self) -> None:
        """Lay the processes out, once; a library that computes while it is built needs that before it has ended."""
        if "mesh" not in vars(self):
            timeout = timedelta(seconds=self.args.ddp_timeout)
            self.mesh = SequenceMesh.build(self.long_context.sequence_parallel_size, timeout)

    # Hooks

    def prepare_arguments(self, given: dict[str, Any]) -> None:
        """Check or change what the library's constructor gets, by name."""

    def check_model(self) -> None:
        """Refuse a model by what its configuration says. Nothing is changed yet, and there is no mesh."""
        check_model(self.model, self.long_context)

    def prepare_model(self) -> None:
        """Adapt, pack and prove the model on the mesh."""

    def check_share(self, inputs: dict[str, Any]) -> None:
        """Look at, or change, a share of a batch that has just been bound to its group, before its forward."""

    @property
    def shifts_labels(self) -> bool:
        """Whether the model predicts the next token, so that labels are shifted before rows are cut."""
        return False

    @property
    def batch_weight(self) -> float:
        """By what a rank multiplies a term of its rows that is no mean over tokens; see [`SequenceShard`]."""
        return 1.0

    @property
    def data_seed(self) -> int:
        """The seed of the order of rows."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    # What the library calls

    def _set_signature_columns_if_needed(self):
        """The columns that the library keeps: the model's, and those that tell the collator what to train."""
        super()._set_signature_columns_if_needed()
        if isinstance(self.data_collator, PackingCollator):
            self._signature_columns = list(dict.fromkeys([*self._signature_columns, *READ_COLUMNS]))

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        if self.shards_batches or (is_training and (self.gives_whole_rows or never_ends(self, dataset))):
            return build_loader(self, dataset, description, batch_size, sampler_fn, is_training)
        if fills_rows(self.data_collator):
            group_size = batch_size * self.mesh.data_parallel_size
            dataset, sampler_fn = pack_dataset(self, dataset, description, group_size, sampler_fn, is_training)
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        shard = inputs.get("sequence_shard")
        if shard is not None and shard.group is None:
            # A new object: what the layers plan for it is then freed with these inputs, not with the loader's batch.
            bound = shard.bind(self.mesh).to(self.args.device)
            inputs["sequence_shard"] = dataclasses.replace(bound, batch_weight=self.batch_weight)
            self.check_share(inputs)
            validate_same_rows(inputs["sequence_shard"])
        check_noise_of_batch(self._noise, inputs)
        if self._checks_packing and check_packed_batch(self, inputs):
            self._checks_packing = False
        return inputs

    def _track_num_input_tokens(self, inputs):
        shard = inputs.get("sequence_shard") if isinstance(inputs, Mapping) else None  # rows, where a trainer samples
        if shard is not None:  # the pad segment is not input
            real = ("input_ids", "attention_mask")
            inputs = {key: value[:, : shard.num_local_tokens] for key, value in inputs.items() if key in real}
        super()._track_num_input_tokens(inputs)

    def evaluation_loop(self, *args, **kwargs):
        """The library's loop, which leaves a model that was not trained yet as it was."""
        is_fresh = not self.is_in_train and self.model_wrapped is self.model
        own_forward = vars(self.model).get("forward")
        output = super().evaluation_loop(*args, **kwargs)
        if is_fresh and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # transformers marks the bare model as prepared, and `train()` would then never wrap it: ranks would drift
            # apart.
            self.model = self.model_wrapped = self.accelerator.unwrap_model(self.model)
            self.model._is_accelerate_prepared = False
            # accelerate takes its casts off a forward together with all that was put around it before, such as TRL's
            # head and this package's own.
            if vars(self.model).pop("_original_forward", None) is not None:
                del self.model.forward
                if own_forward is not None:
                    self.model.forward = own_forward
        return output

    def get_total_train_batch_size(self, args) -> int:
        library: Any = super()
        return library.get_total_train_batch_size(args) // self.mesh.sequence_parallel_size


def _by_name(trainer: type, args: tuple, kwargs: dict[str, object]) -> dict[str, object]:
    """All arguments of the library's constructor by name; too many of them, or one given twice, raise `TypeError`."""
    below = trainer.__mro__[trainer.__mro__.index(TrainerBase) + 1 :]
    for init in (vars(base)["__init__"] for base in below if "__init__" in vars(base)):
        signature = inspect.signature(init)
        if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in signature.parameters.values()):
            break  # otherwise it passes on what the one behind it names
    known = {name: value for name, value in kwargs.items() if name in signature.parameters}
    _, *named = signature.bind_partial(trainer, *args, **known).arguments.items()
    return dict(named) | kwargs
