"""A contact sheet: the first images of a source as the network sees them, side by side in one small PNG."""

import io

import numpy as np
import torch
from PIL import Image

from modhifi_cli.records import ImageSource, Preprocess

_SIDE = 64  # pixels of one image on the sheet, at most


def contact_sheet(source: ImageSource, preprocess: Preprocess, *, images: int = 40, columns: int = 10) -> bytes:
    """The first images of a source with their normalisation undone.

    Args:
        source: Images as the network wants them.
        preprocess: How they were normalised.
        images: How many at most.
        columns: Images side by side.

    Returns:
        A PNG, at most 64 pixels a side for each image.
    """
    found: list[torch.Tensor] = []
    for batch, _ in source.batches(images):
        found.append(batch.float())
        if sum(map(len, found)) >= images:
            break
    pixels = torch.cat(found)[:images]
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (preprocess.mean, preprocess.std))
    pixels = ((pixels * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    height, width = pixels.shape[1:3]
    scale = min(1.0, _SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    rows = -(-len(pixels) // columns)
    sheet = Image.new("RGB", (columns * (size[0] + 2) - 2, rows * (size[1] + 2) - 2), (128, 128, 128))
    for number, image in enumerate(pixels):
        grey = image.shape[2] == 1
        tile = Image.fromarray(np.ascontiguousarray(image[..., 0] if grey else image)).convert("RGB")
        tile = tile.resize(size, Image.Resampling.BOX) if scale < 1 else tile
        sheet.paste(tile, ((number % columns) * (size[0] + 2), (number // columns) * (size[1] + 2)))
    out = io.BytesIO()
    sheet.save(out, format="PNG", optimize=True)
    return out.getvalue()
