"""The mistake: a generator that a class holds draws inside the loader's worker processes.

The main process never sees it move. Mended: `ckptd.track(noise=Noise.generator)` below the class,
or keep it on the dataset (`self.noise`), where it is found.
"""

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import ckptd


class Noise:
    generator = np.random.default_rng(1)


class Samples(Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, index):
        x = torch.full((8,), index / 48) + torch.from_numpy(Noise.generator.random(8)).float()
        return x, index % 2


def main():
    torch.manual_seed(1)
    model = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(Samples(), batch_size=8, shuffle=True, num_workers=2)
    job = ckptd.attach(model=model, optimizer=optimizer)
    for _epoch in job.loop(range(2)):
        for x, y in job.loop(loader):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


if __name__ == "__main__":
    main()
