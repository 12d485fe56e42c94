"""Masked pretraining: the sparse path computes what all cells under a mask would, and sees nothing that is removed."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from convnextv2_states import ours, randomised
from convnextv2_tiny import V1, MaskedDense
from PIL import Image

from hf_models import ConvNextV2FcmaeConfig, ConvNextV2FcmaeForPreTraining
from hf_models.convnextv2_fcmae.modeling_convnextv2_fcmae import ConvNextV2FcmaeGRN, ConvNextV2FcmaeLayer
from hf_models.convnextv2_fcmae.sizes import SIZES
from hf_models.convnextv2_fcmae.visible_cells_convnextv2_fcmae import VisibleCells, depthwise

SHAPES = {
    "V2": {},
    "V1": V1,
    "greyscale": {"num_channels": 1},
    "stem of 2": {"patch_size": 2},
    "stem of 1": {"patch_size": 1},
    "three stages": {"depths": [1, 2, 1], "hidden_sizes": [8, 16, 24]},
    "two stages, stem of 1": {"patch_size": 1, "depths": [1, 1], "hidden_sizes": [8, 12]},
    "one stage": {"depths": [2], "hidden_sizes": [8]},
    "two decoder blocks": {"decoder_num_hidden_layers": 2},
    "pixels as they are": {"norm_pix_loss": False},
    "large epsilon": {"norm_pix_loss_eps": 0.5},
}
WIDE = ("huge", "v1_xlarge")  # seconds and gigabytes, even with one block a stage
EMOJI = Path(__file__).parents[1] / "training/sample_data/emoji/test.parquet"


def masked_autoencoder(**fields):
    return ours("pretraining", **fields)


def pixels(model, down=2, across=3, batch=2):
    """Images of `down` times `across` mask patches."""
    side = model.config.mask_patch_size
    return torch.randn(batch, model.config.num_channels, down * side, across * side)


def emoji(side):
    """`(32, 3, side, side)` of the sample data, in pixel values of about unit variance."""
    rows = pq.read_table(EMOJI, columns=["image"])["image"][:32].to_pylist()
    drawings = [Image.open(BytesIO(row["bytes"])).convert("RGB").resize((side, side)) for row in rows]
    return (torch.from_numpy(np.stack(drawings)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25


def assert_near(one, other, tolerance=1e-5, name=""):
    """As vectors: the tolerance is a share of the whole's length."""
    difference = (one.double() - other.double()).norm().item()
    assert difference <= tolerance * other.double().norm().item(), name


def step(model, *args, **kwargs):
    """Loss, logits and every parameter's gradient."""
    model.zero_grad()
    loss, logits = model(*args, **kwargs, **({} if isinstance(model, MaskedDense) else {"return_dict": False}))[:2]
    loss.backward()
    return {"loss": loss, "logits": logits} | {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_step(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert_near(tensor, other[name], tolerance, name)


def assert_sparse_equals_both_references(model, images, **masking):
    """In training mode, where gradients are written out, and in eval mode, where they are autograd's."""
    reference = MaskedDense(model).train()
    mask = model(images, **masking).mask
    expected = step(reference, images, mask)
    for training in (True, False):
        model.train(training)
        assert_same_step(step(model, images, mask=mask), expected)
        assert_same_step(step(model, images, mask=mask, masked_dense=True), expected)


class TestEqualsAllCellsUnderAMask:
    @pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
    def test_shapes(self, fields):
        model = masked_autoencoder(**fields)
        assert_sparse_equals_both_references(model, pixels(model))

    @pytest.mark.parametrize("ratio", [0.4, 0.6, 0.8])
    @pytest.mark.parametrize(("down", "across", "batch"), [(3, 3, 2), (1, 5, 1), (5, 2, 3)])
    def test_ratios_and_rectangles(self, ratio, down, across, batch):
        model = masked_autoencoder(depths=[1, 1, 1, 1])
        assert_sparse_equals_both_references(model, pixels(model, down, across, batch), mask_ratio=ratio)

    @pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in WIDE else n for n in SIZES])
    def test_every_size(self, name):
        fields = SIZES[name].config | {"depths": [1, 1, 1, 1]}
        # 0.1 of noise a parameter, as elsewhere, would make these widths' activations run away.
        model = ConvNextV2FcmaeForPreTraining(ConvNextV2FcmaeConfig(**fields, decoder_hidden_size=32))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        images = pixels(model, 2, 1, 1)
        mask = torch.tensor([[0.0, 1.0]])
        model.train()
        assert_same_step(step(model, images, mask=mask), step(MaskedDense(model), images, mask))

    def test_in_float64(self):
        """Where nothing hides behind rounding. The loss is float32: the gradients are those of the logits' squares."""
        model = masked_autoencoder().double().train()
        reference = MaskedDense(model)
        images, mask = pixels(model, 3, 3).double(), torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1, 1]]).repeat(2, 1)
        mask[1] = mask[1].flip(0)
        for computed in (model(images, mask=mask)[1], reference(images, mask.double())[1]):
            assert computed.dtype == torch.float64
            computed.square().mean().backward()
        for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert_near(parameter.grad, expected.grad, 1e-10, name)

    def test_unequal_masks(self):
        model = masked_autoencoder()
        images = pixels(model)
        mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 0, 0, 0, 1, 0]], dtype=torch.float32)
        expected = step(MaskedDense(model), images, mask)
        assert_same_step(step(model.train(), images, mask=mask, masked_dense=True), expected)
        with pytest.raises(ValueError, match=r"^mask removes different numbers .* masked_dense\.$"):
            model(images, mask=mask)

    def test_written_out_gradient_of_visible_cells(self):
        convolution = torch.nn.Conv2d(2, 2, 7, padding=3, groups=2, dtype=torch.float64)
        visible = VisibleCells(torch.tensor([[1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1]]).bool(), (3, 2), 3)
        cells = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda cells, *_: depthwise(cells, convolution, visible), (cells, *convolution.parameters())
        )

    def test_second_derivative(self):
        model = masked_autoencoder(hidden_sizes=[4, 4, 8, 8])
        images, noise = pixels(model).requires_grad_(), torch.rand(2, 6)
        second = []
        for masked_dense in (False, True):
            loss = model(images, noise=noise, masked_dense=masked_dense).loss
            (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
            second.append(torch.autograd.grad(gradient.square().sum(), images)[0])
        assert_near(*second, 1e-4)


class TestNothingLeaks:
    @pytest.mark.parametrize("fields", [{}, V1, {"patch_size": 1, "depths": [1, 1], "hidden_sizes": [8, 12]}])
    @pytest.mark.parametrize("training", [True, False])
    def test_removed_pixels(self, fields, training):
        model = masked_autoencoder(**fields).train(training)
        images, states = pixels(model, 3, 3), []
        model.convnextv2.encoder.register_forward_hook(lambda _, inputs, outputs: states.append(outputs))
        outputs = model(images)
        removed = outputs.mask[..., None] == 1
        for filling in (float("nan"), float("inf"), 0.0, 1e30):
            others = torch.where(removed, filling, model.patchify(images))
            again = model(model.unpatchify(others, images.shape[2:]), mask=outputs.mask)
            assert torch.equal(again.logits, outputs.logits)
            for one, other in zip(states[0], states[-1], strict=True):
                assert torch.equal(one, other)

    def test_visible_pixels_do_tell(self):
        """Or the test above would pass for a model that sees nothing."""
        model = masked_autoencoder()
        images = pixels(model).requires_grad_()
        outputs = model(images)
        # The prediction of one removed patch depends on every visible patch, through GRN alone if not otherwise.
        patch = outputs.mask[0].nonzero()[0]
        outputs.logits[0, patch].square().sum().backward()
        by_patch = model.patchify(images.grad)[0].abs().sum(dim=1)
        assert ((by_patch > 0) == (outputs.mask[0] == 0)).all()

    @pytest.mark.parametrize("training", [True, False])
    def test_images_of_a_batch_are_strangers(self, training):
        model = masked_autoencoder().train(training)
        images, noise = pixels(model, 3, 3, batch=4), torch.rand(4, 9)
        images[2] *= 1e4  # a norm over the batch would notice
        together = model(images, noise=noise).logits
        for index in range(4):
            alone = model(images[index : index + 1], noise=noise[index : index + 1]).logits
            assert_near(together[index], alone[0], 1e-6)

    def test_grn_counts_visible_cells_only(self):
        """By its formula, arXiv 2301.00808 section 4, over some of the cells."""
        grn = randomised(ConvNextV2FcmaeGRN(6))
        cells, mask = torch.randn(3, 4, 5, 6), (torch.rand(3, 4, 5, 1) < 0.5).float()
        masked = grn(cells, mask)
        for image, seen, output in zip(cells, mask[..., 0] == 1, masked, strict=True):
            visible = image[seen]  # (cells, channels)
            norm = visible.pow(2).sum(0).sqrt()
            expected = grn.weight.view(-1) * visible * norm / (norm.mean() + 1e-6) + grn.bias.view(-1) + visible
            torch.testing.assert_close(output[seen], expected)


class TestMask:
    @pytest.mark.parametrize(
        ("patches", "ratio", "kept"),
        [((7, 7), 0.6, 19), ((7, 7), 0.75, 12), ((4, 4), 0.6, 6), ((2, 5), 0.9, 1), ((10, 10), 0.7, 30)],
    )
    def test_numbers(self, patches, ratio, kept):
        """int(L (1 - ratio)) as on paper; in floating point, 10 (1 - 0.9) is a little less than 1."""
        model = masked_autoencoder(depths=[1], hidden_sizes=[4], patch_size=2)
        mask = model(pixels(model, *patches, batch=3), mask_ratio=ratio).mask
        assert mask.shape == (3, patches[0] * patches[1])
        assert ((mask == 0) | (mask == 1)).all()
        assert ((mask == 0).sum(dim=1) == kept).all()

    def test_is_random_by_image_and_call(self):
        model = masked_autoencoder(depths=[1], hidden_sizes=[4], patch_size=2)
        images = pixels(model, 8, 8)
        mask, another = model(images).mask, model(images).mask
        assert not torch.equal(mask[0], mask[1])
        assert not torch.equal(mask, another)
        often = sum(model(pixels(model, 2, 3, batch=500)).mask for _ in range(2)).mean(0) / 2
        assert (often - 4 / 6).abs().max() < 0.06  # four standard deviations of 1,000 draws

    def test_noise_and_mask_fix_it(self):
        model = masked_autoencoder()
        images, noise = pixels(model), torch.tensor([[0.1, 0.5, 0.3, 0.9, 0.8, 0.2], [0.9, 0.8, 0.7, 0.1, 0.2, 0.3]])
        outputs = model(images, noise=noise, mask_ratio=0.5)
        assert outputs.mask.tolist() == [[0, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0]]
        for mask in (outputs.mask, outputs.mask.bool(), outputs.mask.long()):
            again = model(images, mask=mask)
            assert torch.equal(again.logits, outputs.logits)
            assert torch.equal(again.loss, outputs.loss)

    @pytest.mark.parametrize(
        ("size", "arguments", "message"),
        [
            ((70, 96), {}, r"Images of 70 x 96 pixels .* 32 x 32: resize them, for example to 64 x 96\."),
            ((10, 81), {}, r"Images of 10 x 81 pixels .* to 32 x 96\."),
            ((0, 64), {}, r"Images of 0 x 64 pixels .* to 32 x 64\."),
            ((32, 32), {}, r"mask_ratio 0\.6 keeps 0 of the 1 patches of 32 x 32 pixels: .*\."),
            ((64, 96), {"mask_ratio": 0.0}, r"mask_ratio 0\.0 keeps 6 of the 6 patches .*\."),
            ((64, 96), {"mask_ratio": 0.95}, r"mask_ratio 0\.95 keeps 0 of the 6 patches .*\."),
            ((64, 96), {"mask_ratio": 1.5}, r"mask_ratio 1\.5 keeps .*\."),
            ((64, 96), {"mask_ratio": -1.0}, r"mask_ratio -1\.0 keeps .*\."),
            ((64, 96), {"noise": torch.rand(2, 5)}, r"noise has the shape \(2, 5\): .* \(2, 6\)\."),
            ((64, 96), {"noise": torch.rand(2, 2, 3)}, r"noise has the shape \(2, 2, 3\): .* \(2, 6\)\."),
            ((64, 96), {"mask": torch.ones(6)}, r"mask has the shape \(6,\): .* \(2, 6\)\."),
            ((64, 96), {"mask": torch.ones(2, 6)}, r"mask keeps nothing or removes nothing of an image: .*\."),
            ((64, 96), {"mask": torch.rand(2, 6)}, r"mask holds other values than 0 and 1: .*\."),
            ((64, 96), {"mask": torch.zeros(2, 6)}, r"mask keeps nothing or removes nothing of an image: .*\."),
        ],
    )
    def test_refusals(self, size, arguments, message):
        for masked_dense in (False, True):
            with pytest.raises(ValueError, match=f"^{message}$"):
                masked_autoencoder()(torch.randn(2, 3, *size), **arguments, masked_dense=masked_dense)


class TestPixels:
    def test_order_is_row_column_channel(self):
        model = masked_autoencoder(depths=[1, 1], hidden_sizes=[4, 4], patch_size=2)
        images = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
        patches = model.patchify(images)
        assert patches.shape == (2, 2 * 3, 4 * 4 * 3)
        for row, column, y, x, channel in ((0, 0, 0, 0, 0), (1, 2, 3, 1, 2), (0, 2, 2, 3, 1)):
            expected = images[1, channel, row * 4 + y, column * 4 + x]
            assert patches[1, row * 3 + column, (y * 4 + x) * 3 + channel] == expected
        assert torch.equal(model.unpatchify(patches, (8, 12)), images)
        assert torch.equal(model.unpatchify(patches.mT.contiguous().mT, (8, 12)), images)

    @pytest.mark.parametrize("fields", [{}, {"norm_pix_loss": False}, {"num_channels": 1}])
    def test_reconstruct(self, fields):
        model = masked_autoencoder(**fields)
        images, noise = pixels(model) * 3 + 1, torch.rand(2, 6)
        outputs = model(images, noise=noise)
        original, masked, reconstruction = model.reconstruct(images, noise=noise)
        assert torch.equal(original, images)
        assert masked.shape == reconstruction.shape == images.shape
        removed = outputs.mask == 1
        patches = model.patchify(images)
        assert torch.equal(model.patchify(masked)[~removed], patches[~removed])
        assert not model.patchify(masked)[removed].any()
        assert torch.equal(model.patchify(reconstruction)[~removed], patches[~removed])
        # The loss is the mean square of what is shown to be wrong, in each patch's own unit of contrast.
        wrong = (model.patchify(reconstruction) - patches)[removed].double()
        if model.config.norm_pix_loss:
            wrong = wrong / (patches[removed].double().var(dim=1, keepdim=True) + 1e-6).sqrt()
        assert wrong.square().mean().item() == pytest.approx(outputs.loss.item(), rel=1e-4)

    def test_channels_last(self):
        model = masked_autoencoder()
        images, noise = pixels(model), torch.rand(2, 6)
        expected = model(images, noise=noise)
        outputs = model(images.to(memory_format=torch.channels_last), noise=noise)
        assert_near(outputs.logits, expected.logits, 1e-6)
        assert_near(outputs.loss, expected.loss, 1e-6)
        model.to(memory_format=torch.channels_last).train()
        assert_near(model(images.to(memory_format=torch.channels_last), noise=noise).logits, expected.logits)


class TestLoss:
    @pytest.mark.parametrize("fields", [{}, {"depths": [2, 4, 2], "hidden_sizes": [48, 96, 192]}, V1])
    def test_is_one_at_the_start(self, fields):
        """Of targets with variance 1, predictions near 0 are off by 1."""
        config = ConvNextV2FcmaeConfig(**{"depths": [2, 2, 2, 2], "hidden_sizes": [40, 80, 160, 320]} | fields)
        model = ConvNextV2FcmaeForPreTraining(config).train()
        side = model.config.mask_patch_size
        for images in (pixels(model, 3, 3), emoji(3 * side)):
            outputs = model(images)
            # A flat patch has a target of 0: what is there to explain is var / (var + eps) of each patch.
            variance = model.patchify(images)[outputs.mask == 1].var(dim=1)
            assert 0.9 < outputs.loss / (variance / (variance + 1e-6)).mean() < 1.2
            assert outputs.logits.std() < 0.3
        assert model.decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.2)

    def test_flat_patches(self):
        model = masked_autoencoder(hidden_sizes=[4, 8, 8, 16]).train()
        side = model.config.mask_patch_size
        images = pixels(model)
        images[:, :, :side, :side] = 2.64  # white, as it is usually normalised
        images[1] = 2.64
        mask = torch.tensor([[1, 0, 0, 1, 0, 1]] * 2)
        loss = model(images, mask=mask).loss
        loss.backward()
        assert loss.isfinite()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        # Where a patch is flat its target is 0: the loss of the white image is the square of its prediction.
        white = model(images[1:], mask=mask[1:])
        removed = white.mask == 1
        assert white.loss.item() == pytest.approx(white.logits[removed].square().mean().item(), rel=1e-3)

    def test_faint_noise_on_flat_patches(self):
        """The paper's epsilon makes a last bit of noise count as much as a picture; a larger one does not."""
        images = torch.full((1, 3, 64, 64), 2.64) + 1e-2 * torch.randn(1, 3, 64, 64)
        for eps, low, high in ((1e-6, 0.9, 1.2), (1e-2, 0, 0.05)):
            model = ConvNextV2FcmaeForPreTraining(
                ConvNextV2FcmaeConfig(hidden_sizes=[4, 8, 8, 16], depths=[1] * 4, norm_pix_loss_eps=eps)
            )
            assert low < model(images).loss.item() < high

    def test_every_parameter_learns(self):
        """So that DistributedDataParallel need not look for ones that do not."""
        for fields in SHAPES.values():
            model = masked_autoencoder(**fields).train()
            model(pixels(model)).loss.backward()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None, name
                assert parameter.grad.any(), name

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("masked_dense", [False, True])
    def test_autocast(self, dtype, masked_dense):
        model = masked_autoencoder().train()
        images, noise = pixels(model), torch.rand(2, 6)
        with torch.no_grad():  # activations before GRN of some 1e3 to 1e4
            for layer in (module for module in model.modules() if isinstance(module, ConvNextV2FcmaeLayer)):
                layer.pwconv1.weight.mul_(2e3)
                layer.pwconv2.weight.div_(2e3)
        expected = model(images, noise=noise)
        with torch.autocast("cpu", dtype=dtype):
            outputs = model(images, noise=noise, masked_dense=masked_dense)
        assert outputs.loss.dtype == torch.float32
        outputs.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        assert_near(outputs.logits, expected.logits, 0.05)

    def test_weights_of_bfloat16(self):
        model = masked_autoencoder()
        images, noise = pixels(model), torch.rand(2, 6)
        expected = model(images, noise=noise).logits
        outputs = model.to(torch.bfloat16).train()(images.bfloat16(), noise=noise)
        assert_near(outputs.logits, expected, 0.05)
        outputs.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


class TestTraining:
    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("masked_dense", [False, True])
    def test_gradient_checkpointing(self, use_reentrant, masked_dense):
        model = masked_autoencoder().train()
        images, arguments = pixels(model), {"noise": torch.rand(2, 6), "masked_dense": masked_dense}
        expected = {name: tensor.clone() for name, tensor in step(model, images, **arguments).items()}
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert_same_step(step(model, images, **arguments), expected, 1e-6)

    def test_learns(self):
        model = ConvNextV2FcmaeForPreTraining(
            ConvNextV2FcmaeConfig(depths=[1, 1], hidden_sizes=[16, 32], patch_size=4, decoder_hidden_size=32)
        )
        model.train()
        waves = torch.sin(0.4 * (torch.arange(32.0) + torch.arange(8.0)[:, None]))
        images = waves[:, None, None].repeat(1, 3, 32, 1)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            loss = model(images).loss
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.5


@pytest.mark.parametrize("masked_dense", [False, True])
def test_export(masked_dense):
    model = masked_autoencoder()
    images, noise = pixels(model), torch.rand(2, 6)
    program = torch.export.export(model, (images,), {"noise": noise, "masked_dense": masked_dense}).module()
    images, noise = pixels(model), torch.rand(2, 6)
    exported, expected = program(images, noise=noise, masked_dense=masked_dense), model(images, noise=noise)
    assert torch.equal(exported.mask, expected.mask)
    assert_near(exported.logits, expected.logits)
    assert_near(exported.loss, expected.loss)


@pytest.mark.slow
@pytest.mark.parametrize("masked_dense", [False, True])
def test_compiled_equals_eager(masked_dense):
    model = masked_autoencoder().train()
    images, arguments = pixels(model), {"noise": torch.rand(2, 6), "masked_dense": masked_dense}
    expected = {name: tensor.clone() for name, tensor in step(model, images, **arguments).items()}
    compiled = torch.compile(model, fullgraph=True)(images, **arguments)
    model.zero_grad()
    compiled.loss.backward()
    assert_near(compiled.loss, expected["loss"])
    assert_near(compiled.logits, expected["logits"])
    for name, parameter in model.named_parameters():
        assert_near(parameter.grad, expected[name], name=name)
