"""What an encoder's features tell about labels that it never saw: a cheap signal of a pretraining's quality.

Features are compared as they are (k nearest neighbours) or through one trained linear layer; the encoder stays frozen.
"""

import torch
from torch import nn


def knn_accuracy(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    held_out: torch.Tensor,
    held_out_labels: torch.Tensor,
    neighbours: int = 10,
    temperature: float = 0.07,
) -> float:
    """The share of held-out images whose nearest training images name their class.

    A neighbour's vote weighs exp(cosine similarity / temperature), as in DINO (arXiv 2104.14294, section 4.2).

    Args:
        train, held_out: `(images, width)` features.
        train_labels, held_out_labels: `(images,)` class numbers from 0.
    """
    train, held_out = (nn.functional.normalize(features.float(), dim=1) for features in (train, held_out))
    votes = nn.functional.one_hot(train_labels).float()
    right = 0
    for queries, labels in zip(held_out.split(1024), held_out_labels.split(1024), strict=True):
        similarity, nearest = (queries @ train.T).topk(min(neighbours, len(train)), dim=1)  # (queries, neighbours)
        weights = (similarity / temperature).exp()
        right += int(((weights[:, :, None] * votes[nearest]).sum(1).argmax(1) == labels).sum())
    return right / len(held_out_labels)


def linear_accuracy(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    held_out: torch.Tensor,
    held_out_labels: torch.Tensor,
    penalty: float = 1e-3,
) -> float:
    """The share of held-out images that a logistic regression on the standardised features gets right.

    The arguments are those of `knn_accuracy`; `penalty` times half the squared weights is added to the mean
    cross-entropy, which LBFGS minimises from zero.
    """
    mean, deviation = train.float().mean(0), train.float().std(0).clamp(min=1e-6)
    train, held_out = ((features.float() - mean) / deviation for features in (train, held_out))
    weight = torch.zeros(train.shape[1], int(train_labels.max()) + 1, device=train.device, requires_grad=True)
    bias = torch.zeros(weight.shape[1], device=train.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(train @ weight + bias, train_labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    predicted = (held_out @ weight + bias).argmax(1)
    return float((predicted == held_out_labels).float().mean())


PROBES = {"knn": knn_accuracy, "linear": linear_accuracy}
