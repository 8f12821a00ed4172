"""Stage 3: a torchvision DeepLab trained on pseudo-masks, and its predictions.

Reads  <out>/pseudo/<image>.png (or --masks) and the images of --split; ground truth only to refuse masks that equal it.
Writes <out>/seg/{args.json, log.jsonl, last.pt} and <out>/pred/<split>/<image>.png for --predict-split.
Run    python train_seg.py --data VOC2012                   (after refine.py)
Expect on 2 CPU cores, deeplabv3_vit of DeiT-Tiny, 224 px: 8.2 to 8.7 images/s; prediction at 320 px 4.7 images/s (2026-11-22).
"""
import argparse
import shutil
import time
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models import segmentation
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3

import data
import model as vit
from evaluate import is_ground_truth, need_files

ARCHITECTURES = ("deeplabv3_resnet101", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "deeplabv3_mobilenet_v2",
                 "deeplabv3_vit")
BACKBONE_WEIGHTS = {  # ImageNet classification; torchvision's segmentation weights saw pixel labels
    "deeplabv3_resnet101": torchvision.models.ResNet101_Weights.IMAGENET1K_V1,
    "deeplabv3_resnet50": torchvision.models.ResNet50_Weights.IMAGENET1K_V1,
    "deeplabv3_mobilenet_v3_large": torchvision.models.MobileNet_V3_Large_Weights.IMAGENET1K_V1,
    "deeplabv3_mobilenet_v2": torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1,
}
RECIPES = {  # defaults by kind of backbone; toy has its own
    "cnn": dict(size=321, batch=16, epochs=30, lr=0.01),
    "vit": dict(size=320, batch=16, epochs=30, lr=6e-5),
    "toy": dict(size=64, batch=16, epochs=6, lr=2e-4),
}


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------
class Features(nn.Module):
    """Wraps a trunk of layers so that torchvision's DeepLabV3 finds its feature map under "out"."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, x):
        return {"out": self.features(x)}


class ViTFeatures(nn.Module):
    """The patch tokens of a ViT as a feature map (B, D, gh, gw)."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        model.head.requires_grad_(False)  # the patch head has no part in segmentation

    def forward(self, x):
        tokens, grid, _, _ = self.model.tokens(x)
        return {"out": tokens[:, self.model.num_classes:].transpose(1, 2).unflatten(2, grid)}


def mobilenet_v2_features():
    """torchvision's MobileNetV2 trunk up to its 320 channels, at stride 16 (the last stride becomes dilation 2)."""
    features = torchvision.models.mobilenet_v2(weights=None).features[:-1]
    for module in features[14:].modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.stride, module.dilation, module.padding = (1, 1), (2, 2), (2, 2)
    return features


def build(arch, num_classes, classifier=None):
    """A DeepLabV3 over C foreground classes and the background, backbone untrained.

    classifier: for deeplabv3_vit the config of the stage-1 checkpoint (preset, depth, size, classes).
    """
    if arch == "deeplabv3_vit":
        backbone = vit.build(classifier["preset"], num_classes, depth=classifier["depth"], image_size=classifier["size"])
        return DeepLabV3(ViTFeatures(backbone), DeepLabHead(backbone.dim, num_classes + 1))
    if arch == "deeplabv3_mobilenet_v2":
        return DeepLabV3(Features(mobilenet_v2_features()), DeepLabHead(320, num_classes + 1))
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown --arch {arch!r}: use one of {', '.join(ARCHITECTURES)}")
    return getattr(segmentation, arch)(weights=None, weights_backbone=None, num_classes=num_classes + 1)


def load_backbone(net, arch, source):
    """ImageNet classification weights into a CNN backbone: source "auto" (torchvision's download) or a path."""
    if source == "auto":
        try:
            state = BACKBONE_WEIGHTS[arch].get_state_dict(progress=True, check_hash=True)
        except (URLError, OSError) as error:
            raise FileNotFoundError(f"could not download {BACKBONE_WEIGHTS[arch].url} ({error}); fetch it elsewhere and "
                                    f"give its path with --pretrained PATH, or use --pretrained none") from error
    else:
        state = vit.read_weights(source, arch)
    own = net.backbone.state_dict()
    if arch.startswith("deeplabv3_mobilenet_v3"):  # the trunk's layers are named 0, 1, ... here and features.0 ... there
        state = {k.removeprefix("features."): v for k, v in state.items()}
    if not any(k in state for k in own) and "0.0.weight" in state:
        state = {f"features.{k}": v for k, v in state.items()}
    chosen = {k: state[k] for k in own if k in state}
    absent = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    wrong = [k for k, v in chosen.items() if v.shape != own[k].shape]
    if absent or wrong:
        raise ValueError(f"{source} does not hold an ImageNet backbone for {arch} (first problem at "
                         f"{(absent + wrong)[0]}); give torchvision's classification weights of that network")
    net.backbone.load_state_dict(chosen, strict=False)


# ---------------------------------------------------------------------------------------------------------------------
# Training and prediction
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def predict(net, pixels, scales, multiple=1, precision="float32"):
    """Class probabilities averaged over scales and mirror images: pixels (3, H, W) uint8 -> label (H, W) uint8."""
    H, W = pixels.shape[-2:]
    images, total = data.normalise(pixels[None]), 0
    for scale in scales:
        padded, (h, w) = data.mirrored_views(images, scale, multiple)
        with data.autocast(pixels.device, precision):
            logits = net(padded)["out"].float()[..., :h, :w]
        prob = F.interpolate(logits, size=(H, W), mode="bilinear", align_corners=False).softmax(1)
        total = total + prob[0] + prob[1].flip(-1)
    return total.max(0).indices.to(torch.uint8)  # many times faster than argmax on a CPU


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    data.common_arguments(parser)
    add("--split", help="images to train on (default: trainaug of VOC2012, else train)")
    add("--masks", type=Path, help="folder of pseudo-masks (default <out>/pseudo)")
    add("--arch", choices=ARCHITECTURES, help="default deeplabv3_resnet101; deeplabv3_vit for toy")
    add("--pretrained", help="auto: ImageNet backbone of torchvision, or <out>/cls/last.pt for deeplabv3_vit; a path; none")
    add("--size", type=int, help="pixels a side of a training crop")
    add("--batch", type=int)
    add("--epochs", type=int, help="default 30; 6 for toy")
    add("--lr", type=float, help="of the backbone; the head has ten times as much. SGD for CNNs, AdamW for the ViT")
    add("--predict-split", default="val", help="split to predict after training")
    add("--scales", type=float, nargs="+", help="of the prediction (default 0.5 0.75 1 1.25 1.5; 1 for toy)")
    args = parser.parse_args(argv)
    args.split = args.split or data.training_split(args.data)
    args.arch = args.arch or ("deeplabv3_vit" if args.data == "toy" else "deeplabv3_resnet101")
    args.pretrained = args.pretrained or "auto"
    recipe = RECIPES["toy" if args.data == "toy" else "vit" if args.arch == "deeplabv3_vit" else "cnn"]
    for key, value in recipe.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.scales = args.scales or ([1.0] if args.data == "toy" else [0.5, 0.75, 1.0, 1.25, 1.5])
    if args.epochs < 1 or args.batch < 2:
        parser.error(f"--epochs {args.epochs} --batch {args.batch}: at least one epoch, and two images a batch "
                     f"(DeepLab's batch normalisation of pooled features needs them)")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = data.start(args)
    dataset = data.open_split(args, args.split, args.out / "masks")
    target = data.open_split(args, args.predict_split)
    masks = args.masks or args.out / "pseudo"
    need_files(masks, dataset.ids, ".png", f"python refine.py {data.same_data(args)} --split {args.split} --out {args.out}")
    if is_ground_truth(dataset, masks):
        raise ValueError(f"{masks} is pixel ground truth: training on it would not be weakly supervised; give the "
                         f"pseudo-masks of refine.py")
    folder, state, classifier = args.out / "seg", None, None
    if args.arch == "deeplabv3_vit":
        first_stage = args.out / "cls" / "last.pt" if args.pretrained in ("auto", "none") else args.pretrained
        classifier = data.read_checkpoint(first_stage, "cls", dataset.name, dataset.classes, dataset.options)
    net = build(args.arch, len(dataset.classes), classifier and classifier["config"])
    multiple = net.backbone.model.patch if classifier else 1
    if args.size % multiple:
        raise ValueError(f"--size {args.size} is not a multiple of the patch size {multiple}")
    if args.resume and (folder / "last.pt").is_file():
        state = data.read_checkpoint(folder / "last.pt", "seg", dataset.name, dataset.classes)
        if state["config"]["arch"] != args.arch:
            raise ValueError(f"--resume in {folder}, which holds a {state['config']['arch']}, with --arch {args.arch}")
        net.load_state_dict(state["model"])
    elif args.pretrained != "none" and classifier:
        net.backbone.model.load_state_dict(classifier["model"])
    elif args.pretrained != "none":
        load_backbone(net, args.arch, args.pretrained)
    net.to(device)
    samples = data.SegmentationSet(dataset, masks, args.size)
    loader = data.train_loader(samples, args.batch, args.seed, args.workers, device)
    groups = [{"params": [p for p in net.backbone.parameters() if p.requires_grad], "lr": args.lr, "base": args.lr},
              {"params": list(net.classifier.parameters()), "lr": 10 * args.lr, "base": 10 * args.lr}]
    optimizer = (torch.optim.AdamW(groups, weight_decay=0.01) if classifier
                 else torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-4))
    first = 0
    if state:
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]
    predictions = args.out / "pred" / args.predict_split
    outdated = not state and predictions.parent.is_dir()  # of an earlier model
    if outdated and not args.overwrite:
        raise ValueError(f"{predictions.parent} holds predictions, but {folder} no model that made them: replace them with "
                         f"--overwrite, or choose another --out")
    if (masks / "args.json").is_file():  # --resume must not mix two sets of pseudo-masks
        args.made_from = {"pseudo-masks": data.fingerprint(masks / "args.json")}
    data.prepare_folder(folder, args, keep=("resume", "overwrite", "device", "workers", "out", "data_root", "predict_split"))
    if not data.rank():
        if outdated:
            shutil.rmtree(predictions.parent)
        for half_written in predictions.glob(".*.tmp"):
            half_written.unlink()
    data.wait_for_all()
    config = {"data": dataset.name, "arch": args.arch, "classes": list(dataset.classes)}
    per_epoch, begin, trained = len(loader), time.time(), data.distributed(net, device)
    for epoch in range(first, args.epochs):
        loader.sampler.set_epoch(epoch)
        torch.manual_seed((args.seed * 100_003 + epoch) * data.world() + data.rank())  # dropout; a resumed epoch repeats it
        net.train()
        total, epoch_begin = torch.zeros((), device=device), time.time()
        for step, (pixels, mask) in enumerate(loader):
            pixels, mask = pixels.to(device, non_blocking=True), mask.to(device, non_blocking=True)
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * (1 - (epoch + step / per_epoch) / args.epochs) ** 0.9
            with data.autocast(device, args.precision):
                logits = trained(data.normalise(pixels))["out"]
            labelled = data.sum_over_all((mask != data.IGNORE).sum()).clamp_min(1)  # without a labelled pixel 0, not nan
            loss = F.cross_entropy(logits.float(), mask, ignore_index=data.IGNORE, reduction="none").sum() * data.world() / labelled
            if not torch.isfinite(loss):
                raise FloatingPointError(f"loss {loss.item()} in epoch {epoch + 1}, step {step}: stopped; the last good "
                                         f"state is in {folder}; lower --lr")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
            if step % 20 == 19:
                rate = (step + 1) * args.batch / (time.time() - epoch_begin)
                data.progress(f"step {step + 1}/{per_epoch}  loss {loss.item():.4f}  {rate:.1f} images/s")
        seconds = time.time() - epoch_begin
        left = (time.time() - begin) / (epoch + 1 - first) * (args.epochs - epoch - 1)
        total = data.sum_over_all(total) / data.world()
        data.log_line(folder, {"epoch": epoch + 1, "loss": total.item() / per_epoch, "lr": optimizer.param_groups[0]["lr"],
                               "images/s": per_epoch * args.batch / seconds, "minutes_left": left / 60, "seconds": seconds})
        data.write_checkpoint(folder / "last.pt", {"stage": "seg", "config": config, "epoch": epoch + 1,
                                                   "model": net.state_dict(), "optimizer": optimizer.state_dict()})
    net.eval()
    begin = time.time()
    mine = [n for n in target.ids[data.rank()::data.world()] if not (predictions / f"{n}.png").is_file()]
    for made, (name, pixels) in enumerate(data.photographs(target, mine, args.workers, device), 1):
        label = predict(net, pixels.to(device), args.scales, multiple, args.precision)
        data.write_mask(predictions / f"{name}.png", label.cpu().numpy())
        if made % 20 == 0:
            data.progress(f"{made}/{len(mine)} predicted, {made / (time.time() - begin):.1f} images/s")
    data.wait_for_all()
    data.log_line(folder, {"predicted": len(target.ids), "seconds": time.time() - begin})


if __name__ == "__main__":
    main()
