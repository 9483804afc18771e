"""The scripts in processes of their own: started as a user starts them, or forked from one that has imported torch."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 600  # seconds that a process is given, also where much else shares the cores
# A machine where every download is refused.
OFFLINE = {"https_proxy": "http://127.0.0.1:9", "no_proxy": "", "TORCH_HOME": "/nonexistent/torch"}


def start_script(script: str, *args: object, cwd: Path = ROOT, **environment: str) -> subprocess.Popen:
    """A script as a user runs it; which imports torch for seconds: where a test is not about how Python starts and
    ends, `fork_script` does.
    """
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=os.environ | OFFLINE | environment, **pipes)


def finished(script: "subprocess.Popen | Forked") -> subprocess.CompletedProcess:
    """The same when it has ended."""
    try:
        out, err = script.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        script.kill()
        raise
    return subprocess.CompletedProcess(script.args, script.returncode, out, err)


def run_script(script: str, *args: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return finished(start_script(script, *args, cwd=cwd, **environment))


def run_code(code: str) -> subprocess.CompletedProcess:
    """Code in a Python of its own, in the project's folder."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


class Forked:
    """A Popen, as far as tests need one, of a process that is forked: by a server that has imported both scripts, or
    by this process.
    """

    def __init__(
        self,
        args: list[str],
        environment: dict[str, str],
        cwd: Path | str = ".",
        *,
        output: tempfile.TemporaryDirectory | None = None,
        method: str = "forkserver",
    ):
        context = multiprocessing.get_context(method)
        self.args, self.output = args, output  # a folder for what is printed, else it goes where this process's goes
        run = args, environment, os.path.abspath(cwd), output and output.name
        self.process = context.Process(target=run_as_main, args=run)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return tuple(Path(self.output.name, stream).read_text() for stream in ("out", "err"))


def start_server() -> None:
    """Have the server import what it needs, unless it is running."""
    forkserver.set_forkserver_preload(["pytest", "train", "predict", "torch.distributed.run", "processes"])
    with pytest.MonkeyPatch.context() as patch:
        # Python 3.11 does not hand over its own.
        patch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
        forkserver.ensure_running()


def fork_script(script: str, *args: object, cwd: Path = ROOT, **environment: str) -> Forked:
    """`start_script`, without the import of torch. Also of code instead of a script."""
    start_server()
    path = [str(ROOT / script)] if script.endswith(".py") else [script]
    command = [*path, *map(str, args)]
    return Forked(command, os.environ | OFFLINE | environment, cwd, output=tempfile.TemporaryDirectory())


def run_forked(script: str, *args: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return finished(fork_script(script, *args, cwd=cwd, **environment))


def run_as_main(args: list[str], environment: dict[str, str], cwd: str, output: str | None) -> None:
    """In a forked process: be a script in its own session, or code, with these arguments."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for stream, name in enumerate((os.devnull, f"{output}/out", f"{output}/err") if output else ()):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), stream)
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, handler)  # not those of the process that it is forked from
    multiprocessing.set_start_method(None, force=True)
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.argv = args
    if not args[0].endswith(".py"):
        exec(compile(args[0], "<string>", "exec"), {"__name__": "__main__"})
        return
    sys.path.insert(0, os.path.dirname(os.path.abspath(args[0])))
    runpy.run_path(args[0], run_name="__main__")


# Ranks


class Rank(Forked):
    """What torchrun starts for each rank."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str], **_: object):
        _python, _unbuffered, *command = args
        super().__init__(command, env, method="fork")


TORCHRUN = """
import sys
from processes import Rank
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
subprocess_handler.Popen = Rank
run.main(sys.argv[1:])
"""


def torchrun(script: str, *args: object, ranks: int = 2, restarts: int = 0) -> subprocess.CompletedProcess:
    """torchrun in the working directory, whose ranks are forked from it."""
    options = "--standalone", "--nproc-per-node", ranks, "--max-restarts", restarts
    # As README says: without the last one a restarted rank may get a dead one's address.
    environment = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return run_forked(TORCHRUN, *options, script, *args, cwd=Path.cwd(), **environment)
