"""Data sets, the files of a run, and what the stages share: processes, flags, errors.

Image labels come from annotation lists (XML, CSV, JSON), never from masks. Masks that a data set
brings are ground truth, for evaluate.py alone; pseudo-masks are read here, too. What a user can
put right ends in a UserError: one line that names the file or the flag, the reason and the remedy.
In order:

    opening a data set     open_data, open_split; what goes with it: classes, splits, download
    the data sets          ImageSet (what each must give), VOC, COCO, Toy
    reading one file       text, JSON, photographs, masks
    loading                normalise, scales and mirror images, the training loader, photographs
    the files of a run     masks, CAMs, records, logs, checkpoints; what --resume compares
    several processes      rank, world, share, sum_over_all
    the command line       run (errors), shared flags, setup (device, precision, seed)
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
import re
import shutil
import sys
import traceback
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import Counter
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache, partial
from http.client import HTTPException
from itertools import zip_longest
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
DATASETS = ("VOC2012", "COCO2014", "toy")
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor")
TOY_CLASSES = ("bars", "columns", "diagonals", "checks", "dots", "rings")
TOY_SIZES = {"train": 1200, "val": 150}
YES, NO = ("1", "1.0", "true"), ("0", "0.0", "false")  # in a one-hot table
RESERVED = {"background", "bg", "ignore", "void", "unlabeled", "unlabelled"}  # listed by some tools


class UserError(Exception):
    """What a user can put right: shown as one line, without a traceback (see run)."""


# -------------------------------------------------------------------------------------------------
# Opening a data set
# -------------------------------------------------------------------------------------------------
def open_data(name, root, split, limit=None, classes=None):
    """One split of a data set, checked: an ImageSet.

    name: one of DATASETS (under root), or a folder in VOC layout with its own classes, named in
    the file classes. limit: only the first so many images. Raises UserError on whatever does not
    fit together.
    """
    if name not in DATASETS and not Path(name).is_dir():
        raise UserError(f"no data set or folder {name!r}: use {', '.join(DATASETS)}, or a folder "
                        "in VOC layout, with --classes")
    if name not in DATASETS and not classes:
        raise UserError(f"--data {name} needs --classes: a file that lists its class names, one a "
                        "line")
    if name in DATASETS and classes:
        raise UserError(f"--classes {classes}: {name} has classes of its own; --classes goes with "
                        "--data FOLDER")
    if name == "VOC2012":
        dataset = VOC(Path(root) / "VOCdevkit" / "VOC2012", split, name, VOC_CLASSES, "VOC 2012")
    elif name == "COCO2014":
        dataset = COCO(root, split)
    elif name == "toy":
        dataset = Toy(split)
    else:
        text = read_text(classes, "give a text file in UTF-8 with one class name per line")
        names = tuple(line.strip() for line in text.splitlines() if line.strip())
        dataset = VOC(name, split, Path(name).resolve().name, names, classes)
    check_classes(dataset.classes, dataset.source)
    if not dataset.ids:
        raise UserError(f"the split {split!r} of {dataset.name} is empty")
    if twice := repeated(dataset.ids):
        raise UserError(f"the split {split!r} of {dataset.name} lists {twice!r} more than once")
    dataset.ids = dataset.ids[:limit]
    return dataset


def open_split(args, split, like=None):
    """open_data by the command line; like: a split which must have the same classes."""
    dataset = open_data(args.data, args.data_root, split, args.limit, args.classes)
    if like is not None:
        need_same_classes(like.classes, like.source, dataset.classes, dataset.source)
    return dataset


def training_split(name):
    """The split a data set is trained on unless --split says otherwise."""
    return "trainaug" if name == "VOC2012" else "train"


def check_classes(names, source):
    """Class k is value k of a mask: 1 to 254 different names, none of them background."""
    if not 1 <= len(names) <= MOST_CLASSES:
        raise UserError(f"{source} names {len(names)} classes: 1 to {MOST_CLASSES} fit in an "
                        "8-bit mask")
    if twice := repeated(names):
        raise UserError(f"{source} names the class {twice!r} more than once")
    if reserved := [name for name in names
                    if name.strip("_ ").lower() in RESERVED or name.startswith("#")]:
        raise UserError(f"{source} lists {reserved[0]!r}, which is no class: value k of a mask is "
                        f"class k of the list, 0 is background and {IGNORE} ignored; take that "
                        "line out")


def need_same_classes(one, one_source, other, other_source):
    """Raises UserError that names both sources and the first difference."""
    for k, (a, b) in enumerate(zip_longest(one, other, fillvalue="missing"), 1):
        if a != b:
            raise UserError(f"{one_source} and {other_source} disagree about the classes: class "
                            f"{k} is {a!r} in the first, {b!r} in the second")


def need_classes_of(folder, dataset):
    """UserError where a folder's files are of other classes, by its args.json, if it has one."""
    path = folder / "args.json"
    if path.is_file():
        classes = read_json(path, "delete it").get("class_names", dataset.classes)
        need_same_classes(classes, path, dataset.classes, dataset.source)


def repeated(names):
    """The first name that occurs more than once, or None."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


VOC_TAR, COCO_ZIPS = DATASET_YEAR_DICT["2012"], "http://images.cocodataset.org"
ARCHIVES = {  # data set -> address, MD5, folder under --data-root
    "VOC2012": [(VOC_TAR["url"], VOC_TAR["md5"], ".")],
    "COCO2014": [
        (f"{COCO_ZIPS}/annotations/annotations_trainval2014.zip",
         "0a379cfc70b0e71301e0f377548639bd", "COCO2014"),
        (f"{COCO_ZIPS}/zips/val2014.zip", "a3d79f5ed8d289b7a7554ce06a5782b3", "COCO2014"),
        (f"{COCO_ZIPS}/zips/train2014.zip", "0da8c0bd3d6becc4dcb32757491aca88", "COCO2014"),
    ]}


def download(name, root):
    """Fetch (into <root>/download, unless it is there), check and extract a data set."""
    if name not in ARCHIVES:
        raise UserError(f"--download: {name} cannot be downloaded; it goes with --data "
                        f"{' or '.join(ARCHIVES)}")
    fetched = Path(root) / "download"
    for address, md5, folder in ARCHIVES[name]:
        try:
            download_and_extract_archive(address, fetched, Path(root) / folder, md5=md5)
        except (RuntimeError, OSError, EOFError, HTTPException) as error:  # RuntimeError: checksum
            raise UserError(f"{address} could not be fetched and extracted ({error}): try again, "
                            f"or fetch it elsewhere, put it into {fetched} and give the same "
                            "command") from error


# -------------------------------------------------------------------------------------------------
# The data sets
# -------------------------------------------------------------------------------------------------
class ImageSet:
    """What the stages see of one split of a data set.

    To add a data set, write a subclass and name it in DATASETS and open_data. It has
        name, split    a split called val is what train_seg.py predicts and evaluate.py scores
        classes        a tuple of 1 to 254 different names
        source         the file that names the classes or lists the images, for messages
        ids            names of the images, all different, each of which can be a file's name
    and gives for an id
        image_path, mask_path    files, for messages
        labels         indices of the classes in the image: sorted, plain ints, at least one
        mask           (H, W) uint8 in {0, 1..C, 255}, of the image's size: for evaluate.py alone
    """

    source = ""

    def image(self, name):
        return read_image(self.image_path(name))

    def __getitem__(self, name):
        """For a loader: the name, and the image (3, H, W) uint8."""
        return name, TF.pil_to_tensor(self.image(name))

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
        self.root, self.split, self.name = Path(folder), split, name
        self.classes, self.source = classes, source
        self.table_path = self.root / "labels.csv"
        self.files = self.find_images()
        self.list = self.root / "ImageSets" / "Segmentation" / f"{split}.txt"
        shipped = Path(__file__).parent / "splits" / f"voc2012_{split}.txt"
        if name == "VOC2012" and not self.list.is_file() and shipped.is_file():
            self.list = shipped
        if not self.list.is_file():
            raise UserError(f"no split {split!r}: {self.list} does not exist; write image names "
                            "there, one per line, or give another split (--split; of train_seg.py "
                            "--predict-split)")
        self.ids = self.read_list()
        self.table = self.read_table() if self.table_path.is_file() else None

    def find_images(self):
        """Image name -> the files of that name in JPEGImages."""
        images, files = self.root / "JPEGImages", {}
        if not images.is_dir():
            remedy = "it is part of the VOC layout"
            if self.name == "VOC2012":
                remedy = ("train_cls.py --download fetches it; or extract "
                          "VOCtrainval_11-May-2012.tar under --data-root")
            raise UserError(f"no folder {images}: {remedy} (see README)")
        for file in sorted(os.listdir(images)):
            stem, extension = os.path.splitext(nfc(file))
            if is_image(extension) and not file.startswith("."):
                files.setdefault(stem, []).append(file)
        return files

    def read_list(self):
        """The names in the split's list, each of which has one image."""
        ids, missing = [], []
        for number, line in enumerate(read_text(self.list).splitlines(), 1):
            name = self.without_extension(line.strip())
            if name and name not in self.files:
                missing.append(name)
                if re.search(r"[,;/\\]|\s-?[01]$", name):
                    raise UserError(f"line {number} of {self.list} is {line!r}: write one image "
                                    "name per line, without folders (the lists of one class in "
                                    "VOC's ImageSets/Main have two columns)")
            elif name:
                ids.append(name)
        images = self.root / "JPEGImages"
        if missing:
            other = [f for f in os.listdir(images) if nfc(Path(f).stem) == missing[0]]
            found = f" (Pillow does not read {other[0]}: convert it)" if other else ""
            raise UserError(f"{self.list} names {len(missing)} images that are not in {images}, "
                            f"first {missing[0]!r}{found}; add them, or put a shorter list in "
                            f"{self.root / 'ImageSets'}")
        if twice := [files for files in map(self.files.get, ids) if len(files) > 1]:
            raise UserError(f"{images} holds {' and '.join(twice[0])}, two images of one name: "
                            "rename or remove one")
        return ids

    def without_extension(self, name):
        """An image's name as a list gives it, with or without a file extension."""
        stem, extension = os.path.splitext(name)
        return stem if name not in self.files and is_image(extension) else name

    def image_path(self, name):
        return self.root / "JPEGImages" / self.files[name][0]

    def read_table(self):
        """labels.csv -> {image: class names}.

        A line is an image's name and its classes. A first line that names no image is a header. If
        it names classes, or all cells below it are 0 or 1, this is a one-hot table: an image's
        name, and 0 or 1 for each class of the header.
        """
        path, table, columns = self.table_path, {}, []
        with reading(path, "look for a quote that is not closed"):
            lines = list(csv.reader(io.StringIO(read_text(path)), strict=True))
        rows = [(number, [cell.strip() for cell in row]) for number, row in enumerate(lines, 1)]
        rows = [(number, row) for number, row in rows if any(row)]
        if rows and self.without_extension(rows[0][1][0]) not in self.files:
            header = rows.pop(0)[1][1:]
            values = {cell.lower() for _, row in rows for cell in row[1:] if cell}
            zero_or_one = bool(values) and values <= {*YES, *NO} - set(self.classes)
            if zero_or_one or set(header) & set(self.classes):
                columns = header
        for column in filter(None, columns):
            if column not in self.classes or columns.count(column) > 1:
                raise UserError(f"{path} has the column {column!r}, which is no class of "
                                f"{self.source}, or is there twice")

        for number, (first, *cells) in rows:
            where, name = f"line {number} of {path}", self.without_extension(first)
            if not any(cells):
                raise UserError(f"{where} is {first!r}: write an image's name and its classes, "
                                "with commas between them")
            if name not in self.files:
                raise UserError(f"{where} names the image {name!r}, which is not in "
                                f"{self.root / 'JPEGImages'}")
            if columns:
                if len(cells) != len(columns):
                    raise UserError(f"{where} has {len(cells)} values, line 1 {len(columns)}")
                if wrong := [cell for cell in cells if cell.lower() not in ("", *YES, *NO)]:
                    raise UserError(f"{where} has the value {wrong[0]!r}: it must be 0 or 1, as "
                                    "line 1 names classes and no image: it is a header")
                cells = [c for c, cell in zip(columns, cells) if cell.lower() in YES]
            table.setdefault(name, []).extend(filter(None, cells))
        return table

    def labels(self, name):
        """Every object of the XML, difficult ones included, or the line of labels.csv."""
        if self.table is not None:
            path, names = self.table_path, self.table.get(name, [])
        else:
            path = self.root / "Annotations" / Path(self.files[name][0]).with_suffix(".xml")
            with reading(path, "image labels come from VOC's Annotations, or from labels.csv "
                               "(see README)"):
                objects = ElementTree.parse(path).getroot().findall("{*}object")
                names = [nfc(o.findtext("{*}name") or "").strip() for o in objects]
        if unknown := [n for n in names if n not in self.classes]:
            raise UserError(f"{path} names the class {unknown[0]!r} in {name}, which "
                            f"{self.source} does not have")
        if not names:
            raise UserError(f"{path} names no object in {name}: give its classes, or take it off "
                            f"{self.list}")
        return sorted({self.classes.index(n) for n in names})

    def mask_path(self, name):
        """VOC's own train and val have their masks; SBD's are of other images, and rougher."""
        folders = self.ground_truth_folders()
        if self.name == "VOC2012" and self.split in ("train", "val"):
            folders = folders[:1]
        for folder in folders:
            path = folder / Path(self.files[name][0]).with_suffix(".png")
            if path.is_file():
                return path
        raise UserError(f"no ground truth {name}.png in {' or '.join(map(str, folders))}: add it, "
                        "or give another --split")

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
            raise UserError(f"no split {split!r} in COCO 2014: use train or val")
        if not self.folder.is_dir():
            raise UserError(f"no folder {self.folder}: train_cls.py --download fetches it; or "
                            f"extract {split}2014.zip in {self.root} (see README)")
        if not self.source.is_file():
            raise UserError(f"no file {self.source}: train_cls.py --download fetches it; or "
                            "extract annotations_trainval2014.zip")
        remedy = "it must be laid out as COCO's instances files"
        record = read_json(self.source, remedy)
        with reading(self.source, remedy):
            self.collect(record)
        if missing := [name for name in self.ids if not self.image_path(name).is_file()]:
            raise UserError(f"{self.source} names {len(missing)} images that are not in "
                            f"{self.folder}, first {self.files[missing[0]][0]!r}; complete the "
                            "download")

    def collect(self, record):
        """Sets classes, ids, files (name -> file, (H, W)), objects.

        objects: name -> [(annotation id, class index, outline)]. Raises ValueError on what does
        not fit together.
        """
        categories = sorted((c["id"], nfc(c["name"])) for c in record["categories"])
        self.classes = tuple(name for _, name in categories)
        index = {identity: i for i, (identity, _) in enumerate(categories)}
        if len(index) < len(categories):
            raise ValueError("two categories have one id")

        images = {}  # id -> file, (H, W)
        for image in record["images"]:
            file = image["file_name"]
            try:
                size = whole(image.get("height")), whole(image.get("width"))
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"height and width of the image {file!r}: {error}") from error
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise ValueError(f"it names the file {file!r}, which is not below {self.folder}")
            images[image["id"]] = file, size
        if len(images) < len(record["images"]):
            raise ValueError(f"{len(record['images'])} images have {len(images)} ids: each needs "
                             "its own")

        # by image, whose name is that of its file without folder and extension
        self.files, self.objects, objects = {}, {}, {}
        for a in record["annotations"]:
            if a["image_id"] not in images:
                raise ValueError(f"annotation {a.get('id')} is of the image {a['image_id']!r}, "
                                 "which is not there: correct its image_id")
            if a["category_id"] not in index:
                raise ValueError(f"annotation {a.get('id')} has the unknown category "
                                 f"{a['category_id']!r}")
            found = (a.get("id"), index[a["category_id"]], a.get("segmentation"))
            objects.setdefault(a["image_id"], []).append(found)
        for identity, found in objects.items():
            file, size = images[identity]
            name = nfc(Path(file).stem)
            if name in self.files:
                raise ValueError(f"two images have one name, {self.files[name][0]} and {file}: "
                                 "rename one")
            self.files[name], self.objects[name] = (file, size), found
        self.ids = sorted(self.files)
        if len(objects) < len(images):
            print(f"{self.source.name}: {len(images) - len(objects)} of {len(images)} images have "
                  "no object and are left out")

    def __getstate__(self):
        """For a loader's worker, which needs no outlines: of train they take gigabytes."""
        return {**self.__dict__, "objects": None}

    def image_path(self, name):
        return self.folder / self.files[name][0]

    def image(self, name):
        image, (H, W) = super().image(name), self.files[name][1]
        if image.size != (W, H):
            raise UserError(f"{self.image_path(name)} is {image.height} x {image.width} pixels "
                            f"(upright, where EXIF turns it), {self.source} says {H} x {W}: "
                            "correct one")
        return image

    def mask_path(self, name):
        return self.source

    def labels(self, name):
        return sorted({index for _, index, _ in self.objects[name]})

    def mask(self, name):
        """The objects drawn, those of fewer pixels over those of more: (H, W) uint8."""
        mask, drawn = np.zeros(self.files[name][1], np.uint8), []
        for identity, index, outline in self.objects[name]:
            with reading(self.source, f"correct annotation {identity} of the image {name}"):
                drawn.append((draw_object(outline, *mask.shape), mask_value(index)))
        for pixels, value in sorted(drawn, key=lambda one: -one[0].sum()):
            mask[pixels] = value
        return mask


def draw_object(outline, H, W):
    """The pixels (H, W) bool of a COCO segmentation: a list of polygons, or run lengths (crowds).

    A polygon has the pixels whose centre is inside, cut at the image's border. Pillow rounds
    corners and fills the edge too, so it is drawn four times as large: an error of an eighth of a
    pixel is left. Raises ValueError where it is no outline, or not of this image.
    """
    if isinstance(outline, dict):
        return decode_rle(outline, H, W)
    if not isinstance(outline, list) or not outline or not isinstance(outline[0], list):
        raise ValueError("there is no outline: neither a list of polygons nor run lengths")
    if any(len(numbers) % 2 for numbers in outline):
        raise ValueError("the outline is not pairs of numbers")
    polygons = [np.reshape(p, (-1, 2)).astype(float) for p in outline if len(p) >= 6]
    if not polygons:
        raise ValueError("the outline has fewer than three corners")
    points = np.concatenate(polygons)
    low, high = points.min(0), points.max(0)
    if not (np.abs(points) < 1e6).all():
        raise ValueError("a coordinate is not a number, or a million pixels away")
    if low.min() >= 0 and high.max() <= 1:
        raise ValueError("the coordinates lie from 0 to 1: they must be in pixels")
    if (high <= 0).any() or (low >= (W, H)).any():
        raise ValueError("the outline lies outside of the image")

    mask = np.zeros((H, W), bool)
    left, top = np.floor(low).clip(0, (W, H)).astype(int)
    right, bottom = np.ceil(high).clip(0, (W, H)).astype(int)
    fine = Image.new("L", (4 * int(right - left), 4 * int(bottom - top)))
    for polygon in polygons:
        corners = 4 * (polygon - (left, top)) + 0.5
        ImageDraw.Draw(fine).polygon([tuple(xy) for xy in corners], fill=1)
    mask[top:bottom, left:right] = np.asarray(fine)[2::4, 2::4]
    return mask


def decode_rle(outline, H, W):
    """COCO run lengths, uncompressed (a list), by column -> (H, W) bool."""
    counts = outline["counts"]
    if isinstance(counts, (str, bytes)):
        raise ValueError("its run lengths are compressed: COCO 2014 has lists of numbers; decode "
                         "them with pycocotools")
    counts = [whole(count) for count in counts]
    size = [whole(side) for side in outline["size"]]
    if size != [H, W] or sum(counts) != H * W or min(counts, default=0) < 0:
        raise ValueError(f"run lengths of {sum(counts)} pixels, size {size}, for an image of {H} "
                         f"x {W}")
    if not sum(counts[1::2]):
        raise ValueError("its run lengths have no pixel")
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape(W, H).T


def whole(number):
    """480, 480.0 or "480" as an int; ValueError on anything between or beside."""
    if int(float(number)) != float(number):
        raise ValueError(f"{number!r} is no whole number")
    return int(float(number))


class Toy(ImageSet):
    """Images made on the fly, 64 x 64: objects on clutter. Same name, same image.

    As in photographs, the class shows best in a part of the object (a textured badge on a plain
    body, whose hue hints at the class), several objects and classes share an image, and grey
    bodies without a badge are background.
    """

    name, classes = "toy", TOY_CLASSES

    def __init__(self, split):
        if split not in TOY_SIZES:
            raise UserError(f"no split {split!r} in toy: use {' or '.join(TOY_SIZES)}")
        self.split = split
        self.ids = [f"toy_{split}_{i:04d}" for i in range(TOY_SIZES[split])]

    def image_path(self, name):
        return name

    mask_path = image_path

    def image(self, name):
        return Image.fromarray(draw_toy(name)[0])

    def labels(self, name):
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
# Reading one file
# -------------------------------------------------------------------------------------------------
def mask_value(class_index):
    """Class index 0..C-1 -> mask value 1..C; 0 is background. No other place adds this 1."""
    return class_index + 1


def nfc(text):
    """One spelling of a name: a Mac writes an umlaut as a letter and its dots, others as one."""
    return unicodedata.normalize("NFC", text)


def is_image(extension):
    """Whether Pillow reads files of such a name (".jpg"); a PDF it only writes."""
    kind = Image.registered_extensions().get(extension.lower())
    return kind in Image.OPEN or kind == "MPO"  # which it opens as a JPEG


@contextmanager
def reading(path, remedy):
    """Any error while path is read becomes a UserError that names file, reason and remedy."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"no file {path}: {remedy}") from None
    except Exception as error:
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} cannot be read ({kind}{reason}): {remedy}") from error


@contextmanager
def given(flag, remedy):
    """A ValueError or OSError about what a flag names becomes a UserError with the remedy."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"{flag}: {error}; {remedy}") from error


def read_text(path, remedy="save it as plain text in UTF-8"):
    """The text of a file, with or without a byte-order mark; names in it in one spelling."""
    with reading(path, remedy):
        return nfc(Path(path).read_text(encoding="utf-8-sig"))


def read_json(path, remedy, kind=dict):
    """What a JSON file holds, which must be of a kind (dict or list)."""
    with reading(path, remedy):
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(value, kind):
            raise ValueError(f"it holds a {type(value).__name__}, not a {kind.__name__}")
    return value


def read_image(path):
    """A photograph as people see it: RGB, 8 bits, upright (EXIF); a decoded PIL image."""
    with reading(path, "replace it, or leave it out"), Image.open(path) as image:
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a phone's preview
        if frames > 1:
            say_once(f"{path}: the first of {frames} pages or frames is read")
        image.load()
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:  # broken metadata; the image itself is fine
            pass
        image.info.pop("transparency", None)  # colours are read as they are under it
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(f"its mode {image.mode!r} has no fixed range, 8 or 16 bits a channel "
                             "are needed")
        return image.convert("RGB")


def voc_colour(value):
    """PASCAL VOC's colour of a mask value: its bits over the high bits of R, G, B."""
    return tuple(sum((value >> (3 * j + channel) & 1) << (7 - j) for j in range(3))
                 for channel in range(3))


VOC_COLOURS = np.array([voc_colour(value) for value in range(256)], np.uint8)
VOC_VALUES = {voc_colour(value): value for value in range(256)}


def read_mask(path, num_classes=MOST_CLASSES, size=None):
    """A mask as (H, W) uint8 in {0, 1..num_classes, 255}; size is the (H, W) it must have.

    Raises UserError on a missing or unreadable file, another value or another size.
    """
    remedy = "a mask is an 8-bit PNG: 0 background, k for class k, 255 ignored"
    with reading(path, remedy), Image.open(path) as image:
        mask = decode_mask(image, num_classes)
        if (wrong := mask[(mask > num_classes) & (mask != IGNORE)]).size:
            raise ValueError(f"it holds the value {wrong[0]}, allowed are 0..{num_classes} and "
                             f"{IGNORE}")
    if size is not None and mask.shape != tuple(size):
        raise UserError(f"{path} is {mask.shape[0]} x {mask.shape[1]} pixels, its image {size[0]} "
                        f"x {size[1]} (upright, where EXIF turns it): a mask goes with the "
                        "upright image")
    return mask.astype(np.uint8)


def decode_mask(image, num_classes):
    """The values (H, W) that a mask, as Pillow opened it, stands for.

    Grey levels and palette indices are values, other colours VOC's. Optimisers re-index palettes
    ([0, 3] becomes [0, 1] with the same colours): ValueError where an index has the colour, or the
    grey level, of another class, or the background's black.
    """
    if image.mode == "L" or image.mode.startswith("I"):
        return np.array(image)
    if image.mode == "P":
        index, palette = np.array(image), image.getpalette("RGB")
        for value in np.unique(index).tolist():
            if 3 * value >= len(palette):  # a short palette has no colour for 255
                continue
            r, g, b = colour = tuple(palette[3 * value:3 * value + 3])
            if value and not any(colour) and any(palette[:3]):
                raise ValueError(f"value {value} is black, as the background is, and 0 is not: "
                                 "save it again in VOC's palette, or as grey values")
            as_grey = r if r == g == b and r <= num_classes else 0
            means = {VOC_VALUES.get(colour, 0), as_grey} - {0}  # the classes it could stand for
            if means and value not in means:
                raise ValueError(f"value {value} has the colour {colour}, which is another "
                                 "class's: save it again in VOC's palette, or as grey values")
        return index
    if image.mode not in ("RGB", "RGBA"):
        raise ValueError(f"its mode {image.mode!r} holds no values")
    pixels = np.array(image.convert("RGB"))
    colours, index = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    values = [VOC_VALUES.get(tuple(colour)) for colour in colours.tolist()]
    if None in values:
        raise ValueError(f"its colour {tuple(colours[values.index(None)].tolist())} is none of "
                         "VOC's: save it in VOC's palette, or as grey values")
    return np.array(values)[index].reshape(pixels.shape[:2])


# -------------------------------------------------------------------------------------------------
# Loading. Images travel as uint8 and are normalised on the device.
# -------------------------------------------------------------------------------------------------
def normalise(images):
    """uint8 (B, 3, H, W) -> float, ImageNet-normalised."""
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD])[..., None, None].to(
        images.device, non_blocking=True)
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


def limit_size(pixels, max_side):
    """pixels (3, H, W) uint8, made smaller if a side is longer than max_side."""
    H, W = pixels.shape[-2:]
    if max(H, W) <= max_side:
        return pixels
    say_once(f"photographs are shrunk to {max_side} px (--max-side) and their masks enlarged "
             "again")
    scale = max_side / max(H, W)
    return TF.resize(pixels, [max(1, round(H * scale)), max(1, round(W * scale))], antialias=True)


def enlarge(mask, size):
    """A mask (h, w) uint8 at another size (H, W), by nearest neighbour: limit_size undone."""
    return F.interpolate(mask[None, None], tuple(size), mode="nearest-exact")[0, 0]


@contextmanager
def seeded(seed):
    """Random transforms inside depend on seed alone, not on what ran before."""
    with torch.random.fork_rng(devices=[]):  # a GPU's generator, for drop-path, is left alone
        torch.default_generator.manual_seed(seed)
        yield


class EpochSampler(DistributedSampler):
    """(index, seed), in an order that depends on seed and epoch alone: call set_epoch.

    Of several processes each draws its share of that order.
    """

    def __iter__(self):
        for index in super().__iter__():
            yield index, random.Random(f"{self.seed}/{self.epoch}/{index}").getrandbits(62)


SEEDS_APART = 100_003  # epochs of one seed never meet those of the next


def train_loader(samples, batch, seed, workers, device):
    """A shuffling DataLoader without the last short batch: call loader.sampler.set_epoch(e).

    batch is that of all processes together; each gets its share. The loader's own generator keeps
    it from drawing on the global one, on which drop-path and dropout depend.
    """
    if batch > len(samples):
        raise UserError(f"--batch {batch} with {len(samples)} images: give a smaller one")
    if batch % world():
        raise UserError(f"--batch {batch} is shared by {world()} processes: it must be a multiple "
                        f"of {world()}")
    sampler = EpochSampler(samples, world(), rank(), seed=SEEDS_APART * seed, drop_last=True)
    return DataLoader(
        samples, batch // world(), sampler=sampler, num_workers=workers, drop_last=True,
        pin_memory=device.type == "cuda", persistent_workers=workers > 0,
        generator=torch.Generator())


def seed_epoch(seed, epoch):
    """For drop-path and dropout: an epoch that is resumed repeats them."""
    torch.manual_seed((seed * SEEDS_APART + epoch) * world() + rank())


def load_images(dataset, names, workers, device):
    """Iterates over dataset[name] for names; workers decode ahead if a GPU does the rest."""
    workers = workers if device.type == "cuda" else 0
    return DataLoader(dataset, batch_size=None, sampler=names, num_workers=workers,
                      generator=torch.Generator())


def read_photos(paths):
    """Yields (path, pixels (3, H, W) uint8) of image files, and of those in folders, each once.

    Then says what else is in these folders (hidden files do not count), and raises UserError on
    images that could not be read.
    """
    files, others, errors = {}, [], []
    for path in paths:
        if not path.exists():
            raise UserError(f"no photograph or folder {path}")
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file == path or is_image(file.suffix) and not file.name.startswith("."):
                files[file.resolve()] = file
            elif not file.name.startswith("."):
                others.append(file.name)
    not_read = ""
    if others:
        not_read = (f"not read: {len(others)} (name folders inside, convert what Pillow does not "
                    f"read): {', '.join(others[:5])}")
    if twice := repeated(file.stem for file in files.values()):
        raise UserError(f"two photographs are called {twice!r}: their masks would overwrite each "
                        "other, rename one")
    if not files:
        raise UserError(f"no image in {', '.join(map(str, paths))}; {not_read}".strip("; "))

    for path in share(list(files.values())):
        try:
            image = read_image(path)
        except UserError as error:
            errors.append(str(error))
            continue
        yield path, TF.pil_to_tensor(image)
    wait_for_all()  # torchrun stops the others when one process ends in an error
    if not_read:
        print(not_read)
    if errors:
        raise UserError(f"{len(errors)} left out: {'; '.join(errors)}")


# -------------------------------------------------------------------------------------------------
# The files of a run: one writer, one reader each
# -------------------------------------------------------------------------------------------------
@contextmanager
def replacing(path):
    """Yields a temporary path, which takes the place of path if the block went well.

    Raises UserError if the block raises OSError (a full disk): then path is what it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error}): what was there is unchanged; "
                        "remove the cause and give the same command again, a stage with --resume"
                        ) from error
    finally:
        with suppress(OSError):  # what went wrong was said already
            temporary.unlink()


def write_picture(path, image):
    """A PIL image as PNG or JPEG, by the path's suffix."""
    kind = {".png": "PNG", ".jpg": "JPEG"}[Path(path).suffix]
    with replacing(path) as temporary:
        image.save(temporary, format=kind)


def write_mask(path, mask):
    """(H, W) -> PNG in VOC's palette (0 background, 1..C, 255 ignore)."""
    image = Image.fromarray(np.asarray(mask, np.uint8))
    image.putpalette(VOC_COLOURS.ravel().tolist())
    write_picture(path, image)


def for_display(pixels, *masks, most=1600):
    """pixels (3, H, W) and masks (H, W) uint8 as arrays (h, w, 3), (h, w), shrunk to most px."""
    scale = min(1, most / max(pixels.shape[-2:]))
    size = [max(1, round(side * scale)) for side in pixels.shape[-2:]]
    photo = TF.resize(pixels, size, antialias=True).permute(1, 2, 0).numpy()
    return photo, *(enlarge(torch.from_numpy(mask), size).numpy() for mask in masks)


def heat(photo, cam):
    """A CAM (., .) in [0, 1] over its photograph (h, w, 3) uint8, blue to red."""
    cam = bilinear(cam[None, None].float().cpu(), photo.shape[:2])[0, 0].numpy()
    colour = np.stack([np.clip(1.5 - abs(4 * cam - c), 0, 1) for c in (3, 2, 1)], -1) * 255
    return (0.45 * photo + 0.55 * colour).astype(np.uint8)


def tint(photo, mask):
    """A mask (h, w) over its photograph (h, w, 3) uint8, in VOC's colours, with its outline."""
    mixed = (photo // 2 + VOC_COLOURS[mask] // 2).astype(np.uint8)
    return outline(np.where(mask[..., None] > 0, mixed, photo), mask)


def outline(picture, mask):
    """A picture (h, w, 3) uint8 with white lines where classes of a mask (h, w) end.

    Undecided pixels are no class.
    """
    mask = torch.from_numpy(np.where(mask == IGNORE, 0, mask))[None, None].float()
    reach = 2 * math.ceil(max(picture.shape) / 600) + 1  # as wide in the eye at any size
    highest = F.max_pool2d(mask, reach, 1, reach // 2)
    lowest = -F.max_pool2d(-mask, reach, 1, reach // 2)
    return np.where((highest > lowest)[0, 0, ..., None], 255, picture).astype(np.uint8)


def write_overlay(path, picture, legend):
    """A picture (H, W, 3) uint8 as JPEG, names below it; legend: name -> mask value, its colour."""
    text_width = 24 + 7 * max(map(len, legend), default=0)
    size = max(picture.shape[1], text_width), picture.shape[0] + 16 * len(legend)
    sheet = Image.new("RGB", size, "white")
    sheet.paste(Image.fromarray(picture))
    draw = ImageDraw.Draw(sheet)
    for i, (name, value) in enumerate(legend.items()):
        top = picture.shape[0] + 16 * i
        draw.rectangle((4, top + 3, 14, top + 13), fill=tuple(VOC_COLOURS[value].tolist()))
        has_letters = name.isascii() and name.isprintable()  # which Pillow's own font has
        draw.text((20, top + 2), name if has_letters else f"class {value}", fill="black")
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
    """Raises UserError that counts and names the ids without a file in folder."""
    missing = [name for name in ids if not (folder / f"{name}{suffix}").is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(ids)} files are missing in {folder}: "
                        f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; {remedy}")


def write_json(path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def append_result(out, record):
    """Append a record to <out>/results.json, a list."""
    path = Path(out) / "results.json"
    records = []
    if path.is_file():
        records = read_json(path, "delete it to start a new list", list)
    write_json(path, records + [record])


@lru_cache(maxsize=None)
def say_once(text):
    print(text, flush=True)


def progress(text):
    """A line that the next one overwrites, on a terminal only."""
    if sys.stdout.isatty():
        print(f"\r  {text:<76}", end="\r" if not text else "", flush=True)


def log_line(folder, record):
    """One log line of a stage: printed for people, appended to <folder>/log.jsonl for programs."""
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


def cut_log(folder, epoch):
    """Say where a resumed training goes on, and take what comes after it out of its log."""
    path = Path(folder) / "log.jsonl"
    if rank() or not path.is_file():
        return
    kept = [record for record in read_log(folder) if record.get("epoch", math.inf) <= epoch]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
    where = f"going on after epoch {epoch}" if epoch else "no checkpoint yet, starting again"
    print(f"{folder}: {where}", flush=True)


def need_finite(losses, epoch, step):
    """UserError unless a sum of losses is finite."""
    if not losses.isfinite().all():
        steps = f"{max(1, step - 19)} to {step}"
        raise UserError(f"the loss is not finite in epoch {epoch + 1}, step {steps}: lower --lr, "
                        "or look at the images of these steps; last.pt, if it is there, is the "
                        "state before")


SECONDS_BETWEEN_CHECKPOINTS = 60  # at least: they would cost a GPU a tenth of its time


def write_checkpoint(path, checkpoint):
    """Plain types and tensors only, so that read_checkpoint can refuse everything else."""
    if rank():
        return
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)  # to a file, a full disk would end in an error deep inside zip
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())  # on the disk before it takes the old one's place


def read_checkpoint(path, stage, dataset=None):
    """A checkpoint of stage ("cls" or "seg"), on the CPU.

    dataset: whose name and classes it must have. Raises UserError if it is missing, unreadable or
    of something else.
    """
    program = {"cls": "train_cls.py", "seg": "train_seg.py"}[stage]
    if not Path(path).is_file():
        raise UserError(f"no checkpoint {path}: run {program} first, or give one that it wrote "
                        "(the --out of a run has its own)")
    with reading(path, f"it must be a checkpoint that {program} wrote"):
        if code := torch.serialization.get_unsafe_globals_in_checkpoint(path):
            raise ValueError(f"it wants to run code ({code[0]}), which is refused: load it where "
                             "you trust it and save plain dicts, numbers and tensors alone")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = checkpoint["config"]
        if checkpoint["stage"] != stage:
            raise ValueError(f"it is of stage {checkpoint['stage']!r}, not {stage!r}")
        classes, name = config["classes"], Path(config["data"]).name
    if dataset is not None:
        if name != dataset.name:
            raise UserError(f"{path} was trained on {name}, not on {dataset.name}: give a "
                            f"checkpoint, or the --out of a run, of {dataset.name}")
        need_same_classes(classes, path, dataset.classes, dataset.source or dataset.name)
    return checkpoint


def need_optimizer(checkpoint, path):
    """UserError where a checkpoint has weights alone, as a published one, and is to be trained."""
    if "optimizer" not in checkpoint:
        raise UserError(f"{path} holds weights without the optimiser's state: it serves stages 2 "
                        "to 4 and photographs; train another --out from the start")


def look_at_epoch(checkpoint, path):
    """Say so where training stopped before its end."""
    epoch, epochs = checkpoint["epoch"], checkpoint["config"].get("epochs", 0)
    if epoch < epochs:
        say_once(f"look: {path} is of epoch {epoch} of {epochs}; training goes on with --resume")


def look_at_origin(folder, key, path):
    """Say so where a folder's files were made from another checkpoint than the one at path.

    key: what its args.json calls that checkpoint, "classifier" or "model".
    """
    program = {"classifier": "refine.py", "model": "train_seg.py --predict-only"}[key]
    settings = folder / "args.json"
    if settings.is_file() and Path(path).is_file():
        if read_json(settings, "delete it").get(key) not in (None, file_digest(path)):
            say_once(f"look: {folder} was made from another {path}; {program} --overwrite makes "
                     "it again")


# Flags that may differ when a run is resumed: what files and folders hold is compared instead
FREE_TO_CHANGE = {"resume", "overwrite", "device", "workers", "out", "data_root", "download",
                  "predict_split", "predict_only", "branch_from", "data", "classes", "masks"}


def stage_settings(args, dataset, made_from):
    """What a stage's files were made with, a flat dict for args.json: flags, classes, inputs.

    made_from: what -> paths of files, which are recognised by their content.
    """
    settings = {key: str(value) if isinstance(value, Path) else value
                for key, value in vars(args).items()}
    settings["class_names"] = list(dataset.classes)
    settings["images and labels"] = dataset.fingerprint()
    for what, paths in made_from.items():
        settings[what] = file_digest(*paths)
    return settings


def file_digest(*paths):
    """What the content of files is recognised by: 16 digits of their SHA-256."""
    content = hashlib.sha256()
    for path in paths:
        with reading(path, "put it back, as what was made from it is compared with it"):
            content.update(Path(path).read_bytes())
    return content.hexdigest()[:16]


def prepare_folder(folder, args, settings):
    """Make a stage's folder, with its settings in args.json.

    A folder in use needs --resume (and the same settings) or --overwrite (its files are deleted).
    Of several processes one does it, and calls settings, a function that reads files to make the
    dict. Raises UserError.
    """
    folder = Path(folder)
    if not rank():
        settings = settings()
        used = folder.is_dir() and any(not f.name.endswith(".tmp") for f in folder.iterdir())
        if used and args.resume:
            need_same_settings(folder, settings)
            for temporary in folder.glob(".*.tmp"):  # what replacing() left when it was killed
                temporary.unlink(missing_ok=True)
        elif used and args.overwrite:
            for path in [Path(v) for v in vars(args).values() if isinstance(v, (str, Path))]:
                if path.resolve().is_relative_to(folder.resolve()):
                    raise UserError(f"--overwrite would delete {path}, which this run reads: use "
                                    "another --out")
            with given("--overwrite", f"look at {folder}"):
                shutil.rmtree(folder)
        elif used:
            raise UserError(f"{folder} is in use: go on with --resume, replace it with "
                            "--overwrite, or choose another --out")
        write_json(folder / "args.json", settings)
    wait_for_all()


def need_same_settings(folder, settings):
    """Raises UserError that names the first difference from <folder>/args.json."""
    if not (folder / "args.json").is_file():
        raise UserError(f"--resume in {folder}, which has no args.json: replace it with "
                        "--overwrite, or choose another --out")
    before = read_json(folder / "args.json", "delete the folder to start again")
    for key in {**before, **settings}:
        was, now = before.get(key), settings.get(key)
        if was != now and key not in FREE_TO_CHANGE:
            raise UserError(f"--resume in {folder} with another {key}: it was {was!r}, now "
                            f"{now!r}; repeat it, replace the folder with --overwrite, or use "
                            "another --out")


# -------------------------------------------------------------------------------------------------
# Several processes: torchrun --nproc_per_node=N train_cls.py ...
# -------------------------------------------------------------------------------------------------
def of_torchrun(variable, otherwise):
    """A variable that torchrun sets; one of another launcher's is not looked at."""
    launched = dist.is_available() and dist.is_torchelastic_launched() and variable in os.environ
    return int(os.environ[variable]) if launched else otherwise


def rank():
    """This process's number, 0 .. world() - 1; 0 speaks, and writes logs and checkpoints."""
    return of_torchrun("RANK", 0)


def world():
    """How many processes torchrun started; 1 without it."""
    return of_torchrun("WORLD_SIZE", 1)


def join(device):
    """Join the other processes, if there are any."""
    if world() > 1 and not dist.is_initialized():
        # hours, because in stages 2 and 3 the fast processes wait for the slow ones at the end
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=12),
                                device_id=device if cuda else None)
        atexit.register(dist.destroy_process_group)
    if rank():
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
        model, [device.index] if cuda else None, gradient_as_bucket_view=True)


# -------------------------------------------------------------------------------------------------
# The command line that all stages share
# -------------------------------------------------------------------------------------------------
def run(main):
    """Call a main: an error of the user is one line and exit code 2, a fault a traceback.

    Of several processes the one that fails ends at once: a proper farewell would wait for the
    others, which wait for this one.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the terminal lacks stops no work
            stream.reconfigure(errors="backslashreplace")
    try:
        return main()
    except (Exception, KeyboardInterrupt) as error:
        line, code = explain(error)
    print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if world() > 1:
        os._exit(code)
    sys.exit(code)


def explain(error):
    """What is printed of an exception, and the exit code."""
    text = str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted (stages 1 to 3 go on with --resume)", 130
    if isinstance(error, BrokenPipeError):  # of a reader such as head, who has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "", 1
    if isinstance(error, (UserError, OSError)):
        # a loader's worker sends its traceback, which ends with the message
        text = text.rpartition("data.UserError: ")[2] or repr(error)
        return f"error: {' '.join(text.split())}", 2
    if isinstance(error, RuntimeError) and "shared memory" in text:
        return ("error: the loader's workers have too little shared memory: use --workers 0, or "
                "give a container more (docker run --shm-size 2g)"), 2
    if isinstance(error, torch.OutOfMemoryError):
        return (f"error: the GPU's memory is full ({text.splitlines()[0]}): use a smaller --batch "
                "or --size, for whole images a smaller --max-side"), 2
    return "".join(traceback.format_exception(error)).rstrip(), 1


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def number(kind, least, most=math.inf):
    """The argparse type of a flag: an int or a float in [least, most], so neither nan nor inf."""
    def parse(text):
        value = kind(text)
        if not (least <= value <= most and math.isfinite(value)):
            limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text} is not a number {limits}")
        return value

    parse.__name__ = kind.__name__  # as in argparse's "invalid int value: '1.5'"
    return parse


def argument_parser(description):
    """A parser with the flags that mean the same in every script."""
    wide = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=110)
    parser = Parser(description=description, formatter_class=wide, allow_abbrev=False,
                    usage="python %(prog)s --data DATA [flags]")
    cores = os.cpu_count() or 2
    if hasattr(os, "sched_getaffinity"):  # of a cluster's job, which has a share of them
        cores = len(os.sched_getaffinity(0))
    cores = cores // of_torchrun("LOCAL_WORLD_SIZE", 1)

    add = parser.add_argument_group("data").add_argument
    add("--data", default="VOC2012",
        help=f"{', '.join(DATASETS)}, or a folder in VOC layout, with --classes")
    add("--classes", metavar="FILE", help="for --data FOLDER: its class names, one per line")
    add("--data-root", default="data", metavar="DIR",
        help="holds VOCdevkit/VOC2012 or COCO2014 (default %(default)s)")
    add("--limit", type=number(int, 1), metavar="N",
        help="use only the first N images of each split")

    add = parser.add_argument_group("machine and output").add_argument
    add("--out", metavar="DIR", help="output folder (default runs/<data>)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="default cuda if there is one")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of matrix products; auto (default): bfloat16 where the device has it natively, for "
             "--data toy float32")
    add("--workers", type=number(int, 0), default=min(8, cores // 2),
        help="processes that load images (default: half of this process's cores, at most 8)")
    add("--seed", type=number(int, 0, 2**31), default=0, metavar="N",
        help="of weights, order, crops and drop-path (default %(default)s)")
    add("--deterministic", action="store_true",
        help="on CUDA: the same bits again (a CPU always gives them)")
    return parser


def recipe(argv, recipes):
    """The defaults of a data set: recipes by the name that follows --data, or of "VOC2012"."""
    finder = Parser(add_help=False, allow_abbrev=False)
    finder.add_argument("--data")
    name = finder.parse_known_args(argv)[0].data
    return recipes.get(name, recipes["VOC2012"])


def resuming_arguments(parser):
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on where an interrupted run stopped")
    add("--overwrite", action="store_true", help="replace what an earlier run wrote")


def setup(args):
    """The device, after checking that it is there.

    Sets args.out and args.precision, the seed and --deterministic, and joins other processes.
    """
    for key, value in vars(args).items():
        if isinstance(value, (str, Path)) and str(value).startswith("~"):  # as in --out=~/runs
            setattr(args, key, type(value)(os.path.expanduser(value)))
    args.out, device = Path(args.out or Path("runs") / Path(args.data).resolve().name), None
    try:
        device = torch.device(args.device)
        if device.type == "cuda" and world() > 1:  # each process has a card of its own
            device = torch.device("cuda", of_torchrun("LOCAL_RANK", 0))
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except Exception as error:  # each backend has its own way to say that it is not there
        raise UserError(f"--device {device or args.device}: not there, or unknown to this torch "
                        f"({str(error).splitlines()[0]}); use cpu, or cuda with an NVIDIA GPU and "
                        "a CUDA build of torch") from error
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
    if device.type != "cpu" or sys.platform == "darwin":  # a Mac has it, and is slower with it
        return False
    has = torch.cpu.get_capabilities()
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(device, precision):
    """Matrix products in precision; the rest stays float32.

    precision: "bfloat16" or "float32" (on CUDA convolutions are then TF32, as torch has them).
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
