"""The frozen SAM2: image features, memory encoding, memory attention and mask decoding. SAM2 does not leak past here.

Shapes: N images, B objects (one class of one image each), C channels of the stride-16 feature, h = w = image size / 16.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ofl_sam2.backbone.build import STRIDE, build_sam2, check_image_size
from ofl_sam2.backbone.configs import BackboneConfig
from ofl_sam2.errors import InputError

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base

MASK_LOGIT = 10.0  # SAM2 writes a given mask as logits -10 / +10
ABSENT_LOGIT = -1024.0  # SAM2's placeholder for the mask of an object judged absent
MAX_RECENT = 6
POINTER_RANGE = 16


_B = TypeVar("_B", bound="_Batch")


@dataclass(frozen=True)
class _Batch:
    """Field-wise indexing and expansion for dataclasses of tensors that share their first axis."""

    def _map(self: _B, function: Callable[[Tensor], Tensor]) -> _B:
        return type(self)(**{field.name: function(getattr(self, field.name)) for field in fields(self)})

    def __getitem__(self: _B, index: slice | list[int] | Tensor) -> _B:
        return self._map(lambda tensor: tensor[index])

    def detach(self: _B) -> _B:
        """Return the same values without their graph."""
        return self._map(Tensor.detach)

    def to(self: _B, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> _B:
        """Return the same values on another device, of another dtype, or both."""
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype))

    @classmethod
    def cat(cls: type[_B], parts: Sequence[_B]) -> _B:
        """Join batches along their first axis."""
        return cls(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)})


@dataclass(frozen=True)
class ImageFeatures(_Batch):
    """Features of N images: `stride4 (N, C/8, 4h, 4w)`, `stride8 (N, C/4, 2h, 2w)`, `stride16 (N, C, h, w)`."""

    stride4: Tensor
    stride8: Tensor
    stride16: Tensor

    def __len__(self) -> int:
        return self.stride16.shape[0]

    def expand(self, count: int) -> "ImageFeatures":
        """Share the features of one image between `count` objects (no copy)."""
        return self._map(lambda tensor: tensor.expand(count, -1, -1, -1))


@dataclass(frozen=True)
class Memory(_Batch):
    """What SAM2 remembers of one slice: `features (B, C_mem, h, w)` and the object `pointer (B, C)`."""

    features: Tensor
    pointer: Tensor


@dataclass(frozen=True)
class Decoded(_Batch):
    """Mask decoder output, before SAM2 overwrites the masks of absent objects.

    `logits (B, 4h, 4w)`, predicted `iou (B,)` in [0, 1] of that very mask, `presence (B,)` object score logits,
    `pointer (B, C)`.
    """

    logits: Tensor
    iou: Tensor
    presence: Tensor
    pointer: Tensor

    def masks(self) -> Tensor:
        """Mask logits with absent objects (presence <= 0) overwritten, as SAM2 does: `(B, 4h, 4w)`."""
        return torch.where(self.presence[:, None, None] > 0, self.logits, ABSENT_LOGIT)


class SAM2Backbone(nn.Module):
    """A SAM2 model as four functions; always in eval mode, so that no dropout or training branch ever runs.

    Args:
        config: which model.
        image_size: side of the square input, a multiple of 32; default `config.cpu_size`.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(self, config: BackboneConfig, image_size: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.sam2 = build_sam2(config, image_size)
        self.register_buffer("_mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)
        self.eval()

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.sam2.image_size

    @property
    def width(self) -> int:
        """Channels C of the stride-16 feature."""
        return self.config.width

    def train(self, mode: bool = True) -> "SAM2Backbone":
        """Stay in eval mode: an engine's `network.train()` must not switch SAM2's dropout and training branches on."""
        return super().train(False)

    def resize(self, image_size: int) -> None:
        """Change the side of the square input; no weight depends on it."""
        size = check_image_size(image_size)
        self.sam2.image_size, side = size, size // STRIDE
        self.sam2.sam_image_embedding_size = side
        prompts = self.sam2.sam_prompt_encoder
        prompts.image_embedding_size, prompts.input_image_size = (side, side), (size, size)
        prompts.mask_input_size = (4 * side, 4 * side)

    def freeze(self) -> "SAM2Backbone":
        """Stop all gradients to the weights."""
        self.requires_grad_(False)
        return self

    def encode_images(self, images: Tensor) -> ImageFeatures:
        """Encode images `(N, 3, size, size)` in [0, 1], in float32 whatever autocast says: features are kept."""
        with torch.autocast(images.device.type, enabled=False):
            output = self.sam2.forward_image((images.float() - self._mean) / self._std)
        return ImageFeatures(*output["backbone_fpn"])

    def remember_mask(self, features: ImageFeatures, masks: Tensor) -> Memory:
        """Memory of slices whose mask is known: a conditioning memory.

        Args:
            features: of B slices.
            masks: `(B, size, size)` in [0, 1]; an all-zero mask means that the object is absent.
        """
        masks = masks[:, None]
        presence = torch.where(masks.flatten(1).amax(1) > 0, MASK_LOGIT, -MASK_LOGIT)
        prompt = self.sam2.mask_downsample(masks)
        pointer = self._decode(features.stride16, features, prompt, best_of_three=False).pointer
        pointer = torch.where(presence[:, None] > 0, pointer, self.sam2.no_obj_ptr)
        return Memory(self.encode_memory(features, masks * 2 * MASK_LOGIT - MASK_LOGIT, presence), pointer)

    def remember_prediction(self, features: ImageFeatures, decoded: Decoded) -> Memory:
        """Memory of slices as they were segmented."""
        masks = functional.interpolate(decoded.masks()[:, None], size=(self.image_size,) * 2, mode="bilinear")
        return Memory(self.encode_memory(features, masks, decoded.presence), decoded.pointer)

    def encode_memory(self, features: ImageFeatures, mask_logits: Tensor, presence: Tensor) -> Tensor:
        """Spatial memory `(B, C_mem, h, w)` of mask logits `(B, 1, size, size)` and object scores `(B,)`."""
        memory, _ = self.sam2._encode_new_memory(
            current_vision_feats=[_tokens(features.stride16)],
            feat_sizes=[features.stride16.shape[-2:]],
            pred_masks_high_res=mask_logits,
            object_score_logits=presence[:, None],
            is_mask_from_pts=False,
        )
        return memory

    def attend(
        self,
        features: ImageFeatures,
        supports: Sequence[Memory],
        recent: Sequence[Memory] = (),
        offsets: Sequence[int] | None = None,
        num_frames: int | None = None,
    ) -> Tensor:
        """Memory attention: the stride-16 feature conditioned on memories, `(B, C, h, w)`.

        A query is never an initial conditioning frame. Supports stand at small fixed distances before it and
        frames are counted so that the temporal code of the pointers stays in its trained range.

        Args:
            features: of B query slices.
            supports: conditioning memories, at least one.
            recent: memories of the last slices, the latest first; at most six are used.
            offsets: how many frames before the query each support lies; default 1, 2, 3, ...
            num_frames: length of the sequence; default long enough for the full pointer range.

        Raises:
            InputError: a sequence too short to hold the query and its memories.
        """
        recent = recent[:MAX_RECENT]
        offsets = range(1, len(supports) + 1) if offsets is None else offsets
        now = max([*offsets, len(recent)])
        num_frames = max(now, POINTER_RANGE) + 1 if num_frames is None else num_frames
        if num_frames <= now:  # SAM2 would drop pointers, and divide by zero for one frame
            raise InputError(f"{num_frames} frames cannot hold a memory {now} frames back. Count at least {now + 1}.")
        entries = [_frame(self.sam2, memory) for memory in supports]
        output = {
            "cond_frame_outputs": {now - offset: entry for offset, entry in zip(offsets, entries, strict=True)},
            "non_cond_frame_outputs": {now - 1 - i: _frame(self.sam2, memory) for i, memory in enumerate(recent)},
        }
        positions = self.sam2.image_encoder.neck.position_encoding(features.stride16)
        return self.sam2._prepare_memory_conditioned_features(
            frame_idx=now,
            is_init_cond_frame=False,
            current_vision_feats=[_tokens(features.stride16)],
            current_vision_pos_embeds=[_tokens(positions)],
            feat_sizes=[features.stride16.shape[-2:]],
            output_dict=output,
            num_frames=num_frames,
        )

    def decode(self, embedding: Tensor, features: ImageFeatures, prompt: Tensor | None = None) -> Decoded:
        """Mask decoder on `embedding (B, C, h, w)` with the high-resolution features and no point prompts.

        Args:
            embedding: what stands in for the image feature, usually memory attention or its fusion.
            features: of the same B slices.
            prompt: optional dense mask prompt, logits `(B, 4h, 4w)`.
        """
        dense = None if prompt is None else prompt[:, None]
        return self._decode(embedding, features, dense, self.config.track_best_of_three)

    def _decode(
        self, embedding: Tensor, features: ImageFeatures, prompt: Tensor | None, best_of_three: bool
    ) -> Decoded:
        sam2, count = self.sam2, embedding.shape[0]
        no_points = (embedding.new_zeros(count, 1, 2), -embedding.new_ones(count, 1, dtype=torch.int32))
        sparse, dense = sam2.sam_prompt_encoder(points=no_points, boxes=None, masks=prompt)
        logits, ious, tokens, presence = sam2.sam_mask_decoder(
            image_embeddings=embedding,
            image_pe=sam2.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=best_of_three,
            repeat_image=False,
            high_res_features=[features.stride4, features.stride8],
        )
        best, rows = ious.argmax(dim=-1), torch.arange(count, device=ious.device)
        token = tokens[rows, best] if tokens.shape[1] > 1 else tokens[:, 0]
        pointer = torch.where(presence > 0, sam2.obj_ptr_proj(token), sam2.no_obj_ptr)
        return Decoded(logits[rows, best].float(), ious[rows, best], presence[:, 0], pointer)


def _tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).permute(2, 0, 1)


def _frame(sam2: "SAM2Base", memory: Memory) -> dict[str, object]:
    positions = sam2.memory_encoder.position_encoding(memory.features)
    return {"maskmem_features": memory.features, "maskmem_pos_enc": [positions], "obj_ptr": memory.pointer}
