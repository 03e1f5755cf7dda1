"""model.onnx, for ONNX Runtime and whatever else reads ONNX: images in, features out, a batch of any size.

A plain ViT takes images of any size too, in multiples of its patches: its positions are resampled inside.
"""

from pathlib import Path

import torch

from ..checkpoints import exported
from ..distributed import say
from ..pretrained import Pretrained
from . import card
from .timm_folder import ready
from .torch_program import beside, explained, traceable

EXTERNAL = 1 << 30  # bytes of weights above which they lie in a second file: one file of ONNX ends at 2 GiB
LOAD = """
import onnxruntime
session = onnxruntime.InferenceSession(folder + "/model.onnx", providers=["CPUExecutionProvider"])
def model(images):
    return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])
"""
HOW = """import onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
features = session.run(["features"], {{"images": images}})[0]  # {images}"""


def export(subject: Pretrained, out: Path, license: str = "", preprocess: bool = False) -> Path:
    """Write model.onnx, preprocessor_config.json and a model card, let ONNX Runtime load them in a new process, compare
    features, also of larger images where it takes them. Raises UserError."""
    encoder = ready(subject)
    any_size = encoder.is_vit and encoder.model.pos_embed is not None and "dynamic_img_size" in encoder.model_args
    p, q = encoder.patch_size if any_size else (0, 0)
    sizes: dict[int, object] = {0: torch.export.Dim("batch")}
    if any_size:
        sizes |= {2: p * torch.export.Dim("rows"), 3: q * torch.export.Dim("columns")}
    # Traced with larger images: with the encoder's own, its positions would stay as they are.
    model, larger, of_larger = traceable(subject, preprocess, (2 * p, 3 * q))
    _, images, features = traceable(subject, preprocess)
    size = sum(weight.numel() * weight.element_size() for weight in model.state_dict().values())

    def fill(folder: Path) -> None:
        with explained("torch.onnx", encoder):
            program = torch.onnx.export(
                model, (larger,), dynamo=True, dynamic_shapes={"images": sizes}, input_names=["images"],
                output_names=["features"], verbose=False,
            )  # fmt: skip
            assert program
            program.save(folder / "model.onnx", external_data=size > EXTERNAL)
        beside(folder, subject, preprocess, "onnx", HOW, license)

    batches, expected = [images, images[:1].clone(), larger], [features, features[:1], of_larger]
    difference = exported.write(out, fill, LOAD, f"onnxruntime {encoder.architecture}", batches, expected)
    say(
        f"{out / 'model.onnx'}: {'uint8' if preprocess else 'normalised float32'} images give {features.shape[1]} "
        f"features{f', in any multiple of {p}x{q} pixels' * any_size}",
        f"checked in a new process by ONNX Runtime: {card.equal(difference)}",
    )
    return out
