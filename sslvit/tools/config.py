"""The keys of the commands of this folder."""

from dataclasses import dataclass
from typing import Literal

from ..evaluation.config import EncoderConfig


@dataclass
class Bench:
    seconds: float = 4.0  # time to measure the parts of a step; the loop takes twice as long
    report: str | None = None  # write what was measured to this JSON file


@dataclass
class Data:
    sample: int = 10_000  # images that are examined, chosen by the seed; 0: all
    picture: str | None = None  # a PNG file to draw images to, and their crops and masks
    report: str | None = None  # a JSON file to write the findings to
    out: str | None = None  # an HTML page (.html) of the findings, with pictures; any other out= is that of the run


@dataclass
class Embed(EncoderConfig):
    data: str = ""  # images of any kind, as in data.train of pretrain; labels are taken along
    download_dir: str = "~/.cache/sslvit"  # where torchvision's data sets are stored
    dtype: Literal["float32", "float16"] = "float32"  # of the vectors
    out: str = ""  # the file to write: .parquet, .npy or .faiss


@dataclass
class Search:
    index: str = ""  # what sslvit embed has written: .faiss, .npy or .parquet
    image: str = ""  # images to look for: a file, [a.jpg,b.jpg], or images of any kind as in data.train of pretrain
    k: int = 10  # nearest images of each
    duplicates: float | None = None  # in place of image: groups of images with this similarity, such as 0.99
    subset: int | None = None  # in place of image: so many images that are as different as can be
    out: str = ""  # .csv file for all that was found; empty: none
    picture: str | None = ""  # contact sheet; empty: <index>.png; null: none
    run: str = ""  # the encoder, if it is not where it was
    data: str = ""  # the images of the index, if they are not where they were


@dataclass
class Submit:
    cluster: Literal["slurm", "local"] = "slurm"  # local: on this machine, to try it; 6 starts at most
    nodes: int = 1  # machines
    gpus: int = 1  # GPUs of each machine, with one process each; 0: train on CPUs
    processes: int | None = None  # processes of each machine, with gpus=0; null: one
    cpus: int = 8  # cores of each process
    memory: float | None = None  # GiB of each machine; null: the default of the cluster
    hours: float = 24.0  # length of one start; then the run saves and is queued again until it is done
    restarts: int = 100  # the job is queued again so many times at most
    warn_minutes: float = 5.0  # the run is told to save so many minutes before its hours are over
    partition: str | None = None  # null: the default of the cluster
    account: str | None = None  # null: the default of the cluster
    sbatch: str = ""  # further options of sbatch, which win: "--qos=high --gres=gpu:a100:4"
    setup: str = ""  # a shell command before each start: "module load cuda/12"
    check_images: bool = True  # open the images here first; false if only the machines of the cluster see them
