"""Datasets, image labels, transforms, and every file a stage writes, with its one writer and one reader.

Reads  <root>/VOCdevkit/VOC2012 and <root>/COCO2014 in their official layouts (README), splits/*.txt; makes `toy`.
Writes what the stages ask it to, first under a temporary name: runs/<data>/{cls, cam, pseudo, seg, pred}.
Run    nothing by itself; python data.py would print nothing.
Expect ValueError or FileNotFoundError, with the file and the remedy, on anything that is not as it should be.

A dataset has .name, .classes (C names), .ids, and image(id), labels(id), mask(id), size(id). Image labels come from
the annotation lists (XML, JSON), never from masks; mask() is ground truth and called by evaluate.py alone.
"""
import argparse
import atexit
import hashlib
import io
import json
import math
import os
import random
import shutil
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

IGNORE = 255
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
TOY_CLASSES = ("bars", "columns", "diagonals", "checks", "dots", "rings")
TOY_SIZES = {"train": 600, "val": 150}


# ---------------------------------------------------------------------------------------------------------------------
# Datasets
# ---------------------------------------------------------------------------------------------------------------------
def mask_value(class_index):
    """Class index 0..C-1 -> mask value 1..C (0 is background). The only place where the two differ."""
    return class_index + 1


def read_image(path):
    """An RGB PIL image, fully decoded. Raises FileNotFoundError, or ValueError if the file is broken."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image ({error}); fetch or extract it again") from error


class VOCLayout:
    """A folder laid out like VOC 2012: JPEGImages, Annotations, SegmentationClass, ImageSets/Segmentation/<split>.txt."""

    mean_size = 500

    def __init__(self, folder, split, name, classes, remedy, shipped=None):
        self.root, self.split, self.name, self.classes = Path(folder), split, str(name), tuple(classes)
        need_folder(self.root / "JPEGImages", remedy)
        self.list = self.root / "ImageSets" / "Segmentation" / f"{split}.txt"
        if not self.list.is_file() and shipped is not None and shipped.is_file():
            self.list = shipped
        if not self.list.is_file():
            raise FileNotFoundError(f"no split {split!r}: {self.list} does not exist; use train, val or another list there")
        self.ids = read_text(self.list).split()
        if unsafe := [n for n in self.ids if n != Path(n).name or "\\" in n]:
            raise ValueError(f"{self.list} names {unsafe[0]!r}, which is not the plain name of an image")
        have = {name[:-4] for name in os.listdir(self.root / "JPEGImages") if name.endswith(".jpg")}
        if missing := [name for name in self.ids if name not in have]:
            raise FileNotFoundError(
                f"{self.list} names {len(missing)} images that are not in {self.root / 'JPEGImages'}, "
                f"first {missing[0]!r}; complete the download, or put a shorter list in {self.root / 'ImageSets'}")

    def image(self, name):
        return read_image(self.root / "JPEGImages" / f"{name}.jpg")

    def labels(self, name):
        """Indices of the classes in the image: every object of the XML, difficult ones included."""
        path = self.root / "Annotations" / f"{name}.xml"
        try:
            names = [o.findtext("name") for o in ElementTree.parse(path).getroot().findall("object")]
        except ElementTree.ParseError as error:
            raise ValueError(f"{path} is not readable XML ({error})") from error
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is missing: image labels come from the XML of VOC's Annotations") from None
        if unknown := [n for n in names if n not in self.classes]:
            raise ValueError(f"{path} names the class {unknown[0]!r}, which {self.name} does not have")
        if not names:
            raise ValueError(f"{path} names no object: an image without labels teaches nothing, drop it from {self.list}")
        return sorted({self.classes.index(n) for n in names})

    def mask(self, name):
        folders = ["SegmentationClass"] + ["SegmentationClassAug"] * (self.split == "trainaug")
        for folder in folders:
            if (path := self.root / folder / f"{name}.png").is_file():
                return read_mask(path)
        raise FileNotFoundError(f"no ground truth for {name} in {' or '.join(str(self.root / f) for f in folders)}")

    def ground_truth_folders(self):
        return [self.root / "SegmentationClass", self.root / "SegmentationClassAug"]


class VOC2012(VOCLayout):
    """PASCAL VOC 2012. Splits: train (1,464), trainaug (10,582, masks of SBD), val (1,449)."""

    def __init__(self, root, split, _cache=None):
        super().__init__(Path(root) / "VOCdevkit" / "VOC2012", split, "VOC2012", VOC_CLASSES,
                         "extract VOCtrainval_11-May-2012.tar under --data-root",
                         Path(__file__).parent / "splits" / f"voc2012_{split}.txt")


class COCO2014:
    """MS COCO 2014 on its instance annotations, 80 classes. Splits: train, val (images with at least one object)."""

    name, mean_size = "COCO2014", 640

    def __init__(self, root, split, cache=None):
        self.root, self.split, self.cache = Path(root) / "COCO2014", split, cache
        if split not in ("train", "val"):
            raise FileNotFoundError(f"no split {split!r} in COCO 2014: use train or val")
        need_folder(self.root / f"{split}2014", f"extract {split}2014.zip of cocodataset.org there")
        self.json = self.root / "annotations" / f"instances_{split}2014.json"
        record = read_json(self.json, "extract annotations_trainval2014.zip of cocodataset.org under COCO2014")
        try:
            categories = sorted((c["id"], c["name"]) for c in record["categories"])
            self.classes = tuple(name for _, name in categories)
            index = {identity: i for i, (identity, _) in enumerate(categories)}
            self._size = {Path(i["file_name"]).stem: (i["height"], i["width"]) for i in record["images"]}
            name_of = {i["id"]: Path(i["file_name"]).stem for i in record["images"]}
            self._objects = defaultdict(list)  # image -> [(area, class index, segmentation)]
            for a in record["annotations"]:
                if a["category_id"] not in index:
                    raise ValueError(f"{self.json}: annotation {a['id']} has the unknown category {a['category_id']}")
                if a["image_id"] in name_of:
                    self._objects[name_of[a["image_id"]]].append((a["area"], index[a["category_id"]], a["segmentation"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.json} is not a COCO instances file ({type(error).__name__}: {error})") from error
        self.ids = sorted(self._objects)
        self.without_objects = len(name_of) - len(self.ids)
        if self.without_objects and not rank():
            print(f"{self.json.name}: {self.without_objects} of {len(name_of)} images have no object and are left out")
        have = {Path(name).stem for name in os.listdir(self.root / f"{split}2014")}
        if missing := [name for name in self.ids if name not in have]:
            raise FileNotFoundError(f"{self.json} names {len(missing)} images that are not in "
                                    f"{self.root / f'{split}2014'}, first {missing[0]!r}; complete the download")

    def image(self, name):
        return read_image(self.root / f"{self.split}2014" / f"{name}.jpg")

    def labels(self, name):
        return sorted({index for _, index, _ in self._objects[name]})

    def mask(self, name):
        """The objects rasterised, smaller ones over larger ones, and cached as PNG where a cache folder is given."""
        if self.cache is None:
            return self.rasterise(name)
        path = self.cached(name)
        if not path.is_file():
            write_mask(path, self.rasterise(name))
        return read_mask(path)

    def cached(self, name):
        return Path(self.cache) / self.split / f"{name}.png"

    def cache_masks(self, workers):
        """Rasterise every mask that is not cached yet, in worker processes; an interrupted call goes on where it was."""
        missing, made = [name for name in self.ids if not self.cached(name).is_file()], 0
        if not missing:
            return
        for count in DataLoader(missing, 64, num_workers=workers, collate_fn=self.rasterise_all):
            made += count
            progress(f"{made}/{len(missing)} masks rasterised")
        progress("")

    def rasterise_all(self, names):
        for name in names:
            self.mask(name)
        return len(names)

    def rasterise(self, name):
        mask = np.zeros(self._size[name], np.uint8)
        for _, index, segmentation in sorted(self._objects[name], key=lambda o: -o[0]):
            try:
                mask[draw_object(segmentation, *mask.shape)] = mask_value(index)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{self.json}: an object of {name} has no readable outline ({error})") from error
        return mask

    def ground_truth_folders(self):
        return [Path(self.cache)] if self.cache else []


def draw_object(segmentation, H, W):
    """The pixels (H, W) bool of a COCO segmentation: a list of polygons, or run lengths (crowds).

    A polygon has the pixels whose centre is inside. Pillow truncates corners and fills the edge, so it is drawn four times as
    large, which leaves an eighth of a pixel too much.
    """
    if isinstance(segmentation, dict):
        return decode_rle(segmentation, H, W).astype(bool)
    mask = np.zeros((H, W), bool)
    polygons = [np.reshape(p, (-1, 2)).astype(float).clip(0, (W, H)) for p in segmentation if len(p) >= 6]
    if polygons:
        points = np.concatenate(polygons)
        if not np.isfinite(points).all():
            raise ValueError("a coordinate is not a number")
        (left, top), (right, bottom) = np.floor(points.min(0)).astype(int), np.ceil(points.max(0)).astype(int)
        fine = Image.new("L", (4 * int(right - left), 4 * int(bottom - top)))
        for polygon in polygons:
            ImageDraw.Draw(fine).polygon([tuple(xy) for xy in 4 * (polygon - (left, top)) + 0.5], fill=1)
        mask[top:bottom, left:right] = np.asarray(fine)[2::4, 2::4]
    return mask


def decode_rle(segmentation, H, W):
    """COCO run lengths (a list, or the compressed string), column by column, -> (H, W) uint8 in {0, 1}."""
    counts = segmentation["counts"]
    if isinstance(counts, str):  # 5 bits a character, bit 5: more follow; from the third count on, deltas to two before
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
    if list(segmentation["size"]) != [H, W] or sum(counts) != H * W or min(counts, default=0) < 0:
        raise ValueError(f"run lengths of {sum(counts)} pixels, size {segmentation['size']}, for an image of {H} x {W}")
    flat = np.repeat(np.arange(len(counts), dtype=np.uint8) % 2, counts)
    return flat.reshape(W, H).T


class Toy:
    """64 x 64 images made on the fly: objects whose texture is the class, on clutter. Same index, same image.

    As in photographs, the class shows best in a part of the object (a textured badge on a plain body, whose hue hints at
    the class), several objects and classes share an image, and grey bodies without a badge are background.
    """

    name, classes, mean_size = "toy", TOY_CLASSES, 64

    def __init__(self, root=None, split="train", _cache=None):
        if split not in TOY_SIZES:
            raise FileNotFoundError(f"no split {split!r} in toy: use {' or '.join(TOY_SIZES)}")
        self.split = split
        self.ids = [f"toy_{split}_{i:04d}" for i in range(TOY_SIZES[split])]

    def image(self, name):
        return Image.fromarray(draw_toy(name)[0])

    def labels(self, name):
        return draw_toy(name)[2]

    def mask(self, name):
        return draw_toy(name)[1].copy()

    def ground_truth_folders(self):
        return []


@lru_cache(maxsize=None)
def draw_toy(name):
    """The toy image of that name: (64, 64, 3) uint8, its exact mask (64, 64) uint8, its class indices."""
    rng = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))
    S = 64
    y, x = np.mgrid[:S, :S]
    coarse = Image.fromarray(rng.integers(40, 216, (6, 6, 3), dtype=np.uint8)).resize((S, S), Image.BICUBIC)
    grey = np.asarray(coarse, np.float32).mean(-1, keepdims=True)
    image = 0.8 * grey + 0.2 * np.asarray(coarse, np.float32)
    mask = np.zeros((S, S), np.uint8)
    for _ in range(rng.integers(2, 5)):  # clutter: bodies without a badge
        body, _, _ = toy_body(rng, y, x, rng.uniform(5, 10))
        image[body] = rng.uniform(40, 215) + rng.uniform(-15, 15, 3)
    classes = set()
    for _ in range(rng.integers(1, 4)):
        k = int(rng.integers(len(TOY_CLASSES)))
        radius = rng.uniform(12, 21)
        body, cy, cx = toy_body(rng, y, x, radius)
        if (mask[body] > 0).sum() > 0.3 * body.sum():
            continue  # would hide another object
        colour = toy_colour(2 * math.pi * k / len(TOY_CLASSES) + rng.normal(0, 0.35))
        u, v = y - cy, x - cx
        texture = [u % 4 < 2, v % 4 < 2, (u + v) % 5 < 2.5, (u // 3 + v // 3) % 2 == 0, (u % 5 < 3) & (v % 5 < 3),
                   np.hypot(u, v) % 4 < 2][k]
        image[body] = colour
        badge = body & (np.hypot(u - rng.uniform(-3, 3), v - rng.uniform(-3, 3)) < 0.5 * radius)
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
    inside = np.hypot(u, v) < radius if rng.random() < 0.5 else np.maximum(abs(u), abs(v)) < radius * 0.85
    return inside, cy, cx


def toy_colour(hue):
    """A saturated colour of that hue (radians), (3,) in 0..255."""
    return 135 + 95 * np.cos(hue - np.array([0, 2, 4]) * math.pi / 3)


DATASETS = {"VOC2012": VOC2012, "COCO2014": COCO2014, "toy": Toy}


def training_split(data):
    """The split a data set is trained on unless --split says otherwise."""
    return "trainaug" if data == "VOC2012" else "train"


def read_classes(path):
    """Class names of --classes, one a line."""
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not 1 <= len(names) <= 254 or len(set(names)) < len(names):
        raise ValueError(f"{path} must name 1 to 254 different classes, one a line; it has {len(names)} lines, "
                         f"{len(set(names))} of them different")
    return tuple(names)


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}") from None
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not a readable text file ({error})") from error


def open_split(args, split, cache=None):
    """open_data with the command line's settings."""
    dataset = open_data(args.data, args.data_root, split, args.limit, cache, args.classes)
    dataset.options = same_data(args)
    return dataset


def open_data(data, root, split, limit=None, cache=None, classes=None):
    """A dataset on one of its splits.

    data: a name in DATASETS (under root), or a folder in VOC layout with its own classes, named in the file classes.
    limit: only the first so many images. cache: folder for rasterised masks. Raises ValueError / FileNotFoundError on
    an unknown data set or split, a missing folder, a list naming a missing image, limit < 1.
    """
    if data not in DATASETS and not (Path(data).is_dir() and classes):
        raise ValueError(f"unknown data set {data!r}: use {', '.join(DATASETS)}, or a folder in VOC layout, with --classes "
                         f"naming a file that lists its class names")
    if data in DATASETS and classes:
        raise ValueError(f"--classes {classes}: {data} has classes of its own; --classes goes with --data FOLDER")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}: at least one image is needed")
    if data in DATASETS:
        dataset = DATASETS[data](root, split, cache)
    else:
        dataset = VOCLayout(data, split, data, read_classes(classes), "it is part of the VOC layout")
    if not dataset.ids:
        raise ValueError(f"the split {split!r} of {data} is empty")
    if len(set(dataset.ids)) < len(dataset.ids):
        twice = next(n for n in dataset.ids if dataset.ids.count(n) > 1)
        raise ValueError(f"the split {split!r} of {data} lists {twice!r} more than once")
    dataset.ids = dataset.ids[:limit]
    return dataset


def need_folder(path, remedy):
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}: {remedy} (see README), or point --data-root elsewhere")


def label_vector(dataset, name):
    """Image labels as (C,) float in {0, 1}."""
    vector = torch.zeros(len(dataset.classes))
    vector[dataset.labels(name)] = 1
    return vector


# ---------------------------------------------------------------------------------------------------------------------
# Loading and transforms. Images travel as uint8 and are normalised on the device.
# ---------------------------------------------------------------------------------------------------------------------
@lru_cache(maxsize=None)
def per_channel(values, device):
    """(3,) numbers -> (3, 1, 1) on the device; made once, since every copy from the host makes a GPU wait."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def normalise(images):
    """uint8 (B, 3, H, W) -> float, ImageNet-normalised."""
    return (images.float() / 255 - per_channel(IMAGENET_MEAN, images.device)) / per_channel(IMAGENET_STD, images.device)


def mirrored_views(images, scale, multiple):
    """Normalised images (1, 3, H, W) at a scale, with their mirror image -> (2, 3, ., .) and the size (h, w) in it.

    Right and bottom are padded to whole multiples (of the patch size); results are to be cropped to (h, w).
    """
    h, w = (max(1, round(side * scale)) for side in images.shape[-2:])
    if scale != 1:
        images = F.interpolate(images, size=(h, w), mode="bilinear", align_corners=False)
    both = torch.cat([images, images.flip(-1)])
    return F.pad(both, [0, -w % multiple, 0, -h % multiple], mode="replicate"), (h, w)


def noise_patch(pixels):
    """Random erasing of the release: with probability 0.25, 2 to 33 % of the area becomes noise (uint8 in and out)."""
    to_noise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.45] * 3, [0.225] * 3),
                           v2.RandomErasing(0.25, value="random"), v2.Normalize([-2.0] * 3, [1 / 0.225] * 3)])
    return v2.functional.to_dtype(to_noise(pixels).clamp(0, 1), torch.uint8, scale=True)


AUGMENTATIONS = {
    "jitter": lambda size: [
        v2.RandomResizedCrop(size, scale=(0.3, 1)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4),
        v2.PILToTensor()],
    "jitter-8": lambda size: [
        v2.RandomResizedCrop(size, scale=(0.08, 1)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4),
        v2.PILToTensor()],
    "release": lambda size: [
        v2.RandomResizedCrop(size, scale=(0.08, 1), interpolation=v2.InterpolationMode.BICUBIC), v2.RandomHorizontalFlip(),
        *[v2.RandomApply([v2.RandAugment(1, magnitude=27)], 0.5)] * 2,
        v2.PILToTensor(), v2.Lambda(noise_patch)],
}


class ClassificationSet(Dataset):
    """(image (3, size, size) uint8, labels (C,)) by (index, seed): augmented, or (augment None) squeezed to a square."""

    def __init__(self, dataset, size, augment=None):
        self.dataset = dataset
        self.transform = v2.Compose(AUGMENTATIONS[augment](size) if augment else [v2.Resize((size, size)), v2.PILToTensor()])
        self.labels = torch.stack([label_vector(dataset, name) for name in dataset.ids])  # read, and checked, up front

    def __len__(self):
        return len(self.dataset.ids)

    def __getitem__(self, key):
        index, seed = key
        image = self.dataset.image(self.dataset.ids[index])
        with seeded(seed):
            return self.transform(image), self.labels[index]


class SegmentationSet(Dataset):
    """(image (3, size, size) uint8, mask (size, size) int64) with joint scale, flip and crop; padding is 255."""

    def __init__(self, dataset, masks, size):
        self.dataset, self.masks = dataset, Path(masks)
        self.transform = v2.Compose([
            v2.ScaleJitter((size, size), scale_range=(0.5, 2.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Image: 124, tv_tensors.Mask: IGNORE}),
        ])

    def __len__(self):
        return len(self.dataset.ids)

    def __getitem__(self, key):
        index, seed = key
        name = self.dataset.ids[index]
        image, path = self.dataset.image(name), self.masks / f"{name}.png"
        mask = read_mask(path, image.size[::-1])
        if (bad := mask[(mask > len(self.dataset.classes)) & (mask != IGNORE)]).size:
            raise ValueError(f"{path} holds the value {bad[0]}: {self.dataset.name} has 0..{len(self.dataset.classes)}")
        with seeded(seed):
            image, mask = self.transform(tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(mask)))
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor).long()


@contextmanager
def seeded(seed):
    """Random transforms inside depend on seed alone, not on the worker, the order or what ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class EpochSampler:
    """Yields (index, seed) in an order, and with seeds, that depend on (seed, epoch) alone: call set_epoch.

    Only whole batches of batch; of each, this process's share (all of it, unless torchrun started several).
    """

    def __init__(self, length, seed, batch=1):
        self.length, self.seed, self.batch, self.epoch = length, seed, batch, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.length // self.batch * (self.batch // world())

    def __iter__(self):
        rng = random.Random(f"{self.seed}/{self.epoch}")
        order = list(range(self.length))
        rng.shuffle(order)
        keys = [(index, rng.getrandbits(62)) for index in order][:self.length // self.batch * self.batch]
        share = self.batch // world()
        return iter([key for i, key in enumerate(keys) if i % self.batch // share == rank()])


def train_loader(samples, batch, seed, workers, device):
    """A shuffling DataLoader; call loader.sampler.set_epoch(e) before each epoch. The last short batch is dropped.

    batch is that of all processes together. The generator of its own keeps it from drawing on the global one, on which
    drop-path and dropout depend.
    """
    if batch < 1 or batch > len(samples):
        raise ValueError(f"--batch {batch} with {len(samples)} images: it must be between 1 and the number of images")
    if batch % world():
        raise ValueError(f"--batch {batch} is shared by {world()} processes: it must be a multiple of {world()}")
    return DataLoader(samples, batch // world(), sampler=EpochSampler(len(samples), seed, batch), num_workers=workers,
                      pin_memory=device.type == "cuda", persistent_workers=workers > 0, generator=torch.Generator())


class Photographs(Dataset):
    """(name, image (3, H, W) uint8) of some images of a data set, at their own size."""

    def __init__(self, dataset, names):
        self.dataset, self.names = dataset, names

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return self.names[index], TF.pil_to_tensor(self.dataset.image(self.names[index]))


def photographs(dataset, names, workers, device):
    """Iterates over Photographs one by one, in order, decoded ahead by worker processes if a GPU does the other work."""
    return DataLoader(Photographs(dataset, names), batch_size=None, num_workers=workers if device.type == "cuda" else 0,
                      generator=torch.Generator())


def plain_loader(samples, batch, workers):
    """Every sample once, in order."""
    return DataLoader(samples, batch, sampler=[(index, 0) for index in range(len(samples))], num_workers=workers,
                      generator=torch.Generator())


# ---------------------------------------------------------------------------------------------------------------------
# Artefacts: one writer, one reader each
# ---------------------------------------------------------------------------------------------------------------------
@contextmanager
def replacing(path):
    """Yields a temporary path in the same folder; it takes the place of path only when the block went well.

    Raises OSError if the block does (a full disk): then path is what it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error}): what was there is unchanged; make room, or allow writing there, "
                      f"and give the same command again, a stage with --resume") from error
    finally:
        temporary.unlink(missing_ok=True)


@lru_cache(maxsize=1)
def palette():
    """The PASCAL VOC colour map as 768 ints: bits of the index spread over the high bits of R, G, B."""
    spread = lambda index, channel: sum((index >> (3 * j + channel) & 1) << (7 - j) for j in range(3))
    return [spread(index, channel) for index in range(256) for channel in range(3)]


def write_mask(path, mask):
    """(H, W) uint8 -> palette PNG (0 background, 1..C, 255 ignore)."""
    image = Image.fromarray(np.asarray(mask, np.uint8))
    image.putpalette(palette())
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def read_mask(path, size=None):
    """A mask as (H, W) uint8. size: the (H, W) it must have. Raises FileNotFoundError / ValueError."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L"):
                raise ValueError(f"mode {image.mode}, but masks are 8-bit palette or grey")
            mask = np.array(image)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable mask ({error})") from error
    if size is not None and mask.shape != tuple(size):
        raise ValueError(f"{path} is {mask.shape[0]} x {mask.shape[1]} pixels, its image is {size[0]} x {size[1]}")
    return mask


def write_cam(path, class_ids, cam, size):
    """class_ids (K,) of the present classes, cam (K, h, w) in [0, 1], size = (H, W) of the image -> .npz, float16."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, class_ids=np.asarray(class_ids, np.int16), cam=np.asarray(cam, np.float16),
                 size=np.asarray(size, np.int32))


def read_cam(path):
    """-> class_ids (K,) int64 tensor, cam (K, h, w) float32 tensor, (H, W)."""
    try:
        with np.load(path, allow_pickle=False) as record:
            class_ids, cam, (H, W) = record["class_ids"], record["cam"], record["size"]
            assert cam.ndim == 3 and len(class_ids) == len(cam)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a readable CAM file ({type(error).__name__}: {error}); delete it and run "
                         f"refine.py --resume") from error
    return torch.from_numpy(class_ids.astype(np.int64)), torch.from_numpy(cam.astype(np.float32)), (int(H), int(W))


def read_json(path, remedy):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}: {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}); {remedy}") from error


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
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()), flush=True)


def write_checkpoint(path, state):
    """Plain types and tensors only, so that read_checkpoint can refuse everything else."""
    if rank():
        return
    buffer = io.BytesIO()
    torch.save(state, buffer)  # straight to a file, a full disk would end in an error of zip's innards
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())  # on the disk before it takes the old one's place


def read_checkpoint(path, stage, data=None, classes=None, options=None):
    """A checkpoint of stage ("cls" or "seg"), on the CPU.

    data: name of the data set it must be of; classes: its classes; options: same_data of the command line, for messages.
    Raises FileNotFoundError with the command that makes it; ValueError if unreadable or of something else.
    """
    command, options = {"cls": "train_cls.py", "seg": "train_seg.py"}[stage], options or f"--data {data or 'VOC2012'}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}: make it with  python {command} {options} "
                                f"--out {Path(path).parent.parent}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        config = state["config"]
        if state["stage"] != stage:
            raise ValueError(f"it is of stage {state['stage']!r}, not {stage!r}")
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of {command} ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from error
    if data is not None and Path(config["data"]).name != Path(data).name:
        raise ValueError(f"{path} was trained on {config['data']}, not on {data}: give the --out of a {data} run")
    if classes is not None and list(classes) != config["classes"]:
        raise ValueError(f"{path} was trained on the classes {', '.join(config['classes'])}; now they are {', '.join(classes)}")
    return state


def fingerprint(path):
    """What a file's content is recognised by in args.json: the first 16 digits of its SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Profiling
# ---------------------------------------------------------------------------------------------------------------------
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}  # bfloat16, dense, by the maker's data sheets


def no_mark(phase):
    """What stands in for a Stopwatch when nobody wants the time."""


class Stopwatch:
    """Seconds by phase: calling it with a name ends the phase of that name, waiting for the GPU first."""

    def __init__(self, device):
        self.device = device
        self.reset()

    def reset(self):
        self.seconds, self.last = defaultdict(float), time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def __call__(self, phase):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now

    def table(self, steps, batch=1, flops=None):
        """Print milliseconds a step by phase, images/s, peak memory and (flops: of the model, a step) utilisation.

        Memory is the most allocated on the GPU since reset(), or, on a CPU, the most this process ever had.
        Returns images/s.
        """
        total = sum(self.seconds.values())
        for phase, seconds in self.seconds.items():
            print(f"  {phase:<12} {1e3 * seconds / steps:9.1f} ms  {100 * seconds / total:4.0f} %")
        rate = steps * batch / total
        print(f"  {'together':<12} {1e3 * total / steps:9.1f} ms  {rate:.1f} images/s  peak memory {peak_memory(self.device):.0f} MiB")
        if flops:
            tera = flops * steps / total / 1e12
            name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
            peak = next((p for key, p in PEAK_TFLOPS.items() if key in name), None)
            print(f"  {name}: {tera:.2f} TFLOP/s of the model" + (f", {100 * tera / peak:.1f} % of {peak}" if peak else ""))
        return rate


def peak_memory(device):
    """MiB: most allocated on a GPU since the last reset, or on a CPU the most this process ever had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes: torchrun --nproc_per_node=N train_cls.py ...
# ---------------------------------------------------------------------------------------------------------------------
def rank():
    """This process's number, 0 .. world() - 1; 0 writes the logs and checkpoints."""
    return int(os.environ.get("RANK", 0))


def world():
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join(device):
    """Join the other processes, if there are any, and return this one's device."""
    if world() == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # hours, because in stages 2 and 3 the fast processes wait for the slow ones at the end
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
        atexit.register(dist.destroy_process_group)
        sys.excepthook = end_at_once
    return device


def end_at_once(kind, error, trace):
    """Print an error and leave without good-byes: those would wait for processes that wait for this one."""
    traceback.print_exception(kind, error, trace)
    sys.stdout.flush()  # os._exit does not
    sys.stderr.flush()
    os._exit(1)


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
    if device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


# ---------------------------------------------------------------------------------------------------------------------
# The command line that all stages share
# ---------------------------------------------------------------------------------------------------------------------
def common_arguments(parser):
    add = parser.add_argument
    add("--data", default="VOC2012", help=f"{', '.join(DATASETS)}, or a folder in VOC layout (with --classes)")
    add("--classes", metavar="FILE", help="for --data FOLDER: its class names, one a line")
    add("--data-root", default="data", help="folder that holds VOCdevkit/VOC2012 or COCO2014")
    add("--out", help="output folder (default runs/<data>)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of matrix products and convolutions (auto: bfloat16 where the device has it natively)")
    add("--deterministic", action="store_true", help="on CUDA: only operations that give the same bits again (a CPU always does)")
    add("--workers", type=int, default=min(8, (os.cpu_count() or 2) // 2), help="processes that load images (and, of COCO, draw masks)")
    add("--limit", type=int, help="use only the first so many images of each split")
    add("--resume", action="store_true", help="go on where an interrupted run stopped")
    add("--overwrite", action="store_true", help="replace what an earlier run wrote")


def profile_steps(text):
    """The N of --profile N, for argparse."""
    if world() > 1:
        raise argparse.ArgumentTypeError("it times one process: run it without torchrun")
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps, at least 1")
    return int(text)


def start(args):
    """The device, after checking that it is there; sets the seed and args.out."""
    args.out = Path(args.out or Path("runs") / Path(args.data).resolve().name)
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise ValueError(f"--device {args.device}: not a device ({str(error).splitlines()[0]})") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: this torch sees no CUDA GPU; use --device cpu or install a CUDA build")
    if args.workers < 0:
        raise ValueError(f"--workers {args.workers}: 0 (load in this process) or more")
    if args.precision == "auto":
        args.precision = "bfloat16" if native_bfloat16(device) else "float32"
    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return join(device)


def same_data(args):
    """The part of a command line that names the data, for messages."""
    return " ".join([f"--data {args.data}", *([f"--classes {args.classes}"] if args.classes else []),
                     *([f"--data-root {args.data_root}"] if args.data_root != "data" else [])])


def prepare_folder(folder, args, keep=("resume", "overwrite", "device", "workers", "out", "data_root", "cache_gb", "profile")):
    """Make a stage's folder and its args.json.

    A folder in use needs --resume (same settings, and made from the same: args.made_from, fingerprints by name; else
    ValueError) or --overwrite (its files are deleted). Of several processes one does it and the others wait.
    """
    if rank():
        return wait_for_all()
    folder = Path(folder)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in keep}
    used = folder.is_dir() and any(folder.iterdir())
    if used and args.resume and (folder / "args.json").is_file():
        before = read_json(folder / "args.json", "delete the folder to start again")
        for what, content in settings.get("made_from", {}).items():
            if before.get("made_from", {}).get(what) != content:
                raise ValueError(f"--resume in {folder}, but the {what} changed since: start again with --overwrite")
        if changed := [k for k in settings if before.get(k) != settings[k]]:
            raise ValueError(f"--resume in {folder} with another --{changed[0].replace('_', '-')}: it was {before.get(changed[0])!r}, "
                             f"now {settings[changed[0]]!r}; repeat the settings or use another --out")
        for half_written in folder.glob(".*.tmp"):  # by a process that was killed
            half_written.unlink()
    elif used and args.overwrite:
        shutil.rmtree(folder)
    elif used and not args.resume:
        raise ValueError(f"{folder} is in use: go on with --resume, replace it with --overwrite, or choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "args.json", settings)
    wait_for_all()


def autocast(device, precision):
    """Matrix products and convolutions in precision, "bfloat16" or "float32"; everything else stays float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def native_bfloat16(device):
    """Whether the device multiplies bfloat16 natively, so that it is the faster precision."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
