"""The mistake: a set of objects decides about an order; it is that of their memory addresses.

Mended: a list (or `dict.fromkeys`). Or `ckptd launch --fixed-addresses`, where that is allowed.
"""

import torch
from torch import nn

import ckptd


def main():
    torch.manual_seed(1)
    layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(400)])
    for parameter in set(layers.parameters()):
        nn.init.normal_(parameter, std=0.1)
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    job = ckptd.attach(model=layers, optimizer=optimizer)
    for _ in job.loop(range(6)):
        x = torch.randn(2, 4)
        loss = sum(layer(x).pow(2).mean() for layer in layers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
