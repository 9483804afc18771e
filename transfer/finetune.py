"""Fine-tuning: the network, optimiser and batches that the recipe's loop then trains."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from transfer.backbone import embed_in_order, inference_copy
from transfer.checkpoint import load_state
from transfer.console import UserError
from transfer.device import Compute
from transfer.distributed import my_rank, rank_slice, world_size
from transfer.lists import check_unread

UNFROZEN_FROM = {"layer4": 7, "layer3": 6, "all": 0}  # places among resnet18's children


class Network(nn.Module):
    """Unfrozen stages and the head on them, as `predict.py` computes both: the head always in float32."""

    def __init__(self, tail: nn.Module, head: nn.Module, compute: Compute):
        super().__init__()
        self.tail, self.head, self.compute = tail, head, compute
        # BatchNorm's backward pass on MPS is wrong in channels_last with some of the torch versions we allow.
        self.layout = torch.contiguous_format if compute.device.type == "mps" else torch.channels_last

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(self.compute.dtype, memory_format=self.layout)
        with torch.autocast(self.compute.device.type, self.compute.dtype, enabled=self.compute.dtype != torch.float32):
            features = self.tail(inputs)
        return self.head(features.float())


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


def prepare(
    model: nn.Module,
    best: Path,
    train: Dataset,
    rows: Tensor,
    val: Dataset,
    *,
    stage: str,
    epochs: range,
    rates: tuple[float, float],
    batch_size: int,
    seed: int,
    compute: Compute,
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[int], Iterator], Callable[[], Iterator]]:
    """What trains the last stages with the head: network, optimiser, an epoch's batches, the evaluation's batches.
    The trunk before the stages stays frozen, outside the graph.

    From the best head on: a random head's gradients would spoil the features first (LP-FT, Kumar et al. 2022).
    Each image comes in a fresh random view and in the evaluation view by turns: of random ones alone the network
    learns their scale and not the test's (Touvron et al. 2019).
    train, val: `train.Views`; rows: those of the training images that could be read; rates: of the stages and of the
    head. Under torchrun each rank takes its part of every batch and of the evaluation. Raises UserError.
    """
    if len(rows) < world_size():
        raise UserError(f"{world_size()} ranks have {len(rows)} images to fine-tune on; run fewer ranks")
    if my_rank() == 0:
        model.load_state_dict(load_state(best)[0])
    trunk, network = unfreeze(model, stage, compute)
    inner = getattr(network, "module", network)
    parts = zip((inner.tail, inner.head), rates, strict=True)
    optimizer = torch.optim.Adam([{"params": part.parameters(), "lr": lr} for part, lr in parts])
    shuffle = torch.Generator().manual_seed(seed)
    batch_of_rank = max(1, batch_size // world_size())

    def inputs_of(views: Dataset, chosen: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for indices, values, bad in embed_in_order(trunk, views, chosen, compute=compute, batch_size=batch_of_rank):
            check_unread(views.listed, bad, tolerated=0)  # the pass could read it
            # Cloned outside inference mode, so that it can take part in a graph.
            yield values.clone(), views.listed.labels[indices]

    def train_batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = rows[torch.randperm(len(rows), generator=shuffle)]
        even = order[: len(order) - len(order) % world_size()]  # ranks must make the same number of steps
        fresh = len(train.views) + epoch - epochs.start
        mixed = train.drawn((0, fresh) if epoch % 2 else (fresh, 0), by_turns=True)
        return inputs_of(mixed, even[my_rank() :: world_size()].tolist())

    def on_device(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, labels in batches:
            yield inputs.to(compute.device), labels.to(compute.device)

    # The trunk runs on these once; what it gives waits in main memory, of which there is more.
    val_batches = [(inputs.cpu(), labels) for inputs, labels in inputs_of(val, rank_slice(len(val)))]
    return network, optimizer, lambda epoch: on_device(train_batches(epoch)), lambda: on_device(val_batches)
