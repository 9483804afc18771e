"""Pretrained weights: found or downloaded, with one limit for all of it; what stands in where there are none."""

import hashlib
import http.server
import os
import re
import socket
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import BUNDLED, run_main
from processes import fork_script
from torchvision.models import get_model, get_model_weights

import train
from transfer import pretrained
from transfer.checkpoint import load_backbone
from transfer.pretrained import DOWNLOAD_TIMEOUT, load_pretrained


def test_offline_the_bundled_backbone_stands_in_and_the_run_warns_of_it_once_at_its_end(sample_run):
    warnings = [line for line in sample_run[0].stderr.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert "no ImageNet weights" in warnings[0] and "refused" in warnings[0] and "resnet18-grocery.pth" in warnings[0]
    assert get_model_weights("resnet18").DEFAULT.url in warnings[0] and "--weights FILE" in warnings[0]
    assert "resnet18-grocery.pth (bundled: no ImageNet weights)" in sample_run[0].stdout


def test_imagenet_where_it_is_asked_for_is_never_replaced(colours):
    status, out, err = run_main(train.main, "--weights", "imagenet")
    assert (status, out) == (2, "")
    waiting, line = err.splitlines()
    assert waiting == "downloading ImageNet weights (45 MB) from download.pytorch.org ..."
    assert line.startswith("error: ImageNet weights can't be downloaded") and "--weights FILE" in line
    assert not (colours / "best.pth").exists()


def serve_at(monkeypatch, url):
    monkeypatch.setattr("transfer.pretrained.imagenet_url", lambda arch: url)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A function that serves ImageNet's weights so: from then on a download meets that answer. And the cache folder."""
    servers, over = [], threading.Event()

    def serve(answer, name="resnet18-0123abcd.pth"):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                answer(self, over)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        servers.append(server)
        serve_at(monkeypatch, f"http://127.0.0.1:{server.server_port}/{name}")

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(urllib.request, "_opener", None)
    yield serve
    over.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def answer_with(body, length=None, status=200, then=None):
    def answer(handler, over):
        handler.send_response(status)
        handler.send_header("Content-Length", str(length or len(body)))
        handler.end_headers()
        handler.wfile.write(body)
        handler.wfile.flush()
        if then:
            then(handler, over)

    return answer


def stall(_, over):
    over.wait(30)


ANSWERS = {
    "silent": stall,
    "stalled": answer_with(b"x" * 1000, 10**7, then=stall),
    "cut": answer_with(b"x" * 1000, 10**7),
    "wrong bytes": answer_with(b"x" * 1000),
    "a login page": answer_with(b"<html>Please log in</html>"),
    "not there": answer_with(b"", status=404),
    "not HTTP": lambda handler, _: handler.wfile.write(b"SSH-2.0-server\r\n"),
}


REASONS = {"silent": "timed out", "stalled": "timed out", "not there": "Not Found|404", "not HTTP": "SSH-2.0"}


@pytest.mark.parametrize("kind", ["refused", "cache is a file", *ANSWERS])
def test_a_download_that_fails_falls_back_or_ends_and_leaves_no_file(served, job, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("transfer.architectures.get_model", get_model)
    monkeypatch.setattr("transfer.pretrained.DOWNLOAD_TIMEOUT", 0.3)
    served(ANSWERS.get(kind, stall))
    if kind == "refused":
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            address = f"http://127.0.0.1:{unused.getsockname()[1]}/resnet18-01234567.pth"
            serve_at(monkeypatch, address)
    if kind == "cache is a file":
        (tmp_path / "torch").write_bytes(b"")
    reason = {"refused": "refused", "cache is a file": "[Nn]ot a directory|[Ff]ile exists"} | REASONS
    began = time.perf_counter()
    _, description, (warning,) = load_pretrained(None, "resnet18")
    assert "resnet18-grocery.pth (bundled: no ImageNet weights)" in description
    words = reason.get(kind, "invalid hash value")
    caveat, fix = warning.split("; ", 1)
    assert re.fullmatch(rf"no ImageNet weights \(.*({words}).*\): used the bundled .*, which is far weaker", caveat)
    where = f"fetch {pretrained.imagenet_url('resnet18')} elsewhere and put it at {tmp_path / 'torch'}"
    assert fix.startswith(f"for the real ones, {where}")
    status, out, err = job("--weights", "imagenet")
    assert (status, out) == (2, "")
    waiting = "" if kind == "cache is a file" else r"downloading ImageNet weights \(45 MB\) from 127.0.0.1:\d+ ...\n"
    assert re.fullmatch(
        waiting + r"error: ImageNet weights can't be downloaded \(.*\); fetch .*, or give it as --weights FILE\n", err
    )
    assert time.perf_counter() - began < 10
    assert not [path for path in (tmp_path / "torch").rglob("*") if path.is_file()]
    assert not Path("best.pth").exists()


def test_a_stalled_download_ends_within_a_minute():
    assert DOWNLOAD_TIMEOUT * 2 <= 60


def test_one_limit_holds_for_all_addresses_of_a_host_together(served, monkeypatch):
    with socket.socket() as full:  # it never accepts, and once its queue is full it never answers
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        queued = [socket.socket() for _ in range(4)]
        for each in queued:
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", full.getsockname())] * 6
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
        serve_at(monkeypatch, "http://127.0.0.1/resnet18-01234567.pth")
        monkeypatch.setattr("transfer.pretrained.DOWNLOAD_TIMEOUT", 1)
        began = time.perf_counter()
        assert "timed out" in load_pretrained(None, "resnet18")[2][0]
        assert time.perf_counter() - began < 2.5  # each alone would take a second
        for each in queued:
            each.close()


def test_looking_up_the_host_is_part_of_the_limit(served, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(20) and [])
    serve_at(monkeypatch, "http://127.0.0.1/resnet18-01234567.pth")
    monkeypatch.setattr("transfer.pretrained.DOWNLOAD_TIMEOUT", 0.5)
    began = time.perf_counter()
    assert "timed out" in load_pretrained(None, "resnet18")[2][0]
    assert time.perf_counter() - began < 2
    over.set()


def test_a_slow_download_that_goes_on_is_waited_for(served, monkeypatch):
    content = BUNDLED.read_bytes()

    def drip(handler, over):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        for part in range(8):
            handler.wfile.write(content[part * len(content) // 8 : (part + 1) * len(content) // 8])
            over.wait(0.25)

    monkeypatch.setattr("transfer.pretrained.DOWNLOAD_TIMEOUT", 1)  # of two seconds in all
    served(drip, f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth")
    assert load_pretrained(None, "resnet18")[1].startswith("ResNet-18, ImageNet (")


def test_where_the_bundled_weights_lie_on_another_drive_their_whole_path_is_shown(monkeypatch):
    def relpath(path, start=os.curdir):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", relpath)
    _, description, (caveat,) = load_pretrained(None, "resnet18")
    assert (
        description == f"ResNet-18, {BUNDLED} (bundled: no ImageNet weights)"
        and f"used the bundled {BUNDLED}, which" in caveat
    )


FIND = """
import sys, torch
from transfer import pretrained
from transfer.distributed import init_distributed
init_distributed(torch.device("cpu"))
for url in sys.argv[1:]:
    pretrained.imagenet_url = lambda arch: url
    print(pretrained.load_pretrained(None, "resnet18")[1:], flush=True, file=sys.stderr)
"""


def test_under_torchrun_one_rank_a_machine_downloads_and_all_find_the_same(served, tmp_path):
    content, asked = BUNDLED.read_bytes(), []

    def answer(handler, over):
        asked.append(handler.path)
        over.wait(0.5)  # so that whoever does not wait is not served from the cache
        answer_with(content)(handler, over)

    name = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    served(answer, name)
    url = pretrained.imagenet_url("resnet18")
    urls = [url, url.replace(name, "resnet18-01234567.pth")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in "01":
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        home = {"TORCH_HOME": os.environ["TORCH_HOME"], "no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        ranks.append(fork_script(FIND, *urls, cwd=tmp_path, **home, **world, MASTER_PORT=str(port)))
    lines_of = [rank.communicate(timeout=60)[1].splitlines() for rank in ranks]
    found = [[line for line in lines if line.startswith("(")] for lines in lines_of]
    assert found[0] == found[1] and len(found[0]) == 2
    assert (
        "ImageNet" in found[0][0] and "(bundled: no ImageNet weights)" in found[0][1] and "invalid hash" in found[0][1]
    )
    assert asked == [f"/{url.rpartition('/')[2]}" for url in urls]
    assert [sum(line.startswith("downloading") for line in lines) for lines in lines_of] == [2, 0]


def test_a_download_that_arrives_is_used_and_kept(served, tmp_path, monkeypatch, capsys):
    content = BUNDLED.read_bytes()
    name = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    served(answer_with(content), name)
    state, description, warnings = load_pretrained(None, "resnet18")
    assert description.startswith("ResNet-18, ImageNet (") and not warnings
    expected = load_backbone(BUNDLED, "resnet18")
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    assert [path.name for path in (tmp_path / "torch/hub/checkpoints").iterdir()] == [name]
    assert capsys.readouterr().err.startswith("downloading ImageNet weights (45 MB) from 127.0.0.1:")
    served(answer_with(b"", status=404), name)
    assert load_pretrained("imagenet", "resnet18")[0].keys() == state.keys()  # from the cache
    assert capsys.readouterr().err == ""
