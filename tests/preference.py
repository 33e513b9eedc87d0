"""Preference and reward runs described by plain values: rows, losses of patched models, and runs of TRL's trainers."""

from __future__ import annotations

import contextlib
import tempfile

import torch

from hf_longctx import LongContextConfig, MemoryConfig, PreferenceConfig

from .models import build, config_of
from .tokenizer import tiny_tokenizer, words
from .training import reset_state, weights_of


def rows_of(lengths: list[int], padding: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Padded rows whose last third is scored; a row that is shorter than the batch has padding."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(3, 97, (len(lengths), longest), generator=generator)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        place = slice(0, length) if padding == "right" else slice(longest - length, longest)
        mask[row, place] = 1
        first = place.start + max(1, length - max(2, length // 3))
        labels[row, first : place.stop] = ids[row, first : place.stop]
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def scored(case: dict, mesh=None) -> tuple[dict, dict]:
    """The numbers of TRL's head for the rows of this group, and the gradients of a random sum of them."""
    from trl.trainer.utils import add_fused_lm_head

    from hf_longctx.adapters.attach import attach_adapters
    from hf_longctx.trainer.scored_rows import score_whole_rows
    from hf_longctx.trainer.whole_rows import RowSharing, rows_shared

    shared = mesh is not None
    dtype = case.get("dtype", torch.float64)
    model = build(
        case.get("model", "llama"),
        "ulysses" if shared else case.get("attention", "sdpa"),
        dtype,
        **case.get("changes", {}),
    )
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")  # transformers' grouped kernels do not run in float64
    fields = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    add_fused_lm_head(model, outputs=fields)
    context = contextlib.nullcontext()
    if shared:
        attach_adapters(model)
        score_whole_rows(model, case.get("counts_real_tokens", False))
        context = rows_shared(RowSharing(mesh, flatten=case.get("flatten", False)), model)
    group = mesh.data_parallel_rank if shared else case.get("group", 0)
    rows = rows_of(case["lengths"], case.get("padding", "right"), seed=group)
    asked = {"output_router_logits": True} if case.get("router") else {}
    with context:
        outputs = model(**rows, fused_lm_head=True, **asked)
        weights = torch.randn(2, *outputs.log_probs.shape, generator=torch.Generator().manual_seed(7), dtype=dtype)
        loss = (weights[0] * outputs.log_probs).sum() + (weights[1] * outputs.entropy).sum() + outputs.loss
        loss.backward()
    numbers = {name: value.detach() for name, value in outputs.items() if value is not None}
    return numbers, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def all_scored_by_ranks(cases: list[dict], size: int) -> list[tuple[dict, dict]]:
    """[`scored`] on a rank, for each case; gradients as a wrapper leaves them."""
    from hf_longctx.parallel.mesh import SequenceMesh

    mesh = SequenceMesh.build(size)
    found = [scored(case, mesh) for case in cases]
    for _, gradients in found:
        average(gradients)
    return found


def average(gradients: dict) -> None:
    """What a wrapper makes of gradients, in one collective and without rounding of its own."""
    import torch.distributed as dist

    flat = torch.cat([gradient.flatten().double() for gradient in gradients.values()])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients.values(), flat.split([g.numel() for g in gradients.values()])):
        gradient.copy_(mean.view_as(gradient))


def worst(ours: dict, theirs: dict) -> float:
    """The largest difference of tensors of the same names, relative to the largest entry of each."""
    assert ours.keys() == theirs.keys(), (sorted(ours), sorted(theirs))
    errors = [0.0]
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape and ours[name].dtype == expected.dtype, name
        scale = expected.double().abs().max().clamp(min=1e-30)
        errors.append(float((ours[name].double() - expected.double()).abs().max() / scale))
    return max(errors)


def pairs(kind: str = "preference", count: int = 16, images: bool = False):
    """Pairs with answers of very uneven lengths, or single answers that are liked or not."""
    import datasets

    rows = []
    for index in range(count):
        prompt = words(2 + index % 5, index)
        chosen, rejected = words(1 + (index * 3) % 11, index + 50), words(1 + (index * 5) % 7, index + 90)
        if kind == "kto":
            rows.append({"prompt": prompt, "completion": f" {chosen}", "label": index % 3 != 0})
        else:
            rows.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
            if kind == "margin":
                rows[-1]["margin"] = 0.1 * (index % 4)
        if images:
            rows[-1]["images"] = []
    return datasets.Dataset.from_list(rows)


def reward_model(attention: str, name: str = "llama"):
    """A classifier with one label and weights that depend on the seed alone."""
    import transformers as tf

    config = config_of(name, num_labels=1)
    torch.manual_seed(0)
    model = tf.AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                (1.0 if parameter.dim() == 1 else 0.0) + 0.15 * torch.randn(parameter.shape, generator=generator)
            )
    return model


def settings_of(**changes) -> dict:
    """Arguments of a short run."""
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "bf16": False,
        "optim": "sgd",
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 5,
        "max_length": 64,
        "gradient_checkpointing": False,
        "dataset_num_proc": None,
    }
    return {**settings, **changes}


def trainer_of(
    size: int,
    task: str = "dpo",
    *,
    reference: str = "model",
    lora: bool = False,
    evaluate: bool = False,
    flatten: bool = False,
    attention: str = "ulysses",
    memory: dict | None = None,
    options: dict | None = None,
    model: str = "llama",
    folder: str | None = None,
    **changes,
):
    """TRL's own trainer (`size` 0), or ours."""
    import datasets
    import trl

    import hf_longctx

    reset_state()
    stock = size == 0
    name = {"dpo": "DPO", "kto": "KTO", "reward": "Reward", "margin": "Reward"}[task]
    attention = "sdpa" if stock and attention == "ulysses" else attention
    given = {
        "model": reward_model(attention, model) if name == "Reward" else build(model, attention),
        "args": getattr(trl, f"{name}Config")(**settings_of(**changes)),
        "train_dataset": pairs(task),
        "processing_class": tiny_tokenizer(),
    }
    if name != "Reward" and reference == "model":
        given["ref_model"] = build(model, attention, seed=1)
    if lora:
        from peft import LoraConfig

        given["peft_config"] = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], lora_alpha=64, init_lora_weights="pissa"
        )
        given["args"].learning_rate = 0.05
    if folder is not None:  # numbers that are computed ahead are cached next to a data set, for all ranks
        given["train_dataset"] = datasets.load_from_disk(f"{folder}/{size}")
    if evaluate:
        given["eval_dataset"] = given["train_dataset"].select(range(5))
    given.update(options or {})
    if stock:
        return getattr(trl, f"{name}Trainer")(**given)
    given["long_context"] = LongContextConfig(sequence_parallel_size=size)
    if memory is not None:
        given["memory"] = MemoryConfig(**memory)
    if flatten:
        given["preference"] = PreferenceConfig(flatten_rows=True)
    return getattr(hf_longctx, f"LongContext{name}Trainer")(**given)


def fit(size: int, settings: dict) -> tuple[list[dict], dict, dict | None]:
    """Train, and return (history, weights, evaluation)."""
    trainer = trainer_of(size, **settings)
    trainer.train()
    metrics = trainer.evaluate() if settings.get("evaluate") else None
    return trainer.state.log_history, weights_of(trainer), metrics


TIMES = ("runtime", "per_second", "total_flos")


def assert_same_logs(ours: list[dict], theirs: list[dict], tolerance: float) -> None:
    """Every metric that was logged, save those of time."""
    assert len(ours) == len(theirs)
    for step, (mine, other) in enumerate(zip(ours, theirs)):
        assert mine.keys() == other.keys(), mine.keys() ^ other.keys()
        for name, value in other.items():
            if isinstance(value, int | float) and not any(part in name for part in TIMES):
                # A reward is a small part of the difference of two sums of log-probabilities, which are rounded.
                allowed = tolerance * max(abs(value), 0.1 if "reward" in name or "margin" in name else 1e-2)
                assert abs(mine[name] - value) <= allowed, f"entry {step}: {name} {mine[name]!r} is not {value!r}"


def compare(world, size: int, tolerance: float = 2e-5, **settings) -> list:
    """Every rank's run equals TRL's in one process with the batch of all groups."""
    groups = world.size // size
    batch = settings.pop("per_device_train_batch_size", 2)
    expected = fit(0, {**settings, "flatten": False, "per_device_train_batch_size": batch * groups})
    results = world.run(fit, size, {**settings, "per_device_train_batch_size": batch})
    for history, weights, metrics in results:
        assert_same_logs(history, expected[0], tolerance)
        assert worst(weights, expected[1]) <= tolerance
        if metrics is not None:
            assert_same_logs([metrics], [expected[2]], tolerance)
    moved = [entry["loss"] for entry in expected[0] if "loss" in entry]
    assert max(moved) - min(moved) > 1e-3, "the run did not learn anything to compare"
    return results
