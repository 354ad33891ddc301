"""Fetching and dividing data without the network, from a server that can misbehave; a part of a set is a set."""

import hashlib
import io
import json
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from common.config.load import load_config
from common.runtime.errors import UserError
from tools import get_data, get_weights, subset
from tools.get_data import Part, Source, fetch, get, unpack

ROOT = Path(__file__).parents[2]


class Server:
    """Serves bytes by name, with ranges. `cut` names are sent half whenever a request starts at their beginning."""

    def __init__(self):
        self.files, self.cut, self.requests, self.ranges = {}, set(), [], True
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.rpartition("/")[2]
                asked = self.headers.get("Range")
                outer.requests.append((name, asked))
                if name not in outer.files:
                    self.send_error(404)
                    return
                content = outer.files[name]
                start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and outer.ranges else 0
                if start >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                rest = content[start:]
                self.wfile.write(rest[: len(rest) // 2] if name in outer.cut and not start else rest)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, name, content):
        self.files[name] = content
        return Source(f"{self.url}/{name}", hashlib.md5(content).hexdigest(), size=len(content))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(get_data, "PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = Server()
    yield served
    served.server.shutdown()


def zipped(files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tarred(files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def photographs(count, folder="val2017"):
    return {f"{folder}/{i:012d}.jpg": bytes([i]) * 5000 for i in range(count)}


def part_of(source, images):
    return Part(source, "images", images, 1)


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_an_archive_is_fetched_unpacked_and_removed_and_a_second_time_nothing_is_asked(server, tmp_path, pack):
    files = photographs(3)
    source = server.add("val2017.zip" if pack is zipped else "val.tar", pack(files))
    assert "3 files" in get(part_of(source, 3), tmp_path)
    for name, content in files.items():
        assert (tmp_path / "images" / name).read_bytes() == content
    assert not (tmp_path / source.name).exists()
    asked = len(server.requests)
    assert "complete" in get(part_of(source, 3), tmp_path)
    assert len(server.requests) == asked


def test_a_connection_that_is_cut_goes_on_where_it_stopped(server, tmp_path):
    content = bytes(range(256)) * 40
    source = server.add("file.bin", content)
    server.cut.add("file.bin")
    assert fetch(source, tmp_path / "file.bin").read_bytes() == content
    assert server.requests == [("file.bin", None), ("file.bin", f"bytes={len(content) // 2}-")]


def test_what_an_earlier_attempt_left_is_not_fetched_again(server, tmp_path):
    content = bytes(range(256)) * 40
    source = server.add("file.bin", content)
    (tmp_path / "file.bin.part").write_bytes(content[:7000])
    assert fetch(source, tmp_path / "file.bin").read_bytes() == content
    assert server.requests == [("file.bin", "bytes=7000-")]
    assert list(tmp_path.iterdir()) == [tmp_path / "file.bin"]


def test_a_file_of_unknown_size_that_came_whole_before_an_interruption_is_taken(server, tmp_path):
    content = bytes(range(256)) * 40
    known = server.add("model.pt", content)
    (tmp_path / "model.pt.part").write_bytes(content)
    assert fetch(Source(known.url, known.digest), tmp_path / "model.pt").read_bytes() == content
    (tmp_path / "other.pt.part").write_bytes(content[::-1])
    server.add("other.pt", content)
    with pytest.raises(UserError, match="the download was deleted"):
        fetch(Source(f"{server.url}/other.pt", known.digest), tmp_path / "other.pt")


def test_a_disk_that_becomes_full_is_one_line_and_not_taken_for_the_network(server, tmp_path, monkeypatch, capsys):
    known = server.add("model.pt", bytes(5000))
    monkeypatch.setattr(get_weights, "CHECKPOINTS", {"model.pt": known})
    (tmp_path / "model.pt.part").symlink_to("/dev/full")
    assert get_weights.main(["--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: disk: the disk is full; free space")
    assert len(server.requests) == 1


def test_room_for_a_file_of_unknown_size_is_checked_when_the_server_tells_it(server, tmp_path, monkeypatch):
    known = server.add("model.pt", bytes(5000))
    monkeypatch.setattr(get_data.shutil, "disk_usage", lambda _: SimpleNamespace(free=4999))
    with pytest.raises(UserError, match="are needed"):
        fetch(Source(known.url, known.digest), tmp_path / "model.pt")
    assert not (tmp_path / "model.pt.part").exists()


def test_a_server_without_ranges_starts_again_and_the_file_is_right(server, tmp_path):
    content = bytes(range(256)) * 40
    source = server.add("file.bin", content)
    server.ranges = False
    (tmp_path / "file.bin.part").write_bytes(content[:7000])
    assert fetch(source, tmp_path / "file.bin").read_bytes() == content


def test_a_corrupt_file_is_refused_and_not_kept(server, tmp_path):
    content = b"a" * 4000
    source = server.add("file.bin", content)
    server.files["file.bin"] = b"a" * 3999 + b"b"
    with pytest.raises(UserError, match="differs from the published file"):
        fetch(source, tmp_path / "file.bin")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_size_is_refused_before_it_is_fetched(server, tmp_path):
    source = server.add("file.bin", b"a" * 4000)
    server.files["file.bin"] = b"a" * 10
    with pytest.raises(UserError, match="10 bytes instead of 4000"):
        fetch(source, tmp_path / "file.bin")


def test_a_server_that_gives_nothing_more_is_given_up_and_what_came_is_kept(server, tmp_path):
    source = server.add("file.bin", b"a" * 4000)
    server.cut.add("file.bin")
    server.ranges = False
    with pytest.raises(UserError, match="cannot be downloaded"):
        fetch(source, tmp_path / "file.bin")
    assert (tmp_path / "file.bin.part").stat().st_size == 2000
    assert len(server.requests) == 1 + get_data.RETRIES


def test_a_file_the_server_does_not_have_is_one_line(server, tmp_path):
    with pytest.raises(UserError, match="404") as caught:
        fetch(Source(f"{server.url}/nothing.zip", None), tmp_path / "nothing.zip")
    assert "\n" not in str(caught.value)


def test_a_mirror_that_is_no_address_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"mirror/file\.bin: not a URL; allowed are https://"):
        fetch(Source("mirror/file.bin", "0" * 32, size=5), tmp_path / "file.bin")


def test_a_wrong_file_in_the_way_is_left_alone(server, tmp_path):
    source = server.add("file.bin", b"a" * 4000)
    (tmp_path / "file.bin").write_text("mine")
    with pytest.raises(UserError, match="remove it and rerun"):
        fetch(source, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_text() == "mine"


def test_room_is_checked_before_anything_is_fetched(server, tmp_path):
    source = server.add("val2017.zip", zipped(photographs(1)))
    with pytest.raises(UserError, match="GB are needed"):
        get(Part(source, "images", 1, 10**18), tmp_path)
    assert server.requests == []


def test_files_that_are_there_are_never_overwritten(server, tmp_path):
    source = server.add("val2017.zip", zipped(photographs(2)))
    mine = tmp_path / "images/val2017/000000000001.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match="its size differs"):
        get(part_of(source, 2), tmp_path)
    assert mine.read_text() == "mine"


def test_a_file_that_was_lost_is_fetched_again_and_the_others_are_kept(server, tmp_path):
    source = server.add("val2017.zip", zipped(photographs(2)))
    get(part_of(source, 2), tmp_path)
    lost, kept = (tmp_path / f"images/val2017/{i:012d}.jpg" for i in range(2))
    lost.unlink()
    before = kept.stat().st_mtime_ns
    get(part_of(source, 2), tmp_path)
    assert lost.read_bytes() == bytes([0]) * 5000
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_a_damaged_archive_is_one_line(tmp_path, name):
    content = (zipped if name == "a.zip" else tarred)(photographs(3))
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged archive") as caught:
        unpack(tmp_path / name, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_an_archive_with_another_number_of_images_is_refused(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped(photographs(3)))
    with pytest.raises(UserError, match="3 images instead of 4"):
        unpack(tmp_path / "a.zip", tmp_path / "out", images=4)
    assert not get_data.is_unpacked(tmp_path / "out", "a.zip")


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_an_archive_cannot_write_outside_its_folder(tmp_path, pack):
    name = tmp_path / ("a.zip" if pack is zipped else "a.tar")
    name.write_bytes(pack({"../evil.jpg": b"x"}))
    with pytest.raises(UserError, match="a path outside the folder"):
        unpack(name, tmp_path / "out")
    assert not (tmp_path / "evil.jpg").exists()


def test_the_command_takes_a_mirror_and_names_unknown_parts(server, tmp_path, monkeypatch, capsys):
    source = server.add("val2017.zip", zipped(photographs(2)))
    elsewhere = Source("http://127.0.0.1:9/val2017.zip", source.digest, size=source.size)
    monkeypatch.setitem(get_data.SETS, "coco", {"val2017": part_of(elsewhere, 2)})
    assert get_data.main(["coco", str(tmp_path), "--mirror", server.url]) == 0
    assert "2 files" in capsys.readouterr().out
    assert get_data.main(["coco", str(tmp_path), "--only", "test2017"]) == 2
    assert capsys.readouterr().err == "error: --only: found 'test2017'; coco has val2017\n"


def test_every_checkpoint_of_the_tables_has_an_address_and_all_but_one_a_sum():
    names = {f"yolov5{s}.pt" for s in "sml"} | {f"yolo11{s}.pt" for s in "sml"}
    names |= {load_config(ROOT / "configs/vit/swin_t.yaml").weights.name}
    names |= {Path(yaml.safe_load((ROOT / "configs/tables/swin.yaml").read_text())["models"]["swin_s"]["weights"]).name}
    assert names <= get_weights.CHECKPOINTS.keys()
    assert [name for name, source in get_weights.CHECKPOINTS.items() if source.digest is None] == ["yolov5m.pt"]
    for name, source in get_weights.CHECKPOINTS.items():
        assert source.url.startswith("https://")
        assert source.name == name


def test_checkpoints_are_fetched_checked_and_found_again(server, tmp_path, monkeypatch, capsys):
    content = b"weights" * 100
    server.files |= {"model-abc.pth": content, "damaged.pth": content}
    found = Source("https://nowhere/model-abc.pth", hashlib.sha256(content).hexdigest()[:8], "sha256")
    wrong = Source("https://nowhere/damaged.pth", "00000000", "sha256")
    monkeypatch.setattr(get_weights, "CHECKPOINTS", {"model-abc.pth": found, "damaged.pth": wrong})
    command = ["--folder", str(tmp_path), "--mirror", server.url]
    assert get_weights.main(["model-abc.pth", *command]) == 0
    assert get_weights.main(["model-abc.pth", *command]) == 0
    assert len(server.requests) == 1
    assert get_weights.main(["damaged.pth", *command]) == 2
    assert get_weights.main(["unknown.pth", *command]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model-abc.pth"]
    assert capsys.readouterr().err.count("error: ") == 2


@pytest.fixture
def coco(tmp_path):
    """40 images, listed backwards; class 1 is in all of them, class 2 in three."""
    (tmp_path / "all").mkdir()
    images, annotations = [], []
    for i in reversed(range(40)):
        name = f"{i:03d}.jpg"
        (tmp_path / "all" / name).write_text(name)
        images.append({"id": i, "file_name": name, "width": 10, "height": 10})
        for category in [1] + [2] * (i in (11, 22, 33)):
            row = {"id": len(annotations) + 1, "image_id": i, "category_id": category, "bbox": [0, 0, 1, 1]}
            annotations.append(row)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    (tmp_path / "all.json").write_text(json.dumps(content))
    return tmp_path


def make_subset(folder, name, *options):
    command = [str(folder / "all.json"), str(folder / "all"), str(folder / name), "--count", "6", *options]
    assert subset.main(command) == 0
    content = json.loads((folder / name / "annotations.json").read_text())
    names = [image["file_name"] for image in content["images"]]
    assert sorted(path.name for path in (folder / name / "images").iterdir()) == names
    assert {a["image_id"] for a in content["annotations"]} <= {image["id"] for image in content["images"]}
    return names, content


def test_the_first_images_are_the_first_by_name(coco):
    names, content = make_subset(coco, "first")
    assert names == [f"{i:03d}.jpg" for i in range(6)]
    assert len(content["annotations"]) == 6
    link = coco / "first/images/000.jpg"
    assert link.is_symlink()
    assert link.read_text() == "000.jpg"


def test_random_images_depend_on_the_seed_alone(coco):
    options = ("--how", "random", "--seed")
    first, again, other = (make_subset(coco, n, *options, s)[0] for n, s in (("a", "1"), ("b", "1"), ("c", "2")))
    assert first == again != other


def test_a_stratified_subset_has_the_rare_class_as_often_as_the_common_one(coco):
    names, _ = make_subset(coco, "even", "--how", "stratified", "--copy")
    assert {"011.jpg", "022.jpg", "033.jpg"} <= set(names)
    assert not (coco / "even/images/011.jpg").is_symlink()


def test_a_subset_overwrites_nothing_and_an_interrupted_one_is_completed(coco, capsys):
    make_subset(coco, "part")
    command = [str(coco / "all.json"), str(coco / "all"), str(coco / "part"), "--count", "6"]
    assert subset.main(command) == 2
    assert "exists; remove it first" in capsys.readouterr().err
    (coco / "part/annotations.json").unlink()
    (coco / "part/images/003.jpg").unlink()
    assert subset.main([*command[:-1], "5"]) == 2
    assert "contains other images" in capsys.readouterr().err
    make_subset(coco, "part")


def test_too_large_a_subset_and_missing_images_are_one_line(coco, capsys):
    command = [str(coco / "all.json"), str(coco / "all"), str(coco / "out"), "--count"]
    assert subset.main([*command, "41"]) == 2
    (coco / "all/004.jpg").unlink()
    assert subset.main([*command, "6"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert Path(errors[1].split(":")[1].strip()).name == "004.jpg"


@pytest.mark.parametrize("content", ["[]", "{}", '{"images": [{"id": 1}]}'])
def test_a_subset_of_what_is_no_coco_file_is_one_line(coco, capsys, content):
    (coco / "all.json").write_text(content)
    assert subset.main([str(coco / "all.json"), str(coco / "all"), str(coco / "out"), "--count", "1"]) == 2
    assert "not a COCO detection file" in capsys.readouterr().err


def test_an_interrupted_copy_leaves_no_half_image(coco, monkeypatch, capsys):
    def interrupted(source, target):
        Path(target).write_text("00")
        raise KeyboardInterrupt

    command = [str(coco / "all.json"), str(coco / "all"), str(coco / "out"), "--count", "6", "--copy"]
    with monkeypatch.context() as patched:
        patched.setattr(subset.shutil, "copyfile", interrupted)
        assert subset.main(command) == 130
    assert capsys.readouterr().err.endswith("interrupted; rerun the same command to resume\n")
    assert list((coco / "out/images").iterdir()) == []
    assert subset.main(command) == 0
    assert (coco / "out/images/000.jpg").read_text() == "000.jpg"
