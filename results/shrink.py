"""VOC 2012 -> the study's VOC of 320 px, in the same layout.

Run    python -m results.shrink data/VOCdevkit/VOC2012 small/VOCdevkit/VOC2012
       VOC_ROOT=small bash results/voc.sh
"""
import shutil
import sys
from pathlib import Path

from PIL import Image

import data

SIDE = 320  # pixels of the longer side


def smaller(image, how):
    """A PIL image whose longer side is SIDE, sides rounded; a smaller one as it is."""
    scale = SIDE / max(image.size)
    if scale >= 1:
        return image
    return image.resize([max(1, round(side * scale)) for side in image.size], how)


def shrink(source, target):
    """Photographs by LANCZOS, as JPEG of quality 82; masks by nearest neighbour; lists copied."""
    if not (source / "JPEGImages").is_dir():
        raise data.UserError(f"no folder {source / 'JPEGImages'}: name an extracted VOC2012")
    for folder in ("Annotations", "ImageSets"):
        shutil.copytree(source / folder, target / folder, dirs_exist_ok=True)
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug"):
        files = sorted((source / folder).glob("*.*"))
        (target / folder).mkdir(parents=True, exist_ok=True)
        for count, file in enumerate(files, 1):
            with Image.open(file) as image:
                if folder == "JPEGImages":
                    picture = smaller(image.convert("RGB"), Image.LANCZOS)
                    picture.save(target / folder / file.name, quality=82, optimize=True)
                else:  # the palette stays
                    smaller(image, Image.NEAREST).save(target / folder / file.name, optimize=True)
            if count % 100 == 0:
                data.progress(f"{folder}: {count}/{len(files)}")
    data.progress("")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 2:
        raise data.UserError(f"{len(argv)} folders, two are needed: {__doc__}")
    shrink(*map(Path, argv))


if __name__ == "__main__":
    data.run(main)
