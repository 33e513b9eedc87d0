"""`TiledMultipleNegativesRankingLoss`: sentence-transformers' in-batch negatives at any batch size, on any mesh.

What: its cached loss with the loss stage in tiles. Why: that stage holds `N x N` scores, or is cut into pieces as
small as the model's mini-batches, and gathers over all processes, of which some may share a sequence. How: only the
stage between embeddings and loss is replaced, so model cards, `MatryoshkaLoss` and GradCache work as they do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..losses.contrastive import contrastive_loss
from ..losses.contrastive_rules import ContrastiveRule
from ..parallel.collectives import mean_gradient
from ..parallel.mesh import SequenceMesh
from .text_hashes import text_hashes


try:
    from sentence_transformers.base.losses.merged_forward import embed_columns
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.util import cos_sim, dot_score

    from .gradient_cache import cached_loss
except ImportError as error:
    raise ImportError(
        "`TiledMultipleNegativesRankingLoss` needs sentence-transformers: `pip install hf-longctx[embedding]`."
    ) from error


class TiledMultipleNegativesRankingLoss(CachedMultipleNegativesRankingLoss):
    """`CachedMultipleNegativesRankingLoss` whose loss stage needs memory for `N` rows and not for `N x N` scores.

    Args:
        model, scale, directions, partition_mode, hardness_mode, hardness_strength, show_progress_bar:
            as in `CachedMultipleNegativesRankingLoss`.
        similarity_fct (`Callable`, *optional*): `cos_sim` or `dot_score` of sentence-transformers.
        mini_batch_size (`int`, *optional*, defaults to 32):
            Texts that the model sees at a time. `None`, with no `mini_batch_num_tokens`, switches GradCache off: one
            forward of all texts, kept for the backward.
        gather_across_devices (`bool`, *optional*, defaults to `True`):
            Negatives from all data-parallel ranks of `mesh`; one process has its own only.
        mini_batch_num_tokens (`int`, *optional*): tokens that the model sees at a time, instead of texts.
        loss_tile_size (`int`, *optional*, defaults to 1024): rows and columns of the scores that exist at a time.
        negatives (`str`, *optional*, defaults to `"gather"`):
            `"gather"`: every rank holds the embeddings of all ranks. `"ring"`: they go round, which needs less memory
            and computes every score twice.
        mask_duplicates (`bool`, *optional*, defaults to `True`):
            Leave candidates out that are no negatives because their text is that of the positive, or because they
            belong to a pair with the same query or the same positive: see [`~losses.contrastive_rules.Duplicates`].
        learnable_scale (`bool`, *optional*, defaults to `False`): train the logarithm of `scale`, from `scale` on.
        mesh ([`SequenceMesh`], *optional*): who has which rows; a trainer sets it with `bind_losses`.

    Relations: the loss and gradients of `MultipleNegativesRankingLoss` of one process with the rows of all ranks,
        where no text occurs twice.
    Normalization: `ranks * (sum over my rows) / (rows of all ranks)`, over the `dp` axis; ranks that share sequences
        compute the same. The mean over ranks, which DDP and FSDP take, is the mean over rows.
    Communication: see [`~losses.contrastive.contrastive_loss`]; with `learnable_scale` one more all-reduce of a
        number, since no wrapper holds the parameter.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = cos_sim,
        mini_batch_size: int | None = 32,
        gather_across_devices: bool = True,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        *,
        loss_tile_size: int = 1024,
        negatives: str = "gather",
        mask_duplicates: bool = True,
        learnable_scale: bool = False,
        mesh: SequenceMesh | None = None,
    ) -> None:
        super().__init__(
            model,
            scale=scale,
            similarity_fct=similarity_fct,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            gather_across_devices=gather_across_devices,
            directions=directions,
            partition_mode=partition_mode,
            show_progress_bar=show_progress_bar,
            hardness_mode=hardness_mode,
            hardness_strength=hardness_strength,
        )
        self.loss_tile_size, self.negatives, self.mask_duplicates = loss_tile_size, negatives, mask_duplicates
        self.mesh, self.refuse_nonfinite = mesh, True
        self.uses_gradient_cache = mini_batch_size is not None or mini_batch_num_tokens is not None
        self.log_scale = torch.nn.Parameter(torch.tensor(math.log(scale))) if learnable_scale else None
        self._validate()

    def _validate(self) -> None:
        if self.similarity_fct not in (cos_sim, dot_score):
            name = getattr(self.similarity_fct, "__name__", type(self.similarity_fct).__name__)
            raise NotImplementedError(
                f"`similarity_fct` ({name}) must be `cos_sim` or `dot_score` of `sentence_transformers.util`: tiles "
                "know the gradient of these two; use `CachedMultipleNegativesRankingLoss` for another."
            )
        size = self.loss_tile_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(
                f"`loss_tile_size` ({size!r}) must be a positive integer: it is the number of rows and columns of the "
                "scores that exist at a time."
            )
        if self.negatives not in ("gather", "ring"):
            raise ValueError(f"`negatives` ({self.negatives!r}) must be 'gather' or 'ring'.")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scale" and (learned := self.__dict__.get("_parameters", {}).get("log_scale")) is not None:
            with torch.no_grad():
                learned.fill_(math.log(value))
        else:
            super().__setattr__(name, value)

    @property
    def scale(self) -> float:
        return self.loss.scale if self.log_scale is None else self.log_scale.exp().item()

    def bind(self, mesh: SequenceMesh) -> None:
        """Take negatives from the data-parallel ranks of `mesh`; a trainer calls this through `bind_losses`."""
        self.mesh = mesh

    def forward(self, sentence_features: Iterable[dict[str, torch.Tensor]], labels: torch.Tensor | None = None):
        features = list(sentence_features)
        hashes = [text_hashes(column) for column in features] if self.mask_duplicates else None
        # One graph for all calls of `calculate_loss`, so that the gradient of the scale is averaged once.
        scale = self._scale()
        if not self.uses_gradient_cache:
            return self._contrast(embed_columns(self.model, features), hashes, scale)

        def calculate(embeddings: list[list[torch.Tensor]]) -> torch.Tensor:
            backward = torch.is_grad_enabled()
            return self.calculate_loss(embeddings, labels, with_backward=backward, hashes=hashes, scale=scale)

        return cached_loss(self, features, calculate)

    def calculate_loss(
        self,
        reps: list[list[torch.Tensor]],
        labels: torch.Tensor | None = None,
        *,
        with_backward: bool = False,
        hashes: Sequence[torch.Tensor] | None = None,
        scale: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss from the embeddings of all mini-batches; `MatryoshkaLoss` calls it for every width.

        With `with_backward` the embeddings get their gradients, and what is returned has a graph to the scale only.
        """
        scale = self._scale() if scale is None else scale
        columns = [torch.cat(parts) if parts else torch.empty(0, 1) for parts in reps]
        if not with_backward:
            return self._contrast(columns, hashes, scale)
        if not isinstance(scale, torch.Tensor):
            loss = self._contrast(columns, hashes, scale)
            loss.backward()
            return loss.detach()
        leaf = scale.detach().requires_grad_(scale.requires_grad)
        loss = self._contrast(columns, hashes, leaf)
        loss.backward()
        return loss.detach() + (scale - leaf.detach()) * leaf.grad if leaf.requires_grad else loss.detach()

    def _contrast(self, columns, hashes, scale) -> torch.Tensor:
        self._validate()
        rule = ContrastiveRule(
            directions=self.directions,
            partition_mode=self.partition_mode,
            hardness_mode=self.hardness_mode,
            hardness_strength=self.hardness_strength,
        )
        return contrastive_loss(
            columns,
            scale=scale,
            rule=rule,
            normalize=self.similarity_fct is cos_sim,
            hashes=hashes,
            tile_size=self.loss_tile_size,
            group=negatives_group(self),
            negatives=self.negatives,
            refuse_nonfinite=self.refuse_nonfinite,
        )

    def _scale(self) -> float | torch.Tensor:
        if self.log_scale is None:
            return self.loss.scale
        world = dist.group.WORLD if _num_processes() > 1 else None
        return mean_gradient(self.log_scale, world if self.mesh is None else self.mesh.dp_group).exp()

    def get_config_dict(self) -> dict[str, Any]:
        names = ("loss_tile_size", "negatives", "mask_duplicates")
        own = {name: getattr(self, name) for name in names}
        return {**super().get_config_dict(), **own, "learnable_scale": self.log_scale is not None}

    @property
    def citation(self) -> str:
        cached = super().citation if self.uses_gradient_cache else ""
        return f"{self.loss.citation}{cached}{_INF_CL}"


_INF_CL = """
@misc{cheng2024breaking,
    title={Breaking the Memory Barrier: Near Infinite Batch Size Scaling for Contrastive Loss},
    author={Zesen Cheng and Hang Zhang and Kehan Li and Sicong Leng and Zhiqiang Hu and Fei Wu and Deli Zhao and Xin Li and Lidong Bing},
    year={2024},
    eprint={2410.17243},
    archivePrefix={arXiv},
    primaryClass={cs.CV}
}
"""  # noqa: E501


def negatives_group(loss: torch.nn.Module) -> dist.ProcessGroup | None:
    """The ranks whose rows are negatives of mine, for a loss of ours with a `mesh`.

    Raises:
        RuntimeError: several processes run, and the loss does not know which of them hold different rows.
    """
    if not loss.gather_across_devices:
        return None
    if loss.mesh is None and _num_processes() > 1:
        raise RuntimeError(
            f"`{type(loss).__name__}` runs on {_num_processes()} processes and does not know which of them hold "
            "different rows: train with a trainer of hf_longctx, call "
            "`loss.bind(SequenceMesh.build(sequence_parallel_size))`, or set `gather_across_devices=False`."
        )
    return None if loss.mesh is None else loss.mesh.dp_group


def bind_losses(
    loss: torch.nn.Module | Mapping[str, torch.nn.Module], mesh: SequenceMesh, *, refuse_nonfinite: bool = True
) -> None:
    """Bind `mesh` to every loss of ours in `loss`, one loss or one for each data set, and inside of wrappers.

    Without `refuse_nonfinite` embeddings that are not finite make a loss that is not, for a trainer that skips steps.
    """
    for module in _losses(loss):
        if hasattr(module, "bind"):
            module.bind(mesh)
            module.refuse_nonfinite = refuse_nonfinite


def check_losses(loss: torch.nn.Module | Mapping[str, torch.nn.Module], mesh: SequenceMesh) -> None:
    """Raise `ValueError` for a loss that takes the ranks which share a sequence for ranks with other rows."""
    size = mesh.sequence_parallel_size
    for module in _losses(loss) if size > 1 else ():
        if not hasattr(module, "bind") and getattr(module, "gather_across_devices", False):
            raise ValueError(
                f"`{type(module).__name__}(gather_across_devices=True)` gathers from all {mesh.world_size} processes, "
                f"but {size} of them share every row (`sequence_parallel_size`), so each negative would count {size} "
                "times: use `TiledMultipleNegativesRankingLoss`, or set `gather_across_devices=False`."
            )


def _losses(loss: torch.nn.Module | Mapping[str, torch.nn.Module]) -> Iterator[torch.nn.Module]:
    """All modules of `loss`, less those that ours only keeps its settings in."""
    modules = [m for one in (loss.values() if isinstance(loss, Mapping) else [loss]) for m in one.modules()]
    inner = {id(m.loss) for m in modules if isinstance(m, TiledMultipleNegativesRankingLoss)}
    return (module for module in modules if id(module) not in inner)


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
