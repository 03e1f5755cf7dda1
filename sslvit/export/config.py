"""The keys of `sslvit export`."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class Export:
    run: str = ""  # a run directory, an exported folder, or timm:<name>
    to: str = "timm"  # the forms, one or several: timm,hf,onnx,torch (hf: transformers' own classes; torch: a program)
    allow_method: str = ""  # for untrained: of a method of your own: its module, whose code then runs
    out: str = ""  # the folder to write, with one subfolder for each of several forms; empty: <run>/export/<form>
    hf_class: Literal["auto", "vit"] = "auto"  # of to=hf; auto: Dinov2WithRegistersModel or SwinModel; vit: ViTModel
    preprocess: bool = False  # of to=onnx and torch: take 8-bit images, and scale and normalise them inside
    license: str = ""  # of the weights, for the model card, as Hugging Face writes it: apache-2.0, cc-by-4.0 ...
    push: str = ""  # upload to this repository of the Hugging Face Hub, <user>/<name>; a new one is private
