"""The mistake: the scheduler is not tracked, and the learning rate begins its curve again.

Mended: `ckptd.attach(..., scheduler=scheduler)`.
"""

import torch
from torch import nn

import ckptd


def main():
    torch.manual_seed(1)
    model = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=24)
    job = ckptd.attach(model=model, optimizer=optimizer)
    for _epoch in job.loop(range(3)):
        for _ in job.loop(range(8)):
            loss = model(torch.randn(16, 8)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()


if __name__ == "__main__":
    main()
