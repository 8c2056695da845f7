"""Train a small character-level transformer on the Python language reference, and let it write.

    python examples/plain/charlm.py [--epochs 5] [--out runs/charlm-plain]

The text is `pydoc_data.topics`, which comes with every Python. This is the plain script, without
any checkpointing; examples/charlm.py is the same one made resumable.
"""

import argparse
import random
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

CONTEXT = 64


class Crops(Dataset):
    """Crops of the text; random ones with masked characters for training, fixed ones else."""

    def __init__(self, codes, count, mask_code, augment):
        self.codes, self.count, self.mask_code, self.augment = codes, count, mask_code, augment

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if not self.augment:
            start = index * (len(self.codes) - CONTEXT - 1) // self.count
            crop = self.codes[start : start + CONTEXT + 1]
            return crop[:-1], crop[1:]
        start = random.randrange(len(self.codes) - CONTEXT - 1)
        crop = self.codes[start : start + CONTEXT + 1]
        seen = crop[:-1].clone()
        seen[torch.rand(CONTEXT) < 0.02] = self.mask_code
        if np.random.rand() < 0.5:
            seen[np.random.randint(CONTEXT)] = self.mask_code
        return seen, crop[1:]


class CharLM(nn.Module):
    """A decoder-only transformer over characters."""

    def __init__(self, vocabulary, width=128, heads=4, layers=3, dropout=0.1):
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("causal", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, codes):
        length = codes.shape[1]
        x = self.characters(codes) + self.positions.weight[:length]
        x = self.blocks(x, mask=self.causal[:length, :length], is_causal=True)
        return self.head(self.norm(x))


def loss_of(model, seen, following):
    return F.cross_entropy(model(seen).flatten(0, 1), following.flatten())


@torch.no_grad()
def write(model, alphabet, length=300):
    model.eval()
    codes = torch.zeros(1, 1, dtype=torch.long)
    for _ in range(length):
        logits = model(codes[:, -CONTEXT:])[0, -1, : len(alphabet)]
        following = torch.multinomial(torch.softmax(logits / 0.8, dim=-1), 1)
        codes = torch.cat([codes, following[None]], dim=1)
    return "".join(alphabet[code] for code in codes[0, 1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--samples", type=int, default=3200, help="crops per epoch")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/charlm-plain"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)

    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(character) for character in text])
    held_out = len(codes) * 9 // 10
    train_set = Crops(codes[:held_out], args.samples, len(alphabet), augment=True)
    val_set = Crops(codes[held_out:], 320, len(alphabet), augment=False)
    train_loader = DataLoader(train_set, batch_size=32, shuffle=True, num_workers=args.workers)
    val_loader = DataLoader(val_set, batch_size=32)

    model = CharLM(len(alphabet) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=args.epochs * len(train_loader)
    )
    best_loss = float("inf")
    best_weights = None
    metrics = open(args.out / "metrics.csv", "w")
    metrics.write("epoch,train_loss,val_loss\n")

    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        for seen, following in train_loader:
            loss = loss_of(model, seen, following)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            total += loss.item()

        model.eval()
        val_loss = 0.0
        with torch.no_grad():
            for seen, following in val_loader:
                val_loss += loss_of(model, seen, following).item() / len(val_loader)
        if val_loss < best_loss:
            best_loss = val_loss
            best_weights = {name: value.clone() for name, value in model.state_dict().items()}
        metrics.write(f"{epoch},{total / len(train_loader)!r},{val_loss!r}\n")
        print(f"epoch {epoch}: validation loss {val_loss:.4f}")

    model.load_state_dict(best_weights)
    torch.save(model.state_dict(), args.out / "best.pt")
    print(f"best validation loss {best_loss:.4f}; the model writes:\n")
    print(write(model, alphabet))


if __name__ == "__main__":
    main()
