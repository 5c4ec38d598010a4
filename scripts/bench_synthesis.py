"""What calibration data from nothing cost: seconds and memory of procedural and of inverted images.

    python scripts/bench_synthesis.py       # ResNet-20 at 32 px, 256 images; ResNet-50 at 224 px, few
    python scripts/bench_synthesis.py --model resnet50 --images 8 --steps 4 --device cuda

Weights are random with BatchNorm statistics drawn at random, which changes what the images look like and not what they
cost. Time grows with images and steps alike, so a few of both tell the rest: quote the milliseconds for an image and
step. Processor seconds are given beside those of the clock, because a shared machine's clock says little.
"""

import argparse
import resource
import subprocess
import sys
import time

CASES = (["--model=resnet20_cifar", "--images=256", "--steps=10"], ["--model=resnet50", "--images=8", "--steps=3"])


def measure(name: str, images: int, steps: int, device: str) -> str:
    import torch

    from modhifi_cli.data import inversion, procedural
    from modhifi_cli.data.making import Making
    from modhifi_cli.settings import config

    settings = config.compose("synthesize", [f"model={name}", "model.weights=random", "data=inversion"])
    loaded = config.build(settings["model"])
    generator = torch.Generator().manual_seed(0)
    for module in loaded.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    started = time.process_time()
    procedural.draw(min(images, 64), loaded.preprocess, kind="mixture", seed=0)
    made = (time.process_time() - started) / min(images, 64)
    clock, started = time.perf_counter(), time.process_time()
    lines = {key: value for key, value in settings["data"].items() if key in inversion.Inversion.__dataclass_fields__}
    lines |= {"steps": steps, "together": images, "class_weight": 0.0}
    inversion.load(
        preprocess=loaded.preprocess,
        labelled=False,
        making=Making(loaded.model, loaded.name, torch.device(device)),
        num_samples=images,
        cache=None,
        **lines,
    )
    clock, processor = time.perf_counter() - clock, time.process_time() - started
    each = images * (steps + 2)  # two forwards more measure the distance before and after
    usual = settings["data"]["steps"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    whole, busy = (256 * usual * seconds / each for seconds in (clock, processor))
    return (
        f"{name} at {loaded.preprocess.size[0]} px on {device}, {torch.get_num_threads()} threads: procedural "
        f"{1e3 * made:.1f} ms an image; inversion {1e3 * clock / each:.1f} ms an image and step by the clock "
        f"({1e3 * processor / each:.1f} ms of processor), so {whole:.0f} s ({busy:.0f} s of processor) for 256 images of "
        f"{usual} steps; peak {peak:.1f} GB"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    if asked.model is not None:
        print(measure(asked.model, asked.images, asked.steps, asked.device), flush=True)
        return 0
    # A process each, since peak memory is the process's.
    return max(
        subprocess.run([sys.executable, __file__, *case, f"--device={asked.device}"]).returncode for case in CASES
    )


if __name__ == "__main__":
    sys.exit(main())
