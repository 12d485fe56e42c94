"""ConvNeXt V2 and V1 over whole images compute what transformers and timm compute from the same weights."""

import pytest
import timm
import torch
from convnextv2_states import official_state, ours, randomised
from convnextv2_tiny import V1, theirs
from timm.models.convnext import checkpoint_filter_fn
from torch.autograd import gradcheck
from transformers import AutoBackbone, UperNetConfig, UperNetForSemanticSegmentation

from hf_models import (
    ConvNextV2FcmaeBackbone,
    ConvNextV2FcmaeConfig,
    ConvNextV2FcmaeForImageClassification,
    ConvNextV2FcmaeModel,
)
from hf_models.convnextv2_fcmae.modeling_convnextv2_fcmae import (
    ConvNextV2FcmaeDropPath,
    ConvNextV2FcmaeGRN,
    ConvNextV2FcmaeLayer,
)
from hf_models.convnextv2_fcmae.sizes import SIZES
from hf_models.convnextv2_fcmae.visible_cells_convnextv2_fcmae import depthwise

SHAPES = {
    "V2": {},
    "V1": V1,
    "greyscale": {"num_channels": 1},
    "stem of 2": {"patch_size": 2},
    "stem of 1": {"patch_size": 1, "depths": [1, 1, 1], "hidden_sizes": [8, 12, 16]},
    "three stages": {"depths": [1, 2, 1], "hidden_sizes": [8, 16, 24]},
    "one stage": {"depths": [2], "hidden_sizes": [8]},
    "widths of every kind": {"hidden_sizes": [12, 8, 8, 20]},
    "another activation": {"hidden_act": "relu"},
    "another final epsilon": {"layer_norm_eps": 1e-2},
}
SIDES = ((64, 64), (75, 64), (61, 97))
TIMM_NAMES = {
    name: f"convnext_{name.removeprefix('v1_')}" if name.startswith("v1_") else f"convnextv2_{name}" for name in SIZES
}


def pixels(channels=3, height=64, width=64, batch=2):
    return torch.randn(batch, channels, height, width)


def assert_close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


class TestSizes:
    @pytest.mark.parametrize("name", SIZES)
    def test_parameters_are_timms(self, name):
        with torch.device("meta"):
            model = ConvNextV2FcmaeForImageClassification(ConvNextV2FcmaeConfig(**SIZES[name].config, num_labels=1000))
            reference = timm.create_model(TIMM_NAMES[name], num_classes=1000)
        assert model.num_parameters() == SIZES[name].parameters
        assert sorted(tensor.numel() for tensor in model.state_dict().values()) == sorted(
            tensor.numel() for tensor in reference.state_dict().values()
        )

    def test_all_are_there(self):
        assert set(SIZES) == {
            *("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge"),
            *(f"v1_{name}" for name in ("tiny", "small", "base", "large", "xlarge")),
        }


class TestEqualsTransformers:
    @pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
    def test_classifier(self, fields):
        model = ours(**fields)
        reference = theirs(model, "classifier")
        labels = torch.tensor([1, 4])
        for height, width in SIDES:
            images = pixels(model.config.num_channels, height, width)
            model.zero_grad(), reference.zero_grad()
            one = model(images, labels=labels, output_hidden_states=True)
            other = reference(images, labels=labels, output_hidden_states=True)
            assert_close(one.logits, other.logits)
            assert_close(one.loss, other.loss)
            assert len(one.hidden_states) == len(model.config.depths) + 1
            for state, expected in zip(one.hidden_states, other.hidden_states, strict=True):
                assert_close(state, expected)
            # In training ours takes gradients of its own for the depthwise convolution and GRN.
            model.train()(images, labels=labels).loss.backward(), other.loss.backward()
            model.eval()
            expected = gradients(reference)
            for name, gradient in gradients(model).items():
                assert_close(gradient, expected[name.replace("convnextv2.", reference.base_model_prefix + ".")])

    @pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
    def test_model(self, fields):
        model = ours("encoder", **fields)
        reference = theirs(model, "model")
        for height, width in SIDES:
            images = pixels(model.config.num_channels, height, width)
            with torch.no_grad():
                one, other = model(images), reference(images)
            assert_close(one.last_hidden_state, other.last_hidden_state)
            assert_close(one.pooler_output, other.pooler_output)

    @pytest.mark.parametrize("fields", [{}, V1], ids=["V2", "V1"])
    @pytest.mark.parametrize("out_features", [["stem", "stage1", "stage2", "stage3", "stage4"], ["stage2", "stage4"]])
    def test_backbone(self, fields, out_features):
        model = ours("backbone", out_features=out_features, **fields)
        reference = theirs(model, "backbone", out_features=out_features)
        assert model.channels == reference.channels
        for height, width in SIDES:
            images = pixels(3, height, width)
            one, other = model(images, output_hidden_states=True), reference(images, output_hidden_states=True)
            for state, expected in zip(
                one.feature_maps + one.hidden_states, other.feature_maps + other.hidden_states, strict=True
            ):
                assert_close(state, expected)

    def test_stochastic_depth_rises_as_theirs(self):
        model = ours(drop_path_rate=0.3)
        rates = [layer.drop_path.drop_prob for layer in model.modules() if isinstance(layer, ConvNextV2FcmaeLayer)]
        assert rates == pytest.approx([0.0, 0.075, 0.15, 0.225, 0.3])
        reference = theirs(model, "classifier", drop_path_rate=0.3)
        their_rates = [module.drop_prob for name, module in reference.named_modules() if hasattr(module, "drop_prob")]
        assert rates[1:] == their_rates  # theirs has none where the rate is 0
        images = pixels()
        assert_close(model(images).logits, reference(images).logits)  # off in eval mode


class TestEqualsTimm:
    @pytest.mark.parametrize(
        "fields",
        # A stem of 2 is another model there: timm halves once more before the first stage.
        [{}, V1, {"patch_size": 1}, {"num_channels": 1}],
        ids=["V2", "V1", "stem of 1", "greyscale"],
    )
    def test_logits_and_features(self, fields):
        model = ours(**fields)
        config = model.config
        reference = timm.create_model(
            "convnextv2_atto" if config.use_grn else "convnext_tiny",
            depths=config.depths,
            dims=config.hidden_sizes,
            patch_size=config.patch_size,
            in_chans=config.num_channels,
            num_classes=config.num_labels,
        ).eval()
        reference.load_state_dict(checkpoint_filter_fn(official_state(model), reference))
        for height, width in SIDES:
            images = pixels(config.num_channels, height, width)
            with torch.no_grad():
                outputs = model(images, output_hidden_states=True)
                assert_close(outputs.logits, reference(images))
                features = reference.forward_intermediates(images, norm=False, intermediates_only=True)
            for state, expected in zip(outputs.hidden_states[1:], features, strict=True):
                assert_close(state, expected)


class TestWrittenOutGradients:
    """Of the depthwise convolution and GRN, in float64 against finite differences."""

    @pytest.mark.parametrize("side", [(5, 4), (1, 9), (8, 8)])
    def test_depthwise(self, side):
        convolution = torch.nn.Conv2d(3, 3, 7, padding=3, groups=3, dtype=torch.float64)
        cells = torch.randn(2, *side, 3, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda cells, *_: depthwise(cells, convolution, None), (cells, *convolution.parameters()))

    @pytest.mark.parametrize("training", [True, False])
    def test_grn(self, training):
        grn = randomised(ConvNextV2FcmaeGRN(6).double()).train(training)
        cells = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda cells, *_: grn(cells), (cells, *grn.parameters()))

    def test_a_frozen_weight_gets_none(self):
        convolution = torch.nn.Conv2d(3, 3, 7, padding=3, groups=3)
        convolution.weight.requires_grad_(False)
        cells = torch.randn(2, 4, 4, 3, requires_grad=True)
        depthwise(cells, convolution, None).sum().backward()
        assert convolution.weight.grad is None
        torch.testing.assert_close(convolution.bias.grad, torch.full((3,), 32.0))
        assert cells.grad is not None

    @pytest.mark.parametrize("training", [True, False])
    def test_channels_without_response(self, training):
        grn = randomised(ConvNextV2FcmaeGRN(4)).train(training)
        cells = torch.randn(2, 3, 3, 4)
        cells[..., 1] = 0
        cells[0] = 0
        cells.requires_grad_()
        grn(cells).square().sum().backward()
        assert cells.grad.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in grn.parameters())

    def test_hooks_of_the_convolution_are_called(self):
        model, calls = ours().train(), []
        convolutions = [module for name, module in model.named_modules() if name.endswith("dwconv")]
        convolutions[0].register_forward_hook(lambda *_: calls.append("forward"))
        convolutions[1].register_full_backward_hook(lambda *_: calls.append("backward"))
        model(pixels()).logits.sum().backward()
        assert calls == ["forward", "backward"]


class TestHalfPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("training", [True, False])
    def test_grn_of_large_activations(self, dtype, training):
        # The squares of these, and the sum of a thousand such cells, are beyond float16's 65,504.
        grn = randomised(ConvNextV2FcmaeGRN(16)).train(training)
        cells = (torch.randn(2, 32, 32, 16) * 1e3).clamp(-5e3, 5e3)
        half = cells.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            output = grn(half)
        exact = half.detach().double().requires_grad_()
        reference = randomised(ConvNextV2FcmaeGRN(16)).double()
        reference.load_state_dict({name: tensor.double() for name, tensor in grn.state_dict().items()})
        expected = reference(exact)
        direction = torch.randn(output.shape)
        output.backward(direction.to(dtype)), expected.backward(direction.to(dtype).double())
        for one, other in (
            (output, expected),
            (half.grad, exact.grad),
            (grn.weight.grad, reference.weight.grad),
            (grn.bias.grad, reference.bias.grad),
        ):
            assert one.isfinite().all()
            assert (one.double() - other).norm() < 0.01 * other.norm()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_gradients_of_rare_channels(self, dtype):
        """One channel hardly responds, and a loss that was scaled up for float16 gives large gradients."""
        grn = randomised(ConvNextV2FcmaeGRN(16)).train()
        cells = torch.randn(2, 4, 4, 16) * 100
        cells[..., 3] *= 1e-4
        half = cells.to(dtype).requires_grad_()
        direction = (torch.randn(cells.shape) * 1e3).to(dtype)
        grn(half).backward(direction)
        exact = half.detach().double().requires_grad_()
        weight, bias = (parameter.detach().double() for parameter in (grn.weight, grn.bias))
        norm = exact.square().sum(dim=(1, 2), keepdim=True).sqrt()
        expected = weight * exact * norm / (norm.mean(dim=-1, keepdim=True) + 1e-6) + bias + exact
        expected.backward(direction.double())
        assert half.grad.isfinite().all()
        assert (half.grad.double() - exact.grad).norm() < 0.01 * exact.grad.norm()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_autocast(self, dtype):
        model, images, labels = ours().train(), pixels(), torch.tensor([0, 3])
        with torch.no_grad():  # activations before GRN of some 1e3 to 1e4
            for layer in (module for module in model.modules() if isinstance(module, ConvNextV2FcmaeLayer)):
                layer.pwconv1.weight.mul_(2e3)
                layer.pwconv2.weight.div_(2e3)
        expected = model(images, labels=labels)
        with torch.autocast("cpu", dtype=dtype):
            outputs = model(images, labels=labels)
        outputs.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        assert (outputs.logits.float() - expected.logits).norm() < 0.05 * expected.logits.norm()

    def test_weights_of_bfloat16(self):
        model, images = ours(), pixels()
        expected = model(images).logits
        model.to(torch.bfloat16).train()
        logits = model(images.bfloat16()).logits
        assert logits.dtype == torch.bfloat16
        assert (logits.float() - expected).norm() < 0.05 * expected.norm()
        logits.float().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


class TestStochasticDepth:
    def test_keeps_the_expectation_and_drops_whole_images(self):
        drop = ConvNextV2FcmaeDropPath(0.25).train()
        images = torch.ones(4000, 2, 3, 4)
        dropped = drop(images)
        assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
        assert torch.equal(dropped, dropped[:, :1, :1, :1].expand_as(dropped))
        # Three standard deviations of the mean of 4,000 draws.
        assert dropped.mean().item() == pytest.approx(1, abs=3 * (0.25 / 0.75 / 4000) ** 0.5)
        assert torch.equal(drop.eval()(images), images)

    def test_works_in_training_only(self):
        model, images = ours(drop_path_rate=0.9), pixels()
        expected = model(images).logits
        assert torch.equal(model(images).logits, expected)
        model.train()
        assert not torch.allclose(model(images).logits, expected)


class TestTraining:
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing(self, use_reentrant):
        model, images, labels = ours().train(), pixels(), torch.tensor([0, 3])
        model(images, labels=labels).loss.backward()
        expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        calls = count_calls(model.convnextv2.encoder.stages[0].layers[0].layernorm)
        model(images, labels=labels).loss.backward()
        assert len(calls) == 2  # computed again for the gradient
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)

    def test_channels_last(self):
        model, images = ours(), pixels(height=64, width=96)
        expected = model(images).logits
        assert_close(model(images.to(memory_format=torch.channels_last)).logits, expected)
        model.to(memory_format=torch.channels_last).train()
        assert_close(model(images.to(memory_format=torch.channels_last)).logits, expected)

    def test_per_sample_and_second_derivatives(self):
        model, images = ours(), pixels(height=32, width=32)
        parameters = dict(model.named_parameters())

        def score(parameters, image):
            return torch.func.functional_call(model, parameters, (image[None],)).logits.square().sum()

        by_image = torch.func.vmap(torch.func.grad(score), in_dims=(None, 0))(parameters, images)
        sum(score(parameters, image) for image in images).backward()
        for name, gradient in gradients(model).items():
            assert_close(by_image[name].sum(0), gradient)
        images.requires_grad_()
        (gradient,) = torch.autograd.grad(model(images).logits.square().sum(), images, create_graph=True)
        gradient.square().sum().backward()
        assert images.grad.isfinite().all()

    def test_second_derivatives_are_refused_in_training_mode(self):
        """Rather than computed without what passes through the gradients that are written out."""
        model, images = ours().train(), pixels(height=32, width=32).requires_grad_()
        for frozen in ((), ("dwconv",), ("grn",)):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not any(part in name for part in frozen))
            with pytest.raises(RuntimeError, match=r"call model\.eval\(\) for them"):
                torch.autograd.grad(model(images).logits.square().sum(), images, create_graph=True)

    def test_a_batch_of_functions_without_gradients(self):
        model, images = ours(), pixels(height=32, width=32)
        with torch.no_grad():
            by_image = torch.func.vmap(lambda image: model(image[None]).logits[0])(images)
            assert_close(by_image, model(images).logits)

    @pytest.mark.parametrize("fields", [{}, V1], ids=["V2", "V1"])
    def test_init(self, fields):
        config = ConvNextV2FcmaeConfig(hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1], **fields)
        model = ConvNextV2FcmaeForImageClassification(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or ".grn." in name:
                assert not parameter.any(), name
            elif name.endswith("layer_scale_parameter"):
                assert (parameter == 1e-6).all(), name
            elif "norm" in name:
                assert (parameter == 1).all(), name
            elif parameter.numel() > 1000:
                # 0.02, as the paper's; the cut at two in absolute value (100 deviations) takes nothing away.
                assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


class TestBackbone:
    def test_auto_backbone(self):
        model = AutoBackbone.from_config(ConvNextV2FcmaeConfig(out_indices=[1, 3], depths=[1, 1, 1, 1]))
        assert type(model) is ConvNextV2FcmaeBackbone
        assert model.out_features == ["stage1", "stage3"]
        assert model.channels == [96, 384]

    def test_carries_a_segmentation_model(self):
        config = ours("backbone", out_features=["stage1", "stage2", "stage3", "stage4"]).config
        model = UperNetForSemanticSegmentation(
            UperNetConfig(backbone_config=config, hidden_size=8, auxiliary_in_channels=24, num_labels=4)
        )
        assert type(model.backbone) is ConvNextV2FcmaeBackbone
        outputs = model(pixels(), labels=torch.randint(0, 4, (2, 64, 64)))
        assert outputs.logits.shape == (2, 4, 64, 64)
        outputs.loss.backward()
        assert model.backbone.embeddings.patch_embeddings.weight.grad.any()


class TestConfig:
    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"depths": [1, 1]}, "depths"),
            ({"depths": [], "hidden_sizes": []}, "depths"),
            ({"depths": [1, 0, 1, 1]}, "depths"),
            ({"hidden_sizes": [8, 8, -8, 8]}, "hidden_sizes"),
            ({"patch_size": 0}, "patch_size"),
            ({"num_channels": 0}, "num_channels"),
            ({"decoder_hidden_size": 0}, "decoder_hidden_size"),
            ({"mask_ratio": 1}, "mask_ratio"),
            ({"mask_ratio": 0.0}, "mask_ratio"),
            ({"drop_path_rate": 1.0}, "drop_path_rate"),
            ({"norm_pix_loss_eps": 0.0}, "norm_pix_loss_eps"),
            ({"layer_scale_init_value": -1.0}, "layer_scale_init_value"),
            ({"hidden_act": "gleu"}, "hidden_act"),
        ],
    )
    def test_values_that_describe_no_model(self, fields, named):
        with pytest.raises(ValueError, match=rf"^{named} .*: .*\.$"):
            ConvNextV2FcmaeConfig(**fields)

    def test_round_trip(self, tmp_path):
        config = ConvNextV2FcmaeConfig(
            depths=[1, 2, 1], hidden_sizes=(8, 16, 24), out_features=["stage2"], norm_pix_loss_eps=1e-2, num_labels=3
        )
        config.save_pretrained(tmp_path)
        again = ConvNextV2FcmaeConfig.from_pretrained(tmp_path)
        assert again.to_dict() == config.to_dict()
        assert (again.out_features, again.out_indices) == (["stage2"], [2])
        assert again.mask_patch_size == 16

    def test_images_of_other_channels(self):
        for task in ("encoder", "classifier", "backbone", "pretraining"):
            with pytest.raises(ValueError, match=r"^pixel_values has the shape \(2, 1, 64, 64\): .*3.*num_channels\.$"):
                ours(task)(pixels(1))


@pytest.mark.slow
def test_compiled_equals_eager():
    model, images, labels = ours().train(), pixels(), torch.tensor([0, 3])
    eager = model(images, labels=labels)
    eager.loss.backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    outputs = torch.compile(model, fullgraph=True)(images, labels=labels)
    outputs.loss.backward()
    assert_close(outputs.logits, eager.logits)
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected[name])


@pytest.mark.parametrize("differentiable", [True, False])
def test_one_export_serves_all_sizes(differentiable):
    """A runtime gets one program for any batch and image size, as from transformers' models."""
    model, dynamic = ours(), torch.export.Dim.DYNAMIC
    with torch.set_grad_enabled(differentiable):
        program = torch.export.export(model, (pixels(),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},))
    for batch, height, width in ((2, 64, 64), (5, 96, 64), (3, 75, 107), (2, 128, 128)):
        images = pixels(height=height, width=width, batch=batch)
        assert_close(program.module()(images).logits, model(images).logits)


@pytest.mark.filterwarnings("ignore")
def test_trace_is_saved(tmp_path):
    """TorchScript, old as it is: nothing of Python may be left in the graph."""
    model, images = ours(), pixels()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            return self.model(pixel_values).logits

    with torch.no_grad():
        torch.jit.trace(Logits(), images, check_trace=False).save(tmp_path / "model.pt")
        assert_close(torch.jit.load(tmp_path / "model.pt")(images), model(images).logits)


def test_the_pooled_model_is_the_classifiers():
    model = ours()
    images = pixels()
    encoder = ConvNextV2FcmaeModel(model.config).eval()
    encoder.load_state_dict(model.convnextv2.state_dict())
    assert torch.equal(model.classifier(encoder(images).pooler_output), model(images).logits)
