"""The frozen backbone over images, batch by batch: decoded, viewed and embedded in parallel, in order."""

import contextlib
import copy
import functools
import itertools
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.queues import Queue
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from transfer.architectures import head_of
from transfer.device import Compute
from transfer.system.console import UserError, out_of_memory, warn, warn_once
from transfer.system.flags import IMAGE_SIZE
from transfer.system.signals import hold_signals, leave_signals_to_parent

# Views of the recipe's size. On a CPU, of 4 to 32 at a time, 8 pass fastest (measured, one thread): more than that
# outgrow its caches.
PASS_BATCH = {"cpu": 8, "cuda": 256, "mps": 64}
PART_VIEWS = 32  # that a worker hands over at a time where they travel as pixels: 5 MB
# A forked worker starts at once; a spawned one imports torch first, but is safe everywhere.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"
# Row numbers, values (n, ...) or (n, per_image, ...), and the reasons by row of what can't be read.
Embedded = tuple[list[int], Tensor, dict[int, str]]
# The same as it travels from a worker: the values as bytes, and their dtype, since numpy has no bfloat16.
Packed = tuple[list[int], np.ndarray, torch.dtype, dict[int, str]]
READING_VERSION = 3  # of how images become numbers, up to `embed`: raise it and no cached feature is used


def backbone_of(model: nn.Module) -> nn.Module:
    """A network without its head, on the same weights: images (N, 3, S, S) to features (N, feature_dim)."""
    head = head_of(model)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    backbone = copy.deepcopy(model, shared | {id(head): nn.Identity()})
    backbone.feature_dim = head.in_features
    return backbone


def pass_batch(device: torch.device, size: int) -> int:
    """How many views of size x size pixels pass at a time: of larger ones fewer, so that they take no more memory."""
    return max(1, int(PASS_BATCH[device.type] * min(1, (IMAGE_SIZE / size) ** 2)))


def inference_copy(module: nn.Module, compute: Compute) -> nn.Module:
    """A copy for `embed`: on the device, its weights in the dtype but for BatchNorm's. Of a ResNet autocast gives the
    same bits, but casts the weights anew for every batch.
    """
    module = copy.deepcopy(module).to(compute.device, memory_format=torch.channels_last)
    for part in module.modules():
        if not isinstance(part, nn.BatchNorm2d):
            for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(compute.dtype)
    return module


@torch.inference_mode()
def embed(module: nn.Module, views: Tensor, compute: Compute) -> Tensor:
    """What an `inference_copy` gives for uint8 views (N, S, S, 3), on its device and in its dtype."""
    device = compute.device
    # Normalised as bytes and along whole rows of pixels: four times as fast as over three channels.
    rows, norm = views.to(device).flatten(2).float(), compute.normalize  # (N, S, 3 * S)
    mean, std = (255 * torch.tensor(three).repeat(views.shape[2]) for three in (norm.mean, norm.std))
    rows.sub_(mean.to(device)).div_(std.to(device))
    # Seen as (N, 3, S, S) the numbers lie in channels_last order already.
    return module(rows.to(compute.dtype).view(views.shape).permute(0, 3, 1, 2))


def collate(
    samples: Sequence[tuple[int, Tensor | str]], embed_views: Callable[[Tensor], Tensor] | None = None
) -> Packed:
    """Row numbers of what could be read, its views (n * V, S, S, 3) or what `embed_views` gives for them,
    and the reasons by row number of the rest.

    An array goes through the worker's pipe. A tensor would go through shared memory, which a container may lack, and a
    socket below TMPDIR, whose path may be too long for one.
    """
    good = [(index, views) for index, views in samples if isinstance(views, Tensor)]
    bad = {index: reason for index, reason in samples if isinstance(reason, str)}
    views = torch.cat([views for _, views in good]) if good else torch.empty(0)
    values = embed_views(views) if embed_views and good else views
    return [index for index, _ in good], values.contiguous().view(torch.uint8).numpy(), values.dtype, bad


def start_worker(_: int) -> None:
    """What a worker does first. An error in the thread that sends its results would leave the parent waiting for ever:
    it ends the worker, which the parent notices.
    """
    leave_signals_to_parent()
    Queue._on_queue_feeder_error = staticmethod(end_worker)


def end_worker(error: BaseException, _: object) -> None:
    os.write(2, f"a worker can't send its results: {error}\n".encode(errors="backslashreplace"))
    os._exit(1)


def start_workers(loader: DataLoader) -> Iterator[Packed]:
    """The loader's iterator, its workers running. Raises OSError where the system lets none run.

    A worker's death is noticed by its DataLoader within five seconds of waiting for it, where it can be handled: not at
    once by torch's signal handler, which raises wherever this process is, as in printing an earlier result.
    """
    if loader.num_workers:
        loader.multiprocessing_context.Lock()  # tried first: a DataLoader that fails in this complains as it is freed
    with hold_signals():
        batches = iter(loader)
        with contextlib.suppress(ValueError, AttributeError):  # not the main thread, or Windows: there is no handler
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return batches


def is_worker_death(error: Exception) -> bool:
    """Whether a DataLoader's error tells of a worker that died, lacks memory or can't start; not of a bug in one."""
    if "Caught " in str(error):  # with the worker's own traceback
        return out_of_memory(error)
    return not isinstance(error, RuntimeError) or "DataLoader worker" in str(error)


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

    def remaining() -> Iterator[Sequence[int]]:
        for start in range(done, len(rows), batch_size):
            end = min(start + batch_size, len(rows))
            yield from (rows[first : min(first + part, end)] for first in range(start, end, part))

    compute, parts = replace(compute, workers=workers), math.ceil(batch_size / part)
    for batch in embed_batches(module, dataset, remaining, compute=compute, per_image=per_image, parts=parts):
        yield batch
        done += len(batch[0]) + len(batch[2])


def unpack(batches: Iterator[Packed], parts: int) -> Iterator[Embedded]:
    """So many parts of views as one batch of tensors; of what travels as features each part is one."""
    while some := list(itertools.islice(batches, parts)):
        values = [torch.from_numpy(array).view(dtype) for rows, array, dtype, _ in some if rows]
        reasons = {row: reason for *_, bad in some for row, reason in bad.items()}
        yield [row for rows, *_ in some for row in rows], torch.cat(values) if values else torch.empty(0), reasons


def view_loader(dataset: Dataset, batches: Iterator[Sequence], collate_fn: Callable, compute: Compute) -> DataLoader:
    """What decodes batches of a dataset's rows in compute.workers processes."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=compute.workers,
        collate_fn=collate_fn,
        worker_init_fn=start_worker,
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
        packed = None
        try:
            packed = start_workers(loader)
            for rows, values, bad in unpack(packed, parts):
                values = embed_here(values) if embed_here and rows else values
                yield rows, values.unflatten(0, (-1, per_image)) if per_image > 1 and rows else values, bad
            finished = True
        except (RuntimeError, MemoryError, OSError, EOFError) as error:  # the last two where it dies while it sends
            if not workers or not is_worker_death(error):
                raise
            workers //= 2
            rest = f"with {workers}" if workers else "without"
            warn(f"a decoding process died, perhaps out of memory; going on {rest}")
            traceback.clear_frames(error.__traceback__)
        finally:  # ends the workers now, not with the next garbage: torch would then wait for each of them in vain
            traceback.clear_frames(sys.exc_info()[2])
            del packed


def unbatch(batches: Iterable[Embedded]) -> Iterator[tuple[int, Tensor | str]]:
    """Image by image, in order: its row and its values, float32 on the CPU, or the reason why it has none."""
    for rows, values, bad in batches:
        yield from sorted([*zip(rows, values.cpu().float(), strict=False), *bad.items()], key=itemgetter(0))
