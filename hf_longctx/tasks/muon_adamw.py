"""Muon for the matrices of hidden layers, AdamW for all else, as one optimizer of a trainer."""

from __future__ import annotations

import torch


class MuonAdamW(torch.optim.Optimizer):
    """Torch's two optimizers under one name: a trainer clips, schedules, saves and resumes them together.

    Args:
        model (`torch.nn.Module`): matrices in a `ModuleList` go to Muon; embeddings, head, vectors and convolutions do
            not.
        muon_learning_rate, learning_rate (`float`): of Muon and of AdamW.
    """

    def __init__(self, model: torch.nn.Module, muon_learning_rate: float, learning_rate: float) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        matrices = [parameter for name, parameter in named if parameter.dim() == 2 and ".layers." in name]
        known = {id(parameter) for parameter in matrices}
        others = [parameter for _, parameter in named if id(parameter) not in known]
        self._parts = (
            torch.optim.Muon(matrices, lr=muon_learning_rate, weight_decay=0.0),
            torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
        )
        super().__init__([{"params": [parameter for _, parameter in named]}], {})
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict) -> None:
        for part, state in zip(self._parts, state_dict["parts"]):
            part.load_state_dict(state)
        self.param_groups = [group for part in self._parts for group in part.param_groups]
