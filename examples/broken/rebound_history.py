"""The mistake: a tracked list is replaced by a new one, and the old one goes on being carried.

Mended: `history += [loss]` changes the tracked list in place (or `history.append(loss)`).
"""

import torch
from torch import nn

import ckptd


def main():
    torch.manual_seed(1)
    model = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = []
    job = ckptd.attach(model=model, optimizer=optimizer, history=history)
    for _epoch in job.loop(range(3)):
        for _ in job.loop(range(6)):
            loss = model(torch.randn(16, 8)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history = [*history[-9:], loss.item()]
        job.log(mean=sum(history) / len(history))


if __name__ == "__main__":
    main()
