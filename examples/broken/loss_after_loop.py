"""The mistake: a variable that only the loop sets is read after it, where a resumed run has none.

Mended: `job.vars.loss = loss.item()` in the loop.
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
        for _ in job.loop(range(5)):
            loss = model(torch.randn(16, 8)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: last loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
