"""What the trainer costs over a bare torch loop, and on a GPU how many pictures a second it trains.

    python bench/bench_train.py [--quick]
"""
import argparse
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


class Pictures(Dataset):
    "Pictures cut from noise in memory, one by one."
    def __init__(self, n, px):
        self.noise, self.px = torch.randint(0, 256, (3, 2 * px, 2 * px), dtype=torch.uint8), px
        self.at, self.target = torch.randint(px, (n, 2)), torch.randn(n, 35)

    def __len__(self): return len(self.at)

    def __getitem__(self, i):
        x, y = self.at[i].tolist()
        return dict(image=self.noise[:, y:y + self.px, x:x + self.px].clone()), self.target[i]


MODES = (dict(amp="no"), dict(amp="fp16"), dict(amp="auto"), dict(amp="auto", channels_last=True),
    dict(amp="auto", channels_last=True, compile=True), dict(amp="auto", ema=.999))

def gpu(rows, px=400, backbone="convnext_small"):
    "Pictures a second of one epoch after one to warm up, in each precision and memory layout."
    from histokit.spots.network import create_model
    data = Pictures(rows, px)
    for mode in MODES:
        seed_everything(0)
        torch.cuda.reset_peak_memory_stats()
        model = create_model(35, backbone, "none")
        trainer = Trainer(model, mse_loss, None, epochs=2, batch_size=32, workers=4, **mode)
        last = trainer.fit(data).iloc[-1]
        yield {"model": f"{backbone}, {px} px, batch 32", "settings": ", ".join(f"{k}={v}" for k, v in mode.items()),
            "pictures/s": rows / last.seconds, "waiting for data": f"{last.waited / last.seconds:.0%}",
            "peak GiB": torch.cuda.max_memory_allocated() / 2**30, "rows at once": last.at_once}
        del trainer, model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer steps and pictures")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        print(pd.DataFrame(overhead(100 if quick else 400, device)).round(2).to_string(index=False), end="\n\n")
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name())
        print(pd.DataFrame(gpu(320 if quick else 1600)).round(1).to_string(index=False))
    else: print("no GPU here: the rest is left out")
