from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sam2.sam2_video_predictor import SAM2VideoPredictor
from torch import Tensor, nn
from torch.nn import functional

from ofl_sam2.backbone.build import build_sam2
from ofl_sam2.backbone.configs import BACKBONES
from ofl_sam2.backbone.frozen import ABSENT_LOGIT, Decoded, ImageFeatures, Memory, SAM2Backbone
from ofl_sam2.errors import InputError

NANO = BACKBONES["nano"]
SIZE, SIDE = 64, 4
FRAMES = 6


def random_backbone(best_of_three: bool = False) -> SAM2Backbone:
    """Random weights, none of them at an initial value that would hide a term."""
    torch.manual_seed(0)
    backbone = SAM2Backbone(replace(NANO, track_best_of_three=best_of_three), SIZE).freeze()
    for parameter in backbone.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return backbone


@pytest.fixture(scope="module")
def backbone() -> SAM2Backbone:
    return random_backbone()


@pytest.fixture(scope="module")
def features(backbone: SAM2Backbone) -> ImageFeatures:
    """Features of three images."""
    torch.manual_seed(1)
    return backbone.encode_images(torch.rand(3, 3, SIZE, SIZE))


@pytest.fixture(scope="module")
def memories(backbone: SAM2Backbone, features: ImageFeatures) -> list[Memory]:
    """Twenty memories of three objects."""
    torch.manual_seed(2)
    masks = (torch.rand(20, 3, SIZE // 8, SIZE // 8) > 0.5).float()
    return [backbone.remember_mask(features, functional.interpolate(m[None], scale_factor=8)[0]) for m in masks]


class TestAgainstVideoPredictor:
    """The same weights driven by sam2's own video predictor, from a mask on the first frame."""

    @pytest.fixture
    def frames(self, tmp_path: Path) -> Tensor:
        """A moving pattern: JPEG files in `tmp_path` and what a reader sees, `(FRAMES, 3, SIZE, SIZE)`."""
        random = np.random.default_rng(0)
        pattern = np.kron(random.uniform(0, 255, (8, 8, 3)), np.ones((8, 8, 1)))
        images = []
        for index in range(FRAMES):
            values = np.roll(pattern, 3 * index, 0) + random.normal(0, 20, pattern.shape)
            path = tmp_path / f"{index:05d}.jpg"
            Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(path)
            images.append(np.asarray(Image.open(path), np.float32) / 255)
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    @staticmethod
    def reference(backbone: SAM2Backbone, folder: Path, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Low-resolution mask logits and object scores of all frames but the first."""
        predictor = build_sam2(backbone.config, SIZE, SAM2VideoPredictor)
        predictor.load_state_dict(backbone.sam2.state_dict())
        state = predictor.init_state(str(folder))
        predictor.add_new_mask(state, frame_idx=0, obj_id=1, mask=mask)
        for _ in predictor.propagate_in_video(state):
            pass
        outputs = state["output_dict_per_obj"][0]["non_cond_frame_outputs"]
        ordered = [outputs[index] for index in range(1, FRAMES)]
        masks = torch.cat([output["pred_masks"][:, 0] for output in ordered])
        return masks, torch.cat([output["object_score_logits"][:, 0] for output in ordered])

    @staticmethod
    def ours(backbone: SAM2Backbone, frames: Tensor, mask: Tensor, offsets: Sequence[int]) -> Decoded:
        """The same frames through our functions; the predictor stores memories in bfloat16 and masks at stride 4."""

        def stored(memory: Memory) -> Memory:
            return Memory(memory.features.bfloat16().float(), memory.pointer)

        features = [backbone.encode_images(frame[None]) for frame in frames]
        low = functional.interpolate(20 * mask[None, None] - 10, scale_factor=1 / 4, mode="bilinear", antialias=True)
        logits = functional.interpolate(low, size=(SIZE, SIZE), mode="bilinear")
        pointer = backbone.remember_mask(features[0], mask[None]).pointer
        support = stored(Memory(backbone.encode_memory(features[0], logits, torch.tensor([10.0])), pointer))
        recent: list[Memory] = []
        decoded = []
        for feature, offset in zip(features[1:], offsets, strict=True):
            attended = backbone.attend(feature, [support], recent, offsets=[offset], num_frames=FRAMES)
            decoded.append(backbone.decode(attended, feature))
            recent.insert(0, stored(backbone.remember_prediction(feature, decoded[-1])))
        return Decoded.cat(decoded)

    @pytest.mark.parametrize("best_of_three", [False, True])
    @pytest.mark.parametrize("mixed", [False, True], ids=["present", "present-and-absent"])
    def test_masks_and_scores_are_the_same(
        self, best_of_three: bool, mixed: bool, frames: Tensor, tmp_path: Path
    ) -> None:
        backbone = random_backbone(best_of_three)
        mask = torch.zeros(SIZE, SIZE)
        mask[10:40, 20:50] = 1
        scores = backbone.sam2.sam_mask_decoder.pred_obj_score_head.layers[-1]
        scores.weight.mul_(30)
        scores.bias.fill_(100)
        if mixed:
            scores.bias.sub_(self.ours(backbone, frames, mask, range(1, FRAMES)).presence.median() + 0.01)
        expected, presence = self.reference(backbone, tmp_path, mask)
        assert {bool(score > 0) for score in presence} == ({True, False} if mixed else {True})

        decoded = self.ours(backbone, frames, mask, range(1, FRAMES))
        scale = decoded.logits.abs().mean()
        assert (decoded.masks() - expected).abs().max() < 3e-5 * scale
        assert torch.allclose(decoded.presence, presence, rtol=1e-5, atol=3e-5)

        elsewhere = self.ours(backbone, frames, mask, [1] * (FRAMES - 1))
        assert (elsewhere.logits - decoded.logits).abs().max() > 3e-4 * scale  # one pointer's temporal code is seen


class TestEncodeImages:
    def test_shapes_are_those_of_the_three_levels(self, features: ImageFeatures) -> None:
        assert features.stride4.shape == (3, 16, 16, 16)
        assert features.stride8.shape == (3, 32, 8, 8)
        assert features.stride16.shape == (3, NANO.width, SIDE, SIDE)
        assert len(features) == 3

    def test_images_are_normalised_by_the_backbone_statistics(self) -> None:
        image = torch.rand(1, 3, SIZE, SIZE)
        plain = random_backbone()
        shifted = SAM2Backbone(replace(NANO, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)), SIZE)
        shifted.sam2.load_state_dict(plain.sam2.state_dict())
        mean, std = (torch.tensor(values)[:, None, None] for values in (NANO.mean, NANO.std))
        with torch.no_grad():
            by_hand = shifted.encode_images((image - mean) / std).stride16
        assert torch.equal(plain.encode_images(image).stride16, by_hand)


class TestBatches:
    def test_expanding_shares_memory(self, features: ImageFeatures) -> None:
        shared = features[1:2].expand(5)
        assert len(shared) == 5
        assert shared.stride4.data_ptr() == features.stride4[1].data_ptr()
        assert shared.stride4.stride(0) == shared.stride8.stride(0) == shared.stride16.stride(0) == 0

    def test_indexing_and_joining_are_inverse(self, features: ImageFeatures) -> None:
        joined = ImageFeatures.cat([features[[2]], features[:2]])
        assert torch.equal(joined.stride8, features.stride8[[2, 0, 1]])
        assert isinstance(joined, ImageFeatures)

    def test_detaching_cuts_the_graph(self, backbone: SAM2Backbone, features: ImageFeatures) -> None:
        decoded = backbone.decode(features.stride16.clone().requires_grad_(), features)
        assert decoded.logits.requires_grad
        assert not decoded.detach().logits.requires_grad

    def test_moving_keeps_type_and_values(self, features: ImageFeatures) -> None:
        moved = features.to("cpu")
        assert torch.equal(moved.stride16, features.stride16)
        assert isinstance(moved, ImageFeatures)


class TestModes:
    def test_training_mode_never_reaches_a_submodule(self, backbone: SAM2Backbone) -> None:
        assert backbone.train() is backbone
        assert not any(module.training for module in backbone.modules())
        nn.Sequential(backbone).train()
        assert not any(module.training for module in backbone.modules())

    def test_frozen_weights_let_gradients_through_to_the_embedding(
        self, backbone: SAM2Backbone, features: ImageFeatures
    ) -> None:
        assert not any(parameter.requires_grad for parameter in backbone.parameters())
        embedding = features.stride16.clone().requires_grad_()
        decoded = backbone.decode(embedding, features)
        (decoded.logits.square().mean() + decoded.presence.sum() + decoded.iou.sum()).backward()
        assert embedding.grad.isfinite().all()
        assert (embedding.grad != 0).all()


class TestResize:
    @pytest.mark.parametrize("size", [64, 96, 288])
    def test_all_four_functions_run_at_other_sizes(self, size: int) -> None:
        backbone = random_backbone()
        backbone.resize(size)
        features = backbone.encode_images(torch.rand(1, 3, size, size))
        memory = backbone.remember_mask(features, torch.ones(1, size, size))
        decoded = backbone.decode(backbone.attend(features, [memory]), features)
        again = backbone.remember_prediction(features, decoded)
        assert backbone.image_size == size
        assert decoded.logits.shape == (1, size // 4, size // 4)
        assert again.features.shape == (1, NANO.memory_width, size // 16, size // 16)
        assert decoded.logits.isfinite().all()

    def test_there_and_back_gives_identical_results(self) -> None:
        backbone = random_backbone()
        image, large = torch.rand(1, 3, SIZE, SIZE), torch.rand(1, 3, 128, 128)

        def segment(images: Tensor) -> Decoded:
            features = backbone.encode_images(images)
            memory = backbone.remember_mask(features, images[:, 0].round())
            return backbone.decode(backbone.attend(features, [memory]), features)

        before = segment(image)
        backbone.resize(128)
        assert segment(large).logits.shape == (1, 32, 32)
        backbone.resize(SIZE)
        after = segment(image)
        assert all(torch.equal(value, vars(after)[name]) for name, value in vars(before).items())

    def test_built_and_resized_are_the_same(self) -> None:
        resized, built = random_backbone(), SAM2Backbone(NANO, 96)
        resized.resize(96)
        built.sam2.load_state_dict(resized.sam2.state_dict())
        images = torch.rand(1, 3, 96, 96)
        with torch.no_grad():
            outputs = [model.decode(f.stride16, f) for model in (resized, built) for f in [model.encode_images(images)]]
        assert torch.equal(outputs[0].logits, outputs[1].logits)
        for name in ("image_size", "sam_image_embedding_size"):
            assert getattr(resized.sam2, name) == getattr(built.sam2, name)
        for name in ("image_embedding_size", "input_image_size", "mask_input_size"):
            prompts = [model.sam2.sam_prompt_encoder for model in (resized, built)]
            assert getattr(prompts[0], name) == getattr(prompts[1], name)

    def test_an_impossible_size_is_refused_and_nothing_changes(self, backbone: SAM2Backbone) -> None:
        with pytest.raises(InputError, match=r"272.*(256|288)"):
            backbone.resize(272)
        assert backbone.image_size == SIZE


class TestRemember:
    def test_an_absent_object_is_marked_in_features_and_pointer(
        self, backbone: SAM2Backbone, features: ImageFeatures
    ) -> None:
        masks = torch.zeros(3, SIZE, SIZE)
        memory = backbone.remember_mask(features, masks)
        logits, present = torch.full((3, 1, SIZE, SIZE), -10.0), torch.ones(3)
        unmarked = backbone.encode_memory(features, logits, present)
        mark = backbone.sam2.no_obj_embed_spatial[..., None, None].expand_as(unmarked)
        assert torch.allclose(memory.features - unmarked, mark, atol=1e-6)
        assert torch.equal(memory.pointer, backbone.sam2.no_obj_ptr.expand(3, -1))

    def test_one_pixel_is_present(self, backbone: SAM2Backbone, features: ImageFeatures) -> None:
        masks = torch.zeros(3, SIZE, SIZE)
        masks[1, 30, 30] = 1
        memory = backbone.remember_mask(features, masks)
        presence = torch.tensor([-1.0, 1.0, -1.0])
        encoded = backbone.encode_memory(features, 20 * masks[:, None] - 10, presence)
        assert torch.equal(memory.features, encoded)

    def test_a_prediction_judged_absent_is_remembered_as_absent(
        self, backbone: SAM2Backbone, features: ImageFeatures
    ) -> None:
        decoded = backbone.decode(features.stride16, features)
        absent = replace(decoded, presence=torch.tensor([-2.0, 3.0, -0.1]))
        memory = backbone.remember_prediction(features, absent)
        empty = torch.full((3, 1, SIZE, SIZE), ABSENT_LOGIT)
        expected = backbone.encode_memory(features, empty, -torch.ones(3))
        assert torch.equal(memory.features[[0, 2]], expected[[0, 2]])
        assert not torch.allclose(memory.features[1], expected[1], atol=1e-3)


class TestAttend:
    def test_a_query_never_skips_memory_attention(
        self, backbone: SAM2Backbone, features: ImageFeatures, memories: list[Memory]
    ) -> None:
        attended = backbone.attend(features, memories[:1])
        no_memory = features.stride16 + backbone.sam2.no_mem_embed.view(1, -1, 1, 1)
        assert (attended - no_memory).abs().max() > 0.1
        assert (attended - backbone.attend(features, memories[1:2])).abs().max() > 1e-3

    def test_one_support_and_nothing_recent_is_finite(
        self, backbone: SAM2Backbone, features: ImageFeatures, memories: list[Memory]
    ) -> None:
        assert backbone.attend(features, memories[:1]).isfinite().all()

    @pytest.mark.parametrize(("offset", "frames"), [(1, 1), (5, 5), (20, 6)])
    def test_a_sequence_too_short_for_its_memories_is_refused(
        self, offset: int, frames: int, backbone: SAM2Backbone, features: ImageFeatures, memories: list[Memory]
    ) -> None:
        with pytest.raises(InputError, match=f"Count at least {offset + 1}"):
            backbone.attend(features, memories[:1], offsets=[offset], num_frames=frames)

    def test_every_one_of_many_supports_counts_with_its_pointer(
        self, backbone: SAM2Backbone, features: ImageFeatures, memories: list[Memory]
    ) -> None:
        attended = backbone.attend(features, memories)
        assert attended.isfinite().all()
        for index in (0, 16, 19):
            changed = list(memories)
            changed[index] = replace(memories[index], pointer=-10 * memories[index].pointer)
            assert not torch.equal(backbone.attend(features, changed), attended)

    def test_a_long_sequence_changes_nothing(
        self, backbone: SAM2Backbone, features: ImageFeatures, memories: list[Memory]
    ) -> None:
        default = backbone.attend(features, memories[:2], memories[2:5])
        assert torch.equal(default, backbone.attend(features, memories[:2], memories[2:5], num_frames=400))
        assert not torch.equal(default, backbone.attend(features, memories[:2], memories[2:5], num_frames=6))

    def test_offsets_count_from_one_unless_given(
        self, backbone: SAM2Backbone, features: ImageFeatures, memories: list[Memory]
    ) -> None:
        default = backbone.attend(features, memories[:3])
        assert torch.equal(default, backbone.attend(features, memories[:3], offsets=[1, 2, 3]))
        assert not torch.equal(default, backbone.attend(features, memories[:3], offsets=[3, 1, 2]))
        with pytest.raises(ValueError, match="zip"):
            backbone.attend(features, memories[:3], offsets=[1])

    def test_the_pointers_of_recent_slices_count(
        self, backbone: SAM2Backbone, features: ImageFeatures, memories: list[Memory]
    ) -> None:
        recent = [*memories[1:4]]
        attended = backbone.attend(features, memories[:1], recent)
        recent[2] = replace(recent[2], pointer=-recent[2].pointer)
        assert not torch.equal(backbone.attend(features, memories[:1], recent), attended)

    def test_six_recent_slices_are_used_and_their_order_counts(
        self, backbone: SAM2Backbone, features: ImageFeatures, memories: list[Memory]
    ) -> None:
        support, recent = memories[:1], memories[1:9]
        attended = backbone.attend(features, support, recent)
        assert torch.equal(attended, backbone.attend(features, support, recent[:6]))
        assert not torch.equal(attended, backbone.attend(features, support, recent[:5]))
        assert not torch.equal(attended, backbone.attend(features, support, recent[5::-1]))


class TestDecode:
    def test_objects_in_a_batch_do_not_see_each_other(
        self, backbone: SAM2Backbone, features: ImageFeatures, memories: list[Memory]
    ) -> None:
        batched = backbone.decode(backbone.attend(features, memories[:3], memories[3:5]), features)
        remembered = backbone.remember_prediction(features, batched)
        for row in range(3):
            one = slice(row, row + 1)
            own = [memory[one] for memory in memories[:5]]
            alone = backbone.decode(backbone.attend(features[one], own[:3], own[3:]), features[one])
            assert all(
                torch.allclose(vars(alone)[name], value[one], atol=1e-5) for name, value in vars(batched).items()
            )
            memory = backbone.remember_prediction(features[one], alone)
            assert torch.allclose(memory.features, remembered.features[one], atol=1e-4)

    def test_masks_of_absent_objects_are_overwritten_and_others_kept(self) -> None:
        logits = torch.randn(3, 8, 8)
        decoded = Decoded(logits, torch.ones(3), torch.tensor([0.5, 0.0, -3.0]), torch.zeros(3, 4))
        assert torch.equal(decoded.masks()[0], logits[0])
        assert (decoded.masks()[1:] == ABSENT_LOGIT).all()

    def test_gradients_survive_where_an_object_is_judged_absent(
        self, backbone: SAM2Backbone, features: ImageFeatures
    ) -> None:
        embedding = features.stride16.clone().requires_grad_()
        decoded = backbone.decode(embedding, features)
        hidden = replace(decoded, presence=-torch.ones(3))
        (logits_gradient,) = torch.autograd.grad(hidden.logits.square().mean(), embedding, retain_graph=True)
        (masks_gradient,) = torch.autograd.grad(hidden.masks().square().mean(), embedding)
        assert logits_gradient.abs().max() > 0
        assert masks_gradient.abs().max() == 0

    def test_a_dense_prompt_changes_the_mask(self, backbone: SAM2Backbone, features: ImageFeatures) -> None:
        plain = backbone.decode(features.stride16, features)
        prompted = backbone.decode(features.stride16, features, torch.full((3, 16, 16), 10.0))
        assert prompted.logits.shape == plain.logits.shape
        assert not torch.allclose(prompted.logits, plain.logits, atol=1e-4)

    def test_the_quality_is_that_of_the_chosen_mask(self, features: ImageFeatures) -> None:
        backbone = random_backbone(best_of_three=True)
        chosen = backbone.decode(features.stride16, features)
        count = len(features)
        no_points = torch.zeros(count, 1, 2), -torch.ones(count, 1, dtype=torch.int32)
        sparse, dense = backbone.sam2.sam_prompt_encoder(points=no_points, boxes=None, masks=None)
        logits, ious, _, _ = backbone.sam2.sam_mask_decoder(
            image_embeddings=features.stride16,
            image_pe=backbone.sam2.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
            repeat_image=False,
            high_res_features=[features.stride4, features.stride8],
        )
        for row in range(count):
            best = int(ious[row].argmax())
            assert chosen.iou[row] == ious[row].max()
            assert torch.equal(chosen.logits[row], logits[row, best])


def test_features_do_not_depend_on_autocast(nano):
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = nano.encode_images(images)
        with torch.autocast("cpu", torch.bfloat16):
            cast = nano.encode_images(images)
    for one, other in zip(vars(plain).values(), vars(cast).values(), strict=True):
        assert one.dtype == other.dtype == torch.float32 and torch.equal(one, other)
