"""Encoders and decoders that copied BERT's self-attention before it used transformers' attention interface."""

from __future__ import annotations

from dataclasses import replace

import torch

from .own_call import OwnCall


def bert(call: OwnCall) -> tuple[torch.Tensor, None]:
    """MegatronBERT, RemBERT, TAPAS, VisualBERT, and BigBird in full mode."""
    query, key, value = projected(call, call.given["hidden_states"])
    return call.attend(query, key, value, dropout=call.module.dropout.p), None


def projected(call: OwnCall, hidden_states: torch.Tensor) -> list[torch.Tensor]:
    """Query, key and value of BERT's layer, `(B, N, t, H)` each."""
    layer = call.module
    return [layer_heads(call, project(hidden_states)) for project in (layer.query, layer.key, layer.value)]


def layer_heads(call: OwnCall, states: torch.Tensor) -> torch.Tensor:
    """`(B, t, N * H)` as `(B, N, t, H)`."""
    return states.unflatten(-1, (call.module.num_attention_heads, -1)).transpose(1, 2)


def roformer(call: OwnCall) -> tuple[torch.Tensor, None]:
    """RoFormer: BERT's layer with rotary positions, which may turn the values too."""
    layer, positions = call.module, call.given.get("sinusoidal_pos")
    query, key, value = projected(call, call.given["hidden_states"])
    if positions is not None:
        if positions.dim() == 5:  # those of packed rows, `(1, 1, B, t, H)`
            positions = positions[0, 0, :, None]
        if layer.rotary_value:
            query, key, value = layer.apply_rotary_position_embeddings(positions, query, key, value)
        else:
            query, key = layer.apply_rotary_position_embeddings(positions, query, key)
    return call.attend(query, key, value, dropout=layer.dropout.p), None


def luke(call: OwnCall) -> tuple[torch.Tensor, None]:
    """LUKE without entities."""
    if call.given.get("entity_hidden_states") is not None:
        raise NotImplementedError(
            "LUKE's entities (`entity_ids`) stand behind the words of a row, on no rank and in no document of their "
            "own: leave them out, or set `sequence_parallel_size` to 1 without packed rows."
        )
    query, key, value = projected(call, call.given["word_hidden_states"])
    return call.attend(query, key, value, dropout=call.module.dropout.p), None


def squeezebert(call: OwnCall) -> dict[str, torch.Tensor]:
    """SqueezeBERT: projections in groups, on channels before tokens."""
    layer, hidden_states = call.module, call.given["hidden_states"]
    heads = layer.num_attention_heads
    query, key, value = (
        project(hidden_states).unflatten(1, (heads, -1)).transpose(2, 3)
        for project in (layer.query, layer.key, layer.value)
    )
    return {"context_layer": call.attend(query, key, value, dropout=layer.dropout.p).transpose(1, 2)}


def ibert(call: OwnCall) -> tuple[tuple[torch.Tensor], tuple[None]]:
    """I-BERT before it is quantized."""
    layer, hidden_states = call.module, call.given["hidden_states"]
    if layer.quant_mode:
        raise NotImplementedError(
            "I-BERT with `quant_mode` True computes a softmax of integers, which no attention kernel does: train with "
            "`quant_mode=False`, or set `sequence_parallel_size` to 1 without packed rows."
        )
    scale = call.given.get("hidden_states_scaling_factor")
    heads = (
        layer_heads(call, activation(*project(hidden_states, scale))[0])
        for project, activation in (
            (layer.query, layer.query_activation),
            (layer.key, layer.key_activation),
            (layer.value, layer.value_activation),
        )
    )
    output = call.attend(*heads, dropout=layer.dropout.p)
    return (layer.output_activation(output, None)[0],), (None,)


def lilt(call: OwnCall) -> tuple[torch.Tensor, torch.Tensor]:
    """LiLT: the scores of text and layout are added, so both attend alike, each to values of its own.

    In two calls: the last layer's layout is used by nothing, and its values must get no gradient at all.
    """
    layer, layout = call.module, call.given["layout_inputs"]
    query, key, value = projected(call, call.given["hidden_states"])
    layout_query, layout_key, layout_value = (
        layer_heads(call, project(layout)) for project in (layer.layout_query, layer.layout_key, layer.layout_value)
    )
    scaled = query * query.shape[-1] ** -0.5, layout_query * layout_query.shape[-1] ** -0.5
    queries, keys = torch.cat(scaled, dim=-1), torch.cat([key, layout_key], dim=-1)
    layout_output = call.attend(queries, keys, layout_value, scaling=1.0, dropout=layer.dropout.p)
    return call.attend(queries, keys, value, scaling=1.0, dropout=layer.dropout.p), layout_output


def big_bird(call: OwnCall) -> tuple[torch.Tensor, None]:
    """BigBird in full mode. Its model may exchange the layer inside, so the layer around it is patched."""
    layer = call.module
    if layer.attention_type != "original_full":
        raise NotImplementedError(
            "BigBird's `attention_type` is 'block_sparse', whose random blocks reach across ranks and documents: load "
            "it with `attention_type='original_full'`, or set `sequence_parallel_size` to 1 without packed rows."
        )
    output, _ = bert(replace(call, module=layer.self))
    return layer.output(output, call.given["hidden_states"]), None
