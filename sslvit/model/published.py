"""How the weights of other programs are named, as tables: how to recognise a file, and what its names are called here.

Names here are those of a run's checkpoint. For an encoder alone: `encoder.model.` and timm's name. For DINO:
`student.encoder.model.`, `teacher.encoder.model.`, `student.head.`, `teacher.head.`, `center`. For MAE: those of an
encoder, `decoder_...` and `mask_token`.

A rule is (regular expression, replacement). All rules of a layout are applied to a name, in their order. A replacement
that ends in #0, #1 or #2 is a part of a tensor: parts are put together along their first dimension.
"""

from dataclasses import dataclass

Rules = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Layout:
    """A kind of file."""

    name: str  # as messages say it
    signs: tuple[str, ...]  # regular expressions: each is found in some name of such a file
    rules: Rules


# What a saved dictionary calls things that are no weights. They are not looked at.
NOT_WEIGHTS = {
    "optimizer", "optimizer_state_dict", "optimizers", "lr_scheduler", "lr_schedulers", "scheduler", "scaler", "amp",
    "fp16_scaler", "grad_scaler", "optim", "args", "config", "cfg", "hyper_parameters", "callbacks", "loops", "rng",
}  # fmt: skip
# Classes of values that the released codes store beside their weights. They are not imported: a value that does nothing
# stands in the place of each, and a dictionary in the place of those that are dictionaries.
DICTIONARIES = ("yacs.config.CfgNode",)
PASSED_OVER = (
    "argparse.Namespace", "pathlib.PosixPath", "pathlib._local.PosixPath", "numpy.dtype",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig", "omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode", "typing.Any",
)  # fmt: skip
# What wraps a model or holds its weights, in front of or within a name.
WRAPPERS: Rules = (
    (r"(^|\.)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)", r"\1"),
    (r"^\.+|(?<=\.)\.+", ""),
    (r"^(?:(?:model|state_dict|model_state_dict)\.)+", ""),
)

# Blocks. DINOv2's large models are stored in chunks (blocks.<chunk>.<block>), their SwiGLU as w12 and w3.
BLOCKS: Rules = (
    (r"\bblocks\.\d+\.(\d+)\.", r"blocks.\1."),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"\.attn\.q_bias$", ".attn.qkv.bias#0"),  # BEiT's, which SimMIM took over: keys have no bias
    (r"\.attn\.v_bias$", ".attn.qkv.bias#2"),
    (r"(encoder\.model\.)register_tokens$", r"\1reg_token"),
    (r"\.last_layer\.parametrizations\.weight\.original0$", ".last_layer.weight_g"),
    (r"\.last_layer\.parametrizations\.weight\.original1$", ".last_layer.weight_v"),
)
# DINOv3, which timm has as a model of its family EVA.
DINOV3: Rules = (
    (r"(encoder\.model\.)storage_tokens$", r"\1reg_token"),
    (r"(blocks\.\d+)\.ls([12])\.gamma$", r"\1.gamma_\2"),
)
# Hugging Face's blocks, as transformers 4 and 5 write them.
HUGGING_FACE: Rules = (
    (r"\.attention\.(?:(?:attention|self)\.query|q_proj)\.", ".attn.qkv#0."),
    (r"\.attention\.(?:(?:attention|self)\.key|k_proj)\.", ".attn.qkv#1."),
    (r"\.attention\.(?:(?:attention|self)\.value|v_proj)\.", ".attn.qkv#2."),
    (r"(#\d)(\.\w+)$", r"\2\1"),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(?:self|relative_position_bias)\.(?=relative_position_)", ".attn."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.intermediate\.dense\.|\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.output\.dense\.|\.mlp\.weights_out\.|\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"\.mlp\.gate_proj\.(\w+)$", r".mlp.fc1.\1#0"),
    (r"\.mlp\.up_proj\.(\w+)$", r".mlp.fc1.\1#1"),
)
# Swin: a stage ends with its downsampling, and in timm the next one begins with it.
SWIN: Rules = tuple((rf"\blayers\.{i}\.downsample\.", f"layers.{i + 1}.DOWNSAMPLE.") for i in range(8)) + (
    (r"DOWNSAMPLE", "downsample"),
)
# Parts of an encoder that are computed, not learned.
COMPUTED = r"\.(?:relative_position_index|attn_mask|rope_embed\.periods|rope\.periods|bias_mask|relative_coords_table)$"

# The first whose signs are all found is taken.
LAYOUTS = (
    Layout("adapters (LoRA), which hold only differences to another model", (r"\.lora_[AB]\b|lora_(?:down|up)\.",), ()),
    Layout("a checkpoint of this package", (r"^(?:\w+\.)*encoder\.model\.",), ()),
    Layout(
        "Swin of Hugging Face", (r"embeddings\.patch_embeddings\.", r"layers\.0\.blocks\.0\."), (
            (r"^swin\.", ""),
            (r"^embeddings\.mask_token$", "mask_token"),
            (r"^embeddings\.patch_embeddings\.projection\.", "encoder.model.patch_embed.proj."),
            (r"^embeddings\.norm\.", "encoder.model.patch_embed.norm."),
            (r"^embeddings\.position_embeddings$", "encoder.model.absolute_pos_embed"),
            (r"^encoder\.layers\.", "encoder.model.layers."),
            (r"^layernorm\.", "encoder.model.norm."),
            *SWIN, *HUGGING_FACE,
        ),
    ),
    Layout(
        "DINOv3 of Hugging Face", (r"embeddings\.patch_embeddings\.weight$", r"embeddings\.register_tokens"), (
            (r"^(?:dinov3_vit|model)\.", ""),
            (r"^embeddings\.mask_token$", "mask_token"),
            (r"^embeddings\.patch_embeddings\.", "encoder.model.patch_embed.proj."),
            (r"^embeddings\.cls_token$", "encoder.model.cls_token"),
            (r"^embeddings\.register_tokens$", "encoder.model.reg_token"),
            (r"^(?:model\.)?layer\.", "encoder.model.blocks."),
            (r"^norm\.", "encoder.model.norm."),
            *HUGGING_FACE, *DINOV3,
        ),
    ),
    Layout(
        "ViT, ViTMAE or DINOv2 of Hugging Face", (r"embeddings\.patch_embeddings\.", r"embeddings\.cls_token"), (
            (r"^(?:vit|deit|dinov2|dinov2_with_registers)\.", ""),
            (r"^decoder\.decoder_(?:encoder\.layer|layers)\.", "decoder_blocks."),
            (r"^decoder\.(decoder_|mask_token$)", r"\1"),
            (r"^embeddings\.mask_token$", "mask_token"),
            (r"^embeddings\.patch_embeddings\.projection\.", "encoder.model.patch_embed.proj."),
            (r"^embeddings\.cls_token$", "encoder.model.cls_token"),
            (r"^embeddings\.position_embeddings$", "encoder.model.pos_embed"),
            (r"^embeddings\.register_tokens$", "encoder.model.reg_token"),
            (r"^(?:encoder\.)?layers?\.", "encoder.model.blocks."),
            (r"^layernorm\.", "encoder.model.norm."),
            *HUGGING_FACE,
        ),
    ),
    Layout(
        "a checkpoint of DINO, iBOT, DINOv2 or DINOv3", (r"(?:^|\.)backbone\.patch_embed\.",), (
            (r"^backbone\.", "teacher.backbone."),
            (r"^(?:dino_)?head\.", "teacher.head."),
            (r"^(student|teacher|model_ema)\.backbone\.", r"\1.encoder.model."),
            (r"^(student|teacher|model_ema)\.dino_head\.", r"\1.head."),
            (r"^model_ema\.", "teacher."),
            (r"^(?:dino_loss|ibot_loss)\.center$", "center"),
            (r"\.encoder\.model\.(mask_token|masked_embed)$", r".\1"),
            *BLOCKS,
        ),
    ),
    Layout(
        "a checkpoint of SimMIM", (r"^encoder\.patch_embed\.proj\.", r"^decoder\.0\."), (
            (r"^encoder\.mask_token$", "mask_token"),
            (r"^encoder\.", "encoder.model."),
            *SWIN, *BLOCKS,
        ),
    ),
    Layout(
        "a checkpoint of MAE", (r"^patch_embed\.proj\.", r"^decoder_embed\.", r"^decoder_blocks\.0\."), (
            (r"^(?!decoder_|mask_token$)", "encoder.model."),
        ),
    ),
    Layout(
        "Swin as Microsoft wrote it", (r"^patch_embed\.proj\.", r"^layers\.0\.downsample\.reduction\."), (
            (r"^(?!head\.)", "encoder.model."), *SWIN,
        ),
    ),
    Layout(
        "an encoder of timm, MAE, DINO or DINOv2", (r"^patch_embed\.proj\.weight$",), (
            (r"^(?!head\.|fc\.|mask_token$|masked_embed$)", "encoder.model."),
            (r"^encoder\.model\.fc_norm\.", "encoder.model.norm."),  # a norm of the mean, in place of the patches' norm
            *BLOCKS,
        ),
    ),
    Layout(
        "an encoder of timm", (r"^(?:stem|stages|conv1|conv_stem|features)\b",), (
            (r"^(?!head\.|fc\.)", "encoder.model."),
        ),
    ),
)  # fmt: skip
# A layout that has these names as well gets these rules as well.
MORE: tuple[tuple[str, Rules], ...] = ((r"\b(?:storage_tokens|rope_embed\.periods)$", DINOV3),)
