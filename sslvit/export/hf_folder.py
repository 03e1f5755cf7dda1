"""A folder in a native layout of Hugging Face transformers, which versions 4.57 and 5 load with their own classes.

Dinov2WithRegistersModel holds any plain ViT with a class token and a square grid: registers or none, LayerScale or
none. Its pooled output is the class token after the final norm, so no weight of it is random. ViTModel has no registers
and no LayerScale (which is multiplied into the weights here). Its pooler is the identity here, not random. SwinModel
holds a Swin. Keys are those of transformers 4, which version 5 renames when it loads. ViTMAEModel is not written: it
hides patches in evaluation too.
"""

import json
from pathlib import Path
from typing import Any

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..checkpoints import exported, tensorfile
from ..distributed import say
from ..errors import UserError
from ..model import blocks
from ..model.encoder import Encoder
from ..pretrained import Pretrained
from . import card
from .timm_folder import example, ready

State = dict[str, Tensor]
CROP_PCT = 0.875  # the shorter side becomes 256 pixels for a crop of 224

# timm's names of a block's parts -> transformers'. attn.qkv becomes three: {} is query, key or value.
DINOV2 = {
    "norm1": "norm1", "attn.qkv": "attention.attention.{}", "attn.proj": "attention.output.dense", "norm2": "norm2",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
VIT = {
    "norm1": "layernorm_before", "attn.qkv": "attention.attention.{}", "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
}  # fmt: skip
SWIN = VIT | {"attn.qkv": "attention.self.{}"}

LOAD = """
from transformers import AutoImageProcessor, AutoModel
network, found = AutoModel.from_pretrained(folder, output_loading_info=True)
assert type(network).__name__ == {name!r}, type(network).__name__
for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    assert not found[kind], f"{{kind}}: {{sorted(found[kind])[:3]}}"
assert list(AutoImageProcessor.from_pretrained(folder).image_mean) == {mean}
def model(images):
    return network.eval()(images).{output}
"""
HOW = """from transformers import AutoImageProcessor, AutoModel
name = "path/to/this/folder"
processor, model = AutoImageProcessor.from_pretrained(name), AutoModel.from_pretrained(name)
features = model(**processor(images, return_tensors="pt")).{output}"""


def export(subject: Pretrained, out: Path, license: str = "", hf_class: str = "auto") -> Path:
    """Write config.json, preprocessor_config.json, model.safetensors and a model card, let transformers load them in a
    new process, compare features. Raises UserError, also for an encoder that the layout cannot express."""
    encoder = ready(subject)
    name, config, weights = layout(encoder, hf_class)
    first_patch = 1 + getattr(encoder.model, "num_reg_tokens", 0)
    output = f"last_hidden_state[:, {first_patch}:].mean(1)" if encoder.pool == "mean" else "pooler_output"
    config |= {"architectures": [name], "torch_dtype": "float32"}
    files = {"config.json": config, "preprocessor_config.json": processor(subject)}
    text = card.text(subject, "transformers", HOW.format(output=output), license)

    def fill(folder: Path) -> None:
        for file, values in files.items():
            (folder / file).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        tensorfile.write(
            {k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"}
        )
        (folder / "README.md").write_text(text, encoding="utf-8")

    load = LOAD.format(name=name, output=output, mean=files["preprocessor_config.json"]["image_mean"])
    images, features = example(encoder)
    difference = exported.write(out, fill, load, f"transformers {encoder.architecture}", [images], [features])
    say(
        f'{out}: transformers.AutoModel.from_pretrained("{out}") is a {name}, its {output} has {features.shape[1]} '
        "features",
        f"checked in a new process: no missing or unexpected weight, {card.equal(difference)}",
    )
    if output != "pooler_output":
        say(
            f"Its pooler_output is the class token, and this encoder was trained with the mean of patches: {output}. "
            "A folder of to=timm gives this mean as pooler_output in transformers."
        )
    return out


def processor(subject: Pretrained, inside: bool = False) -> dict[str, Any]:
    """preprocessor_config.json: resize, crop, scale, normalise. inside: the model itself scales and normalises.

    Images of another shape than the encoder's are cropped to a square, or stretched for an encoder that is not square.
    """
    (h, w), (low, high) = subject.encoder.image_size, subject.value_range or (0.0, 255.0)
    square = h == w
    return {
        "image_processor_type": "BitImageProcessor" if square else "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": int(h / CROP_PCT)} if square else {"height": h, "width": w},
        "resample": 3,  # bicubic
        "do_center_crop": square,
        "crop_size": {"height": h, "width": w},
        "do_rescale": not inside,
        "rescale_factor": 1 / (high - low),
        "do_normalize": not inside,
        "image_mean": [mean + low / (high - low) for mean in subject.mean],  # low becomes 0
        "image_std": list(subject.std),
        "do_convert_rgb": subject.encoder.in_chans == 3,
    }


def layout(encoder: Encoder, hf_class: str = "auto") -> tuple[str, dict[str, Any], State]:
    """(name of transformers' class, its config.json, its weights). Raises UserError for what it cannot express."""
    vit = encoder.model
    if type(vit) is SwinTransformer and hf_class == "auto":
        return "SwinModel", *swin(encoder)
    if not (encoder.is_vit and type(vit) is VisionTransformer):
        raise _not_expressed(encoder, f"a {type(vit).__name__}")
    _refuse(encoder, {
        "no class token": not vit.has_class_token,
        "no position embedding": vit.pos_embed is None,
        "a stem of its own": type(vit.patch_embed) is not PatchEmbed or vit.patch_embed.proj.bias is None,
        "a norm before its blocks": not isinstance(vit.norm_pre, nn.Identity),
        "blocks of its own": not all(_is_usual(block) for block in vit.blocks),
    })  # fmt: skip
    return ("ViTModel", *vit_model(encoder)) if hf_class == "vit" else ("Dinov2WithRegistersModel", *dinov2(encoder))


def dinov2(encoder: Encoder) -> tuple[dict[str, Any], State]:
    """Dinov2WithRegistersModel."""
    vit, width, prefix = encoder.model, encoder.width, encoder.model.num_prefix_tokens
    grid, ratio = encoder.grid(), vit.blocks[0].mlp.fc1.out_features / width
    _refuse(encoder, {
        f"a grid of {grid[0]}x{grid[1]} patches, not a square": grid[0] != grid[1],
        f"an MLP of {ratio:g} times its width, not a whole number": ratio != int(ratio),
    }, "" if prefix > 1 else "hf_class=vit, ")  # fmt: skip
    config = _config(encoder, "dinov2_with_registers") | {
        "mlp_ratio": int(ratio), "num_register_tokens": prefix - 1, "layerscale_value": 1.0,
    }  # fmt: skip
    tokens, positions = _tokens(vit)
    state = _stem(vit, tokens, positions)
    state["embeddings.mask_token"] = torch.zeros(1, width)
    state["embeddings.register_tokens"] = tokens[:, 1:]
    for i, block in enumerate(vit.blocks):
        state |= _block(block, f"encoder.layer.{i}.", DINOV2)
        for j, scale in ((1, block.ls1), (2, block.ls2)):
            state[f"encoder.layer.{i}.layer_scale{j}.lambda1"] = getattr(scale, "gamma", torch.ones(width))
    return config, state


def vit_model(encoder: Encoder) -> tuple[dict[str, Any], State]:
    """ViTModel."""
    vit, width = encoder.model, encoder.width
    _refuse(encoder, {"register tokens": vit.num_prefix_tokens > 1}, "hf_class=auto, ")
    config = _config(encoder, "vit") | {
        "intermediate_size": vit.blocks[0].mlp.fc1.out_features, "encoder_stride": encoder.patch_size[0],
        "pooler_act": "linear",
    }  # fmt: skip
    state = _stem(vit, *_tokens(vit))
    for i, block in enumerate(vit.blocks):
        state |= _block(block, f"encoder.layer.{i}.", VIT)
        for part, scale in (("attention.output.dense", block.ls1), ("output.dense", block.ls2)):
            if hasattr(scale, "gamma"):
                state[f"encoder.layer.{i}.{part}.weight"] *= scale.gamma[:, None]
                state[f"encoder.layer.{i}.{part}.bias"] *= scale.gamma
    return config, state | {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}


def swin(encoder: Encoder) -> tuple[dict[str, Any], State]:
    """SwinModel. Its pooled output is the mean of the last stage's tokens after the norm, as timm's."""
    model: Any = encoder.model
    window = model.layers[0].blocks[0].attn.window_size
    each = [block for stage in model.layers for block in stage.blocks]
    table, grids = (2 * window[0] - 1) ** 2, [block.input_resolution for block in each]
    _refuse(encoder, {
        "windows that are not squares": window[0] != window[1],
        "a pooling of its own": model.global_pool != "avg",
        # There transformers shifts the windows of neither side, and timm those of the longer one.
        "a stage that is one window high or wide, but not both": any(min(hw) <= window[0] < max(hw) for hw in grids),
        "stages with windows of other sizes": any(len(b.attn.relative_position_bias_table) != table for b in each),
        "blocks of its own": not all(type(b.mlp) is Mlp and _exact_gelu(b.mlp.act) for b in each),
        "norms of its own": not all(isinstance(norm, nn.LayerNorm) for b in each for norm in (b.norm1, b.norm2)),
    })  # fmt: skip
    config = _common(encoder, "swin") | {
        "patch_size": model.patch_embed.patch_size[0], "embed_dim": model.embed_dim,
        "depths": [len(stage.blocks) for stage in model.layers],
        "num_heads": [stage.blocks[0].attn.num_heads for stage in model.layers],
        "window_size": window[0], "mlp_ratio": each[0].mlp.fc1.out_features / model.embed_dim,
        "layer_norm_eps": each[0].norm1.eps, "drop_path_rate": 0.0, "use_absolute_embeddings": False,
    }  # fmt: skip
    embed = model.patch_embed
    state = _part(embed.proj, "embeddings.patch_embeddings.projection") | _part(embed.norm, "embeddings.norm")
    for i, stage in enumerate(model.layers):
        if i:  # timm merges patches before a stage, transformers after the one before
            down = f"encoder.layers.{i - 1}.downsample."
            state |= _part(stage.downsample.norm, f"{down}norm") | _part(stage.downsample.reduction, f"{down}reduction")
        for j, block in enumerate(stage.blocks):
            place = f"encoder.layers.{i}.blocks.{j}."
            state |= _block(block, place, SWIN)
            # Version 4 needs the index too, version 5 passes over it.
            for name in ("relative_position_bias_table", "relative_position_index"):
                state[f"{place}attention.self.{name}"] = getattr(block.attn, name)
    return config, state | _part(model.norm, "layernorm")


def _common(encoder: Encoder, model_type: str) -> dict[str, Any]:
    h, w = encoder.image_size
    return {
        "model_type": model_type, "image_size": h if h == w else [h, w], "num_channels": encoder.in_chans,
        "qkv_bias": True, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip


def _config(encoder: Encoder, model_type: str) -> dict[str, Any]:
    vit = encoder.model
    (p, q), eps = encoder.patch_size, {norm.eps for norm in _norms(vit)}
    _refuse(encoder, {
        "patches that are not squares": p != q,
        "norms with different epsilons": len(eps) > 1,
    })  # fmt: skip
    return _common(encoder, model_type) | {
        "patch_size": p, "hidden_size": encoder.width, "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": vit.blocks[0].attn.num_heads, "layer_norm_eps": eps.pop(),
    }  # fmt: skip


def _norms(vit: VisionTransformer) -> list[Any]:
    return [vit.norm, *(norm for block in vit.blocks for norm in (block.norm1, block.norm2))]


def _tokens(vit: Any) -> tuple[Tensor, Tensor]:
    """Class token and registers [1, P, D], positions of the class token and of the patches [1, 1 + N, D]. A register
    has no position in transformers: it is part of the token."""
    tokens = torch.cat([token for token in (vit.cls_token, vit.reg_token) if token is not None], dim=1)
    patches = vit.patch_embed.num_patches
    of_prefix, positions = vit.pos_embed[:, :-patches], vit.pos_embed[:, -patches:]
    if not of_prefix.shape[1]:
        of_prefix = torch.zeros_like(tokens)
    tokens = torch.cat([tokens[:, :1], tokens[:, 1:] + of_prefix[:, 1:]], dim=1)
    return tokens, torch.cat([of_prefix[:, :1], positions], dim=1)


def _stem(vit: Any, tokens: Tensor, positions: Tensor) -> State:
    found = {"embeddings.cls_token": tokens[:, :1], "embeddings.position_embeddings": positions}
    return found | _part(vit.patch_embed.proj, "embeddings.patch_embeddings.projection") | _part(vit.norm, "layernorm")


def _block(block: Any, place: str, names: dict[str, str]) -> State:
    state: State = {}
    for ours, theirs in names.items():
        values = _part(block.get_submodule(ours), "")
        if ours == "attn.qkv":
            for key, value in values.items():
                parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
                state |= {f"{place}{theirs.format(name)}{key}": part for name, part in parts}
        else:
            state |= {f"{place}{theirs}{key}": value for key, value in values.items()}
    return state


def _part(module: nn.Module, place: str) -> State:
    return {f"{place}.{name}": value.detach().clone() for name, value in module.named_parameters()}


def _is_usual(block: Any) -> bool:
    """Whether transformers' classes can compute what a timm block does."""
    return (
        blocks.is_plain(block)
        and block.attn.qkv.bias is not None
        and all(isinstance(norm, nn.Identity) for norm in (block.attn.q_norm, block.attn.k_norm, block.attn.norm))
        and all(isinstance(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2))
        and type(block.mlp) is Mlp
        and isinstance(block.mlp.norm, nn.Identity)
        and _exact_gelu(block.mlp.act)
    )


def _exact_gelu(act: Any) -> bool:
    return isinstance(act, nn.GELU) and act.approximate == "none"


def _refuse(encoder: Encoder, found: dict[str, bool], instead: str = "") -> None:
    """Raises UserError for the first that is true."""
    for what, true in found.items():
        if true:
            raise _not_expressed(encoder, what, instead)


def _not_expressed(encoder: Encoder, what: str, instead: str = "") -> UserError:
    return UserError(
        f"to=hf cannot express {encoder.architecture} with {what}: take {instead}to=timm, which transformers "
        "loads too, or to=onnx."
    )
