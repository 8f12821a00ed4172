"""The speed table of results/README.md:  make speed,  and a CUDA card's kernels:  make gpu

The naive rendering is the tests' own (test_aream.py).
"""
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

THREADS = torch.get_num_threads()  # test_aream sets one
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aream
import data
import evaluate
import model as vit
import refine
import test_aream
import train_cls


def voc_like_labels(batch):
    """(batch, 20) with 1.5 classes an image, as in VOC."""
    labels = torch.zeros(batch, 20)
    labels[torch.arange(batch), torch.arange(batch) % 20] = 1
    labels[::2, 3] = 1
    return labels


def measure(kind, precision="float32", batch=16, size=224, steps=5):
    """Least seconds and extra peak MiB of a training step of DeiT-Tiny; run it by alone()."""
    torch.set_num_threads(THREADS)
    smooth = F.interpolate(torch.rand(batch, 3, 9, 9), size=(size, size), mode="bilinear")
    pixels, labels = (255 * smooth).byte(), voc_like_labels(batch)
    args = train_cls.parse_args(["--drop-path", "0"])
    args.precision = precision
    args.labels = "shared" if kind == "shared" else "two-views"
    if kind == "torchvision":
        model = torchvision.models.VisionTransformer(size, 16, 12, 3, 192, 768)
    else:
        model = vit.build("deit_tiny", 1 if kind == "same size" else 20, image_size=size)
    optimizer, layers = torch.optim.AdamW(model.parameters()), aream.coupled_layers(12)

    def one_step():
        if kind in ("plain", "two-views", "shared"):
            active = kind != "plain"
            train_cls.train_step(model, optimizer, (pixels, labels), args, active, layers)
            return
        if kind == "naive":
            _, loss = test_aream.naive_step(model, pixels, labels, args, layers)
        else:
            output = model(data.normalise(pixels))
            loss = (output if kind == "torchvision" else output.class_logits).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    before = data.peak_memory()
    seconds, = compare(one_step, repeats=steps)
    return seconds, data.peak_memory() - before


def alone(*given, **named):
    """measure() in a fresh process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *given, **named).result()


def compare(*functions, repeats=5):
    """Least seconds of functions, called in turn: what is above the least is other load."""
    seconds = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, own in zip(functions, seconds):
            begin = time.perf_counter()
            function()
            own.append(time.perf_counter() - begin)
    return [min(own[1:]) for own in seconds]


def table_row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def speed_table(folder):
    """Print the speed table of results/README.md. folder: for files, thrown away."""
    torch.set_num_threads(THREADS)
    fast = "bfloat16" if data.native_bfloat16(torch.device("cpu")) else "float32"
    table_row("DeiT-Tiny, 224 px, batch 16", "naive, float32", "float32", fast, "gain", "target")
    table_row(*["---"] * 6)
    plain = speed_of_steps(fast)
    theirs, ours = alone("torchvision")[0], alone("same size")[0]
    with torch.no_grad():
        speed_of_par()
        speed_of_inference(fast)
        dataset = write_photographs(folder)
        speed_of_the_sweep(dataset, folder)
        table_row("plain step, against torchvision's ViT (197 tokens)", f"{theirs:.2f} s",
                  f"{ours:.2f} s", "", f"{theirs / ours:.1f}x", "")
        speed_of_loading(dataset, f"a plain step uses {16 / plain[0]:.0f}, in {fast} "
                                  f"{16 / plain[1]:.0f}")


def speed_of_steps(fast):
    """-> seconds of the plain step, in float32 and in the fast precision."""
    naive, naive_memory = alone("naive")
    plain, plain_memory = zip(alone("plain"), alone("plain", fast))
    views, views_memory = zip(alone("two-views"), alone("two-views", fast))
    shared, _ = zip(alone("shared"), alone("shared", fast))
    for what, seconds, target in (("AReAM training step", views, "4x"),
                                  ("the same with `--labels shared`", shared, "")):
        table_row(what, f"{naive:.2f} s", f"{seconds[0]:.2f} s", f"{seconds[1]:.2f} s",
                  f"{naive / seconds[1]:.1f}x", target)
    more = [naive_memory - plain_memory[0], views_memory[0] - plain_memory[0],
            views_memory[1] - plain_memory[1]]
    table_row("its peak memory over the plain step's", *(f"{m:.0f} MiB" for m in more), "", "")
    return plain


def speed_of_par():
    labels, images = voc_like_labels(16), torch.rand(16, 3, 224, 224)
    cam = torch.rand(16, 20, 112, 112) * labels[..., None, None]
    batch = list(zip(images, cam, labels))
    naive, own = compare(lambda: [test_aream.naive_pseudo_label(*one) for one in batch],
                         lambda: test_aream.pseudo_label(images, cam, labels))
    table_row("PAR of a batch, both thresholds", f"{naive:.2f} s", f"{own:.2f} s", "",
              f"{naive / own:.1f}x", "10x")


def speed_of_inference(fast):
    model, labels = vit.build("deit_tiny", 20).eval(), voc_like_labels(1)
    pixels = torch.randint(0, 256, (3, 240, 320), dtype=torch.uint8)

    def naive():
        images = data.normalise(pixels[None])
        cam, _ = test_aream.naive_cam(model, images, range(12), "uniform", labels)
        small = aream.normalise_cam(data.bilinear(cam, (60, 80)), labels)[0]
        test_aream.naive_pseudo_label(pixels / 255, small, labels[0])

    def own(precision):
        variants = {"seed": tuple(range(12))}
        cams = refine.seed_cams(model, pixels, [0, 3], variants, precision=precision)
        refine.pseudo_mask(pixels, [0, 3], cams["seed"])

    seconds = compare(naive, lambda: own("float32"), lambda: own(fast), repeats=7)
    table_row("CAM and PAR inference, 320 px", *(f"{1 / s:.1f} images/s" for s in seconds),
              f"{seconds[0] / seconds[2]:.1f}x", "4x")


def write_photographs(folder):
    """A VOC of 20 photographs of 500 px, and CAM files."""
    voc = test_aream.make_voc(folder, [f"{i:02}" for i in range(20)], (375, 500))
    dataset = data.open_data("VOC2012", folder, "train")
    for name in dataset.ids:
        photo = Image.fromarray(test_aream.draw(0, (24, 32))).resize((500, 375), Image.BICUBIC)
        photo.save(voc / "JPEGImages" / f"{name}.jpg")
        data.write_cam(folder / "cam" / f"{name}.npz", [14], torch.rand(1, 94, 125), (375, 500))
    return dataset


def speed_of_the_sweep(dataset, folder):
    def naive():
        for threshold in evaluate.THRESHOLDS:
            confusion = 0
            for name in dataset.ids:
                class_ids, cam, size = data.read_cam(folder / "cam" / f"{name}.npz")
                score, winner = data.bilinear(cam[None], size)[0].max(0)
                mask = torch.where(score > threshold, data.mask_value(class_ids)[winner], 0)
                target = dataset.mask(name)
                confusion = confusion + evaluate.confusion_matrix(mask, target, 21)
            evaluate.scores(confusion)

    def own():
        evaluate.summarise(evaluate.evaluate_cams(dataset, folder / "cam"))

    naive, own = compare(naive, own, repeats=1)
    table_row("threshold sweep, 101 thresholds, 20 images", f"{naive:.1f} s", f"{own:.2f} s", "",
              f"{naive / own:.0f}x", "30x")


def speed_of_loading(dataset, used):
    for augment in train_cls.AUGMENTATIONS:
        samples = train_cls.ClassificationSet(dataset, 224, augment)
        seconds, = compare(lambda: [samples[i, i] for i in range(20)])
        table_row(f"loading, `--augment {augment}`, 500 px JPEGs, of one process", "",
                  f"{20 / seconds:.0f} images/s", "", used, "no bottleneck")


def kernels_table():
    """PAR, and attention by products and fused, on a CUDA card."""
    def milliseconds(function, repeats=20):
        for _ in range(3):
            function()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - begin) / repeats

    table_row(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", "ms")
    table_row("---", "---")
    images, score = (torch.rand(64, n, 112, 112, device="cuda") for n in (3, 4))
    kernel = refine.par_kernel(images)
    iteration = milliseconds(lambda: refine.par_iteration(score, kernel))
    table_row("PAR, one iteration, 64 images of 112 x 112, four scores", f"{iteration:.2f}")
    for N in (216, 788, 1712):
        q, k, v = torch.rand(3, 4, 6, N, 64, device="cuda", dtype=torch.bfloat16)
        apart = milliseconds(
            lambda: ((q @ k.transpose(-2, -1)) / 8).float().softmax(-1).to(v.dtype) @ v)
        fused = milliseconds(lambda: F.scaled_dot_product_attention(q, k, v))
        table_row(f"attention of {N} tokens, fused (as products)", f"{fused:.2f} ({apart:.2f})")


if __name__ == "__main__":
    if sys.argv[1:] == ["kernels"]:
        kernels_table()
    else:
        with tempfile.TemporaryDirectory() as temporary:
            speed_table(Path(temporary))
