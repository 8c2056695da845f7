"""The mistake: metrics are appended to a file; what is done again after a crash stands there twice.

Mended: `job.open("metrics.csv")`.
"""

import torch
from torch import nn

import ckptd


def main():
    torch.manual_seed(1)
    model = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job = ckptd.attach(model=model, optimizer=optimizer)
    for epoch in job.loop(range(3)):
        for step in job.loop(range(8)):
            loss = model(torch.randn(16, 8)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with open("metrics.csv", "a") as metrics:
                metrics.write(f"{epoch},{step},{loss.item()!r}\n")


if __name__ == "__main__":
    main()
