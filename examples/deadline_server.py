"""Deadline serving.

An HTTP service answers each request by its deadline, with as many networks as the load allows. It evaluates the waiting
requests as a batch, one network after the other. A request leaves the batch when a further network would end too late
for it, and all leave as soon as those who wait could not have as many. So an answer has all networks on a quiet day,
and a few when there is much to do.

A load test on 127.0.0.1 compares this with a service that always evaluates all networks.
"""

# %%
import argparse
import asyncio
import contextlib
import functools
import gc
import json
import math
import random
import re
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import matplotlib.pyplot as plt
import torch

from hne import Bottleneck, Conv, FusedHNE, Hierarchy
from hne.data import load_dataset
from hne.reporting import show_evaluation, show_table
from hne.training import TrainConfig, Trainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--serve", type=int, metavar="PORT", help="serve until Ctrl-C, without a load test")
parser.add_argument("--deadline-ms", type=float, default=60, help="of each request (default: %(default)s)")
parser.add_argument("--rates", type=int, nargs="+", default=[50, 100, 200, 300, 400, 600], help="requests per second")
parser.add_argument("--seconds", type=float, default=2, help="at each rate (default: %(default)s)")
parser.add_argument("--epochs", type=int, default=10, help="epochs of training (default: %(default)s)")
parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of the plot (default: %(default)s)")
options = parser.parse_args()

# %% [markdown]
# ## A model
# Sixteen networks in a tree. `hne.load("runs/...")` gives a trained one; `hne.runtime.AnytimeSession(folder)` runs an
# exported one with ONNX Runtime or OpenVINO, by the same method `anytime`.

# %%
dataset = load_dataset("digits", limit_train=300)
torch.manual_seed(0)
blocks = [Conv(32)], [Bottleneck(64, 32)], [Bottleneck(128, 64, stride=2)], [Bottleneck(192, 48)], [Bottleneck(192, 48)]
model = FusedHNE(Hierarchy.doubling(5), blocks, num_classes=10, in_channels=1)
trainer = Trainer(model, dataset, TrainConfig.of(epochs=options.epochs, batch_size=16))
*_, record = trainer.train(eval_every=options.epochs)
show_evaluation(record.evaluation, "digits")
model.eval()
torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # a core is left to HTTP

# %% [markdown]
# ## The scheduler
# A request is a sheet of eight digits. The expected time of a network is the longest of its last ten times for a
# batch of about this size. A request that is too late even for one network is refused.

# %%
SHEET, MAX_BATCH, MARGIN = 8, 16, 0.010  # images of a request, requests of a batch, seconds for all but the networks


@dataclass
class Request:
    pixels: torch.Tensor  # uint8 [images, height, width, 1]
    deadline: float  # of time.perf_counter()
    reply: Callable[[dict | None], object]


class Scheduler(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.waiting, self.arrival = [], threading.Condition()
        self.times = defaultdict(lambda: deque([0.0], maxlen=10))  # by network and size of the batch
        for size in [1, 2, 4, 8, 16] * 3:
            self.evaluate([Request(dataset.test.images[:SHEET], math.inf, lambda answer: None)] * size)

    def submit(self, request: Request) -> None:
        with self.arrival:
            self.waiting.append(request)
            self.arrival.notify()

    def run(self) -> None:
        while True:
            with self.arrival:
                self.arrival.wait_for(lambda: self.waiting)
                batch, self.waiting = self.waiting[:MAX_BATCH], self.waiting[MAX_BATCH:]
            end = time.perf_counter() + self.expected(1, len(batch))
            for request in batch:
                if end > request.deadline:
                    request.reply(None)
            self.evaluate([request for request in batch if end <= request.deadline])

    @torch.inference_mode()
    def evaluate(self, batch: list[Request]) -> None:
        if not batch:
            return
        start = time.perf_counter()
        steps = model.anytime(dataset.input.normalise(torch.cat([request.pixels for request in batch])))
        for n, logits in steps:
            now = time.perf_counter()
            self.times[n, len(batch).bit_length()].append(now - start)
            start = now
            end = now + self.expected(n + 1, len(batch)) + MARGIN  # of one more network
            more = n < model.num_models and end < self.latest_end(n + 1)
            stays = [more and end < request.deadline for request in batch]
            for request, classes, stay in zip(batch, logits.argmax(-1).split(SHEET), stays, strict=True):
                if not stay:
                    request.reply({"classes": classes.tolist(), "networks": n})
            if not any(stays):
                return
            if not all(stays):
                steps.select(torch.tensor(stays).repeat_interleave(SHEET))
                batch = [request for request, stay in zip(batch, stays, strict=True) if stay]

    def expected(self, n: int, size: int) -> float:
        return max(self.times[n, size.bit_length()])

    def latest_end(self, n: int) -> float:
        """When the present batch has to end, so that those who wait can have n networks, too."""
        with self.arrival:
            waiting = self.waiting[:MAX_BATCH]
        needed = sum(self.expected(k, len(waiting)) for k in range(1, n + 1))
        return min((request.deadline for request in waiting), default=math.inf) - needed


# %% [markdown]
# ## The HTTP service
# `curl -d '{"images": [...], "deadline_ms": 50}' http://127.0.0.1:8000/` asks about eight images of 8 x 8 bytes.


# %%
async def read_body(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
    return await reader.readexactly(min(int(length[1]), 10**6) if length else 0)


def message(first_line: str, content: dict) -> bytes:
    body = json.dumps(content).encode()
    return f"{first_line}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def converse(scheduler: Scheduler, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    loop = asyncio.get_running_loop()
    try:
        while True:
            body, arrival, future = await read_body(reader), time.perf_counter(), loop.create_future()
            try:
                question = json.loads(body)
                pixels = torch.tensor(question["images"], dtype=torch.uint8).reshape(SHEET, 8, 8, 1)
                deadline = arrival + float(question.get("deadline_ms", options.deadline_ms)) / 1e3
            except (ValueError, TypeError, KeyError, RuntimeError) as error:
                writer.write(message("HTTP/1.1 400 Bad Request", {"error": repr(error)}))
                continue
            scheduler.submit(Request(pixels, deadline, functools.partial(loop.call_soon_threadsafe, future.set_result)))
            answer = await future
            status = "503 Service Unavailable" if answer is None else "200 OK"
            writer.write(message(f"HTTP/1.1 {status}", answer or {"error": "too late"}))
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError, ConnectionError):
        writer.close()  # the client has gone or does not speak HTTP, or the service ends


async def start(port: int = 0) -> asyncio.Server:
    sys.setswitchinterval(0.0005)  # the two threads take turns more often
    gc.freeze()  # and what is there already is not searched for garbage
    scheduler = Scheduler()
    scheduler.start()
    return await asyncio.start_server(functools.partial(converse, scheduler), "127.0.0.1", port)


async def serve(port: int) -> None:
    server = await start(port)
    print("serving at http://{}:{}/".format(*server.sockets[0].getsockname()))
    await asyncio.Event().wait()


if options.serve:
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(options.serve))
    sys.exit()

# %% [markdown]
# ## A load test
# Requests are sent at random times, whether or not earlier ones have been answered. Latency counts from the time at
# which a request was to be sent. Clients and service share this process and its processors. Without deadlines, the
# service evaluates all networks.


# %%
async def load_test(deadline_ms: float) -> list[dict]:
    rows, idle = [], []  # idle connections
    images, labels = dataset.test.images.tolist(), dataset.test.labels.tolist()
    questions = [
        message(
            "POST / HTTP/1.1\r\nHost: 127.0.0.1", {"images": images[first : first + SHEET], "deadline_ms": deadline_ms}
        )
        for first in range(len(images) - SHEET)
    ]
    server = await start()
    port = server.sockets[0].getsockname()[1]

    async def ask(due: float, first: int) -> tuple[float, dict, float]:
        await asyncio.sleep(due - time.perf_counter())
        reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
        writer.write(questions[first])
        answer = json.loads(await read_body(reader))
        idle.append((reader, writer))
        milliseconds = 1e3 * (time.perf_counter() - due)
        right = map(int.__eq__, answer.get("classes", ()), labels[first : first + SHEET])
        return milliseconds, answer, sum(right) / SHEET

    for rate in options.rates:
        random.seed(rate)  # the same times for both services
        begin, count = time.perf_counter() + 0.1, round(rate * options.seconds)
        times = [begin + random.uniform(0, options.seconds) for _ in range(count)]
        asked = asyncio.gather(*(ask(due, k * SHEET % len(questions)) for k, due in enumerate(times)))
        results = await asyncio.wait_for(asked, options.seconds + 60)
        answers = [(ms, answer["networks"], right) for ms, answer, right in results if "networks" in answer]
        ms, networks, right = zip(*(answers or [(math.nan,) * 3]), strict=True)
        slow = sorted(ms)[math.ceil(0.99 * len(ms)) - 1]
        late, refused = (100 * k / count for k in (sum(t > options.deadline_ms for t in ms), count - len(answers)))
        rows.append({"requests/s": rate, "median ms": median(ms), "99 % ms": slow, "late %": late})
        rows[-1] |= {"refused %": refused, "networks": mean(networks), "accuracy %": 100 * mean(right)}
    for connection in [server, *(writer for _, writer in idle)]:
        connection.close()
    return rows


tests = {}
for name, deadline_ms in (("as many networks as time allows", options.deadline_ms), ("all networks", math.inf)):
    with ThreadPoolExecutor(1) as thread:  # a notebook has an event loop already, in its own thread
        tests[name] = thread.submit(asyncio.run, load_test(deadline_ms)).result()
    rows = [[f"{value:.4g}" for value in row.values()] for row in tests[name]]
    show_table([*tests[name][0]], rows, title=name)

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), dpi=150, layout="constrained")
for name, rows in tests.items():
    for axis, column in zip(axes, ("99 % ms", "networks", "accuracy %"), strict=True):
        axis.plot(options.rates, [row[column] for row in rows], "o-", label=name)
axes[0].axhline(options.deadline_ms, color="0.5", ls="--")
axes[0].annotate("deadline", (options.rates[0], options.deadline_ms), (0, 4), textcoords="offset points", color="0.4")
axes[0].set(yscale="log", yticks=[20, 50, 100, 200, 500, 1000], ylabel="99th percentile of the latency (ms)")
axes[1].set(ylabel="networks in an answer (mean)", ylim=(0, None))
axes[2].set(ylabel="accuracy (%)")
axes[0].yaxis.set_major_formatter("{x:g}")
axes[1].legend(frameon=False, loc="lower left")
for axis in axes:
    axis.set(xscale="log", xlabel="requests per second")
    axis.set_xticks(options.rates, map(str, options.rates))
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "deadline_server.png")
print(f"wrote {options.out / 'deadline_server.png'}")
