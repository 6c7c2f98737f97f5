"""An embedding table that grows in place while it trains, optimizer state included.

Words are numbered as they turn up, and nobody knows how many there will be. Addresses for a million
rows are reserved for the table and for each of Adam's moments; memory is committed as rows are
needed. Nothing is copied or reallocated: `data_ptr()` is the same from the first word to the last.

Run: python examples/growing_embedding.py [--device cuda]
"""

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import vattn

MOST_WORDS, DIM, BATCH = 1_000_000, 128, 256
STEPS, GROW_EVERY, GROW_BY = 150, 25, 800


class GrowingEmbedding(torch.nn.Module):
    """``[words, dim]`` weights of which the first `words` exist, and Adam's two moments of them."""

    def __init__(self, most_words: int, dim: int, device: str) -> None:
        super().__init__()
        self.pool = vattn.PagePool(device)  # one for all three tables
        self.tables = {
            name: vattn.reserve((most_words, dim), pool=self.pool)[1]
            for name in ("weight", "exp_avg", "exp_avg_sq")
        }
        self.weight = torch.nn.Parameter(self.tables["weight"].view())

    @property
    def words(self) -> int:
        return self.weight.shape[0]

    def grow(self, words: int, optimizer: torch.optim.Adam) -> None:
        """Makes room for `words` words; the old ones stay where and what they are.

        Autograd and the optimizer know a parameter by its object and its shape: they get a new
        object, over the same memory.
        """
        old, old_words = self.weight, self.words
        for table in self.tables.values():
            table.commit(words)  # zeros, which is what new moments should be
        self.weight = torch.nn.Parameter(self.tables["weight"].view())
        with torch.no_grad():
            self.weight[old_words:].normal_(std=0.1)
        optimizer.param_groups[0]["params"] = [self.weight]
        step = optimizer.state.pop(old, {}).get("step", torch.tensor(0.0))
        moments = {name: self.tables[name].view() for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[self.weight] = {"step": step, **moments}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight)

    def committed_bytes(self) -> int:
        return sum(table.committed_bytes for table in self.tables.values())


def pairs(words: int, device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Words and their neighbours, in a language where word n stands beside n ^ 1."""
    while True:
        word = torch.randint(words // 2 * 2, (BATCH,), device=device)
        yield word, word ^ 1


def train(model: GrowingEmbedding, device: str) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    model.grow(GROW_BY, optimizer)
    address = model.weight.data_ptr()
    for step in range(STEPS):
        if step > 0 and step % GROW_EVERY == 0:
            model.grow(model.words + GROW_BY, optimizer)
        word, neighbour = next(pairs(model.words, device))
        logits = model(word) @ model(neighbour).T  # the right neighbour against the batch's others
        loss = F.cross_entropy(logits, torch.arange(BATCH, device=device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % GROW_EVERY == GROW_EVERY - 1:
            moments = optimizer.state[model.weight]["exp_avg"]
            assert model.weight.data_ptr() == address
            assert moments.data_ptr() == model.tables["exp_avg"].tensor.data_ptr()
            print(
                f"step {step + 1:3}: {model.words:6} words, loss {loss.item():.3f}, "
                f"{model.committed_bytes() / 2**20:5.1f} MiB committed, weights at {address:#x}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    torch.manual_seed(0)
    model = GrowingEmbedding(MOST_WORDS, DIM, device)
    reserved = sum(t.tensor.numel() * t.tensor.itemsize for t in model.tables.values())
    print(f"reserved {reserved / 2**20:.0f} MiB, committed {model.committed_bytes()} bytes")
    train(model, device)
    for table in model.tables.values():
        table.decommit(slice(1000, None))  # the rare words are forgotten
    print(f"kept 1000 words in {model.committed_bytes() / 2**20:.1f} MiB")
    kept = model.tables["weight"].view()
    print(f"average length of the {len(kept)}: {kept.norm(dim=1).mean().item():.2f}")
    for table in model.tables.values():
        table.close()


if __name__ == "__main__":
    main()
