# SPDX-License-Identifier: Apache-2.0
"""The demo under load: cold start, the slider, 16 users at once, and memory over 500 requests.

    python -m benchmarks.demo_load                                          # minutes on two cores
    python -m benchmarks.demo_load --requests 500 --users 16 --out benchmarks/results/demo-cpu.json

Starts ``vtprune demo`` as a process of its own and talks to it as browsers do. Every user asks about pictures of their
own and checks that the answer, and the redrawn selection, are of these. Memory is the resident set of the server.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from vtprune.demo import scenes
from vtprune.eval.runner import current_commit as commit

MODEL, METHOD, KEEP = "pocket-llava", "norm", 25


class Server:
    """``vtprune demo``, and how long it took until it was there."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vtprune", "demo"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        line = next((line for line in self.process.stdout if "http://" in line), "")
        if not line:
            raise SystemExit("the demo did not start")
        self.url = re.search(r"http://\S+", line)[0]  # type: ignore[index]
        self.seconds = time.perf_counter() - self.begun

    def mib(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 2**20


def ask(user: Any, path: Path, question: str) -> str:
    """The dense answer, after a check that the slider redraws what this user asked about."""
    from gradio_client import handle_file

    answers, overlay = user.predict(handle_file(str(path)), question, MODEL, METHOD, KEEP, api_name="/ask")
    if "keeps 144 of 576" not in overlay:
        raise SystemExit(f"the overlay is not that of the request: {overlay[:200]}")
    found = re.search(r'vt-answer">(.*?)<', answers)
    return found[1].strip() if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    from gradio_client import Client

    folder = Path(tempfile.mkdtemp())
    pictures = []
    for i in range(64):
        scene = scenes.draw("basic", 1000 + i)
        question = next(q for q in scene.answers if q.startswith(("what", "how", "where")))
        scene.picture.save(folder / f"{i}.png")
        pictures.append((folder / f"{i}.png", question, scene.answers[question]))

    server = Server()
    try:
        user = Client(server.url, verbose=False)
        ask(user, *pictures[0][:2])
        first_answer = time.perf_counter() - server.begun
        waits = []
        for percent in range(10, 60):
            begun = time.perf_counter()
            user.predict(METHOD, percent, api_name="/redraw")
            waits.append(1000 * (time.perf_counter() - begun))

        memory, wrong, done, lock = [], 0, 0, threading.Lock()

        def use(number: int) -> None:
            nonlocal wrong, done
            session = Client(server.url, verbose=False)
            for i in range(given.requests // given.users):
                path, question, known = pictures[(7 * number + i) % len(pictures)]
                said = ask(session, path, question)
                with lock:
                    wrong += said != known
                    done += 1
                    if done % 50 == 0:
                        memory.append((done, round(server.mib(), 1)))
                        print(
                            f"{done} requests, {memory[-1][1]} MiB, {wrong} answers are not the known one", flush=True
                        )

        threads = [threading.Thread(target=use, args=(i,)) for i in range(given.users)]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begun
    finally:
        server.process.terminate()
    result = {
        "commit": commit(),
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores",
        "load_before": [round(x, 2) for x in psutil.getloadavg()],
        "server_up_s": round(server.seconds, 1),
        "first_answer_s": round(first_answer, 1),
        "redraw_ms_median": round(statistics.median(waits), 1),
        "redraw_ms_p90": round(sorted(waits)[int(0.9 * len(waits))], 1),
        "users": given.users,
        "requests": done,
        "requests_per_s": round(done / seconds, 2),
        "not_the_known_answer": wrong,
        "server_mib": memory,
    }
    print(json.dumps(result))
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
