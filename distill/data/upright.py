"""How an opened picture becomes what the models see. Stands alone: exported students carry its source in their card."""

from __future__ import annotations

import PIL.Image
import PIL.ImageOps


def upright_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """A picture as RGB: turned as its EXIF says, transparency on white, of 16-bit grey the upper 8 bits."""
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits: a plain conversion would clip nearly everything to white
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")
