"""Data sets, the files of a run, and what the stages share: processes, flags, errors.

Image labels come from annotation lists (XML, CSV, JSON), never from masks; masks are ground truth,
for evaluate.py alone (train_seg.py looks, to refuse them). Whatever is wrong with a file or a flag
ends in one line that names it, the reason and the remedy.
"""
import argparse
import atexit
import csv
import hashlib
import io
import json
import math
import os
import random
import shlex
import shutil
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.datasets.voc import DATASET_YEAR_DICT
from torchvision.transforms.v2 import functional as TF

IGNORE = 255  # mask value of pixels that are not counted
MOST_CLASSES = 254  # values 1..254 of an 8-bit mask
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor")
TOY_CLASSES = ("bars", "columns", "diagonals", "checks", "dots", "rings")
TOY_SIZES = {"train": 1200, "val": 150}
CSV_HEADERS = {"name", "image", "file", "filename", "id"}  # as a first cell
RESERVED = {"background", "ignore", "void", "unlabeled", "unlabelled"}  # listed by some tools


# -------------------------------------------------------------------------------------------------
# Reading one file
# -------------------------------------------------------------------------------------------------
def mask_value(class_index):
    """Class index 0..C-1 -> mask value 1..C; 0 is background. They differ nowhere else."""
    return class_index + 1


@contextmanager
def reading(path, remedy):
    """Any error while path is read becomes one that names file, reason and remedy."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}: {remedy}") from None
    except Exception as error:
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} cannot be read ({kind}{reason}): {remedy}") from error


def read_text(path, remedy="save it as plain text in UTF-8"):
    """The text of a file, with or without a byte-order mark."""
    with reading(path, remedy):
        return Path(path).read_text(encoding="utf-8-sig")


def read_json(path, remedy):
    with reading(path, remedy):
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))


def read_image(path):
    """A photograph as people see it: RGB, 8 bits, upright (EXIF); a decoded PIL image."""
    with reading(path, "replace it, or leave it out"), Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(f"its mode {image.mode!r} has no fixed range, 8 or 16 bits a channel "
                             f"are needed")
        return image.convert("RGB")


@lru_cache(maxsize=1)
def voc_colours():
    """PASCAL VOC's colours (256, 3) uint8: a value's bits over the high bits of R, G, B."""
    def spread(value, channel):
        return sum((value >> (3 * j + channel) & 1) << (7 - j) for j in range(3))

    colours = [[spread(value, channel) for channel in range(3)] for value in range(256)]
    return np.array(colours, np.uint8)


def read_mask(path, num_classes=MOST_CLASSES, size=None):
    """A mask as (H, W) uint8 in {0, 1..num_classes, 255}; size is the (H, W) it must have.

    Raises FileNotFoundError, or ValueError on an unreadable file, another value or another size.
    """
    remedy = "a mask is an 8-bit PNG: 0 background, k for class k, 255 ignored"
    with reading(path, remedy), Image.open(path) as image:
        mask = decode_mask(image, num_classes)
        if (wrong := mask[(mask > num_classes) & (mask != IGNORE)]).size:
            raise ValueError(f"it holds the value {wrong[0]}, allowed are 0..{num_classes} and "
                             f"{IGNORE}")
    if size is not None and mask.shape != tuple(size):
        raise ValueError(f"{path} is {mask.shape[0]} x {mask.shape[1]} pixels, its image "
                         f"{size[0]} x {size[1]} (upright, where EXIF turns it): a mask goes with "
                         "the upright image")
    return mask


def decode_mask(image, num_classes):
    """The values (H, W) uint8 that a mask, as Pillow opened it, stands for.

    Optimisers re-index palettes ([0, 3, 255] becomes [0, 1, 2] with the same colours), so a
    palette whose colours are all VOC's, or all the grey levels of values, is taken for what they
    mean. Other palettes, which data sets choose for display, are taken by index. Raises ValueError
    where only some of the colours are VOC's, for another value than their index.
    """
    if image.mode == "L":
        return np.array(image)
    if image.mode == "1":
        return np.array(image).astype(np.uint8) * 255  # as in a file of 8 bits
    if image.mode.startswith("I"):
        values = np.array(image)
        if values.max() > IGNORE:
            raise ValueError(f"it holds the value {values.max()}, allowed are 0..{num_classes} "
                             f"and {IGNORE}")
        return values.astype(np.uint8)
    if image.mode == "P":
        index, colours = np.array(image), np.reshape(image.getpalette("RGB"), (-1, 3))
    elif image.mode in ("RGB", "RGBA"):
        pixels = np.array(image.convert("RGB"))
        colours, index = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
        index = index.reshape(pixels.shape[:2])
    else:
        raise ValueError(f"its mode {image.mode!r} holds no values")

    # What each colour of the palette means, in VOC's colour map and as a grey level.
    colours = [tuple(colour) for colour in colours.tolist()]
    voc = {tuple(colour): value for value, colour in enumerate(voc_colours().tolist())}
    as_voc = [voc.get(colour) for colour in colours]
    as_grey = [r if r == g == b else None for r, g, b in colours]
    distinct, levels = len(set(colours)) == len(colours), set(as_grey) - {0, IGNORE}
    if list(range(len(colours))) in (as_voc, as_grey):  # in the order of the values
        return index.astype(np.uint8)
    if distinct and None not in as_voc:  # VOC's colours in another order
        return np.array(as_voc, np.uint8)[index]
    if distinct and levels and levels <= set(range(1, num_classes + 1)):  # grey levels likewise
        return np.array(as_grey, np.uint8)[index]
    for i, (colour, value) in enumerate(zip(colours, as_voc)):
        if image.mode != "P" or value not in (None, 0, i):
            means = f"is VOC's for {value}, others are not" if value else "is none of VOC's"
            raise ValueError(f"its colour {colour} {means}: save it in VOC's palette or as grey "
                             f"values")
    return index.astype(np.uint8)


# -------------------------------------------------------------------------------------------------
# Data sets
# -------------------------------------------------------------------------------------------------
class ImageSet:
    """What the stages see of one split of a data set.

    name, split, classes (C names), ids; source: the file that names the classes or lists the
    images. Subclasses give image_path(id), mask_path(id), mask(id) -> (H, W) uint8 and
    read_labels(id) -> class indices.
    """

    source = ""

    def image(self, name):
        return read_image(self.image_path(name))

    @lru_cache(maxsize=None)
    def labels(self, name):
        """Indices of the classes in an image, sorted; each annotation is read once."""
        return self.read_labels(name)

    def label_vector(self, name):
        """Image labels as (C,) float in {0, 1}."""
        vector = torch.zeros(len(self.classes))
        vector[self.labels(name)] = 1
        return vector

    def ground_truth_folders(self):
        return []

    def fingerprint(self):
        """What classes, images and labels are recognised by when a run is resumed."""
        content = [self.classes, [(name, self.labels(name)) for name in self.ids]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


class VOC(ImageSet):
    """A folder as VOC 2012 is laid out; labels.csv may stand in place of Annotations."""

    def __init__(self, folder, split, name, classes, source):
        self.root, self.split, self.name = Path(folder), split, str(name)
        self.classes, self.source = classes, source
        images = self.root / "JPEGImages"
        if not images.is_dir():
            remedy = "it is part of the VOC layout"
            if name == "VOC2012":
                remedy = "add --download, or extract VOCtrainval_11-May-2012.tar under --data-root"
            raise FileNotFoundError(f"no folder {images}: {remedy} (see README)")
        known = Image.registered_extensions()
        self.files = {}  # name -> the image files of that name
        for file in sorted(os.listdir(images)):
            stem, extension = os.path.splitext(file)
            if extension.lower() in known:
                self.files.setdefault(stem, []).append(file)
        self.list = self.root / "ImageSets" / "Segmentation" / f"{split}.txt"
        shipped = Path(__file__).parent / "splits" / f"voc2012_{split}.txt"
        if name == "VOC2012" and not self.list.is_file() and shipped.is_file():
            self.list = shipped
        if not self.list.is_file():
            raise FileNotFoundError(f"no split {split!r}: {self.list} does not exist; write image "
                                    "names there, one a line, or give another split (--split; of "
                                    "train_seg.py --predict-split)")
        lines = [line.strip() for line in read_text(self.list).splitlines()]
        self.ids = [self.plain_name(line, self.list) for line in lines if line]
        self.table = self.read_table() if (self.root / "labels.csv").is_file() else None

        if missing := [name for name in self.ids if name not in self.files]:
            if missing[0].split()[-1] in ("1", "-1", "0"):
                raise ValueError(f"{self.list} has the line {missing[0]!r}: it seems to be a list "
                                 "of one class, as in VOC's ImageSets/Main; put the image names "
                                 "alone")
            raise FileNotFoundError(f"{self.list} names {len(missing)} images that are not in "
                                    f"{images}, first {missing[0]!r}; complete the download, or "
                                    f"put a shorter list in {self.root / 'ImageSets'}")
        if twice := [files for files in map(self.files.get, self.ids) if len(files) > 1]:
            raise ValueError(f"{images} holds {' and '.join(twice[0])}, two images of one name: "
                             f"rename or remove one")

    def plain_name(self, name, path):
        """An image's name as a list gives it, with or without a file extension."""
        if name != Path(name).name or "\\" in name:
            raise ValueError(f"{path} names {name!r}, which is not the plain name of an image")
        stem, extension = os.path.splitext(name)
        is_file = name not in self.files and extension.lower() in Image.registered_extensions()
        return stem if is_file else name

    def image_path(self, name):
        return self.root / "JPEGImages" / self.files[name][0]

    def read_table(self):
        """labels.csv -> {image: class names}; a line is an image's name and its classes."""
        path, table = self.root / "labels.csv", {}
        for number, row in enumerate(csv.reader(io.StringIO(read_text(path))), 1):
            cells = [cell.strip() for cell in row if cell.strip()]
            header = number == 1 and cells and cells[0].lower() in CSV_HEADERS
            if not cells or header:
                continue
            if len(cells) == 1:
                raise ValueError(f"line {number} of {path} is {cells[0]!r}: write an image's name "
                                 "and its classes, with commas between them")
            name = self.plain_name(cells[0], path)
            if name not in self.files:
                raise ValueError(f"line {number} of {path} names the image {name!r}, which is not "
                                 f"in {self.root / 'JPEGImages'}")
            table.setdefault(name, []).extend(cells[1:])
        return table

    def read_labels(self, name):
        """Every object of the XML, difficult ones included, or the line of labels.csv."""
        if self.table is not None:
            path = self.root / "labels.csv"
            names = self.table.get(name, [])
        else:
            path = self.root / "Annotations" / f"{name}.xml"
            with reading(path, "image labels come from VOC's Annotations, or from labels.csv "
                               "(see README)"):
                objects = ElementTree.parse(path).getroot().findall("{*}object")
                names = [(o.findtext("{*}name") or "").strip() for o in objects]
        if unknown := [n for n in names if n not in self.classes]:
            raise ValueError(f"{path} names the class {unknown[0]!r} in {name}, which "
                             f"{self.source} does not have")
        if not names:
            raise ValueError(f"{path} names no object in {name}: give its classes, or take it "
                             f"off {self.list}")
        return sorted({self.classes.index(n) for n in names})

    def mask_path(self, name):
        original, sbd = self.ground_truth_folders()
        folders = [original, sbd] if self.split.startswith("trainaug") else [original]
        for folder in folders:
            if (folder / f"{name}.png").is_file():
                return folder / f"{name}.png"
        raise FileNotFoundError(f"no ground truth {name}.png in {' or '.join(map(str, folders))}")

    def mask(self, name):
        return read_mask(self.mask_path(name), len(self.classes))

    def ground_truth_folders(self):
        return [self.root / "SegmentationClass", self.root / "SegmentationClassAug"]


class COCO(ImageSet):
    """MS COCO 2014, splits train and val; images without objects are left out."""

    name = "COCO2014"

    def __init__(self, root, split):
        self.root, self.split = Path(root) / "COCO2014", split
        self.folder = self.root / f"{split}2014"
        self.source = self.root / "annotations" / f"instances_{split}2014.json"
        if split not in ("train", "val"):
            raise FileNotFoundError(f"no split {split!r} in COCO 2014: use train or val")
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no folder {self.folder}: add --download, or extract "
                                    f"{split}2014.zip there (see README)")
        remedy = ("it must be an instances file of COCO: add --download, or extract "
                  "annotations_trainval2014.zip")
        record = read_json(self.source, remedy)
        with reading(self.source, remedy):
            categories = sorted((c["id"], c["name"]) for c in record["categories"])
            self.classes = tuple(name for _, name in categories)
            index = {identity: i for i, (identity, _) in enumerate(categories)}
            files = {i["id"]: (i["file_name"], (i["height"], i["width"]))
                     for i in record["images"]}
            annotations = [(a.get("id"), a["image_id"], a["category_id"], a.get("segmentation"))
                           for a in record["annotations"]]
        if len(files) < len(record["images"]):
            raise ValueError(f"{self.source} gives {len(record['images'])} images {len(files)} "
                             "ids: each needs its own")
        self.collect(files, annotations, index)

    def collect(self, files, annotations, index):
        """Sets ids, files (name -> file, (H, W)), objects (name -> [(id, class index, outline)]).

        files and annotations go by the image ids of the JSON; index: category id -> class index.
        """
        if lost := [identity for identity, image, _, _ in annotations if image not in files]:
            raise ValueError(f"{self.source}: {len(lost)} annotations belong to no image, first "
                             f"{lost[0]}: correct their image_id")
        if lost := [a for a in annotations if a[2] not in index]:
            identity, _, category, _ = lost[0]
            raise ValueError(f"{self.source}: annotation {identity} has the unknown category "
                             f"{category}")

        # by image, whose name is that of its file without folder and extension
        objects = {}
        for identity, image, category, outline in annotations:
            objects.setdefault(image, []).append((identity, index[category], outline))
        names = {image: Path(files[image][0]).stem for image in objects}
        if twice := [n for n, count in Counter(names.values()).items() if count > 1]:
            both = [files[image][0] for image, n in names.items() if n == twice[0]]
            raise ValueError(f"{self.source} has two images of one name, "
                             f"{' and '.join(both[:2])}: rename one")
        if len(objects) < len(files) and not rank():
            print(f"{self.source.name}: {len(files) - len(objects)} of {len(files)} images have "
                  "no object and are left out")
        self.objects = {names[image]: found for image, found in objects.items()}
        self.files = {names[image]: files[image] for image in objects}
        self.ids = sorted(self.objects)

        # every file is there, and below the folder
        for name in self.ids:
            path = Path(self.files[name][0])
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{self.source} names the file {str(path)!r}, which is not below "
                                 f"{self.folder}")
        if missing := [name for name in self.ids if not self.image_path(name).is_file()]:
            raise FileNotFoundError(f"{self.source} names {len(missing)} images that are not in "
                                    f"{self.folder}, first {self.files[missing[0]][0]!r}; "
                                    "complete the download")

    def image_path(self, name):
        return self.folder / self.files[name][0]

    def image(self, name):
        image, (H, W) = super().image(name), self.files[name][1]
        if image.size != (W, H):
            raise ValueError(f"{self.image_path(name)} is {image.height} x {image.width} pixels "
                             f"(upright, where EXIF turns it), {self.source} says {H} x {W}: "
                             "correct one")
        return image

    def mask_path(self, name):
        return self.source

    def read_labels(self, name):
        return sorted({index for _, index, _ in self.objects[name]})

    def mask(self, name):
        """The objects drawn, those of fewer pixels over those of more: (H, W) uint8."""
        mask, drawn = np.zeros(self.files[name][1], np.uint8), []
        for identity, index, outline in self.objects[name]:
            with reading(self.source, f"the outline of annotation {identity} ({name}) must be "
                                      f"polygons or run lengths"):
                drawn.append((draw_object(outline, *mask.shape), mask_value(index)))
        for pixels, value in sorted(drawn, key=lambda one: -one[0].sum()):
            mask[pixels] = value
        return mask


def draw_object(outline, H, W):
    """The pixels (H, W) bool of a COCO segmentation: a list of polygons, or run lengths (crowds).

    A polygon has the pixels whose centre is inside, cut at the image's border. Pillow truncates
    corners and fills the edge, so it is drawn four times as large, which leaves an eighth of a
    pixel too much.
    """
    if isinstance(outline, dict):
        return decode_rle(outline, H, W).astype(bool)
    mask = np.zeros((H, W), bool)
    polygons = [np.reshape(p, (-1, 2)).astype(float) for p in outline if len(p) >= 6]
    if not polygons:
        return mask
    points = np.concatenate(polygons)
    if not (np.abs(points) < 1e6).all():
        raise ValueError("a coordinate is not a number, or a million pixels away")
    left, top = np.floor(points.min(0)).clip(0, (W, H)).astype(int)
    right, bottom = np.ceil(points.max(0)).clip(0, (W, H)).astype(int)
    fine = Image.new("L", (4 * int(right - left), 4 * int(bottom - top)))
    for polygon in polygons:
        corners = 4 * (polygon - (left, top)) + 0.5
        ImageDraw.Draw(fine).polygon([tuple(xy) for xy in corners], fill=1)
    mask[top:bottom, left:right] = np.asarray(fine)[2::4, 2::4]
    return mask


def decode_rle(outline, H, W):
    """COCO run lengths (a list, or the compressed string), by column -> (H, W) uint8 {0, 1}."""
    counts = outline["counts"]
    if isinstance(counts, str):
        # 5 bits a character, bit 5: more follow; from the third count on, deltas to two before
        values, value, shift = [], 0, 0
        for character in counts.encode():
            bits = character - 48
            value |= (bits & 31) << shift
            shift += 5
            if not bits & 32:
                if bits & 16:
                    value |= -1 << shift
                values.append(value + (values[-2] if len(values) > 2 else 0))
                value = shift = 0
        counts = values
    if list(outline["size"]) != [H, W] or sum(counts) != H * W or min(counts, default=0) < 0:
        raise ValueError(f"run lengths of {sum(counts)} pixels, size {outline['size']}, for an "
                         f"image of {H} x {W}")
    flat = np.repeat(np.arange(len(counts), dtype=np.uint8) % 2, counts)
    return flat.reshape(W, H).T


class Toy(ImageSet):
    """Images made on the fly, 64 x 64: objects on clutter. Same name, same image.

    As in photographs, the class shows best in a part of the object (a textured badge on a plain
    body, whose hue hints at the class), several objects and classes share an image, and grey
    bodies without a badge are background.
    """

    name, classes = "toy", TOY_CLASSES

    def __init__(self, split):
        if split not in TOY_SIZES:
            raise FileNotFoundError(f"no split {split!r} in toy: use {' or '.join(TOY_SIZES)}")
        self.split = split
        self.ids = [f"toy_{split}_{i:04d}" for i in range(TOY_SIZES[split])]

    def image_path(self, name):
        return name

    mask_path = image_path

    def image(self, name):
        return Image.fromarray(draw_toy(name)[0])

    def read_labels(self, name):
        return draw_toy(name)[2]

    def mask(self, name):
        return draw_toy(name)[1].copy()


@lru_cache(maxsize=None)
def draw_toy(name):
    """A toy image (64, 64, 3) uint8, its exact mask (64, 64) uint8, its class indices."""
    rng = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))
    S = 64
    y, x = np.mgrid[:S, :S]

    # background: blurred, nearly grey; on it clutter, bodies without a badge
    coarse = Image.fromarray(rng.integers(40, 216, (6, 6, 3), dtype=np.uint8))
    coarse = coarse.resize((S, S), Image.BICUBIC)
    grey = np.asarray(coarse, np.float32).mean(-1, keepdims=True)
    image = 0.8 * grey + 0.2 * np.asarray(coarse, np.float32)
    for _ in range(rng.integers(2, 5)):
        body, _, _ = toy_body(rng, y, x, rng.uniform(5, 10))
        image[body] = rng.uniform(40, 215) + rng.uniform(-15, 15, 3)

    # objects, unless they would hide another
    mask, classes = np.zeros((S, S), np.uint8), set()
    for _ in range(rng.integers(1, 4)):
        k = int(rng.integers(len(TOY_CLASSES)))
        radius = rng.uniform(14, 24)
        body, cy, cx = toy_body(rng, y, x, radius)
        if (mask[body] > 0).sum() > 0.3 * body.sum():
            continue
        hue = 2 * math.pi * k / len(TOY_CLASSES) + rng.normal(0, 0.5)
        colour = 135 + 95 * np.cos(hue - np.array([0, 2, 4]) * math.pi / 3)  # in R, G, B
        u, v = y - cy, x - cx
        texture = [u % 4 < 2, v % 4 < 2, (u + v) % 5 < 2.5, (u // 3 + v // 3) % 2 == 0,
                   (u % 5 < 3) & (v % 5 < 3), np.hypot(u, v) % 4 < 2][k]
        image[body] = colour
        badge = body & (np.hypot(u - rng.uniform(-3, 3), v - rng.uniform(-3, 3)) < 0.4 * radius)
        image[badge & texture] = colour * 0.35
        mask[body] = mask_value(k)
        classes.add(k)
    image = image * rng.uniform(0.85, 1.1) + rng.normal(0, 7, (S, S, 3))
    return image.clip(0, 255).astype(np.uint8), mask, sorted(classes)


def toy_body(rng, y, x, radius):
    """A random ellipse or box, turned at random -> mask (S, S) bool and its centre."""
    cy, cx = rng.uniform(radius * 0.7, y.shape[0] - radius * 0.7, 2).round()
    angle, stretch = rng.uniform(0, math.pi), rng.uniform(0.7, 1.0)
    u = (y - cy) * math.cos(angle) + (x - cx) * math.sin(angle)
    v = ((x - cx) * math.cos(angle) - (y - cy) * math.sin(angle)) / stretch
    if rng.random() < 0.5:
        return np.hypot(u, v) < radius, cy, cx
    return np.maximum(abs(u), abs(v)) < radius * 0.85, cy, cx


# -------------------------------------------------------------------------------------------------
# Opening a data set
# -------------------------------------------------------------------------------------------------
DATASETS = ("VOC2012", "COCO2014", "toy")


def training_split(name):
    """The split a data set is trained on unless --split says otherwise."""
    return "trainaug" if name == "VOC2012" else "train"


def open_data(name, root, split, limit=None, classes=None):
    """One split of a data set, checked: an ImageSet.

    name: one of DATASETS (under root), or a folder in VOC layout with its own classes, named in
    the file classes. limit: only the first so many images. Raises ValueError and
    FileNotFoundError on whatever does not fit together.
    """
    if name not in DATASETS and not Path(name).is_dir():
        raise ValueError(f"no data set or folder {name!r}: use {', '.join(DATASETS)}, or a folder "
                         "in VOC layout, with --classes")
    if name not in DATASETS and not classes:
        raise ValueError(f"--data {name} needs --classes: a file that lists its class names, one "
                         "a line")
    if name in DATASETS and classes:
        raise ValueError(f"--classes {classes}: {name} has classes of its own; --classes goes "
                         f"with --data FOLDER")
    if name == "VOC2012":
        dataset = VOC(Path(root) / "VOCdevkit" / "VOC2012", split, name, VOC_CLASSES, "VOC 2012")
    elif name == "COCO2014":
        dataset = COCO(root, split)
    elif name == "toy":
        dataset = Toy(split)
    else:
        names = tuple(line.strip() for line in read_text(classes).splitlines() if line.strip())
        check_classes(names, classes)
        dataset = VOC(name, split, name, names, classes)
    check_classes(dataset.classes, dataset.source)
    if not dataset.ids:
        raise ValueError(f"the split {split!r} of {name} is empty")
    if twice := [one for one, count in Counter(dataset.ids).items() if count > 1]:
        raise ValueError(f"the split {split!r} of {name} lists {twice[0]!r} more than once")
    dataset.ids = dataset.ids[:limit]
    return dataset


def check_classes(names, source):
    """Class k is value k of a mask: 1 to 254 different names, none of them background."""
    if not 1 <= len(names) <= MOST_CLASSES:
        raise ValueError(f"{source} names {len(names)} classes: 1 to {MOST_CLASSES} fit in an "
                         f"8-bit mask")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{source} names the class {twice[0]!r} more than once")
    if reserved := [name for name in names if name.strip("_ ").lower() in RESERVED]:
        raise ValueError(f"{source} lists {reserved[0]!r}, which is no class: value k of a mask "
                         f"is class k of the list, 0 is background and {IGNORE} ignored; take "
                         "that line out")


def open_split(args, split, like=None):
    """open_data by the command line; like: a split which must have the same classes."""
    dataset = open_data(args.data, args.data_root, split, args.limit, args.classes)
    if like is not None:
        need_same_classes(like.classes, like.source, dataset.classes, dataset.source)
    return dataset


def need_same_classes(one, one_source, other, other_source):
    """Raises ValueError that names both sources and the first difference."""
    one, other = list(one), list(other)
    if one != other:
        k = next(i for i in range(len(one) + len(other)) if one[i:i + 1] != other[i:i + 1])
        names = [repr(classes[k]) if k < len(classes) else "missing" for classes in (one, other)]
        raise ValueError(f"{one_source} and {other_source} disagree about the classes: class "
                         f"{k + 1} is {names[0]} in the first, {names[1]} in the second")


PARTS = {"VOC2012": ("JPEGImages", "Annotations"),
         "COCO2014": ("train2014", "val2014", "annotations")}
VOC_TAR, COCO_ZIPS = DATASET_YEAR_DICT["2012"], "http://images.cocodataset.org"
ARCHIVES = {  # data set -> where it goes under --data-root; address, MD5, folder in it, GB
    "VOC2012": ("VOCdevkit/VOC2012", [(VOC_TAR["url"], VOC_TAR["md5"], ".", 2.0)]),
    "COCO2014": ("COCO2014", [
        (f"{COCO_ZIPS}/annotations/annotations_trainval2014.zip",
         "0a379cfc70b0e71301e0f377548639bd", "COCO2014", 0.25),
        (f"{COCO_ZIPS}/zips/val2014.zip", "a3d79f5ed8d289b7a7554ce06a5782b3", "COCO2014", 6.6),
        (f"{COCO_ZIPS}/zips/train2014.zip", "0da8c0bd3d6becc4dcb32757491aca88", "COCO2014", 13.5),
    ])}


def download(name, root):
    """Fetch, check and extract a data set as the README lays it out, unless it is there.

    Archives are kept in <root>/download/<name> until all are extracted there; only then does the
    data set take its place, so that half of it is never taken for all. Raises ValueError and
    OSError with the remedy.
    """
    if name not in ARCHIVES:
        raise ValueError(f"--download: {name} is not to be had there; it goes with --data "
                         f"{' or '.join(ARCHIVES)}")
    place, archives = ARCHIVES[name]
    target, fetched = Path(root) / place, Path(root) / "download" / name
    if target.is_dir():
        if missing := [part for part in PARTS[name] if not (target / part).is_dir()]:
            raise ValueError(f"{target} is there, but lacks {missing[0]}: complete it by hand, or "
                             "move it away and give --download again")
        return

    # room for archives and images
    size = sum(gigabytes for *_, gigabytes in archives)
    print(f"{name}: {size:.1f} GB to download into {fetched}, as much to extract", flush=True)
    fetched.mkdir(parents=True, exist_ok=True)
    there = sum(file.stat().st_size for file in fetched.rglob("*") if file.is_file())
    free, needed = shutil.disk_usage(fetched).free, 2e9 * size - there
    if free < needed:
        raise OSError(f"{fetched} has {free / 1e9:.1f} GB free, {name} takes {needed / 1e9:.1f} "
                      "more: make room, or give another --data-root")

    # all of them, then move
    try:
        for address, md5, folder, _ in archives:
            extracted = fetched / "extracted" / folder
            download_and_extract_archive(address, fetched, extracted, md5=md5)
    except (RuntimeError, OSError, EOFError) as error:  # a wrong checksum is a RuntimeError
        every = " and ".join(address for address, *_ in archives)
        raise OSError(f"{address} could not be fetched ({error}): try again, or fetch {every} "
                      f"elsewhere, put them into {fetched} and give the same command") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(fetched / "extracted" / place, target)
    shutil.rmtree(fetched)
    if not any(fetched.parent.iterdir()):
        fetched.parent.rmdir()


# -------------------------------------------------------------------------------------------------
# Loading. Images travel as uint8 and are normalised on the device.
# -------------------------------------------------------------------------------------------------
@lru_cache(maxsize=None)
def per_channel(values, device):
    """(3,) numbers -> (3, 1, 1) on the device, copied there once."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def normalise(images):
    """uint8 (B, 3, H, W) -> float, ImageNet-normalised."""
    mean, std = (per_channel(v, images.device) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() / 255 - mean) / std


def bilinear(maps, size):
    """maps (B, K, h, w) -> (B, K, H, W), size = (H, W), corners not aligned."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def mirrored_views(images, scale, multiple):
    """An image (1, 3, H, W) at a scale and its mirror image -> (2, 3, ., .), its size (h, w).

    Right and bottom are padded to whole multiples (of the patch size); results are to be cropped
    to (h, w).
    """
    h, w = (max(1, round(side * scale)) for side in images.shape[-2:])
    if scale != 1:
        images = bilinear(images, (h, w))
    both = torch.cat([images, images.flip(-1)])
    return F.pad(both, [0, -w % multiple, 0, -h % multiple], mode="replicate"), (h, w)


@lru_cache(maxsize=None)
def say_once(text):
    print(text, flush=True)


def shrink(pixels, max_side):
    """pixels (3, H, W) uint8, made smaller if a side is longer than max_side."""
    H, W = pixels.shape[-2:]
    if max(H, W) <= max_side:
        return pixels
    say_once(f"photographs are shrunk to {max_side} px (--max-side) and their masks enlarged "
             f"again")
    scale = max_side / max(H, W)
    return TF.resize(pixels, [max(1, round(H * scale)), max(1, round(W * scale))], antialias=True)


def enlarge(mask, size):
    """A mask (h, w) at another size (H, W), by nearest neighbour; what shrink did, undone."""
    if mask.shape == tuple(size):
        return mask
    larger = F.interpolate(mask[None, None].float(), size=tuple(size), mode="nearest-exact")
    return larger[0, 0].to(mask.dtype)


@contextmanager
def seeded(seed):
    """Random transforms inside depend on seed alone, not on what ran before."""
    with torch.random.fork_rng(devices=[]):  # a GPU's generator, for drop-path, is left alone
        torch.default_generator.manual_seed(seed)
        yield


class EpochSampler(DistributedSampler):
    """(index, seed) in an order that depends on (seed, epoch) alone: call set_epoch."""

    def __iter__(self):
        for index in super().__iter__():
            yield index, random.Random(f"{self.seed}/{self.epoch}/{index}").getrandbits(62)


def train_loader(samples, batch, seed, workers, device):
    """A shuffling DataLoader without the last short batch: call loader.sampler.set_epoch(e).

    batch is that of all processes together; each gets its share. The loader's own generator keeps
    it from drawing on the global one, on which drop-path and dropout depend.
    """
    if batch > len(samples):
        raise ValueError(f"--batch {batch} with {len(samples)} images: give a --batch of 1 to "
                         f"{len(samples)}")
    if batch % world():
        raise ValueError(f"--batch {batch} is shared by {world()} processes: it must be a "
                         f"multiple of {world()}")
    sampler = EpochSampler(samples, world(), rank(), seed=100_003 * seed, drop_last=True)
    return DataLoader(
        samples, batch // world(), sampler=sampler, num_workers=workers, drop_last=True,
        pin_memory=device.type == "cuda", persistent_workers=workers > 0,
        generator=torch.Generator())


def load_image(dataset, name):
    return name, TF.pil_to_tensor(dataset.image(name))


def load_images(dataset, names, workers, device):
    """(name, image (3, H, W) uint8) in order; workers decode ahead if a GPU does the rest."""
    workers = workers if device.type == "cuda" else 0
    return DataLoader(names, batch_size=None, num_workers=workers, generator=torch.Generator(),
                      collate_fn=partial(load_image, dataset))  # which runs in the workers


def photo_files(paths):
    """The image files among paths and in the folders among them; an error if there are none."""
    known, files = Image.registered_extensions(), []
    for path in paths:
        if path.is_dir():
            files += [file for file in sorted(path.iterdir()) if file.suffix.lower() in known]
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"no photograph or folder {path}")
    if not files:
        raise ValueError(f"no image that Pillow reads in {', '.join(map(str, paths))} (folders "
                         "inside are not searched)")
    if twice := [stem for stem, count in Counter(f.stem for f in files).items() if count > 1]:
        raise ValueError(f"two photographs are called {twice[0]!r}: their masks would overwrite "
                         f"each other, rename one")
    return files


def read_photos(paths):
    """Yields (path, pixels (3, H, W) uint8) of photo_files; an error about others at the end."""
    errors = []
    for path in photo_files(paths):
        try:
            image = read_image(path)
        except ValueError as error:
            errors.append(error)
            continue
        yield path, TF.pil_to_tensor(image)
    if errors:
        raise ValueError(f"{len(errors)} left out: {errors[0]}")


# -------------------------------------------------------------------------------------------------
# The files of a run: one writer, one reader each
# -------------------------------------------------------------------------------------------------
@contextmanager
def replacing(path):
    """Yields a temporary path, which takes the place of path if the block went well.

    Raises OSError if the block does (a full disk): then path is what it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error}): what was there is unchanged; make "
                      "room, or allow writing there, and give the same command again, a stage "
                      "with --resume") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_picture(path, image):
    """A PIL image as PNG or JPEG, by the path's suffix."""
    with replacing(path) as temporary:
        image.save(temporary, format={".png": "PNG", ".jpg": "JPEG"}[Path(path).suffix])


def write_mask(path, mask):
    """(H, W) uint8 -> palette PNG (0 background, 1..C, 255 ignore)."""
    image = Image.fromarray(np.asarray(mask, np.uint8))
    image.putpalette(voc_colours().ravel().tolist())
    write_picture(path, image)


def write_overlay(path, pixels, mask, opacity, legend):
    """A mask laid over a photograph in VOC's colours, with names below it, as JPEG.

    pixels (3, H, W) uint8; mask (H, W); opacity (H, W) in [0, 1]; legend: name -> mask value.
    """
    photo, opacity, colours = pixels.permute(1, 2, 0).numpy(), opacity[..., None], voc_colours()
    mixed = Image.fromarray(((1 - opacity) * photo + opacity * colours[mask]).astype(np.uint8))
    text_width = 24 + 7 * max(map(len, legend), default=0)
    size = max(mixed.width, text_width), mixed.height + 16 * len(legend)
    sheet = Image.new("RGB", size, "white")
    sheet.paste(mixed)
    draw = ImageDraw.Draw(sheet)
    for i, (name, value) in enumerate(legend.items()):
        top = mixed.height + 16 * i
        draw.rectangle((4, top + 3, 14, top + 13), fill=tuple(colours[value].tolist()))
        draw.text((20, top + 2), name, fill="black")
    write_picture(path, sheet)


def write_cam(path, class_ids, cam, size):
    """class_ids (K,), cam (K, h, w) in [0, 1], size (H, W) of the image -> .npz, float16."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, class_ids=np.asarray(class_ids, np.int16), cam=np.asarray(cam, np.float16),
                 size=np.asarray(size, np.int32))


def read_cam(path):
    """-> class_ids (K,) int64 tensor, cam (K, h, w) float32 tensor, (H, W)."""
    remedy = "delete it and run refine.py --resume"
    with reading(path, remedy), np.load(path, allow_pickle=False) as record:
        class_ids = torch.from_numpy(record["class_ids"].astype(np.int64))
        cam = torch.from_numpy(record["cam"].astype(np.float32))
        H, W = record["size"].tolist()
        if cam.ndim != 3 or len(class_ids) != len(cam):
            raise ValueError(f"{len(class_ids)} classes and maps {tuple(cam.shape)}")
    return class_ids, cam, (H, W)


def need_files(folder, ids, suffix, remedy):
    """Raises FileNotFoundError that counts and names the ids without a file in folder."""
    missing = [name for name in ids if not (folder / f"{name}{suffix}").is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(ids)} files are missing in {folder}: "
                                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; "
                                f"{remedy}")


def write_json(path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def append_result(out, record):
    """Append a record to <out>/results.json, a list."""
    path = Path(out) / "results.json"
    records = read_json(path, "delete it to start a new list") if path.is_file() else []
    write_json(path, records + [record])


def progress(text):
    """A line that the next one overwrites, on a terminal only."""
    if sys.stdout.isatty() and not rank():
        print(f"\r  {text:<76}", end="\r" if not text else "", flush=True)


def log_line(folder, record):
    """One training log line: printed for people, appended to <folder>/log.jsonl for programs."""
    if rank():
        return
    path = Path(folder) / "log.jsonl"
    before = read_text(path) if path.is_file() else ""
    with replacing(path) as temporary:  # whole lines only, whatever happens
        temporary.write_text(before + json.dumps(record) + "\n", encoding="utf-8")
    progress("")
    shown = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()]
    print("  ".join(shown), flush=True)


def read_log(folder):
    """The records of a stage's log."""
    path = Path(folder) / "log.jsonl"
    return [json.loads(line) for line in read_text(path).splitlines()] if path.is_file() else []


def go_on(folder, epoch):
    """Say where a resumed training goes on, and take what comes after it out of its log."""
    path = Path(folder) / "log.jsonl"
    if rank() or not path.is_file():
        return
    kept = [record for record in read_log(folder) if record.get("epoch", math.inf) <= epoch]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
    where = f"going on after epoch {epoch}" if epoch else "no checkpoint yet, starting again"
    print(f"{folder}: {where}", flush=True)


def seed_epoch(seed, epoch):
    """For drop-path and dropout: an epoch that is resumed repeats them."""
    torch.manual_seed((seed * 100_003 + epoch) * world() + rank())


def need_finite(losses, folder, epoch, step):
    """FloatingPointError, which says what is on disk, unless a sum of losses is finite."""
    if not losses.isfinite().all():
        last = Path(folder) / "last.pt"
        on_disk = f"the last good state is {last}" if last.is_file() else "nothing is written yet"
        raise FloatingPointError(f"the loss is not finite in epoch {epoch + 1}, step "
                                 f"{max(1, step - 19)} to {step}; {on_disk}. Lower --lr, or look "
                                 "at the images of these steps")


SECONDS_BETWEEN_CHECKPOINTS = 60  # at least: they would cost a GPU a tenth of its time


def write_checkpoint(path, checkpoint):
    """Plain types and tensors only, so that read_checkpoint can refuse everything else."""
    if rank():
        return
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)  # to a file, a full disk would end in an error of zip's innards
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())  # on the disk before it takes the old one's place


def read_checkpoint(path, stage, dataset=None, options=None):
    """A checkpoint of stage ("cls" or "seg"), on the CPU.

    dataset: whose name and classes it must have; options: data_flags of the command line, for
    the command that makes it, where the data are known. Raises FileNotFoundError with the remedy;
    ValueError if unreadable or of something else.
    """
    command = {"cls": "train_cls.py", "seg": "train_seg.py"}[stage]
    if not Path(path).is_file():
        remedy = f"give the --out of a run that {command} has trained"
        if options:
            remedy = f"make it with  python {command} {options} --out "
            remedy += quoted(Path(path).parent.parent)
        raise FileNotFoundError(f"no checkpoint {path}: {remedy}")
    with reading(path, f"it must be a checkpoint that {command} wrote"):
        if code := torch.serialization.get_unsafe_globals_in_checkpoint(path):
            raise ValueError(f"it wants to run code ({code[0]}), which is refused: load it where "
                             "you trust it and save plain dicts, numbers and tensors alone")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = checkpoint["config"]
        if checkpoint["stage"] != stage:
            raise ValueError(f"it is of stage {checkpoint['stage']!r}, not {stage!r}")
        classes, name = config["classes"], Path(config["data"]).name
    if dataset is not None:
        if name != Path(dataset.name).name:
            raise ValueError(f"{path} was trained on {config['data']}, not on {dataset.name}: "
                             f"give the --out of such a run")
        need_same_classes(classes, path, dataset.classes, dataset.source or dataset.name)
    return checkpoint


def file_digest(*paths):
    """What the content of files is recognised by: 16 digits of their SHA-256."""
    content = hashlib.sha256()
    for path in paths:
        with reading(path, "put it back, as what was made from it is compared with it"):
            content.update(Path(path).read_bytes())
    return content.hexdigest()[:16]


# Flags that may differ when a run is resumed; and those that may name a file or a folder.
FREE_TO_CHANGE = {"resume", "overwrite", "device", "workers", "out", "data_root", "profile",
                  "download", "predict_split", "predict_only", "branch_from"}
PATHS = {"data", "classes", "masks", "pretrained"}


def prepare_folder(folder, args, dataset, made_from):
    """Make a stage's folder and its args.json: claim_folder, of several processes by one.

    made_from: what -> paths of files. Their content, that of images and labels, and the flags are
    the settings.
    """
    if not rank():
        claim_folder(folder, args, stage_settings(args, dataset, made_from))
    wait_for_all()


def claim_folder(folder, args, settings):
    """Make a folder, with its settings in args.json.

    A folder in use needs --resume (the same settings, else ValueError) or --overwrite (its files
    are deleted).
    """
    folder = Path(folder)
    used = folder.is_dir() and any(not file.name.endswith(".tmp") for file in folder.iterdir())
    if used and args.resume:
        need_same_settings(folder, settings)
        for temporary in folder.glob(".*.tmp"):  # what replacing() left when it was killed
            temporary.unlink(missing_ok=True)
    elif used and args.overwrite:
        shutil.rmtree(folder)
    elif used:
        raise ValueError(f"{folder} is in use: go on with --resume, replace it with --overwrite, "
                         f"or choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "args.json", settings)


def stage_settings(args, dataset, made_from):
    """What args.json holds: the flags, the classes, and what the stage was made from."""
    settings = {}
    for key, value in vars(args).items():
        if key in PATHS and value and Path(value).exists():
            value = Path(value).resolve()  # however it was spelled
        if key not in FREE_TO_CHANGE:
            settings[key] = str(value) if isinstance(value, Path) else value
    settings["class_names"] = list(dataset.classes)
    settings["made_from"] = {"images and labels": dataset.fingerprint()}
    for what, paths in made_from.items():
        settings["made_from"][what] = file_digest(*paths)
    return settings


def need_same_settings(folder, settings):
    """Raises ValueError that names the first difference from <folder>/args.json."""
    if not (folder / "args.json").is_file():
        raise ValueError(f"--resume in {folder}, which has no args.json: replace it with "
                         "--overwrite, or choose another --out")
    before = read_json(folder / "args.json", "delete the folder to start again")
    was, now = before.get("made_from", {}), settings["made_from"]
    for what in {**was, **now}:
        if what not in now:
            raise ValueError(f"--resume in {folder} without the {what}: name it again")
        if was.get(what) != now[what]:
            raise ValueError(f"--resume in {folder}, but the {what} changed since: start again "
                             f"with --overwrite")
    for key, value in settings.items():
        if before.get(key, value) != value:  # a flag that was not there then does not matter
            raise ValueError(f"--resume in {folder} with another --{key.replace('_', '-')}: it "
                             f"was {before.get(key)!r}, now {value!r}; repeat the settings or use "
                             "another --out")


# -------------------------------------------------------------------------------------------------
# Several processes: torchrun --nproc_per_node=N train_cls.py ...
# -------------------------------------------------------------------------------------------------
def rank():
    """This process's number, 0 .. world() - 1; 0 writes the logs and checkpoints."""
    return int(os.environ.get("RANK", 0))


def world():
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join(device):
    """Join the other processes, if there are any."""
    if world() > 1 and not dist.is_initialized():
        # hours, because in stages 2 and 3 the fast processes wait for the slow ones at the end
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=12),
                                device_id=device if cuda else None)
        atexit.register(dist.destroy_process_group)
    if rank():  # one of them speaks
        sys.stdout = open(os.devnull, "w")


def share(items):
    """The part of a list that this process works on."""
    return items[rank()::world()]


def wait_for_all():
    if world() > 1:
        dist.barrier()


def sum_over_all(tensor):
    """The sum of a tensor over all processes, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def distributed(model, device):
    """The model as it is, or in DistributedDataParallel (with batch statistics over all GPUs)."""
    if world() == 1:
        return model
    cuda = device.type == "cuda"
    if cuda:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return torch.nn.parallel.DistributedDataParallel(
        model, [device.index] if cuda else None, broadcast_buffers=not cuda,
        gradient_as_bucket_view=True)


def run(main):
    """Call a main: an error of the user is one line and exit code 2, a fault a traceback.

    Of several processes the one that fails ends at once: good-byes would wait for those that wait
    for it.
    """
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted (stages 1 to 3 go on with --resume)", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # of a reader such as head, who has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        lines = "".join(traceback.format_exception(error)).strip().splitlines()
        if isinstance(error, OSError) or was_raised_here(lines):
            print(f"error: {lines[-1].partition(': ')[2]}", file=sys.stderr)
            code = 2
        else:
            print(*lines, sep="\n", file=sys.stderr)
            code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if world() > 1:
        os._exit(code)
    sys.exit(code)


def was_raised_here(lines):
    """Whether a traceback ends at a raise of this project; that of a loader's worker is text."""
    last = max(i for i, line in enumerate(lines) if line.startswith('  File "'))
    file = Path(lines[last].split('"')[1])  # not in .venv, which may lie in the same folder
    return file.parent == Path(__file__).parent and lines[last + 1].strip().startswith("raise")


# -------------------------------------------------------------------------------------------------
# The command line that all stages share
# -------------------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (--help lists the flags)")  # one line, as all of them


def number(kind, least, most=math.inf):
    """The argparse type of a flag: an int or a float in [least, most], so neither nan nor inf."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and math.isfinite(value)):
            what = "a whole number" if kind is int else "a number"
            limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text} is not {what} {limits}")
        return value

    return parse


def argument_parser(description):
    """A parser with the flags that mean the same in every script."""
    wide = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=110)
    parser = Parser(description=description, formatter_class=wide, allow_abbrev=False,
                    usage="python %(prog)s --data DATA [flags]")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="VOC2012",
        help=f"{', '.join(DATASETS)}, or a folder in VOC layout, with --classes")
    add("--classes", metavar="FILE", help="for --data FOLDER: its class names, one a line")
    add("--data-root", default="data", metavar="DIR",
        help="holds VOCdevkit/VOC2012 or COCO2014 (default data)")
    add("--limit", type=number(int, 1), metavar="N",
        help="use only the first N images of each split")
    add = parser.add_argument_group("machine and output").add_argument
    add("--out", metavar="DIR", help="output folder (default runs/<data>)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="default cuda if there is one")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of matrix products; auto (default): bfloat16 where the device has it natively, for "
             "--data toy float32")
    add("--workers", type=number(int, 0), default=default_workers(),
        help="processes that load images (default: half the cores, of several processes each its "
             "share, at most 8)")
    add("--seed", type=number(int, 0, 2**31), default=0, metavar="N",
        help="of weights, order, crops and drop-path (default 0)")
    add("--deterministic", action="store_true",
        help="on CUDA: the same bits again (a CPU always gives them)")
    return parser


def default_workers():
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine
    return min(8, (os.cpu_count() or 2) // 2 // local_world)


def resuming_arguments(parser):
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on where an interrupted run stopped")
    add("--overwrite", action="store_true", help="replace what an earlier run wrote")


def start(args):
    """The device, after checking that it is there; sets the seed, args.out and args.precision."""
    args.out, device = Path(args.out or Path("runs") / Path(args.data).resolve().name), None
    try:
        device = torch.device(args.device)
        if device.type == "cuda" and world() > 1:  # each process has a card of its own
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except Exception as error:  # each backend has its own way to say that it is not there
        raise ValueError(f"--device {device or args.device}: not there, or unknown to this torch "
                         f"({str(error).splitlines()[0]}); use cpu, or cuda with an NVIDIA GPU "
                         "and a CUDA build of torch") from error
    if args.precision == "auto":
        faster = native_bfloat16(device) and args.data != "toy"  # whose products are too small
        args.precision = "bfloat16" if faster else "float32"
    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    join(device)
    return device


def device_name(device):
    """The name of the CUDA card, else "CPU" or the like."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def native_bfloat16(device):
    """Whether the device multiplies bfloat16 natively, so that it is the faster precision."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(device, precision):
    """Matrix products in precision ("bfloat16", "float32"); the rest stays float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def quoted(path):
    """A path as a shell wants it, for printed commands."""
    return shlex.quote(str(path))


def data_flags(args):
    """The part of a command line that names the data, for messages."""
    words = ["--data", args.data]
    if args.classes:
        words += ["--classes", args.classes]
    if args.data_root != "data":
        words += ["--data-root", args.data_root]
    return shlex.join(map(str, words))


# -------------------------------------------------------------------------------------------------
# --profile N
# -------------------------------------------------------------------------------------------------
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}  # bfloat16, dense, by data sheets


def profile_steps(text):
    """The N of --profile N, for argparse."""
    if world() > 1:
        raise argparse.ArgumentTypeError("it times one process: run it without torchrun")
    return number(int, 1)(text)


def profile(step, steps, device, images=1, flops=None):
    """Call step(i) so often; print its phases (record_function; of the CPU), memory, images/s.

    images: of a step; flops: of a step's model, for its utilisation. The phases are timed in up to
    five steps of their own, since the profiler slows small operations down. Returns images/s.
    """
    for i in range(2):
        step(i)
    if cuda := device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for i in range(steps):
        step(2 + i)
    if cuda:
        torch.cuda.synchronize(device)
    seconds = (time.perf_counter() - begin) / steps
    memory = torch.cuda.max_memory_allocated(device) / 2**20 if cuda else peak_memory()

    kinds = torch.profiler.ProfilerActivity
    profiled = min(steps, 5)  # a step has thousands of events
    with torch.profiler.profile(activities=[kinds.CPU] + [kinds.CUDA] * cuda,
                                acc_events=True) as profiler:
        for i in range(profiled):
            step(2 + steps + i)
    phases, busy = {}, 0
    for event in profiler.key_averages():
        if not event.is_user_annotation:
            on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
            busy += event.self_device_time_total if on_gpu else 0
        elif "#" not in event.key:  # those with # are torch's own
            phases[event.key] = max(phases.get(event.key, 0), event.cpu_time_total)
    for name, microseconds in phases.items():
        print(f"  {name:<12} {microseconds / 1e3 / profiled:9.1f} ms  "
              f"{100 * microseconds / sum(phases.values()):4.0f} %")
    gpu = f"  GPU busy {busy / 1e3 / profiled:.1f} ms" if cuda else ""
    print(f"  {'together':<12} {1e3 * seconds:9.1f} ms  {images / seconds:.1f} images/s  peak "
          f"memory {memory:.0f} MiB{gpu}")
    if flops:
        name = device_name(device)
        peak = next((p for key, p in PEAK_TFLOPS.items() if key in name), None)
        tera = flops / seconds / 1e12
        share = f", {100 * tera / peak:.1f} % of {peak}" if peak else ""
        print(f"  {name}: {tera:.2f} TFLOP/s of the model{share}")
    return images / seconds


def peak_memory():
    """The most memory (MiB) that this process ever had."""
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)
