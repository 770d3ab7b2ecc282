"""The parts of `make stream-demo`: coins in a watched folder, the server's score, the table, and processes that end."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from deepskip.data_shards.sources.coins import coins
from deepskip.jobs import stream_demo
from deepskip.jobs.stream_demo import Answer, Client, DemoError, Processes, Score
from tests.jobs.growing import ROOT, wait_for


def test_coins_appear_whole_and_by_name(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    stream_demo.put(tmp_path, coins("train", 3, seed=1))
    for key, image, mask in coins("train", 3, seed=1):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "images" / f"{key}.png")), image)
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "masks" / f"{key}.png")), mask)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "masks"]


def test_a_request_has_the_iou_of_the_mask_that_came_back_and_a_lost_one_is_counted() -> None:
    mask = np.zeros((8, 8), bool)
    mask[:4] = True
    answer = np.zeros((8, 8), np.uint8)
    answer[2:6] = 255
    body, statuses = io.BytesIO(), [200, 500]
    Image.fromarray(answer).save(body, "png")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(statuses.pop(0))
            self.send_header("DeepSkip-Model", "ab" * 32)
            self.end_headers()
            self.wfile.write(body.getvalue())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client, ended = Client(server.server_port, b"image", mask), threading.Event()
        thread = threading.Thread(target=client.send, args=(lambda: True, ended))
        thread.start()
        wait_for(lambda: client.lost)
        ended.set()
        thread.join()
        server.shutdown()
    assert [(each.model, each.iou) for each in client.answers] == [("ab" * 32, 16 / 48)]
    assert "500" in client.lost[0]


def test_the_table_pairs_a_generation_with_the_answer_after_it_was_trained_on(tmp_path: Path) -> None:
    lines = [
        ["train", 8, {"loss": 1.0}, 900],
        ["stream", 8, {"generation": 1, "samples": 64, "iou": 0.25}, 1000],
        ["stream", 12, {"samples_behind": 32}, 1500],
        ["stream", 24, {"generation": 2, "samples": 64, "iou": 0.5}, 2000],
    ]
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "metrics.jsonl").write_text(text + '\n["stream", 40, {"gener')
    measured = stream_demo.scores(tmp_path)
    assert measured == [Score(1, 0.25, 1.0), Score(2, 0.5, 2.0)]
    assert stream_demo.scores(tmp_path, 2) == measured[1:]
    answers = [Answer("a" * 64, 0.1, 0.5), Answer("b" * 64, 0.3, 1.9), Answer("c" * 64, 0.6, 2.5)]
    rows = [line.split() for line in stream_demo.table(measured, answers)[1:]]
    assert rows == [["1", "0.250", "bbbbbbbb", "0.300"], ["2", "0.500", "cccccccc", "0.600"]]
    assert stream_demo.table(measured[:1], [])[1].split() == ["1", "0.250"]


def test_a_process_that_ends_early_is_an_error(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    (tmp_path / "train.log").write_text("step 8\nerror: the disk is full\n")
    processes.running["train"] = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(DemoError, match=r"train ended with status 3: error: the disk is full; see .*train\.log"):
        processes.wait_for(lambda: False, "nothing")


def test_an_interrupt_ends_everything(tmp_path: Path) -> None:
    """Interrupt the demonstration while it packs or waits for a first model, in whichever place it is then."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "deepskip.jobs.stream_demo", "--out", str(tmp_path / "demo")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path / "demo" / "pack.log").exists)
    time.sleep(0.2)
    own = psutil.Process(process.pid).children(recursive=True)
    assert own
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)
    assert (process.returncode, said[1]) == (130, "stopped\n")
    assert not [each for each in own if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
