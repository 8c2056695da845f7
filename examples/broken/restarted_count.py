"""The mistake: the built-in `enumerate` around a resumable loop counts from 0 after a resume.

Mended: `job.enumerate(loader)`.
"""

import torch
from torch import nn

import ckptd


def main():
    torch.manual_seed(1)
    model = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job = ckptd.attach(model=model, optimizer=optimizer)
    data = torch.randn(12, 16, 8)
    for _epoch in job.loop(range(2)):
        for i, x in enumerate(job.loop(list(data))):
            loss = model(x).pow(2).mean()
            loss.backward()
            if i % 4 == 3:  # the gradients of four batches make one step
                optimizer.step()
                optimizer.zero_grad()


if __name__ == "__main__":
    main()
