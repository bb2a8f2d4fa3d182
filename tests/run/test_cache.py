"""Keys with every ingredient, files that are whole or refused, two processes, a full disk."""

from __future__ import annotations

import errno
import hashlib
import itertools
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lora_booth.data.buckets import Bucket, Crop
from lora_booth.errors import DiskError, NumericError
from lora_booth.run.cache import TensorCache, key, require_finite
from lora_booth.run.cache_folder import digest_and_words
from lora_booth.training import cache_keys
from lora_booth.training.cache_keys import latent_key, prompt_key

CROP = Crop(Bucket(512, 448), 1000, 900, 512, 461, 1, 6)
TENSORS = {
    "mean": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4),
    "std": torch.linspace(0, 1, 5).to(torch.bfloat16),
    "half": torch.tensor(0.5, dtype=torch.float16),
    "none": torch.zeros(0, 4),
}
PARTS = st.lists(
    st.text(max_size=3) | st.integers(-9, 9) | st.booleans() | st.floats(-2, 2, allow_nan=False, width=16), max_size=3
)


def same(one: dict[str, torch.Tensor] | None, other: dict[str, torch.Tensor]) -> bool:
    return (
        one is not None
        and one.keys() == other.keys()
        and all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in other)
    )


def test_keys_are_hex_digests_and_stay_the_same_between_releases() -> None:
    assert key("a", 1) == hashlib.sha256(b'["a", 1]').hexdigest()


def test_splitting_or_typing_parts_differently_changes_the_key() -> None:
    parts = [("ab", "c"), ("a", "bc"), ("abc",), ("a,b", "c"), (1,), ("1",), (True,), (1.0,), (), ("",), ("", "")]
    assert len({key(*p) for p in parts}) == len(parts) == 11


@settings(max_examples=60, deadline=None)
@given(PARTS, PARTS)
def test_keys_are_equal_only_for_equal_parts(one: list[str | int], other: list[str | int]) -> None:
    typed = [[(type(p), repr(p)) for p in parts] for parts in (one, other)]
    assert (key(*one) == key(*other)) == (typed[0] == typed[1])


def test_a_key_of_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        key(float("nan"))


def test_every_ingredient_of_latents_is_in_their_key(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"fingerprint": "f", "picture_sha256": "p", "crop": CROP, "is_flipped": False}
    changes: list[dict[str, object]] = [{}, {"fingerprint": "g"}, {"picture_sha256": "q"}]
    changes += [{"is_flipped": True}, {"crop": replace(CROP, bucket=Bucket(512, 449))}]
    changes += [{"crop": replace(CROP, bucket=Bucket(513, 448))}]
    numbers = [f for f in CROP.__dataclass_fields__ if f != "bucket"]
    changes += [{"crop": replace(CROP, **{name: getattr(CROP, name) + 1})} for name in numbers]
    assert len(changes) == 12
    found = {latent_key(**(base | change)) for change in changes}  # type: ignore[arg-type]
    assert len(found) == len(changes)
    monkeypatch.setattr(cache_keys, "LATENTS_VERSION", 999)
    assert latent_key(**base) not in found  # type: ignore[arg-type]


def test_every_ingredient_of_conditioning_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        prompt_key(fingerprint, prompt, dtype=dtype)
        for fingerprint, prompt, dtype in itertools.product("fg", ["a dog", "a dog "], [torch.float16, torch.bfloat16])
    }
    assert len(found) == 8
    monkeypatch.setattr(cache_keys, "PROMPT_VERSION", 999)
    assert prompt_key("f", "a dog", dtype=torch.float16) not in found


def test_what_is_put_comes_back_bit_for_bit(tmp_path: Path) -> None:
    store = TensorCache(tmp_path / "not" / "there yet", {"base": "sd15", "picture": "dög.jpg"})
    assert store.get("k") is None
    store.put("k", TENSORS)
    assert same(store.get("k"), TENSORS)
    assert store.damaged == []
    with safe_open(store.path("k"), framework="pt") as file:
        assert digest_and_words(file.metadata())[1] == {"base": "sd15", "picture": "dög.jpg"}
    before = store.path("k").read_bytes()
    for _ in range(5):
        store.put("k", TENSORS)
        assert store.path("k").read_bytes() == before


def test_a_strided_tensor_with_gradients_is_stored_by_value(tmp_path: Path) -> None:
    source = torch.arange(6.0).reshape(2, 3).requires_grad_()
    TensorCache(tmp_path).put("k", {"t": source.T})
    assert same(TensorCache(tmp_path).get("k"), {"t": source.detach().T})


def test_putting_again_replaces_and_leaves_no_other_file(tmp_path: Path) -> None:
    store = TensorCache(tmp_path)
    store.put("k", TENSORS)
    store.put("k", {"t": torch.ones(1)})
    assert same(store.get("k"), {"t": torch.ones(1)})
    assert [p.name for p in tmp_path.iterdir()] == ["k.safetensors"]


def test_every_flipped_bit_and_every_cut_is_detected_named_and_mended(tmp_path: Path) -> None:
    store = TensorCache(tmp_path, {"from": "a"})
    store.put("k", {"mean": torch.arange(4.0)})
    whole = store.path("k").read_bytes()
    damaged = [whole[:n] for n in range(0, len(whole), 3)] + [whole + b"\0"]
    damaged += [whole[:i] + bytes([whole[i] ^ (1 << (i % 8))]) + whole[i + 1 :] for i in range(len(whole))]
    assert len(damaged) > 250
    for data in damaged:
        store.path("k").write_bytes(data)
        assert store.get("k") is None
    assert store.damaged == [store.path("k")] * len(damaged)
    store.put("k", {"mean": torch.zeros(1)})
    assert same(store.get("k"), {"mean": torch.zeros(1)})


def test_what_is_no_file_is_never_read_and_replaced(tmp_path: Path) -> None:
    store = TensorCache(tmp_path)
    for make in (os.mkfifo, lambda at: at.symlink_to("/dev/zero"), lambda at: at.write_bytes(b"")):
        path = store.path("a")
        path.unlink(missing_ok=True)
        make(path)
        if path.is_file() and not path.is_symlink():
            os.truncate(path, 1 << 40)
        store.damaged.clear()
        assert store.get("a") is None and store.damaged == [path]
        store.put("a", TENSORS)
        assert same(store.get("a"), TENSORS)


def test_a_file_under_a_wrong_key_is_refused(tmp_path: Path) -> None:
    store = TensorCache(tmp_path)
    store.put("dog1", TENSORS)
    os.rename(store.path("dog1"), store.path("dog2"))
    assert store.get("dog2") is None
    assert store.damaged == [store.path("dog2")]


def test_a_header_with_another_shape_is_refused(tmp_path: Path) -> None:
    store = TensorCache(tmp_path)
    store.put("k", {"mean": torch.zeros(2, 3)})
    whole = store.path("k").read_bytes()
    assert whole.count(b"[2,3]") == 1
    store.path("k").write_bytes(whole.replace(b"[2,3]", b"[3,2]"))
    assert store.get("k") is None


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    store = TensorCache(tmp_path)
    save_file({"mean": torch.ones(3)}, store.path("k"))
    assert store.get("k") is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_path_and_the_bytes_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = TensorCache(tmp_path)
    store.put("k", {"t": torch.ones(1)})

    def full(_: int) -> None:
        raise OSError(number, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"k\.safetensors: it needs 4\d{3} bytes and \d+ are free"):
        store.put("k", {"t": torch.ones(1000)})
    assert same(store.get("k"), {"t": torch.ones(1)})
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_folder_that_is_a_file_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiskError, match=r"k\.safetensors cannot be written \(File exists\)"):
        TensorCache(tmp_path / "file").put("k", TENSORS)
    with pytest.raises(DiskError, match="cannot read the cache file"):
        TensorCache(tmp_path / "file").get("k")


def test_leftovers_of_killed_writers_go_after_a_day_and_not_before(tmp_path: Path) -> None:
    old, new = tmp_path / ".a.1.tmp", tmp_path / ".b.2.tmp"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (0, 0))
    TensorCache(tmp_path)
    assert list(tmp_path.iterdir()) == [new]


def write_and_read_often(folder: Path, value: float) -> None:
    store = TensorCache(folder)
    for _ in range(60):
        store.put("k", {"t": torch.full((5000,), value)})
        read = store.get("k")
        assert read is not None
        assert bool((read["t"] == read["t"][0]).all()), "a torn file"


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="importing torch twice takes long")
def test_two_processes_may_write_and_read_the_same_key(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_and_read_often, args=(tmp_path, value)) for value in (1.0, 2.0)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["k.safetensors"]


def test_threads_may_write_the_same_key(tmp_path: Path) -> None:
    store = TensorCache(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: store.put("k", TENSORS), range(80)))
    assert same(store.get("k"), TENSORS)


def test_finite_tensors_pass_and_others_name_their_picture() -> None:
    require_finite(TENSORS, "latents of dog1.jpg")
    bad = {"mean": torch.zeros(4), "std": torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])}
    with pytest.raises(NumericError, match=r"latents of dog1\.jpg: 3 of 4 values of std are NaN or infinite"):
        require_finite(bad, "latents of dog1.jpg")


def test_what_an_older_version_stored_without_words_is_good_still(tmp_path: Path) -> None:
    TensorCache(tmp_path).put("k", TENSORS)
    assert same(TensorCache(tmp_path, {"base": "sd15"}).get("k"), TENSORS)
