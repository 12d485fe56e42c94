"""A page on which people try a model of images: what it makes of one with patches removed, or which class it names.

What it shows is in `space.json` beside it, examples in `examples/`. The environment variable MODEL, a folder or a Hub
id, takes the place of the model named there. Notable here:
- images of any size, shape and mode: transparent ones are laid on white, as in training;
- the same seed removes the same patches again, and with a higher mask ratio these and more.
"""

import json
import os
import threading
import traceback
from pathlib import Path

import gradio as gr
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoModelForPreTraining

HERE = Path(__file__).parent
SPACE = json.loads((HERE / "space.json").read_text(encoding="utf-8"))
MODEL = os.environ.get("MODEL") or SPACE["model"]
LONGEST_SHAPE = 20  # A side by the other; beyond, a processor that keeps the shape makes a huge image of it.
SHOWN_SIDE = 256  # pixels, to which small images are enlarged by whole factors


class VisionModel:
    """The model or models of a folder, and its image processor."""

    def __init__(self, path: str):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        trust = SPACE["trust_remote_code"]
        options = {"trust_remote_code": trust, "use_safetensors": True, "dtype": torch.float32}
        self.processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=trust)
        self.autoencoder = self.classifier = None
        if SPACE["reconstructs"]:
            self.autoencoder = AutoModelForPreTraining.from_pretrained(path, **options).to(self.device).eval()
        if SPACE["classifies"]:
            self.classifier = AutoModelForImageClassification.from_pretrained(path, **options).to(self.device).eval()

    def pixel_values(self, image: Image.Image) -> torch.Tensor:
        """`(1, channels, height, width)`, as the model takes it. Raises ValueError for a shape that is all length."""
        if max(image.size) > LONGEST_SHAPE * min(image.size):
            raise ValueError(
                f"The image has {image.width} x {image.height} pixels: one side may be at most {LONGEST_SHAPE} times "
                "as long as the other."
            )
        mode = "L" if self.channels == 1 else "RGB"
        return self.processor(plain_image(image, mode), return_tensors="pt")["pixel_values"].to(self.device)

    @property
    def channels(self) -> int:
        return getattr((self.autoencoder or self.classifier).config, "num_channels", 3)

    @torch.inference_mode()
    def reconstruct(
        self, image: Image.Image, mask_ratio: float, seed: int
    ) -> tuple[Image.Image, Image.Image, Image.Image, str]:
        """Original, masked and reconstruction, and how many patches were removed; at least one is, and one stays."""
        pixel_values = self.pixel_values(image)
        side = self.autoencoder.config.mask_patch_size
        patches = (pixel_values.shape[2] // side) * (pixel_values.shape[3] // side)
        kept = min(max(self.autoencoder.config.number_kept(patches, mask_ratio), 1), patches - 1)
        # One draw for every ratio: a higher one removes the same patches and more.
        order = torch.rand(1, patches, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
        mask = torch.ones(1, patches).scatter_(1, order[:, :kept], 0)
        pictures = self.autoencoder.reconstruct(pixel_values, mask=mask.to(self.device))
        told = f"{patches - kept} of {patches} patches of {side} × {side} pixels removed."
        return *(self._picture(picture[0]) for picture in pictures), told

    def _picture(self, pixels: torch.Tensor) -> Image.Image:
        """`(channels, height, width)`, normalised, as an image to look at."""
        mean, std = (
            torch.tensor(values)[:, None, None] for values in (self.processor.image_mean, self.processor.image_std)
        )
        levels = ((pixels.float().cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).expand(3, -1, -1)
        image = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
        factor = max(1, SHOWN_SIDE // max(image.size))
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)

    @torch.inference_mode()
    def classify(self, image: Image.Image) -> dict[str, float]:
        """The five likeliest classes and their probabilities, the likeliest first."""
        config = self.classifier.config
        logits = self.classifier(self.pixel_values(image)).logits[0].float()
        several = config.problem_type == "multi_label_classification"
        best = (logits.sigmoid() if several else logits.softmax(dim=0)).topk(min(5, len(logits)))
        labels = [config.id2label[number] for number in best.indices.tolist()]
        return dict(zip(labels, best.values.tolist(), strict=True))


def plain_image(image: Image.Image, mode: str) -> Image.Image:
    """`image` in `mode`, 16 bits as 8, and what is transparent as white."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda level: level / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def vision_page(model: VisionModel) -> gr.Blocks:
    examples = sorted(map(str, (HERE / "examples").glob("*.png")))
    with gr.Blocks(title=SPACE["title"], analytics_enabled=False) as page:
        gr.Markdown(header())
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                # Of whatever mode: the model's own preparation knows better than a conversion here.
                image = gr.Image(
                    examples[0] if examples else None,
                    label="Image",
                    type="pil",
                    image_mode=None,
                    height=220,
                    sources=["upload", "clipboard"],
                )
                if examples:
                    gr.Examples([[example] for example in examples], image, label="Examples")
            with gr.Column(scale=3, min_width=300):
                if model.autoencoder is not None:
                    reconstruction_part(page, model, image)
                if model.classifier is not None:
                    labels = gr.Label(label="Likeliest classes", num_top_classes=5)
                    watch(page, [image], labels, model.classify, nothing=None)
    return page


def reconstruction_part(page: gr.Blocks, model: VisionModel, image: gr.Image) -> None:
    with gr.Row():
        ratio = gr.Slider(
            0.05, 0.95, model.autoencoder.config.mask_ratio, step=0.05, label="Mask ratio", info="share removed"
        )
        seed = gr.Slider(0, 99, 0, step=1, label="Seed", info="which patches are removed")
    pictures = []
    with gr.Row():
        for name in ("Original", "Masked", "Reconstruction"):
            with gr.Column(min_width=90):
                gr.Markdown(name)
                pictures.append(gr.Image(show_label=False, interactive=False, min_width=80, buttons=["fullscreen"]))
    told = gr.Markdown()
    nothing = (None, None, None, "Upload an image, or take one of the examples.")
    watch(page, [image, ratio, seed], [*pictures, told], model.reconstruct, nothing)


def watch(page: gr.Blocks, inputs: list, outputs, compute, nothing) -> None:
    """Shows `compute(*inputs)` when the page opens and whenever an input changes, and `nothing` without an image."""
    lock = threading.Lock()  # every event has its own queue; together they would share the same cores

    def show(picture, *values):
        if picture is None:
            return nothing
        try:
            with lock:
                return compute(picture, *values)
        except (ValueError, OSError) as error:  # a shape that does not fit, an image that is damaged
            gr.Warning(str(error))
            return nothing

    triggers = [page.load, *(component.change for component in inputs)]
    gr.on(
        triggers, show, inputs, outputs, trigger_mode="always_last", show_progress="hidden", api_name=compute.__name__
    )


def header() -> str:
    return f"# {SPACE['title']}\n{SPACE['description']}"


def apology(error: Exception) -> gr.Blocks:
    """The page where the model cannot be opened."""
    with gr.Blocks(title=SPACE["title"], analytics_enabled=False) as page:
        reason = str(error).strip().split("\n")[0]
        gr.Markdown(f"{header()}\n\n**The model could not be opened**, so there is nothing to try here: {reason}")
    return page


def build_page() -> gr.Blocks:
    try:
        model = VisionModel(MODEL)
    except Exception as error:  # whatever stops the loading, the page says it
        traceback.print_exc()
        return apology(error)
    return vision_page(model)


if __name__ == "__main__":
    build_page().queue(max_size=30, default_concurrency_limit=1).launch(footer_links=[], max_file_size="20mb")
