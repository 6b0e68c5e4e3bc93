"""Train an RNN with differential privacy: fusedrnn.RNN in opacus (``pip install opacus``).

    python examples/private_training.py

The task is to find the half of a sequence with the larger sum. With ``grad_sample_mode="ew"``,
opacus gets per-sample gradients from torch's ExpandedWeights, which fusedrnn supports. Its default
mode, "hooks", supports neither fusedrnn.RNN nor nn.RNN.
"""

from __future__ import annotations

import torch
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fusedrnn


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = fusedrnn.RNN(4, 16, batch_first=True)  # "ew" needs batch_first
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.rnn(x)
        return self.head(output[:, -1])


def main(epochs: int = 10) -> tuple[float, float]:
    """Train a model; return the accuracy on the training data and the epsilon that was spent."""
    x = torch.randn(2048, 12, 4)
    y = (x[:, 6:].sum((1, 2)) > x[:, :6].sum((1, 2))).long()
    model = Classifier()
    engine = PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.02),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=128),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode="ew",
    )
    for _ in range(epochs):
        for inputs, targets in loader:
            if len(inputs) == 0:  # opacus draws batches at random, so one may be empty
                continue
            optimizer.zero_grad()
            nn.functional.cross_entropy(private(inputs), targets).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (model(x).argmax(-1) == y).float().mean().item()
    return accuracy, float(engine.get_epsilon(delta=1e-4))


if __name__ == "__main__":
    torch.manual_seed(0)
    accuracy, epsilon = main()
    print(f"accuracy {accuracy:.3f}, epsilon {epsilon:.2f} at delta 1e-4")
