"""Loss weights: logSNR (any shape, float32) to the factor of a sample's loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gdf.names import check_name

LossWeight = Callable[[Tensor], Tensor]

ADAPTIVE_EDGES, ADAPTIVE_RANGE = 299, 10.0
ADAPTIVE_WEIGHT_RANGE = (1e-7, 1e7)


# --- fixed weights --------------------------------------------------------------------------------


def constant(logsnr: Tensor) -> Tensor:
    """1 everywhere."""
    return torch.ones_like(logsnr)


def p2(logsnr: Tensor) -> Tensor:
    """1 / (1 + SNR) (arXiv 2204.00227, eq. 8)."""
    return 1 / (1 + logsnr.exp())


def snr(logsnr: Tensor) -> Tensor:
    """SNR: the x0 loss written for an epsilon prediction."""
    return logsnr.exp()


def snr_plus_one(logsnr: Tensor) -> Tensor:
    """SNR + 1."""
    return logsnr.exp() + 1


def min_snr(logsnr: Tensor, limit: float = 5.0) -> Tensor:
    """SNR, at most `limit` (arXiv 2303.09556, sec. 3.4)."""
    return snr(logsnr).clamp(max=limit)


def min_snr_plus_one(logsnr: Tensor, limit: float = 5.0) -> Tensor:
    """SNR + 1, at most `limit`."""
    return snr_plus_one(logsnr).clamp(max=limit)


def truncated_snr(logsnr: Tensor) -> Tensor:
    """SNR, at least 1 (arXiv 2202.00512, sec. 4)."""
    return snr(logsnr).clamp(min=1.0)


def sech(logsnr: Tensor) -> Tensor:
    """Hyperbolic secant of half the logSNR, highest where signal and noise are equal."""
    return 1 / torch.cosh(logsnr / 2)


def debiased(logsnr: Tensor) -> Tensor:
    """1 / sqrt(SNR) (arXiv 2310.08442)."""
    return (-logsnr / 2).exp()


def sigmoid(logsnr: Tensor) -> Tensor:
    """SNR / (1 + SNR)."""
    return logsnr.sigmoid()


def shifted(weight: LossWeight, shift: float) -> LossWeight:
    """The weight read at logSNR + 2 ln(shift), to undo a schedule's shift."""
    return lambda logsnr: weight(logsnr + 2 * math.log(shift))


WEIGHTS: dict[str, LossWeight] = {
    function.__name__: function
    for function in (
        constant, p2, snr, snr_plus_one, min_snr, min_snr_plus_one, truncated_snr, sech, debiased, sigmoid,
    )
}  # fmt: skip


def loss_weight_named(name: str, shift: float = 1.0) -> LossWeight:
    """A fixed weight by its function's name, read at logSNR + 2 ln(shift); ValueError for an unknown one."""
    check_name("loss weight", name, tuple(WEIGHTS))
    return WEIGHTS[name] if shift == 1.0 else shifted(WEIGHTS[name], shift)


# --- weights from the losses seen -----------------------------------------------------------------


class LossBuckets:
    """A running mean of the loss in buckets of logSNR, 1 before anything was seen.

    With one process, call `update`; with several, sum what `tally` returns over all of them and `apply` that.
    """

    def __init__(self, edges: Tensor, device: torch.device | str = "cpu", beta: float = 0.99):
        self.edges = edges.to(device)  # (buckets - 1,) increasing, between neighbouring buckets
        self.mean = torch.ones(len(edges) + 1, device=device)
        self.beta = beta

    def bucket_of(self, logsnr: Tensor) -> Tensor:
        """The bucket index of each logSNR, same shape, on the buckets' device."""
        return torch.searchsorted(self.edges, logsnr.to(self.edges))

    def tally(self, logsnr: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of the loss and counts of samples per bucket (buckets,), from logsnr and loss (B,)."""
        bucket = self.bucket_of(logsnr)
        loss = loss.detach().to(self.mean)
        sums = torch.zeros_like(self.mean).index_add(0, bucket, loss)
        counts = torch.zeros_like(self.mean).index_add(0, bucket, torch.ones_like(loss))
        return sums, counts

    def apply(self, sums: Tensor, counts: Tensor) -> None:
        """Moves the mean of every bucket with samples towards their average."""
        moved = self.mean.lerp(sums / counts.clamp(min=1), 1 - self.beta)
        self.mean = torch.where(counts > 0, moved, self.mean)

    def update(self, logsnr: Tensor, loss: Tensor) -> None:
        """Takes in a step's unweighted losses (B,) at their logSNR (B,), once its weights were read."""
        self.apply(*self.tally(logsnr, loss))

    def state_dict(self) -> dict[str, Tensor]:
        """The running means, for a checkpoint."""
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes up a checkpoint's running means; raises ValueError where the number of buckets differs."""
        if state["mean"].shape != self.mean.shape:
            raise ValueError(
                f"the saved loss buckets number {state['mean'].numel()}, but {self.mean.numel()} are needed: "
                "continue from a checkpoint of the same kind of training"
            )
        self.mean = state["mean"].to(self.mean)


class AdaptiveLossWeight(LossBuckets):
    """1 / the running mean of the loss at this logSNR, so that all noise levels count alike (300 buckets)."""

    def __init__(self, device: torch.device | str = "cpu"):
        super().__init__(torch.linspace(-ADAPTIVE_RANGE, ADAPTIVE_RANGE, ADAPTIVE_EDGES), device)

    def __call__(self, logsnr: Tensor) -> Tensor:
        """The weight of each logSNR, same shape and device."""
        weight = (1 / self.mean[self.bucket_of(logsnr)]).clamp(*ADAPTIVE_WEIGHT_RANGE)
        return weight.to(logsnr.device)
