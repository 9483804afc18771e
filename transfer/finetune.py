"""Fine-tuning: the network, optimiser and batches that the recipe's loop then trains."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

from transfer.backbone import PASS_BATCH, embed_in_order, inference_copy
from transfer.console import Progress, UserError
from transfer.device import Compute, free_memory
from transfer.distributed import my_rank, rank_slice, ranks_here, world_size
from transfer.lists import check_unread

UNFROZEN_FROM = {"layer4": 7, "layer3": 6, "all": 0}  # places among a ResNet's children
WARM_UP = 0.2  # of all steps
MEMORY_SHARE = 0.5  # of what is free, that maps may take


class Network(nn.Module):
    """Unfrozen stages and the head on them, as `predict.py` computes both: the head always in float32."""

    def __init__(self, tail: nn.Module, head: nn.Module, compute: Compute):
        super().__init__()
        self.tail, self.head, self.compute = tail, head, compute
        # BatchNorm's backward pass on MPS is wrong in channels_last with some of the torch versions we allow.
        self.layout = torch.contiguous_format if compute.device.type == "mps" else torch.channels_last

    def forward(self, maps: Tensor) -> Tensor:
        device, dtype = self.compute.device, self.compute.dtype
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            features = self.tail(maps.to(dtype, memory_format=self.layout))
        return self.head(features.float())


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Rates up in a line over a fifth of the steps, down to 0 along a cosine (Smith & Topin 2019).

    torch's OneCycleLR divides by zero where a fifth of the steps is one step (5 steps), and trains nothing in one.
    """
    warm = max(1, round(WARM_UP * steps))

    def of_peak(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return (1 + math.cos(math.pi * (step + 1 - warm) / (steps + 1 - warm))) / 2

    return LambdaLR(optimizer, of_peak)


def unfreeze(model: nn.Module, stage: str, compute: Compute) -> tuple[nn.Module, nn.Module]:
    """The frozen trunk below a stage, ready for `embed`, and the network from there to the logits.

    Under torchrun DistributedDataParallel hands rank 0's weights to the others.
    """
    cut, parts = UNFROZEN_FROM[stage], list(model.to(compute.device).children())
    trunk = inference_copy(nn.Sequential(*parts[:cut]), compute)
    tail = nn.Sequential(*parts[cut:-1], nn.Flatten(1))
    for parameter in tail.parameters():
        parameter.requires_grad = True
    network = Network(tail, model.fc, compute)
    if compute.device.type == "mps":
        network.to(memory_format=torch.contiguous_format)
    # No buffer changes while BatchNorm infers; and to broadcast them, ranks without an image would have to join in.
    return trunk, DistributedDataParallel(network, broadcast_buffers=False) if world_size() > 1 else network


def inner(network: nn.Module) -> nn.Module:
    """The network itself, where DistributedDataParallel wraps it."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def keep_maps(trunk: nn.Module, dataset: Dataset, rows: Tensor, compute: Compute) -> Tensor:
    """What the trunk gives for all V views of n images: (n, V, C, H, W), in its dtype, in main memory."""
    kept, done, views = None, 0, len(dataset.views)
    progress = Progress(f"{dataset.listed.name} again:", len(rows))
    how = {"compute": compute, "batch_size": PASS_BATCH[compute.device.type] // views, "per_image": views}
    for indices, maps, bad in embed_in_order(trunk, dataset, rows.tolist(), **how):
        check_unread(dataset.listed, bad, tolerated=0)  # the pass could read it
        if kept is None:
            channels, height, width = maps.shape[-3:]
            # Stored as (n, V, H, W, C): any choice of maps is in channels_last order without a copy of its own.
            kept = torch.empty(len(rows), views, height, width, channels, dtype=maps.dtype).permute(0, 1, 4, 2, 3)
        kept[done : done + len(indices)] = maps.view(len(indices), views, *maps.shape[-3:]).cpu()
        done += len(indices)
        progress.add(len(indices))
    return kept


def map_bytes(trunk: nn.Module, dataset: Dataset, rows: Tensor, compute: Compute) -> int:
    """What keeping the maps of these images would take, measured on the first."""
    if not len(rows):
        return 0
    _, maps, _ = next(embed_in_order(trunk, dataset, rows[:1].tolist(), compute=compute, batch_size=1))
    return maps.numel() * maps.element_size() * len(rows)


def batches_by_turns(
    trunk: nn.Module, dataset: Dataset, rows: Tensor, *, compute: Compute, batch_size: int, keep: bool
) -> Callable[[Tensor, int], Iterator[tuple[Tensor, Tensor]]]:
    """A function of an order of the rows and an epoch, which gives (maps, labels) batch by batch, on the device: image
    i in view i + epoch modulo V. The maps are kept, or computed anew each time.
    """
    views, labels = len(dataset.views), dataset.listed.labels
    kept = keep_maps(trunk, dataset, rows, compute) if keep and len(rows) else None

    def from_kept(order: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for places in order.split(batch_size):
            chosen = rows[places]
            yield kept[places, (chosen + epoch) % views].to(compute.device), labels[chosen].to(compute.device)

    def anew(order: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        turned = [dataset.views[(place + epoch) % views] for place in range(views)]
        shown = dataset.drawn(turned, by_turns=True)
        for indices, maps, bad in embed_in_order(
            trunk, shown, rows[order].tolist(), compute=compute, batch_size=batch_size
        ):
            check_unread(dataset.listed, bad, tolerated=0)
            # Cloned outside inference mode, so that they can take part in a graph.
            yield maps.clone().to(compute.device), labels[indices].to(compute.device)

    return anew if kept is None else from_kept


def prepare(
    model: nn.Module,
    start: dict[str, Tensor],
    train: tuple[Dataset, Tensor],
    val: tuple[Dataset, Tensor],
    *,
    stage: str,
    epochs: int,
    rates: tuple[float, float],
    batch_size: int,
    seed: int,
    compute: Compute,
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[int], Iterator], Callable[[], Iterator]]:
    """What trains the last stages with the head: network, optimiser, an epoch's batches, the evaluation's batches.

    The trunk before the stages stays frozen, outside the graph; what it gives for the evaluation view and its mirror
    image, which come by turns, never changes, and is kept where it fits into memory.
    start: the head's state, that of an early epoch: a random head's gradients would spoil the features (LP-FT, Kumar
    et al. 2022), and one that knows its training images by heart has none left (measured: 1.7 points less).
    train, val: a `train.Views` and the rows of it that are meant; rates: the peaks, of the stages and of the head.
    Under torchrun each rank has images of its own, equally many. Raises UserError.
    """
    (train_views, train_rows), (val_views, val_rows) = train, val
    world = world_size()
    if len(train_rows) < world:
        raise UserError(f"{world} ranks have {len(train_rows)} images to fine-tune on; run fewer ranks")
    model.cpu().fc.load_state_dict(start)
    trunk, network = unfreeze(model, stage, compute)
    parts = zip((inner(network).tail, inner(network).head), rates, strict=True)
    optimizer = torch.optim.Adam([{"params": part.parameters(), "lr": lr} for part, lr in parts])
    # Ranks must make the same number of steps.
    mine = train_rows[my_rank() :: world][: len(train_rows) // world]
    val_mine = val_rows[torch.tensor(rank_slice(len(val_rows)), dtype=torch.int64)]
    need = sum(map_bytes(trunk, *each, compute) for each in ((train_views, mine), (val_views, val_mine)))
    free = free_memory() // ranks_here()
    keep = need < MEMORY_SHARE * free
    where = "in memory" if keep else "not kept, but computed anew in each epoch"
    print(f"finetune  {stage}; maps of {need / 1e9:.1f} GB {where} ({free / 1e9:.1f} GB free)", flush=True)
    how = {"compute": compute, "batch_size": max(1, batch_size // world), "keep": keep}
    train_batches = batches_by_turns(trunk, train_views, mine, **how)
    val_batches = batches_by_turns(trunk, val_views, val_mine, **how)
    schedule = one_cycle(optimizer, epochs * math.ceil(len(mine) / how["batch_size"]))
    shuffle = torch.Generator().manual_seed(seed)

    def scheduled(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in train_batches(torch.randperm(len(mine), generator=shuffle), epoch):
            yield batch
            schedule.step()  # whoever asks for the next batch has made a step on this one

    return network, optimizer, scheduled, lambda: val_batches(torch.arange(len(val_mine)), 0)
