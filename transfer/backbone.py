"""The frozen backbone over images, batch by batch: decoded, viewed and embedded in parallel, in order."""

import contextlib
import copy
import functools
import itertools
import math
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from transfer.console import UserError, out_of_memory, warn, warn_once
from transfer.device import Compute

NORMALIZE = T.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])  # ImageNet's
# On a CPU, of 4 to 32 views at a time, 8 pass fastest (measured, one thread): more than that outgrow its caches.
PASS_BATCH = {"cpu": 8, "cuda": 256, "mps": 64}
# Views that a worker hands over at a time where they travel as pixels, 5 MB: containers have 64 MB of shared memory.
PART_VIEWS, VIEW_BYTES = 32, 224 * 224 * 3
# A forked worker starts at once; a spawned one imports torch first, but is safe everywhere.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"
# Row numbers, values (n, ...) or (n, per_image, ...), and the reasons by row of what can't be read.
Embedded = tuple[list[int], Tensor, dict[int, str]]
READING_VERSION = 2  # of how images become numbers, up to `embed`: raise it and no cached feature is used


class Backbone(nn.Sequential):
    """A ResNet without its head: images (N, 3, 224, 224) to features (N, feature_dim)."""

    def __init__(self, model: nn.Module):
        super().__init__(*list(model.children())[:-1], nn.Flatten(1))
        self.feature_dim = model.fc.in_features


def inference_copy(module: nn.Module, compute: Compute) -> nn.Module:
    """A copy for `embed`: on the device, its convolutions in the dtype. Autocast gives the same bits, but casts the
    weights anew for every batch.
    """
    module = copy.deepcopy(module).to(compute.device, memory_format=torch.channels_last)
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.to(compute.dtype)
    return module


@torch.inference_mode()
def embed(module: nn.Module, views: Tensor, compute: Compute) -> Tensor:
    """What an `inference_copy` gives for uint8 views (N, 224, 224, 3), on its device and in its dtype."""
    device = compute.device
    # NORMALIZE, for bytes and along whole rows of pixels: four times as fast as over three channels.
    # Copies that do not block are sound from pinned memory, which only CUDA has.
    rows = views.to(device, non_blocking=device.type == "cuda").flatten(2).float()  # (N, 224, 672)
    mean, std = (255 * torch.tensor(three).repeat(views.shape[2]) for three in (NORMALIZE.mean, NORMALIZE.std))
    rows.sub_(mean.to(device)).div_(std.to(device))
    # Seen as (N, 3, 224, 224) the numbers lie in channels_last order already.
    return module(rows.to(compute.dtype).view(views.shape).permute(0, 3, 1, 2))


def collate(
    samples: Sequence[tuple[int, Tensor | str]], embed_views: Callable[[Tensor], Tensor] | None = None
) -> tuple[list[int], Tensor, dict[int, str]]:
    """Row numbers of what could be read, its views (n * V, 224, 224, 3) or what `embed_views` gives for them,
    and the reasons by row number of the rest.
    """
    good = [(index, views) for index, views in samples if isinstance(views, Tensor)]
    bad = {index: reason for index, reason in samples if isinstance(reason, str)}
    views = torch.cat([views for _, views in good]) if good else torch.empty(0)
    return [index for index, _ in good], embed_views(views) if embed_views and good else views, bad


def ignore_interrupts(_: int) -> None:
    """Ctrl-C reaches the whole process group: workers leave it to the parent, which ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def notice_deaths_while_waiting() -> None:
    """A worker's death is noticed by its DataLoader within five seconds of waiting for it, where it can be handled:
    not at once by torch's signal handler, which raises wherever this process is, as in printing an earlier result.
    """
    with contextlib.suppress(ValueError, AttributeError):  # not the main thread, or Windows: there is no handler
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def with_oom_retry(embed_views: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function, in 2, 4, then 8 parts where the device's memory is too small for the whole."""
    parts = 1

    def embed_parts(views: Tensor) -> Tensor:
        nonlocal parts
        while True:
            try:
                return torch.cat([embed_views(part) for part in views.chunk(parts)])
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if parts == 8:
                    raise UserError("the device is out of memory; run with --device cpu", status=1) from None
                warn_once("the device is out of memory; the pass goes on in smaller batches")
                parts *= 2

    return embed_parts


def embed_dataset(
    module: nn.Module,
    dataset: Dataset,
    rows: Sequence[int],
    *,
    compute: Compute,
    batch_size: int,
    per_image: int = 1,
) -> Iterator[Embedded]:
    """Decode the rows of a dataset, and give what a module makes of their views, batch by batch, in order.

    Raises as `embed_batches` does.
    """
    part = batch_size if compute.device.type == "cpu" else min(batch_size, max(1, PART_VIEWS // per_image))
    done, workers = 0, min(compute.workers, math.ceil(len(rows) / part))
    if compute.device.type != "cpu":
        workers = min(workers, workers_with_room(part * per_image))

    def remaining() -> Iterator[Sequence[int]]:
        for start in range(done, len(rows), batch_size):
            end = min(start + batch_size, len(rows))
            yield from (rows[first : min(first + part, end)] for first in range(start, end, part))

    compute, parts = replace(compute, workers=workers), math.ceil(batch_size / part)
    for batch in embed_batches(module, dataset, remaining, compute=compute, per_image=per_image, parts=parts):
        yield batch
        done += len(batch[0]) + len(batch[2])


def workers_with_room(views: int) -> int:
    """How many workers have room in shared memory for what they hand over: each two such parts, and one in use."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:  # not Linux: it is main memory
        return sys.maxsize
    return free // (3 * views * VIEW_BYTES)


def join_parts(embedded: Iterator[Embedded], parts: int, device: torch.device) -> Iterator[Embedded]:
    """So many parts of views as one batch, on the device; of what travels as features each part is one."""
    while some := list(itertools.islice(embedded, parts)):
        if parts == 1:
            yield some[0]
            continue
        views = [values.to(device, non_blocking=device.type == "cuda") for rows, values, _ in some if rows]
        reasons = {row: reason for *_, bad in some for row, reason in bad.items()}
        yield [row for rows, *_ in some for row in rows], torch.cat(views) if views else torch.empty(0), reasons


def view_loader(dataset: Dataset, batches: Iterator[Sequence], collate_fn: Callable, compute: Compute) -> DataLoader:
    """What decodes batches of a dataset's rows in compute.workers processes."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=compute.workers,
        collate_fn=collate_fn,
        pin_memory=compute.device.type == "cuda",
        worker_init_fn=ignore_interrupts,
        multiprocessing_context=START_METHOD if compute.workers else None,
    )


def embed_batches(
    module: nn.Module,
    dataset: Dataset,
    batches: Callable[[], Iterator[Sequence]],
    *,
    compute: Compute,
    per_image: int = 1,
    parts: int = 1,
) -> Iterator[Embedded]:
    """`embed_dataset`, of batches that need not be known beforehand: what `batches` gives when it is first called,
    and where workers died, when it is called again for those without an answer. It may give an empty one.

    On a CPU the worker that decodes an image also runs the module on it, single-threaded: no core waits for
    another, and features travel instead of pixels. For other devices workers decode and pixels travel, and so many
    parts of what they hand over are one batch. Where workers die, half of them go on. Raises UserError (status 1)
    where the device's memory is too small for an eighth of a batch.
    """
    embed_views = functools.partial(embed, module, compute=compute)
    embed_here = None if compute.device.type == "cpu" else with_oom_retry(embed_views)
    collate_fn = collate if embed_here else functools.partial(collate, embed_views=embed_views)
    workers, finished = compute.workers, False
    while not finished:
        loader = view_loader(dataset, batches(), collate_fn, replace(compute, workers=workers))
        embedded = None
        try:
            embedded = iter(loader)
            notice_deaths_while_waiting()
            for rows, values, bad in join_parts(embedded, parts, compute.device):
                values = embed_here(values) if embed_here and rows else values
                yield rows, values.unflatten(0, (-1, per_image)) if per_image > 1 and rows else values, bad
            finished = True
        except (RuntimeError, OSError, EOFError) as error:  # the last two where it dies as its results are fetched
            if not workers or isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            workers //= 2
            rest = f"with {workers}" if workers else "without"
            warn(f"a worker died: out of memory, or /dev/shm is too small (docker run --shm-size=1g); going on {rest}")
            traceback.clear_frames(error.__traceback__)
            del embedded  # ends the other workers now, not with the next garbage


def unbatch(batches: Iterable[Embedded]) -> Iterator[tuple[int, Tensor | str]]:
    """Image by image, in order: its row and its values, float32 on the CPU, or the reason why it has none."""
    for rows, values, bad in batches:
        yield from sorted([*zip(rows, values.cpu().float(), strict=False), *bad.items()], key=itemgetter(0))
