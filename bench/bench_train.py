"""What the trainer costs over a bare torch loop, and what settings of threads and memory are worth on a busy machine.
How many pictures a second a GPU trains is measured by `bench/gpu.py`.

    python bench/bench_train.py [--quick]
"""
import argparse
import os
import subprocess
import sys
import time
from functools import partial

import pandas as pd
import torch
from torch.nn.functional import mse_loss
from torch.utils.data import Dataset

from histokit.core.compute import seed_everything
from histokit.learn.batches import BatchDataset, loader
from histokit.learn.trainer import Trainer


class Rows(BatchDataset):
    "Numbers in memory, in whole batches, so that nothing is measured but the loop."
    def __init__(self, n, width):
        g = torch.Generator().manual_seed(0)
        self.x, self.target = torch.randn(n, width, generator=g), torch.randn(n, 35, generator=g)

    def __len__(self): return len(self.x)
    def batch(self, rows): return dict(x=self.x[rows]), self.target[rows]


class Mlp(torch.nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(width, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 35))

    def forward(self, x): return self.net(x)


def bare(model, data, epochs, device):
    "The loop that everybody writes: forward, backward, clip, step."
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for epoch in range(epochs):
        for inputs, target in loader(data, 32, True, epoch):
            loss = mse_loss(model(inputs["x"].to(device)), target.to(device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            loss.item()


def ours(model, data, epochs, device):
    Trainer(model, mse_loss, None, epochs=epochs, batch_size=32, amp="no", device=device).fit(data)


def seconds(run, device):
    "Of the clock on a GPU, of the processor on a CPU, where others may be at work."
    if device != "cpu": torch.cuda.synchronize()
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    run()
    if device != "cpu": torch.cuda.synchronize()
    return clock() - start


def overhead(steps, device):
    "Steps a second of both loops on models from very small to small, the better of three runs each, taken in turn."
    for width, hidden in ((64, 16), (768, 512), (768, 2048)):
        data, took = Rows(32 * steps, width), {bare: [], ours: []}
        for _ in range(3):
            for loop, times in took.items():
                seed_everything(0)
                times.append(seconds(partial(loop, Mlp(width, hidden), data, 1, device), device))
        a, b = (min(times) / steps for times in took.values())
        yield {"model": f"MLP {width}-{hidden}-35", "device": device, "bare loop, steps/s": 1 / a,
            "trainer, steps/s": 1 / b, "ratio": a / b, "ms a step more": 1e3 * (b - a)}


EPOCHS = """import sys
if sys.argv[1] == "torch": import torch
from histokit.learn.trainer import Trainer
from histokit.learn.networks import create_image_model
sys.path.insert(0, sys.argv[2])
from bench_train import Pictures
import torch
model = create_image_model(35, "test_resnet.r160_in1k", "none", hidden="128")
trainer = Trainer(model, torch.nn.functional.mse_loss, None, epochs=4, batch_size=32, device="cpu")
print(trainer.fit(Pictures(512, 48)).seconds.median())"""
# what imports first, and the environment it starts with; a malloc variable of any kind leaves the memory's limits alone
WAYS = {"torch first, nothing set": ("torch", dict(MALLOC_ARENA_TEST="8")), "histokit first": ("histokit", {}),
    "a stage of the pipeline": ("histokit", None)}

def plain_python(busy):
    "Seconds of an epoch of a small network in a program of one's own, with other programs at work beside it."
    from histokit.core.compute import KERNEL_ENVIRONMENT
    unset = {k: v for k, v in os.environ.items() if k not in KERNEL_ENVIRONMENT and k != "OMP_NUM_THREADS"}
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        for name, (first, given) in WAYS.items():
            env = unset | (KERNEL_ENVIRONMENT if given is None else given)
            command = [sys.executable, "-W", "ignore", "-c", EPOCHS, first, os.path.dirname(os.path.abspath(__file__))]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            yield {"test_resnet, 48 px, CPU": name, "programs beside it": busy, "s an epoch": float(done.stdout)}
    finally:
        for burner in burners: burner.kill()


class Pictures(Dataset):
    "Pictures cut from noise in memory, one by one."
    def __init__(self, n, px):
        self.noise, self.px = torch.randint(0, 256, (3, 2 * px, 2 * px), dtype=torch.uint8), px
        self.at, self.target = torch.randint(px, (n, 2)), torch.randn(n, 35)

    def __len__(self): return len(self.at)

    def __getitem__(self, i):
        x, y = self.at[i].tolist()
        return dict(image=self.noise[:, y:y + self.px, x:x + self.px].clone()), self.target[i]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer steps and pictures")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        print(pd.DataFrame(overhead(100 if quick else 400, device)).round(2).to_string(index=False), end="\n\n")
    for busy in (0, os.cpu_count() or 1):
        print(pd.DataFrame(plain_python(busy)).round(2).to_string(index=False), end="\n\n")
