"""Decoding in a process of its own, bounded in time and memory.

A hostile picture costs seconds, never the run.

What lives here: that process, how it is asked, and what it does with one file. What does not: formats and colours
(`decode.py`). A decoder that hangs, crashes or asks for too much makes its file unusable, and the next question gets a
new process. The two talk in lines of JSON, followed by the pixels; nothing is pickled.

Memory is bounded twice: Linux grants no more address space; everywhere this process looks at what the other holds, many
times a second, so on Windows and macOS a decoder may have more for a moment before it is ended.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_booth.data.decode import (
    MAX_FILE_BYTES,
    Unusable,
    file_bytes,
    missing_share,
    opened,
    orientation,
    upright_alpha,
    upright_rgb,
)
from lora_booth.data.duplicates import Look, look
from lora_booth.errors import DataError
from lora_booth.run import systems

MIN_MISSING_SHARE = 0.1
"""Of a picture's rows, from which on it is told; less may be a grey that somebody painted."""
MAX_SECONDS = 30.0
"""For one file. The largest allowed photograph takes about 2 s; a JPEG can be made that takes hours."""
MAX_BYTES = 4 * 2**30
"""Memory of the process. 178 megapixels, the most that Pillow opens, need about 2.5 GiB at once."""
LOOK_SECONDS = 0.05
"""Between two looks at the process; filling 4 GiB takes about a second."""
SAVE_AGAIN = "save it again with another program, or remove it."

_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from lora_booth.data.worker import _serve
_serve(int(sys.argv[2]))
"""

Inspected = tuple[str, tuple[int, int], Look, list[str]]
"""sha256 of the file, upright width and height in pixels, look, remarks."""


def inspect(path: Path, max_megapixels: float) -> Inspected:
    """What `find` wants to know of a picture, which is decoded once to prove that it can be. Raises Unusable."""
    answer, pixels = _decoder.ask(work="inspect", path=os.path.abspath(path), max_megapixels=max_megapixels)
    seen = np.frombuffer(pixels, dtype=np.uint8).reshape(9, 9, 3)
    return answer["sha256"], (answer["width"], answer["height"]), seen, answer["notes"]


def decode(path: Path, sha256: str | None) -> Image.Image:
    """The whole picture, upright RGB. Raises Unusable, also when the file's bytes do not have `sha256`."""
    answer, pixels = _decoder.ask(work="decode", path=os.path.abspath(path), sha256=sha256)
    return Image.frombytes("RGB", (answer["width"], answer["height"]), pixels)


def has_alpha(path: Path, sha256: str) -> bool:
    """Whether a picture is transparent anywhere. Raises Unusable as `decode` does."""
    return bool(_decoder.ask(work="alpha", path=os.path.abspath(path), sha256=sha256)[1])


def alpha(path: Path, sha256: str) -> Image.Image:
    """How opaque each pixel of a picture that is transparent somewhere is, upright, mode L. Raises Unusable."""
    answer, pixels = _decoder.ask(work="alpha", path=os.path.abspath(path), sha256=sha256)
    if not pixels:
        raise Unusable("is transparent nowhere; run the same command again.")
    return Image.frombytes("L", (answer["width"], answer["height"]), pixels)


class _Decoder:
    """The process, begun when it is first asked, and again when it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._one_at_a_time = threading.Lock()

    def ask(self, **question: Any) -> tuple[dict[str, Any], bytes]:
        """Answer and pixels. Raises Unusable, also when the process dies of the question or takes too long."""
        with self._one_at_a_time:
            process = self._running()
            with _watched(process) as ended_for:
                answered = _exchange(process, question)
            if answered is None or ended_for:
                self.end()
        if answered is None:
            crash = f"crashes its decoder ({process.returncode}); {SAVE_AGAIN}"
            raise Unusable(ended_for[0] if ended_for else crash)
        if "unusable" in answered[0]:
            raise Unusable(answered[0]["unusable"])
        return answered

    def end(self) -> None:
        """Kill the process, unless it belongs to a parent of this one."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _START, json.dumps(sys.path), str(MAX_BYTES)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # its threads would use up the address space
                    **systems.apart(),  # Ctrl-C in the terminal asks the run to stop, not its decoder
                )
            except OSError as error:
                raise DataError(
                    f"no process that decodes pictures can be started ({error.strerror}); {systems.limits_advice()}."
                ) from error
            self._owner = os.getpid()
        return self._process


_decoder = _Decoder()
atexit.register(_decoder.end)


@contextmanager
def _watched(process: subprocess.Popen[bytes]) -> Iterator[list[str]]:
    """Inside, `process` is ended when it takes more than its time or memory; the list then holds why."""
    answered, ended_for = threading.Event(), list[str]()
    late = time.monotonic() + MAX_SECONDS

    def watch() -> None:
        while not ended_for and not answered.wait(LOOK_SECONDS):
            if systems.memory_bytes(process.pid) > MAX_BYTES:
                ended_for.append(_too_much(MAX_BYTES))
            elif time.monotonic() >= late:
                ended_for.append(f"takes longer than {MAX_SECONDS:g} s to decode; {SAVE_AGAIN}")
        if ended_for:
            process.kill()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield ended_for
    finally:
        answered.set()
        watcher.join()


def _too_much(max_bytes: int) -> str:
    return f"needs more than {max_bytes / 2**30:.2g} GiB to decode; save it smaller, or remove it."


def _exchange(process: subprocess.Popen[bytes], question: dict[str, Any]) -> tuple[dict[str, Any], bytes] | None:
    """Answer and pixels; None when the process ended before it had answered."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(question).encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            return None
        answer = json.loads(line)
        pixels = process.stdout.read(answer["bytes"])
    except OSError:
        return None
    return (answer, pixels) if len(pixels) == answer["bytes"] else None


def _serve(max_bytes: int) -> None:
    """The process: answer questions until nobody asks any more, or hears the answer."""
    systems.bound_own_memory(max_bytes)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for line in sys.stdin.buffer:
            _answer(json.loads(line), max_bytes)
    except OSError:
        os._exit(0)  # whoever asked was killed; Python would complain of what it cannot write at its end


def _answer(question: dict[str, Any], max_bytes: int) -> None:
    """Work, and write what was found to standard output."""
    path = Path(question["path"])
    try:
        if question["work"] == "inspect":
            answer, pixels = _inspect(path, question["max_megapixels"])
        else:
            answer, pixels = _decode(path, question["sha256"], is_alpha=question["work"] == "alpha")
    except Unusable as fault:
        answer, pixels = {"unusable": str(fault)}, b""
    except MemoryError:
        answer, pixels = {"unusable": _too_much(max_bytes)}, b""
    sys.stdout.buffer.write(json.dumps(answer | {"bytes": len(pixels)}).encode() + b"\n" + pixels)
    sys.stdout.buffer.flush()


def _inspect(path: Path, max_megapixels: float) -> tuple[dict[str, Any], bytes]:
    data = file_bytes(path, MAX_FILE_BYTES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = opened(data, path)
        width, height = image.size
        image_size = f"{width}×{height}"
        if width * height > max_megapixels * 1e6:
            raise Unusable(
                f"has {width * height / 1e6:.1f} megapixels ({width}×{height}), above the limit of {max_megapixels:g}; "
                "save it smaller, or raise data.max_megapixels."
            )
        is_animated = image.format != "MPO" and getattr(image, "is_animated", False)
        image.draft(None, (64, 64))
        upright = upright_rgb(image)
        missing = missing_share(image)
        if orientation(image) >= 5:
            width, height = height, width
    notes = ["is animated; its first frame is used."] if is_animated else []
    if missing >= MIN_MISSING_SHARE:
        told = f"{missing:.0%} of the {image_size} pixels that its header names"
        notes.append(f"ends early: {told} are missing and would be trained on as grey; copy it again, or remove it.")
    said = {str(w.message).strip(" .") for w in caught if not issubclass(w.category, Image.DecompressionBombWarning)}
    notes += [
        f"is used, but its file is not quite right ({words}); save it again to be sure." for words in sorted(said)
    ]
    digest = hashlib.sha256(data).hexdigest()
    return {"sha256": digest, "width": width, "height": height, "notes": notes}, look(upright).tobytes()


def _decode(path: Path, sha256: str | None, *, is_alpha: bool) -> tuple[dict[str, Any], bytes]:
    data = file_bytes(path, MAX_FILE_BYTES)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise Unusable("has changed since this run looked at it; run the same command again.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `inspect` has told them.
        image = opened(data, path)
        upright = upright_alpha(image) if is_alpha else upright_rgb(image)
    if upright is None:
        return {}, b""
    return {"width": upright.width, "height": upright.height}, upright.tobytes()
