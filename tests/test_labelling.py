"""Labelling: first what is typical, unclear and unlike the rest; each photo once; rows in every format."""

import csv
import io
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import answer, growth, save_photo
from PIL import Image
from torch.nn import functional as F

import predict
from transfer.labelling import copy_test, most_worthy, propose, typicality, uncertainty, unit_vectors
from transfer.system.signals import StopRequest


def never(place, taken):
    return False


def clusters(*sizes, noise=0.1):
    """Unit vectors (N, 16) in clusters of these sizes, around axes."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.cat([torch.eye(16)[number].expand(size, -1) for number, size in enumerate(sizes)])
    return F.normalize(centres + noise * torch.randn(len(centres), 16, generator=generator), dim=1)


def test_typicality_is_the_mean_cosine_to_the_ten_nearest():
    units = unit_vectors(torch.randn(60, 5, generator=torch.Generator().manual_seed(0)))
    cosines = (units @ units.T).fill_diagonal_(-torch.inf)
    assert torch.allclose(typicality(units), cosines.topk(10).values.mean(1), atol=1e-5)


def test_standardised_features_have_no_level_and_no_scale():
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    expected = F.normalize((features - features.mean(0)) / features.std(0, correction=0), dim=1)
    assert torch.allclose(unit_vectors(features * torch.tensor([1, 10, 100, 0.1]) + 7), expected, atol=1e-4)


def test_of_alike_photos_the_one_with_the_smallest_margin_comes_first():
    probs = torch.tensor([[0.9, 0.05, 0.05], [0.45, 0.1, 0.45], [0.6, 0.3, 0.1]])
    assert torch.allclose(uncertainty(probs), torch.tensor([0.15, 1, 0.7]))
    order = most_worthy(torch.eye(3), torch.ones(3), uncertainty(probs), 3, is_copy=never)
    assert [place for place, _ in order] == [1, 2, 0]


def test_one_class_leaves_nothing_unclear():
    assert uncertainty(torch.ones(2, 1)).tolist() == [0, 0]


def test_the_next_photo_is_unlike_those_before_it():
    units = clusters(20, 10, 5)
    order = [place for place, _ in most_worthy(units, typicality(units), torch.ones(35), 3, is_copy=never)]
    assert sorted((0 if place < 20 else 1 if place < 30 else 2) for place in order) == [0, 1, 2]


def test_what_stands_alone_comes_after_what_is_typical():
    units = clusters(20, 20, 1)
    typical = typicality(units)
    assert int(typical.argmin()) == 40
    assert 40 not in [place for place, _ in most_worthy(units, typical, torch.ones(41), 2, is_copy=never)]


def test_worth_falls_from_photo_to_photo_and_more_than_there_are_is_all_of_them_once():
    units = clusters(9, 3, 1)
    unclear = torch.rand(13, generator=torch.Generator().manual_seed(0))
    order = [*most_worthy(units, typicality(units), unclear, 99, is_copy=never)]
    worth = [each for _, each in order]
    assert sorted(place for place, _ in order) == [*range(13)]
    assert worth == sorted(worth, reverse=True) and 0 <= worth[-1] and worth[0] <= 1


@pytest.mark.parametrize("count", [1, 2])
def test_a_pile_of_hardly_any_photos_is_proposed(count):
    found = [*propose(torch.ones(count, 8), torch.tensor([[0.7, 0.3]] * count), 5, lambda place: torch.rand(32, 32))]
    assert [place for place, _ in found] == [*range(count)]


def test_copies_are_known_by_features_and_then_by_pixels():
    pixels, asked = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)), []

    def thumbnail(place):
        asked.append(place)
        return pixels[[0, 0, 1, 2][place]]

    units = torch.eye(4)[[0, 0, 0, 1]]
    is_copy = copy_test(units, thumbnail)
    assert is_copy(1, [0]) and not is_copy(2, [0]) and is_copy(1, [3, 2, 0])
    assert not is_copy(3, [0, 1]) and not is_copy(0, []) and sorted(asked) == [0, 1, 2]  # 3 was far from all
    order = most_worthy(units, torch.ones(4), torch.ones(4), 4, is_copy=is_copy)
    assert [place for place, _ in order] == [0, 3, 2]


def test_a_signal_ends_the_choice(monkeypatch):
    monkeypatch.setattr(StopRequest, "signum", signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        next(most_worthy(torch.eye(3), torch.ones(3), torch.ones(3), 3, is_copy=never))


def test_features_are_held_once():
    photos, width = 8000, 2048

    def choose():
        units = unit_vectors(torch.rand(photos, width))
        assert len([*most_worthy(units, torch.ones(photos), torch.ones(photos), 3, is_copy=never)]) == 3

    assert growth(choose) < 1.5 * 4 * photos * width


# What is printed


@pytest.fixture
def pile(model, quick_model):
    """A working directory with a model and a pile of 12 photos, one of them a smaller copy, and one that is broken."""
    generator = torch.Generator().manual_seed(0)
    Path("pile").mkdir()
    for number, colour in enumerate(("red", "green", "blue") * 4):
        save_photo("plain.png", colour)
        noise = torch.randint(0, 120, (6, 6, 3), dtype=torch.uint8, generator=generator)
        image = Image.fromarray(noise.numpy()).resize((64, 64))
        Image.blend(Image.open("plain.png"), image, 0.5).save(f"pile/{number:02}.png")
    Image.open("pile/03.png").resize((48, 48)).save("pile/small.png")
    Path("pile/broken.png").write_bytes(b"no image")
    return [f"pile/{number:02}.png" for number in range(12)]


def rows_of(*args, status=1):
    out, err = answer("pile", *args, "--format", "csv", status=status)
    return list(csv.DictReader(io.StringIO(out, newline=""))), err


def test_the_rows_are_ranked_by_worth_and_those_that_cannot_be_read_have_errors(pile):
    rows, _ = rows_of("--label-next", 5)
    assert [*rows[0]][:6] == ["path", "error", "rank", "worth", "name", "class1"]
    assert (rows[0]["path"], rows[0]["error"], rows[0]["rank"]) == ("pile/broken.png", "not an image", "")
    assert [row["rank"] for row in rows[1:]] == ["1", "2", "3", "4", "5"]
    worth = [float(row["worth"]) for row in rows[1:]]
    assert worth == sorted(worth, reverse=True) and all(row["name"] == row["class1"] for row in rows[1:])
    out, _ = answer("pile", "--label-next", 5, "--format", "json", status=1)
    objects = [json.loads(line) for line in out.splitlines()]
    assert [*objects[0]] == ["path", "error", "rank", "worth", "name", "top"]
    assert [(each["path"], each["rank"]) for each in objects[1:]] == [
        (row["path"], rank) for rank, row in enumerate(rows[1:], 1)
    ]
    assert [f"{each['worth']:.4f}" for each in objects[1:]] == [row["worth"] for row in rows[1:]]
    out, err = answer("pile", "--label-next", 5, status=1)
    assert [line.split()[0] for line in out.splitlines()] == [row["path"] for row in rows[1:]]
    assert err == "error: pile/broken.png: not an image\n"


def test_of_a_smaller_copy_and_its_original_one_is_proposed(pile):
    found = [row["path"] for row in rows_of("--label-next", 99)[0][1:]]
    assert len(found) == 12 and len({"pile/03.png", "pile/small.png"} & {*found}) == 1


def test_paths_alone_are_printed_as_they_are(pile, capfdbinary):
    name = "pile/two words\udcff.png"
    shutil.move("pile/05.png", name)
    with pytest.raises(SystemExit):
        predict.main(["pile", "--label-next", "99", "--format", "paths", "--workers", "0", "--device", "cpu"])
    lines = capfdbinary.readouterr().out.split(b"\n")
    assert len(lines) == 13 and b"pile/two words\xff.png" in lines and lines[-1] == b""


def test_piped_paths_and_a_list_are_piles_like_a_folder(pile, monkeypatch):
    Path("pile/broken.png").unlink()
    expected = answer("pile", "--label-next", 4)[0]
    paths = sorted(map(str, Path("pile").iterdir()))
    Path("list.txt").write_text("".join(f"{path} 7\n" for path in paths))  # labels of a pile play no part
    assert answer("list.txt", "--label-next", 4)[0] == expected
    piped = io.TextIOWrapper(io.BufferedReader(io.BytesIO("\n".join(paths).encode())))
    monkeypatch.setattr("sys.stdin", piped)
    assert answer("-", "--label-next", 4)[0] == expected


def test_the_page_is_saved_beside_the_rows(pile):
    out, _ = answer("pile", "--label-next", 3, "--report", "next.html", status=1)
    *rows, gap, last = out.splitlines()
    assert (len(rows), gap, last) == (3, "", "report saved in next.html")
    page = Path("next.html").read_text()
    assert page.count('<li class="card"') == 3 and all(row.split()[0] in page for row in rows)
    out, err = answer("pile", "--label-next", 3, "--report", "pile/03.png", status=2)
    assert out == "" and err == "error: --report pile/03.png: is read by this run; name another file to write\n"


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--except", "a.txt"], "--except needs --label-next N"),
        (["--format", "paths"], "--format paths needs --label-next N"),
        (["--label-next", 4, "--format", "table"], "--label-next prints photos without labels: leave out --labelled, "),
        (["--label-next", 4, "--labelled"], "--label-next prints photos without labels: leave out --labelled, "),
        (["--label-next", 0], "argument --label-next: '0' is not a whole number from 1"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit_are_named(flags, error):
    assert answer("pile", *flags, status=2)[1].startswith(f"error: {error}")


def test_what_except_names_and_is_not_there_is_an_error(pile):
    error = answer("pile", "--label-next", 2, "--except", "piles", status=2)[1]
    assert error == "error: --except piles: no such file or directory; did you mean pile?\n"
    error = answer("pile", "--label-next", 2, "--except", "pile/00.png", "--except", "done/*.png", status=2)[1]
    assert error.startswith("error: --except done/*.png: no such file or directory; name photos, folders or lists")


def test_as_csv_on_a_terminal_ranks_are_numbers(pile, monkeypatch):
    class Stream(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("conftest.io.StringIO", Stream)
    out, _ = answer("pile", "--label-next", 2, "--format", "csv", status=1)
    assert [line.split(",")[2] for line in out.splitlines()] == ["rank", "", "1", "2"]
