"""What masked pretraining sees and says, as a picture: original, masked and reconstruction, side by side."""

import io

import torch
from PIL import Image

TRIPLETS_ACROSS = 4
GAP, WIDE_GAP = 2, 12  # pixels: within a triplet, between triplets
# Small images are enlarged by whole factors up to this width, large ones shrunk to it, in pixels.
WIDTH = 128
MAX_BYTES = 200_000  # of a file, for a run folder has many and a card shows one


def reconstruction_picture(
    original: torch.Tensor, masked: torch.Tensor, reconstruction: torch.Tensor, mean: list[float], std: list[float]
) -> bytes:
    """A PNG file of at most `MAX_BYTES`.

    Args:
        original, masked, reconstruction: `(images, channels, height, width)`, normalised by `mean` and `std`; one
            channel is shown as grey.
    """
    rows = [
        [_pixels(image, mean, std) for image in triplet]
        for triplet in zip(original, masked, reconstruction, strict=True)
    ]
    for width in (WIDTH, 112, 96, 80, 64, 48):
        buffer = io.BytesIO()
        _arrange([[_resized(image, width) for image in triplet] for triplet in rows]).save(buffer, "PNG", optimize=True)
        if buffer.tell() <= MAX_BYTES:
            break
    return buffer.getvalue()


def _pixels(image: torch.Tensor, mean: list[float], std: list[float]) -> Image.Image:
    image = image.float().cpu() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    image = (image.clamp(0, 1) * 255).round().to(torch.uint8).expand(3, -1, -1)
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _resized(image: Image.Image, width: int) -> Image.Image:
    if image.width <= width:
        factor = width // image.width
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)


def _arrange(triplets: list[list[Image.Image]]) -> Image.Image:
    width, height = triplets[0][0].size
    across = min(TRIPLETS_ACROSS, len(triplets))
    down = -(-len(triplets) // across)
    step_x, step_y = 3 * width + 2 * GAP + WIDE_GAP, height + WIDE_GAP
    picture = Image.new("RGB", (across * step_x - WIDE_GAP, down * step_y - WIDE_GAP), "white")
    for number, triplet in enumerate(triplets):
        for place, image in enumerate(triplet):
            x = number % across * step_x + place * (width + GAP)
            picture.paste(image, (x, number // across * step_y))
    return picture
