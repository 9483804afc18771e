"""Near copies: a changed copy is the same photo by its pixels, another photo of the shelf is not."""

import io
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from PIL import Image

import train
from transfer.audit.copies import SAME_PHOTO, candidates, copy_findings, copy_groups, similarity, thumbnails
from transfer.audit.findings import AuditSplit
from transfer.device import Compute
from transfer.features import moments
from transfer.inputs.images import read_image
from transfer.inputs.lists import ImageList
from transfer.neighbours import nearest

HERE = Compute(torch.device("cpu"), torch.bfloat16)


def recompressed(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def cropped(image, left, top, right, bottom):
    width, height = image.size
    return image.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))


COPIES = {
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "quality 40": lambda image: recompressed(image, 40),
    "5% cropped": lambda image: recompressed(cropped(image, 0.025, 0.025, 0.975, 0.975), 90),
    "5% cropped at one side": lambda image: cropped(image, 0.05, 0, 1, 1),
    "a tenth cropped": lambda image: cropped(image, 0.05, 0.05, 0.95, 0.95),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "brighter": lambda image: image.point(lambda value: min(255, round(1.2 * value))),
}


def thumbs(*images):
    """Thumbnails of images, as the audit makes them."""
    folder = []
    for number, image in enumerate(images):
        image.save(f"{number}.png")
        folder.append(b"%d.png" % number)
    image_list = ImageList("list.txt", folder, [0] * len(folder), range(len(folder)))
    return thumbnails(train.ImageDataset(image_list, [0], 0), torch.arange(len(folder)), HERE).float()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_candidates_are_pairs_of_different_images_each_once():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 1, 16, generator=generator)
    features[20:] = features[:10] + 0.01 * torch.randn(10, 1, 16, generator=generator)
    scale = moments(features)
    pairs = candidates(features, features, nearest(features, features, True)[1], itself=True, scale=scale).tolist()
    assert len(set(map(tuple, pairs))) == len(pairs) and all(query > key for query, key in pairs)
    assert {(20 + n, n) for n in range(10)} <= set(map(tuple, pairs)) and len(pairs) < 40
    near = nearest(features[:1], features[:1], itself=True)[1]
    assert candidates(features[:1], features[:1], near, itself=True, scale=scale).shape == (0, 2)


@pytest.mark.parametrize("change", COPIES)
def test_a_changed_copy_is_the_same_photo_and_another_photo_of_the_shelf_is_not(here, change):
    shelf = [read_image(ROOT / f"food/pepper/train_{number:02d}.jpg") for number in (4, 8)]  # the sample's most alike
    photos = [shelf[0], *(read_image(ROOT / f"food/{name}/train_01.jpg") for name in ("apple", "lemon", "carrots"))]
    small = thumbs(*photos, *map(COPIES[change], photos), *shelf)
    assert similarity(small[:4], small[4:8]).min() > SAME_PHOTO
    assert similarity(small[4:8], small[:4]).min() > SAME_PHOTO
    assert similarity(small[-2:-1], small[-1:]) < SAME_PHOTO
    assert similarity(small[:3], small[5:8]).max() < 0.5


def test_images_without_details_are_alike_only_where_they_are_equal(here):
    grey = [Image.new("RGB", (50, 40), (shade,) * 3) for shade in (90, 90, 91, 200)]
    small = thumbs(*grey)
    assert similarity(small[:1].expand(3, -1, -1), small[1:]).tolist() == [1, 0, 0]


def test_an_image_that_can_not_be_read_any_more_is_like_no_other(here):
    small = thumbs(Image.new("RGB", (50, 40)), Image.new("RGB", (50, 40)))
    image_list = ImageList("list.txt", [b"gone.png", b"gone too.png"], [0, 0], [1, 2])
    gone = thumbnails(train.ImageDataset(image_list, [0], 0), torch.arange(2), HERE).float()
    assert gone.isnan().all()
    assert similarity(gone, small).tolist() == similarity(gone, gone).tolist() == [0, 0]


@pytest.mark.parametrize(("probs", "suggestion"), [((0.9, 0.1), 1), ((0.9, 0.6), None), ((0.3, 0.2), None)])
def test_of_two_labels_in_conflict_one_is_suggested_only_where_it_is_probably_right_and_the_other_wrong(
    probs, suggestion
):
    image_list = ImageList("list.txt", [b"a.png", b"b.png"], [0, 1], [1, 2])
    split = AuditSplit(train.ImageDataset(image_list, [0], 0), torch.arange(2), torch.zeros(2, 1, 4), torch.arange(2))
    quality = SimpleNamespace(error_prob=torch.tensor(probs))
    found = [(0, 0, torch.tensor([[1, 0]]), torch.tensor([0.99]))]
    (finding,) = copy_findings([split], [quality], found)
    assert (finding.kind, finding.path, finding.suggestion) == ("conflict", b"a.png", suggestion)


def test_copies_of_copies_are_one_group_unless_their_labels_differ():
    pairs = torch.tensor([[1, 0], [2, 1], [5, 2], [4, 3], [6, 3]])
    assert copy_groups(torch.tensor([0, 0, 0, 1, 1, 0, 0]), pairs).tolist() == [0, 0, 0, 1, 1, 0, 2]


def test_an_image_with_two_copies_is_found_once_beside_the_more_certain_one(here):
    photo = Image.new("RGB", (9, 9))
    image_list = ImageList("list.txt", [b"a.png", b"b.png", b"c.png"], [0, 0, 0], [1, 2, 3])
    for path in image_list.paths():
        photo.save(path.decode())
    split = AuditSplit(train.ImageDataset(image_list, [0], 0), torch.arange(3), torch.zeros(3, 1, 4), image_list.labels)
    quality = SimpleNamespace(error_prob=torch.zeros(3))
    found = [(0, 0, torch.tensor([[2, 0], [2, 1], [1, 0]]), torch.tensor([0.97, 0.99, 0.96]))]
    pairs = [(finding.path, finding.other_path) for finding in copy_findings([split], [quality], found)]
    assert pairs == [(b"c.png", b"b.png"), (b"b.png", b"a.png")]
    counted = []
    thumbnails(split.dataset, split.rows, HERE, SimpleNamespace(add=counted.append))
    assert sum(counted) == 3
