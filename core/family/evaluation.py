"""How good pictures of held-out scenes are: by a recogniser, distances to real renderings, round trips."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from core.config.settings import Job, Settings
from core.config.sizes import Size
from core.pipeline.passes import decode_picture
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.progress import Observer
from core.pipeline.resolution import Plan, plan
from core.pipeline.sources import enlarge, latent_of
from core.pipeline.stages import GROUP
from core.random_keys import generator_of
from core.scenes.captions import caption
from core.scenes.drawing import render
from core.scenes.scene import ATTRIBUTES, Scene, labels, sample_scene
from modules.effnet import EfficientNetEncoder
from modules.recogniser import SIDE, Recogniser, resize
from modules.stage_a import StageA

CROPS = 8  # of each picture
BANDS = 4  # octaves of detail that a crop is told apart by
WINDOWS = (3, 7, 13)  # px of a crop at half size, in which an outline has one direction
STRONG_EDGE = 0.02  # squared difference of brightness over two of these

OnPicture = Callable[["View", "Case", Tensor], None]


@dataclass(frozen=True)
class Case:
    """A held-out scene with its prompt; the seed is the scene's, the caption's and the picture's."""

    scene: Scene
    prompt: str
    seed: int


@dataclass(frozen=True)
class View:
    """Pictures under a name, and the size (height, width) at which they are measured."""

    name: str
    size: Size
    baseline: bool = False  # what the others are compared with


@dataclass(frozen=True)
class Shares:
    """A share in [0, 1] of each attribute, their mean, and the attribute with the lowest."""

    each: dict[str, float]
    mean: float
    worst: str


@dataclass(frozen=True)
class Measured:
    """What pictures are worth."""

    view: View
    count: int
    accuracy: Shares
    frechet: float
    patch_frechet: float
    seconds: float  # per picture
    few_pictures: bool  # covariances are singular, distances hardly comparable


@dataclass(frozen=True)
class RoundTrip:
    """What is left of real pictures."""

    size: Size
    psnr: float  # dB, through Stage A alone
    kept: Shares  # of the attributes, through the encoder, Stage B and Stage A


def held_out_cases(count: int, seed: int) -> list[Case]:
    """Held-out scenes with one caption each, the i-th of seed + i."""
    scenes = [(sample_scene(number, "held_out"), number) for number in range(seed, seed + count)]
    return [Case(scene, caption(scene, number), number) for scene, number in scenes]


def real_picture(scene: Scene, size: Size) -> Tensor:
    """The rendering of a scene: (3, height, width) in [0, 1]."""
    return torch.from_numpy(render(scene, *size)).permute(2, 0, 1).float() / 255


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians with the moments of features (N, D) and (M, D)."""
    return frechet_between(*_moments(a), *_moments(b))


def frechet_between(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """||m1 - m2||² + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of means (D,) and covariances (D, D), in float64.

    C1 C2 has the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2), also where both are singular.
    """
    values, vectors = torch.linalg.eigh(cov_a.double())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # (D, D)
    product = root @ cov_b.double() @ root
    common = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    apart = (mean_a.double() - mean_b.double()).square().sum()
    return max(0.0, (apart + cov_a.trace() + cov_b.trace() - 2 * common).item())


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of features (N, D), in float64; one sample has a covariance of zero."""
    mean = x.double().mean(dim=0)
    centred = x.double() - mean
    return mean, centred.T @ centred / max(1, len(x) - 1)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise ratio in dB of pictures in [0, 1]."""
    return -10 * (a - b).double().square().mean().log10().item()


def shares(answers: Tensor, truth: Tensor) -> Shares:
    """How often answers (N, attributes) are the truth, per attribute."""
    means = (answers == truth).double().mean(dim=0).tolist()
    each = dict(zip(ATTRIBUTES, means, strict=True))
    return Shares(each, sum(means) / len(means), min(each, key=each.get))


def crops(picture: Tensor, seed: int) -> Tensor:
    """Crops of a picture (3, H, W) at native resolution, (CROPS, 3, side, side); a seed fixes where.

    Their side is what the recogniser looks at, or half of a small picture's shorter side.
    """
    height, width = picture.shape[-2:]
    side = min(SIDE, min(height, width) // 2)
    places = torch.rand(CROPS, 2, generator=generator_of((seed % 2**64,)))
    corners = (places * torch.tensor([height - side + 1, width - side + 1])).long().tolist()
    return torch.stack([picture[:, y : y + side, x : x + side] for y, x in corners])


def detail(pictures: Tensor) -> Tensor:
    """How much detail pictures (B, 3, H, W) in [0, 1] show, and their colours: (B, 3 (BANDS + 2)).

    The logarithm of the mean contrast of each octave (a Laplacian pyramid's level), means and deviations.
    """
    columns, x = [], pictures
    for _ in range(BANDS):
        coarse = F.avg_pool2d(x, 2)
        band = x - F.interpolate(coarse, size=x.shape[-2:], mode="bilinear", align_corners=False)
        columns.append((band.abs().mean(dim=(2, 3)) + 1 / 255).log())
        x = coarse
    return torch.cat([*columns, pictures.mean(dim=(2, 3)), pictures.std(dim=(2, 3))], dim=1)


def outlines(pictures: Tensor) -> Tensor:
    """How torn the outlines in pictures (B, 3, H, W) in [0, 1] are: (B, len(WINDOWS)).

    The logarithm of the share of the brightness' squared gradient that lies along an outline (a structure
    tensor's smaller eigenvalue), of which a smooth outline has almost none; of strong edges, at half size.
    """
    x = F.avg_pool2d(pictures.mean(dim=1, keepdim=True), 2)
    right, down = x[..., 1:-1, 2:] - x[..., 1:-1, :-2], x[..., 2:, 1:-1] - x[..., :-2, 1:-1]
    strong = (right.square() + down.square() > STRONG_EDGE).to(x)
    products = [strong * product for product in (right * right, down * down, right * down)]
    columns = []
    for window in WINDOWS:
        a, b, c = (F.avg_pool2d(product, window, 1) for product in products)
        along = a + b - ((a - b).square() + 4 * c.square()).sqrt()  # twice the smaller eigenvalue
        along, both = along.sum(dim=(1, 2, 3)), (a + b).sum(dim=(1, 2, 3))
        columns.append(((along + 1e-3) / (2 * both + 1e-2)).log())  # without edges: a constant
    return torch.stack(columns, dim=1)


@dataclass(frozen=True)
class Seen:
    """What is seen in a picture: answers (attributes,), features (D,), and of its crops (CROPS, D').

    The crops' features are the recogniser's, which minds neither blur nor torn outlines, and those of
    `detail` and `outlines`, which do.
    """

    answers: Tensor
    features: Tensor
    crops: Tensor


class Judge:
    """The recogniser, and what it sees in the real renderings; each is drawn once and not kept."""

    def __init__(self, recogniser: Recogniser, device: torch.device) -> None:
        self._recogniser, self._device = recogniser, device
        self._real: dict[tuple[int, Size], Seen] = {}

    @torch.no_grad()
    def look(self, picture: Tensor, seed: int) -> Seen:
        """What is in a picture (3, H, W); ValueError if any pixel is NaN."""
        if picture.isnan().any():
            raise ValueError(f"the picture of seed {seed} holds NaN; check the weight files and the settings")
        patches = crops(picture.to(self._device), seed)
        views = torch.cat([resize(picture[None].to(self._device), SIDE), resize(patches, SIDE)])
        features = self._recogniser.features(views)
        answers = [logits.argmax() for logits in self._recogniser.heads(features[:1])]
        of_crops = torch.cat([features[1:], detail(patches), outlines(patches)], dim=1)
        return Seen(torch.stack(answers).cpu(), features[0].cpu(), of_crops.cpu())

    def real(self, case: Case, size: Size) -> Seen:
        """What is in the rendering of a scene."""
        if (case.seed, size) not in self._real:
            self._real[case.seed, size] = self.look(real_picture(case.scene, size), case.seed)
        return self._real[case.seed, size]

    def measure(self, view: View, cases: Sequence[Case], seen: Sequence[Seen], seconds: float) -> Measured:
        """Hold what was seen in the cases' pictures, made in `seconds`, against scenes and renderings."""
        real = [self.real(case, view.size) for case in cases]
        answers = torch.stack([s.answers for s in seen])
        truth = torch.tensor([labels(case.scene) for case in cases])
        features = [torch.stack([s.features for s in group]) for group in (seen, real)]
        patches = [torch.cat([s.crops for s in group]) for group in (seen, real)]
        distances = frechet_distance(*features), frechet_distance(*patches)
        few = len(cases) <= features[0].shape[1]
        return Measured(view, len(cases), shares(answers, truth), *distances, seconds / len(cases), few)


@dataclass(frozen=True)
class Evaluation:
    """Measures what a pipeline makes of cases, group by group."""

    pipeline: UltraPixelPipeline
    judge: Judge
    cases: Sequence[Case]
    settings: Settings

    def pictures(
        self, size: Size, views: Sequence[View], observer: Observer | None, on_picture: OnPicture
    ) -> list[Measured]:
        """Make every case's picture in `size` and measure it under each view, at the view's size."""
        seen: list[list[Seen]] = [[] for _ in views]
        seconds = 0.0
        for group, jobs in self._groups(size):
            start = time.perf_counter()
            made = self.pipeline.run(jobs, self.settings, observer)
            seconds += time.perf_counter() - start
            for case, picture in zip(group, made, strict=True):
                for view, found in zip(views, seen, strict=True):
                    pixels = enlarge(picture.pixels, view.size)
                    found.append(self.judge.look(pixels, case.seed))
                    on_picture(view, case, pixels)
        return [self.judge.measure(view, self.cases, s, seconds) for view, s in zip(views, seen, strict=True)]

    @torch.no_grad()
    def round_trip(self, encoder: EfficientNetEncoder, size: Size, observer: Observer | None) -> RoundTrip:
        """What Stage A keeps of the real pictures, and what encoder, Stage B and Stage A do."""
        pipeline, sizes = self.pipeline, plan(*size, self.pipeline.config_c.geometry)
        ratios, answers, truth = [], [], []
        for group, jobs in self._groups(size):
            real = [real_picture(case.scene, size).to(pipeline.device) for case in group]
            with pipeline.stage_a.on_device() as stage_a:
                ratios += [psnr(stage_a_round_trip(stage_a, x, sizes), x) for x in real]
            stride = pipeline.config_c.geometry.stride
            latents = [latent_of(x, encoder, sizes.hr_latent, stride) for x in real]
            plans, texts = [sizes] * len(group), pipeline.encode_text(jobs)
            sampled = list(pipeline.run_stage_b(jobs, plans, texts, latents, self.settings, observer))
            decoded = list(pipeline.run_stage_a(jobs, plans, sampled, self.settings, observer))
            answers += [self.judge.look(picture.pixels, picture.job.seed).answers for picture in decoded]
            truth += [self.judge.real(case, size).answers for case in group]
        return RoundTrip(size, sum(ratios) / len(ratios), shares(torch.stack(answers), torch.stack(truth)))

    def _groups(self, size: Size) -> Iterator[tuple[Sequence[Case], list[Job]]]:
        for start in range(0, len(self.cases), GROUP):
            group = self.cases[start : start + GROUP]
            yield group, [Job(case.prompt, *size, case.seed) for case in group]


def stage_a_round_trip(stage_a: StageA, picture: Tensor, sizes: Plan) -> Tensor:
    """A picture (3, height, width) encoded, not quantised, and decoded; sides are padded to whole latents."""
    padding = (0, sizes.decoded_width - sizes.width, 0, sizes.decoded_height - sizes.height)
    padded = F.pad(picture[None], padding, mode="replicate")
    return decode_picture(stage_a, stage_a.encode(padded), sizes, tiled=False)
