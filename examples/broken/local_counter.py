"""The mistake: the best accuracy so far lives in a local variable, and is 0 after an interruption.

Mended: `job.vars(best_acc=0.0)`, and `job.vars.best_acc` in its place.
"""

import torch
from torch import nn

import ckptd


def main():
    torch.manual_seed(1)
    model = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    job = ckptd.attach(model=model, optimizer=optimizer)
    best_acc = 0.0
    for _epoch in job.loop(range(5)):
        correct = 0.0
        for _ in job.loop(range(6)):
            x = torch.randn(16, 8)
            y = (x[:, 0] > 0).long()
            logits = model(x)
            loss = nn.functional.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            x = torch.randn(64, 8)
            correct = (model(x).argmax(1) == (x[:, 0] > 0)).float().mean().item()
        if correct > best_acc:
            best_acc = correct
            job.log(best_acc=best_acc)
    print("best accuracy", best_acc)


if __name__ == "__main__":
    main()
