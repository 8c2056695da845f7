"""A small training with dropout and Adam, for scripts that interrupt themselves at a step."""

import torch
from torch import nn

import ckptd


class Training:
    def __init__(self):
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.losses = []
        self.job = ckptd.attach(model=self.model, optimizer=self.optimizer, losses=self.losses)

    def step(self):
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(4, 8)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item().hex())

    def write(self, path):
        """Every loss and the weights, as bits."""
        bits = [p.detach().view(torch.int32).tolist() for p in self.model.parameters()]
        path.write_text(repr((self.losses, bits)))
