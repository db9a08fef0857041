"""The network of the paper's released code (ICM-LoRA, arXiv 2501.17635): a convolutional CVAE over flattened adapters.

    values (L) -> 12 x [conv 7, stride 2, norm, LeakyReLU] -> linear -> 256 -> with condition -> mean, log variance
    z, condition -> linear -> 11 x [transposed conv 7, stride 2, norm, ELU] -> transposed conv, norm, ELU, conv -> (L)

Channels 8 16 32 64 128 256 256 128 64 32 16 8 and back; loss = mean squared error + 0.005 KL. Written anew from its
description. The condition is the number of the task, one-hot. Normalisation is by the statistics of the batch in
training and afterwards: with batches of one adapter, running statistics of different tasks fit none of them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

CHANNELS = (8, 16, 32, 64, 128, 256, 256, 128, 64, 32, 16, 8)
LATENT = 256
KL_WEIGHT = 0.005
_KERNEL = 7
MULTIPLE = 1 << len(CHANNELS)


class FlatCvae(nn.Module):
    """Encoder and decoder.

    Args:
        length: Values of the longest adapter.
        conditions: Number of tasks.
        channels: Of the encoder's layers; others than the paper's are for tests.
    """

    def __init__(self, length: int, conditions: int, channels: tuple[int, ...] = CHANNELS) -> None:
        super().__init__()
        self.length = -(-length // (1 << len(channels))) * (1 << len(channels))
        self._narrow = self.length >> len(channels), channels[-1]
        flat = self._narrow[0] * self._narrow[1]
        self.encoder = nn.Sequential(*_down(channels), nn.Flatten(), nn.Linear(flat, LATENT))
        self.to_mean = nn.Linear(LATENT + conditions, LATENT)
        self.to_log_variance = nn.Linear(LATENT + conditions, LATENT)
        self.decoder = Decoder(flat, conditions, channels)

    def forward(self, values: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the reconstruction, the latent's mean and its log variance; shapes (n, length) and (n, 256)."""
        features = torch.cat([self.encoder(values[:, None]), condition], dim=1)
        mean, log_variance = self.to_mean(features), self.to_log_variance(features)
        z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return self.decoder(z, condition), mean, log_variance


class Decoder(nn.Module):
    """What has to be kept: (latent, condition) -> values."""

    def __init__(self, flat: int, conditions: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.first = nn.Linear(LATENT + conditions, flat)
        self._channels = channels[-1]
        pairs = pairwise([*reversed(channels), channels[0]])
        self.layers = nn.Sequential(*(_up(*pair) for pair in pairs), nn.Conv1d(channels[0], 1, _KERNEL, 1, 3))

    def forward(self, z: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Return values of shape (n, length)."""
        start = self.first(torch.cat([z, condition], dim=1)).reshape(len(z), self._channels, -1)
        values: torch.Tensor = self.layers(start)[:, 0]
        return values


def loss_of(
    values: torch.Tensor, rebuilt: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor
) -> torch.Tensor:
    """Return the paper's loss."""
    kl = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(dim=1).mean()
    return nn.functional.mse_loss(rebuilt, values) + KL_WEIGHT * kl


def _down(channels: tuple[int, ...]) -> list[nn.Module]:
    pairs = pairwise((1, *channels))
    return [
        nn.Sequential(
            nn.Conv1d(before, after, _KERNEL, 2, 3), nn.BatchNorm1d(after, track_running_stats=False), nn.LeakyReLU()
        )
        for before, after in pairs
    ]


def _up(before: int, after: int) -> nn.Module:
    layer = nn.ConvTranspose1d(before, after, _KERNEL, 2, 3, output_padding=1)
    return nn.Sequential(layer, nn.BatchNorm1d(after, track_running_stats=False), nn.ELU())
