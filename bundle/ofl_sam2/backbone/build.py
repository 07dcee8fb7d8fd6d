"""Build a SAM2 model from the `sam2` package's own classes: plain arguments, no Hydra, no torchvision."""

from typing import TYPE_CHECKING, Any

from ofl_sam2.backbone.configs import BackboneConfig
from ofl_sam2.errors import InputError

if TYPE_CHECKING:
    from sam2.modeling.backbones.image_encoder import ImageEncoder
    from sam2.modeling.memory_attention import MemoryAttention
    from sam2.modeling.memory_encoder import MemoryEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine
    from sam2.modeling.sam.transformer import RoPEAttention
    from sam2.modeling.sam2_base import SAM2Base

STRIDE = 16

_SAM21_FLAGS = {
    "num_maskmem": 7,
    "sigmoid_scale_for_mem_enc": 20.0,
    "sigmoid_bias_for_mem_enc": -10.0,
    "use_mask_input_as_output_without_sam": True,
    "directly_add_no_mem_embed": True,
    "no_obj_embed_spatial": True,
    "use_high_res_features_in_sam": True,
    "multimask_output_in_sam": True,
    "iou_prediction_use_sigmoid": True,
    "use_obj_ptrs_in_encoder": True,
    "add_tpos_enc_to_obj_ptrs": True,
    "proj_tpos_enc_in_obj_ptrs": True,
    "use_signed_tpos_enc_to_obj_ptrs": True,
    "only_obj_ptrs_in_the_past_for_eval": True,
    "pred_obj_scores": True,
    "pred_obj_scores_mlp": True,
    "fixed_no_obj_ptr": True,
    "use_multimask_token_for_obj_ptr": True,
    "multimask_min_pt_num": 0,
    "multimask_max_pt_num": 1,
    "use_mlp_for_obj_ptr_proj": True,
}


def check_image_size(size: int) -> int:
    """Return `size` if SAM2 can run at it: a positive multiple of 32 (272 crashes, 288 works)."""
    if size <= 0 or size % 32:
        raise InputError(f"Image size {size} is not a positive multiple of 32. Try {max(32, round(size / 32) * 32)}.")
    return size


def build_sam2(
    config: BackboneConfig, image_size: int | None = None, model_class: type["SAM2Base"] | None = None
) -> "SAM2Base":
    """Build the SAM2 model of `config` with random weights.

    Args:
        config: which model.
        image_size: side of the square input in pixels, a multiple of 32; default `config.cpu_size`.
        model_class: `SAM2Base` or a subclass of it, such as sam2's video predictor.

    Returns:
        The model in eval mode.

    Raises:
        InputError: an image size SAM2 cannot run at.
    """
    from sam2.modeling.sam2_base import SAM2Base

    size = check_image_size(config.cpu_size if image_size is None else image_size)
    model = (model_class or SAM2Base)(
        image_encoder=_image_encoder(config),
        memory_attention=_memory_attention(config, size // STRIDE),
        memory_encoder=_memory_encoder(config),
        image_size=size,
        backbone_stride=STRIDE,
        multimask_output_for_tracking=config.track_best_of_three,
        **_SAM21_FLAGS,
    )
    return model.eval()


def _sine_positions(features: int) -> "PositionEmbeddingSine":
    from sam2.modeling.position_encoding import PositionEmbeddingSine

    return PositionEmbeddingSine(num_pos_feats=features, normalize=True, scale=None, temperature=10000)


def _image_encoder(config: BackboneConfig) -> "ImageEncoder":
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder

    trunk = Hiera(
        embed_dim=config.embed_dim,
        num_heads=config.num_heads,
        stages=config.stages,
        global_att_blocks=config.global_attention_blocks,
        window_pos_embed_bkg_spatial_size=config.position_grid,
        window_spec=config.windows,
    )
    neck = FpnNeck(
        position_encoding=_sine_positions(config.width),
        d_model=config.width,
        backbone_channel_list=[config.embed_dim * factor for factor in (8, 4, 2, 1)],
        fpn_top_down_levels=[2, 3],
        fpn_interp_model="nearest",
    )
    return ImageEncoder(trunk=trunk, neck=neck, scalp=1)


def _memory_attention(config: BackboneConfig, side: int) -> "MemoryAttention":
    from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
    from sam2.modeling.sam.transformer import RoPEAttention

    def rope(**extra: Any) -> "RoPEAttention":
        return RoPEAttention(
            rope_theta=10000.0,
            feat_sizes=(side, side),
            embedding_dim=config.width,
            num_heads=1,
            downsample_rate=1,
            dropout=0.1,
            **extra,
        )

    layer = MemoryAttentionLayer(
        activation="relu",
        dim_feedforward=config.attention_hidden,
        dropout=0.1,
        pos_enc_at_attn=False,
        self_attention=rope(),
        d_model=config.width,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        cross_attention=rope(rope_k_repeat=True, kv_in_dim=config.memory_width),
    )
    return MemoryAttention(d_model=config.width, pos_enc_at_input=True, layer=layer, num_layers=config.attention_layers)


def _memory_encoder(config: BackboneConfig) -> "MemoryEncoder":
    from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder

    block = CXBlock(dim=config.width, kernel_size=7, padding=3, layer_scale_init_value=config.fuser_scale)
    return MemoryEncoder(
        out_dim=config.memory_width,
        position_encoding=_sine_positions(config.memory_width),
        mask_downsampler=MaskDownSampler(embed_dim=config.width, kernel_size=3, stride=2, padding=1),
        fuser=Fuser(block, num_layers=2),
        in_dim=config.width,
    )
