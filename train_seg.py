"""Stage 3: a torchvision DeepLab trained on pseudo-masks, and its predictions.

Reads  <out>/pseudo/<image>.png (or --masks) and the images of --split, those of --predict-split;
       for deeplabv3_vit <out>/cls/last.pt, else ImageNet weights; once trained, any --photos.
Writes <out>/seg/{args.json, log.jsonl, last.pt}, <out>/pred/<split>/{args.json, <image>.png}
       (training deletes what was in <out>/pred); of photographs <out>/photos/<name>.png (the
       mask) and .overlay.jpg (the mask laid over them).
Run    python train_seg.py --data VOC2012                   (after refine.py)
Expect on one core of an AMD EPYC, deeplabv3_vit of DeiT-Tiny, 224 px, bfloat16: 13 images/s.
"""
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.models import get_model_weights
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import data
import model as vit

ARCHITECTURES = ("deeplabv3_resnet101", "deeplabv3_resnet50", "deeplabv3_mobilenet_v2",
                 "deeplabv3_vit")
ATROUS_RATES = (6, 12, 18)  # of DeepLabV3 at stride 16; at 12, 24, 36 it would see padding mostly
RECIPES = {  # defaults by kind of backbone; toy has its own
    "cnn": dict(size=513, batch=16, epochs=30, lr=0.001),
    "vit": dict(size=320, batch=16, epochs=30, lr=6e-5),
    "toy": dict(size=64, batch=16, epochs=6, lr=5e-4),
}


# -------------------------------------------------------------------------------------------------
# Images and masks
# -------------------------------------------------------------------------------------------------
class SegmentationSet(Dataset):
    """(image (3, size, size), mask (size, size)), both uint8.

    Resized 0.5 to 2 times, flipped, cropped; what lies beyond the image is undecided.
    """

    def __init__(self, dataset, masks, size):
        self.dataset, self.masks, self.size = dataset, Path(masks), size
        self.transform = v2.Compose([
            v2.RandomHorizontalFlip(),
            v2.RandomCrop(size, pad_if_needed=True,
                          fill={tv_tensors.Image: 124, tv_tensors.Mask: data.IGNORE}),
        ])

    def __len__(self):
        return len(self.dataset.ids)

    def __getitem__(self, key):
        index, seed = key
        name = self.dataset.ids[index]
        image = self.dataset.image(name)
        path = self.masks / f"{name}.png"
        mask = data.read_mask(path, len(self.dataset.classes), image.size[::-1])
        with data.seeded(seed):
            scale = 0.5 + 1.5 * torch.rand(()).item()
            size = [max(1, round(side * scale)) for side in mask.shape]
            image = TF.resize(tv_tensors.Image(image), size, antialias=True)
            mask = TF.resize(tv_tensors.Mask(torch.from_numpy(mask)), size)
            image, mask = self.transform(image, mask)
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)


# -------------------------------------------------------------------------------------------------
# Models
# -------------------------------------------------------------------------------------------------
class ViTFeatures(nn.Module):
    """The patch tokens of a ViT as a feature map (B, D, gh, gw), where DeepLabV3 looks for it."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        model.head.requires_grad_(False)  # the patch head has no part in segmentation

    def forward(self, x):
        tokens, grid, _, _ = self.model.tokens(x)
        return {"out": tokens[:, self.model.num_classes:].transpose(1, 2).unflatten(2, grid)}


def cnn_trunk(arch):
    """torchvision's ResNet or MobileNetV2 at stride 16, untrained, and its number of channels.

    The last halving is left out, and the blocks behind it are dilated instead.
    """
    if arch == "deeplabv3_mobilenet_v2":
        features = torchvision.models.mobilenet_v2(weights=None).features
        features[14].conv[1][0].stride = (1, 1)
        for block in features[15:18]:
            depthwise = block.conv[1][0]
            depthwise.dilation = depthwise.padding = (2, 2)
        return IntermediateLayerGetter(features, {"17": "out"}), 320
    make = getattr(torchvision.models, arch.removeprefix("deeplabv3_"))
    resnet = make(weights=None, replace_stride_with_dilation=[False, False, True])
    return IntermediateLayerGetter(resnet, {"layer4": "out"}), 2048


def build(arch, num_classes, classifier=None):
    """A DeepLabV3 over C foreground classes and the background, backbone untrained.

    classifier: for deeplabv3_vit the config of the stage-1 checkpoint (preset, depth, size,
    classes).
    """
    if arch == "deeplabv3_vit":
        model = vit.build(classifier["preset"], num_classes, depth=classifier["depth"],
                          image_size=classifier["size"])
        backbone, channels = ViTFeatures(model), model.dim
    else:
        backbone, channels = cnn_trunk(arch)
    net = DeepLabV3(backbone, DeepLabHead(channels, num_classes + 1, ATROUS_RATES))
    if arch != "deeplabv3_vit":  # what convolutions are fastest with
        net.to(memory_format=torch.channels_last)
    return net


def load_backbone(net, arch, source):
    """ImageNet weights into a CNN backbone; source "auto" (torchvision's) or a path."""
    with data.given("--pretrained", "give a file of ImageNet weights, auto or none"):
        if source == "auto":  # of classification: torchvision's for segmentation saw pixel labels
            weights = get_model_weights(arch.removeprefix("deeplabv3_")).IMAGENET1K_V1
            found = vit.download_weights(weights.url)
        else:
            found = vit.plain_weights(vit.read_weights(source, arch))
    own = net.backbone.state_dict()
    if arch == "deeplabv3_mobilenet_v2":  # layers 0, 1, ... here, features.0 ... there
        found = {k.removeprefix("features."): v for k, v in found.items()}
    chosen = {k: found[k] for k in own if k in found}
    absent = [k for k in own if k not in found and not k.endswith("num_batches_tracked")]
    wrong = [k for k, v in chosen.items() if v.shape != own[k].shape]
    if absent or wrong:
        raise data.UserError(f"{source} does not hold an ImageNet backbone for {arch} (first "
                             f"problem at {(absent + wrong)[0]}); give torchvision's "
                             "classification weights of that network")
    net.backbone.load_state_dict(chosen, strict=False)


# -------------------------------------------------------------------------------------------------
# Training and prediction
# -------------------------------------------------------------------------------------------------
def train_one_epoch(net, optimizer, loader, args, epoch):
    """All steps of an epoch -> its log record. UserError if a loss is not finite."""
    device = next(net.parameters()).device
    loader.sampler.set_epoch(epoch)
    data.seed_epoch(args.seed, epoch)
    net.train()
    total, begin, steps = torch.zeros((), device=device), time.time(), len(loader)

    for step, (pixels, mask) in enumerate(loader, 1):
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * (1 - (epoch + (step - 1) / steps) / args.epochs) ** 0.9
        pixels = pixels.to(device, non_blocking=True)
        mask = mask.to(device, non_blocking=True).long()

        # cross-entropy over the labelled pixels of all processes, whose gradients are averaged:
        # hence the factor world(); without any such pixel it is 0, not nan
        with data.autocast(device, args.precision):
            logits = net(data.normalise(pixels))["out"]
        labelled = data.sum_over_all((mask != data.IGNORE).sum()).clamp_min(1)
        each = F.cross_entropy(logits.float(), mask, ignore_index=data.IGNORE, reduction="none")
        loss = each.sum() * data.world() / labelled  # on CUDA torch's own sum is not deterministic
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.detach()

        if step % 20 == 0 or step == steps:  # not each step: looking at a loss makes a GPU wait
            data.need_finite(total, epoch, step)
            rate = step * args.batch / (time.time() - begin)
            data.progress(f"step {step}/{steps}  loss {total / step:.4f}  {rate:.1f} images/s")

    seconds = time.time() - begin
    loss = data.sum_over_all(total).item() / steps / data.world()
    return {"epoch": epoch + 1, "loss": loss, "lr": optimizer.param_groups[0]["lr"],
            "precision": args.precision, "images/s": steps * args.batch / seconds,
            "seconds": seconds}


@torch.no_grad()
def predict(net, pixels, scales, multiple=1, precision="float32"):
    """The likeliest class over scales and mirror images: (3, H, W) uint8 -> (H, W) uint8.

    multiple: sides are padded to multiples of it, a ViT's patch size.
    """
    H, W = pixels.shape[-2:]
    images, total = data.normalise(pixels[None]), 0
    for scale in scales:
        padded, (h, w) = data.mirrored_views(images, scale, multiple)
        with data.autocast(pixels.device, precision):
            logits = net(padded)["out"].float()[..., :h, :w]
        prob = data.bilinear(logits, (H, W)).softmax(1)
        total = total + prob[0] + prob[1].flip(-1)
    return total.max(0).indices.to(torch.uint8)  # many times faster than argmax on a CPU


def padding_multiple(net):
    """Images of a ViT are padded to multiples of its patch size, of a CNN not at all."""
    return net.backbone.model.patch if isinstance(net.backbone, ViTFeatures) else 1


def predict_photograph(net, pixels, scales, args, device):
    """predict() within a bounded memory: a large photograph is shrunk, its mask enlarged."""
    multiple = padding_multiple(net)
    most = args.max_side or (1024 if multiple == 1 else 64 * multiple)
    limited = data.limit_size(pixels, most).to(device)
    mask = predict(net, limited, scales, multiple, args.precision)
    return data.enlarge(mask.cpu(), pixels.shape[-2:]).numpy()


def predict_split(net, dataset, scales, args, device):
    """Predict what is not there yet; of several processes each takes its share."""
    net.eval()
    torch.backends.cudnn.benchmark = False  # nearly every photograph has a size of its own
    folder, begin = args.out / "pred" / dataset.split, time.time()

    data.prepare_folder(folder, args, lambda: {
        "scales": scales, "max_side": args.max_side, "precision": args.precision,
        "model": data.file_digest(args.out / "seg" / "last.pt")})
    todo = [name for name in data.share(dataset.ids) if not (folder / f"{name}.png").is_file()]
    images = data.load_images(dataset, todo, args.workers, device)
    for count, (name, pixels) in enumerate(images, 1):
        data.write_mask(folder / f"{name}.png",
                        predict_photograph(net, pixels, scales, args, device))
        if count % 20 == 0:
            rate = count / (time.time() - begin)
            data.progress(f"{count}/{len(todo)} predicted, {rate:.1f} images/s")
    data.wait_for_all()
    record = {"predicted": len(dataset.ids), "seconds": time.time() - begin}
    data.log_line(args.out / "seg", record)


# -------------------------------------------------------------------------------------------------
# The stage
# -------------------------------------------------------------------------------------------------
def make_optimizer(net, args):
    """The head learns ten times as fast as the backbone."""
    backbone = [p for p in net.backbone.parameters() if p.requires_grad]
    head = list(net.classifier.parameters())
    groups = [{"params": backbone, "lr": args.lr, "base": args.lr},
              {"params": head, "lr": 10 * args.lr, "base": 10 * args.lr}]
    if args.arch == "deeplabv3_vit":
        return torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-4)


def starting_point(net, args, dataset, last, classifier):
    """The checkpoint to go on from; None: from pretrained weights, now in net, or from scratch."""
    if args.resume and last.is_file():
        checkpoint = data.read_checkpoint(last, "seg", dataset)
        if checkpoint["epoch"] < args.epochs:
            data.need_optimizer(checkpoint, last)
        return checkpoint
    if args.pretrained != "none" and classifier:
        net.backbone.model.load_state_dict(classifier["model"])
    elif args.pretrained != "none":
        load_backbone(net, args.arch, args.pretrained)
    return None


def check_flags(args, masks, device):
    """UserError on flags that do not go together; masks: the folder of pseudo-masks."""
    folder, pred = args.out / "seg", args.out / "pred"
    if any(masks.resolve().is_relative_to(place.resolve()) for place in (folder, pred)):
        raise data.UserError(f"--masks {masks} lies in {args.out}, where training replaces "
                             "predictions: use another --out")
    if pred.is_dir() and not (folder / "last.pt").is_file() and not args.overwrite:
        raise data.UserError(f"{pred} holds predictions, but {folder} no model that made them: "
                             "replace them with --overwrite, or choose another --out")
    if device.type == "cpu" and args.batch < 2 * data.world():
        raise data.UserError(f"--batch {args.batch} for {data.world()} processes: each needs two "
                             "images, for the batch normalisation of pooled features")


def check_masks(dataset, masks):
    """UserError unless masks are there, of these classes, no ground truth, and show any class."""
    if masks.resolve() in [folder.resolve() for folder in dataset.ground_truth_folders()]:
        raise data.UserError(f"{masks} is pixel ground truth: training on it would not be weakly "
                             "supervised; give the pseudo-masks of refine.py")
    data.need_files(masks, dataset.ids, ".png", "make them with refine.py, in the same --out")
    data.need_classes_of(masks, dataset)
    for name in dataset.ids:
        mask = data.read_mask(masks / f"{name}.png", len(dataset.classes))
        if ((mask > 0) & (mask != data.IGNORE)).any():
            return
    raise data.UserError(f"the masks in {masks} show no class: write class k as k, {data.IGNORE} "
                         "is undecided")


def load_trained(args, dataset, device):
    """The DeepLab of <out>/seg in eval mode, and its config; dataset: what it was trained on."""
    checkpoint = data.read_checkpoint(args.out / "seg" / "last.pt", "seg", dataset)
    data.look_at_epoch(checkpoint, args.out / "seg" / "last.pt")
    config = checkpoint["config"]
    net = build(config["arch"], len(config["classes"]), config["classifier"])
    net.load_state_dict(checkpoint["model"])
    return net.to(device).eval(), config


def segment_photos(args, device):
    """Masks of any photographs; needs the trained model alone."""
    net, config = load_trained(args, None, device)
    names = ("background", *config["classes"])
    for path, pixels in data.read_photos(args.photos):
        mask = predict_photograph(net, pixels, args.scales or config["scales"], args, device)
        found = {names[value]: value for value in np.unique(mask).tolist() if value}

        target = args.out / "photos" / f"{path.stem}.png"
        overlay = target.with_suffix(".overlay.jpg")
        data.write_mask(target, mask)
        photo, shown = data.for_display(pixels, mask)
        data.write_overlay(overlay, data.tint(photo, shown), found)
        print(f"{path.name}: {', '.join(found) or 'background alone'}  ->  {target}, "
              f"{overlay.name}", flush=True)


def parse_args(argv=None):
    parser = data.argument_parser(__doc__)
    data.resuming_arguments(parser)
    parser.add_argument("--predict-only", action="store_true",
                        help="predict --predict-split with the trained model, train nothing")
    parser.add_argument("--photos", nargs="+", type=Path, metavar="PATH",
                        help="segment these photographs (files, folders) with the trained model, "
                             "train nothing; replaces earlier masks of the same names")
    add = parser.add_argument_group("model").add_argument
    add("--arch", choices=ARCHITECTURES, metavar="NAME",
        help=f"{', '.join(ARCHITECTURES)} (default the first; --data toy: the last)")
    add("--pretrained", metavar="auto|none|PATH", default="auto",
        help="auto (default): ImageNet backbone of torchvision, for deeplabv3_vit "
             "<out>/cls/last.pt, from which it takes its size with none too")
    add = parser.add_argument_group("training").add_argument
    add("--split", help="default trainaug of VOC2012, else train")
    add("--masks", type=Path, metavar="DIR", help="pseudo-masks (default <out>/pseudo)")
    add("--size", type=data.number(int, 16), metavar="PX",
        help="side of a training crop (default 513; ViT 320; --data toy: 64)")
    add("--batch", type=data.number(int, 2),
        help="at least 2, for the batch normalisation of pooled features (default 16)")
    add("--epochs", type=data.number(int, 1), help="default 30; --data toy: 6")
    add("--lr", type=data.number(float, 0),
        help="of the backbone, the head has ten times as much (default 0.001, SGD; ViT 6e-5, "
             "AdamW; --data toy: 5e-4)")
    add = parser.add_argument_group("prediction").add_argument
    add("--predict-split", default="val", metavar="SPLIT",
        help="split to predict after training (default val)")
    add("--scales", type=data.number(float, 0.01), nargs="+",
        help="default 0.5 0.75 1 1.25 1.5, each with its mirror image (--data toy: 1); a trained "
             "model's own for --photos and --predict-only")
    add("--max-side", type=data.number(int, 16), metavar="PX",
        help="shrink larger photographs (default 1024; ViT 64 patches)")
    args = parser.parse_args(argv)

    args.split = args.split or data.training_split(args.data)
    args.arch = args.arch or ("deeplabv3_vit" if args.data == "toy" else "deeplabv3_resnet101")
    kind = "vit" if args.arch == "deeplabv3_vit" else "cnn"
    for key, value in RECIPES["toy" if args.data == "toy" else kind].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.scales is None and not (args.photos or args.predict_only):
        args.scales = [1.0] if args.data == "toy" else [0.5, 0.75, 1.0, 1.25, 1.5]
    return args


def main(argv=None):
    args = parse_args(argv)
    device = data.setup(args)
    if args.photos:
        return segment_photos(args, device)
    if args.predict_only:
        dataset = data.open_split(args, args.predict_split)
        net, config = load_trained(args, dataset, device)
        return predict_split(net, dataset, args.scales or config["scales"], args, device)
    folder, masks = args.out / "seg", args.masks or args.out / "pseudo"
    check_flags(args, masks, device)

    # data
    dataset = data.open_split(args, args.split)
    predicted = data.open_split(args, args.predict_split, like=dataset)
    check_masks(dataset, masks)
    if args.masks is None:
        data.look_at_origin(masks, "classifier", args.out / "cls" / "last.pt")
    samples = SegmentationSet(dataset, masks, args.size)
    loader = data.train_loader(samples, args.batch, args.seed, args.workers, device)

    # model
    path, classifier = args.pretrained, None
    if args.arch == "deeplabv3_vit":
        if path in ("auto", "none"):  # with none, for its size
            path = args.out / "cls" / "last.pt"
        classifier = data.read_checkpoint(path, "cls", dataset)
    net = build(args.arch, len(dataset.classes), classifier and classifier["config"]).to(device)
    if args.size % padding_multiple(net):
        raise data.UserError(f"--size {args.size} is not a multiple of the patch size "
                             f"{padding_multiple(net)}")
    if not classifier:
        torch.backends.cudnn.benchmark = not args.deterministic

    # optimiser, where to begin
    optimizer = make_optimizer(net, args)
    checkpoint, first = starting_point(net, args, dataset, folder / "last.pt", classifier), 0
    made_from = {"pseudo-masks": [masks / f"{name}.png" for name in dataset.ids]}
    if classifier:
        made_from["classifier"] = [path]
    data.prepare_folder(folder, args, lambda: data.stage_settings(args, dataset, made_from))
    if checkpoint:  # of these settings, as prepare_folder found
        first = checkpoint["epoch"]
        net.load_state_dict(checkpoint["model"])
        if first < args.epochs:
            optimizer.load_state_dict(checkpoint["optimizer"])
    data.cut_log(folder, first)
    if first < args.epochs and not data.rank():  # what an earlier or half-trained model predicted
        shutil.rmtree(args.out / "pred", ignore_errors=True)
    data.wait_for_all()
    config = {"data": dataset.name, "arch": args.arch, "classes": list(dataset.classes),
              "classifier": classifier and classifier["config"], "scales": args.scales,
              "epochs": args.epochs}

    # train
    wrapped = data.distributed(net, device)
    saved = time.time()
    for epoch in range(first, args.epochs):
        record = train_one_epoch(wrapped, optimizer, loader, args, epoch)
        record["minutes_left"] = record["seconds"] * (args.epochs - epoch - 1) / 60
        data.log_line(folder, record)  # before the checkpoint: --resume cuts lines beyond it
        if epoch + 1 == args.epochs or time.time() - saved >= data.SECONDS_BETWEEN_CHECKPOINTS:
            data.write_checkpoint(folder / "last.pt", {
                "stage": "seg", "config": config, "epoch": epoch + 1,
                "model": net.state_dict(), "optimizer": optimizer.state_dict()})
            saved = time.time()

    # predict, in all processes with the batch statistics of the one that wrote the checkpoint
    if data.world() > 1:
        for buffer in net.buffers():
            torch.distributed.broadcast(buffer, 0)
    predict_split(net, predicted, args.scales, args, device)


if __name__ == "__main__":
    data.run(main)
