"""Finding a base: names, downloads, unsafe files, fingerprints."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from lora_booth.config.settings import BASE_ALIASES, ModelConfig
from lora_booth.errors import ConfigError, ModelError
from lora_booth.models.bases import sources
from lora_booth.models.bases.identify import identify

http_client = importlib.import_module(hub_errors.HTTPError.__module__.partition(".")[0])
"""httpx or httpx2, whichever this version of huggingface_hub is built on."""


def header_bytes(shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file of zeros."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = 4
        for side in shape:
            size *= side
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(({"__metadata__": metadata} if metadata else {}) | entries).encode()
    return len(header).to_bytes(8, "little") + header + bytes(end)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A diffusers folder as far as finding is concerned."""
    base = tmp_path / "base"
    for name in sources.weighted():
        stem = sources.weight_stem(name)
        if name != "text_encoder_2":
            (base / name).mkdir(parents=True)
            (base / name / f"{stem}.safetensors").write_bytes(header_bytes({"w": (2, 3)}))
            (base / name / "config.json").write_text("{}")
    (base / "model_index.json").write_text("{}")
    return base


def resolve(base: object, **settings: object) -> Path:
    return sources.resolve(ModelConfig(base=str(base), **settings)).path


def test_a_folder_and_a_file_are_found_where_they_are(folder: Path) -> None:
    checkpoint = folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert resolve(folder) == folder
    assert resolve(checkpoint) == checkpoint
    assert sources.read_header(checkpoint) == ({"w": (2, 3)}, {})


def test_a_missing_path_is_told_with_its_neighbours(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"no file or folder here \(nearest: .*base\)"):
        resolve(folder.parent / "bsae")
    with pytest.raises(ModelError, match="nearest: sdxl"):
        resolve("sdxll")


def test_a_local_base_takes_no_revision(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.revision"):
        resolve(folder, revision="main")


@pytest.mark.parametrize("suffix", sources.PICKLES)
def test_pickle_files_are_refused_with_the_reason(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ModelError, match="can run any program"):
        resolve(path)


def test_a_folder_with_pickled_weights_only_is_refused(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match="can run any program"):
        sources.weight_files(folder)


def test_a_folder_without_an_index_says_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "v1.safetensors").write_bytes(header_bytes({"w": (1,)}))
    with pytest.raises(ModelError, match=r"model\.base = .*v1\.safetensors"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (header_bytes({"w": (64,)})[:-1], "download it again"),
        ((2**62).to_bytes(8, "little") + b"{}", "cut off"),
        (b"", "cut off"),
        ((4).to_bytes(8, "little") + b"[][]", "broken"),
        ((2).to_bytes(8, "little") + b"[]", "broken"),
    ],
)
def test_broken_weight_files_are_told_apart(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=reason):
        sources.read_header(path)


def shard(folder: Path, name: str) -> Path:
    """Make the unet sharded, with one shard called `name`."""
    unet = folder / "unet"
    whole = unet / "diffusion_pytorch_model.safetensors"
    first = unet / "diffusion_pytorch_model-00001-of-00002.safetensors"
    if whole.exists():
        whole.rename(first)
    index = {"weight_map": {"a": first.name, "b": name}}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return unet


def test_shards_are_found_through_their_index(folder: Path) -> None:
    first, second = (f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2))
    unet = shard(folder, second)
    with pytest.raises(ModelError, match="is missing"):
        sources.component_weights(unet)
    (unet / second).write_bytes(header_bytes({"b": (1,)}))
    assert [path.name for path in sources.component_weights(unet).files] == [first, second]


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", ".."])
def test_an_index_cannot_name_files_elsewhere(folder: Path, name: str) -> None:
    (folder.parent / "outside.safetensors").write_bytes(header_bytes({"b": (1,)}))
    with pytest.raises(ModelError, match="files beside it are read"):
        sources.component_weights(shard(folder, name))


def test_a_shard_may_not_link_out_of_the_base_but_within_the_hub_cache(folder: Path) -> None:
    unet = shard(folder, "b.safetensors")
    outside = folder.parent.parent / "outside.safetensors"
    outside.write_bytes(header_bytes({"b": (1,)}))
    (unet / "b.safetensors").symlink_to(outside)
    with pytest.raises(ModelError, match="leads out of the base"):
        sources.component_weights(unet)
    snapshot = folder.parent / "models--a--b" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    shutil.move(folder, snapshot)
    (snapshot / "unet" / "b.safetensors").unlink()
    blob = snapshot.parent.parent / "blobs" / "abc"
    blob.parent.mkdir()
    shutil.move(outside, blob)
    (snapshot / "unet" / "b.safetensors").symlink_to(blob)
    assert len(sources.component_weights(snapshot / "unet").files) == 2


def test_full_precision_is_read_before_fp16(folder: Path) -> None:
    unet = folder / "unet"
    shutil.copy(unet / "diffusion_pytorch_model.safetensors", unet / "diffusion_pytorch_model.fp16.safetensors")
    assert sources.component_weights(unet).variant is None
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    assert sources.component_weights(unet).variant == "fp16"


def test_fingerprint_knows_the_content_and_not_the_place(folder: Path) -> None:
    before = sources.fingerprint(folder)
    copy = folder.parent / "copy"
    shutil.copytree(folder, copy)
    assert sources.fingerprint(copy) == before
    (copy / "vae" / "config.json").write_text('{"scaling_factor": 1}')
    assert sources.fingerprint(copy) != before
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(header_bytes({"w": (2, 3)})[:-1] + b"\x01")
    assert sources.fingerprint(folder) != before


def test_fingerprint_of_a_file_does_not_know_its_name(tmp_path: Path) -> None:
    for name, last in (("a", b"\x00"), ("b", b"\x00"), ("c", b"\x01")):
        (tmp_path / f"{name}.safetensors").write_bytes(header_bytes({"w": (2,)})[:-1] + last)
    a, b, c = (sources.fingerprint(tmp_path / f"{name}.safetensors") for name in "abc")
    assert a == b != c


def test_fingerprint_of_a_large_file_samples_its_ends_and_middle(tmp_path: Path) -> None:
    path, size = tmp_path / "x.safetensors", 6 * 2**30
    path.write_bytes(header_bytes({}))
    os.truncate(path, size)  # sparse: takes no room
    start = time.process_time()
    seen = {sources.fingerprint(path)}
    assert time.process_time() - start < 1.0, "a base of 6 GiB must not be read whole"
    block = sources.BLOCK_BYTES
    for offset in (size - 1, (size - block) // 63 * 31 + block // 2):
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"\x07")
        seen.add(sources.fingerprint(path))
    assert len(seen) == 3


HUB_FILES = [
    "README.md",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "safety_checker/model.safetensors",
    "safety_checker/config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/evil.py",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


class Hub:
    """Stands in for the hub: answers with `files`, or raises `error`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.files, self.error, self.is_cached, self.asked = HUB_FILES, None, False, []
        self.folder = folder
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=self.model_info))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, repository: str, *, revision: str | None) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        return SimpleNamespace(sha="c0ffee", siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def snapshot_download(self, repository: str, **settings: object) -> str:
        self.asked.append((repository, settings))
        if settings.get("local_files_only") and not self.is_cached:
            raise hub_errors.LocalEntryNotFoundError("not cached")
        return str(self.folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    return Hub(monkeypatch, tmp_path)


def http(kind: type[Exception], status: int) -> Exception:
    return kind("no", response=http_client.Response(status, request=http_client.Request("GET", "https://hub")))


def test_only_safe_and_needed_files_are_downloaded(hub: Hub) -> None:
    assert resolve("owner/name", revision="main") == hub.folder
    (repository, settings), *_ = hub.asked
    assert (repository, settings["revision"]) == ("owner/name", "c0ffee")
    wanted = set(settings["allow_patterns"])
    assert wanted == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_without_weights_only_the_small_files_are_downloaded_and_of_an_alias_nothing(hub: Hub) -> None:
    config = ModelConfig(base="owner/name")
    assert sources.resolve(config, needs_weights=False).path == hub.folder
    ((_, settings),) = hub.asked
    assert "unet/config.json" in settings["allow_patterns"]
    assert not any(name.endswith(".safetensors") for name in settings["allow_patterns"])
    for alias, architecture in sources.SHIPPED.items():
        path = sources.resolve(ModelConfig(base=alias), needs_weights=False).path
        assert path == sources.SHIPPED_CONFIGS / architecture
        assert identify(path, has_weights=False).family == architecture.partition("_")[0]
    assert len(hub.asked) == 1
    sources.resolve(ModelConfig(base="sdxl", revision="v1"), needs_weights=False)  # which may not be what ships
    assert len(hub.asked) == 2


def test_fp32_downloads_full_precision(hub: Hub) -> None:
    resolve("owner/name", precision="fp32")
    wanted = hub.asked[0][1]["allow_patterns"]
    assert "unet/diffusion_pytorch_model.safetensors" in wanted
    assert not any("fp16" in name for name in wanted)


def test_a_repository_with_pickles_only_is_not_downloaded(hub: Hub) -> None:
    hub.files = [name for name in HUB_FILES if not name.startswith("unet/diff") or name.endswith(".bin")]
    with pytest.raises(ModelError, match="can run any program"):
        resolve("owner/name")
    assert not hub.asked


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (http(hub_errors.GatedRepoError, 403), "hf auth login"),
        (http(hub_errors.RepositoryNotFoundError, 404), "check the spelling"),
        (http(hub_errors.RevisionNotFoundError, 404), r"model\.revision 'v9' does not exist"),
        (http(hub_errors.HfHubHTTPError, 503), "go online once"),
        (http_client.ConnectError("no route"), "go online once"),
        (hub_errors.OfflineModeIsEnabled("HF_HUB_OFFLINE"), "unset HF_HUB_OFFLINE"),
    ],
)
def test_what_goes_wrong_on_the_hub_is_told_with_advice(hub: Hub, error: Exception, advice: str) -> None:
    hub.error = error
    with pytest.raises(ModelError, match=advice):
        resolve("owner/name", revision="v9")


def test_without_a_network_the_downloaded_copy_is_used(hub: Hub) -> None:
    hub.error, hub.is_cached = http_client.ConnectError("no route"), True
    assert resolve("sdxl") == hub.folder
    repository, settings = hub.asked[-1]
    assert (repository,) == BASE_ALIASES["sdxl"]
    assert settings["local_files_only"]


def test_facts_about_a_base_need_no_torch() -> None:
    code = "import sys, lora_booth.models.loading; sys.exit(any(m in sys.modules for m in ('torch', 'diffusers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_an_alias_is_looked_for_in_each_of_its_homes_in_turn(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = BASE_ALIASES["sd21"]
    honest, gone = hub.model_info, http(hub_errors.RepositoryNotFoundError, 404)

    def model_info(repository: str, *, revision: str | None) -> SimpleNamespace:
        hub.error = gone if repository == first else None
        return honest(repository, revision=revision)

    monkeypatch.setattr(hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    found = sources.resolve(ModelConfig(base="sd21"))
    assert (found.repository, found.revision) == (second, "c0ffee")
    hub.is_cached = True  # who has downloaded the first home before it was deleted keeps it
    assert sources.resolve(ModelConfig(base="sd21")).repository == first


def test_what_no_home_has_is_told_for_each(hub: Hub) -> None:
    hub.error = http(hub_errors.RepositoryNotFoundError, 404)
    with pytest.raises(ModelError) as caught:
        resolve("sd21")
    assert all(home in str(caught.value) for home in BASE_ALIASES["sd21"])


def test_a_pinned_commit_is_taken_from_the_home_that_served_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    honest = hub.model_info
    monkeypatch.setattr(
        hub, "model_info", lambda name, revision: asked.append((name, revision)) or honest(name, revision=revision)
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    _, second = BASE_ALIASES["sd21"]
    sources.resolve(ModelConfig(base="sd21"), pinned=sources.Found(Path(), second, "abc"))
    sources.resolve(ModelConfig(base="owner/other"), pinned=sources.Found(Path(), second, "abc"))  # of another base
    assert asked == [(second, "abc"), ("owner/other", None)]
