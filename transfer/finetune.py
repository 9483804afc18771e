"""Fine-tuning: the network, optimiser, scheduler and batches that the recipe's loop then trains."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from transfer.architectures import head_of
from transfer.backbone import backbone_of, embed_dataset, inference_copy, pass_batch
from transfer.device import Compute, free_memory
from transfer.distributed import get_rank, get_world_size, local_world_size, rank_slice
from transfer.features import Split, Splits
from transfer.inputs.lists import check_unreadable
from transfer.system.console import Progress, UserError
from transfer.training import Hyperparameters, Loaders, Training

SHARES = {"layer4": 1 / 4, "layer3": 1 / 2}  # of the blocks of a network without stages of these names
CONTAINER = 0.9  # of a network's layers, from which on what holds them is taken for the whole
WARM_UP = 0.2  # of all steps
MEMORY_SHARE = 0.5  # of what is free, that maps may take


class Network(nn.Module):
    """Unfrozen stages in the run's precision, and the head on them, always in float32. autocast: the stages' weights
    are float32, to be trained; else those of an `inference_copy`.
    """

    def __init__(self, tail: nn.Module, head: nn.Module, compute: Compute, *, autocast: bool = True):
        super().__init__()
        self.tail, self.head, self.compute = tail, head, compute
        self.autocast = autocast and compute.dtype != torch.float32
        # BatchNorm's backward pass on MPS is wrong in channels_last with some of the torch versions we allow.
        self.layout = torch.contiguous_format if compute.device.type == "mps" else torch.channels_last

    def forward(self, maps: Tensor) -> Tensor:
        device, dtype = self.compute.device, self.compute.dtype
        with torch.autocast(device.type, dtype, enabled=self.autocast):
            layout = self.layout if maps.dim() == 4 else torch.preserve_format  # tokens have three
            features = self.tail(maps.to(dtype, memory_format=layout))
        return self.head(features.float())


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Rates rise linearly for a fifth of the steps, then fall to 0 along a cosine (Smith & Topin 2019).

    torch's OneCycleLR divides by zero where a fifth of the steps is one step (5 steps), and trains nothing in one.
    """
    warm = max(1, round(WARM_UP * steps))

    def of_peak(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return (1 + math.cos(math.pi * (step + 1 - warm) / (steps + 1 - warm))) / 2

    return LambdaLR(optimizer, of_peak)


def count_layers(module: nn.Module) -> int:
    """How many layers with weights it has, but for linear ones, of which a classifier may have several."""
    return sum(bool([*each.parameters(recurse=False)]) for each in module.modules() if not isinstance(each, nn.Linear))


def blocks_of(backbone: nn.Module) -> list[str]:
    """The names of the blocks that a network is a sequence of: the children with weights of the innermost module that
    holds nine tenths of its layers, such as `features` or `encoder.layers`.
    """
    name, whole = "", backbone
    while True:
        children = dict(whole.named_children())
        largest = max(children, key=lambda child: count_layers(children[child]))
        if count_layers(children[largest]) < CONTAINER * count_layers(whole) or not [*children[largest].children()]:
            return [f"{name}{child}" for child, module in children.items() if [*module.parameters()]]
        name, whole = f"{name}{largest}.", children[largest]


def first_unfrozen(backbone: nn.Module, stage: str) -> str:
    """The name of the block from which on a stage is trained: the ResNets' of that name, of other networks the first of
    the last quarter (layer4) or half (layer3) of their blocks; or all.
    """
    blocks = blocks_of(backbone)
    return stage if stage in ("all", *blocks) else blocks[-math.ceil(SHARES[stage] * len(blocks))]


class BlockTracer(fx.Tracer):
    """Follows a network's forward pass down to one block, and looks into no module that does not hold this one."""

    def __init__(self, block: str):
        super().__init__()
        self.block = block

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return not self.block.startswith(f"{name}.")


def split_network(backbone: nn.Module, block: str) -> tuple[nn.Module, nn.Module]:
    """What comes before a block, and what from there on, on the same weights: images to maps, maps to features."""
    nodes = [*BlockTracer(block).trace(backbone).nodes]
    start = next(number for number, node in enumerate(nodes) if node.target == block)
    trunk, tail, maps = fx.Graph(), fx.Graph(), nodes[start].args[0]
    copies = {}
    for node in nodes[:start]:
        copies[node] = trunk.node_copy(node, copies.get)
    trunk.output(copies[maps])
    copies = {maps: tail.placeholder("maps")}
    for node in nodes[start:]:
        copies[node] = tail.node_copy(node, copies.get)
    return fx.GraphModule(backbone, trunk), fx.GraphModule(backbone, tail)


def unfreeze(model: nn.Module, stage: str, compute: Compute) -> tuple[nn.Module, nn.Module]:
    """The frozen trunk below a stage, ready for `embed`, and the network from there to the logits.

    Under torchrun DistributedDataParallel hands rank 0's weights to the others.
    """
    backbone = backbone_of(model.to(compute.device))
    trunk, tail = nn.Sequential(), backbone
    if stage != "all":
        trunk, tail = split_network(backbone, first_unfrozen(backbone, stage))
    trunk = inference_copy(trunk, compute)
    for parameter in tail.parameters():
        parameter.requires_grad = True
    network = Network(tail, head_of(model), compute)
    if compute.device.type == "mps":
        network.to(memory_format=torch.contiguous_format)
    if get_world_size() > 1:
        network = DistributedDataParallel(network)
        network.broadcast_buffers = (
            False  # none changes while BatchNorm infers; the argument's name goes by torch's age
        )
    return trunk, network


def unwrap(network: nn.Module) -> nn.Module:
    """The network itself, where DistributedDataParallel wraps it."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def as_predicted(network: nn.Module) -> nn.Module:
    """A head, or a network that is fine-tuned, with the arithmetic of `predict.py`: autocast leaves LayerNorms in
    float32. Not through DistributedDataParallel: a rank may have nothing to evaluate, and would miss from its forward
    pass.
    """
    network = unwrap(network)
    if not (isinstance(network, Network) and network.autocast):
        return network
    tail = inference_copy(network.tail, network.compute)
    return Network(tail, network.head, network.compute, autocast=False)


def compute_feature_maps(trunk: nn.Module, split: Split, compute: Compute) -> Tensor:
    """What the trunk gives for all V views of a split's n images: (n, V, C, H, W), in its dtype, in main memory."""
    dataset, rows, views = split.dataset, split.features.rows.tolist(), len(split.dataset.views)
    kept, done = None, 0
    progress = Progress(f"{dataset.image_list.name} again:", len(rows))
    batch_size = max(1, pass_batch(compute.device, dataset.size) // views)
    for indices, maps, bad in embed_dataset(
        trunk, dataset, rows, compute=compute, batch_size=batch_size, per_image=views
    ):
        check_unreadable(dataset.image_list, bad, max_unreadable=0)  # the pass could read it
        maps = maps if views > 1 else maps[:, None]
        if kept is None:
            # Any choice of maps is in the order of these, often channels_last, without a copy of its own.
            order = sorted(range(2, maps.dim()), key=lambda axis: -maps.stride(axis))
            kept = torch.empty(len(rows), views, *(maps.shape[axis] for axis in order), dtype=maps.dtype)
            kept = kept.permute(0, 1, *(2 + order.index(axis) for axis in range(2, maps.dim())))
        kept[done : done + len(indices)] = maps.cpu()
        done += len(indices)
        progress.add(len(indices))
    return kept


def feature_map_bytes(trunk: nn.Module, split: Split, compute: Compute) -> int:
    """What keeping the feature maps of a split would take, measured on its first image."""
    rows = split.features.rows
    if not len(rows):
        return 0
    _, maps, _ = next(embed_dataset(trunk, split.dataset, rows[:1].tolist(), compute=compute, batch_size=1))
    return maps.numel() * maps.element_size() * len(rows)


class FeatureMapLoader:
    """Batches (feature maps, labels) of a split on the device, as a DataLoader gives them: image i in its view number
    i + epoch modulo V, with shuffle_seed in a new order each time. The maps are kept, or computed anew each time.
    """

    def __init__(
        self,
        trunk: nn.Module,
        split: Split,
        *,
        compute: Compute,
        batch_size: int,
        keep: bool,
        shuffle_seed: int | None = None,
    ):
        self.trunk, self.dataset, self.rows = trunk, split.dataset, split.features.rows
        self.compute, self.batch_size, self.epoch = compute, batch_size, 0
        self.generator = None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed)
        self.kept = compute_feature_maps(trunk, split, compute) if keep and len(self.rows) else None

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.rows)
        order = torch.randperm(count, generator=self.generator) if self.generator else torch.arange(count)
        return self.compute_anew(order) if self.kept is None else self.from_kept(order)

    def from_kept(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        device, labels = self.compute.device, self.dataset.image_list.labels
        for places in order.split(self.batch_size):
            rows = self.rows[places]
            views = (rows + self.epoch) % len(self.dataset.views)
            yield self.kept[places, views].to(device), labels[rows].to(device)

    def compute_anew(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        device, labels, views = self.compute.device, self.dataset.image_list.labels, self.dataset.views
        turned = [views[(place + self.epoch) % len(views)] for place in range(len(views))]
        dataset, rows = replace(self.dataset, views=turned, one_view_each=True), self.rows[order].tolist()
        for indices, maps, bad in embed_dataset(
            self.trunk, dataset, rows, compute=self.compute, batch_size=self.batch_size
        ):
            check_unreadable(self.dataset.image_list, bad, max_unreadable=0)
            # Cloned outside inference mode, so that they can take part in a graph.
            yield maps.clone().to(device), labels[indices].to(device)


def rank_share(train: Split, val: Split) -> tuple[Split, Split]:
    """This rank's images: equally many to train on, since ranks must make the same number of steps.

    Raises UserError.
    """
    world, rows, val_rows = get_world_size(), train.features.rows, val.features.rows
    if len(rows) < world:
        raise UserError(f"{world} ranks have {len(rows)} images to fine-tune on; run fewer ranks")
    rows = rows[get_rank() :: world][: len(rows) // world]
    val_rows = val_rows[torch.tensor(rank_slice(len(val_rows)), dtype=torch.int64)]
    train_views, val_views = replace(train.dataset, views=train.dataset.views[:2]), replace(val.dataset, views=[0])
    return Split(train_views, train.features.only(rows)), Split(val_views, val.features.only(val_rows))


def prepare_finetuning(
    model: nn.Module, early_head: dict[str, Tensor], splits: Splits, hparams: Hyperparameters, *, compute: Compute
) -> Training:
    """The network from the unfrozen stages on, and what trains it.

    The trunk before the stages stays frozen, outside the graph; what it gives for the evaluation view and, from two
    views on, its mirror image, which come by turns, never changes, and is kept where it fits into memory.
    early_head: the head's state after a few epochs: a random head's gradients would spoil the features (LP-FT, Kumar
    et al. 2022), and one that fits its training images perfectly has none left (measured: 1.7 points less).
    Under torchrun each rank has images of its own. Raises UserError.
    """
    train, val = rank_share(splits.train, splits.val)
    head_of(model.cpu()).load_state_dict(early_head)
    trunk, network = unfreeze(model, hparams.unfreeze, compute)
    tail, head = unwrap(network).tail, unwrap(network).head
    # The head's rate: a fifth of what it was trained with before.
    groups = [
        {"params": tail.parameters(), "lr": hparams.finetune_lr},
        {"params": head.parameters(), "lr": hparams.lr / 5},
    ]
    optimizer = torch.optim.Adam(groups)
    need = feature_map_bytes(trunk, train, compute) + feature_map_bytes(trunk, val, compute)
    free = free_memory() // local_world_size()
    keep = need < MEMORY_SHARE * free
    memory = f"{need / 1e9:.1f} GB of memory ({free / 1e9:.1f} GB free)"
    first = first_unfrozen(backbone_of(model), hparams.unfreeze)
    print(f"finetune  {first}; {memory if keep else f'slow, since it would need {memory}'}", flush=True)
    batch_size = max(1, hparams.batch_size // get_world_size())
    loaders = Loaders(
        FeatureMapLoader(trunk, train, compute=compute, batch_size=batch_size, keep=keep, shuffle_seed=hparams.seed),
        FeatureMapLoader(trunk, val, compute=compute, batch_size=batch_size, keep=keep),
    )
    scheduler = one_cycle(optimizer, hparams.finetune_epochs * len(loaders.train))
    return Training(network, optimizer, scheduler, loaders)
