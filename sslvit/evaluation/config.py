"""The keys of the evaluations, and of the commands that show their results."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..arguments import Precision
from ..errors import Limits

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "gaussian_blur", "defocus_blur", "brightness", "contrast",
    "pixelate", "jpeg",
)  # fmt: skip
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)


@dataclass
class EncoderConfig:
    """Which encoder is measured, and how it is run."""

    run: str = ""  # a run, its checkpoint, untrained:<run>, pixels:<run>, exported folder, timm:<name>, random:<name>
    pool: Literal["auto", "cls", "mean", "cls+mean", "last4", "mean4", "pooled"] = "auto"  # of tokens; auto: as trained
    image_size: int | tuple[int, int] | None = None  # for timm:, random: and pixels only; null: the model's own
    value_range: tuple[float, float] | None = None  # of deep images, black and white; for timm:, random: and pixels
    model_args: dict[str, Any] = field(default_factory=dict)  # for timm: and random: only, for example {patch_size: 4}
    batch_size: int = 256  # images at once
    workers: int | None = None  # processes that load images; null: by the number of cores
    precision: Precision = "auto"  # of the encoder; auto: bf16 where the hardware is fast at it, else float32
    seed: int = 0  # of the held-out part, of the heads, and of the weights of random:
    allow_method: str = ""  # for untrained: of a method of your own: its module, whose code then runs
    out: str = ""  # file for the result; empty: <run>/eval/<name>.json, of untrained: <run>/eval/untrained/<name>.json


@dataclass
class LabelledSets:
    train: str = ""  # labelled images to learn from: a folder with one sub-folder for each class, or a set by name
    test: str = ""  # labelled images on which the result is measured
    download_dir: str = "~/.cache/sslvit"  # where torchvision's data sets are stored


@dataclass
class LabelledConfig(EncoderConfig):
    data: LabelledSets = field(default_factory=LabelledSets)
    cache: bool = True  # keep the features in <run>/eval/features, for the next evaluation of the same weights


@dataclass
class ProbeConfig(LabelledConfig):
    pools: tuple[str, ...] = ()  # ways of pooling to choose from; empty: pool= if it is given, else all of them
    holdout: float = 0.1  # share of the training images of each class on which settings are chosen
    seeds: tuple[int, ...] = ()  # train the heads for each seed, report mean and standard deviation; empty: seed
    picture: str = ""  # PNG with the confusion matrix of the test images; empty: none


@dataclass
class Attention(EncoderConfig):
    data: str = ""  # images, labelled or not: a folder, or a set by name
    images: int = 8  # how many of them, chosen by the seed
    size: int | tuple[int, int] | None = None  # pixels at which the encoder sees the images; null: its own size
    block: int = -1  # its attention is drawn: 0 for the first block, -1 for the last
    query: Literal["auto", "cls", "mean"] = "auto"  # attention of the class token or of all patches; auto: cls if any
    rollout: bool = False  # one more column: attention through all blocks
    picture: str = ""  # the PNG to draw


@dataclass
class Attentive(LabelledConfig):
    lr: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)  # of AdamW; one is chosen
    weight_decay: tuple[float, ...] = (1e-4, 1e-1)  # one is chosen
    epochs: int = 20  # of the heads; the first tenth warms the learning rate up
    probe_batch_size: int = 512  # images in a step of the heads
    holdout: float = 0.1  # share of the training images of each class on which the choice is made
    seeds: tuple[int, ...] = ()  # train the heads once for each seed, report mean and deviation; empty: seed
    picture: str = ""  # PNG with the confusion matrix of the test images; empty: none


@dataclass
class Cluster(EncoderConfig):
    data: str = ""  # labelled images: a folder with a sub-folder for each class, or a set by name
    k: int | None = None  # clusters; null: as many as classes
    spherical: bool = True  # features and centroids of unit length; false: as they are
    repeats: int = 5  # each with its own seed
    restarts: int = 5  # of each repeat; the best by the objective of k-means is taken
    iterations: int = 50  # of k-means
    picture: str = ""  # PNG with images of each cluster of the first repeat; empty: none
    per_cluster: int = 12  # images of each cluster in the picture
    cache: bool = True  # keep the features in <run>/eval/features, for the next evaluation of the same weights
    download_dir: str = "~/.cache/sslvit"  # where torchvision's data sets are stored


@dataclass
class Compare:
    seed: int = 0  # of the bootstrap
    out: str = ""  # file for the table, as JSON; empty: it is only printed


@dataclass
class Finetune(EncoderConfig):
    data: LabelledSets = field(default_factory=LabelledSets)
    recipe: Literal["mae", "small"] = "mae"  # the published recipe of MAE; small: for little data
    task: Literal["auto", "single", "multilabel", "regression"] = "auto"  # auto: single, one class for each image
    image_size: int | tuple[int, int] | None = None  # pixels; null: the encoder's own. Positions are resampled
    labels_share: float = 1.0  # share of the labelled training images of each class that is used, at least one image
    seeds: tuple[int, ...] | None = None  # train once for each seed, report mean and deviation; null: seed
    holdout: float = 0.0  # share of the training images of each class that is kept out and scored after each epoch
    save: str = ""  # a folder for checkpoints: the same command goes on where it stopped; empty: none
    out_model: str = ""  # a folder for the trained model with its head, for timm; empty: none
    global_batch_size: int | None = None  # images in one optimizer step, over all processes
    batch_size: int | None = None  # type: ignore[assignment]  # images at once on each process; null: its global share
    epochs: int | None = None  # passes over the training images
    base_lr: float | None = None  # learning rate of the top layer at a global batch of 256 images; scaled linearly
    min_lr: float | None = None  # learning rate of the top layer at the end
    warmup_epochs: float | None = None  # linear warm-up of the learning rate from 0
    weight_decay: float | None = None  # of all but biases, norms, positions and tokens
    layer_decay: float | None = None  # learning rate of a layer divided by that of the layer above it
    head_lr: float | None = None  # learning rate of the head, in units of base_lr
    standardise: bool | None = None  # shift and scale the features that the head sees, by their first statistics
    drop_path: float | None = None  # stochastic depth: probability in the last block, linear from 0 in the first
    clip: float | None = None  # largest gradient norm
    crop_scale: tuple[float, float] | None = None  # share of the image's area
    flip_prob: float | None = None  # horizontal flip
    randaugment: str | None = None  # in timm's notation, for example rand-m9-mstd0.5-inc1; none: off
    erasing: float | None = None  # probability of random erasing
    mixup: float | None = None  # alpha of the beta distribution; 0: none. Not for regression
    cutmix: float | None = None  # alpha of the beta distribution; 0: none. Not for regression
    smoothing: float | None = None  # label smoothing; for one class an image only
    head_epochs: float | None = None  # epochs in which only the head is trained
    unfreeze_epochs: float | None = None  # then unfreeze one more block every so many epochs; 0: all at once


@dataclass
class Inspect(EncoderConfig):
    other: str = ""  # a second encoder, to compare with: named as in run=
    data: str = ""  # images, labelled or not; empty: those that the run was trained on, if they are on this machine
    images: int = 2000  # how many of them, chosen by the seed
    out: str = "inspect.html"  # the page to write, or a picture of it if the name ends in .png


@dataclass
class Knn(LabelledConfig):
    k: tuple[int, ...] = KS  # numbers of neighbours; of the default ones those that the training set has
    temperature: tuple[float, ...] = (TEMPERATURE,)  # a neighbour votes with exp(similarity / temperature)
    shots: tuple[int, ...] = ()  # few-shot: train on so many images of each class only, drawn `repeats` times
    repeats: int = 10  # draws for each number of shots
    index: Literal["exact", "ivf", "ivfpq"] = "exact"  # ivf, ivfpq: approximate, for tens of millions of images
    probes: int = 64  # cells that an approximate search reads; more find more and take longer
    picture: str = ""  # PNG with the confusion matrix of the test images; empty: none


@dataclass
class Linear(ProbeConfig):
    lr: tuple[float, ...] = LEARNING_RATES  # of SGD at a batch of 1024; one is chosen
    weight_decay: tuple[float, ...] = (0.0, 1e-3)  # one is chosen
    epochs: int | None = None  # of the heads; null: 100, or those of the published protocol
    probe_batch_size: int = 1024  # features in a step of the heads
    protocol: Literal["sweep", "mae", "dino"] = "sweep"  # mae, dino: the papers' own, with crops, one head
    global_batch_size: int | None = None  # for protocol=mae and dino only; null: 16384 and 1024, as published


@dataclass
class Logistic(ProbeConfig):
    l2: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # penalty: l2 / 2 * sum of squared weights; one is chosen
    iterations: int = 100  # of L-BFGS at most


@dataclass
class Online:
    train: str = ""  # labelled images, a folder or a set by name: the neighbours; empty: no evaluation during the run
    test: str = ""  # labelled images to classify, never trained on
    every_epochs: float | None = None  # null: before the first step and after the last only
    k: int = 20  # neighbours that vote

    LIMITS: ClassVar[Limits] = [(0, None, "every_epochs"), (1, None, "k")]


@dataclass
class Quality(EncoderConfig):
    data: str = ""  # images, labelled or not: a folder, or a set by name
    images: int = 2000  # how many of them, chosen by the seed
    views: int = 8  # augmented views of each
    crop_scale: tuple[float, float] = (0.4, 1.0)  # of a view: share of the image's area


@dataclass
class Gallery(LabelledSets):
    train: str = ""  # the gallery: labelled images that are ranked
    test: str = ""  # the queries; empty: each image of the gallery ranks the others


@dataclass
class Retrieval(LabelledConfig):
    data: Gallery = field(default_factory=Gallery)
    k: tuple[int, ...] = (1, 5, 10)  # ranks of recall and precision


@dataclass
class Robustness(Linear):
    images: int | None = 500  # test images that are used, chosen by the seed; null: all
    corruptions: tuple[str, ...] = CORRUPTIONS  # which ones; empty: none
    attacks: tuple[str, ...] = ("fgsm", "pgd")  # which ones; empty: none
    eps: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0)  # how far an attack may move a pixel, in 255ths
    steps: int = 10  # of pgd
    picture: str = ""  # PNG with an image in every corruption at every severity; empty: none


@dataclass
class MaskedSets:
    train: str = ""  # a folder with images/ and masks/ to learn from
    test: str = ""  # another one, on which the result is measured


@dataclass
class Segment(EncoderConfig):
    data: MaskedSets = field(default_factory=MaskedSets)
    size: int | tuple[int, int] | None = None  # pixels at which the encoder sees the images; null: its own size
    lr: tuple[float, ...] = (*LEARNING_RATES, 3.0)  # of SGD at a batch of 1024 patches; one is chosen
    epochs: int = 20  # of the heads, over all patches
    weight_decay: float = 0.0  # of the heads
    holdout: float = 0.1  # share of the training images on which the learning rate is chosen
    probe_batch_size: int = 1024  # patches in a step of the heads
    images: int | None = None  # at most so many training images, chosen by the seed; null: all
    picture: str = ""  # PNG with some test images, their masks and the predictions; empty: none


@dataclass
class Report:
    out: str = "report.html"  # the file to write
    pictures: bool = True  # false: verdict, curves and tables only, at most 300 kB
    data: str = ""  # images for the pictures; empty: those that each run was trained on
    seconds: float = 60.0  # for the pictures of one run; what is not done by then is left out


@dataclass
class Watch:
    port: int = 8347  # of 127.0.0.1; 0: any that is free
