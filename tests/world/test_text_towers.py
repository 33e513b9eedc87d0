"""Multimodal models on text, shared by several processes: exact, or refused on every rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForMultimodalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_longctx import SequenceMesh, adapt, shard_batch
from hf_longctx.proof.model_under_test import KINDS, Setting, default_config
from hf_longctx.proof.ranks import RanksError
from hf_longctx.proof.tiny import shrink

from .test_verify import outcomes


TOWERS = ["gemma3", "llava", "mistral3", "paligemma", "qwen2_5_vl", "qwen2_audio", "qwen2_vl", "qwen3_vl"]
IDS = torch.randint(10, 120, (2, 13), generator=torch.Generator().manual_seed(1))
LABELS = IDS.roll(3, 1).masked_fill(IDS % 4 == 0, -100)
PACKED = torch.tensor([[*range(5), *range(1), *range(7)], [*range(2), *range(8), *range(3)]])
# As of an image behind three tokens: the planes go their own ways, and go on behind it together.
IMAGE = torch.stack(
    [
        torch.tensor([0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7, 8, 9]),
        torch.tensor([0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7, 8, 9]),
        torch.tensor([0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9]),
    ]
)[:, None].repeat(1, 2, 1)


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, size) for size in (2, 4) for name in TOWERS if size == 2 or name not in ("paligemma", "qwen2_audio")],
)
def test_text_through_a_whole_model_is_exact(worlds, name, size):
    results = outcomes(worlds(size), default_config(name), Setting(size, kinds=KINDS), task="multimodal-lm")
    assert {rows.outcome for rows in results} == {"exact"}, results


def model_of(name: str, attention: str):
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(shrink(CONFIG_MAPPING[name]()), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.double().train()


def step(name: str, batch: dict[str, torch.Tensor]):
    """Loss and gradients of a loop on a share of `batch`."""
    mesh, model = SequenceMesh.build(dist.get_world_size()), model_of(name, "ulysses")
    adapt(model, mesh)
    loss = model(**shard_batch(batch, mesh, model), use_cache=False).loss
    loss.backward()
    gradients = {}
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            gradients[parameter_name] = parameter.grad / mesh.world_size
    dist.all_reduce(loss.data)
    return loss.detach() / mesh.world_size, gradients


def one_by_one(model, positions: torch.Tensor) -> torch.Tensor:
    """The mean loss of all documents, each alone; no token of another one predicts a first."""
    total, count = 0.0, 0
    for row, starts in enumerate(positions):
        bounds = [*(starts == 0).nonzero().flatten().tolist(), len(starts)]
        for start, stop in zip(bounds, bounds[1:]):
            labels = LABELS[row : row + 1, start:stop]
            valid = int((labels[:, 1:] != -100).sum())
            if valid:
                total = total + valid * model(input_ids=IDS[row : row + 1, start:stop], labels=labels).loss
                count += valid
    return total / count


def first_masked(positions: torch.Tensor) -> torch.Tensor:
    return LABELS.masked_fill(positions == 0, -100)


ROWS = {
    "text planes": {"position_ids": torch.arange(13).expand(3, 2, 13)},
    "planes of an image": {"position_ids": IMAGE},
    "planes of an image and of the text": {"position_ids": torch.cat([torch.arange(13).expand(1, 2, 13), IMAGE])},
    "padding on the left": {
        "attention_mask": (torch.arange(13) > torch.tensor([[4], [-1]])).long(),
        "position_ids": (torch.arange(13) - torch.tensor([[5], [0]])).clamp(min=0).expand(3, 2, 13),
        "labels": LABELS.masked_fill(torch.arange(13) <= torch.tensor([[5], [-1]]), -100),
    },
    "packed": {"position_ids": PACKED, "labels": first_masked(PACKED)},
    "packed planes": {"position_ids": PACKED.expand(3, 2, 13), "labels": first_masked(PACKED)},
    "packed, with the plane of the text": {"position_ids": PACKED.expand(4, 2, 13), "labels": first_masked(PACKED)},
}


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_planes_of_positions_are_those_of_one_process(world2, name, case):
    batch = {"input_ids": IDS, "labels": LABELS, **ROWS[case]}
    model = model_of(name, "sdpa")
    loss = one_by_one(model, PACKED) if "packed" in case else model(**batch, use_cache=False).loss
    loss.backward()
    expected = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    for actual, gradients in world2.run(step, name, batch):
        # The loss is computed in float32, so gradients have its rounding.
        torch.testing.assert_close(actual.double(), loss.detach().double(), rtol=1e-6, atol=0)
        assert gradients.keys() == expected.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_marks_of_text_are_text_and_those_of_images_are_refused_on_every_rank(world2, name):
    key = "token_type_ids" if name == "gemma3" else "mm_token_type_ids"
    batch = {"input_ids": IDS, "labels": LABELS, key: torch.zeros_like(IDS)}
    loss = model_of(name, "sdpa")(**batch, use_cache=False).loss
    for actual, _ in world2.run(step, name, batch):
        torch.testing.assert_close(actual.double(), loss.detach().double(), rtol=1e-6, atol=0)
    if name == "gemma4":
        return  # a tiny one opens no blocks
    batch[key][1, 9:11] = 1  # on the second rank alone
    with pytest.raises(RanksError) as error:
        world2.run(step, name, batch)
    assert str(error.value).count("the batch marks tokens of images or of a prefix, which `Gemma3Attention`") >= 2


def test_a_layer_that_only_its_mask_makes_causal_is_refused_without_marks(world2):
    with pytest.raises(RanksError, match="is not causal .`is_causal` False. and its mask is"):
        world2.run(step, "paligemma", {"input_ids": IDS, "labels": LABELS})


def test_labels_of_padding_that_a_loss_leaves_out_by_its_mask_are_refused(world2):
    mask = (torch.arange(13) < torch.tensor([[9], [13]])).long()
    with pytest.raises(RanksError, match="`labels` of padding are not -100"):
        world2.run(step, "qwen2_audio", {"input_ids": IDS, "labels": IDS, "attention_mask": mask})


def test_features_of_images_are_refused_by_name(world2):
    batch = {"input_ids": IDS, "labels": LABELS, "deepstack_visual_embeds": [torch.ones(2, 4)]}
    with pytest.raises(RanksError, match="`deepstack_visual_embeds` belongs to an image"):
        world2.run(step, "qwen3_vl", batch)
