"""The mistake: the averaged model is not tracked, and starts anew from the resumed weights.

Mended: `ckptd.attach(..., ema=ema)`.
"""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ckptd


def main():
    torch.manual_seed(1)
    model = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    job = ckptd.attach(model=model, optimizer=optimizer)
    for _epoch in job.loop(range(3)):
        for _ in job.loop(range(8)):
            loss = model(torch.randn(16, 8)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update_parameters(model)
    torch.save(ema.module.state_dict(), "averaged.pt")


if __name__ == "__main__":
    main()
