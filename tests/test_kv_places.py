"""Where keys and values lie: the same numbers from every place, and clear errors where a place cannot be used."""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import shutil
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import answers, as_requests, random_prompts, tiny_engine, words

from bmx.config import EngineConfig
from bmx.engine.memory_meter import MemoryMeter
from bmx.errors import MemoryLimitError, OutputError, UsageError
from bmx.kv import places
from bmx.kv.places import FileMemory, HostMemory, check_place, open_place
from bmx.kv.pool import KVPool, LayerSlots

CPU = torch.device("cpu")
F32 = torch.float32
SETTINGS = (
    {"kv_policy": "none"},
    {"kv_policy": "none", "kv_format": "int4"},
    {"kv_policy": "none", "kv_format": "int2"},
    {"kv_policy": "average-attention", "kv_format": "int8/int4", "kv_budget": 20, "kv_recent": 5, "kv_sink": 3},
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that counts as one on a disk."""
    monkeypatch.setattr(places, "_file_system", lambda _: "ext4")
    return str(tmp_path)


def pools(family, folder, **settings):
    """Pools of two groups, on the device and in a file."""
    engine = tiny_engine(family, **settings)
    layouts = tuple(engine.policy.layout(engine.spec, capacity) for capacity in (33, 70))
    nbytes = sum(count * layout.stored_bytes for count, layout in zip((2, 1), layouts, strict=True))
    place = FileMemory(folder, nbytes, 8 * len(engine.spec.layers))
    return KVPool(layouts, (2, 1), F32, CPU), KVPool(layouts, (2, 1), F32, CPU, place)


def parts_of(pool):
    return [part for group in pool.groups for parts in dict.fromkeys(group) for part in parts]


def fill(part: LayerSlots, seed: int):
    """A chunk and, one by one, more tokens in slot 0."""
    drawn = torch.Generator().manual_seed(seed)
    layout, tokens = part.layout, part.layout.capacity
    key = torch.randn(tokens, layout.kv_heads, layout.key_dim, generator=drawn)
    value = torch.randn(tokens, layout.kv_heads, layout.value_dim, generator=drawn)
    first = tokens // 2
    stats = {name: torch.zeros(layout.kv_heads, first) for name in layout.row_stats}
    part.append(0, 0, key[:first], value[:first], torch.arange(first), stats)
    for position in range(first, tokens):
        at = torch.tensor([position])
        part.write(torch.tensor([0]), at.unsqueeze(1), key[at], value[at], at)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda given: "-".join(map(str, given.values())))
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_pool_in_a_file_holds_what_one_in_memory_does(family, settings, folder):
    """Bit for bit, and with the same pieces for the kernels; the folder stays empty to look at."""
    plain, filed = pools(family, folder, **settings)
    assert os.listdir(folder) == []
    assert filed.nbytes == plain.nbytes
    assert [rows is None for rows in filed.rows] == [rows is None for rows in plain.rows]
    for seed, (one, other) in enumerate(zip(parts_of(plain), parts_of(filed), strict=True)):
        fill(one, seed)
        fill(other, seed)
        for read, expected in zip(other.read(0, one.layout.capacity), one.read(0, one.layout.capacity), strict=True):
            assert torch.equal(read, expected)
    filed.reset(0, 0)
    assert all((part.read(1, 5)[1] == 0).all() for part in parts_of(filed) if part.slots > 1)


def test_the_bytes_on_the_device_and_elsewhere_are_those_of_the_layout():
    engine = tiny_engine("gemma2", kv_policy="none", kv_format="int4")
    for layer in engine.policy.layout(engine.spec, 70).layers:
        part = LayerSlots.allocate(layer, 3, F32, CPU)
        assert 3 * layer.stored_bytes == part.keys.nbytes + part.values.nbytes
        assert 3 * (layer.kv_bytes + layer.score_bytes - layer.stored_bytes) == part.nbytes - (
            part.keys.nbytes + part.values.nbytes
        )


def test_a_file_is_as_large_as_its_tensors_and_goes_with_the_last_of_them(folder, monkeypatch):
    reserved = []
    real = os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, at, size: (reserved.append(size), real(fd, at, size)))
    place = FileMemory(folder, 1000, 2)
    one, other = place.zeros((10, 25), torch.float16), place.zeros((500,), torch.uint8)
    one[:], other[:] = 3, 5
    assert reserved == [1000 + 2 * 64]
    assert ((one == 3).all(), (other == 5).all()) == (True, True)
    mapped = Path("/proc/self/maps").read_text().count(folder)
    del place, one
    gc.collect()
    assert Path("/proc/self/maps").read_text().count(folder) == mapped == 1
    del other
    gc.collect()
    assert folder not in Path("/proc/self/maps").read_text()


# ---- an archive in a place ----

PROMPTS = random_prompts((70, 9, 41, 64, 23), seed=3)


def archiving(place, family="llama", archive="int4", **config):
    config = {"chunk_size": 24, "max_num_batched_tokens": 72, "max_num_seqs": 3} | config
    small = {"kv_budget": 16, "kv_sink": 2, "kv_recent": 5, "kv_archive": archive, "kv_archive_place": place}
    return tiny_engine(family, **small, **config)


def requests():
    return as_requests(PROMPTS, max_tokens=40)


@pytest.mark.parametrize(
    ("family", "archive"), [("llama", "model"), ("gemma2", "int4"), ("llama", "int2"), ("gemma2", "model")]
)
def test_answers_do_not_depend_on_where_the_archive_is(family, archive, folder):
    expected = answers(archiving("device", family, archive), requests())
    assert answers(archiving(folder, family, archive), requests()) == expected
    assert os.listdir(folder) == []


@pytest.mark.parametrize("by", ["attention", "pages", "clusters", "bits"])
def test_pairs_that_are_chosen_are_read_from_a_file_too(by, folder):
    few = {"kv_recall": by, "kv_recall_pairs": 16}
    expected = answers(archiving("device", **few), requests())
    assert answers(archiving(folder, **few), requests()) == expected


@pytest.mark.parametrize("archive", ["model", "int4"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_is_in_the_file_is_planned_apart_and_does_not_count_as_memory(family, archive, folder):
    here, there = (archiving(place, family, archive) for place in ("device", folder))
    plain, filed = (engine.plan(engine.measure(requests())) for engine in (here, there))
    assert plain.memory.file == plain.memory.host == 0
    assert filed.memory.pool + filed.memory.file == plain.memory.pool
    items = asdict(filed.memory)
    assert filed.memory.total == sum(items.values()) - items["file"]
    stored = sum(group.slots * layout.stored_bytes for group, layout in zip(filed.groups, filed.layouts, strict=True))
    assert filed.memory.file == stored
    with there.backend.runner(filed, there.policy) as runner:
        assert runner.kv_bytes == filed.memory.pool
        assert runner.answering.nbytes - runner.answering.device_bytes == filed.memory.file


def test_more_sequences_fit_into_the_same_memory_beside_a_file(folder):
    prompts = as_requests(random_prompts((200,) * 40), max_tokens=40)
    pool = 3 * 10**5
    here, there = (archiving(place, max_num_seqs=40, kv_cache_memory=pool) for place in ("device", folder))
    fewer, more = (engine.plan(engine.measure(prompts)) for engine in (here, there))
    assert more.memory.pool <= pool
    assert more.slots > 1.5 * fewer.slots


def test_pages_of_files_that_are_spared_are_no_memory_of_the_run(folder):
    meter, size = MemoryMeter("cpu", 0), 64 * 10**6
    meter.reset(spares_files=True)
    before, here = meter.peak, meter.now
    tensor = FileMemory(folder, size, 1).zeros((size,), torch.uint8)
    tensor[:] = 1
    assert meter.peak - before < size / 4
    assert meter.now - here < size / 4
    meter.reset()
    assert meter.now - here > size / 2
    meter.reset(spares_files=True)
    held = torch.ones(size, dtype=torch.uint8)
    assert meter.peak - before > size / 2
    assert held.all()


def test_a_run_says_where_the_archive_is_and_how_much_of_it(bmx, model, folder):
    lines = [json.dumps({"id": i, "prompt": words(prompt)}) for i, prompt in enumerate(PROMPTS)]
    Path("in.jsonl").write_text("\n".join(lines))
    Path(folder, "disk").mkdir()
    given = ("-m", model, "--kv-archive", "int4", "--kv-budget", 64, "--max-tokens", 5, "--no-chat-template")
    ended = bmx("run", "in.jsonl", *given, "--kv-archive-place", f"{folder}/disk")
    assert ended.code == 0, ended.err
    assert any(line.startswith("archive: ") and f"in a file in {folder}/disk of" in line for line in ended.log)
    assert any(line.startswith("KV cache") and line.endswith(f"in a file in {folder}/disk") for line in ended.log)
    planned = bmx("plan-batch", "in.jsonl", *given, "--kv-archive-place", f"{folder}/disk")
    assert any(
        line.startswith("archive int4: ") and f"in a file in {folder}/disk" in line for line in planned.out.splitlines()
    )
    plan = json.loads(Path("in.out.jsonl.run.json").read_text())["plan"]
    assert plan["archive_place"] == f"{folder}/disk"
    assert plan["memory"]["file"] > 0 == plan["memory"]["host"]
    assert plan["memory"]["total"] + plan["memory"]["file"] == sum(plan["memory"].values()) - plan["memory"]["total"]


# ---- G15: the disk that is to take the archive is full ----


def test_g15_a_disk_without_room_for_one_sequence_is_an_error_of_the_plan(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    engine = archiving(folder)
    with pytest.raises(MemoryLimitError, match=f"needs 1 MB in {folder}; 0 MB may be used there") as refused:
        engine.plan(engine.measure(requests()))
    assert "--kv-archive-place" in refused.value.hint


def test_g15_a_disk_with_little_room_makes_fewer_slots(folder, monkeypatch):
    layout = archiving(folder).policy.answering.layout(archiving(folder).spec, 112)
    free = int(1.9 * layout.stored_bytes / 0.92)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, free))
    engine = archiving(folder)
    assert engine.plan(engine.measure(requests())).slots == 2


def test_g15_a_disk_that_fills_up_before_the_file_is_made_ends_the_run_before_the_first_answer(
    bmx, model, folder, monkeypatch
):
    Path("in.jsonl").write_text(json.dumps({"id": "a", "prompt": words(PROMPTS[0])}))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    given = ("-m", model, "--kv-archive", "int4", "--kv-budget", 64, "--max-tokens", 5, "--no-chat-template")
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        ended = bmx("run", "in.jsonl", *given, "--kv-archive-place", folder)
    assert ended.code == 1
    assert f"{folder} has no room for" in ended.err
    assert not Path("in.out.jsonl").exists()
    assert bmx("run", "in.jsonl", *given).code == 0


@contextmanager
def files_no_larger_than(size):
    """A limit on this process's files, as a disk with that much room."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_g15_a_file_that_may_not_grow_so_large_is_an_error_before_anything_is_in_it(folder):
    with files_no_larger_than(10_000), pytest.raises(OutputError, match="has no room for 2 MB") as refused:
        FileMemory(folder, 2_000_000, 4)
    assert "name another folder" in refused.value.hint
    assert os.listdir(folder) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_g15_a_full_disk_is_an_error_that_names_the_folder(code, folder, monkeypatch):
    def full(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=f"{folder} has no room for 3,000 MB of KV pairs: {os.strerror(code)}"):
        FileMemory(folder, 3 * 10**9, 4)


# ---- G16: a place that cannot be used ----


@pytest.mark.parametrize("made", ["missing", "file", "unwritable"])
def test_g16_a_folder_that_cannot_be_used_is_refused_before_anything_is_loaded(made, tmp_path, monkeypatch):
    path = tmp_path / "place"
    if made == "file":
        path.write_text("")
    if made == "unwritable":
        path.mkdir()

        def refuse(**_):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(places, "TemporaryFile", refuse)
    with pytest.raises(UsageError, match="no file can be made in") as refused:
        check_place(str(path), "cpu")
    assert refused.value.hint == "--kv-archive-place takes device, host, or a folder that exists and can be written to"


@pytest.mark.parametrize("kind", ["tmpfs", "ramfs"])
def test_g16_a_folder_in_memory_is_refused_since_it_saves_none(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(places, "_file_system", lambda _: kind)
    with pytest.raises(UsageError, match=f"is a {kind}, which keeps its files in memory"):
        check_place(str(tmp_path), "cpu")


def test_the_type_of_a_file_system_is_the_mount_s():
    shm = Path("/dev/shm")  # noqa: S108 - nothing is written
    if not shm.is_dir():
        pytest.skip("this machine has no /dev/shm")
    assert places._file_system(str(shm)) == "tmpfs"


def test_g16_host_memory_is_refused_on_a_cpu_whose_memory_it_is():
    with pytest.raises(UsageError, match="host is for GPUs"):
        open_place("host", CPU, 1, 1)


def test_g16_a_run_refuses_the_place_before_it_loads_a_model(bmx):
    Path("in.jsonl").write_text('{"prompt": "x"}')
    for given, said in (
        (("--kv-archive", "int4", "--kv-archive-place", "nowhere"), "no file can be made in 'nowhere'"),
        (("--kv-archive", "int4", "--device", "cpu", "--kv-archive-place", "host"), "host is for GPUs"),
        (("--kv-archive-place", "."), "nothing is archived"),
    ):
        ended = bmx("run", "in.jsonl", "-m", "no/such-model", *given)
        assert ended.code == 2
        assert said in ended.complaint[0]
    planned = bmx("plan-batch", "in.jsonl", "-m", "fake", "--kv-archive", "int4", "--kv-archive-place", "nowhere")
    assert (planned.code, "no file can be made in 'nowhere'" in planned.err) == (2, True)


def test_what_is_not_on_the_device_is_not_handed_to_its_kernels():
    """Of a GPU: attention then reads through ``LayerSlots``, which copies what it reads."""
    for place in (HostMemory(), object.__new__(FileMemory)):
        assert not place.is_on(torch.device("cuda"))
    engine = tiny_engine("llama", kv_policy="none")
    layouts = (engine.policy.layout(engine.spec, 20),)

    class Elsewhere:
        def zeros(self, shape, dtype):
            return torch.zeros(shape, dtype=dtype)

        def is_on(self, _):
            return False

    assert KVPool(layouts, (1,), F32, CPU, Elsewhere()).rows == (None,) * len(engine.spec.layers)
    coded = engine.with_config(EngineConfig(kv_policy="none", kv_format="int4")).policy.layout(engine.spec, 20)
    assert parts_of(KVPool((coded,), (1,), F32, CPU, Elsewhere()))[0].channel_rows is None
