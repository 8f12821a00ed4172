"""Stage 1: the classifier, first plain (warm-up), then with the AReAM affinity loss.

Reads  images and image-level labels of --split; DeiT weights (--pretrained).
Writes <out>/cls/{args.json, log.jsonl, last.pt, warmup.pt}; warmup.pt is the end of the warm-up,
       from which another run can start with --branch-from.
Run    python train_cls.py --data VOC2012
Expect on one CPU core, DeiT-Tiny, 224 px, bfloat16: 22 images/s plain, 12 with the AReAM loss.
"""
import math
import time
from pathlib import Path

import torch
from torch.profiler import record_function
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import aream
import data
import model as vit
from refine import mask_arguments, mask_settings, present_classes, pseudo_label

DEFAULTS = dict(preset="deit_small", size=224, batch=64, epochs=60, warmup_epochs=10,
                pretrained="auto", drop_path=0.1, augment="release")
RECIPES = {  # what other data sets need instead
    "toy": dict(preset="toy", size=64, batch=16, epochs=10, warmup_epochs=5, pretrained="none",
                deep_from=2, affinity_weight=4.0, drop_path=0.0, augment="jitter", lr=1e-3),
}


def parse_args(argv=None):
    parser = data.argument_parser(__doc__)
    data.resuming_arguments(parser)
    parser.add_argument("--download", action="store_true",
                        help="fetch VOC2012 (2 GB) or COCO2014 (20 GB) first, if it is not there")
    parser.add_argument("--profile", type=data.profile_steps, metavar="N",
                        help="time N steps, plain and AReAM, and write nothing")

    add = parser.add_argument_group("model").add_argument
    add("--preset", choices=vit.PRESETS,
        help="default deit_small, the paper's; --data toy: toy")
    add("--depth", type=data.number(int, 1), metavar="N",
        help="use the first N blocks only (the paper studies 6, 8, 10, 12)")
    add("--pretrained", metavar="auto|none|PATH",
        help="auto: download DeiT's ImageNet-1k weights (default); none: from scratch")
    add("--drop-path", type=data.number(float, 0, 1), metavar="P",
        help="default 0.1; --data toy: 0")

    add = parser.add_argument_group("training").add_argument
    add("--split", help="default trainaug of VOC2012, else train")
    add("--branch-from", metavar="CKPT",
        help="go on from another run's checkpoint, with this run's settings")
    add("--augment", choices=AUGMENTATIONS,
        help="release (default): crops, RandAugment, erasing; jitter (--data toy): larger crops, "
             "colour jitter")
    add("--size", type=data.number(int, 1), metavar="PX",
        help="of a training crop (default 224; --data toy: 64)")
    add("--batch", type=data.number(int, 1), help="default 64; --data toy: 16")
    add("--epochs", type=data.number(int, 1), help="default 60; --data toy: 10")
    add("--warmup-epochs", type=data.number(int, 0), metavar="N",
        help="the first N of them are without the AReAM loss (default 10; --data toy: 5)")
    add("--lr", type=data.number(float, 0), help="default 5e-4 * batch / 512; --data toy: 1e-3")
    add("--weight-decay", type=data.number(float, 0), default=0.05, metavar="D",
        help="default 0.05")

    add = parser.add_argument_group("AReAM").add_argument
    add("--reactivation", choices=aream.REACTIVATION, default="entropy",
        help="default entropy; none: the plain classifier")
    add("--entropy", choices=("online", "static"), default="online",
        help="of each image in each step (default), or averaged once over the training crops, "
             "when the warm-up is over (release)")
    add("--coupling", choices=("all", "split"), default="all",
        help="every layer guides and is supervised (default), or those below --deep-from guide "
             "the others (release)")
    add("--deep-from", type=data.number(int, 1), metavar="L",
        help="first deep layer, 0-based (default 7 of 12 layers; --data toy: 2)")
    add("--affinity-weight", type=data.number(float, 0), metavar="W",
        help="of the AReAM loss, a mean over layers (default 0.1 with split, as the release; 0.3 "
             "with all, for as much a layer; --data toy: 4)")
    add("--labels", choices=("two-views", "shared"), default="two-views",
        help="pair labels come from an extra pass over image and mirror image (default), or from "
             "the training pass itself")
    mask_arguments(add)
    args = parser.parse_args(argv)

    for key, value in {**DEFAULTS, **RECIPES.get(args.data, {})}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.split = args.split or data.training_split(args.data)
    if args.lr is None:
        args.lr = 5e-4 * args.batch / 512
    if args.affinity_weight is None:
        args.affinity_weight = 0.1 if args.coupling == "split" else 0.3
    if args.deep_from is None:
        args.deep_from = round(7 / 12 * (args.depth or vit.PRESETS[args.preset]["depth"]))
    if args.warmup_epochs > args.epochs:
        parser.error(f"--epochs {args.epochs} with --warmup-epochs {args.warmup_epochs} of them: "
                     "no more warm-up than that")
    if args.size % vit.PRESETS[args.preset]["patch"]:
        parser.error(f"--size {args.size}: not a multiple of the patch size "
                     f"{vit.PRESETS[args.preset]['patch']}")
    mask_settings(args)  # looks at them before anything is read or written
    return args


# -------------------------------------------------------------------------------------------------
# Images
# -------------------------------------------------------------------------------------------------
def erase(pixels):
    """Random erasing (p 0.25): noise in 2 to 33 % of the area, (3, H, W) uint8 in and out."""
    standard = (pixels.float() / 255 - 0.45) / 0.225  # the noise is of mean 0 and std 1
    erased = v2.RandomErasing(0.25, value="random")(standard)
    return (255 * (0.45 + 0.225 * erased)).clamp(0, 255).round().to(torch.uint8)


AUGMENTATIONS = {  # name -> transforms of a PIL image into (3, size, size) uint8
    "jitter": lambda size: [
        v2.RandomResizedCrop(size, scale=(0.3, 1)),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.4, 0.4, 0.4),
        v2.PILToTensor()],
    "release": lambda size: [
        v2.RandomResizedCrop(size, scale=(0.08, 1), interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.RandAugment(1, magnitude=27)], 0.5),  # 27 of 30, as 9 of 10
        v2.RandomApply([v2.RandAugment(1, magnitude=27)], 0.5),
        v2.PILToTensor(),
        v2.Lambda(erase)],
}


class ClassificationSet(Dataset):
    """samples[index, seed] -> image (3, size, size) uint8, labels (C,).

    data.EpochSampler draws the pairs, so that a crop depends on the run's seed, the epoch and the
    index alone. augment: a name in AUGMENTATIONS; None squeezes the image.
    """

    def __init__(self, dataset, size, augment=None):
        self.dataset = dataset
        squeeze = [v2.Resize((size, size)), v2.PILToTensor()]
        self.transform = v2.Compose(AUGMENTATIONS[augment](size) if augment else squeeze)
        # read, and checked, up front
        self.labels = torch.stack([dataset.label_vector(name) for name in dataset.ids])

    def __len__(self):
        return len(self.dataset.ids)

    def __getitem__(self, key):
        index, seed = key
        image = self.dataset.image(self.dataset.ids[index])
        with data.seeded(seed):
            return self.transform(image), self.labels[index]


# -------------------------------------------------------------------------------------------------
# One step
# -------------------------------------------------------------------------------------------------
@torch.no_grad()
def label_pass(model, pixels, precision):
    """The forward pass that labels are made from: eval mode, image and mirror image.

    pixels (B, 3, H, W) uint8 -> ViTOutput of 2 * B images.
    """
    images = data.normalise(pixels)
    model.eval()
    with data.autocast(pixels.device, precision):
        output = model(torch.cat([images, images.flip(-1)]), "affinity")
    model.train()
    return output


@torch.no_grad()
def make_labels(output, pixels, labels, guide, reactivation="entropy", static_entropy=None,
                **settings):
    """The affinity labels and w_hat of a batch, from a forward pass over 1 or 2 views of it.

    output: ViTOutput of V * B images; pixels (B, 3, H, W) uint8; labels (B, C); guide: layer
    indices; static_entropy (L,) in bits replaces each image's own; settings: of pseudo_label.
    Returns label (B, P, P) in {0, 1, 255}, w_hat (B, L).
    """
    B = len(pixels)
    V = len(output.cam) // B

    with record_function("label CAM"):
        if static_entropy is None:
            of_views = aream.layer_entropy(output.cam, output.affinity, labels.repeat(V, 1))
            entropy = of_views.view(V, B, -1).mean(0)  # (B, L)
        else:
            entropy = static_entropy.expand(B, -1)
        w, w_hat = aream.reactivation_weights(entropy, reactivation)  # each (B, L)
        guided = aream.guided_cam(output.cam, output.affinity, w.repeat(V, 1), guide)
        if V == 2:
            guided = guided[:B] + guided[B:].flip(-1)  # (B, C, gh, gw)

        # no absent class from here on; normalised at half size, where PAR works
        class_ids, present = present_classes(labels)
        of_image = torch.arange(B, device=guided.device)[:, None]
        cam = guided[of_image, class_ids]  # (B, K, gh, gw)
        cam = data.bilinear(cam, [side // 2 for side in pixels.shape[-2:]])
        cam = aream.normalise_cam(cam, present)

    with record_function("PAR"):
        mask = pseudo_label(pixels.float() / 255, cam, class_ids, present, **settings)
        label = aream.affinity_label(mask, output.cam.shape[-2:])
    return label, w_hat


def train_step(model, optimizer, batch, args, active, coupling, static_entropy=None):
    """One optimiser step on batch = (pixels, labels) -> both losses, (2,) detached.

    active: with the AReAM loss. coupling: the guide and the supervised layers. static_entropy: see
    make_labels.
    """
    (pixels, labels), (guide, supervised) = batch, coupling
    shared = active and args.labels == "shared"
    given = (pixels, labels, guide, args.reactivation, static_entropy)
    # what the training pass keeps: logits for the loss, affinities too if labels come from it
    capture = active and (True if shared else "logits")

    # Affinity labels, from a pass of their own or from the training pass.
    if active and not shared:
        with record_function("label pass"):
            views = label_pass(model, pixels, args.precision)
        label, w_hat = make_labels(views, *given, **mask_settings(args))
        del views  # its affinities, before the training pass needs the memory
    with record_function("forward"), data.autocast(pixels.device, args.precision):
        output = model(data.normalise(pixels), capture)
    if shared:
        label, w_hat = make_labels(output, *given, **mask_settings(args))

    # Classification + affinity loss.
    with record_function("loss"):
        cls_loss = aream.classification_loss(output.class_logits.float(),
                                             output.patch_logits.float(), labels)
        aff_loss = torch.zeros((), device=pixels.device)
        if active:
            # Divided by the pairs of the whole batch, the processes' losses are to be summed;
            # their gradients are averaged instead, hence the factor world().
            pairs = data.sum_over_all(aream.count_pairs(label))
            aff_loss = data.world() * aream.aream_loss(output.affinity_logits, label, w_hat,
                                                       supervised, pairs)

    with record_function("backward"):
        optimizer.zero_grad(set_to_none=True)
        (cls_loss + args.affinity_weight * aff_loss).backward()
    with record_function("optimiser"):
        optimizer.step()
    return torch.stack([cls_loss.detach(), aff_loss.detach()])


# -------------------------------------------------------------------------------------------------
# One epoch
# -------------------------------------------------------------------------------------------------
def schedule(done):
    """The release's learning rate as a share of --lr; done: share of the training, [0, 1].

    A linear rise from 0.016 over the first twelfth (5 of 60 epochs, whatever --warmup-epochs),
    then a cosine to 0.16 (1e-5 of 6.25e-5).
    """
    if done < 1 / 12:
        return 0.016 + 0.984 * 12 * done
    return 0.16 + 0.84 * 0.5 * (1 + math.cos(math.pi * done))


def uses_aream(args, epoch):
    """Whether an epoch (0-based) is trained with the AReAM loss."""
    return args.reactivation != "none" and epoch >= args.warmup_epochs


def train_one_epoch(model, optimizer, loader, args, epoch, coupling, static_entropy, device):
    """All steps of an epoch -> its log record. FloatingPointError if a loss is not finite."""
    active = uses_aream(args, epoch)
    loader.sampler.set_epoch(epoch)
    data.seed_epoch(args.seed, epoch)
    model.train()
    sums, begin, steps = torch.zeros(2, device=device), time.time(), len(loader)

    for step, (pixels, labels) in enumerate(loader, 1):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule((epoch + (step - 1) / steps) / args.epochs)
        batch = pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        sums += train_step(model, optimizer, batch, args, active, coupling, static_entropy)

        if step % 20 == 0 or step == steps:  # not each step: looking at a loss makes a GPU wait
            data.need_finite(sums, args.out / "cls", epoch, step)
            rate = step * args.batch / (time.time() - begin)
            data.progress(f"step {step}/{steps}  losses {sums[0] / step:.4f} "
                          f"{sums[1] / step:.4f}  {rate:.1f} images/s")

    seconds = time.time() - begin
    cls_loss, aff_loss = (data.sum_over_all(sums) / steps / data.world()).tolist()
    return {"epoch": epoch + 1, "cls_loss": cls_loss, "aff_loss": aff_loss,
            "lr": optimizer.param_groups[0]["lr"], "precision": args.precision,
            "images/s": steps * args.batch / seconds, "seconds": seconds}


@torch.no_grad()
def mean_entropy(model, loader, precision, device):
    """Layer entropy averaged over the images of an epoch -> (L,) bits."""
    model.eval()
    total, count = 0, 0
    for pixels, labels in loader:
        with data.autocast(device, precision):
            output = model(data.normalise(pixels.to(device)), "affinity")
        total = total + aream.layer_entropy(output.cam, output.affinity, labels.to(device)).sum(0)
        count += len(labels)
    model.train()
    return data.sum_over_all(total) / (count * data.world())


@torch.no_grad()
def validate(model, samples, args, device):
    """Class mAP in percent on a ClassificationSet."""
    model.eval()
    logits, target = [], []
    in_order = [(index, 0) for index in range(len(samples))]  # 0: there is nothing random
    loader = DataLoader(samples, args.batch, sampler=in_order, num_workers=args.workers)
    for pixels, labels in loader:
        with data.autocast(device, args.precision):
            output = model(data.normalise(pixels.to(device)))
        logits.append((output.class_logits + output.patch_logits).float().cpu())
        target.append(labels)
    return 100 * mean_average_precision(torch.cat(logits), torch.cat(target))


def mean_average_precision(logits, labels):
    """logits, labels (images, C) -> mean AP in [0, 1] over the classes that occur."""
    precisions = []
    for score, label in zip(logits.T, labels.T):
        if label.any():
            hit = label[score.argsort(descending=True)]
            precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1)
            precisions.append((precision * hit).sum() / hit.sum())
    return torch.stack(precisions).mean().item()


# -------------------------------------------------------------------------------------------------
# The stage
# -------------------------------------------------------------------------------------------------
def make_optimizer(model, args):
    """AdamW; biases, norms, tokens and position embeddings are not decayed."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "token" in name or "pos_embed" in name:
            plain.append(parameter)
        else:
            decayed.append(parameter)
    return torch.optim.AdamW([{"params": decayed, "weight_decay": args.weight_decay},
                              {"params": plain, "weight_decay": 0.0}], lr=args.lr, fused=True)


def restore(model, optimizer, args, dataset, folder):
    """Where training begins: resumed, branched, from pretrained weights or from scratch.

    Loads model and optimizer in place. Returns the first epoch, and with --entropy static the
    entropy (L,) that was measured, or None.
    """
    last = folder / "last.pt"
    if args.resume and last.is_file():
        checkpoint = data.read_checkpoint(last, "cls", dataset)
    elif args.branch_from:
        if args.overwrite and Path(args.branch_from).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--overwrite would delete {args.branch_from}, from which to branch: "
                             f"use another --out")
        checkpoint = data.read_checkpoint(args.branch_from, "cls", dataset, data.data_flags(args))
        if checkpoint["epoch"] >= args.epochs:
            raise ValueError(f"{args.branch_from} is already at epoch {checkpoint['epoch']}: give "
                             f"more than --epochs {args.epochs}")
    else:
        if args.pretrained != "none":
            vit.load_pretrained(model, args.pretrained)
        return 0, None

    config = {key: checkpoint["config"][key] for key in ("preset", "depth", "size")}
    if config != {key: getattr(args, key) for key in config}:
        raise ValueError(f"the checkpoint to go on from has {config}; give the same settings")
    model.load_state_dict(checkpoint["model"])
    # the moments are that run's, weight decay and the like this one's
    settings = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({**checkpoint["optimizer"], "param_groups": settings})
    return checkpoint["epoch"], checkpoint["entropy"] if args.entropy == "static" else None


def main(argv=None):
    args = parse_args(argv)
    device = data.start(args)
    folder = args.out / "cls"

    # data
    if args.download and not data.rank():
        data.download(args.data, args.data_root)
    data.wait_for_all()
    dataset = data.open_split(args, args.split)
    val = open_validation(args, dataset)
    samples = ClassificationSet(dataset, args.size, args.augment)
    describe(dataset, samples.labels)
    loader = data.train_loader(samples, args.batch, args.seed, args.workers, device)

    # model, optimiser, where to begin
    model = vit.build(args.preset, len(dataset.classes), depth=args.depth, image_size=args.size)
    coupling = aream.coupled_layers(len(model.blocks), args.coupling, args.deep_from)
    model.to(device).set_drop_path(args.drop_path)
    optimizer = make_optimizer(model, args)
    first, static_entropy = restore(model, optimizer, args, dataset, folder)
    if static_entropy is not None:
        static_entropy = static_entropy.to(device)
    if args.profile:
        return profile(model, optimizer, loader, args, coupling, device)
    made_from = {"checkpoint to branch from": [args.branch_from]} if args.branch_from else {}
    data.prepare_folder(folder, args, dataset, made_from)
    data.go_on(folder, first)
    plain_types = (int, float, str, type(None))  # a checkpoint that holds others is refused
    config = {key: value for key, value in vars(args).items() if isinstance(value, plain_types)}
    config.update(data=dataset.name, classes=list(dataset.classes))

    def save(name, epoch):
        data.write_checkpoint(folder / name, {
            "stage": "cls", "config": config, "epoch": epoch, "entropy": static_entropy,
            "model": model.state_dict(), "optimizer": optimizer.state_dict()})

    # train
    wrapped = data.distributed(model, device)
    begin = saved = time.time()
    for epoch in range(first, args.epochs):
        if args.entropy == "static" and static_entropy is None and uses_aream(args, epoch):
            loader.sampler.set_epoch(epoch)  # the same crops in a resumed run
            static_entropy = mean_entropy(model, loader, args.precision, device)
        record = train_one_epoch(wrapped, optimizer, loader, args, epoch, coupling,
                                 static_entropy, device)
        if epoch + 1 == args.warmup_epochs:
            save("warmup.pt", epoch + 1)
        due = time.time() - saved >= data.SECONDS_BETWEEN_CHECKPOINTS
        if due or epoch + 1 in (args.warmup_epochs, args.epochs):
            save("last.pt", epoch + 1)
            saved = time.time()
        per_epoch = (time.time() - begin) / (epoch + 1 - first)
        record["minutes_left"] = per_epoch * (args.epochs - epoch - 1) / 60
        data.log_line(folder, record)

    # class mAP, for information: no checkpoint is chosen by it
    if not data.rank():
        if val is None:
            print(f"no class mAP: {args.data} has no val list")
        else:
            data.log_line(folder, {"val_class_mAP": validate(model, val, args, device),
                                   "device": data.device_name(device)})
        print(f"{folder / 'last.pt'} written in {(time.time() - begin) / 60:.1f} minutes on "
              f"{device}, {args.precision}")
    data.wait_for_all()


def describe(dataset, labels):
    """Print what was found, for a look at whether it was meant; labels (images, C)."""
    count = labels.sum(0).long().tolist()
    by_count = sorted(zip(count, dataset.classes))
    (fewest, rare), (most, frequent) = by_count[0], by_count[-1]
    if not data.rank():
        print(f"{dataset.name} {dataset.split}: {len(labels)} images, {len(count)} classes, from "
              f"{rare} (in {fewest}) to {frequent} (in {most})", flush=True)


def open_validation(args, dataset):
    """The val split as a ClassificationSet; None for own data without such a list."""
    own_list = Path(args.data) / "ImageSets" / "Segmentation" / "val.txt"
    if args.data not in data.DATASETS and not own_list.is_file():
        return None
    return ClassificationSet(data.open_split(args, "val", like=dataset), args.size)


def profile(model, optimizer, loader, args, coupling, device):
    """Print where the time goes in --profile steps, and how long the run would take."""
    forward = args.batch * model.flops((args.size // model.patch,) * 2)
    label_passes = {"two-views": 2, "shared": 0}[args.labels]

    def batches():
        while True:
            yield from loader

    rates = []
    for active in [False] if args.reactivation == "none" else [False, True]:
        source = batches()

        def step(_):
            with record_function("load"):
                batch = [part.to(device, non_blocking=True) for part in next(source)]
            train_step(model, optimizer, batch, args, active, coupling)

        print(f"{'AReAM' if active else 'plain'} step, {args.preset}, {args.size} px, batch "
              f"{args.batch}, {device}, {args.precision}")
        flops = forward * (3 + label_passes * active)  # a backward pass costs two
        rates.append(data.profile(step, args.profile, device, args.batch, flops))
    images = len(loader) * args.batch
    rest = args.epochs - args.warmup_epochs
    seconds = images * (args.warmup_epochs / rates[0] + rest / rates[-1])
    print(f"{args.epochs} epochs, {args.warmup_epochs} of them warm-up, of {images} images at "
          f"these rates: {seconds / 60:.1f} minutes")


if __name__ == "__main__":
    data.run(main)
